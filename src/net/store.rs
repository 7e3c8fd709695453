//! The record store of Kademlia: provider records only, each bound counted, our own kept apart and never evicted.
//!
//! libp2p's `MemoryStore` ignores the 21st provider of a key, keeps expired records, and forgets our own when a key is
//! full (<https://github.com/libp2p/rust-libp2p/issues/2247>).

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Instant;

use libp2p::PeerId;
use libp2p::kad::store::{Error, RecordStore, Result};
use libp2p::kad::{ProviderRecord, Record, RecordKey};

use super::address::{ip_of, is_circuit};
use super::random_below;

const MAX_PER_KEY: usize = 256;
const MAX_KEYS: usize = 1024;
const MAX_RECORDS: usize = 4096;
const MAX_KEYS_PER_PROVIDER: usize = 32;
/// Providers of one key from one /24 or /48.
const MAX_PER_SUBNET: usize = 8;
const MAX_ADDRESSES: usize = 8;
const MAX_RECORD_BYTES: usize = 1024;
/// Providers of one key behind relays in one /24 or /48: one relay holds as many places.
const MAX_PER_RELAY: usize = 128;
/// Keys that are compared when one of them has to go.
const SAMPLE: usize = 8;
/// Providers in one answer: what fits a packet.
const MAX_ANSWER: usize = 64;

#[derive(Debug)]
pub(crate) struct Providers {
    local: PeerId,
    own: HashMap<RecordKey, ProviderRecord>,
    others: HashMap<RecordKey, Vec<ProviderRecord>>,
    total: usize,
    keys_of: HashMap<PeerId, usize>,
}

/// Where a provider is, and how many of one key may be there. Of one that is behind a relay, where the relay is.
fn subnet(record: &ProviderRecord) -> Option<(u64, usize)> {
    let direct = record.addresses.iter().find(|address| !is_circuit(address));
    let most = if direct.is_some() { MAX_PER_SUBNET } else { MAX_PER_RELAY };
    let net = match direct.or(record.addresses.first()).and_then(ip_of)? {
        IpAddr::V4(ip) => u64::from(u32::from(ip) >> 8),
        IpAddr::V6(ip) => 1 << 63 | u64::try_from(u128::from(ip) >> 80).unwrap_or(u64::MAX >> 1),
    };
    Some((net, most))
}

impl Providers {
    pub(crate) fn new(local: PeerId) -> Self {
        Self { local, own: HashMap::new(), others: HashMap::new(), total: 0, keys_of: HashMap::new() }
    }

    fn drop_at(&mut self, key: &RecordKey, at: usize) {
        let Some(list) = self.others.get_mut(key) else { return };
        let record = list.swap_remove(at);
        if list.is_empty() {
            self.others.remove(key);
        }
        self.total -= 1;
        if let Some(keys) = self.keys_of.get_mut(&record.provider) {
            *keys -= 1;
            if *keys == 0 {
                self.keys_of.remove(&record.provider);
            }
        }
    }

    fn drop_expired(&mut self, key: &RecordKey, now: Instant) {
        let expired = |list: &Vec<ProviderRecord>| list.iter().position(|record| record.is_expired(now));
        while let Some(at) = self.others.get(key).and_then(expired) {
            self.drop_at(key, at);
        }
    }

    fn drop_all_expired(&mut self, now: Instant) {
        let keys: Vec<RecordKey> = self.others.keys().cloned().collect();
        for key in keys {
            self.drop_expired(&key, now);
        }
    }

    /// The key that goes when there are too many: of a few random ones that whose providers live where most providers live. A
    /// flood comes from few places, and makes room by itself.
    fn crowded_key(&self) -> RecordKey {
        let mut neighbours: HashMap<Option<(u64, usize)>, usize> = HashMap::new();
        for record in self.others.values().flatten() {
            *neighbours.entry(subnet(record)).or_default() += 1;
        }
        let crowd = |list: &Vec<ProviderRecord>| {
            // A key with one provider from elsewhere is somebody's.
            list.iter().map(|record| neighbours[&subnet(record)]).min().unwrap_or(0)
        };
        let sample = (0..SAMPLE).filter_map(|_| self.others.iter().nth(random_below(self.others.len())));
        sample.max_by_key(|(_, list)| crowd(list)).map(|(key, _)| key.clone()).expect("a full store has keys")
    }

    fn drop_key(&mut self, key: &RecordKey) {
        while self.others.contains_key(key) {
            self.drop_at(key, 0);
        }
    }

