//! Who may knock how often, and who may not at all. Pure and bounded.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use libp2p::PeerId;

/// Handshakes per second from one IPv4 address or IPv6 /64.
const PER_SECOND: f64 = 20.0;
/// Handshakes at once from one source.
const BURST: f64 = 40.0;
/// Sources that are remembered.
const MAX_SOURCES: usize = 4096;
/// Violations after which a peer is banned, for how long, and how many peers are remembered.
const VIOLATIONS: u32 = 3;
const BAN: Duration = Duration::from_secs(600);
const MAX_OFFENDERS: usize = 4096;

/// One home router may hold a whole /64.
fn source(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => IpAddr::V4(ip),
            None => IpAddr::V6((u128::from(ip) & !u128::from(u64::MAX)).into()),
        },
    }
}

/// A token bucket per source, asked before any cryptography is done for it.
#[derive(Debug, Default)]
pub(crate) struct Knocks {
    buckets: HashMap<IpAddr, (f64, Instant)>,
}

impl Knocks {
    /// Whether a connection from `ip` may begin its handshake now.
    pub(crate) fn allow(&mut self, ip: IpAddr, now: Instant) -> bool {
        let source = source(ip);
        if self.buckets.len() >= MAX_SOURCES && !self.buckets.contains_key(&source) {
            // A full bucket says nothing: those sources can be forgotten.
            self.buckets.retain(|_, (tokens, at)| *tokens + now.duration_since(*at).as_secs_f64() * PER_SECOND < BURST);
            if self.buckets.len() >= MAX_SOURCES {
                return false;
            }
        }
        let (tokens, at) = self.buckets.entry(source).or_insert((BURST, now));
        *tokens = (*tokens + now.duration_since(*at).as_secs_f64() * PER_SECOND).min(BURST);
        *at = now;
        if *tokens < 1.0 {
            return false;
        }
        *tokens -= 1.0;
        true
    }
}

/// Peers that broke the protocol.
#[derive(Debug, Default)]
pub(crate) struct Bans {
    offenders: HashMap<PeerId, (u32, Instant)>,
}

impl Bans {
    /// Counts a violation; true when the peer is banned by it.
    pub(crate) fn violation(&mut self, peer: PeerId, now: Instant) -> bool {
        if self.offenders.len() >= MAX_OFFENDERS {
            self.offenders.retain(|_, (_, at)| now.duration_since(*at) < BAN);
            if self.offenders.len() >= MAX_OFFENDERS {
                return true;
            }
        }
        let (count, at) = self.offenders.entry(peer).or_insert((0, now));
        if now.duration_since(*at) >= BAN {
            *count = 0;
        }
        *count += 1;
        *at = now;
        *count == VIOLATIONS
    }

    /// Whether the peer is banned at `now`.
    pub(crate) fn is_banned(&self, peer: &PeerId, now: Instant) -> bool {
        self.offenders.get(peer).is_some_and(|(count, at)| *count >= VIOLATIONS && now.duration_since(*at) < BAN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forty_knocks_at_once_and_twenty_a_second() {
        let (mut knocks, now) = (Knocks::default(), Instant::now());
        let ip: IpAddr = "192.0.2.1".parse().unwrap();
        assert_eq!((0..100).filter(|_| knocks.allow(ip, now)).count(), 40);
        assert_eq!((0..100).filter(|_| knocks.allow(ip, now + Duration::from_secs(1))).count(), 20);
        assert!(knocks.allow("192.0.2.2".parse().unwrap(), now), "another source is not affected");
    }

    #[test]
    fn a_whole_v6_prefix_is_one_source_and_mapped_v4_is_v4() {
        let (mut knocks, now) = (Knocks::default(), Instant::now());
        let allowed = (0..100).filter(|at| knocks.allow(format!("2001:db8::{at:x}").parse().unwrap(), now)).count();
        assert_eq!(allowed, 40);
        assert_eq!(source("::ffff:192.0.2.1".parse().unwrap()), "192.0.2.1".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn sources_are_bounded() {
        let (mut knocks, now) = (Knocks::default(), Instant::now());
        for at in 0..10_000_u32 {
            knocks.allow(IpAddr::V4(at.into()), now);
        }
        assert_eq!(knocks.buckets.len(), MAX_SOURCES);
        assert!(knocks.allow("192.0.2.1".parse().unwrap(), now + Duration::from_secs(1)), "old sources make room");
    }

    #[test]
    fn the_third_violation_bans_for_ten_minutes() {
        let (mut bans, now, peer) = (Bans::default(), Instant::now(), PeerId::random());
        assert_eq!([(); 3].map(|()| bans.violation(peer, now)), [false, false, true]);
        assert!(bans.is_banned(&peer, now + BAN - Duration::from_secs(1)));
        assert!(!bans.is_banned(&peer, now + BAN));
        assert!(!bans.violation(peer, now + BAN), "the count begins anew");
    }
}
