//! Who may knock how often, and who may not at all. Pure and bounded.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use libp2p::PeerId;

/// Handshakes per second from one IPv4 address or IPv6 /64.
const PER_SECOND: f64 = 20.0;
/// Handshakes at once from one source.
const BURST: f64 = 40.0;
/// The same for a source from which somebody broke the protocol, and for how long. Not nothing at all: others may live
/// behind the same address.
const SLOW_PER_SECOND: f64 = 1.0;
const SLOW_BURST: f64 = 4.0;
const SLOW: Duration = BAN;
/// Sources that are remembered.
const MAX_SOURCES: usize = 4096;
/// Violations after which a peer is banned, for how long, and how many peers are remembered.
const VIOLATIONS: u32 = 3;
const BAN: Duration = Duration::from_secs(600);
const MAX_OFFENDERS: usize = 4096;

/// One home router may hold a whole /64.
pub(crate) fn source(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => IpAddr::V4(ip),
            None => IpAddr::V6((u128::from(ip) & !u128::from(u64::MAX)).into()),
        },
    }
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
    slow_until: Option<Instant>,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self { tokens: BURST, at: now, slow_until: None }
    }

    fn refill(&mut self, now: Instant) {
        if self.slow_until.is_some_and(|until| until <= now) {
            self.slow_until = None;
        }
        let (rate, most) = if self.slow_until.is_some() { (SLOW_PER_SECOND, SLOW_BURST) } else { (PER_SECOND, BURST) };
        self.tokens = (self.tokens + now.duration_since(self.at).as_secs_f64() * rate).min(most);
        self.at = now;
    }

    /// A full bucket says nothing: its source can be forgotten.
    fn is_worth_keeping(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.tokens < BURST
    }
}

/// A token bucket per source, asked before any cryptography is done for it.
#[derive(Debug, Default)]
pub(crate) struct Knocks {
    buckets: HashMap<IpAddr, Bucket>,
}

impl Knocks {
    /// Whether a connection from `ip` may begin its handshake now.
    pub(crate) fn allow(&mut self, ip: IpAddr, now: Instant) -> bool {
        let Some(bucket) = self.bucket(ip, now) else { return false };
        bucket.refill(now);
        if bucket.tokens < 1.0 {
            return false;
        }
        bucket.tokens -= 1.0;
        true
    }

    /// Somebody at `ip` was banned.
    pub(crate) fn slow_down(&mut self, ip: IpAddr, now: Instant) {
        if let Some(bucket) = self.bucket(ip, now) {
            bucket.slow_until = Some(now + SLOW);
        }
    }

    /// That of the source of `ip`; `None` when no more sources can be told apart.
    fn bucket(&mut self, ip: IpAddr, now: Instant) -> Option<&mut Bucket> {
        let source = source(ip);
        if self.buckets.len() >= MAX_SOURCES && !self.buckets.contains_key(&source) {
            self.buckets.retain(|_, bucket| bucket.is_worth_keeping(now));
            if self.buckets.len() >= MAX_SOURCES {
                return None;
            }
        }
        Some(self.buckets.entry(source).or_insert_with(|| Bucket::new(now)))
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
        if self.offenders.len() >= MAX_OFFENDERS && !self.offenders.contains_key(&peer) {
            self.offenders.retain(|_, (_, at)| now.duration_since(*at) < BAN);
            // Names cost nothing: who has a thousand of them must not keep others from being counted.
            let oldest = self.offenders.iter().min_by_key(|(_, (_, at))| *at).map(|(&peer, _)| peer);
            if let Some(oldest) = oldest.filter(|_| self.offenders.len() >= MAX_OFFENDERS) {
                self.offenders.remove(&oldest);
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

    #[test]
    fn a_source_that_was_slowed_down_has_four_at_once_and_one_a_second_for_ten_minutes() {
        let (mut knocks, now) = (Knocks::default(), Instant::now());
        let (ip, neighbour): (IpAddr, IpAddr) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        knocks.slow_down(ip, now);
        let mut count = |after: u64| (0..100).filter(|_| knocks.allow(neighbour, now + Duration::from_secs(after))).count();
        assert_eq!([count(0), count(1), count(11)], [4, 1, 4]);
        assert_eq!([count(SLOW.as_secs() - 1), count(SLOW.as_secs())], [4, 20], "then as anybody");
        // Though its bucket is full, it is not forgotten.
        knocks.slow_down(ip, now);
        for at in 0..10_000_u32 {
            knocks.allow(IpAddr::V4(at.into()), now);
        }
        assert_eq!((0..100).filter(|_| knocks.allow(ip, now + Duration::from_secs(30))).count(), 4);
    }

    #[test]
    fn offenders_are_bounded_and_a_crowd_of_them_bans_nobody_else() {
        let (mut bans, now) = (Bans::default(), Instant::now());
        for _ in 0..MAX_OFFENDERS {
            assert!(!bans.violation(PeerId::random(), now));
        }
        let later = now + Duration::from_secs(1);
        let one_more = PeerId::random();
        assert_eq!([(); 3].map(|()| bans.violation(one_more, later)), [false, false, true]);
        assert_eq!(bans.offenders.len(), MAX_OFFENDERS);
    }
}
