//! Who is on the local network: mDNS as libp2p speaks it, over IPv4 and IPv6, at each interface by itself.
//!
//! Ours instead of the library's (libp2p-mdns 0.49), which
//! - joins the IPv6 group at one interface, whichever the system chooses
//!   (<https://github.com/libp2p/rust-libp2p/issues/5783>, <https://github.com/libp2p/rust-libp2p/pull/6473>);
//! - stops asking at the first answer of anybody;
//! - keeps a list without a bound, searched linearly, of entries that live as long as their sender wishes;
//! - answers every question of everybody at once: two hundred nodes make forty thousand packets of two hundred questions;
//! - says no goodbye, takes none, and tells nothing of what it hears at which interface.
//!
//! What it finds are hints; they make no member.
//!
//! `codec` reads and writes packets, `leg` decides when to speak at one interface, `heard` remembers who was heard, `meter`
//! notices floods, `core` puts them together: all of them pure. `interfaces` and `socket` are the way out; the loop is here.

mod codec;
mod core;
mod heard;
mod interfaces;
mod leg;
mod meter;
mod socket;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use futures::FutureExt as _;
use libp2p::{Multiaddr, PeerId};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::core::{Core, Output};
use self::interfaces::Interface;
use self::socket::Wire;
use super::alarm::Alarm;
use crate::domain::network::MdnsFacts;

/// Packets that are read before others in the process get their turn.
const BATCH: usize = 64;

/// An interface and a family: what is said at one is not heard at another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Leg {
    index: u32,
    ipv6: bool,
}

/// What mDNS has to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// Somebody is there, or somewhere else, or still there.
    Found(PeerId, Vec<Multiaddr>),
    /// It said goodbye, wherever it was heard.
    Gone(PeerId),
    /// Another machine, at this address, says that it is this node.
    SameIdentity(IpAddr),
    /// What was told lately may be forged.
    Flooded,
    /// What the user has to know, or that there is nothing any more.
    Problem(Option<String>),
    /// It has ended and has to be started anew.
    Failed(String),
}

#[derive(Debug)]
struct Inner {
    core: Core,
    wires: BTreeMap<Leg, Wire>,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    /// Something was changed from outside.
    changed: Notify,
}

/// mDNS that runs; dropping it ends it without a goodbye.
#[derive(Debug)]
pub(crate) struct Mdns {
    shared: Arc<Shared>,
    _over: DropGuard,
}

impl Mdns {
    /// Starts a task that tells `events`, for the node `local` that listens at `listening`.
    pub(crate) fn start(local: PeerId, listening: Vec<Multiaddr>, events: mpsc::Sender<Event>) -> Self {
        let mut core = Core::new(local);
        core.set_listening(listening, Instant::now());
        let inner = Inner { core, wires: BTreeMap::new(), buffer: vec![0; codec::MAX_PACKET + 1] };
        let shared = Arc::new(Shared { inner: Mutex::new(inner), changed: Notify::new() });
        let over = CancellationToken::new();
        let (task, ended) = (Arc::clone(&shared), over.clone());
        tokio::spawn(async move {
            let run = AssertUnwindSafe(run(&task, &events)).catch_unwind();
            let why = tokio::select! {
                () = ended.cancelled() => return,
                outcome = run => outcome.map_or_else(|_| "it panicked".to_owned(), |error| error.to_string()),
            };
            let _ = events.send(Event::Failed(why)).await;
        });
        Self { shared, _over: over.drop_guard() }
    }

    /// The node listens at these addresses now.
    pub(crate) fn set_listening(&self, listening: Vec<Multiaddr>) {
        self.shared.lock().core.set_listening(listening, Instant::now());
        self.shared.changed.notify_one();
    }

    /// The network may have changed: asks and tells as at the start.
    pub(crate) fn ask_now(&self) {
        self.shared.lock().core.ask_now(Instant::now());
        self.shared.changed.notify_one();
    }

    /// Tells the others that this node goes, and ends.
    pub(crate) fn goodbye(self) {
        let mut inner = self.shared.lock();
        inner.core.goodbye();
        inner.perform(&mut Vec::new());
    }

    /// It does not listen at some interface because of a flood.
    pub(crate) fn is_flooded(&self) -> bool {
        self.shared.lock().core.is_flooded()
    }

