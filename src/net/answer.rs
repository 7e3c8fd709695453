//! The serving end of a lane: reads a request, checks that its sender is a member, hands it to `serve`, writes the
//! answer; then waits for the next request on the same stream.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::AsyncWriteExt as _;
use libp2p::PeerId;
use libp2p::swarm::Stream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::arrival::{Arrival, arrive};
use super::dedup::Seen;
use super::handle::{AnswerEvent, AnswerNow, InboundPrompt, Replier, Service};
use super::room::Room;
use crate::domain::cluster::ClusterId;
use crate::domain::node::NodeId;
use crate::domain::prompt::{Failure, FailureKind};
use crate::wire::frame::FrameReader;
use crate::wire::infer::{self, AnswerHash, Request};
use crate::wire::limits::{KEEP_ALIVE, MAX_REQUEST_FRAME_BYTES, MAX_TOKEN_TEXT_BYTES, REQUEST_ARRIVES, SLOW_CONSUMER};

/// Pieces of an answer that may wait for the stream (`docs/protocol.md`: 64 frames or 64 KiB).
const PIECES: usize = 64;
/// Of a request that finds no room so much is kept, to find its id.
const HEAD_BYTES: usize = 1024;
/// Bytes collected before a write, when more pieces are ready.
const WRITE_AT_BYTES: usize = 64 * 1024;

/// When it is to be tried again.
const COME_BACK: Duration = Duration::from_secs(5);

/// What a member may ask here.
#[derive(Debug, Clone)]
pub(crate) struct Permit {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub name: String,
    /// This node serves that cluster.
    pub serving: bool,
    /// Cancelled when the member is gone.
    pub gone: CancellationToken,
}

/// Who may ask what: the shadow of the member table that the lanes read.
pub(crate) type Permits = HashMap<(PeerId, [u8; 16]), Permit>;

/// What all serving lanes share.
#[derive(Debug)]
pub(crate) struct Desk {
    pub permits: watch::Receiver<Arc<Permits>>,
    pub service: Arc<dyn Service>,
    pub seen: Arc<Mutex<Seen>>,
    /// Prompts being answered now.
    pub working: Arc<AtomicUsize>,
    /// Those of them that came over this lane's connection.
    pub on_connection: Arc<AtomicUsize>,
    /// Peers that broke the protocol.
    pub violations: mpsc::Sender<PeerId>,
    /// What this lane's requests may take.
    pub room: Room,
}

/// Counts a prompt for as long as it lives.
struct Working<'a>(&'a AtomicUsize);

impl<'a> Working<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Fate {
    /// The lane can carry the next request.
    Next,
    /// The lane is gone or not to be trusted.
    Drop,
}

