//! Where connections wait while they prove who they are: at most so many for each transport, shared fairly among sources.
//!
//! libp2p's own limit on pending connections is one for all transports and refuses whoever comes when it is reached: as many
//! sockets that say nothing, or first packets of QUIC with forged sources, would keep everybody out for as long as a
//! handshake may take. Here the newcomer always gets a place, and the source that holds most of them loses its oldest.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use futures::FutureExt as _;
use futures::future::{AbortHandle, Abortable};
use libp2p::core::transport::{DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, Transport};

use super::address::ip_of;
use super::guard::{Knocks, source};
use super::sieve::Sieve;

/// Connections that are turned away before anything else is looked at.
const TURNED_AWAY: usize = 64;

/// Who knocks how often, for all transports together. A cheap clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Door(Arc<Mutex<Knocks>>);

impl Door {
    /// Whether a connection from `remote` may begin its handshake now. One that came through a relay has no address of its
    /// own: its relay is limited at its own connection.
    fn opens_to(&self, remote: &Multiaddr) -> bool {
        ip_of(remote).is_none_or(|ip| ip.is_loopback() || self.knocks(|knocks| knocks.allow(ip, Instant::now())))
    }

    /// A peer at this address broke the protocol: whoever comes from there comes slowly for a while.
    pub(crate) fn slow_down(&self, ip: IpAddr) {
        self.knocks(|knocks| knocks.slow_down(ip, Instant::now()));
    }

    fn knocks<T>(&self, ask: impl FnOnce(&mut Knocks) -> T) -> T {
        ask(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The handshakes of one transport, in the order in which they began.
#[derive(Debug)]
struct Places {
    most: usize,
    next: u64,
    taken: BTreeMap<u64, (Option<IpAddr>, AbortHandle)>,
}

impl Places {
    fn new(most: usize) -> Self {
        Self { most: most.max(1), next: 0, taken: BTreeMap::new() }
    }

    /// Gives a place, taken from the source that holds most of them: the oldest it has.
    fn take(&mut self, source: Option<IpAddr>, handle: AbortHandle) -> u64 {
        while self.taken.len() >= self.most {
            let Some(oldest) = self.oldest_of_the_greediest() else { break };
            if let Some((_, handle)) = self.taken.remove(&oldest) {
                handle.abort();
            }
        }
        self.next += 1;
        self.taken.insert(self.next, (source, handle));
        self.next
    }

    fn oldest_of_the_greediest(&self) -> Option<u64> {
        let mut held: HashMap<Option<IpAddr>, (usize, u64)> = HashMap::new();
        for (&number, (source, _)) in &self.taken {
            held.entry(*source).or_insert((0, number)).0 += 1;
        }
        held.into_values().max_by_key(|&(count, oldest)| (count, std::cmp::Reverse(oldest))).map(|(_, oldest)| oldest)
    }
}

/// A place that is given back when it is dropped.
#[derive(Debug)]
struct Place {
    places: Arc<Mutex<Places>>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).taken.remove(&self.number);
    }
}

/// A handshake that may have to make room for another.
#[derive(Debug)]
pub(crate) struct Guest<F> {
    handshake: Abortable<F>,
    _place: Place,
}

impl<O, F: Future<Output = io::Result<O>> + Unpin> Future for Guest<F> {
    type Output = io::Result<O>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.handshake.poll_unpin(cx).map(|outcome| {
            outcome
                .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::ConnectionRefused, "it made room for another connection")))
        })
    }
}

/// A transport with a door and so many places behind it.
#[derive(Debug)]
pub(crate) struct Lobby<T> {
    inner: T,
    door: Door,
    places: Arc<Mutex<Places>>,
    /// For what comes over UDP.
    sieve: Option<Sieve>,
}

impl<T> Lobby<T> {
    pub(crate) fn new(inner: T, door: Door, most: u32) -> Self {
        Self { inner, door, places: Arc::new(Mutex::new(Places::new(most as usize))), sieve: None }
    }

    /// With a sieve for first packets of QUIC.
    pub(crate) fn with_sieve(mut self) -> Self {
        self.sieve = Some(Sieve::new(Instant::now()));
        self
    }

    fn sift(&mut self, local: &Multiaddr) {
        let port = local.iter().find_map(|part| if let Protocol::Udp(port) = part { Some(port) } else { None });
        if let (Some(sieve), Some(port)) = (&mut self.sieve, port) {
            sieve.on_first_packet(port, Instant::now());
        }
    }

    fn seat<F>(&self, remote: &Multiaddr, handshake: F) -> Guest<F> {
        let (handle, registration) = AbortHandle::new_pair();
        let number = self.places.lock().unwrap_or_else(PoisonError::into_inner).take(ip_of(remote).map(source), handle);
        Guest { handshake: Abortable::new(handshake, registration), _place: Place { places: Arc::clone(&self.places), number } }
    }
}

