//! Accepts connections, and runs each in a task of its own.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::Semaphore;

use super::connections::{Watch, Watched};
use super::listen::{self, Listener};
use super::{Shared, service};
use crate::config::HttpAddress;

/// An address that cannot be had is tried again after this time.
const AGAIN: Duration = Duration::from_secs(5);
/// The head of a request, in bytes.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// What of a connection is buffered, each way.
const MAX_BUFFER_BYTES: usize = 64 * 1024;
/// Clients that are being told that there is no place, at once; one more is cut off.
const MAX_REFUSED: usize = 64;
/// Such a client has this long to read it.
const LINGER: Duration = Duration::from_secs(1);

/// What a client is told when every connection has a request that is being answered.
const NO_PLACE: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
connection: close\r\ncontent-length: 148\r\n\r\n\
{\"error\":{\"message\":\"all connections of this endpoint are in use; try again in a moment\",\"type\":\"server_error\",\"param\":null,\"code\":\"no_connection\"}}";

/// Opens everything, and accepts until it is told to stop.
pub(super) fn start(shared: &Arc<Shared>, sockets: Vec<OwnedFd>) {
    // Two small files, before the first client comes: no good key is refused for being early.
    if let Err(error) = shared.keys.load()
        && shared.settings.key_required
    {
        note(shared, &format!("the HTTP endpoint refuses every key: {error}"));
    }
    for socket in sockets {
        match listen::adopt(socket, &shared.settings) {
            Ok(listener) => {
                tokio::spawn(serve(Arc::clone(shared), listener));
            }
            Err(problem) => note(shared, &problem),
        }
    }
    for address in shared.settings.listen.clone() {
        match listen::open(&address) {
            Ok(listener) => {
                tokio::spawn(serve(Arc::clone(shared), listener));
            }
            Err(problem) => {
                note(shared, &problem);
                tokio::spawn(try_again(Arc::clone(shared), address, problem));
            }
        }
    }
    let watching = Arc::clone(shared);
    tokio::spawn(async move {
        tokio::select! {
            () = watching.connections.watch() => {}
            // Those that are still there are watched by the clock of the stop.
            () = watching.stop.cancelled() => {}
        }
    });
}

fn note(shared: &Shared, problem: &str) {
    tracing::error!("{problem}");
    shared.problems.lock().unwrap_or_else(PoisonError::into_inner).push(problem.to_owned());
}

async fn try_again(shared: Arc<Shared>, address: HttpAddress, problem: String) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            () = shared.stop.cancelled() => return,
        }
        if let Ok(listener) = listen::open(&address) {
            shared.problems.lock().unwrap_or_else(PoisonError::into_inner).retain(|known| *known != problem);
            return serve(shared, listener).await;
        }
    }
}

async fn serve(shared: Arc<Shared>, listener: Listener) {
    let address = listener.shown();
    tracing::info!(address, "the OpenAI endpoint listens on {address}");
    shared.addresses.lock().unwrap_or_else(PoisonError::into_inner).push(address.clone());
    let refused = Arc::new(Semaphore::new(MAX_REFUSED));
    loop {
        let accepted = tokio::select! {
            accepted = accept(&shared, &listener, &refused) => accepted,
            () = shared.stop.cancelled() => break,
        };
        if let Err(error) = accepted {
            // A client that left before it was accepted is no reason to wait; no more descriptors is.
            if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
                tracing::warn!(%error, "no connection could be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    shared.addresses.lock().unwrap_or_else(PoisonError::into_inner).retain(|known| *known != address);
}

async fn accept(shared: &Arc<Shared>, listener: &Listener, refused: &Arc<Semaphore>) -> io::Result<()> {
    match listener {
        Listener::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            // A token is to be read when it is there.
            let _ = stream.set_nodelay(true);
            admit(shared, stream, None, refused);
        }
        Listener::Unix(listener, _) => {
            let (stream, _) = listener.accept().await?;
            let uid = stream.peer_cred()?.uid();
            admit(shared, stream, Some(uid), refused);
        }
    }
    Ok(())
}

/// Finds a place for a connection, and runs it; `uid` is whose it is, where the kernel says so.
fn admit<S>(shared: &Arc<Shared>, stream: S, uid: Option<u32>, refused: &Arc<Semaphore>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Some(watch) = shared.connections.enter() else {
        if let Ok(permit) = Arc::clone(refused).try_acquire_owned() {
            tokio::spawn(async move {
                let _ = tokio::time::timeout(LINGER, refuse(stream)).await;
                drop(permit);
            });
        }
        return;
    };
    let place = Place { shared: Arc::clone(shared), watch };
    tokio::spawn(async move {
        let Place { shared, watch } = &place;
        let io = TokioIo::new(Watched { stream, watch: Arc::clone(watch) });
        let answering = service_fn(|request| service::answer(shared, watch, uid, request));
        let mut builder = http1::Builder::new();
        // Time is kept by `Connections`, for all of them at once.
        builder.header_read_timeout(None).max_header_size(MAX_HEAD_BYTES).max_buf_size(MAX_BUFFER_BYTES);
        let mut connection = std::pin::pin!(builder.serve_connection(io, answering));
        tokio::select! {
            // How it ended is the client's matter.
            _ = connection.as_mut() => {}
            () = watch.close.notified() => {}
            () = shared.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    _ = connection => {}
                    () = watch.close.notified() => {}
                }
            }
        }
    });
}

/// The place of a connection, given back whatever ends it.
struct Place {
    shared: Arc<Shared>,
    watch: Arc<Watch>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.connections.leave(&self.watch);
    }
}

/// Says why, and lets the client read it: to close on what it has sent would take the words back.
async fn refuse(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    stream.write_all(NO_PLACE.as_bytes()).await?;
    stream.shutdown().await?;
    let mut buffer = [0; 4096];
    while stream.read(&mut buffer).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusal_has_the_length_that_it_says() {
        let (head, body) = NO_PLACE.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())), "{}", body.len());
        assert!(serde_json::from_str::<serde_json::Value>(body).unwrap()["error"]["message"].is_string());
    }
}
