//! The packets of libp2p's mDNS discovery, written and read: a question for `_p2p._udp.local`, and the answer, which points
//! to an instance whose text says `dnsaddr=ADDRESS/p2p/ID`. Pure; whatever the bytes are, reading them ends in a value or
//! an error, and what it allocates is bounded by the constants here.
//!
//! <https://github.com/libp2p/specs/blob/master/discovery/mdns.md>, RFC 6762, RFC 6763, RFC 1035 §4.

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};

/// Largest packet that RFC 6762 §17 allows, headers of IP and UDP included.
pub(super) const MAX_PACKET: usize = 9000;
/// Questions and records of one packet; one with more is not read further.
const MAX_QUESTIONS: usize = 64;
const MAX_RECORDS: usize = 256;
/// Instances of one packet: a node tells of itself alone.
const MAX_INSTANCES: usize = 4;
/// Texts of one instance.
const MAX_TEXTS: usize = 32;
/// Addresses of one peer.
pub(super) const MAX_ADDRESSES: usize = 8;
/// Instances that the asker of one question may say it knows already.
const MAX_KNOWN: usize = 1024;
/// Bytes of a name (RFC 1035 §3.1), and how often it may point to another place.
const MAX_NAME: usize = 255;
const MAX_JUMPS: usize = 16;

const RESPONSE: u16 = 0x8000;
const AUTHORITATIVE: u16 = 0x0400;
/// Operation code and result code: both must be zero (RFC 6762 §18).
const CODES: u16 = 0x780f;
const PTR: u16 = 12;
const TXT: u16 = 16;
const ANY: u16 = 255;
const INTERNET: u16 = 1;
/// "Forget what you had of this": in a question, "answer me alone".
const TOP_BIT: u16 = 0x8000;

/// `_p2p._udp.local` and the name at which all services of a network are asked for, as labels.
const SERVICE: &[u8] = b"\x04_p2p\x04_udp\x05local";
const ALL_SERVICES: &[u8] = b"\x09_services\x07_dns-sd\x04_udp\x05local";
/// Where the name of the service begins in every packet of ours: behind the header.
const SERVICE_AT: u16 = 0xc000 | 12;

/// Why bytes are no packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("it ends too early")]
    Truncated,
    #[error("longer than {MAX_PACKET} bytes")]
    TooLong,
    #[error("a name is not valid")]
    Name,
    #[error("it has too many records")]
    TooMany,
    #[error("the length of a record does not fit its content")]
    Length,
}

/// A name as its labels, each after its length, in lower case, without the last empty one.
#[derive(Clone, Copy)]
pub(super) struct Name {
    bytes: [u8; MAX_NAME],
    length: u8,
}

impl Name {
    fn new() -> Self {
        Self { bytes: [0; MAX_NAME], length: 0 }
    }

    fn labels(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    fn push(&mut self, label: &[u8]) -> Result<(), Malformed> {
        let at = usize::from(self.length);
        // One byte stays for the empty label at the end.
        if at + 1 + label.len() >= MAX_NAME {
            return Err(Malformed::Name);
        }
        let length = u8::try_from(label.len()).map_err(|_| Malformed::Name)?;
        self.bytes[at] = length;
        self.bytes[at + 1..at + 1 + label.len()].copy_from_slice(label);
        self.bytes[at + 1..at + 1 + label.len()].make_ascii_lowercase();
        self.length += 1 + length;
        Ok(())
    }

    /// Its first label is `label`.
    pub(super) fn begins_with(&self, label: &str) -> bool {
        let labels = self.labels();
        labels.first().is_some_and(|&length| usize::from(length) == label.len())
            && labels[1..].get(..label.len()).is_some_and(|first| first.eq_ignore_ascii_case(label.as_bytes()))
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.labels() == other.labels()
    }
}

impl std::fmt::Debug for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.labels().escape_ascii())
    }
}

/// What somebody wants to know.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Query {
    pub id: u16,
    /// Who speaks libp2p here.
    pub peers: bool,
    /// Which services there are.
    pub services: bool,
    /// Instances that it knows, with the seconds for which it will.
    pub known: Vec<(Name, u32)>,
}

/// A node as a packet tells of it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Instance {
    pub name: Name,
    /// Seconds that this holds for; 0 is a goodbye.
    pub ttl: u32,
    pub peer: PeerId,
    /// Without the peer id; at most [`MAX_ADDRESSES`].
    pub addresses: Vec<Multiaddr>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Packet {
    Query(Query),
    /// Empty when it is about something else.
    Response(Vec<Instance>),
}

