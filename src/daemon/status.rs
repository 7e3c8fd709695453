//! What this node tells the service manager: that it is ready, reloads, stops, and the line in `systemctl status`.

use std::fmt::Write as _;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::dbus::control::ControlState;
use crate::domain::node::ClusterState;
use crate::net::{self, Snapshot};

/// Most characters of the line: it stands in one row of `systemctl status`.
const MAX_CHARS: usize = 200;
/// Between two lines. What changes faster is told once.
const PAUSE: Duration = Duration::from_secs(1);

/// Tells the service manager; where there is none, nobody.
pub(super) fn notify(state: &[NotifyState<'_>]) {
    // Not run by systemd: nothing to tell.
    let _ = sd_notify::notify(state);
}

pub(super) fn reloading() {
    let mut state = vec![NotifyState::Reloading, NotifyState::Status("Reading the configuration again")];
    state.extend(NotifyState::monotonic_usec_now());
    notify(&state);
}

/// Whoever set a shorter time for the unit still gets the promise that running prompts may end: within `patience`.
pub(super) fn stopping(patience: Duration) {
    notify(&[
        NotifyState::Stopping,
        NotifyState::Status("Stopping: running prompts may end"),
        NotifyState::ExtendTimeoutUsec(u32::try_from(patience.as_micros()).unwrap_or(u32::MAX)),
    ]);
}

/// Follows the node, and tells when the line has changed.
#[derive(Debug)]
pub(super) struct Status {
    net: watch::Receiver<std::sync::Arc<Snapshot>>,
    control: watch::Receiver<ControlState>,
    told: String,
    not_before: Instant,
}

impl Status {
    pub(super) fn new(net: &net::Handle, control: watch::Receiver<ControlState>) -> Self {
        Self { net: net.watch(), control, told: String::new(), not_before: Instant::now() }
    }

    /// Tells that the node is ready, at the start and after a reload.
    pub(super) fn ready(&mut self) {
        let line = self.now();
        notify(&[NotifyState::Ready, NotifyState::Status(&line)]);
    }

    /// Resolves when the next line that differs from the last one has been told. Cancel-safe.
    pub(super) async fn told(&mut self) {
        let line = self.next().await;
        notify(&[NotifyState::Status(&line)]);
    }

    /// The line as it is now; counts as told.
    fn now(&mut self) -> String {
        self.told = line(&self.net.borrow_and_update(), &self.control.borrow_and_update());
        self.not_before = Instant::now() + PAUSE;
        self.told.clone()
    }

    /// The next line that differs from the last one. Cancel-safe: nothing counts as told before it resolves.
    async fn next(&mut self) -> String {
        loop {
            tokio::time::sleep_until(self.not_before).await;
            if line(&self.net.borrow(), &self.control.borrow()) != self.told {
                return self.now();
            }
            let gone = tokio::select! {
                changed = self.net.changed() => changed.is_err(),
                changed = self.control.changed() => changed.is_err(),
            };
            if gone {
                std::future::pending::<()>().await;
            }
        }
    }
}

fn line(snapshot: &Snapshot, control: &ControlState) -> String {
    let mut line = String::new();
    if snapshot.clusters.is_empty() {
        line.push_str("In no cluster; join one with: ogctl connect CLUSTER");
    }
    for (at, view) in snapshot.clusters.values().enumerate() {
        let peers = view.members.len();
        let role = if view.serving { "serving" } else { "asking only" };
        let does = match view.state {
            ClusterState::Discovering | ClusterState::Connecting => format!("{role}, looking for peers"),
            ClusterState::Connected => role.to_owned(),
            ClusterState::Degraded => format!("{role}, no peer can serve"),
            ClusterState::Disconnecting => "leaving".to_owned(),
            ClusterState::Disconnected | ClusterState::Failed => "not joined".to_owned(),
        };
        let plural = if peers == 1 { "" } else { "s" };
        let _ = write!(line, "{}{}: {peers} peer{plural}, {does}", if at == 0 { "" } else { "; " }, view.id);
    }
    if let Some(problem) = control.problems.iter().chain(&snapshot.problems).next() {
        let _ = write!(line, "; problem: {}", problem.replace(char::is_control, " "));
    }
    if line.chars().count() > MAX_CHARS {
        line = line.chars().take(MAX_CHARS - 1).chain(['…']).collect();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::cluster::ClusterId;
    use crate::domain::node::ClusterView;
    use std::sync::Arc;
    use std::time::SystemTime;

    fn with(clusters: &[(&str, ClusterState, bool)]) -> Snapshot {
        let clusters = clusters.iter().map(|&(name, state, serving)| {
            let id = ClusterId::new(name).unwrap();
            let (joined_at, discovery) = (SystemTime::now(), Vec::new());
            (id.clone(), Arc::new(ClusterView { id, state, serving, joined_at, announced: true, discovery, members: Vec::new() }))
        });
        Snapshot { clusters: clusters.collect(), ..Snapshot::default() }
    }

    #[test]
    fn the_line_says_where_the_node_is_and_what_is_wrong() {
        let mut control = ControlState::default();
        assert_eq!(line(&with(&[]), &control), "In no cluster; join one with: ogctl connect CLUSTER");
        let two = with(&[("a", ClusterState::Connected, true), ("b", ClusterState::Discovering, false)]);
        assert_eq!(line(&two, &control), "a: 0 peers, serving; b: 0 peers, asking only, looking for peers");
        control.problems = vec!["bad\u{1b}[31m news".into(), "more".into()];
        assert!(line(&two, &control).ends_with("; problem: bad [31m news"));
        control.problems = vec!["x".repeat(500)];
        assert_eq!(line(&two, &control).chars().count(), MAX_CHARS);
    }

    #[tokio::test(start_paused = true)]
    async fn what_changes_fast_is_told_once_and_what_stays_is_not_told_again() {
        let (net, receiver) = watch::channel(Arc::new(with(&[])));
        let (_control, control) = watch::channel(ControlState::default());
        let mut status = Status { net: receiver, control, told: String::new(), not_before: Instant::now() };
        status.now();
        for name in ["a", "b", "c"] {
            net.send_replace(Arc::new(with(&[(name, ClusterState::Connected, true)])));
        }
        assert_eq!(status.next().await, "c: 0 peers, serving");
        net.send_replace(Arc::new(with(&[("c", ClusterState::Connected, true)])));
        assert!(tokio::time::timeout(PAUSE * 10, status.next()).await.is_err(), "nothing new to tell");
    }
}
