//! What `opengatewayd` and its child `opengateway-engine` say to each other.
//!
//! One stream socket, the child's end is descriptor [`CHILD_FD`]. A frame is a `u32` length, big-endian, and that many bytes
//! of JSON: a [`Down`] to the child, an [`Up`] from it. The length is checked before anything is allocated. A kind that the
//! reader does not know is an error, never a panic. End of the stream means: the other side is gone, end too.
//!
//! A conversation: `hello` ↑, `load` ↓, `loading` ↑ …, `ready` or `load_failed` ↑, then any number of requests at once. Each
//! [`Down::Generate`] is answered by `started`, `delta` …, and exactly one `done` or `error`, in which the request ends.
//!
//! What the child does:
//! - It exits with 0 at [`Down::Shutdown`] and at the end of the stream, whatever it computes; with 2 when it is started
//!   wrongly, when the first frame but pings is not `load`, or when a frame is longer than [`MAX_FRAME_BYTES`]; with 3 after
//!   `load_failed`; with 101 on a fault of its own. llama.cpp itself ends it with a signal: `SIGABRT` where a file or a
//!   computation breaks its assertions, `SIGBUS` where the file shrank.
//! - A frame that it cannot read is answered with an `error` of kind `invalid` if an `id` can be found in it, and is passed
//!   over otherwise.
//! - A ping is answered at once by a thread that never computes: also while loading, and in the middle of a batch.
//! - It queues nothing: a request while all slots are taken, or before `ready`, gets the error `busy`. A slot is free before
//!   the `done` or `error` of its request is sent.
//! - A cancelled request ends with its `done` at once when nobody else is in the batch that is being computed, and else after
//!   it: a token of every slot and 64 tokens of prompts, or up to 128 on a machine that computes those in 0.4 s. A cancel of
//!   an unknown or ended request does nothing.
//! - Numbers out of range are cut to their bounds, texts out of bounds are refused with `invalid`.
//! - The answer's first token is sampled from the prompt's last batch: `started`, then `delta`. A `delta` has whole characters
//!   and nothing that may be the beginning of a stop text, so tokens and deltas are not one to one, and the tokens of all
//!   deltas may be fewer than those of `done` (text that was cut off by a stop text).
//! - Texts of special tokens in messages are broken up before the template is rendered: a message cannot forge a role.
//! - Environment variables are not read, nor is standard input; standard error gets errors, never a text of a prompt or answer.

use std::fmt;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Rises when an older reader would misunderstand something.
pub const VERSION: u32 = 1;
/// Descriptor of the child's end of the socket.
pub const CHILD_FD: i32 = 3;
/// Largest frame: a prompt of 1 MiB whose every byte takes six in JSON, and its envelope.
pub const MAX_FRAME_BYTES: usize = 8 << 20;
/// Largest frame of the child: a piece of text, or a sentence.
pub const MAX_UP_FRAME_BYTES: usize = 256 << 10;

/// Most slots of a child; more in [`Load::slots`] is cut to this.
pub const MAX_SLOTS: u32 = 64;
/// Temperature of a request that names none: answers vary a little, and small models stay with what they know.
pub const DEFAULT_TEMPERATURE: f64 = 0.7;
/// Highest temperature; more is cut to this.
pub const MAX_TEMPERATURE: f64 = 2.0;
/// Nucleus of a request that names none.
pub const DEFAULT_TOP_P: f64 = 0.95;
/// Most bytes of text in one request; more is [`ErrorKind::Invalid`].
pub const MAX_PROMPT_BYTES: usize = 1 << 20;
/// Most messages of a conversation; more is [`ErrorKind::Invalid`].
pub const MAX_MESSAGES: usize = 1024;
/// Most stop texts of a request; more is [`ErrorKind::Invalid`].
pub const MAX_STOPS: usize = 16;
/// Longest stop text in bytes, and the shortest is one; else [`ErrorKind::Invalid`].
pub const MAX_STOP_BYTES: usize = 256;

/// One message of a conversation.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// What was said.
    pub text: String,
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Message({}, {} bytes)", self.role, self.text.len())
    }
}

/// What is asked of the model.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// A conversation; the child renders it with the model's chat template.
    Chat(Vec<Message>),
    /// Text to be continued as it stands.
    Raw(String),
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chat(messages) => f.debug_tuple("Chat").field(messages).finish(),
            Self::Raw(text) => write!(f, "Raw({} bytes)", text.len()),
        }
    }
}

