//! The configuration: as written ([`raw`]), as merged (`load`), as checked ([`Settings`]).
//!
//! Only [`Settings`] travels. Built without the daemon too, so that `ogctl config check` needs no daemon.

mod engine;
mod http;
mod load;
pub mod raw;
mod relay;
mod settings;

pub use engine::EngineSettings;
pub use http::{DEFAULT_HTTP_PORT, HttpAddress, HttpSettings, MAX_SOCKET_PATH_BYTES, refuses as refuses_remote};
pub use load::{Checked, ConfigError, Environment, Overrides, Roots, check, load};
pub use relay::RelaySettings;
pub use settings::{BackendKind, BackendSettings, ClusterSettings, MAX_ADDRESS_BYTES, MAX_ADDRESSES, Settings, needs_restart};
