//! One prompt on its way through an engine: what the child is told of it, and the buffer between the child and its reader.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use hmac::{Hmac, KeyInit as _, Mac as _};
use opengateway_engine_protocol::{Generate, Input, Message};
use sha2::Sha256;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::quarantine::PromptDigest;
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, MAX_ANSWER_BYTES};

/// Text that may wait for a reader who does not read. The child cannot be told to pause one prompt of several, so the rest
/// of an answer is kept here; the worker gives a reader 30 s, in which a fast model says some 100 KiB.
pub(super) const BUFFER: usize = 1 << 20;
/// What a piece costs besides its text.
const PIECE_COST: usize = 64;

/// What the task is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    /// Answer this.
    Ask(Box<Request>),
    /// Nobody waits for this any more.
    Cancel(u64),
    /// Load the model now.
    Load(oneshot::Sender<Result<(), String>>),
    /// End the child when its prompts have ended.
    Unload(oneshot::Sender<()>),
    /// End the child if it has nothing to do.
    UnloadIfIdle(oneshot::Sender<bool>),
    /// There is memory again for one that had none.
    Memory,
    /// The SHA-256 of the file is known.
    Digest([u8; 32]),
    /// End all of it.
    Stop(Failure, oneshot::Sender<()>),
}

/// What the reader of a prompt is told.
#[derive(Debug)]
pub(super) enum Event {
    /// More text.
    Text(String),
    /// The end.
    End(Result<Done, Failure>),
}

/// A prompt and where its answer goes.
#[derive(Debug)]
pub(super) struct Request {
    pub id: u64,
    pub generate: Generate,
    pub digest: PromptDigest,
    pub deadline: Instant,
    pub answer: Answer,
}

/// The task's end of the buffer.
#[derive(Debug)]
pub(super) struct Answer {
    events: mpsc::UnboundedSender<Event>,
    waiting: Arc<AtomicUsize>,
    said: usize,
}

/// The reader's end.
pub(super) struct Events {
    events: mpsc::UnboundedReceiver<Event>,
    waiting: Arc<AtomicUsize>,
}

impl Request {
    pub(super) fn new(id: u64, ask: &Ask, deadline: Instant) -> (Self, Events) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let answer = Answer { events: sender, waiting: Arc::clone(&waiting), said: 0 };
        let request = Self { id, generate: generate(id, ask), digest: digest(ask), deadline, answer };
        (request, Events { events: receiver, waiting })
    }
}

impl Answer {
    /// Nobody reads any more.
    pub(super) fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Hands text on.
    ///
    /// # Errors
    /// When the answer is to end here: it is too long, or its reader too slow.
    pub(super) fn text(&mut self, text: String) -> Result<(), Failure> {
        self.said += text.len();
        if self.said > MAX_ANSWER_BYTES {
            let detail = format!("the answer passed the limit of {} MiB", MAX_ANSWER_BYTES >> 20);
            return Err(Failure::new(FailureKind::AnswerTooLarge, detail));
        }
        let cost = text.len() + PIECE_COST;
        if self.waiting.fetch_add(cost, Ordering::Relaxed) + cost > BUFFER {
            return Err(Failure::new(FailureKind::SlowConsumer, "the asker is 1 MiB of text behind"));
        }
        let _ = self.events.send(Event::Text(text));
        Ok(())
    }

    pub(super) fn end(self, outcome: Result<Done, Failure>) {
        let _ = self.events.send(Event::End(outcome));
    }
}

impl Events {
    pub(super) async fn recv(&mut self) -> Event {
        let event = self.events.recv().await;
        self.took(event)
    }

    fn took(&self, event: Option<Event>) -> Event {
        if let Some(Event::Text(text)) = &event {
            self.waiting.fetch_sub(text.len() + PIECE_COST, Ordering::Relaxed);
        }
        // Its task ended: the daemon stops, or the task panicked.
        event.unwrap_or_else(|| Event::End(Err(Failure::new(FailureKind::ShuttingDown, "the engine was ended"))))
    }

    /// Joins to `text` what already waits, up to `limit` bytes; gives back what cannot be joined.
    pub(super) fn join(&mut self, text: &mut String, limit: usize) -> Option<Event> {
        while text.len() < limit {
            let Ok(event) = self.events.try_recv() else { return None };
            match self.took(Some(event)) {
                Event::Text(more) if text.len() + more.len() <= limit => text.push_str(&more),
                other => return Some(other),
            }
        }
        None
    }
}

fn messages(ask: &Ask) -> impl Iterator<Item = (&'static str, &str)> {
    let system = ask.system.iter().map(|text| ("system", text.as_str()));
    let history = ask.history.iter().map(|turn| (turn.role.as_str(), turn.text.as_str()));
    system.chain(history).chain([("user", ask.prompt.as_str())])
}

