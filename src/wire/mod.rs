//! What peers say to each other: frames, limits, cluster keys, the hello, control frames, inference messages.
//!
//! Nothing here reads a socket on its own account, knows a peer or has a clock. `docs/protocol.md` is the description
//! for other implementations; `tests/fixtures/wire` holds golden bytes that no commit edits in place.

pub mod control;
pub mod frame;
pub mod hello;
pub mod infer;
pub mod keys;
pub mod limits;
pub mod models;
pub mod roster;
pub mod version;
