//! Control frames of a membership stream, after the hello: heartbeat, state, view, models, roster, notice, goodbye. Binary,
//! big-endian, strict.

use super::limits::{
    MAX_ADDRESS_BYTES, MAX_BYE_BYTES, MAX_HEARTBEAT_BYTES, MAX_MODEL_NAME_BYTES, MAX_MODELS, MAX_MODELS_BYTES,
    MAX_NODE_NAME_BYTES, MAX_NOTICE_BYTES, MAX_PEER_ID_BYTES, MAX_SOFTWARE_BYTES, MAX_STATE_BYTES, MAX_TIER_NAME_BYTES,
    MAX_TIERS, MAX_VIEW_ADDRESSES, MAX_VIEW_ENTRIES,
};
use super::models::Models;
use super::roster::Roster;
use super::version::{MEMBER_VERSION_MIN, MEMBER_VERSION_THREE, MEMBER_VERSION_TWO};
use crate::domain::node::ModelOffer;

const HEARTBEAT: u8 = 0x10;
const STATE: u8 = 0x11;
const VIEW: u8 = 0x12;
pub(super) const MODELS: u8 = 0x13;
pub(super) const ROSTER: u8 = 0x14;
const NOTICE: u8 = 0x15;
const BYE: u8 = 0x1f;

const SERVING: u8 = 1;
const DRAINING: u8 = 2;
const PROBE: u8 = 4;

/// The one notice that there is: somebody else uses the receiver's identity.
const SAME_IDENTITY: u8 = 1;

/// Why a frame is none of the control frames.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The first byte is no known kind.
    #[error("unknown kind {0:#04x}")]
    UnknownKind(u8),
    /// Longer than its kind allows.
    #[error("{kind} of {bytes} bytes, at most {limit} are allowed")]
    TooLong {
        /// Which kind.
        kind: &'static str,
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        limit: usize,
    },
    /// A field is cut off, too large, not UTF-8, or something follows the last one.
    #[error("malformed {kind}: {field}")]
    Malformed {
        /// Which kind.
        kind: &'static str,
        /// Which field.
        field: &'static str,
    },
}

/// One control frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// "I live", every five seconds.
    Heartbeat(Heartbeat),
    /// What the node is and offers, when it changed.
    State(State),
    /// Other members of the cluster.
    View(View),
    /// More about the models of a state; from version 2 on.
    Models(Models),
    /// Members that the receiver may not be connected to, with their names; from version 3 on.
    Roster(Roster),
    /// Another machine came with the receiver's identity, from this binary multiaddr; from version 3 on.
    SameIdentity(Vec<u8>),
    /// The last frame.
    Bye(ByeReason),
}

/// "I live." The two echo fields measure the round trip without a protocol of its own, as NTP does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Heartbeat {
    /// Rises with every heartbeat of the sender on this stream.
    pub seq: u64,
    /// The sender takes prompts of this cluster.
    pub serving: bool,
    /// The sender is stopping.
    pub draining: bool,
    /// To be answered by a heartbeat at once; from version 3 on.
    pub probe: bool,
    /// Prompts it would start at once.
    pub free_slots: u16,
    /// Prompts that wait at it.
    pub queued: u16,
    /// Version of the last state it sent.
    pub state_version: u32,
    /// `seq` of the last heartbeat that the sender received on this stream; 0 for none.
    pub echo_seq: u64,
    /// Microseconds between that heartbeat's arrival and this one's sending.
    pub echo_delay_us: u32,
}

/// What a node is and offers in this cluster. Its own words.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct State {
    /// Rises with every change.
    pub version: u32,
    /// Name for people.
    pub node_name: String,
    /// Version of its software.
    pub software: String,
    /// Models, best first.
    pub models: Vec<ModelOffer>,
    /// Tiers it says it qualifies for.
    pub tiers: Vec<String>,
}

/// Some members of the cluster, as hints to dial.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct View {
    /// At most 32.
    pub entries: Vec<ViewEntry>,
}

/// One member in a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewEntry {
    /// Binary peer id.
    pub peer: Vec<u8>,
    /// Seconds since the sender heard from it.
    pub age_seconds: u32,
    /// Binary multiaddrs, at most 4.
    pub addresses: Vec<Vec<u8>>,
}

