//! The control frame that tells of members which the receiver may not be connected to, from version 3 of the membership
//! stream on: a view with names.

use super::control::{Control, ControlError, Fields, ROSTER, put_bytes, put_list, put_text};
use super::limits::{
    MAX_ADDRESS_BYTES, MAX_CONTROL_FRAME_BYTES, MAX_MODEL_NAME_BYTES, MAX_NODE_NAME_BYTES, MAX_PEER_ID_BYTES, MAX_ROSTER_MODELS,
    MAX_VIEW_ADDRESSES, MAX_VIEW_ENTRIES,
};

const SERVING: u8 = 1;
const DRAINING: u8 = 2;
const LOST: u8 = 4;
const HEARSAY: u8 = 8;

/// Some members of the cluster, with what their lists show of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Roster {
    /// Members that the sender lists, itself included.
    pub members: u16,
    /// At most 32, and as many as fit into a frame.
    pub entries: Vec<RosterEntry>,
}

/// One member in a roster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RosterEntry {
    /// Binary peer id.
    pub peer: Vec<u8>,
    /// Seconds since anybody heard it, as far as the sender knows; of a lost one, since the sender lost it.
    pub age_seconds: u32,
    /// What is told of it.
    pub word: Word,
}

/// What is told of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// It is a member.
    Here(Card),
    /// The sender was connected to it, and it left or fell silent.
    Lost,
}

/// What a list shows of a member.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Card {
    /// The sender is not connected to it itself: two others that are told of it.
    pub hearsay: bool,
    /// It takes prompts of this cluster.
    pub serving: bool,
    /// It is stopping.
    pub draining: bool,
    /// Its name for people.
    pub name: String,
    /// Names of models that it serves, best first; at most 4.
    pub models: Vec<String>,
    /// Binary multiaddrs, at most 4.
    pub addresses: Vec<Vec<u8>>,
}

impl Roster {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.push(ROSTER);
        out.extend_from_slice(&self.members.to_be_bytes());
        let count = out.len();
        out.push(0);
        let fitting = self.entries.iter().filter(|entry| entry.peer.len() <= MAX_PEER_ID_BYTES);
        for entry in fitting.take(MAX_VIEW_ENTRIES) {
            let whole = out.len();
            entry.encode(out);
            if out.len() > MAX_CONTROL_FRAME_BYTES {
                out.truncate(whole);
                break;
            }
            out[count] += 1;
        }
    }

    pub(super) fn decode(mut fields: Fields<'_>) -> Result<Control, ControlError> {
        let members = fields.u16("members")?;
        let count = fields.count("entries", MAX_VIEW_ENTRIES)?;
        let entries = (0..count).map(|_| RosterEntry::decode(&mut fields)).collect::<Result<_, _>>()?;
        fields.end(Control::Roster(Self { members, entries }))
    }
}

