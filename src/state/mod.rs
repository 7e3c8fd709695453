//! The state directory: its lock, files that are written whole or not at all, the identity, the saved clusters,
//! the peers of before.
//!
//! All functions are synchronous and small (a few KiB, one fsync or two): the daemon calls them at its start, and in
//! `spawn_blocking` afterwards. A damaged file is reported and kept, never replaced.

mod atomic;
mod clusters;
mod dir;
mod identity;
mod peers;

pub use atomic::{StorageError, write as write_file};
pub use clusters::{ClustersError, MAX_SAVED, Memory, SavedCluster};
pub use dir::{DirError, StateDir};
pub use identity::{IdentityFileError, load_or_create};
pub use peers::{
    MAX_PEER_ADDRESS_BYTES, MAX_PEER_ADDRESSES, MAX_PEER_ID_BYTES, MAX_PEERS, MAX_PEERS_FILE_BYTES, PeersFile, SavedPeer,
};