/// Serves one lane until the peer closes it or breaks the protocol.
pub(crate) async fn serve(desk: Desk, peer: PeerId, stream: Stream) {
    let mut lane = FrameReader::new(stream);
    let mut out = Vec::new();
    loop {
        // An idle lane may wait as long as it likes, half a request may not.
        if !matches!(lane.begun().await, Ok(true)) {
            return;
        }
        let stay = match arrive(&mut lane, &desk.room).await {
            Ok(Arrival::Whole(stay)) => stay,
            Ok(Arrival::NoRoom) => match turn_away(&desk, peer, &mut lane, &mut out).await {
                Fate::Next => continue,
                Fate::Drop => return,
            },
            Ok(Arrival::TooSlow) => {
                tracing::debug!(%peer, "inference stream dropped: half a request");
                return;
            }
            Ok(Arrival::Ended) => return,
            Err(error) => {
                if error.is_violation() {
                    tracing::debug!(%peer, %error, "inference stream dropped");
                    let _ = desk.violations.try_send(peer);
                }
                return;
            }
        };
        let Ok(Some(frame)) = lane.next(MAX_REQUEST_FRAME_BYTES).await else { return };
        let arrived = Instant::now();
        let request = match Request::decode(&frame) {
            Ok(request) => request,
            Err(error) => {
                tracing::debug!(%peer, %error, "inference request refused");
                let _ = desk.violations.try_send(peer);
                return;
            }
        };
        out.clear();
        let Some(permit) = desk.permits.borrow().get(&(peer, request.cluster_ref)).cloned() else {
            // Not a member of that cluster, or of any: not a byte in answer, the stream is reset.
            tracing::debug!(%peer, "prompt from a stranger refused");
            return;
        };
        let id = request.request_id;
        let fresh = desk.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(peer, id, std::time::Instant::now());
        let refusal = if !fresh {
            Some(Failure::new(FailureKind::Duplicate, "a request with this id was seen before"))
        } else if !permit.serving {
            Some(Failure::new(FailureKind::NotAuthorized, "this node does not serve this cluster"))
        } else {
            None
        };
        lane.release();
        let fate = if let Some(failure) = refusal {
            infer::encode_error(&mut out, &id, &failure);
            write(&mut lane, &out).await
        } else {
            match desk.service.answer_now(&permit.node, &request.ask) {
                Some(answer) => {
                    encode_whole(&mut out, &id, answer);
                    // Who reads slowly costs an answer, and not its prompt as well.
                    drop(request);
                    write(&mut lane, &out).await
                }
                None => {
                    // In the queue it counts among the prompts of its peer.
                    drop(stay);
                    let _working = (Working::begin(&desk.working), Working::begin(&desk.on_connection));
                    tokio::select! {
                        // Also while a write waits for a slow reader.
                        () = permit.gone.cancelled() => Fate::Drop,
                        fate = queued(&desk, peer, &permit, request, arrived, &mut lane, &mut out) => fate,
                    }
                }
            }
        };
        if matches!(fate, Fate::Drop) {
            return;
        }
        // What was large once must not lie there until the lane ends.
        if out.capacity() > 4 * WRITE_AT_BYTES {
            out = Vec::new();
        }
    }
}

/// Answers a large request for which others left no room, without taking it in.
async fn turn_away(desk: &Desk, peer: PeerId, lane: &mut FrameReader<Stream>, out: &mut Vec<u8>) -> Fate {
    // A stranger gets not a byte in answer.
    if !desk.permits.borrow().keys().any(|(member, _)| *member == peer) {
        return Fate::Drop;
    }
    let Ok(Ok(head)) = timeout(REQUEST_ARRIVES, lane.skip(MAX_REQUEST_FRAME_BYTES, HEAD_BYTES)).await else { return Fate::Drop };
    let Some(id) = infer::id_in(&head) else { return Fate::Drop };
    tracing::debug!(%peer, "a large prompt finds no room");
    out.clear();
    let failure = Failure::busy("other large prompts are arriving and take all the room there is for them", COME_BACK);
    infer::encode_error(out, &id, &failure);
    write(lane, out).await
}

fn encode_whole(out: &mut Vec<u8>, id: &uuid::Uuid, answer: Result<AnswerNow, Failure>) {
    match answer {
        Ok(AnswerNow { model, pieces: answer_pieces, done }) => {
            let mut hash = AnswerHash::new();
            let mut bytes = 0;
            let mut first = Some(model.as_str());
            for text in answer_pieces.iter().flat_map(|piece| pieces(piece.as_str())) {
                hash.update(text.as_bytes());
                bytes += text.len() as u64;
                infer::encode_token(out, id, text, first.take());
            }
            infer::encode_end(out, id, &model, done, bytes, &hash.finish());
        }
        Err(failure) => infer::encode_error(out, id, &failure),
    }
}

async fn write(lane: &mut FrameReader<Stream>, bytes: &[u8]) -> Fate {
    let stream = lane.get_mut();
    let mut rest = bytes;
    while !rest.is_empty() {
        // A slow reader is borne as long as it reads at all.
        match timeout(SLOW_CONSUMER, stream.write(rest)).await {
            Ok(Ok(count)) if count > 0 => rest = &rest[count..],
            Ok(Ok(_) | Err(_)) | Err(_) => return Fate::Drop,
        }
    }
    match timeout(SLOW_CONSUMER, stream.flush()).await {
        Ok(Ok(())) => Fate::Next,
        Ok(Err(_)) | Err(_) => Fate::Drop,
    }
}

