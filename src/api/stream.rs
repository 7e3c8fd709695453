//! The JSON lines on the pipes of `StartPrompt`, `WatchJobs`, `Models.Add` and `Models.Verify`, and a reader that bounds them.
//!
//! The daemon writes [`Line`]s, a client reads them with [`LineReader`]. One object a line; the last
//! one is `end` or `error`, and a pipe that closes without one of the two means that the daemon is gone.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Longest line in bytes, without its line feed. The daemon's lines are far below it.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// One line of the stream. `Debug` shows the length of text, never the text.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Line {
    /// It waits; any number of times, before `start`.
    Queued {
        /// Prompts before it.
        position: u32,
    },
    /// Who answers. First, and once.
    Start {
        /// The model that answers.
        model: String,
        /// The node that answers.
        served_by: ServedBy,
    },
    /// A piece of the answer.
    Text {
        /// Never logged.
        text: String,
    },
    /// The whole answer was delivered.
    End {
        /// "stop" or "length".
        reason: String,
        /// What it took.
        #[serde(default)]
        usage: Usage,
        /// How long it took.
        #[serde(default)]
        timings: Timings,
    },
    /// There is no whole answer. Text before it stays valid.
    Error {
        /// Full D-Bus error name, as in [`ErrorName::as_str`](crate::api::names::ErrorName::as_str).
        name: String,
        /// A sentence for people.
        message: String,
    },
    /// A kind of line that this version does not know; skip it.
    #[serde(other)]
    Unknown,
}

/// The node that answers a prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedBy {
    /// libp2p peer id.
    pub peer_id: String,
    /// Its name, by its own word.
    #[serde(default)]
    pub name: String,
}

/// Tokens, as the backend counted them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Of prompt and system text.
    #[serde(default)]
    pub prompt_tokens: u32,
    /// Of the answer.
    #[serde(default)]
    pub completion_tokens: u32,
}

/// Times in microseconds from the start of the request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Until the first token.
    #[serde(default)]
    pub first_token_us: u64,
    /// Until the end.
    #[serde(default)]
    pub duration_us: u64,
}

impl Line {
    /// The line with its line feed, ready to write.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("strings and numbers always become JSON");
        bytes.push(b'\n');
        bytes
    }

    /// Reads one line.
    ///
    /// # Errors
    /// [`StreamError::NotJson`] when it is no object of this shape.
    pub fn parse(line: &[u8]) -> Result<Self, StreamError> {
        // The cause may quote the line, which may hold the answer: only its place is kept.
        serde_json::from_slice(line).map_err(|error| StreamError::NotJson { column: error.column() })
    }
}

/// One line of the pipe of `WatchJobs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum JobLine {
    /// How a job is now.
    Job(JobNow),
    /// So many changes were not told: too many came at once, or the reader was slow.
    Skipped {
        /// How many.
        count: u64,
    },
    /// A kind of line that this version does not know; skip it.
    #[serde(other)]
    Unknown,
}

/// How a job is: who, where and how much; never what it is about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobNow {
    /// Its number.
    pub id: u64,
    /// Where it was asked; empty when this machine asks itself, in no cluster.
    pub cluster: String,
    /// Who asked.
    pub uid: u32,
    /// "queued", "running", "done", "cancelled", "failed".
    pub state: String,
    /// Prompts before it, while it waits and the serving node says so.
    #[serde(default)]
    pub position: Option<u32>,
    /// The model that answers, once it was taken up.
    #[serde(default)]
    pub model: Option<String>,
    /// The node that answers, once it was taken up.
    #[serde(default)]
    pub served_by: Option<ServedBy>,
    /// Tokens of prompt and system text, when it is done.
    #[serde(default)]
    pub prompt_tokens: Option<u32>,
    /// Tokens of the answer so far.
    #[serde(default)]
    pub completion_tokens: u32,
    /// Since it was asked, until now or its end.
    #[serde(default)]
    pub duration_us: u64,
    /// Full D-Bus error name, when it ended with one.
    #[serde(default)]
    pub error: Option<String>,
}

impl JobLine {
    /// The line with its line feed, ready to write.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("strings and numbers always become JSON");
        bytes.push(b'\n');
        bytes
    }
}