struct Reader<'a> {
    packet: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let taken = self.packet.get(self.at..).and_then(|rest| rest.get(..length)).ok_or(Malformed::Truncated)?;
        self.at += length;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.take(2)?.try_into().map_err(|_| Malformed::Truncated)?))
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.take(4)?.try_into().map_err(|_| Malformed::Truncated)?))
    }

    fn name(&mut self) -> Result<Name, Malformed> {
        let (mut name, mut at, mut after, mut jumps) = (Name::new(), self.at, None, 0);
        loop {
            let length = *self.packet.get(at).ok_or(Malformed::Truncated)?;
            match length {
                0 => {
                    self.at = after.unwrap_or(at + 1);
                    return Ok(name);
                }
                1..=63 => {
                    let end = at + 1 + usize::from(length);
                    name.push(self.packet.get(at + 1..end).ok_or(Malformed::Truncated)?)?;
                    at = end;
                }
                0xc0.. => {
                    let low = *self.packet.get(at + 1).ok_or(Malformed::Truncated)?;
                    let target = usize::from(u16::from_be_bytes([length & 0x3f, low]));
                    jumps += 1;
                    if target >= at || jumps > MAX_JUMPS {
                        return Err(Malformed::Name);
                    }
                    after.get_or_insert(at + 2);
                    at = target;
                }
                64..=0xbf => return Err(Malformed::Name),
            }
        }
    }
}

struct Record<'a> {
    name: Name,
    kind: u16,
    ttl: u32,
    data: &'a [u8],
    /// Where the data begin in the packet: names in it may point back.
    at: usize,
}

fn record<'a>(reader: &mut Reader<'a>) -> Result<Record<'a>, Malformed> {
    let name = reader.name()?;
    let (kind, class, ttl, length) = (reader.u16()?, reader.u16()?, reader.u32()?, reader.u16()?);
    let at = reader.at;
    let data = reader.take(length.into())?;
    // Another class than that of the internet is nothing that is asked for here.
    let kind = if class & !TOP_BIT == INTERNET { kind } else { 0 };
    Ok(Record { name, kind, ttl, data, at })
}

/// The name that a record points to.
fn target(packet: &[u8], record: &Record<'_>) -> Result<Name, Malformed> {
    let mut reader = Reader { packet, at: record.at };
    let name = reader.name()?;
    if reader.at == record.at + record.data.len() { Ok(name) } else { Err(Malformed::Length) }
}

/// The texts of a record, each after its length.
fn texts(mut data: &[u8]) -> Result<Vec<&[u8]>, Malformed> {
    let mut found = Vec::new();
    while let Some((&length, rest)) = data.split_first() {
        let (text, rest) = rest.split_at_checked(length.into()).ok_or(Malformed::Length)?;
        data = rest;
        if found.len() < MAX_TEXTS {
            found.push(text);
        }
    }
    Ok(found)
}

/// `dnsaddr=ADDRESS/p2p/ID`; anything else is not for us.
fn dnsaddr(text: &[u8]) -> Option<(PeerId, Multiaddr)> {
    let text = std::str::from_utf8(text.strip_prefix(b"dnsaddr=")?).ok()?;
    let mut address: Multiaddr = text.parse().ok()?;
    match address.pop() {
        Some(Protocol::P2p(peer)) => Some((peer, address)),
        _ => None,
    }
}

