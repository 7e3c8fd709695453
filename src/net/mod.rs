//! The libp2p swarm and its only owner.
//!
//! Other layers hold a [`Handle`] and read [`Snapshot`]s; nothing of libp2p leaves this module.

mod handle;

pub use handle::{
    AnswerEvent, AnswerStream, Command, Event, Handle, InboundPrompt, JoinError, JoinOptions, LeaveError, Replier, Scripted, Snapshot,
};
