//! Reads `a{sv}` details: typed, and forgiving.
//!
//! A key that is missing or has another type is absent, never an error: daemons of other versions
//! may add keys, and clients ignore what they do not know.

use opengateway::api::proxy::Details;
use zbus::Variant;
use zbus::wire::Dict;

/// Typed access to details.
pub trait Read {
    /// The value of `key`.
    fn value(&self, key: &str) -> Option<&Variant<'static>>;

    /// A string.
    fn text(&self, key: &str) -> Option<String> {
        self.value(key).and_then(string)
    }
    /// A string, empty when absent.
    fn text_or_empty(&self, key: &str) -> String {
        self.text(key).unwrap_or_default()
    }
    /// A boolean.
    fn flag(&self, key: &str) -> Option<bool> {
        match self.value(key) {
            Some(Variant::Bool(flag)) => Some(*flag),
            _ => None,
        }
    }
    /// A number without sign.
    fn number(&self, key: &str) -> Option<u64> {
        match self.value(key) {
            Some(Variant::U64(number)) => Some(*number),
            Some(Variant::U32(number)) => Some(u64::from(*number)),
            Some(Variant::U16(number)) => Some(u64::from(*number)),
            _ => None,
        }
    }
    /// A number with a fraction; JSON and arithmetic take finite ones alone.
    fn real(&self, key: &str) -> Option<f64> {
        match self.value(key) {
            Some(Variant::F64(real)) if real.is_finite() => Some(*real),
            Some(Variant::U32(number)) => Some(f64::from(*number)),
            _ => None,
        }
    }
    /// A list of strings, empty when absent.
    fn texts(&self, key: &str) -> Vec<String> {
        match self.value(key) {
            Some(Variant::Array(array)) => array.iter().filter_map(string).collect(),
            _ => Vec::new(),
        }
    }
    /// A list of numbers without sign, empty when absent.
    fn numbers(&self, key: &str) -> Vec<u64> {
        let number = |value: &Variant<'_>| match value {
            Variant::U64(number) => Some(*number),
            Variant::U32(number) => Some(u64::from(*number)),
            _ => None,
        };
        match self.value(key) {
            Some(Variant::Array(array)) => array.iter().filter_map(number).collect(),
            _ => Vec::new(),
        }
    }
    /// Details inside, empty when absent.
    fn inner(&self, key: &str) -> Details {
        match self.value(key) {
            Some(Variant::Dict(dict)) => details(dict),
            _ => Details::new(),
        }
    }
    /// A list of details, empty when absent.
    fn inners(&self, key: &str) -> Vec<Details> {
        let inner = |value: &Variant<'_>| match value {
            Variant::Dict(dict) => Some(details(dict)),
            _ => None,
        };
        match self.value(key) {
            Some(Variant::Array(array)) => array.iter().filter_map(inner).collect(),
            _ => Vec::new(),
        }
    }
}

impl Read for Details {
    fn value(&self, key: &str) -> Option<&Variant<'static>> {
        self.get(key).map(|value| &**value)
    }
}

fn string(value: &Variant<'_>) -> Option<String> {
    match value {
        Variant::Str(text) => Some(text.as_str().to_owned()),
        Variant::ObjectPath(path) => Some(path.as_str().to_owned()),
        _ => None,
    }
}

fn details(dict: &Dict<'_, '_>) -> Details {
    let entry = |(key, value): (&Variant<'_>, &Variant<'_>)| {
        let value = match value {
            Variant::Variant(inner) => inner.try_to_owned(),
            plain => plain.try_to_owned(),
        };
        Some((string(key)?, value.ok()?))
    };
    dict.iter().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn sample() -> Details {
        let inner: HashMap<String, Variant<'_>> = HashMap::from([("Total".into(), Variant::from(7u64))]);
        let value = |value: Variant<'_>| value.try_into_owned().unwrap();
        Details::from([
            ("Name".into(), value(Variant::from("NodeA"))),
            ("Peers".into(), value(Variant::from(3u32))),
            ("Load".into(), value(Variant::from(f64::NAN))),
            ("Models".into(), value(Variant::from(vec!["a", "b"]))),
            ("Memory".into(), value(Variant::from(inner))),
        ])
    }

    #[test]
    fn values_are_read_by_type() {
        let details = sample();
        assert_eq!(details.text("Name").as_deref(), Some("NodeA"));
        assert_eq!(details.number("Peers"), Some(3));
        assert_eq!(details.texts("Models"), ["a", "b"]);
        assert_eq!(details.inner("Memory").number("Total"), Some(7));
    }

    #[test]
    fn missing_keys_and_other_types_are_absent() {
        let details = sample();
        assert_eq!((details.text("Peers"), details.number("Name"), details.flag("Nonsense")), (None, None, None));
        assert_eq!(details.real("Load"), None, "not a number has no JSON");
        assert!(details.texts("Name").is_empty() && details.inners("Models").is_empty());
    }
}
