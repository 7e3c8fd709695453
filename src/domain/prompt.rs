//! A prompt, its answer and every way in which it can fail.

use std::fmt;
use std::time::Duration;

/// Longest prompt text in bytes, as a D-Bus argument and inside an `inference_request`.
pub const MAX_PROMPT_BYTES: usize = 1 << 20;
/// Longest whole answer in bytes; more is [`FailureKind::AnswerTooLarge`].
pub const MAX_ANSWER_BYTES: usize = 4 << 20;
/// Default time from asking to the last token.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest time that may be asked for.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(3600);

/// Text of a prompt or an answer. It never reaches a log: its `Debug` tells the length alone.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Text(String);

impl Text {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
    /// The text itself. Callers send it on; they do not log it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// The text itself, owned.
    pub fn into_string(self) -> String {
        self.0
    }
}
impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Text({} bytes)", self.0.len())
    }
}

/// Who said an earlier message of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// The word of the OpenAI API, used on the bus and on the wire too.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }

    /// The role with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::System, Self::User, Self::Assistant].into_iter().find(|role| role.as_str() == name)
    }
}

/// An earlier message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Who said it.
    pub role: Role,
    /// What.
    pub text: Text,
}

/// Earlier messages of one prompt.
pub const MAX_TURNS: usize = 1024;
/// Texts that end an answer.
pub const MAX_STOPS: usize = 16;
/// Bytes of one of them.
pub const MAX_STOP_BYTES: usize = 256;

/// What is asked, wherever it will be answered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ask {
    /// The model wished for; `None` takes the best that somebody serves.
    pub model: Option<String>,
    /// The user's text, the last message of the conversation.
    pub prompt: Text,
    /// Instructions before everything.
    pub system: Option<Text>,
    /// Earlier messages, oldest first, between `system` and `prompt`.
    pub history: Vec<Turn>,
    /// The prompt is text to be continued as it stands, without a chat template; it has no system text and no history.
    pub raw: bool,
    /// Most tokens of the answer.
    pub max_tokens: Option<u32>,
    /// Sampling temperature, 0 to 2.
    pub temperature: Option<f64>,
    /// Nucleus sampling: the least set of tokens with this probability, above 0 to 1.
    pub top_p: Option<f64>,
    /// Seed of the sampler, where the backend has one.
    pub seed: Option<u64>,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<Text>,
}

impl Ask {
    /// Whether a node that knows only the first version of the messages would answer something else than what was asked.
    pub fn needs_version_two(&self) -> bool {
        !self.history.is_empty() || self.raw || self.top_p.is_some() || !self.stop.is_empty()
    }
}

/// Why an answer ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model was done.
    Stop,
    /// `max_tokens` or the context window was reached.
    Length,
}

impl FinishReason {
    /// The word of the OpenAI API, used on the bus and on the wire too.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Tokens counted by the backend's own tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of prompt and system text.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub completion_tokens: u32,
}

/// The end of a whole answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// Why it ended.
    pub finish: FinishReason,
    /// What it took.
    pub usage: Usage,
}

/// A named failure. The names are API, on the bus and between peers: add, never rename.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// No member can serve this.
    NoEligiblePeer,
    /// No member (or not the member asked) has the model.
    ModelUnavailable,
    /// Every queue is full.
    Busy,
    /// The serving node's share for this asker is used up for now.
    QuotaExceeded,
    /// No whole answer before the deadline.
    DeadlineExceeded,
    /// The serving node sent nothing for 10 s.
    Stalled,
    /// The asker did not read for 30 s.
    SlowConsumer,
    /// The answer passed [`MAX_ANSWER_BYTES`].
    AnswerTooLarge,
    /// A relay ended the connection at its own limit.
    RelayLimit,
    /// The inference engine died.
    EngineCrashed,
    /// The inference backend answered with an error.
    BackendFailed,
    /// Every serving node that was tried was lost before its first token.
    PeerLost,
    /// The serving node was lost after the first token.
    Interrupted,
    /// By the asker.
    Cancelled,
    /// The serving node said no: not a member there, or not serving.
    NotAuthorized,
    /// A field of the request is out of range; the detail names it.
    InvalidRequest,
    /// The other side broke the protocol.
    ProtocolError,
    /// This request id was seen before.
    Duplicate,
    /// The node that was asked is stopping.
    ShuttingDown,
    /// The prompt does not fit the model's context window.
    ContextOverflow,
    /// The model is being loaded; the detail says how far it is.
    ModelLoading,
    /// This prompt ended the engine twice and is not tried again.
    PromptQuarantined,
}

