//! Plain data and the decisions on it: no async, no I/O, no clock, nothing of libp2p or D-Bus.

pub mod cluster;
pub mod doctor;
pub mod estimate;
pub mod footprint;
pub mod network;
pub mod node;
pub mod prompt;
pub mod resources;
pub mod tier;
pub mod upstream;
pub mod version;
