//! The `[relay]` section as checked.

use super::raw;

/// Places, circuits: what one process can reasonably hold.
const MOST: u32 = 16_384;
/// The least that a circuit carries: hello, models and a short answer.
const LEAST_BYTES: u64 = 128 * 1024;
/// The most, 1 TiB: no number for "without limit".
const MOST_BYTES: u64 = 1 << 40;
const MOST_HOURS: u32 = 24 * 31;
/// Connections of a relay when `network.max_connections` is absent, and of an ordinary node.
const CONNECTIONS: u32 = 4608;
const ORDINARY_CONNECTIONS: u32 = 384;

/// What this node carries for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelaySettings {
    /// It is a relay.
    pub enabled: bool,
    /// Places held for others at once.
    pub reservations: u32,
    /// Circuits at once.
    pub circuits: u32,
    /// Bytes of one circuit, both directions together.
    pub circuit_bytes: u64,
    /// Hours that a circuit may last.
    pub circuit_hours: u32,
}

impl RelaySettings {
    /// Checks `raw`.
    ///
    /// # Errors
    /// A sentence that names the key.
    pub(super) fn check(raw: &raw::Relay) -> Result<Self, String> {
        let bounded = |key: &str, value: Option<u32>, default: u32, most: u32| match value {
            Some(value) if value < 1 || value > most => Err(format!("relay.{key} is {value}; it is between 1 and {most}")),
            value => Ok(value.unwrap_or(default)),
        };
        let circuit_bytes = raw.circuit_bytes.unwrap_or(1 << 30);
        if !(LEAST_BYTES..=MOST_BYTES).contains(&circuit_bytes) {
            return Err(format!("relay.circuit_bytes is {circuit_bytes}; it is between {LEAST_BYTES} and {MOST_BYTES}"));
        }
        Ok(Self {
            enabled: raw.enabled.unwrap_or(false),
            reservations: bounded("reservations", raw.reservations, 128, MOST)?,
            circuits: bounded("circuits", raw.circuits, 1024, MOST)?,
            circuit_bytes,
            circuit_hours: bounded("circuit_hours", raw.circuit_hours, 24, MOST_HOURS)?,
        })
    }

    /// Connections in all when the configuration does not say: many more nodes meet at a relay than at any other.
    pub(super) const fn usual_connections(&self) -> u32 {
        if self.enabled { CONNECTIONS } else { ORDINARY_CONNECTIONS }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<RelaySettings, String> {
        RelaySettings::check(&toml::from_str(text).unwrap())
    }

    #[test]
    fn a_node_is_no_relay_until_it_is_told_to_be_one() {
        let settings = check("").unwrap();
        assert!(!settings.enabled);
        assert_eq!(
            (settings.reservations, settings.circuits, settings.circuit_bytes, settings.circuit_hours),
            (128, 1024, 1 << 30, 24)
        );
        assert_eq!(settings.usual_connections(), 384);
        assert_eq!(check("enabled = true").unwrap().usual_connections(), 4608);
    }

    #[test]
    fn limits_hold_at_the_limit_and_one_past_it() {
        for (key, least, most) in [
            ("reservations", 1, u64::from(MOST)),
            ("circuits", 1, u64::from(MOST)),
            ("circuit_bytes", LEAST_BYTES, MOST_BYTES),
            ("circuit_hours", 1, u64::from(MOST_HOURS)),
        ] {
            for good in [least, most] {
                assert!(check(&format!("{key} = {good}")).is_ok(), "{key} = {good}");
            }
            // Zero is no way to say "without limit": it ends every circuit at once, or none.
            for bad in [0, least - 1, most + 1] {
                assert!(check(&format!("{key} = {bad}")).unwrap_err().contains(key), "{key} = {bad}");
            }
        }
    }
}
