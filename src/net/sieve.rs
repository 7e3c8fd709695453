//! A sieve before the QUIC sockets, put there while first packets of handshakes come in floods.
//!
//! Each first packet costs a TLS session and, when it is let go again, its memory for three more seconds. Their sources can be
//! forged, so no count by source helps. QUIC's own answer is Retry: quinn leaves it to the application
//! (<https://github.com/quinn-rs/quinn/issues/1661>), and libp2p-quic hands it neither to us nor uses it itself. So the kernel
//! drops most of them unseen. Connections that there are already send other packets and notice nothing; whoever comes
//! meanwhile comes over TCP.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::net::SocketType;
use socket2::{SockFilter, Socket};

/// First packets are counted for so long.
const WINDOW: Duration = Duration::from_millis(250);
/// What may come in that time without a sieve: a house full of machines that are switched on together does not.
const FLOOD: u32 = 125;
/// What is let through in that time with one.
const TRICKLE: f64 = 50.0;
/// The finest sieve: one of 4096.
const FINEST: f64 = 1.0 / 4096.0;

/// Which part of the first packets is to pass, by how many came. Pure.
#[derive(Debug)]
struct Mesh {
    since: Instant,
    came: u32,
    /// 1 is no sieve at all.
    share: f64,
}

impl Mesh {
    fn new(now: Instant) -> Self {
        Self { since: now, came: 0, share: 1.0 }
    }

    /// Counts what came; gives the share when it changes.
    fn count(&mut self, came: u32, now: Instant) -> Option<f64> {
        self.came += came;
        let windows = now.duration_since(self.since).as_secs_f64() / WINDOW.as_secs_f64();
        // A flood is not waited out.
        if windows < 1.0 && self.came <= FLOOD {
            return None;
        }
        let before = self.share;
        let rate = f64::from(self.came) / windows.max(0.04);
        if before < 1.0 || rate > f64::from(FLOOD) {
            // Twice as many at most: when all are caught it is not known how many there are.
            self.share = (before * (TRICKLE / rate).min(2.0)).clamp(FINEST, 1.0);
        }
        (self.since, self.came) = (now, 0);
        ((self.share - before).abs() > f64::EPSILON).then_some(self.share)
    }
}

/// A program of the kernel's packet filter: first packets pass as often as `share` says, all others always. What it sees
/// begins with the header of UDP.
fn program(share: f64) -> [SockFilter; 7] {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // between 0 and 1 of all numbers
    let threshold = (share * f64::from(u32::MAX)) as u32;
    /// Where the kernel gives random numbers.
    const RANDOM: u32 = (-0x1000_i32 + 56).cast_unsigned();
    [
        // The first byte of the payload: its upper half tells a first packet (RFC 9000, 17.2.2).
        SockFilter::new(0x30, 0, 0, 8),
        SockFilter::new(0x54, 0, 0, 0xf0),
        SockFilter::new(0x15, 0, 2, 0xc0),
        SockFilter::new(0x20, 0, 0, RANDOM),
        SockFilter::new(0x35, 1, 0, threshold),
        SockFilter::new(0x06, 0, 0, u32::MAX),
        SockFilter::new(0x06, 0, 0, 0),
    ]
}

/// The UDP sockets of this process that are bound to `port`, as descriptors of their own: the library keeps them to itself.
fn sockets(port: u16) -> io::Result<Vec<Socket>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let is_socket = std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()).filter(|_| is_socket) else { continue };
        let Some(own) = duplicate(number) else { continue };
        if is_bound(&own, port) {
            found.push(Socket::from(own));
        }
    }
    Ok(found)
}

/// A descriptor of its own for what `number` stands for in this process; `None` when that is nothing any more.
///
/// `pidfd_getfd` would do the same without unsafe code, and stand open to whatever else runs in the service's sandbox.
#[allow(unsafe_code)]
fn duplicate(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: the borrow ends with the call that duplicates it. A descriptor that was closed since it was listed makes that call
    // fail; one that was opened under the same number meanwhile is duplicated, and looked at before anything is done with it.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_dupfd_cloexec(borrowed, 0).ok()
}

