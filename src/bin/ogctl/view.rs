//! Views that are read from the bus key by key: a struct whose fields are the documented JSON keys, each with the key of the
//! bus that it comes from. What the bus does not say is `None`, never a guess.

use crate::details::Read as _;
use opengateway::api::proxy::Details;

/// A value under a key.
pub trait Value: Sized {
    /// The value, or what stands for its absence.
    fn of(details: &Details, key: &str) -> Self;
}

/// A struct of such values.
pub trait View: Sized {
    /// Reads all of them.
    fn read(details: &Details) -> Self;
}

macro_rules! values {
    ($($type:ty: $read:expr;)+) => {
        $(impl Value for $type {
            fn of(details: &Details, key: &str) -> Self {
                let read: fn(&Details, &str) -> Self = $read;
                read(details, key)
            }
        })+
    };
}

values! {
    String: |details, key| details.text_or_empty(key);
    Option<String>: |details, key| details.text(key);
    bool: |details, key| details.flag(key).unwrap_or(false);
    Option<bool>: |details, key| details.flag(key);
    Option<u64>: |details, key| details.number(key);
    Vec<String>: |details, key| details.texts(key);
    Vec<u64>: |details, key| details.numbers(key);
}

impl<T: View> Value for T {
    fn of(details: &Details, key: &str) -> Self {
        T::read(&details.inner(key))
    }
}

impl<T: View> Value for Option<T> {
    fn of(details: &Details, key: &str) -> Self {
        details.value(key).map(|_| T::read(&details.inner(key)))
    }
}

impl<T: View> Value for Vec<T> {
    fn of(details: &Details, key: &str) -> Self {
        details.inners(key).iter().map(T::read).collect()
    }
}

/// Declares views: `Name { field: Type = "Key", … }`.
macro_rules! views {
    ($($(#[$about:meta])* $name:ident { $($(#[$what:meta])* $field:ident: $type:ty = $key:literal,)+ })+) => {
        $(
            $(#[$about])*
            #[derive(Debug, serde::Serialize)]
            pub struct $name { $($(#[$what])* pub $field: $type,)+ }

            impl $crate::view::View for $name {
                fn read(details: &opengateway::api::proxy::Details) -> Self {
                    Self { $($field: $crate::view::Value::of(details, $key),)+ }
                }
            }
        )+
    };
}
pub(crate) use views;
