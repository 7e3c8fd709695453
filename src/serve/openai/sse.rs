//! Server-sent events of a chat completion, from bytes as they come. A server that ignores `stream` and answers with one
//! JSON object is understood too.

use serde::Deserialize;

use crate::domain::prompt::Usage;

/// Longest line.
const MAX_LINE_BYTES: usize = 1 << 20;
/// A whole answer of a server that does not stream: the text may be escaped.
const MAX_BODY_BYTES: usize = 2 * crate::domain::prompt::MAX_ANSWER_BYTES;

/// Why an answer cannot be read. Never contains its text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SseError {
    #[error("a line of more than 1 MiB")]
    TooLong,
    #[error("an event that is not the JSON of a chat completion")]
    Nonsense,
}

/// One event.
#[derive(Debug, PartialEq)]
pub(super) enum Chunk {
    /// Part of the answer.
    Piece(Piece),
    /// The server reports an error in the stream.
    Error(serde_json::Value),
    /// `[DONE]`.
    Done,
}

/// Part of the answer, or what is told of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Piece {
    pub text: Option<String>,
    pub finish_reason: Option<String>,
    pub usage: Option<Usage>,
}

#[derive(Deserialize)]
struct RawUsage {
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
}

/// What a reasoning model thinks comes beside it as `reasoning_content` or `reasoning`: it is no part of the answer.
#[derive(Deserialize, Default)]
struct RawText {
    content: Option<String>,
}

#[derive(Deserialize)]
struct RawChoice {
    delta: Option<RawText>,
    message: Option<RawText>,
    text: Option<String>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct RawEvent {
    choices: Option<Vec<RawChoice>>,
    usage: Option<RawUsage>,
    error: Option<serde_json::Value>,
}

#[derive(Debug)]
pub(super) struct Events {
    buffer: Vec<u8>,
    /// Of the buffer, read already.
    read: usize,
    streamed: bool,
}

impl Events {
    /// `streamed`: the server says that it sends events; else the whole body is one object.
    pub(super) fn new(streamed: bool) -> Self {
        Self { buffer: Vec::new(), read: 0, streamed }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), SseError> {
        self.buffer.drain(..self.read);
        self.read = 0;
        self.buffer.extend_from_slice(bytes);
        let open_line = self.buffer.iter().rev().position(|byte| *byte == b'\n').unwrap_or(self.buffer.len());
        if open_line > MAX_LINE_BYTES || (!self.streamed && self.buffer.len() > MAX_BODY_BYTES) {
            Err(SseError::TooLong)
        } else {
            Ok(())
        }
    }

    /// The next event; `None` when more bytes are needed.
    pub(super) fn next(&mut self) -> Result<Option<Chunk>, SseError> {
        self.next_data().map(read).transpose()
    }

    /// The same as it was sent.
    pub(super) fn next_data(&mut self) -> Option<&[u8]> {
        let begin = loop {
            if !self.streamed {
                return None;
            }
            let begin = self.read;
            self.read += self.buffer[begin..].iter().position(|byte| *byte == b'\n')? + 1;
            // Comments (keep-alives), names and ids of events are of no interest.
            if self.buffer[begin..self.read].starts_with(b"data:") {
                break begin;
            }
        };
        Some(self.buffer[begin + b"data:".len()..self.read].trim_ascii())
    }

    /// The end of the body: what a server that does not stream has said.
    pub(super) fn finish(self) -> Result<Option<Chunk>, SseError> {
        if self.streamed || self.buffer.trim_ascii().is_empty() {
            return Ok(None);
        }
        read(self.buffer.trim_ascii()).map(Some)
    }
}

fn read(data: &[u8]) -> Result<Chunk, SseError> {
    if data == b"[DONE]" {
        return Ok(Chunk::Done);
    }
    let event: RawEvent = serde_json::from_slice(data).map_err(|_| SseError::Nonsense)?;
    if let Some(error) = event.error {
        return Ok(Chunk::Error(error));
    }
    if event.choices.is_none() && event.usage.is_none() {
        return Err(SseError::Nonsense);
    }
    let usage = event.usage.map(|usage| Usage {
        prompt_tokens: usage.prompt_tokens.unwrap_or(0),
        completion_tokens: usage.completion_tokens.unwrap_or(0),
    });
    let choice = event.choices.into_iter().flatten().next();
    let (text, finish_reason) = choice.map_or((None, None), |choice| {
        let content = choice.delta.or(choice.message).and_then(|text| text.content).or(choice.text);
        (content, choice.finish_reason.filter(|reason| !reason.is_empty()))
    });
    Ok(Chunk::Piece(Piece { text, finish_reason, usage }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(chunk: Option<Chunk>) -> String {
        match chunk {
            Some(Chunk::Piece(Piece { text: Some(text), .. })) => text,
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
        let Some(Chunk::Piece(Piece { text, finish_reason, usage })) = events.finish().unwrap() else { panic!("no answer") };
        assert_eq!((text.as_deref(), finish_reason.as_deref()), (Some("4"), Some("stop")));
        assert_eq!(usage, Some(Usage { prompt_tokens: 3, completion_tokens: 1 }));
    }

    #[test]
    fn nonsense_and_errors_in_the_stream_are_told_apart() {
        assert_eq!(read(b"<html>"), Err(SseError::Nonsense));
        assert_eq!(read(b"{}"), Err(SseError::Nonsense));
        assert_eq!(
            read(br#"{"error":{"message":"out\nof memory"}}"#),
            Ok(Chunk::Error(serde_json::json!({"message": "out\nof memory"})))
        );
    }

    #[test]
    fn fields_may_be_null_or_left_out() {
        let piece = |data: &str| match read(data.as_bytes()) {
            Ok(Chunk::Piece(piece)) => piece,
            other => panic!("{data}: {other:?}"),
        };
        // llama-server begins with a role and no content; reasoning models think beside the answer.
        for silent in [
            r#"{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}]}"#,
            r#"{"choices":[{"delta":{"reasoning_content":"let me think"}}]}"#,
            r#"{"choices":[{"delta":{"content":null,"reasoning":"let me think"},"finish_reason":""}],"usage":null}"#,
            r#"{"choices":[{"delta":{}}]}"#,
            r#"{"choices":[]}"#,
        ] {
            assert_eq!(piece(silent), Piece::default(), "{silent}");
        }
        let counted = piece(
            r#"{"choices":null,"usage":{"prompt_tokens":7,"completion_tokens":null,"prompt_tokens_details":{"cached_tokens":1}},"timings":{}}"#,
        );
        assert_eq!(counted.usage, Some(Usage { prompt_tokens: 7, completion_tokens: 0 }));
        assert_eq!(piece(r#"{"choices":[{"text":"once","index":0,"logprobs":null}]}"#).text.as_deref(), Some("once"));
    }
}
