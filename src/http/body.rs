//! Bodies: of requests, read within their limits; of responses, whole or piece by piece.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};

use super::connections::Busy;
use super::errors::Refusal;
use crate::domain::prompt::MAX_PROMPT_BYTES;

/// Longest body of a request: a prompt, and what JSON and its other fields add to it.
pub(super) const MAX_BODY_BYTES: usize = MAX_PROMPT_BYTES + 64 * 1024;
/// A body is there within this time.
const ARRIVES: Duration = Duration::from_secs(30);
/// What is read of a refused request, so that its sender reads why: a connection that is closed on unread bytes is reset.
const MAX_DRAINED_BYTES: usize = 8 << 20;
const DRAINED: Duration = Duration::from_secs(2);

/// The body of a response; counts as a request being answered for as long as it lives.
pub(super) struct Reply {
    content: Content,
    _busy: Option<Busy>,
}

enum Content {
    Whole(Option<Bytes>),
    Pieces(Pin<Box<dyn Stream<Item = Bytes> + Send>>),
}

impl Reply {
    pub fn whole(bytes: impl Into<Bytes>) -> Self {
        Self { content: Content::Whole(Some(bytes.into())), _busy: None }
    }

    pub fn pieces(pieces: impl Stream<Item = Bytes> + Send + 'static) -> Self {
        Self { content: Content::Pieces(Box::pin(pieces)), _busy: None }
    }

    pub fn while_it_lives(self, busy: Busy) -> Self {
        Self { _busy: Some(busy), ..self }
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut self.content {
            Content::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Content::Pieces(pieces) => pieces.as_mut().poll_next(context).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.content, Content::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Content::Pieces(_) => SizeHint::default(),
        }
    }
}

/// The whole body of a request.
///
/// # Errors
/// It is too large, it did not arrive in time, or it broke off.
pub(super) async fn read(body: &mut Incoming) -> Result<Bytes, Refusal> {
    if body.size_hint().lower() > MAX_BODY_BYTES as u64 {
        return Err(Refusal::too_large());
    }
    tokio::time::timeout(ARRIVES, collect(body)).await.unwrap_or_else(|_| Err(Refusal::slow_body(ARRIVES)))
}

async fn collect(body: &mut Incoming) -> Result<Bytes, Refusal> {
    let mut first = Bytes::new();
    let mut rest: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return Err(Refusal::broken_body()) };
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + rest.len() + data.len() > MAX_BODY_BYTES {
            return Err(Refusal::too_large());
        }
        // As a rule all of it is in one piece, which is then not copied.
        if first.is_empty() && rest.is_empty() {
            first = data;
            continue;
        }
        if rest.is_empty() {
            rest.reserve(usize::try_from(body.size_hint().lower()).unwrap_or(0).min(MAX_BODY_BYTES) + first.len() + data.len());
            rest.extend_from_slice(&std::mem::take(&mut first));
        }
        rest.extend_from_slice(&data);
    }
    Ok(if rest.is_empty() { first } else { rest.into() })
}

/// Reads and forgets what is left of a body, within limits.
pub(super) async fn drain(body: &mut Incoming) {
    let draining = async {
        let mut drained = 0;
        while let Some(Ok(frame)) = body.frame().await {
            drained += frame.data_ref().map_or(0, Bytes::len);
            if drained > MAX_DRAINED_BYTES {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(DRAINED, draining).await;
}
