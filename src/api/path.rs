//! Object paths: how a cluster id becomes one and back.
//!
//! As `sd_bus_path_encode` does it: `gatewayai-poc` is `gatewayai_2dpoc`. Clients should use the
//! paths that the service returns; this module is for the service, and for showing a path as a name.

use std::fmt::Write as _;

/// Parent of the cluster objects, without a slash at the end.
pub const CLUSTER_PATH_PREFIX: &str = "/org/opengateway/Gateway1/cluster";
/// Parent of the job objects, without a slash at the end.
pub const JOB_PATH_PREFIX: &str = "/org/opengateway/Gateway1/job";

/// Writes each byte outside `[A-Za-z0-9]`, and a leading digit, as `_xx`; the empty text is `_`.
pub fn escape(text: &str) -> String {
    if text.is_empty() {
        return "_".to_owned();
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for (at, byte) in text.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (at > 0 && byte.is_ascii_digit()) {
            escaped.push(char::from(byte));
        } else {
            write!(escaped, "_{byte:02x}").expect("writing to a String does not fail");
        }
    }
    escaped
}

/// Reverses [`escape`]. `None` for what `escape` never writes.
pub fn unescape(label: &str) -> Option<String> {
    if label == "_" {
        return Some(String::new());
    }
    let mut bytes = Vec::with_capacity(label.len());
    let mut rest = label.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first == b'_' {
            let (digits, after) = after.split_at_checked(2)?;
            let digits = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()))?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = after;
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    // Comparing refuses every other spelling (`_61` for `a`, upper-case hex), so ids and paths are one to one.
    String::from_utf8(bytes).ok().filter(|text| !text.is_empty() && escape(text) == label)
}

/// The object path of the cluster `id`.
pub fn cluster_path(id: &str) -> String {
    format!("{CLUSTER_PATH_PREFIX}/{}", escape(id))
}

/// The cluster id of an object path; `None` for another kind of path.
pub fn cluster_id(path: &str) -> Option<String> {
    unescape(path.strip_prefix(CLUSTER_PATH_PREFIX)?.strip_prefix('/')?)
}

/// The object path of the job `id`.
pub fn job_path(id: u64) -> String {
    format!("{JOB_PATH_PREFIX}/{id}")
}

/// The job number of an object path; `None` for another kind of path.
pub fn job_id(path: &str) -> Option<u64> {
    let digits = path.strip_prefix(JOB_PATH_PREFIX)?.strip_prefix('/')?;
    digits.parse().ok().filter(|id: &u64| id.to_string() == digits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_are_escaped_as_sd_bus_path_encode_does() {
        assert_eq!(escape("gatewayai-poc"), "gatewayai_2dpoc");
        assert_eq!(escape(""), "_");
        assert_eq!(escape("3b"), "_33b");
        assert_eq!(escape("a_b"), "a_5fb");
        assert_eq!(cluster_path("Llama-3.2-3B"), "/org/opengateway/Gateway1/cluster/Llama_2d3_2e2_2d3B");
    }

    #[test]
    fn other_spellings_of_a_path_are_refused() {
        for bad in ["_61", "_2D", "_2", "a_", "a_zz", "_+1", "3b", "_ff", "", "a-b"] {
            assert_eq!(unescape(bad), None, "{bad:?}");
        }
        assert_eq!(cluster_id("/org/opengateway/Gateway1/job/1"), None);
        assert_eq!(job_id("/org/opengateway/Gateway1/job/01"), None);
        assert_eq!(job_id("/org/opengateway/Gateway1/job/7"), Some(7));
    }

    proptest! {
        #[test]
        fn every_text_reads_back_from_a_valid_path(text in any::<String>()) {
            let path = cluster_path(&text);
            prop_assert!(zbus::ObjectPath::try_from(path.as_str()).is_ok());
            prop_assert_eq!(cluster_id(&path), Some(text));
        }
    }
}
