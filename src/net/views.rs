//! The part of the network task that tells members of members: views to those of the first versions, rosters to the others.
//!
//! What is new goes out within about a second, once to each: first the members that this node is connected to, then those
//! that two others vouch for. After that a few of all, every half minute, keep the words fresh. Nobody passes on what a
//! single member said.

use std::collections::VecDeque;
use std::time::Duration;

use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::known::{self, Learnt, Told};
use super::mesh::DIAL_AGAIN;
use super::session::Generation;
use super::task::{Due, Session, Task};
use super::{address, jitter, random_below, shuffle};
use crate::domain::cluster::ClusterId;
use crate::wire::control::{Control, View, ViewEntry};
use crate::wire::limits::{MAX_VIEW_ADDRESSES, MAX_VIEW_ENTRIES};
use crate::wire::roster::{Card, Roster, RosterEntry, Word};
use crate::wire::version::MEMBER_VERSION_THREE;

/// Between two rounds of news.
const NEWS_AGAIN: Duration = Duration::from_secs(1);
/// Members that are told news in one round, of those that lag behind: as many, or a third of them.
pub(super) const NEWS_AT_ONCE: usize = 8;
/// Members that are told in one round of those for whom a second one vouches.
pub(super) const VOUCHED_TO: usize = 6;
/// Words that wait to be told; more are left to the half-minute rounds.
const MAX_WAITING: usize = 1024;
/// A word that a member is lost counts for what the loser heard until a little later: others' words are on their way.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// Ages are told in whole seconds, rounded down.
const ROUNDED: Duration = Duration::from_secs(1);
/// The same few members are told again after so many rounds, for those who only know them.
const SAME_AGAIN: u32 = 3;

/// News that wait for the next round.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// Members that were lost, and when.
    lost: VecDeque<(ClusterId, PeerId, Instant)>,
    /// Known members that have just become worth telling.
    vouched: VecDeque<(ClusterId, PeerId)>,
}

/// How many of `listed` members are told to each of `connected` members every half minute, so that each of them hears of
/// each other one about thirteen times before a word is too old.
pub(super) fn share(listed: usize, connected: usize) -> usize {
    (4 * listed).div_ceil(3 * connected.max(1)).clamp(4, MAX_VIEW_ENTRIES)
}

fn age(heard: Instant, now: Instant) -> u32 {
    u32::try_from(now.saturating_duration_since(heard).as_secs()).unwrap_or(u32::MAX)
}

/// A random choice of at most `most`.
fn sample<T>(mut all: Vec<T>, most: usize) -> Vec<T> {
    for at in 0..most.min(all.len()) {
        let other = at + random_below(all.len() - at);
        all.swap(at, other);
    }
    all.truncate(most);
    all
}

