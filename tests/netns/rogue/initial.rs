//! The first packet of a QUIC handshake, opened and sealed again for as many connections as one likes (RFC 9001, section 5).

use ring::aead::quic::{AES_128, HeaderProtectionKey};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};

const SALT: [u8; 20] =
    [0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17, 0x9a, 0xe6, 0xa4, 0xc8, 0x0c, 0xad, 0xcc, 0xbb, 0x7f, 0x0a];
/// Where the connection id begins, which is the client's to choose, and its length before it.
const ID_AT: usize = 6;

struct Bytes(usize);

impl KeyType for Bytes {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-Expand-Label of TLS 1.3 without a context.
fn expand(from: &Prk, label: &str, length: usize) -> Vec<u8> {
    let label = format!("tls13 {label}");
    let head = [0, u8::try_from(length).unwrap(), u8::try_from(label.len()).unwrap()];
    let info = [&head[..], label.as_bytes(), &[0]];
    let mut out = vec![0; length];
    from.expand(&info, Bytes(length)).unwrap().fill(&mut out).unwrap();
    out
}

struct Keys {
    packet: LessSafeKey,
    iv: Vec<u8>,
    header: HeaderProtectionKey,
}

impl Keys {
    /// Those of a client that chose this connection id.
    fn of(id: &[u8]) -> Self {
        let initial = Salt::new(HKDF_SHA256, &SALT).extract(id);
        let client = Prk::new_less_safe(HKDF_SHA256, &expand(&initial, "client in", 32));
        Self {
            packet: LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &expand(&client, "quic key", 16)).unwrap()),
            iv: expand(&client, "quic iv", NONCE_LEN),
            header: HeaderProtectionKey::new(&AES_128, &expand(&client, "quic hp", 16)).unwrap(),
        }
    }

    fn nonce(&self, number: &[u8]) -> Nonce {
        let mut nonce = self.iv.clone();
        let at = nonce.len() - number.len();
        nonce[at..].iter_mut().zip(number).for_each(|(byte, number)| *byte ^= number);
        Nonce::try_assume_unique_for_key(&nonce).unwrap()
    }

    fn mask(&self, packet: &[u8], number_at: usize) -> [u8; 5] {
        self.header.new_mask(&packet[number_at + 4..number_at + 20]).unwrap()
    }
}

/// A first packet in the clear.
pub struct Initial {
    /// Up to the packet number and with it.
    header: Vec<u8>,
    number_at: usize,
    payload: Vec<u8>,
}

impl Initial {
    /// Takes a packet of a client apart; `None` for anything else.
    pub fn open(packet: &[u8]) -> Option<Self> {
        let length_of = |at: usize| -> Option<(usize, usize)> {
            let first = *packet.get(at)?;
            let bytes = 1 << (first >> 6);
            let rest = packet.get(at + 1..at + bytes)?;
            Some((rest.iter().fold(usize::from(first & 0x3f), |value, byte| value << 8 | usize::from(*byte)), bytes))
        };
        if packet.first()? & 0xf0 != 0xc0 {
            return None;
        }
        let id_length = usize::from(packet[ID_AT - 1]);
        let source_at = ID_AT + id_length;
        let token_at = source_at + 1 + usize::from(*packet.get(source_at)?);
        let (token, bytes) = length_of(token_at)?;
        let (length, more) = length_of(token_at + bytes + token)?;
        let number_at = token_at + bytes + token + more;
        let keys = Keys::of(packet.get(ID_AT..source_at)?);
        let mut packet = packet.get(..number_at + length)?.to_vec();
        let mask = keys.mask(&packet, number_at);
        packet[0] ^= mask[0] & 0x0f;
        let body_at = number_at + usize::from(packet[0] & 3) + 1;
        packet[number_at..body_at].iter_mut().zip(&mask[1..]).for_each(|(byte, mask)| *byte ^= mask);
        let (header, body) = packet.split_at_mut(body_at);
        let nonce = keys.nonce(&header[number_at..]);
        let payload = keys.packet.open_in_place(nonce, Aad::from(&*header), body).ok()?.to_vec();
        Some(Self { header: header.to_vec(), number_at, payload })
    }

    /// The same for another connection: whole, valid, and never seen before.
    pub fn sealed(&self, id: u64) -> Vec<u8> {
        let mut packet = self.header.clone();
        let id_end = ID_AT + usize::from(packet[ID_AT - 1]);
        for (byte, new) in packet[ID_AT..id_end].iter_mut().zip(id.to_be_bytes()) {
            *byte ^= new;
        }
        let keys = Keys::of(&packet[ID_AT..id_end]);
        let mut payload = self.payload.clone();
        let tag = keys.packet.seal_in_place_separate_tag(keys.nonce(&packet[self.number_at..]), Aad::from(&packet), &mut payload);
        let body_at = packet.len();
        packet.extend_from_slice(&payload);
        packet.extend_from_slice(tag.unwrap().as_ref());
        let mask = keys.mask(&packet, self.number_at);
        packet[0] ^= mask[0] & 0x0f;
        packet[self.number_at..body_at].iter_mut().zip(&mask[1..]).for_each(|(byte, mask)| *byte ^= mask);
        packet
    }
}

#[test]
fn a_packet_that_was_sealed_is_the_same_when_it_is_opened() {
    // A header with a connection id of 8 bytes, none of the sender's, no token, and a packet number of 2 bytes.
    let payload = vec![7; 100];
    let header = [&[0xc1, 0, 0, 0, 1, 8][..], &[9; 8], &[0, 0, 0x40, 118, 0, 1]].concat();
    let initial = Initial { number_at: header.len() - 2, header, payload };
    let opened = Initial::open(&initial.sealed(0x1234_5678_9abc_def0)).unwrap();
    assert_eq!(opened.payload, initial.payload);
    assert_ne!(opened.header, initial.header, "another id");
}