    /// What was counted at each interface.
    pub(crate) fn facts(&self) -> Vec<MdnsFacts> {
        self.shared.lock().core.facts(Instant::now())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what is due; gives what is to be told, and when it is wanted next.
    fn step(&self) -> (Vec<Event>, Option<Instant>) {
        let (mut inner, mut events) = (self.lock(), Vec::new());
        // A socket that was opened has something to say at once.
        loop {
            inner.core.tick(Instant::now());
            if !inner.perform(&mut events) {
                break;
            }
        }
        (events, inner.core.due())
    }
}

impl Inner {
    /// Does what the core wants done outside; false when that was nothing.
    fn perform(&mut self, events: &mut Vec<Event>) -> bool {
        let mut any = false;
        while let Some(output) = self.core.output() {
            any = true;
            match output {
                Output::Open(leg, source) => {
                    let opened = Wire::open(leg, source);
                    let outcome = opened.map(|wire| drop(self.wires.insert(leg, wire)));
                    self.core.opened(leg, outcome.map_err(|error| explain(&error)), Instant::now());
                }
                Output::Close(leg) => drop(self.wires.remove(&leg)),
                Output::Send(leg, packet) => {
                    let Some(wire) = self.wires.get(&leg) else { continue };
                    self.core.sent(leg, wire.send(&packet).map_err(|error| explain(&error)));
                }
                Output::Listen(leg, listen) => match self.wires.get(&leg).map(|wire| wire.listen(listen)) {
                    // The leg would be deaf for good: it is opened anew. In use means that leaving failed: it is in the group.
                    Some(Err(error)) if listen && error.kind() != io::ErrorKind::AddrInUse => {
                        self.core.broken(leg, explain(&error), Instant::now());
                    }
                    Some(Err(error)) => tracing::debug!(?leg, %error, "the mDNS group could not be left, or was not"),
                    Some(Ok(())) | None => {}
                },
                Output::Tell(event) => events.push(event),
            }
        }
        any
    }

    /// Reads what has come; true when there was something.
    fn poll_packets(&mut self, cx: &mut Context<'_>) -> bool {
        let (mut read, mut broken) = (0, Vec::new());
        for (&leg, wire) in &self.wires {
            while read < BATCH {
                match wire.poll_receive(cx, &mut self.buffer) {
                    Poll::Ready(Ok((length, from))) => {
                        read += 1;
                        self.core.packet(leg, from.ip(), &self.buffer[..length], Instant::now());
                    }
                    Poll::Ready(Err(error)) => {
                        broken.push((leg, error));
                        break;
                    }
                    Poll::Pending => break,
                }
            }
        }
        for (leg, error) in &broken {
            self.core.broken(*leg, explain(error), Instant::now());
        }
        read + broken.len() > 0
    }
}

fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another program has UDP port 5353 for itself (`ss -ulpn 'sport = 5353'` names it)".to_owned()
        }
        io::ErrorKind::PermissionDenied => format!("{error}: a firewall or a sandbox forbids UDP port 5353"),
        _ => error.to_string(),
    }
}

/// Runs until the system does not tell of its interfaces any more; gives the reason.
async fn run(shared: &Shared, events: &mpsc::Sender<Event>) -> io::Error {
    let mut alarm = match Alarm::new() {
        Ok(alarm) => alarm,
        Err(error) => return error,
    };
    let (tell, mut interfaces) = watch::channel::<Vec<Interface>>(Vec::new());
    let watching = interfaces::watch(tell);
    tokio::pin!(watching);
    loop {
        let (told, due) = shared.step();
        for event in told {
            if events.send(event).await.is_err() {
                return io::ErrorKind::BrokenPipe.into();
            }
        }
        if let Some(due) = due {
            alarm.set(due.into());
        }
        let packets = std::future::poll_fn(|cx| if shared.lock().poll_packets(cx) { Poll::Ready(()) } else { Poll::Pending });
        tokio::select! {
            error = &mut watching => return error,
            Ok(()) = interfaces.changed() => {
                let interfaces = interfaces.borrow_and_update();
                shared.lock().core.set_interfaces(&interfaces, Instant::now());
            }
            () = shared.changed.notified() => {}
            () = alarm.rings() => {}
            () = packets => {}
        }
    }
}