/// A prompt that takes its time: tokens as they come, keep-alives when there are none.
#[allow(clippy::too_many_arguments)]
async fn queued(
    desk: &Desk,
    peer: PeerId,
    permit: &Permit,
    request: Request,
    arrived: Instant,
    lane: &mut FrameReader<Stream>,
    out: &mut Vec<u8>,
) -> Fate {
    let id = request.request_id;
    let (reply, mut events) = Replier::new(PIECES);
    let prompt = InboundPrompt {
        from: permit.node.clone(),
        from_name: permit.name.clone(),
        cluster: permit.cluster.clone(),
        ask: request.ask,
        timeout: request.timeout.saturating_sub(arrived.elapsed()),
        reply,
    };
    if let Err(failure) = desk.service.submit(prompt) {
        infer::encode_error(out, &id, &failure);
        return write(lane, out).await;
    }
    let mut hash = AnswerHash::new();
    let mut bytes = 0_u64;
    let mut model: Option<String> = None;
    let mut told_model = false;
    // Prompts before this one while it waits: told again with each keep-alive.
    let mut position = None;
    loop {
        out.clear();
        // Dropping `events` on any of the early returns tells the backend to stop.
        let event = tokio::select! {
            event = next(&mut events) => event,
            // The asker sends nothing while it waits: a frame is a violation, an end or error means it is gone.
            frame = lane.next(MAX_REQUEST_FRAME_BYTES) => {
                if matches!(frame, Ok(Some(_))) {
                    let _ = desk.violations.try_send(peer);
                }
                return Fate::Drop;
            }
        };
        let mut ready = match event {
            Next::Quiet => {
                infer::encode_keepalive(out, &id, position);
                if matches!(write(lane, out).await, Fate::Drop) {
                    return Fate::Drop;
                }
                continue;
            }
            Next::Event(event) => Some(event),
        };
        let mut ended = false;
        while let Some(event) = ready {
            match event {
                AnswerEvent::Queued { position: now } => {
                    position = Some(now);
                    infer::encode_keepalive(out, &id, position);
                }
                AnswerEvent::Started { model: name } => {
                    position = None;
                    model = Some(name);
                }
                AnswerEvent::Text(text) => {
                    hash.update(text.as_bytes());
                    bytes += text.len() as u64;
                    for piece in pieces(&text) {
                        let first = if told_model { None } else { model.as_deref() };
                        infer::encode_token(out, &id, piece, first);
                        told_model = true;
                    }
                }
                AnswerEvent::End(Ok(done)) => {
                    infer::encode_end(out, &id, model.as_deref().unwrap_or_default(), done, bytes, &hash.finish());
                    ended = true;
                }
                AnswerEvent::End(Err(failure)) => {
                    infer::encode_error(out, &id, &failure);
                    ended = true;
                }
            }
            ready = if ended || out.len() >= WRITE_AT_BYTES { None } else { events.try_recv().ok() };
        }
        if out.is_empty() {
            continue;
        }
        // A write that makes no progress for 30 s ends here; dropping `events` frees the slot.
        if matches!(write(lane, out).await, Fate::Drop) {
            return Fate::Drop;
        }
        if ended {
            return Fate::Next;
        }
    }
}

enum Next {
    Event(AnswerEvent),
    Quiet,
}

/// The next piece, or `Quiet` when a keep-alive is due: before the first token and between slow ones.
async fn next(events: &mut mpsc::Receiver<AnswerEvent>) -> Next {
    match timeout(KEEP_ALIVE, events.recv()).await {
        Ok(Some(event)) => Next::Event(event),
        Ok(None) => {
            Next::Event(AnswerEvent::End(Err(Failure::new(FailureKind::BackendFailed, "the backend gave no end to its answer"))))
        }
        Err(_) => Next::Quiet,
    }
}

/// Cuts a text into pieces that fit a token frame, never inside a character.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, tail) = rest.split_at(rest.floor_char_boundary(MAX_TOKEN_TEXT_BYTES));
        rest = tail;
        Some(piece)
    })
}