fn generate(id: u64, ask: &Ask) -> Generate {
    let input = if ask.raw {
        Input::Raw(ask.prompt.as_str().to_owned())
    } else {
        Input::Chat(messages(ask).map(|(role, text)| Message { role: role.to_owned(), text: text.to_owned() }).collect())
    };
    Generate {
        id,
        input,
        max_tokens: ask.max_tokens,
        temperature: ask.temperature,
        top_p: ask.top_p,
        seed: ask.seed,
        stop: ask.stop.iter().map(|text| text.as_str().to_owned()).collect(),
    }
}

/// Names a prompt without telling it: a keyed hash whose key nobody knows and which ends with the process. Sampling is not
/// in it: whoever changes the seed does not get another try.
fn digest(ask: &Ask) -> PromptDigest {
    static KEY: OnceLock<[u8; 32]> = OnceLock::new();
    let key = KEY.get_or_init(|| {
        let mut key = [0; 32];
        // Without randomness the daemon has no identity either and does not get here.
        let _ = getrandom::fill(&mut key);
        key
    });
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return PromptDigest([0; 16]) };
    mac.update(&[u8::from(ask.raw)]);
    for (role, text) in messages(ask) {
        mac.update(role.as_bytes());
        mac.update(&(text.len() as u64).to_be_bytes());
        mac.update(text.as_bytes());
    }
    let whole = mac.finalize().into_bytes();
    let mut short = [0; 16];
    short.copy_from_slice(&whole[..16]);
    PromptDigest(short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::prompt::{Role, Text, Turn};

    fn ask(prompt: &str) -> Ask {
        Ask { prompt: Text::new(prompt), ..Ask::default() }
    }

    #[test]
    fn a_digest_is_that_of_the_text_and_of_nothing_else() {
        let same = Ask { seed: Some(7), max_tokens: Some(3), ..ask("a") };
        assert_eq!(digest(&ask("a")), digest(&same));
        assert_ne!(digest(&ask("a")), digest(&ask("b")));
        assert_ne!(digest(&ask("a")), digest(&Ask { raw: true, ..ask("a") }));
        assert_ne!(
            digest(&Ask { system: Some(Text::new("ab")), ..ask("c") }),
            digest(&Ask { system: Some(Text::new("a")), ..ask("bc") })
        );
    }

    #[test]
    fn a_conversation_keeps_its_order() {
        let history = vec![Turn { role: Role::User, text: Text::new("1") }, Turn { role: Role::Assistant, text: Text::new("2") }];
        let generate = generate(1, &Ask { system: Some(Text::new("0")), history, ..ask("3") });
        let Input::Chat(messages) = generate.input else { panic!("{generate:?}") };
        let said: Vec<(&str, &str)> = messages.iter().map(|message| (message.role.as_str(), message.text.as_str())).collect();
        assert_eq!(said, [("system", "0"), ("user", "1"), ("assistant", "2"), ("user", "3")]);
    }

    #[tokio::test]
    async fn a_reader_who_does_not_read_is_given_up_at_the_limit_and_not_before() {
        let (mut request, mut events) = Request::new(1, &ask("a"), Instant::now());
        let most = BUFFER - PIECE_COST;
        request.answer.text("x".repeat(most)).unwrap();
        assert_eq!(request.answer.text(String::new()).unwrap_err().kind, FailureKind::SlowConsumer);
        let (mut request, mut again) = Request::new(1, &ask("a"), Instant::now());
        for _ in 0..4 {
            // Who reads has no such limit, but that of the whole answer.
            request.answer.text("x".repeat(most)).unwrap();
            assert!(matches!(again.recv().await, Event::Text(text) if text.len() == most));
        }
        assert_eq!(request.answer.text("x".repeat(most)).unwrap_err().kind, FailureKind::AnswerTooLarge);
        assert!(matches!(events.recv().await, Event::Text(_)));
    }

    #[tokio::test]
    async fn what_waits_is_joined_and_nothing_is_lost_or_reordered() {
        let (mut request, mut events) = Request::new(1, &ask("a"), Instant::now());
        for word in ["one ", "two ", "three ", "four"] {
            request.answer.text(word.to_owned()).unwrap();
        }
        request.answer.end(Err(Failure::new(FailureKind::EngineCrashed, "x")));
        let Event::Text(mut text) = events.recv().await else { panic!() };
        let Some(Event::Text(next)) = events.join(&mut text, 10) else { panic!() };
        assert_eq!((text.as_str(), next.as_str()), ("one two ", "three "));
        let mut text = next;
        assert!(matches!(events.join(&mut text, 100), Some(Event::End(_))));
        assert_eq!((text.as_str(), events.waiting.load(Ordering::Relaxed)), ("three four", 0));
    }
}
