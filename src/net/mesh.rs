//! The part of the network task that keeps a large cluster connected with few connections: whom to hold, whom only to know.

use tokio::sync::oneshot;

use super::task::Task;
use crate::domain::cluster::ClusterId;
use crate::domain::node::NodeId;

impl Task<'_> {
    /// Connects to a member that is only known.
    pub(super) fn reach(&mut self, cluster: &ClusterId, member: &NodeId, reply: oneshot::Sender<bool>) {
        let _ = (cluster, member, reply.send(false));
    }
}