impl<T> Transport for Lobby<T>
where
    T: Transport<Error = io::Error> + Unpin,
    T::ListenerUpgrade: Unpin,
{
    type Output = T::Output;
    type Error = io::Error;
    type ListenerUpgrade = Guest<T::ListenerUpgrade>;
    type Dial = T::Dial;

    fn listen_on(&mut self, id: ListenerId, address: Multiaddr) -> Result<(), TransportError<io::Error>> {
        self.inner.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.inner.remove_listener(id)
    }

    fn dial(&mut self, address: Multiaddr, options: DialOpts) -> Result<Self::Dial, TransportError<io::Error>> {
        self.inner.dial(address, options)
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        if let Some(sieve) = &mut self.sieve {
            sieve.on_time(Instant::now());
        }
        for _ in 0..TURNED_AWAY {
            let event = std::task::ready!(Pin::new(&mut self.inner).poll(cx));
            if let TransportEvent::Incoming { send_back_addr, local_addr, .. } = &event {
                let remote = send_back_addr.clone();
                self.sift(local_addr);
                if !self.door.opens_to(&remote) {
                    // Dropped, it is closed: nobody else hears of it.
                    continue;
                }
                return Poll::Ready(event.map_upgrade(|handshake| self.seat(&remote, handshake)));
            }
            return Poll::Ready(event.map_upgrade(|_| unreachable!("only what comes in has a handshake")));
        }
        // Others want to be heard too.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::future::{Pending, pending};

    /// Tells of connections that never end their handshake.
    #[derive(Default)]
    struct Street(VecDeque<&'static str>);

    impl Transport for Street {
        type Output = ();
        type Error = io::Error;
        type ListenerUpgrade = Pending<io::Result<()>>;
        type Dial = Pending<io::Result<()>>;

        fn listen_on(&mut self, _: ListenerId, _: Multiaddr) -> Result<(), TransportError<io::Error>> {
            Ok(())
        }

        fn remove_listener(&mut self, _: ListenerId) -> bool {
            false
        }

        fn dial(&mut self, _: Multiaddr, _: DialOpts) -> Result<Self::Dial, TransportError<io::Error>> {
            Ok(pending())
        }

        fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
            self.0.pop_front().map_or(Poll::Pending, |ip| {
                let send_back_addr: Multiaddr = format!("/ip4/{ip}/tcp/9").parse().unwrap();
                let local_addr = send_back_addr.clone();
                Poll::Ready(TransportEvent::Incoming {
                    listener_id: ListenerId::next(),
                    upgrade: pending(),
                    local_addr,
                    send_back_addr,
                })
            })
        }
    }

    type Waiting = Guest<Pending<io::Result<()>>>;

    fn lobby(most: u32) -> Lobby<Street> {
        Lobby::new(Street::default(), Door::default(), most)
    }

    /// All that `from` brings in.
    fn come(lobby: &mut Lobby<Street>, from: &[&'static str]) -> Vec<Waiting> {
        lobby.inner.0.extend(from);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut guests = Vec::new();
        loop {
            match Pin::new(&mut *lobby).poll(&mut cx) {
                Poll::Ready(TransportEvent::Incoming { upgrade, .. }) => guests.push(upgrade),
                Poll::Ready(other) => panic!("{other:?}"),
                Poll::Pending if lobby.inner.0.is_empty() => return guests,
                Poll::Pending => {}
            }
        }
    }

    fn waits(guest: &mut Waiting) -> bool {
        Pin::new(guest).poll(&mut Context::from_waker(std::task::Waker::noop())).is_pending()
    }

    #[test]
    fn forty_handshakes_of_one_source_pass_and_the_next_is_turned_away_before_any_cryptography() {
        let mut lobby = lobby(1000);
        assert_eq!(come(&mut lobby, &["198.51.100.7"; 300]).len(), 40);
        assert_eq!(come(&mut lobby, &["198.51.100.8"]).len(), 1, "another source is not affected");
        assert_eq!(come(&mut lobby, &["127.0.0.1"; 300]).len(), 300, "this machine is trusted");
    }

    #[test]
    fn the_last_place_is_given_and_for_one_more_the_oldest_of_the_greediest_goes() {
        let mut lobby = lobby(4);
        let mut single = come(&mut lobby, &["192.0.2.9"]);
        let mut greedy = come(&mut lobby, &["192.0.2.1"; 3]);
        assert!(single.iter_mut().chain(&mut greedy).all(waits), "four have four places");
        let mut late = come(&mut lobby, &["192.0.2.2"]);
        assert_eq!(greedy.iter_mut().map(waits).collect::<Vec<_>>(), [false, true, true]);
        assert!(waits(&mut single[0]) && waits(&mut late[0]));
        // Among those who hold one place each it is the oldest.
        drop(greedy);
        let more = come(&mut lobby, &["192.0.2.3", "192.0.2.4"]);
        assert!(waits(&mut single[0]));
        let _last = come(&mut lobby, &["192.0.2.5"]);
        assert!(!waits(&mut single[0]) && waits(&mut late[0]));
        drop(more);
    }

    #[test]
    fn a_place_is_free_when_its_handshake_is_over() {
        let mut lobby = lobby(2);
        for _ in 0..20 {
            let mut pair = come(&mut lobby, &["192.0.2.1", "192.0.2.2"]);
            assert!(pair.iter_mut().all(waits));
        }
        assert!(lobby.places.lock().unwrap().taken.is_empty());
    }

    #[test]
    fn a_source_that_was_slowed_down_comes_slowly_and_its_neighbour_as_before() {
        let mut lobby = lobby(1000);
        lobby.door.slow_down("192.0.2.1".parse().unwrap());
        assert_eq!(come(&mut lobby, &["192.0.2.1"; 100]).len(), 4);
        assert_eq!(come(&mut lobby, &["192.0.2.2"; 100]).len(), 40);
    }
}