impl FailureKind {
    /// Every kind, in the order of the declaration.
    pub const ALL: [Self; 22] = [
        Self::NoEligiblePeer,
        Self::ModelUnavailable,
        Self::Busy,
        Self::QuotaExceeded,
        Self::DeadlineExceeded,
        Self::Stalled,
        Self::SlowConsumer,
        Self::AnswerTooLarge,
        Self::RelayLimit,
        Self::EngineCrashed,
        Self::BackendFailed,
        Self::PeerLost,
        Self::Interrupted,
        Self::Cancelled,
        Self::NotAuthorized,
        Self::InvalidRequest,
        Self::ProtocolError,
        Self::Duplicate,
        Self::ShuttingDown,
        Self::ContextOverflow,
        Self::ModelLoading,
        Self::PromptQuarantined,
    ];

    /// What a node that knows only the first version of the messages calls it.
    pub const fn in_version_one(self) -> Self {
        match self {
            Self::ContextOverflow => Self::InvalidRequest,
            Self::ModelLoading => Self::Busy,
            Self::PromptQuarantined => Self::BackendFailed,
            known => known,
        }
    }

    /// The name on the wire; with the prefix of `api` also the name on the bus.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoEligiblePeer => "NoEligiblePeer",
            Self::ModelUnavailable => "ModelUnavailable",
            Self::Busy => "Busy",
            Self::QuotaExceeded => "QuotaExceeded",
            Self::DeadlineExceeded => "DeadlineExceeded",
            Self::Stalled => "Stalled",
            Self::SlowConsumer => "SlowConsumer",
            Self::AnswerTooLarge => "AnswerTooLarge",
            Self::RelayLimit => "RelayLimit",
            Self::EngineCrashed => "EngineCrashed",
            Self::BackendFailed => "BackendFailed",
            Self::PeerLost => "PeerLost",
            Self::Interrupted => "Interrupted",
            Self::Cancelled => "Cancelled",
            Self::NotAuthorized => "NotAuthorized",
            Self::InvalidRequest => "InvalidRequest",
            Self::ProtocolError => "ProtocolError",
            Self::Duplicate => "Duplicate",
            Self::ShuttingDown => "ShuttingDown",
            Self::ContextOverflow => "ContextOverflow",
            Self::ModelLoading => "ModelLoading",
            Self::PromptQuarantined => "PromptQuarantined",
        }
    }

    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// Whether another member may be tried, as long as no token was delivered.
    pub const fn retries_elsewhere(self) -> bool {
        match self {
            Self::Busy
            | Self::QuotaExceeded
            | Self::Stalled
            | Self::RelayLimit
            | Self::EngineCrashed
            | Self::BackendFailed
            | Self::PeerLost
            | Self::ModelUnavailable
            | Self::ProtocolError
            | Self::NotAuthorized
            | Self::ModelLoading
            | Self::ShuttingDown => true,
            Self::NoEligiblePeer
            | Self::DeadlineExceeded
            | Self::SlowConsumer
            | Self::AnswerTooLarge
            | Self::Interrupted
            | Self::Cancelled
            | Self::InvalidRequest
            | Self::ContextOverflow
            | Self::PromptQuarantined
            | Self::Duplicate => false,
        }
    }
}

/// Why a prompt has no whole answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {detail}", kind.as_str())]
pub struct Failure {
    /// The name.
    pub kind: FailureKind,
    /// A sentence for people, without prompt or answer text.
    pub detail: String,
    /// When to come back, with `Busy` and `QuotaExceeded`.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// A failure without a time to come back.
    pub fn new(kind: FailureKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), retry_after: None }
    }
    /// `Busy`, with when to come back.
    pub fn busy(detail: impl Into<String>, retry_after: Duration) -> Self {
        Self { kind: FailureKind::Busy, detail: detail.into(), retry_after: Some(retry_after) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_text_never_shows_in_debug_output() {
        let ask = Ask { prompt: Text::new("canary"), system: Some(Text::new("canary")), ..Ask::default() };
        assert!(!format!("{ask:?}").contains("canary"));
    }

    #[test]
    fn every_failure_name_reads_back() {
        for kind in FailureKind::ALL {
            assert_eq!(FailureKind::from_name(kind.as_str()), Some(kind));
        }
        assert_eq!(FailureKind::from_name("Nonsense"), None);
    }
}