/// One line of the pipe of `Models.Add` and `Models.Verify`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Step {
    /// How far it is; any number of times.
    Progress {
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// It is done.
    End {
        /// The model.
        name: String,
        /// Bytes of the file; `Add` alone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
        /// SHA-256 of the file, hexadecimal.
        digest: Option<String>,
        /// SHA-256 that it should have; `Verify` alone.
        #[serde(default)]
        expected: Option<String>,
        /// Whether both are equal, where both are known; `Verify` alone.
        #[serde(default)]
        intact: Option<bool>,
    },
    /// It failed, and nothing is left of it.
    Error {
        /// Full D-Bus error name.
        name: String,
        /// A sentence for people.
        message: String,
    },
    /// A kind of line that this version does not know; skip it.
    #[serde(other)]
    Unknown,
}

impl Step {
    /// The line with its line feed, ready to write.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("strings and numbers always become JSON");
        bytes.push(b'\n');
        bytes
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start { model, served_by } => write!(f, "Start({model:?}, {served_by:?})"),
            Self::Queued { position } => write!(f, "Queued({position})"),
            Self::Text { text } => write!(f, "Text({} bytes)", text.len()),
            Self::End { reason, usage, timings } => write!(f, "End({reason:?}, {usage:?}, {timings:?})"),
            Self::Error { name, message } => write!(f, "Error({name}, {message:?})"),
            Self::Unknown => f.write_str("Unknown"),
        }
    }
}

/// Why a stream cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A line is longer than [`MAX_LINE_BYTES`].
    #[error("a line of the stream is longer than {MAX_LINE_BYTES} bytes")]
    LineTooLong,
    /// A line is no JSON object of the expected shape.
    #[error("a line of the stream is not understood (at byte {column})")]
    NotJson {
        /// Where, counted from 1.
        column: usize,
    },
    /// The last line has no end: the writer died while writing it.
    #[error("the stream ends in the middle of a line")]
    CutOff,
    /// The pipe failed.
    #[error("reading the stream failed")]
    Io(#[from] io::Error),
}

/// Splits a pipe into lines with bounded memory.
#[derive(Debug)]
pub struct LineReader<R> {
    source: R,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were given out.
    taken: usize,
    /// Bytes after `taken` that hold no line feed, so that a long line is searched once.
    searched: usize,
}

/// Bytes asked of the pipe at once: what a Linux pipe holds by default.
const READ_BYTES: usize = 64 << 10;

impl<R: AsyncRead + Unpin> LineReader<R> {
    /// Reads lines from `source`.
    pub fn new(source: R) -> Self {
        Self { source, buffer: Vec::new(), taken: 0, searched: 0 }
    }

    /// The next line; `None` at the end of the pipe. Empty lines are skipped.
    ///
    /// Cancel-safe: what was read before the future was dropped stays in the reader.
    ///
    /// # Errors
    /// [`StreamError`]; the reader is of no use after one.
    pub async fn next(&mut self) -> Result<Option<Line>, StreamError> {
        self.next_as(Line::parse).await
    }

    /// The next line of the pipe of `Models.Add` or `Models.Verify`; else as [`Self::next`].
    ///
    /// # Errors
    /// [`StreamError`]; the reader is of no use after one.
    pub async fn next_step(&mut self) -> Result<Option<Step>, StreamError> {
        let parse = |line: &[u8]| serde_json::from_slice(line).map_err(|error| StreamError::NotJson { column: error.column() });
        self.next_as(parse).await
    }

    /// The next line of the pipe of `WatchJobs`; else as [`Self::next`].
    ///
    /// # Errors
    /// [`StreamError`]; the reader is of no use after one.
    pub async fn next_job(&mut self) -> Result<Option<JobLine>, StreamError> {
        let parse = |line: &[u8]| serde_json::from_slice(line).map_err(|error| StreamError::NotJson { column: error.column() });
        self.next_as(parse).await
    }

