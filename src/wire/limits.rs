//! Every limit of the peer protocol, in one place. `docs/protocol.md` repeats them with their reasons.

use std::time::Duration;

/// A buffer grows by this much at a time while a frame arrives, whatever length was announced: a length costs nothing,
/// bytes do.
pub const READ_STEP_BYTES: usize = 64 * 1024;

/// H1 has one size.
pub const H1_BYTES: usize = 69;
/// H2 and H3, room for the proofs of later versions.
pub const MAX_HELLO_FRAME_BYTES: usize = 8 * 1024;
/// The whole hello, from the opened stream to the first heartbeat. Where hundreds of nodes start on few processors it takes more
/// than 5 s, and those that are begun again and again cost more than those that may take their time; how many a stranger can
/// hold is bounded by numbers, not by this.
pub const HELLO_DEADLINE: Duration = Duration::from_secs(15);
/// Hellos that this node has under way to one peer at once: one that joins several clusters greets in a few of them at a
/// time.
pub const MAX_HELLOS_PER_PEER: usize = 4;
/// Hellos of one peer that this node answers at once; one more is reset. Twice what a peer may begin, because the end of a
/// hello is seen there a little earlier than here.
pub const MAX_HELLOS_FROM_PEER: usize = 2 * MAX_HELLOS_PER_PEER;
/// Control frames that one member may send in a row, and then per second; what comes faster is read later.
pub const CONTROL_BURST: u32 = 256;
/// See [`CONTROL_BURST`].
pub const CONTROL_PER_SECOND: u32 = 64;
/// A member that reads nothing for this long is given up.
pub const CONTROL_STALL: Duration = Duration::from_secs(15);

/// The largest control frame of any kind (a view or a roster).
pub const MAX_CONTROL_FRAME_BYTES: usize = 16 * 1024;
/// A heartbeat.
pub const MAX_HEARTBEAT_BYTES: usize = 64;
/// A state.
pub const MAX_STATE_BYTES: usize = 8 * 1024;
/// A goodbye.
pub const MAX_BYE_BYTES: usize = 64;
/// Name of a node.
pub const MAX_NODE_NAME_BYTES: usize = 64;
/// Version text of a node's software.
pub const MAX_SOFTWARE_BYTES: usize = 32;
/// Models in a state.
pub const MAX_MODELS: usize = 64;
/// Name of a model.
pub const MAX_MODEL_NAME_BYTES: usize = 128;
/// The details of the models of a state.
pub const MAX_MODELS_BYTES: usize = 8 * 1024;
/// Quantisation of a model, such as "Q4_K_M".
pub const MAX_QUANTISATION_BYTES: usize = 16;
/// Tiers in a state.
pub const MAX_TIERS: usize = 32;
/// Name of a tier.
pub const MAX_TIER_NAME_BYTES: usize = 64;
/// Members in a view.
pub const MAX_VIEW_ENTRIES: usize = 32;
/// Addresses of one member in a view.
pub const MAX_VIEW_ADDRESSES: usize = 4;
/// Models of one member in a roster.
pub const MAX_ROSTER_MODELS: usize = 4;
/// A notice.
pub const MAX_NOTICE_BYTES: usize = 128;
/// A binary multiaddr.
pub const MAX_ADDRESS_BYTES: usize = 96;
/// A binary peer id.
pub const MAX_PEER_ID_BYTES: usize = 64;

/// What is sent to and fro as a sign of life.
pub const PING_BYTES: usize = 32;
/// Streams of one connection on which signs of life are given at once; one more is reset.
pub const MAX_PING_STREAMS: usize = 2;
/// Between two signs of life on one stream, at least: who asks faster waits.
pub const PING_PACE: Duration = Duration::from_millis(20);
/// A stream on which nothing is asked for so long is closed.
pub const PING_IDLE: Duration = Duration::from_secs(30);

/// An `inference_request` on the wire. The prompt may take all of it; JSON escapes count.
pub const MAX_REQUEST_FRAME_BYTES: usize = 1 << 20;
/// An `inference_response` on the wire.
pub const MAX_RESPONSE_FRAME_BYTES: usize = 16 * 1024;
/// Text of one token frame: its JSON escapes (six bytes for one at worst) and its envelope still fit the frame.
pub const MAX_TOKEN_TEXT_BYTES: usize = 2 * 1024;
/// The message of an error.
pub const MAX_MESSAGE_BYTES: usize = 512;

/// A request that began to arrive is whole within this time, also on a slow path.
pub const REQUEST_ARRIVES: Duration = Duration::from_secs(30);
/// A large request waits so long for room at the server; then it is answered `Busy`.
pub const ROOM_WAIT: Duration = Duration::from_secs(5);
/// After this, of a large request that has got room so many bytes must have come for each second.
pub const LARGE_REQUEST_BEGINS: Duration = Duration::from_secs(5);
/// See [`LARGE_REQUEST_BEGINS`].
pub const LARGE_REQUEST_PER_SECOND: usize = 16 * 1024;
/// The server shows that it lives at least this often while a prompt is at it.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// The asker gives up after this much silence.
pub const STALL: Duration = Duration::from_secs(10);
/// The server gives up when nothing was read for this long.
pub const SLOW_CONSUMER: Duration = Duration::from_secs(30);