/// Why a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByeReason {
    /// The daemon stops.
    Shutdown,
    /// The node leaves this cluster.
    Leave,
    /// Another stream for the same cluster stays.
    Duplicate,
    /// The membership was taken away.
    Revoked,
    /// Another machine with the receiver's identity is a member already; from version 3 on.
    Identity,
    /// The sender has connections enough: both stay members, and know each other; from version 3 on.
    Surplus,
}

/// Reasons by the number that is written.
const REASONS: [ByeReason; 6] =
    [ByeReason::Shutdown, ByeReason::Leave, ByeReason::Duplicate, ByeReason::Revoked, ByeReason::Identity, ByeReason::Surplus];

/// Longest prefix of `text` that fits `limit` bytes and ends between characters.
fn clipped(text: &str, limit: usize) -> &str {
    &text[..text.floor_char_boundary(limit)]
}

pub(super) fn put_text(out: &mut Vec<u8>, text: &str, limit: usize) {
    let text = clipped(text, limit.min(255));
    out.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
    out.extend_from_slice(text.as_bytes());
}

impl Control {
    /// Oldest version of the membership stream that has frames of this kind.
    pub fn since(&self) -> u16 {
        match self {
            Self::Models(_) => MEMBER_VERSION_TWO,
            Self::Roster(_) | Self::SameIdentity(_) | Self::Bye(ByeReason::Identity | ByeReason::Surplus) => MEMBER_VERSION_THREE,
            Self::Heartbeat(beat) if beat.probe => MEMBER_VERSION_THREE,
            _ => MEMBER_VERSION_MIN,
        }
    }

    /// The frame's body. Lists and texts beyond their limits are cut, and peers or addresses beyond theirs are left out: a
    /// node never sends what it would refuse.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        match self {
            Self::Heartbeat(beat) => {
                out.push(HEARTBEAT);
                out.extend_from_slice(&beat.seq.to_be_bytes());
                let flags = [(beat.serving, SERVING), (beat.draining, DRAINING), (beat.probe, PROBE)];
                out.push(flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum());
                out.extend_from_slice(&beat.free_slots.to_be_bytes());
                out.extend_from_slice(&beat.queued.to_be_bytes());
                out.extend_from_slice(&beat.state_version.to_be_bytes());
                out.extend_from_slice(&beat.echo_seq.to_be_bytes());
                out.extend_from_slice(&beat.echo_delay_us.to_be_bytes());
            }
            Self::State(state) => state.encode(&mut out),
            Self::Models(models) => models.encode(&mut out),
            Self::Roster(roster) => roster.encode(&mut out),
            Self::SameIdentity(address) => {
                out.extend_from_slice(&[NOTICE, SAME_IDENTITY]);
                // Half an address would be another one.
                put_bytes(&mut out, if address.len() <= MAX_ADDRESS_BYTES { address } else { &[] });
            }
            Self::View(view) => {
                out.push(VIEW);
                let known = view.entries.iter().filter(|entry| entry.peer.len() <= MAX_PEER_ID_BYTES);
                put_list(&mut out, known.take(MAX_VIEW_ENTRIES), |out, entry| {
                    put_bytes(out, &entry.peer);
                    out.extend_from_slice(&entry.age_seconds.to_be_bytes());
                    // Half an address would be another one.
                    let whole = entry.addresses.iter().filter(|address| address.len() <= MAX_ADDRESS_BYTES);
                    put_list(out, whole.take(MAX_VIEW_ADDRESSES), |out, address| put_bytes(out, address));
                });
            }
            Self::Bye(reason) => {
                let number = REASONS.iter().position(|known| known == reason);
                out.extend_from_slice(&[BYE, number.and_then(|number| u8::try_from(number).ok()).unwrap_or(0)]);
            }
        }
        out
    }

    /// Reads a frame's body.
    ///
    /// # Errors
    /// [`ControlError`]: the sender broke the protocol.
    pub fn decode(body: &[u8]) -> Result<Self, ControlError> {
        let (&kind, rest) = body.split_first().ok_or(ControlError::Malformed { kind: "frame", field: "kind" })?;
        let bounded = |kind: &'static str, limit: usize| {
            if body.len() > limit {
                Err(ControlError::TooLong { kind, bytes: body.len(), limit })
            } else {
                Ok(Fields { kind, rest })
            }
        };
        match kind {
            HEARTBEAT => {
                let mut fields = bounded("heartbeat", MAX_HEARTBEAT_BYTES)?;
                let seq = fields.u64("seq")?;
                let flags = fields.u8("flags")?;
                if flags & !(SERVING | DRAINING | PROBE) != 0 {
                    return fields.bad("flags");
                }
                let beat = Heartbeat {
                    seq,
                    serving: flags & SERVING != 0,
                    draining: flags & DRAINING != 0,
                    probe: flags & PROBE != 0,
                    free_slots: fields.u16("free_slots")?,
                    queued: fields.u16("queued")?,
                    state_version: fields.u32("state_version")?,
                    echo_seq: fields.u64("echo_seq")?,
                    echo_delay_us: fields.u32("echo_delay_us")?,
                };
                fields.end(Self::Heartbeat(beat))
            }
            STATE => State::decode(bounded("state", MAX_STATE_BYTES)?),
            VIEW => View::decode(bounded("view", super::limits::MAX_CONTROL_FRAME_BYTES)?),
            MODELS => Models::decode(bounded("models", MAX_MODELS_BYTES)?),
            ROSTER => Roster::decode(bounded("roster", super::limits::MAX_CONTROL_FRAME_BYTES)?),
            NOTICE => {
                let mut fields = bounded("notice", MAX_NOTICE_BYTES)?;
                if fields.u8("notice")? != SAME_IDENTITY {
                    return fields.bad("notice");
                }
                let address = fields.bytes("address", MAX_ADDRESS_BYTES)?.to_vec();
                fields.end(Self::SameIdentity(address))
            }
            BYE => {
                let mut fields = bounded("bye", MAX_BYE_BYTES)?;
                let Some(&reason) = REASONS.get(usize::from(fields.u8("reason")?)) else { return fields.bad("reason") };
                fields.end(Self::Bye(reason))
            }
            other => Err(ControlError::UnknownKind(other)),
        }
    }
}