    async fn next_as<L>(&mut self, parse: impl Fn(&[u8]) -> Result<L, StreamError>) -> Result<Option<L>, StreamError> {
        loop {
            let fresh = self.taken + self.searched;
            if let Some(at) = self.buffer[fresh..].iter().position(|&byte| byte == b'\n') {
                let (start, end) = (self.taken, fresh + at);
                if end - start > MAX_LINE_BYTES {
                    return Err(StreamError::LineTooLong);
                }
                (self.taken, self.searched) = (end + 1, 0);
                if start == end {
                    continue;
                }
                return parse(&self.buffer[start..end]).map(Some);
            }
            self.buffer.drain(..self.taken);
            self.taken = 0;
            self.searched = self.buffer.len();
            if self.searched > MAX_LINE_BYTES {
                return Err(StreamError::LineTooLong);
            }
            self.buffer.reserve(READ_BYTES);
            // `read_buf` grows the buffer only by what arrived, and is cancel-safe.
            if self.source.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() { Ok(None) } else { Err(StreamError::CutOff) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt as _;

    fn text(text: &str) -> Line {
        Line::Text { text: text.to_owned() }
    }

    async fn read_all(bytes: &[u8]) -> Result<Vec<Line>, StreamError> {
        let mut reader = LineReader::new(bytes);
        let mut lines = Vec::new();
        while let Some(line) = reader.next().await? {
            lines.push(line);
        }
        Ok(lines)
    }

    #[test]
    fn lines_are_written_as_documented() {
        let start = Line::Start { model: "echo".into(), served_by: ServedBy { peer_id: "12D3".into(), name: "NodeA".into() } };
        assert_eq!(
            start.to_bytes(),
            b"{\"type\":\"start\",\"model\":\"echo\",\"served_by\":{\"peer_id\":\"12D3\",\"name\":\"NodeA\"}}\n"
        );
        let end = Line::End {
            reason: "stop".into(),
            usage: Usage { prompt_tokens: 1, completion_tokens: 2 },
            timings: Timings { first_token_us: 3, duration_us: 4 },
        };
        assert_eq!(
            end.to_bytes(),
            b"{\"type\":\"end\",\"reason\":\"stop\",\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2},\"timings\":{\"first_token_us\":3,\"duration_us\":4}}\n"
        );
    }

    #[test]
    fn lines_and_keys_of_a_newer_daemon_are_skipped() {
        assert_eq!(Line::parse(br#"{"type":"progress","percent":3}"#).unwrap(), Line::Unknown);
        assert_eq!(Line::parse(br#"{"type":"text","text":"a","more":1}"#).unwrap(), text("a"));
    }

    #[test]
    fn text_never_shows_in_debug_output_or_errors() {
        assert!(!format!("{:?}", text("canary")).contains("canary"));
        let error = Line::parse(br#"{"type":"canary"#).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("canary"));
    }

    #[tokio::test]
    async fn a_line_at_the_limit_passes_and_one_byte_more_does_not() {
        let frame = text("").to_bytes().len() - 1;
        let fits = text(&"a".repeat(MAX_LINE_BYTES - frame));
        assert_eq!(read_all(&fits.to_bytes()).await.unwrap(), vec![fits]);
        let over = text(&"a".repeat(MAX_LINE_BYTES - frame + 1));
        assert!(matches!(read_all(&over.to_bytes()).await, Err(StreamError::LineTooLong)));
        assert!(matches!(read_all(&vec![b'a'; MAX_LINE_BYTES * 2]).await, Err(StreamError::LineTooLong)));
    }

    #[tokio::test]
    async fn a_cut_line_is_an_error_and_a_clean_end_is_not() {
        assert!(matches!(read_all(b"{\"type\":\"text\"").await, Err(StreamError::CutOff)));
        assert!(matches!(read_all(b"nonsense\n").await, Err(StreamError::NotJson { .. })));
        assert_eq!(read_all(b"\n").await.unwrap(), vec![]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn lines_read_back_however_the_pipe_splits_them(texts in prop::collection::vec(any::<String>(), 0..8), size in 1usize..40) {
            let lines: Vec<Line> = texts.iter().map(|t| text(t)).collect();
            let bytes: Vec<u8> = lines.iter().flat_map(Line::to_bytes).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let read = runtime.block_on(async {
                let (mut near, far) = tokio::io::duplex(size);
                let writer = async move { near.write_all(&bytes).await.unwrap() };
                let reader = async move {
                    let mut reader = LineReader::new(far);
                    let mut lines = Vec::new();
                    while let Some(line) = reader.next().await.unwrap() {
                        lines.push(line);
                    }
                    lines
                };
                tokio::join!(writer, reader).1
            });
            prop_assert_eq!(read, lines);
        }
    }
}
