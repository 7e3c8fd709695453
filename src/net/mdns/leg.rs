//! mDNS at one interface, one family: when to ask, when to tell, what was counted. Pure.

use std::time::{Duration, Instant};

use libp2p::Multiaddr;

use super::interfaces::Net;
use super::meter::Meter;
use crate::net::{jitter, random_below};

/// Pauses between the first questions. The first packets may be lost while a switch learns where the group is joined.
const FIRST_QUESTIONS: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(400)];
/// Then they double, up to this. The library stops at the first answer of anybody, and the others are found by chance.
const AT_REST: Duration = Duration::from_secs(30);
/// Where others ask as well, one question serves all; yet nobody is kept from asking for longer than this.
const ASK_AT_LEAST: Duration = Duration::from_secs(300);
/// At rest, where one leg asks, those ask along whose turn comes within this: every machine is woken once. It is the widest
/// that two turns can be apart by chance.
const TOGETHER: Duration = Duration::from_secs(12);
/// RFC 6762 §6: a record is never multicast twice within this.
const TELL_LEAST: Duration = Duration::from_secs(1);
/// Listeners get their addresses one after the other: one packet for all of them.
const GATHER: Duration = Duration::from_millis(3);
/// RFC 6762 §8.3: what is new is announced twice.
const ANNOUNCEMENTS: u8 = 2;
/// With so many nodes around, an answer waits for a random time, so that not all of them speak at once.
const CROWD: usize = 8;

/// Why a leg is not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Obstacle {
    Down,
    NoMulticast,
    Public,
    Failed(String),
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Down => f.write_str("the interface is down or has no carrier"),
            Self::NoMulticast => f.write_str("the interface cannot send to many at once (no multicast), as many VPN links"),
            Self::Public => f.write_str("all addresses of the interface are public: mDNS is for private networks"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

#[derive(Debug)]
pub(super) struct State {
    pub name: String,
    /// Addresses of the interface, of this family.
    pub nets: Vec<Net>,
    pub obstacle: Option<Obstacle>,
    /// There is a socket.
    pub open: bool,
    /// When to try again to open it.
    pub retry_at: Option<Instant>,
    /// What this node says that it is to be found at.
    records: Vec<Multiaddr>,
    ask_at: Option<Instant>,
    questions: usize,
    asked: Option<Instant>,
    tell_at: Option<Instant>,
    told: Option<Instant>,
    announcements: u8,
    services_told: Option<Instant>,
    pub meter: Meter,
    /// Not listening until then: a flood.
    pub deaf_until: Option<Instant>,
    pub sent: u64,
    pub heard: u64,
    pub heard_at: Option<Instant>,
}

impl State {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            nets: Vec::new(),
            obstacle: None,
            open: false,
            retry_at: None,
            records: Vec::new(),
            ask_at: None,
            questions: 0,
            asked: None,
            tell_at: None,
            told: None,
            announcements: 0,
            services_told: None,
            meter: Meter::new(),
            deaf_until: None,
            sent: 0,
            heard: 0,
            heard_at: None,
        }
    }

    pub(super) fn records(&self) -> &[Multiaddr] {
        &self.records
    }

    /// Asks and tells as if it had just started.
    pub(super) fn begin(&mut self, now: Instant) {
        (self.questions, self.ask_at) = (0, Some(now));
        self.announce(now);
    }

    fn announce(&mut self, now: Instant) {
        if self.open && !self.records.is_empty() {
            self.announcements = ANNOUNCEMENTS;
            self.tell(now + GATHER);
        }
    }

    /// Tells at `at`, or as soon after it as may be.
    fn tell(&mut self, at: Instant) {
        let at = self.told.map_or(at, |told| at.max(told + TELL_LEAST));
        self.tell_at = Some(self.tell_at.map_or(at, |known| known.min(at)));
    }

    /// This node is now to be found at `records`.
    pub(super) fn set_records(&mut self, records: Vec<Multiaddr>, now: Instant) {
        if self.records != records {
            self.records = records;
            // It is not the same record any more.
            self.told = None;
            self.announce(now);
        }
    }

    fn pause(&self) -> Duration {
        match FIRST_QUESTIONS.get(self.questions.wrapping_sub(1)) {
            Some(&pause) => pause,
            None => {
                let doublings = u32::try_from(self.questions.saturating_sub(FIRST_QUESTIONS.len() + 1)).unwrap_or(u32::MAX);
                Duration::from_secs(1).saturating_mul(1_u32.checked_shl(doublings).unwrap_or(u32::MAX)).min(AT_REST)
            }
        }
    }

    fn at_rest(&self) -> bool {
        self.questions > 0 && self.pause() == AT_REST
    }

    fn may_ask(&self) -> bool {
        self.open && self.deaf_until.is_none()
    }

    /// Its turn to ask has come.
    pub(super) fn is_to_ask(&self, now: Instant) -> bool {
        self.may_ask() && self.ask_at.is_some_and(|at| at <= now)
    }

    /// Whether to ask now that some leg asks; if so, plans the next question.
    pub(super) fn asks(&mut self, now: Instant) -> bool {
        let along = if self.at_rest() { TOGETHER } else { Duration::ZERO };
        if !self.may_ask() || self.ask_at.is_none_or(|at| at > now + along) {
            return false;
        }
        self.questions += 1;
        self.asked = Some(now);
        self.ask_at = Some(now + jitter(self.pause()));
        true
    }

    /// Somebody else asked what this node asks: all will answer, and this node hears it.
    pub(super) fn heard_question(&mut self, now: Instant) {
        let lately = self.asked.is_some_and(|asked| now.duration_since(asked) < ASK_AT_LEAST);
        if self.at_rest() && lately {
            self.ask_at = Some(now + jitter(AT_REST));
        }
    }

    /// Somebody wants to know where this node is; `around` others do so as well.
    pub(super) fn wants_answer(&mut self, around: usize, now: Instant) {
        if self.records.is_empty() {
            return;
        }
        let wait = if around < CROWD { 0 } else { 20 + random_below(101) as u64 };
        self.tell(now + Duration::from_millis(wait));
    }

    /// Whether to tell now; if so, plans the next time.
    pub(super) fn tells(&mut self, now: Instant) -> bool {
        if !self.open || self.tell_at.is_none_or(|at| at > now) {
            return false;
        }
        self.tell_at = None;
        if self.records.is_empty() {
            return false;
        }
        self.told = Some(now);
        self.announcements = self.announcements.saturating_sub(1);
        if self.announcements > 0 {
            self.tell_at = Some(now + TELL_LEAST);
        }
        true
    }

    /// Whether to tell which services there are.
    pub(super) fn tells_services(&mut self, now: Instant) -> bool {
        let due = self.services_told.is_none_or(|told| now.duration_since(told) >= TELL_LEAST);
        if due {
            self.services_told = Some(now);
        }
        due
    }

    /// When there is something to do, if nobody says anything.
    pub(super) fn due(&self) -> Option<Instant> {
        let ask_at = self.ask_at.filter(|_| self.may_ask());
        let tell_at = self.tell_at.filter(|_| self.open);
        [ask_at, tell_at, self.deaf_until, self.retry_at].into_iter().flatten().min()
    }
}