/// How many there are, in one byte, then each of them.
pub(super) fn put_list<T>(out: &mut Vec<u8>, items: impl Iterator<Item = T>, put: impl Fn(&mut Vec<u8>, T)) {
    let at = out.len();
    out.push(0);
    for item in items {
        put(out, item);
        out[at] += 1;
    }
}

pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(u8::try_from(bytes.len()).unwrap_or(u8::MAX));
    out.extend_from_slice(bytes);
}

impl State {
    fn encode(&self, out: &mut Vec<u8>) {
        out.push(STATE);
        out.extend_from_slice(&self.version.to_be_bytes());
        put_text(out, &self.node_name, MAX_NODE_NAME_BYTES);
        put_text(out, &self.software, MAX_SOFTWARE_BYTES);
        // The tiers are few and short (32 of 65 bytes at most); models fill what is left of the frame.
        let mut tiers = Vec::new();
        let count = self.tiers.len().min(MAX_TIERS);
        tiers.push(u8::try_from(count).unwrap_or(0));
        for tier in &self.tiers[..count] {
            put_text(&mut tiers, tier, MAX_TIER_NAME_BYTES);
        }
        let at = out.len();
        out.push(0);
        let mut models = 0_u8;
        for model in self.models.iter().take(MAX_MODELS) {
            if out.len() + 1 + MAX_MODEL_NAME_BYTES + 4 + tiers.len() > MAX_STATE_BYTES {
                break;
            }
            put_text(out, &model.name, MAX_MODEL_NAME_BYTES);
            out.extend_from_slice(&model.context_tokens.to_be_bytes());
            models += 1;
        }
        out[at] = models;
        out.extend_from_slice(&tiers);
    }

    fn decode(mut fields: Fields<'_>) -> Result<Control, ControlError> {
        let version = fields.u32("version")?;
        let node_name = fields.text("node_name", MAX_NODE_NAME_BYTES)?;
        let software = fields.text("software", MAX_SOFTWARE_BYTES)?;
        let count = fields.count("models", MAX_MODELS)?;
        let models = (0..count)
            .map(|_| {
                Ok(ModelOffer {
                    name: fields.text("model name", MAX_MODEL_NAME_BYTES)?,
                    context_tokens: fields.u32("model context")?,
                    ..ModelOffer::default()
                })
            })
            .collect::<Result<_, ControlError>>()?;
        let count = fields.count("tiers", MAX_TIERS)?;
        let tiers = (0..count).map(|_| fields.text("tier", MAX_TIER_NAME_BYTES)).collect::<Result<_, _>>()?;
        fields.end(Control::State(Self { version, node_name, software, models, tiers }))
    }
}