    fn insert(&mut self, mut record: ProviderRecord, now: Instant) -> Result<()> {
        record.addresses.truncate(MAX_ADDRESSES);
        let bytes: usize = record.addresses.iter().map(libp2p::Multiaddr::len).sum();
        if bytes + record.key.as_ref().len() > MAX_RECORD_BYTES {
            return Err(Error::ValueTooLarge);
        }
        let key = record.key.clone();
        let list = self.others.get_mut(&key);
        if let Some((at, known)) =
            list.and_then(|list| list.iter_mut().enumerate().find(|(_, known)| known.provider == record.provider))
        {
            if subnet(known) == subnet(&record) {
                *known = record;
                return Ok(());
            }
            // It lives elsewhere now, and has to find a place there like anybody.
            self.drop_at(&key, at);
        }
        self.drop_expired(&key, now);
        if self.keys_of.get(&record.provider).is_some_and(|&keys| keys >= MAX_KEYS_PER_PROVIDER) {
            return Err(Error::MaxProvidedKeys);
        }
        let new_key = !self.others.contains_key(&key);
        if self.total >= MAX_RECORDS || (new_key && self.others.len() >= MAX_KEYS) {
            self.drop_all_expired(now);
        }
        while new_key && self.others.len() >= MAX_KEYS {
            let victim = self.crowded_key();
            self.drop_key(&victim);
        }
        if let Some(list) = self.others.get(&key) {
            let ours = subnet(&record);
            let same: Vec<usize> =
                list.iter().enumerate().filter(|(_, known)| ours.is_some() && subnet(known) == ours).map(|(at, _)| at).collect();
            if ours.is_some_and(|(_, most)| same.len() >= most) {
                let victim = same[random_below(same.len())];
                self.drop_at(&key, victim);
            } else if list.len() >= MAX_PER_KEY {
                let victim = random_below(list.len());
                self.drop_at(&key, victim);
            }
        }
        while self.total >= MAX_RECORDS {
            let victim = self.crowded_key();
            if victim == key {
                // Its own record would be the next to go.
                return Err(Error::MaxProvidedKeys);
            }
            self.drop_at(&victim, random_below(self.others[&victim].len()));
        }
        *self.keys_of.entry(record.provider).or_default() += 1;
        self.total += 1;
        self.others.entry(key).or_default().push(record);
        Ok(())
    }
}

impl RecordStore for Providers {
    type RecordsIter<'a> = std::iter::Empty<Cow<'a, Record>>;
    type ProvidedIter<'a> = std::iter::Map<
        std::collections::hash_map::Values<'a, RecordKey, ProviderRecord>,
        fn(&'a ProviderRecord) -> Cow<'a, ProviderRecord>,
    >;

    fn get(&self, _: &RecordKey) -> Option<Cow<'_, Record>> {
        None
    }

    fn put(&mut self, _: Record) -> Result<()> {
        // No value records: a stranger could store anything.
        Err(Error::MaxRecords)
    }

    fn remove(&mut self, _: &RecordKey) {}

