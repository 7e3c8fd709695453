//! A prompt on its way to another node: takes a lane, writes the request, reads the answer.
//!
//! There is no task behind it: the caller's own polling drives the stream, so a caller that does not read slows the
//! serving node down, and dropping it cancels the prompt there.

use std::collections::VecDeque;
use std::time::Duration;

use futures::AsyncWriteExt as _;
use libp2p::PeerId;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::handle::AnswerEvent;
use super::lanes::{Lane, NoLane, Pool, Taken};
use crate::domain::prompt::{Ask, Failure, FailureKind, MAX_ANSWER_BYTES, MAX_TIMEOUT};
use crate::wire::frame::FrameError;
use crate::wire::infer::{self, AnswerHash, InferError, Response};
use crate::wire::limits::{MAX_RESPONSE_FRAME_BYTES, STALL};

/// Between two places in the queue that the asker hears of.
const POSITION_AGAIN: Duration = Duration::from_millis(100);

#[derive(Debug)]
enum Stage {
    /// Waiting for a lane.
    Waiting(oneshot::Receiver<Result<Lane, NoLane>>),
    /// The request is being written: so many bytes of it are.
    Writing(Lane, usize),
    /// Frames of the answer arrive.
    Reading(Lane),
    /// The end was told.
    Ended,
}

/// One prompt to one node.
#[derive(Debug)]
pub(crate) struct Asking {
    peer: PeerId,
    pool: Pool,
    id: uuid::Uuid,
    request: Vec<u8>,
    stage: Stage,
    last_frame: Instant,
    hash: AnswerHash,
    bytes: usize,
    model: Option<String>,
    /// Pieces that came in the same frame as the one told last.
    pending: VecDeque<AnswerEvent>,
    /// A frame for this request arrived: the node has it.
    taken_up: bool,
    retried: bool,
    /// A second stream was asked for, the first could not be opened.
    reopened: bool,
    /// The place in the serving node's queue that was told last.
    position: Option<(u32, Instant)>,
}

impl Asking {
    /// Encodes the request and takes a lane.
    ///
    /// # Errors
    /// The request is too large or a field is out of range; no lane can be had.
    pub(crate) fn new(pool: Pool, peer: PeerId, cluster_ref: [u8; 16], ask: &Ask, timeout: Duration) -> Result<Self, Failure> {
        if timeout.as_millis() == 0 {
            // It would travel as 0 ms, which the other side takes for a broken request.
            return Err(Failure::new(FailureKind::DeadlineExceeded, "no time is left to ask a node"));
        }
        let timeout = timeout.min(MAX_TIMEOUT);
        let mut request = Vec::with_capacity(ask.prompt.as_str().len() + 256);
        let id = uuid::Uuid::new_v4();
        infer::encode_request(&mut request, &id, &cluster_ref, ask, timeout)?;
        let mut asking = Self {
            peer,
            pool,
            id,
            request,
            stage: Stage::Ended,
            last_frame: Instant::now(),
            hash: AnswerHash::new(),
            bytes: 0,
            model: None,
            pending: VecDeque::new(),
            taken_up: false,
            retried: false,
            reopened: false,
            position: None,
        };
        asking.take_lane()?;
        Ok(asking)
    }

    fn take_lane(&mut self) -> Result<(), Failure> {
        self.stage = match self.pool.take(self.peer).map_err(no_lane)? {
            Taken::Now(lane) => Stage::Writing(lane, 0),
            Taken::Soon(promise) => Stage::Waiting(promise),
        };
        Ok(())
    }

    fn end(&mut self, outcome: Result<crate::domain::prompt::Done, Failure>) -> Option<AnswerEvent> {
        self.release();
        Some(AnswerEvent::End(outcome))
    }