/// How a model is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Absolute path of the GGUF file. The child can read nothing else once it has this.
    pub path: String,
    /// Context window of each slot in tokens; 0 is what the model was trained with, at most `max_context`.
    pub context: u32,
    /// Bound of `context` when that is 0.
    pub max_context: u32,
    /// Prompts answered at once.
    pub slots: u32,
    /// Threads for computing; 0 lets the child choose from the usable cores (one for tiny models).
    pub threads: u32,
    /// Layers that go to a GPU where the child has one; `u32::MAX` is all.
    pub gpu_layers: u32,
    /// Use the Jinja template of the file. Without it the child takes one of its own list: a template is a program.
    pub file_template: bool,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generate {
    /// Names the request in every frame about it; chosen by the daemon, never used twice.
    pub id: u64,
    /// What is asked.
    pub input: Input,
    /// Most tokens of the answer; `None` is the rest of the context window.
    pub max_tokens: Option<u32>,
    /// 0 is greedy; `None` is the child's default.
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    pub top_p: Option<f64>,
    /// The same seed and settings give the same answer on the same build.
    pub seed: Option<u64>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
}

/// From the daemon to the child.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Down {
    /// Load this model. Once.
    Load(Load),
    /// Answer this.
    Generate(Generate),
    /// Stop a request; it still ends with its `done` (finish `cancelled`).
    Cancel {
        /// Which.
        id: u64,
    },
    /// Answer with a pong; also while computing.
    Ping {
        /// Comes back.
        nonce: u64,
    },
    /// Exit with 0.
    Shutdown,
}

/// What a loaded model is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Context window of each slot in tokens.
    pub context: u32,
    /// Prompts answered at once.
    pub slots: u32,
    /// Threads that compute.
    pub threads: u32,
    /// Which template renders conversations, such as "chatml".
    pub template: String,
    /// Parameters of the model.
    pub parameters: u64,
    /// What computes, such as "CPU haswell" or "Vulkan0 NVIDIA …".
    pub device: String,
    /// Anonymous memory of the KV cache and the compute buffers, in bytes, as allocated.
    pub memory: u64,
}

/// Why a request ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model said its end, or a stop text came.
    Stop,
    /// `max_tokens` or the context window was reached.
    Length,
    /// It was cancelled.
    Cancelled,
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The prompt does not fit the context window.
    ContextOverflow,
    /// A field is out of range, or the template cannot render it.
    Invalid,
    /// All slots are taken and the child queues nothing.
    Busy,
    /// The engine refused to compute.
    Internal,
}

/// From the child to the daemon.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Up {
    /// First, and at once.
    Hello {
        /// [`VERSION`] of the child.
        protocol: u32,
        /// Version of the child's program.
        version: String,
        /// What it computes with: llama.cpp's and ggml's versions, the CPU kernels chosen.
        build: String,
    },
    /// The sandbox stands and the model is being loaded. At least every second while loading.
    Loading {
        /// From 0 to 1.
        progress: f32,
    },
    /// Requests are taken.
    Ready(Ready),
    /// The model cannot be loaded; the child exits.
    LoadFailed {
        /// A sentence for people.
        reason: String,
    },
    /// A request has its slot; its prompt is being computed.
    Started {
        /// Which.
        id: u64,
        /// Tokens of its prompt.
        prompt_tokens: u32,
    },
    /// More text: whole characters.
    Delta {
        /// Which.
        id: u64,
        /// Never logged.
        text: String,
        /// Tokens in it.
        tokens: u32,
    },
    /// The end of a whole answer.
    Done {
        /// Which.
        id: u64,
        /// Why.
        finish: Finish,
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens of the answer, without the one that ends it.
        completion_tokens: u32,
        /// Computing the prompt, in microseconds.
        prompt_us: u64,
        /// Computing the answer, in microseconds.
        generate_us: u64,
    },
    /// The end of an answer that is not whole.
    Error {
        /// Which.
        id: u64,
        /// What kind.
        kind: ErrorKind,
        /// A sentence for people, without text of prompt or answer.
        message: String,
    },
    /// The answer to a ping.
    Pong {
        /// Of the ping.
        nonce: u64,
        /// Requests that have a slot.
        running: u32,
    },
}

impl fmt::Debug for Up {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello { protocol, version, build } => write!(f, "Hello({protocol}, {version}, {build:?})"),
            Self::Loading { progress } => write!(f, "Loading({progress})"),
            Self::Ready(ready) => write!(f, "{ready:?}"),
            Self::LoadFailed { reason } => write!(f, "LoadFailed({reason:?})"),
            Self::Started { id, prompt_tokens } => write!(f, "Started({id}, {prompt_tokens} tokens)"),
            Self::Delta { id, text, tokens } => write!(f, "Delta({id}, {} bytes, {tokens} tokens)", text.len()),
            Self::Done { id, finish, completion_tokens, .. } => write!(f, "Done({id}, {finish:?}, {completion_tokens} tokens)"),
            Self::Error { id, kind, message } => write!(f, "Error({id}, {kind:?}, {message:?})"),
            Self::Pong { nonce, running } => write!(f, "Pong({nonce}, {running})"),
        }
    }
}