impl RosterEntry {
    fn encode(&self, out: &mut Vec<u8>) {
        put_bytes(out, &self.peer);
        out.extend_from_slice(&self.age_seconds.to_be_bytes());
        match &self.word {
            Word::Lost => out.push(LOST),
            Word::Here(card) => {
                let flags = [(card.serving, SERVING), (card.draining, DRAINING), (card.hearsay, HEARSAY)];
                out.push(flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum());
                put_text(out, &card.name, MAX_NODE_NAME_BYTES);
                // Half a name would be another model, half an address another one.
                let models = card.models.iter().filter(|name| name.len() <= MAX_MODEL_NAME_BYTES);
                put_list(out, models.take(MAX_ROSTER_MODELS), |out, name| put_text(out, name, MAX_MODEL_NAME_BYTES));
                let addresses = card.addresses.iter().filter(|address| address.len() <= MAX_ADDRESS_BYTES);
                put_list(out, addresses.take(MAX_VIEW_ADDRESSES), |out, address| put_bytes(out, address));
            }
        }
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, ControlError> {
        let peer = fields.bytes("peer", MAX_PEER_ID_BYTES)?.to_vec();
        let age_seconds = fields.u32("age")?;
        let flags = fields.u8("flags")?;
        if flags == LOST {
            return Ok(Self { peer, age_seconds, word: Word::Lost });
        }
        if flags & !(SERVING | DRAINING | HEARSAY) != 0 {
            return fields.bad("flags");
        }
        let name = fields.text("node_name", MAX_NODE_NAME_BYTES)?;
        let models = fields.count("models", MAX_ROSTER_MODELS)?;
        let models = (0..models).map(|_| fields.text("model name", MAX_MODEL_NAME_BYTES)).collect::<Result<_, _>>()?;
        let addresses = fields.count("addresses", MAX_VIEW_ADDRESSES)?;
        let addresses = (0..addresses)
            .map(|_| fields.bytes("address", MAX_ADDRESS_BYTES).map(<[u8]>::to_vec))
            .collect::<Result<_, ControlError>>()?;
        let has = |flag| flags & flag != 0;
        let card = Card { hearsay: has(HEARSAY), serving: has(SERVING), draining: has(DRAINING), name, models, addresses };
        Ok(Self { peer, age_seconds, word: Word::Here(card) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card() -> Card {
        Card {
            hearsay: true,
            serving: true,
            draining: false,
            name: "NodeA".to_owned(),
            models: vec!["llama3.2:3b".to_owned(), "echo".to_owned()],
            addresses: vec![vec![5; 8], vec![6; 96]],
        }
    }

    fn entry(word: Word) -> RosterEntry {
        RosterEntry { peer: vec![1, 2, 3], age_seconds: 4, word }
    }

    fn frame(entries: Vec<RosterEntry>) -> Vec<u8> {
        Control::Roster(Roster { members: 200, entries }).encode()
    }

    fn read(bytes: &[u8]) -> Vec<RosterEntry> {
        match Control::decode(bytes) {
            Ok(Control::Roster(roster)) => roster.entries,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn members_and_lost_ones_read_back_and_nothing_else_does() {
        let entries = vec![entry(Word::Here(card())), entry(Word::Lost), entry(Word::Here(Card::default()))];
        let bytes = frame(entries.clone());
        assert_eq!(read(&bytes), entries);
        for length in 0..bytes.len() {
            assert!(Control::decode(&bytes[..length]).is_err(), "cut to {length}");
        }
        assert!(Control::decode(&[bytes.as_slice(), &[0]].concat()).is_err());
    }

    #[test]
    fn limits_hold_at_the_limit_and_one_past_it() {
        let counted = |count: u8| {
            let mut bytes = vec![ROSTER, 0, 9, count];
            bytes.extend(std::iter::repeat_n([1_u8, 9, 0, 0, 0, 0, LOST], usize::from(count)).flatten());
            Control::decode(&bytes)
        };
        assert!(counted(32).is_ok());
        assert!(counted(33).is_err());
        let with = |flags: u8, name: u8, models: u8, addresses: u8| {
            let mut bytes = vec![ROSTER, 0, 9, 1, 1, 9, 0, 0, 0, 0, flags, name];
            bytes.extend(std::iter::repeat_n(b'x', usize::from(name)));
            bytes.push(models);
            bytes.extend(std::iter::repeat_n([1, b'm'], usize::from(models)).flatten());
            bytes.push(addresses);
            bytes.extend(std::iter::repeat_n([1, 7], usize::from(addresses)).flatten());
            Control::decode(&bytes)
        };
        assert!(with(11, 64, 4, 4).is_ok());
        for past in [
            with(3, 65, 4, 4),
            with(3, 64, 5, 4),
            with(3, 64, 4, 5),
            with(LOST, 0, 0, 0),
            with(LOST | SERVING, 0, 0, 0),
            with(16, 0, 0, 0),
        ] {
            assert!(past.is_err());
        }
    }

    #[test]
    fn as_many_entries_are_told_as_fit_and_each_of_them_whole() {
        let long = Card {
            name: "n".repeat(64),
            models: (0..9).map(|at| format!("{at}{}", "m".repeat(127))).collect(),
            addresses: vec![vec![7; 96]; 9],
            ..card()
        };
        let bytes = frame(vec![entry(Word::Here(long)); 40]);
        assert!(bytes.len() <= MAX_CONTROL_FRAME_BYTES);
        let entries = read(&bytes);
        assert!((14..32).contains(&entries.len()), "{}", entries.len());
        let Word::Here(first) = &entries[0].word else { panic!("lost") };
        assert_eq!((first.models.len(), first.addresses.len()), (4, 4));
        assert_eq!(read(&frame(vec![entry(Word::Here(card())); 40])).len(), 32);
        // What could not be read is left out, and the rest still told.
        let odd = Card { models: vec!["m".repeat(129), "m".to_owned()], addresses: vec![vec![7; 97], vec![7]], ..card() };
        let peerless = RosterEntry { peer: vec![1; 65], ..entry(Word::Lost) };
        let told = read(&frame(vec![peerless, entry(Word::Here(odd))]));
        let Word::Here(told) = &told[0].word else { panic!("lost") };
        assert_eq!((told.models.as_slice(), told.addresses.as_slice()), (["m".to_owned()].as_slice(), [vec![7]].as_slice()));
    }
}