    /// Lets go of the lane, or of the place in the line for one.
    fn release(&mut self) {
        match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Waiting(mut promise) => {
                promise.close();
                // A lane may have come in this very moment: the next in the line gets it.
                if let Ok(Ok(lane)) = promise.try_recv() {
                    self.pool.hand_out(self.peer, lane);
                }
            }
            Stage::Writing(lane, _) | Stage::Reading(lane) => {
                // This resets the stream: the serving node frees the slot.
                drop(lane);
                self.pool.lost(self.peer);
            }
            Stage::Ended => {}
        }
    }

    /// The lane broke. One that had been idle may have been stale: try once more on a fresh one.
    fn broken(&mut self, reason: &str) -> Option<AnswerEvent> {
        if let Stage::Writing(lane, _) | Stage::Reading(lane) = &self.stage
            && let Some(limit) = lane.meter.as_ref().and_then(|meter| meter.spent(std::time::Instant::now()))
        {
            return self.end(Err(Failure::new(FailureKind::RelayLimit, limit)));
        }
        let stale = match &self.stage {
            Stage::Writing(lane, _) | Stage::Reading(lane) => lane.used && !self.taken_up && !self.retried,
            Stage::Waiting(_) | Stage::Ended => false,
        };
        if stale {
            self.retried = true;
            self.release();
            return match self.take_lane() {
                Ok(()) => None,
                Err(failure) => self.end(Err(failure)),
            };
        }
        let failure = if self.model.is_some() {
            Failure::new(FailureKind::Interrupted, format!("the serving node was lost after the first token: {reason}"))
        } else {
            Failure::new(FailureKind::PeerLost, format!("the serving node was lost before its first token: {reason}"))
        };
        self.end(Err(failure))
    }

    /// The next piece; `None` after the end. Cancel-safe: all progress is kept in `self`.
    pub(crate) async fn next(&mut self) -> Option<AnswerEvent> {
        if let Some(event) = self.pending.pop_front() {
            return Some(event);
        }
        loop {
            let deadline = self.last_frame + STALL;
            match &mut self.stage {
                Stage::Ended => return None,
                Stage::Waiting(promise) => match timeout_at(deadline, promise).await {
                    Ok(Ok(Ok(lane))) => {
                        self.last_frame = Instant::now();
                        self.stage = Stage::Writing(lane, 0);
                    }
                    // The connection broke under it. Nothing was sent, and another connection may be there.
                    Ok(Ok(Err(NoLane::Failed(_)))) if !self.reopened => {
                        self.reopened = true;
                        self.last_frame = Instant::now();
                        if let Err(failure) = self.take_lane() {
                            return self.end(Err(failure));
                        }
                    }
                    Ok(Ok(Err(error))) => return self.end(Err(no_lane(error))),
                    Ok(Err(_)) => return self.end(Err(no_lane(NoLane::NotConnected))),
                    Err(_) => return self.end(Err(stalled())),
                },
                Stage::Writing(lane, written) => {
                    let write = async {
                        while *written < self.request.len() {
                            *written += lane.stream.get_mut().write(&self.request[*written..]).await?;
                        }
                        lane.stream.get_mut().flush().await
                    };
                    match timeout_at(deadline, write).await {
                        Ok(Ok(())) => {
                            let Stage::Writing(lane, _) = std::mem::replace(&mut self.stage, Stage::Ended) else { return None };
                            self.stage = Stage::Reading(lane);
                        }
                        Ok(Err(error)) => {
                            if let Some(event) = self.broken(&error.to_string()) {
                                return Some(event);
                            }
                        }
                        Err(_) => return self.end(Err(stalled())),
                    }
                }
                Stage::Reading(lane) => match timeout_at(deadline, lane.stream.next(MAX_RESPONSE_FRAME_BYTES)).await {
                    Ok(Ok(Some(frame))) => {
                        let response = Response::decode(&frame, &self.id).map(Response::into_owned);
                        self.last_frame = Instant::now();
                        if let Some(event) = self.on_response(response) {
                            return Some(event);
                        }
                    }
                    Ok(Ok(None)) => {
                        if let Some(event) = self.broken("it closed the stream without an end") {
                            return Some(event);
                        }
                    }
                    // A node, or a relay, that dies in the middle of a frame has broken no rule.
                    Ok(Err(error @ (FrameError::Io(_) | FrameError::Truncated))) => {
                        if let Some(event) = self.broken(&error.to_string()) {
                            return Some(event);
                        }
                    }
                    Ok(Err(error)) => return self.protocol_error(&error.to_string()),
                    Err(_) => return self.end(Err(stalled())),
                },
            }
        }
    }

    /// Passes a place in the queue on, when it is another one and the last was not told a moment ago: the serving node
    /// says it again with every keep-alive.
    fn queued(&mut self, position: Option<u32>) -> Option<AnswerEvent> {
        let position = position.filter(|_| self.model.is_none())?;
        let now = Instant::now();
        if self.position.is_some_and(|(told, at)| told == position || now.duration_since(at) < POSITION_AGAIN) {
            return None;
        }
        self.position = Some((position, now));
        Some(AnswerEvent::Queued { position })
    }

    fn protocol_error(&mut self, what: &str) -> Option<AnswerEvent> {
        self.end(Err(Failure::new(FailureKind::ProtocolError, format!("the serving node broke the protocol: {what}"))))
    }

    fn on_response(&mut self, response: Result<Response<'static>, InferError>) -> Option<AnswerEvent> {
        match response {
            Err(error) => self.protocol_error(&error.to_string()),
            Ok(Response::KeepAlive { position }) => {
                self.taken_up = true;
                self.queued(position)
            }
            Ok(Response::Token { text, model }) => {
                self.taken_up = true;
                self.bytes += text.len();
                if self.bytes > MAX_ANSWER_BYTES {
                    return self.end(Err(too_large()));
                }
                self.hash.update(text.as_bytes());
                let text = text.into_owned();
                if self.model.is_some() {
                    return Some(AnswerEvent::Text(text));
                }
                let model = model.map(std::borrow::Cow::into_owned).unwrap_or_default();
                self.model = Some(model.clone());
                self.pending.push_back(AnswerEvent::Text(text));
                Some(AnswerEvent::Started { model })
            }
            Ok(Response::End { done, hash, text_bytes, model }) => {
                if text_bytes != self.bytes as u64 || hash != self.hash.finish() {
                    return self.end(Err(Failure::new(
                        FailureKind::Interrupted,
                        "the answer that arrived is not the one that was sent: count or hash differ",
                    )));
                }
                self.finish();
                if self.model.is_none() {
                    // An answer without any text is still an answer, by a model.
                    self.pending.push_back(AnswerEvent::End(Ok(done)));
                    return Some(AnswerEvent::Started { model: model.into_owned() });
                }
                Some(AnswerEvent::End(Ok(done)))
            }
            Ok(Response::Error(failure)) => {
                // The lane is in order: the serving node said no in the protocol's own words.
                self.finish();
                if self.retried && failure.kind == FailureKind::Duplicate {
                    // It had our first try and lost it with the lane; another node may still answer.
                    return Some(AnswerEvent::End(Err(Failure::new(
                        FailureKind::PeerLost,
                        "the stream to the serving node broke before its first token",
                    ))));
                }
                Some(AnswerEvent::End(Err(failure)))
            }
        }
    }

    /// Gives the lane back.
    fn finish(&mut self) {
        if let Stage::Reading(lane) = std::mem::replace(&mut self.stage, Stage::Ended) {
            self.pool.give_back(self.peer, lane);
        }
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.release();
    }
}