/// Why a frame cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream broke, or ended inside a frame.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Longer than the reader takes.
    #[error("a frame of {0} bytes; at most {1} are taken")]
    TooLong(usize, usize),
    /// No frame of this version. Only the place is told: the parser may quote text.
    #[error("not a frame of version {VERSION} (column {0})")]
    Malformed(usize),
}

/// A frame with its length, ready to be written.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn encode(frame: &impl Serialize) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, frame).map_err(|error| FrameError::Malformed(error.column()))?;
    let length = bytes.len() - 4;
    if length > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong(length, MAX_FRAME_BYTES));
    }
    let header = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    bytes[..4].copy_from_slice(&header);
    Ok(bytes)
}

/// The length that a frame announces.
///
/// # Errors
/// [`FrameError::TooLong`] above `limit`.
pub fn length(header: [u8; 4], limit: usize) -> Result<usize, FrameError> {
    let length = u32::from_be_bytes(header) as usize;
    if length > limit { Err(FrameError::TooLong(length, limit)) } else { Ok(length) }
}

/// Reads the body of a frame.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn decode<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, FrameError> {
    serde_json::from_slice(body).map_err(|error| FrameError::Malformed(error.column()))
}

/// Writes one frame to a blocking stream.
///
/// # Errors
/// [`FrameError`].
pub fn write(stream: &mut impl Write, frame: &impl Serialize) -> Result<(), FrameError> {
    Ok(stream.write_all(&encode(frame)?)?)
}

/// Reads one frame from a blocking stream; `None` at its end. `body` is a buffer to be used again.
///
/// # Errors
/// [`FrameError`].
pub fn read<T: for<'a> Deserialize<'a>>(
    stream: &mut impl Read,
    limit: usize,
    body: &mut Vec<u8>,
) -> Result<Option<T>, FrameError> {
    let mut header = [0; 4];
    match stream.read(&mut header)? {
        0 => return Ok(None),
        count => stream.read_exact(&mut header[count..])?,
    }
    body.clear();
    // It grows as bytes arrive, whatever was announced.
    let length = length(header, limit)?;
    if stream.take(length as u64).read_to_end(body)? < length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    decode(body).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round<T: Serialize + for<'a> Deserialize<'a>>(frame: &T) -> T {
        let bytes = encode(frame).unwrap();
        read(&mut bytes.as_slice(), MAX_FRAME_BYTES, &mut Vec::new()).unwrap().unwrap()
    }

    #[test]
    fn frames_read_back() {
        let generate = Down::Generate(Generate {
            id: 7,
            input: Input::Chat(vec![Message { role: "user".to_owned(), text: "2+2\u{1f600}".to_owned() }]),
            max_tokens: Some(5),
            temperature: Some(0.1),
            top_p: None,
            seed: Some(u64::MAX),
            stop: vec!["\n".to_owned()],
        });
        assert_eq!(round(&generate), generate);
        let done =
            Up::Done { id: 7, finish: Finish::Stop, prompt_tokens: 1, completion_tokens: 2, prompt_us: 3, generate_us: u64::MAX };
        assert_eq!(round(&done), done);
    }

    #[test]
    fn a_length_costs_nothing_and_has_a_limit() {
        let at = |length: u32| read::<Down>(&mut [&length.to_be_bytes()[..], b"{}"].concat().as_slice(), 16, &mut Vec::new());
        assert!(matches!(at(17), Err(FrameError::TooLong(17, 16))));
        assert!(matches!(at(16), Err(FrameError::Io(_))));
        assert!(matches!(at(2), Err(FrameError::Malformed(_))));
        assert!(matches!(at(u32::MAX), Err(FrameError::TooLong(..))));
    }

    #[test]
    fn a_cut_frame_and_a_strange_one_are_errors() {
        let bytes = encode(&Down::Shutdown).unwrap();
        for cut in 1..bytes.len() {
            assert!(read::<Down>(&mut &bytes[..cut], MAX_FRAME_BYTES, &mut Vec::new()).is_err());
        }
        assert!(read::<Down>(&mut &b""[..], 16, &mut Vec::new()).unwrap().is_none());
        assert!(decode::<Down>(br#"{"type":"dance"}"#).is_err());
    }

    #[test]
    fn text_never_shows_in_debug_output() {
        let delta = Up::Delta { id: 1, text: "canary".to_owned(), tokens: 1 };
        let raw = Input::Raw("canary".to_owned());
        let message = Message { role: "user".to_owned(), text: "canary".to_owned() };
        assert!(!format!("{delta:?}{raw:?}{message:?}").contains("canary"));
    }
}
