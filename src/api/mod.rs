//! The D-Bus contract: names, errors, option and detail keys, streams, client proxies.
//!
//! The daemon's bus objects and every client written in Rust (first of all `ogctl`) share this
//! module, so that a name is written once. It mirrors the files in `dbus/`, which are the
//! reference. It holds no logic of the daemon and imports nothing else of ours.
//!
//! | module | owns |
//! | --- | --- |
//! | [`names`] | bus name, paths, interfaces, error names with their hints and exit codes |
//! | [`keys`] | keys of the `a{sv}` options and details |
//! | [`path`] | object paths of clusters and jobs |
//! | [`stream`] | the JSON lines of a `StartPrompt` pipe |
//! | [`proxy`] | client proxies |

pub mod keys;
pub mod names;
pub mod path;
pub mod proxy;
pub mod stream;