/// Reads a packet.
///
/// # Errors
/// It is none, or breaks a limit.
pub(super) fn read(packet: &[u8]) -> Result<Packet, Malformed> {
    if packet.len() > MAX_PACKET {
        return Err(Malformed::TooLong);
    }
    let mut reader = Reader { packet, at: 0 };
    let (id, flags) = (reader.u16()?, reader.u16()?);
    let questions = usize::from(reader.u16()?);
    let records = usize::from(reader.u16()?) + usize::from(reader.u16()?) + usize::from(reader.u16()?);
    if questions > MAX_QUESTIONS || records > MAX_RECORDS {
        return Err(Malformed::TooMany);
    }
    let foreign = Packet::Response(Vec::new());
    if flags & CODES != 0 {
        return Ok(foreign);
    }
    let mut query = Query { id, peers: false, services: false, known: Vec::new() };
    for _ in 0..questions {
        let (name, kind, class) = (reader.name()?, reader.u16()?, reader.u16()?);
        if matches!(kind, PTR | ANY) && class & !TOP_BIT == INTERNET {
            query.peers |= name.labels() == SERVICE;
            query.services |= name.labels() == ALL_SERVICES;
        }
    }
    let (mut pointers, mut described) = (Vec::new(), Vec::new());
    for _ in 0..records {
        let record = record(&mut reader)?;
        match record.kind {
            PTR if record.name.labels() == SERVICE && pointers.len() < MAX_KNOWN => {
                pointers.push((target(packet, &record)?, record.ttl));
            }
            TXT if described.len() < MAX_INSTANCES * MAX_TEXTS => described.push((record.name, record.data)),
            _ => {}
        }
    }
    if flags & RESPONSE == 0 {
        query.known = pointers;
        return Ok(Packet::Query(query));
    }
    let mut instances: Vec<Instance> = Vec::new();
    for (name, ttl) in pointers.into_iter().take(MAX_INSTANCES) {
        let told = described.iter().filter(|(of, _)| *of == name).map(|(_, data)| texts(data)).collect::<Result<Vec<_>, _>>()?;
        let mut told = told.into_iter().flatten().take(MAX_TEXTS).filter_map(dnsaddr);
        // An instance is one node: the first text says which.
        if let Some((peer, first)) = told.next() {
            let others = told.filter(|(other, _)| *other == peer).map(|(_, address)| address);
            let addresses = std::iter::once(first).chain(others).take(MAX_ADDRESSES).collect();
            instances.push(Instance { name, ttl, peer, addresses });
        }
    }
    Ok(Packet::Response(instances))
}

fn header(id: u16, flags: u16, counts: [u16; 4]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(512);
    for word in [id, flags].into_iter().chain(counts) {
        packet.extend(word.to_be_bytes());
    }
    packet
}

fn put_name(packet: &mut Vec<u8>, labels: &[u8]) {
    packet.extend(labels);
    packet.push(0);
}

/// What follows the name of a record.
fn put_record(packet: &mut Vec<u8>, kind: u16, class: u16, ttl: u32, data: &[u8]) {
    for word in [kind, class] {
        packet.extend(word.to_be_bytes());
    }
    packet.extend(ttl.to_be_bytes());
    packet.extend(u16::try_from(data.len()).unwrap_or(u16::MAX).to_be_bytes());
    packet.extend(data);
}

/// The question who is here. By `id` its sender knows its own packet again.
pub(super) fn question(id: u16) -> Vec<u8> {
    let mut packet = header(id, 0, [1, 0, 0, 0]);
    put_name(&mut packet, SERVICE);
    packet.extend(PTR.to_be_bytes());
    packet.extend(INTERNET.to_be_bytes());
    packet
}

/// The answer: `peer` is here, at `addresses` (the first [`MAX_ADDRESSES`] of them), for `ttl` seconds. One record with all
/// texts, as DNS-SD has it: of several records go-libp2p keeps only one.
pub(super) fn answer(instance: &str, peer: &PeerId, addresses: &[Multiaddr], ttl: u32) -> Vec<u8> {
    let mut packet = header(0, RESPONSE | AUTHORITATIVE, [0, 1, 0, 1]);
    put_name(&mut packet, SERVICE);
    let mut name = vec![u8::try_from(instance.len()).unwrap_or(0)];
    name.extend(instance.bytes());
    name.extend(SERVICE_AT.to_be_bytes());
    put_record(&mut packet, PTR, INTERNET, ttl, &name);
    let name_at = u16::try_from(packet.len() - name.len()).unwrap_or(0);
    packet.extend((0xc000 | name_at).to_be_bytes());
    let mut texts = Vec::new();
    for address in addresses.iter().take(MAX_ADDRESSES) {
        let text = format!("dnsaddr={address}/p2p/{peer}");
        if let Ok(length) = u8::try_from(text.len()) {
            texts.push(length);
            texts.extend(text.bytes());
        }
    }
    put_record(&mut packet, TXT, INTERNET | TOP_BIT, ttl, &texts);
    packet
}

/// The answer to the question which services there are: this one.
pub(super) fn services(ttl: u32) -> Vec<u8> {
    let mut packet = header(0, RESPONSE | AUTHORITATIVE, [0, 1, 0, 0]);
    put_name(&mut packet, ALL_SERVICES);
    let mut name = SERVICE.to_vec();
    name.push(0);
    put_record(&mut packet, PTR, INTERNET, ttl, &name);
    packet
}