    fn records(&self) -> Self::RecordsIter<'_> {
        std::iter::empty()
    }

    fn add_provider(&mut self, record: ProviderRecord) -> Result<()> {
        if record.provider == self.local {
            // At most as many as clusters, by our own doing.
            self.own.insert(record.key.clone(), record);
            return Ok(());
        }
        self.insert(record, Instant::now())
    }

    fn providers(&self, key: &RecordKey) -> Vec<ProviderRecord> {
        let now = Instant::now();
        let mut found: Vec<ProviderRecord> =
            self.others.get(key).into_iter().flatten().filter(|record| !record.is_expired(now)).cloned().collect();
        while found.len() >= MAX_ANSWER {
            found.swap_remove(random_below(found.len()));
        }
        found.extend(self.own.get(key).cloned());
        found
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        self.own.values().map(Cow::Borrowed)
    }

    fn remove_provider(&mut self, key: &RecordKey, provider: &PeerId) {
        if *provider == self.local {
            self.own.remove(key);
            return;
        }
        let at = self.others.get(key).and_then(|list| list.iter().position(|record| record.provider == *provider));
        if let Some(at) = at {
            self.drop_at(key, at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use std::time::Duration;

    fn key(number: u32) -> RecordKey {
        RecordKey::new(&number.to_be_bytes())
    }

    fn record(number: u32, host: u32, expires: Instant) -> ProviderRecord {
        let address = format!("/ip4/{}/tcp/4001", Ipv4Addr::from(0x0100_0000 + (host << 8))).parse().unwrap();
        ProviderRecord { key: key(number), provider: PeerId::random(), expires: Some(expires), addresses: vec![address] }
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(600)
    }

    #[test]
    fn ten_thousand_records_under_one_key_leave_256_and_our_own() {
        let local = PeerId::random();
        let mut store = Providers::new(local);
        store.add_provider(ProviderRecord { provider: local, ..record(1, 0, later()) }).unwrap();
        for host in 0..10_000 {
            let _ = store.add_provider(record(1, host, later()));
        }
        assert_eq!(store.total, MAX_PER_KEY);
        assert_eq!(store.provided().count(), 1);
        let answer = store.providers(&key(1));
        assert_eq!(answer.len(), MAX_ANSWER);
        assert!(answer.iter().any(|record| record.provider == local), "our own record is always in the answer");
    }

    #[test]
    fn ten_thousand_keys_leave_1024() {
        let mut store = Providers::new(PeerId::random());
        for number in 0..10_000 {
            let _ = store.add_provider(record(number, number, later()));
        }
        assert_eq!(store.others.len(), MAX_KEYS);
        assert!(store.total <= MAX_RECORDS);
    }

    #[test]
    fn an_expired_record_makes_room_first() {
        let mut store = Providers::new(PeerId::random());
        let past = Instant::now();
        let expired = record(1, 0, past);
        let provider = expired.provider;
        store.add_provider(expired).unwrap();
        let mut kept = Vec::new();
        for host in 1..=u32::try_from(MAX_PER_KEY).unwrap() {
            let fresh = record(1, host, later());
            kept.push(fresh.provider);
            store.add_provider(fresh).unwrap();
        }
        let held: Vec<PeerId> = store.others[&key(1)].iter().map(|record| record.provider).collect();
        assert!(!held.contains(&provider));
        assert!(kept.iter().all(|provider| held.contains(provider)), "no fresh record had to go");
    }

    #[test]
    fn a_full_store_takes_the_next_key_and_a_flood_from_one_place_makes_the_room() {
        let mut store = Providers::new(PeerId::random());
        // Some keys of others, each from elsewhere.
        for number in 0..100 {
            store.add_provider(record(number, number, later())).unwrap();
        }
        for number in 1000..12_000 {
            store.add_provider(record(number, 5000, later())).unwrap();
        }
        assert_eq!(store.others.len(), MAX_KEYS);
        store.add_provider(record(500, 500, later())).unwrap();
        assert_eq!(store.providers(&key(500)).len(), 1, "the store was full, and a new key finds a place");
        let left = (0..100).filter(|&number| !store.providers(&key(number)).is_empty()).count();
        assert!(left >= 95, "{left} of 100 keys survived eleven thousand of a flood");
    }

    #[test]
    fn a_store_full_of_records_takes_the_next_one_too() {
        let mut store = Providers::new(PeerId::random());
        for number in 0..20 {
            for host in 0..u32::try_from(MAX_PER_KEY).unwrap() {
                let _ = store.add_provider(record(number, number << 9 | host, later()));
            }
        }
        assert_eq!(store.total, MAX_RECORDS);
        assert!((0..20).any(|_| store.add_provider(record(77, 60_000, later())).is_ok()));
        assert!(store.total <= MAX_RECORDS);
        assert_eq!(store.total, store.others.values().map(Vec::len).sum::<usize>());
    }

    #[test]
    fn one_subnet_and_one_provider_are_bounded() {
        let mut store = Providers::new(PeerId::random());
        for _ in 0..100 {
            let _ = store.add_provider(record(1, 7, later()));
        }
        assert_eq!(store.total, MAX_PER_SUBNET);
        let behind = |number| {
            let address = format!("/ip4/192.0.2.7/tcp/{number}/p2p/{}/p2p-circuit", PeerId::random()).parse().unwrap();
            ProviderRecord { addresses: vec![address], ..record(2, 7, later()) }
        };
        for number in 1..200 {
            let _ = store.add_provider(behind(number));
        }
        assert_eq!(store.others[&key(2)].len(), MAX_PER_RELAY, "many homes may be behind one relay");
        let provider = PeerId::random();
        let accepted = (100..200)
            .filter(|&number| store.add_provider(ProviderRecord { provider, ..record(number, number, later()) }).is_ok());
        assert_eq!(accepted.count(), MAX_KEYS_PER_PROVIDER);
    }

    #[test]
    fn who_moves_into_a_full_subnet_counts_there() {
        let mut store = Providers::new(PeerId::random());
        for host in 0..20 {
            let elsewhere = record(1, 100 + host, later());
            let moved = ProviderRecord { provider: elsewhere.provider, ..record(1, 7, later()) };
            store.add_provider(elsewhere).unwrap();
            store.add_provider(moved.clone()).unwrap();
            // The same once more is no move.
            store.add_provider(moved).unwrap();
        }
        assert_eq!((store.total, store.others[&key(1)].len()), (MAX_PER_SUBNET, MAX_PER_SUBNET));
        assert_eq!(store.keys_of.values().sum::<usize>(), MAX_PER_SUBNET);
    }

    #[test]
    fn values_are_refused_and_large_records_too() {
        let mut store = Providers::new(PeerId::random());
        assert!(store.put(Record::new(key(1), vec![1])).is_err());
        let long: libp2p::Multiaddr = format!("/dns4/{}/tcp/1", "a".repeat(250)).parse().unwrap();
        let large = ProviderRecord { addresses: vec![long; 8], ..record(1, 1, later()) };
        assert!(matches!(store.add_provider(large), Err(Error::ValueTooLarge)));
    }

    #[test]
    fn stopping_to_provide_removes_our_own_record() {
        let local = PeerId::random();
        let mut store = Providers::new(local);
        store.add_provider(ProviderRecord { provider: local, ..record(1, 0, later()) }).unwrap();
        store.remove_provider(&key(1), &local);
        assert_eq!(store.provided().count(), 0);
        assert!(store.providers(&key(1)).is_empty());
    }
}
