//! Two connections to one peer: which one goes. Only the lower peer id of the pair closes, so that not both go.

use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::swarm::ConnectionId;

/// A connection as far as this decision needs it. The list comes best first: direct before relayed, QUIC before TCP,
/// then the oldest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    pub id: ConnectionId,
    pub since: Instant,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// To be closed now.
    pub close: Vec<ConnectionId>,
    /// When to look again.
    pub again_at: Option<Instant>,
}

/// Keeps the first of `links`; the others go once the newest of all is `grace` old.
pub(crate) fn decide(local: &PeerId, peer: &PeerId, links: &[Link], now: Instant, grace: Duration) -> Verdict {
    let nothing = Verdict { close: Vec::new(), again_at: None };
    if links.len() < 2 || local.to_bytes() > peer.to_bytes() {
        return nothing;
    }
    let Some(newest) = links.iter().map(|link| link.since).max() else { return nothing };
    if now < newest + grace {
        return Verdict { again_at: Some(newest + grace), ..nothing };
    }
    Verdict { close: links[1..].iter().map(|link| link.id).collect(), again_at: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_lower_peer_id_closes_and_only_after_the_grace() {
        let (a, b) = (PeerId::random(), PeerId::random());
        let (lower, higher) = if a.to_bytes() < b.to_bytes() { (a, b) } else { (b, a) };
        let (now, grace) = (Instant::now(), Duration::from_secs(10));
        let link = |id, since| Link { id: ConnectionId::new_unchecked(id), since };
        let links = [link(1, now), link(2, now + grace)];
        assert_eq!(decide(&lower, &higher, &links, now + grace, grace).again_at, Some(now + 2 * grace));
        assert_eq!(decide(&lower, &higher, &links, now + 2 * grace, grace).close, [ConnectionId::new_unchecked(2)]);
        assert!(decide(&higher, &lower, &links, now + 2 * grace, grace).close.is_empty());
        assert!(decide(&lower, &higher, &links[..1], now + 2 * grace, grace).close.is_empty());
    }
}
