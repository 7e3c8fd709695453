//! Server-sent events of a chat completion, from bytes as they come. A server that ignores `stream` and answers with one
//! JSON object is understood too.

use serde::Deserialize;

use crate::domain::prompt::Usage;

/// Longest line (or whole answer of a server that does not stream).
const MAX_LINE_BYTES: usize = 1 << 20;

/// Why an answer cannot be read. Never contains its text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SseError {
    #[error("a line of more than 1 MiB")]
    TooLong,
    #[error("an event that is not the JSON of a chat completion")]
    Nonsense,
}

/// One event.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    Data {
        text: Option<String>,
        finish_reason: Option<String>,
        usage: Option<Usage>,
    },
    /// The server reports an error in the stream.
    Error(String),
    /// `[DONE]`.
    Done,
}

#[derive(Deserialize)]
struct RawUsage {
    #[serde(default)]
    prompt_tokens: u32,
    #[serde(default)]
    completion_tokens: u32,
}

#[derive(Deserialize, Default)]
struct RawText {
    #[serde(default)]
    content: Option<String>,
}

#[derive(Deserialize)]
struct RawChoice {
    #[serde(default)]
    delta: Option<RawText>,
    #[serde(default)]
    message: Option<RawText>,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct RawEvent {
    #[serde(default)]
    choices: Option<Vec<RawChoice>>,
    #[serde(default)]
    usage: Option<RawUsage>,
    #[serde(default)]
    error: Option<serde_json::Value>,
}

#[derive(Debug)]
pub(super) struct Events {
    buffer: Vec<u8>,
    streamed: bool,
}

impl Events {
    /// `streamed`: the server says that it sends events; else the whole body is one object.
    pub(super) fn new(streamed: bool) -> Self {
        Self { buffer: Vec::new(), streamed }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), SseError> {
        self.buffer.extend_from_slice(bytes);
        let open_line = self.buffer.iter().rev().position(|byte| *byte == b'\n').unwrap_or(self.buffer.len());
        if open_line > MAX_LINE_BYTES || (!self.streamed && self.buffer.len() > MAX_LINE_BYTES) {
            Err(SseError::TooLong)
        } else {
            Ok(())
        }
    }

    /// The next event; `None` when more bytes are needed.
    pub(super) fn next(&mut self) -> Result<Option<Chunk>, SseError> {
        if !self.streamed {
            return Ok(None);
        }
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            let line = line.trim_ascii_end();
            // Comments (keep-alives), names and ids of events are of no interest.
            if let Some(data) = line.strip_prefix(b"data:") {
                return read(data.trim_ascii_start()).map(Some);
            }
        }
        Ok(None)
    }

    /// The end of the body: what a server that does not stream has said.
    pub(super) fn finish(self) -> Result<Option<Chunk>, SseError> {
        if self.streamed || self.buffer.trim_ascii().is_empty() {
            return Ok(None);
        }
        match read(self.buffer.trim_ascii())? {
            Chunk::Error(_) | Chunk::Done => Err(SseError::Nonsense),
            data @ Chunk::Data { .. } => Ok(Some(data)),
        }
    }
}

fn read(data: &[u8]) -> Result<Chunk, SseError> {
    if data == b"[DONE]" {
        return Ok(Chunk::Done);
    }
    let event: RawEvent = serde_json::from_slice(data).map_err(|_| SseError::Nonsense)?;
    if let Some(error) = event.error {
        let message = error.get("message").and_then(serde_json::Value::as_str).unwrap_or("it reports an error");
        return Ok(Chunk::Error(message.escape_debug().take(256).collect()));
    }
    if event.choices.is_none() && event.usage.is_none() {
        return Err(SseError::Nonsense);
    }
    let usage = event.usage.map(|usage| Usage { prompt_tokens: usage.prompt_tokens, completion_tokens: usage.completion_tokens });
    let choice = event.choices.into_iter().flatten().next();
    let (text, finish_reason) = choice.map_or((None, None), |choice| {
        let content = choice.delta.or(choice.message).and_then(|text| text.content).or(choice.text);
        (content, choice.finish_reason)
    });
    Ok(Chunk::Data { text, finish_reason, usage })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(chunk: Option<Chunk>) -> String {
        match chunk {
            Some(Chunk::Data { text: Some(text), .. }) => text,
            other => panic!("no text: {other:?}"),
        }
    }

    #[test]
    fn events_come_whole_however_the_bytes_are_cut() {
        let body =
            ": keep-alive\r\n\r\ndata: {\"choices\":[{\"delta\":{\"content\":\"h\u{e9}\"}}]}\r\n\r\nevent: x\ndata:[DONE]\n\n";
        let mut events = Events::new(true);
        let mut seen = Vec::new();
        for byte in body.as_bytes() {
            events.push(&[*byte]).unwrap();
            while let Some(chunk) = events.next().unwrap() {
                seen.push(chunk);
            }
        }
        assert_eq!(seen.len(), 2);
        assert_eq!(text(seen.into_iter().next()), "hé");
    }

    #[test]
    fn a_line_has_a_limit() {
        let mut events = Events::new(true);
        events.push(&vec![b'x'; MAX_LINE_BYTES]).unwrap();
        assert_eq!(events.push(b"x"), Err(SseError::TooLong));
    }

    #[test]
    fn a_server_that_does_not_stream_is_understood() {
        let mut events = Events::new(false);
        events.push(br#"{"choices":[{"message":{"content":"4"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":1}}"#).unwrap();
        assert_eq!(events.next(), Ok(None));
        let Some(Chunk::Data { text, finish_reason, usage }) = events.finish().unwrap() else { panic!("no answer") };
        assert_eq!((text.as_deref(), finish_reason.as_deref()), (Some("4"), Some("stop")));
        assert_eq!(usage, Some(Usage { prompt_tokens: 3, completion_tokens: 1 }));
    }

    #[test]
    fn nonsense_and_errors_in_the_stream_are_told_apart() {
        assert_eq!(read(b"<html>"), Err(SseError::Nonsense));
        assert_eq!(read(b"{}"), Err(SseError::Nonsense));
        assert_eq!(read(br#"{"error":{"message":"out\nof memory"}}"#), Ok(Chunk::Error("out\\nof memory".to_owned())));
    }
}