impl Task<'_> {
    /// A view of a member of version 1 or 2: addresses, no names.
    pub(super) fn learn_view(&mut self, from: PeerId, cluster: &ClusterId, view: View, now: Instant) {
        for ViewEntry { peer, addresses, .. } in view.entries {
            let Ok(peer) = PeerId::from_bytes(&peer) else { continue };
            let addresses = addresses.into_iter().filter_map(|bytes| Multiaddr::try_from(bytes).ok()).collect();
            self.learn(peer, super::book::Source::View(from), addresses, now);
            self.hinted(peer, cluster, now);
        }
    }

    /// A roster of a member of version 3.
    pub(super) fn learn_roster(&mut self, generation: Generation, roster: Roster, now: Instant) {
        let Some(session) = self.sessions.get_mut(&generation) else { return };
        let listed = usize::from(roster.members);
        let mut is_news = listed > session.listed;
        session.listed = listed;
        let (from, cluster) = (session.peer, session.cluster.clone());
        for RosterEntry { peer, age_seconds, word } in roster.entries {
            let Ok(peer) = PeerId::from_bytes(&peer) else { continue };
            if peer == self.local || self.bans.is_banned(&peer, now.into_std()) {
                continue;
            }
            let Some(heard) = now.checked_sub(Duration::from_secs(age_seconds.into()) + ROUNDED) else { continue };
            match word {
                Word::Lost => {
                    if self.known.lost(&cluster, from, &peer, heard + ROUNDED) {
                        self.list_changed();
                        is_news = true;
                    }
                }
                Word::Here(card) => is_news |= self.learn_member(from, &cluster, peer, card, heard, now),
            }
        }
        // At the pace of the mesh: frames come as fast as a member likes to send them.
        if is_news {
            self.agenda.no_later(Due::Mesh, now + DIAL_AGAIN);
        }
    }

    /// True when the list has one more.
    fn learn_member(
        &mut self,
        from: PeerId,
        cluster: &ClusterId,
        peer: PeerId,
        card: Card,
        heard: Instant,
        now: Instant,
    ) -> bool {
        if self.members.generation(cluster, &peer).is_some() {
            return false;
        }
        let Card { hearsay, serving, draining, name, models, addresses } = card;
        let addresses = addresses.into_iter().filter_map(|bytes| Multiaddr::try_from(bytes).ok()).collect();
        let addresses = self.dialable_of(Some(from), addresses);
        let was_vouched = self.known.is_vouched(cluster, &peer);
        let card = known::Card { name, serving, draining, models, addresses: addresses.clone() };
        let learnt = self.known.told(cluster, Told { teller: from, peer, card, first_hand: !hearsay, heard }, now);
        match learnt {
            Learnt::New => self.list_changed(),
            // The names are the same: there is nothing to tell in the log.
            Learnt::Changed => self.dirty = true,
            Learnt::Fresher | Learnt::Nothing => {}
        }
        // One more member at the side of everybody, as long as they are few.
        if learnt != Learnt::Nothing && !self.is_partial(cluster) {
            self.learn(peer, super::book::Source::View(from), addresses, now);
        }
        let is_vouched = self.known.is_vouched(cluster, &peer);
        if is_vouched && (!was_vouched || learnt == Learnt::Changed) && self.mesh.waiting.vouched.len() < MAX_WAITING {
            self.mesh.waiting.vouched.push_back((cluster.clone(), peer));
            self.agenda.no_later(Due::News, now + jitter(NEWS_AGAIN));
        }
        self.hinted(peer, cluster, now);
        learnt == Learnt::New
    }

    /// Lists show something else, which is told in the log too.
    pub(super) fn list_changed(&mut self) {
        self.dirty = true;
        self.membership_changed = true;
    }

    /// A member was lost here: the others are told, and old words of it count no more.
    pub(super) fn tell_of_loss(&mut self, cluster: &ClusterId, peer: PeerId, now: Instant) {
        self.known.buried(cluster, &peer, now + LAST_WORDS);
        self.known.teller_gone(cluster, &peer);
        if self.mesh.waiting.lost.len() < MAX_WAITING {
            self.mesh.waiting.lost.push_back((cluster.clone(), peer, now));
            self.agenda.no_later(Due::News, now + jitter(NEWS_AGAIN));
        }
    }

    /// Plans to tell what is new, if anybody has not been told.
    pub(super) fn plan_news(&mut self, now: Instant) {
        let news = self.members.news();
        if self.sessions.values().any(|session| hears_rosters(session) && session.told < news) {
            self.agenda.no_later(Due::News, now + jitter(NEWS_AGAIN));
        }
    }

    pub(super) fn tell_news(&mut self, now: Instant) {
        let clusters: Vec<ClusterId> = self.clusters.keys().cloned().collect();
        // Whoever left a cluster has nothing to tell there.
        self.mesh.waiting.lost.retain(|(of, ..)| clusters.contains(of));
        self.mesh.waiting.vouched.retain(|(of, _)| clusters.contains(of));
        for cluster in clusters {
            self.tell_losses(&cluster, now);
            self.tell_vouched(&cluster, now);
            self.tell_new(&cluster, now);
        }
        let Waiting { lost, vouched } = &self.mesh.waiting;
        if lost.is_empty() && vouched.is_empty() {
            self.plan_news(now);
        } else {
            self.agenda.no_later(Due::News, now + jitter(NEWS_AGAIN));
        }
    }

    /// The sessions of a cluster that hear rosters and keep up with what they are sent, in random order.
    fn listeners(&self, cluster: &ClusterId) -> Vec<(Generation, PeerId)> {
        let keeps_up = |session: &Session| session.outbox.capacity() > session.outbox.max_capacity() / 2;
        let mut listeners: Vec<(Generation, PeerId)> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.cluster == *cluster && hears_rosters(session) && keeps_up(session))
            .map(|(&generation, session)| (generation, session.peer))
            .collect();
        shuffle(&mut listeners);
        listeners
    }

    /// Who was lost is told to everybody: it takes two to be believed.
    fn tell_losses(&mut self, cluster: &ClusterId, now: Instant) {
        let mut entries = Vec::new();
        self.mesh.waiting.lost.retain(|(of, peer, when)| {
            let tell = of == cluster && entries.len() < MAX_VIEW_ENTRIES;
            if tell {
                entries.push(RosterEntry { peer: peer.to_bytes(), age_seconds: age(*when, now), word: Word::Lost });
            }
            !tell
        });
        if !entries.is_empty() {
            for (generation, _) in self.listeners(cluster) {
                self.send_roster(generation, entries.clone());
            }
        }
    }

    /// Known members for whom a second one vouches are passed on to a few.
    fn tell_vouched(&mut self, cluster: &ClusterId, now: Instant) {
        let mut peers = Vec::new();
        self.mesh.waiting.vouched.retain(|(of, peer)| {
            let tell = of == cluster && peers.len() < MAX_VIEW_ENTRIES;
            if tell {
                peers.push(*peer);
            }
            !tell
        });
        if !peers.is_empty() {
            for (generation, to) in self.listeners(cluster).into_iter().take(VOUCHED_TO) {
                let entries = self.entries_for(cluster, &to, &peers, now);
                self.send_roster(generation, entries);
            }
        }
    }

    /// Members at the side of this node are told to everybody else there, once.
    fn tell_new(&mut self, cluster: &ClusterId, now: Instant) {
        let news = self.members.news();
        let mut listeners = self.listeners(cluster);
        listeners.retain(|(generation, _)| self.sessions.get(generation).is_some_and(|session| session.told < news));
        let at_once = NEWS_AT_ONCE.max(listeners.len() / 3);
        for (generation, to) in listeners.into_iter().take(at_once) {
            let Some(session) = self.sessions.get_mut(&generation) else { continue };
            let mut new: Vec<(u64, PeerId)> =
                self.members.news_after(cluster, session.told).filter(|(_, peer)| *peer != to).collect();
            new.sort_unstable();
            session.told = if new.len() > MAX_VIEW_ENTRIES { new[MAX_VIEW_ENTRIES - 1].0 } else { news };
            let peers: Vec<PeerId> = new.into_iter().take(MAX_VIEW_ENTRIES).map(|(_, peer)| peer).collect();
            let entries = self.entries_for(cluster, &to, &peers, now);
            self.send_roster(generation, entries);
        }
    }

    fn send_roster(&mut self, generation: Generation, entries: Vec<RosterEntry>) {
        let Some(session) = self.sessions.get(&generation).filter(|_| !entries.is_empty()) else { return };
        let listed = self.listed(&session.cluster) + 1;
        let roster = Roster { members: u16::try_from(listed).unwrap_or(u16::MAX), entries };
        self.send(generation, &Control::Roster(roster));
    }

    /// What `to` is told of `peers`, as far as they are members at this node's side or vouched for.
    fn entries_for(&self, cluster: &ClusterId, to: &PeerId, peers: &[PeerId], now: Instant) -> Vec<RosterEntry> {
        let to_loopback = self.is_on_this_machine(to);
        peers.iter().filter_map(|peer| self.entry_for(cluster, peer, to_loopback, now)).collect()
    }

    fn entry_for(&self, cluster: &ClusterId, peer: &PeerId, to_loopback: bool, now: Instant) -> Option<RosterEntry> {
        let usable = |found: &&Multiaddr| address::for_view(found, to_loopback);
        let encoded = |addresses: &[Multiaddr]| -> Vec<Vec<u8>> {
            addresses.iter().filter(usable).take(MAX_VIEW_ADDRESSES).map(Multiaddr::to_vec).collect()
        };
        let (heard, card) = if let Some(shown) = self.members.shown(cluster, peer) {
            let card = Card {
                hearsay: false,
                serving: shown.serving,
                draining: shown.draining,
                name: shown.name.to_owned(),
                models: shown.models.into_iter().map(str::to_owned).collect(),
                addresses: encoded(&self.addresses_of(peer)),
            };
            (shown.heard, card)
        } else {
            let (known, heard) = self.known.vouched_card(cluster, peer)?;
            let card = Card {
                hearsay: true,
                serving: known.serving,
                draining: known.draining,
                name: known.name.clone(),
                models: known.models.clone(),
                addresses: encoded(&known.addresses),
            };
            (heard, card)
        };
        Some(RosterEntry { peer: peer.to_bytes(), age_seconds: age(heard, now), word: Word::Here(card) })
    }

    /// Whoever may be told to `to`.
    fn tellable(&self, cluster: &ClusterId, to: &PeerId) -> Vec<PeerId> {
        let here = self.members.news_after(cluster, 0).map(|(_, peer)| peer);
        here.chain(self.known.vouched(cluster)).filter(|peer| peer != to).collect()
    }

    /// What a new member is told first: as many as one frame holds.
    pub(super) fn introduce_others(&mut self, generation: Generation, cluster: &ClusterId, to: &PeerId, now: Instant) {
        let all = self.tellable(cluster, to);
        let whole = all.len() <= MAX_VIEW_ENTRIES;
        let entries = self.entries_for(cluster, to, &sample(all, MAX_VIEW_ENTRIES), now);
        self.send_roster(generation, entries);
        let news = self.members.news();
        match self.sessions.get_mut(&generation) {
            Some(session) if whole => session.told = news,
            _ => self.plan_news(now),
        }
    }

    /// Every half minute: what has become old is forgotten, and each member hears of a few others again.
    pub(super) fn exchange_views(&mut self, now: Instant) {
        self.agenda.set(Due::Views, now + jitter(self.lasting.config.timings.views));
        self.remember_members(now);
        let members = &self.members;
        self.book.expire(now.into_std(), |peer| members.is_member(peer));
        let book = &self.book;
        self.policy.retain(|peer| book.contains(peer));
        if self.known.expire(now) {
            self.list_changed();
        }
        self.forget_rivals(now);
        let targets: Vec<_> = self
            .sessions
            .iter()
            .map(|(&generation, session)| (generation, session.cluster.clone(), session.peer, hears_rosters(session)))
            .collect();
        for (generation, cluster, peer, hears_rosters) in targets {
            if hears_rosters {
                self.refresh(generation, &cluster, &peer, now);
            } else {
                self.send_view(generation, &cluster, &peer, now);
            }
        }
    }

    fn refresh(&mut self, generation: Generation, cluster: &ClusterId, to: &PeerId, now: Instant) {
        let all = self.tellable(cluster, to);
        if all.len() <= MAX_VIEW_ENTRIES {
            // The same few again are of use only to who is not connected to one of them.
            let fresh = self.lasting.config.timings.views * SAME_AGAIN - self.lasting.config.timings.views / 2;
            let names = all.iter().map(|peer| peer.to_bytes()).collect();
            if self.members.view_told(cluster, to, names, now, fresh) {
                return;
            }
        }
        let most =
            if all.len() <= MAX_VIEW_ENTRIES { all.len() } else { share(self.listed(cluster), self.members.count(cluster)) };
        let entries = self.entries_for(cluster, to, &sample(all, most), now);
        self.send_roster(generation, entries);
    }

    /// A view for a member of version 1 or 2, unless it was told the same.
    fn send_view(&mut self, generation: Generation, cluster: &ClusterId, to: &PeerId, now: Instant) {
        // A view that names nobody new is not sent: between three idle nodes there is nothing to tell.
        let Some(view) = self.view_for(cluster, to, now) else { return };
        let peers = view.entries.iter().map(|entry| entry.peer.clone()).collect();
        if !self.members.view_told(cluster, to, peers, now, Duration::MAX) {
            self.send(generation, &Control::View(view));
        }
    }

    /// Up to 32 random members of `cluster` for `to`, with addresses that it can use; `None` when there are none.
    pub(super) fn view_for(&self, cluster: &ClusterId, to: &PeerId, now: Instant) -> Option<View> {
        let to_loopback = self.is_on_this_machine(to);
        let mut known: Vec<(PeerId, Instant)> = self.members.heard_of(cluster).filter(|(peer, _)| peer != to).collect();
        shuffle(&mut known);
        let entries: Vec<ViewEntry> = known
            .into_iter()
            .filter_map(|(peer, heard)| {
                let addresses: Vec<Vec<u8>> = self
                    .addresses_of(&peer)
                    .into_iter()
                    .filter(|found| address::for_view(found, to_loopback))
                    .take(MAX_VIEW_ADDRESSES)
                    .map(|found| found.to_vec())
                    .collect();
                (!addresses.is_empty()).then(|| ViewEntry { peer: peer.to_bytes(), age_seconds: age(heard, now), addresses })
            })
            .take(MAX_VIEW_ENTRIES)
            .collect();
        (!entries.is_empty()).then_some(View { entries })
    }
}

fn hears_rosters(session: &Session) -> bool {
    session.protocol >= MEMBER_VERSION_THREE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_hears_of_everybody_several_times_before_a_word_is_too_old() {
        assert_eq!(share(200, 45), 6);
        assert_eq!(share(100, 45), 4);
        assert_eq!(share(10_000, 40), MAX_VIEW_ENTRIES);
        assert_eq!(share(0, 0), 4);
        for (listed, connected) in [(65, 40), (200, 40), (500, 45), (900, 40)] {
            let rounds = known::TTL.as_secs() / 30;
            let mentions = share(listed, connected) * connected * usize::try_from(rounds).unwrap() / listed;
            assert!(mentions >= 13, "{listed}: {mentions}");
        }
    }

    #[test]
    fn a_sample_has_no_one_twice() {
        for most in [0, 1, 5, 10, 20] {
            let mut chosen = sample((0..10).collect(), most);
            chosen.sort_unstable();
            chosen.dedup();
            assert_eq!(chosen.len(), most.min(10));
        }
    }
}