impl View {
    fn decode(mut fields: Fields<'_>) -> Result<Control, ControlError> {
        let count = fields.count("entries", MAX_VIEW_ENTRIES)?;
        let entries = (0..count)
            .map(|_| {
                let peer = fields.bytes("peer", MAX_PEER_ID_BYTES)?.to_vec();
                let age_seconds = fields.u32("age")?;
                let addresses = fields.count("addresses", MAX_VIEW_ADDRESSES)?;
                let addresses = (0..addresses)
                    .map(|_| fields.bytes("address", MAX_ADDRESS_BYTES).map(<[u8]>::to_vec))
                    .collect::<Result<_, _>>()?;
                Ok(ViewEntry { peer, age_seconds, addresses })
            })
            .collect::<Result<_, ControlError>>()?;
        fields.end(Control::View(Self { entries }))
    }
}

/// Takes fields off the front.
pub(super) struct Fields<'a> {
    kind: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn bad<T>(&self, field: &'static str) -> Result<T, ControlError> {
        Err(ControlError::Malformed { kind: self.kind, field })
    }

    pub(super) fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], ControlError> {
        let Some((head, tail)) = self.rest.split_first_chunk::<N>() else { return self.bad(field) };
        self.rest = tail;
        Ok(*head)
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, ControlError> {
        Ok(self.take::<1>(field)?[0])
    }
    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, ControlError> {
        Ok(u16::from_be_bytes(self.take(field)?))
    }
    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, ControlError> {
        Ok(u32::from_be_bytes(self.take(field)?))
    }
    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, ControlError> {
        Ok(u64::from_be_bytes(self.take(field)?))
    }

    pub(super) fn count(&mut self, field: &'static str, limit: usize) -> Result<usize, ControlError> {
        let count = usize::from(self.u8(field)?);
        if count > limit { self.bad(field) } else { Ok(count) }
    }

    pub(super) fn bytes(&mut self, field: &'static str, limit: usize) -> Result<&'a [u8], ControlError> {
        let length = usize::from(self.u8(field)?);
        if length > limit || length > self.rest.len() {
            return self.bad(field);
        }
        let (head, tail) = self.rest.split_at(length);
        self.rest = tail;
        Ok(head)
    }

    pub(super) fn text(&mut self, field: &'static str, limit: usize) -> Result<String, ControlError> {
        let bytes = self.bytes(field, limit)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => self.bad(field),
        }
    }

    pub(super) fn end(self, control: Control) -> Result<Control, ControlError> {
        if self.rest.is_empty() { Ok(control) } else { self.bad("trailing bytes") }
    }
}

#[cfg(test)]
mod tests {
    use super::super::models::Details;
    use super::*;
    use proptest::prelude::*;

    fn heartbeat() -> Control {
        Control::Heartbeat(Heartbeat {
            seq: 7,
            serving: true,
            draining: false,
            probe: false,
            free_slots: 3,
            queued: 1,
            state_version: 9,
            echo_seq: 6,
            echo_delay_us: 1500,
        })
    }

    fn state() -> State {
        State {
            version: 2,
            node_name: "NodeA".to_owned(),
            software: "0.1.0".to_owned(),
            models: vec![ModelOffer::named("echo")],
            tiers: vec!["SmolLM-360M".to_owned()],
        }
    }

    fn view() -> Control {
        Control::View(View {
            entries: vec![ViewEntry { peer: vec![1, 2, 3], age_seconds: 4, addresses: vec![vec![5; 8], vec![6; 96]] }],
        })
    }

    fn models() -> Control {
        let known = Details { size: Some(1), quantisation: Some("Q8_0".to_owned()), digest: Some([7; 32]), ..Details::default() };
        Control::Models(Models { state_version: 2, details: vec![known, Details::default()] })
    }