fn no_lane(error: NoLane) -> Failure {
    match error {
        NoLane::Busy => Failure::busy(error.to_string(), Duration::from_secs(1)),
        NoLane::NotConnected | NoLane::Failed(_) => Failure::new(FailureKind::PeerLost, error.to_string()),
    }
}

fn stalled() -> Failure {
    Failure::new(FailureKind::Stalled, format!("the serving node sent nothing for {} s", STALL.as_secs()))
}

fn too_large() -> Failure {
    Failure::new(FailureKind::AnswerTooLarge, format!("the answer passed the limit of {} MiB", MAX_ANSWER_BYTES >> 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_that_cannot_be_opened_is_asked_for_once_more() {
        let (pool, mut wanted) = Pool::new();
        let peer = PeerId::random();
        pool.admit(peer);
        let mut asking = Asking::new(pool.clone(), peer, [0; 16], &Ask::default(), Duration::from_secs(30)).unwrap();
        let answered = tokio::spawn(async move { asking.next().await });
        for _ in 0..2 {
            assert_eq!(wanted.recv().await, Some(peer));
            pool.opened(peer, Err(NoLane::Failed("connection lost".to_owned())));
        }
        let Some(AnswerEvent::End(Err(failure))) = answered.await.unwrap() else { panic!("no end") };
        assert_eq!(failure.kind, FailureKind::PeerLost);
        assert!(wanted.try_recv().is_err(), "not a third time");
    }
}