fn is_bound(socket: &OwnedFd, port: u16) -> bool {
    if rustix::net::sockopt::socket_type(socket).ok() != Some(SocketType::DGRAM) {
        return false;
    }
    let address = rustix::net::getsockname(socket).ok().and_then(|address| std::net::SocketAddr::try_from(address).ok());
    address.is_some_and(|address| address.port() == port)
}

/// The sieve before the sockets of one port.
#[derive(Debug)]
pub(crate) struct Sieve {
    mesh: Mesh,
    port: Option<u16>,
    sockets: Vec<Socket>,
}

impl Sieve {
    pub(crate) fn new(now: Instant) -> Self {
        Self { mesh: Mesh::new(now), port: None, sockets: Vec::new() }
    }

    /// A first packet came through on `port`.
    pub(crate) fn on_first_packet(&mut self, port: u16, now: Instant) {
        self.port = Some(port);
        self.count(1, now);
    }

    /// Looks whether the flood is over.
    pub(crate) fn on_time(&mut self, now: Instant) {
        if self.mesh.share < 1.0 {
            self.count(0, now);
        }
    }

    fn count(&mut self, came: u32, now: Instant) {
        let before = self.mesh.share;
        let Some(share) = self.mesh.count(came, now) else { return };
        if before >= 1.0 {
            tracing::warn!(
                "QUIC is flooded with first packets of handshakes: most of them are dropped, and new peers come over TCP"
            );
            self.sockets = self.port.map(sockets).and_then(Result::ok).unwrap_or_default();
            if self.sockets.is_empty() {
                tracing::warn!("the kernel cannot be asked to drop them: see docs/floods.md for what a firewall can do");
            }
        }
        for socket in &self.sockets {
            let done = if share < 1.0 { socket.attach_filter(&program(share)) } else { socket.detach_filter() };
            if let Err(error) = done {
                tracing::debug!(%error, "no filter for first packets");
            }
        }
        if share >= 1.0 {
            tracing::info!("QUIC is flooded no more");
            self.sockets.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn a_crowd_needs_no_sieve_and_one_more_does_until_nothing_comes() {
        let now = Instant::now();
        let mut mesh = Mesh::new(now);
        for window in 1..20 {
            assert_eq!(mesh.count(FLOOD, now + WINDOW * window), None, "{window}");
        }
        let flood = now + WINDOW * 20;
        let share = mesh.count(FLOOD + 1, flood).expect("a sieve");
        assert!(share < 0.5, "{share}");
        // Twenty thousand a second, of which the sieve lets through what it lets through.
        let mut share = share;
        for window in 1..40 {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let came = (5000.0 * share) as u32;
            share = mesh.count(came, flood + WINDOW * window).unwrap_or(share);
        }
        assert!((0.005..0.02).contains(&share), "a trickle: {share}");
        let over = flood + WINDOW * 40;
        let windows = (1..20).find(|window| mesh.count(0, over + WINDOW * *window) == Some(1.0));
        assert!(windows.is_some_and(|windows| windows <= 8), "{windows:?}: taken away within two seconds");
    }

    #[test]
    fn a_sieve_drops_first_packets_and_nothing_else() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        let found = sockets(receiver.local_addr().unwrap().port()).unwrap();
        assert_eq!(found.len(), 1);
        let passes = |first: u8| {
            sender.send(&[first, 0, 0, 0, 1]).unwrap();
            receiver.recv(&mut [0; 16]).is_ok()
        };
        assert!(passes(0xc3) && passes(0x40));
        found[0].attach_filter(&program(0.0)).unwrap();
        assert!(!passes(0xc0) && !passes(0xcf), "first packets");
        // A handshake that is under way, and a connection.
        assert!(passes(0xe0) && passes(0x40));
        found[0].attach_filter(&program(0.5)).unwrap();
        let passed = (0..20).filter(|_| passes(0xc1)).count();
        assert!((1..20).contains(&passed), "{passed} of 20");
        found[0].detach_filter().unwrap();
        assert!(passes(0xc0));
    }
}