    fn everything() -> Vec<Control> {
        let probe = Control::Heartbeat(Heartbeat { probe: true, ..Heartbeat::default() });
        let notice = Control::SameIdentity(vec![4; MAX_ADDRESS_BYTES]);
        let mut all = vec![heartbeat(), probe, Control::State(state()), view(), models(), notice];
        all.extend(REASONS.map(Control::Bye));
        all
    }

    #[test]
    fn every_kind_reads_back() {
        for control in everything() {
            assert_eq!(Control::decode(&control.encode()), Ok(control));
        }
    }

    #[test]
    fn every_truncation_and_every_extension_is_refused() {
        for control in everything() {
            let bytes = control.encode();
            for length in 0..bytes.len() {
                assert!(Control::decode(&bytes[..length]).is_err(), "{control:?} cut to {length}");
            }
            assert!(Control::decode(&[bytes.as_slice(), &[0]].concat()).is_err(), "{control:?} with a byte more");
        }
    }

    #[test]
    fn limits_hold_at_the_limit_and_one_past_it() {
        let named = |length: usize| {
            let mut bytes = vec![STATE, 0, 0, 0, 1, u8::try_from(length).unwrap()];
            bytes.extend(std::iter::repeat_n(b'x', length));
            bytes.extend_from_slice(&[0, 0, 0]);
            Control::decode(&bytes)
        };
        assert!(named(64).is_ok());
        assert!(named(65).is_err());
        let viewed = |entries: u8| {
            let mut bytes = vec![VIEW, entries];
            for _ in 0..entries {
                bytes.extend_from_slice(&[1, 9, 0, 0, 0, 0, 0]);
            }
            Control::decode(&bytes)
        };
        assert!(viewed(32).is_ok());
        assert!(viewed(33).is_err());
        let notice = |length: u8| {
            let mut bytes = vec![NOTICE, SAME_IDENTITY, length];
            bytes.extend(std::iter::repeat_n(4, usize::from(length)));
            Control::decode(&bytes)
        };
        assert!(notice(96).is_ok());
        assert!(notice(97).is_err());
        assert!(Control::decode(&[BYE, 5]).is_ok());
        assert!(Control::decode(&[BYE, 6]).is_err());
        assert!(matches!(Control::decode(&[BYE; 65]), Err(ControlError::TooLong { .. })));
        assert_eq!(Control::decode(&[0x42]), Err(ControlError::UnknownKind(0x42)));
    }

    #[test]
    fn what_is_too_much_to_say_is_cut_and_still_reads() {
        let crowded = State {
            node_name: "ä".repeat(100),
            models: (0..200)
                .map(|at| ModelOffer { name: format!("{at}{}", "m".repeat(200)), context_tokens: 1, ..ModelOffer::default() })
                .collect(),
            tiers: vec!["t".repeat(100); 100],
            ..state()
        };
        let bytes = Control::State(crowded).encode();
        assert!(bytes.len() <= MAX_STATE_BYTES);
        let Ok(Control::State(read)) = Control::decode(&bytes) else { panic!("not read") };
        assert_eq!(read.node_name, "ä".repeat(32));
        assert_eq!(read.tiers.len(), 32);
    }

    #[test]
    fn a_peer_or_an_address_too_long_to_be_read_is_left_out_and_the_rest_still_told() {
        let entry = |peer: usize, addresses: &[usize]| ViewEntry {
            peer: vec![1; peer],
            age_seconds: 0,
            addresses: addresses.iter().map(|&length| vec![2; length]).collect(),
        };
        let view = View { entries: vec![entry(65, &[8]), entry(64, &[97, 96, 300, 1, 2, 3, 4])] };
        let read = Control::decode(&Control::View(view).encode());
        assert_eq!(read, Ok(Control::View(View { entries: vec![entry(64, &[96, 1, 2, 3])] })));
    }

    proptest! {
        #[test]
        fn nothing_makes_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Control::decode(&bytes);
        }

        #[test]
        fn flipped_bits_never_panic(bit in 0_usize..400) {
            let mut bytes = Control::State(state()).encode();
            let at = bit / 8 % bytes.len();
            bytes[at] ^= 1 << (bit % 8);
            let _ = Control::decode(&bytes);
        }
    }
}
