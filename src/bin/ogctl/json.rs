//! JSON as `ogctl` prints it: one object a line, lossless, and safe on a terminal.
//!
//! `serde_json` alone leaves DEL, C1 and bidi characters as they are, and some terminals act on them.

use crate::term;
use serde::Serialize;
use serde_json::ser::Formatter;
use std::io::{self, Write};

/// Writes unsafe characters inside strings as `\uXXXX`; reading gives the same text back.
struct Escaping;

impl Formatter for Escaping {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some((at, c)) = rest.char_indices().find(|&(_, c)| term::is_unsafe(c)) {
            writer.write_all(&rest.as_bytes()[..at])?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = &rest[at + c.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }
}

/// `value` as one line with its line feed.
pub fn line<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(256);
    value
        .serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Escaping))
        .expect("views hold text, numbers and lists, which always become JSON");
    bytes.push(b'\n');
    bytes
}

/// What stands in front of every object: the version of its layout.
#[derive(Debug, Serialize)]
pub struct Schema<T> {
    schema: u32,
    #[serde(flatten)]
    view: T,
}

impl<T> Schema<T> {
    /// Version 1 of `view`.
    pub const fn one(view: T) -> Self {
        Self { schema: 1, view }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_schema_comes_first() {
        #[derive(Serialize)]
        struct View {
            a: u32,
        }
        assert_eq!(line(&Schema::one(View { a: 2 })), b"{\"schema\":1,\"a\":2}\n");
    }

    proptest! {
        #[test]
        fn json_is_lossless_and_steers_no_terminal(text in any::<String>()) {
            let bytes = line(&text);
            let written = std::str::from_utf8(&bytes).unwrap();
            prop_assert!(written.trim_end_matches('\n').chars().all(|c| !term::is_unsafe(c)));
            prop_assert_eq!(serde_json::from_slice::<String>(&bytes).unwrap(), text);
        }
    }
}
