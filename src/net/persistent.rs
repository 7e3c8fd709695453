//! TCP connections that go on through bad networks.
//!
//! TCP doubles its pause before each repetition of what got lost. Six losses in a row, one packet in fifty where three of ten
//! are lost each way, are twelve seconds of silence: longer than a member is waited for, and longer than QUIC's pauses in the
//! same network.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::time::Duration;

use libp2p::tcp;
use rustix::net::sockopt::set_tcp_thin_linear_timeouts;
use tokio::net::TcpStream;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};

/// The longest pause before a repetition: the least that Linux allows. The kernel then gives a connection up after about a
/// quarter of a minute without a sign of life (`tcp_retries2` counts repetitions).
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The stream, which repeats what got lost at an even pace for six times as long as little is under way (`tcp-thin` in the
/// kernel's documentation of networking), and from Linux 6.15 on never later than a second after the last try.
pub(super) fn persistent(stream: tcp::tokio::TcpStream) -> Compat<TcpStream> {
    let stream = TcpStream::from(stream);
    if let Err(error) = set_tcp_thin_linear_timeouts(&stream, true) {
        tracing::debug!(%error, "a TCP connection doubles its pauses: {error}");
    }
    match set_longest_pause(&stream, LONGEST_PAUSE) {
        // Linux before 6.15 knows no such option.
        Err(error) if error.raw_os_error() != Some(libc::ENOPROTOOPT) => {
            tracing::debug!(%error, "a TCP connection pauses as long as it likes: {error}");
        }
        _ => {}
    }
    stream.compat()
}

/// `setsockopt(IPPROTO_TCP, TCP_RTO_MAX_MS)`: one second at least, two minutes at most.
#[allow(unsafe_code)]
fn set_longest_pause(socket: impl AsFd, pause: Duration) -> io::Result<()> {
    /// Of `linux/tcp.h`.
    const TCP_RTO_MAX_MS: libc::c_int = 44;
    let millis = libc::c_int::try_from(pause.as_millis()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let length = libc::socklen_t::try_from(size_of_val(&millis)).map_err(|_| io::ErrorKind::InvalidInput)?;
    let socket = socket.as_fd();
    // SAFETY: the descriptor is open for the call, and the kernel reads one integer, whose size is told.
    let said =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, TCP_RTO_MAX_MS, (&raw const millis).cast(), length) };
    if said == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_kernel_takes_what_is_asked_of_it() {
        let listener = tokio::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        set_tcp_thin_linear_timeouts(&stream, true).unwrap();
        assert!(rustix::net::sockopt::tcp_thin_linear_timeouts(&stream).unwrap());
        // One second and two minutes are the bounds where the option is known at all.
        for (seconds, valid) in [(0, false), (1, true), (120, true), (121, false)] {
            match set_longest_pause(&stream, Duration::from_secs(seconds)) {
                Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {}
                said => assert_eq!(said.is_ok(), valid, "{seconds} s: {said:?}"),
            }
        }
    }
}
