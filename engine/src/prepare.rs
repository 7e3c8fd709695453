//! From a request to tokens: checked, rendered, tokenized, by a thread of its own so that a long text holds up no other answer.

use std::hash::{BuildHasher, RandomState};
use std::sync::mpsc::Receiver;
use std::thread;

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use opengateway_engine_protocol::{
    ErrorKind, Generate, Input, MAX_MESSAGES, MAX_PROMPT_BYTES, MAX_STOP_BYTES, MAX_STOPS, Message, Up,
};

use crate::connection::Output;
use crate::requests::Requests;
use crate::sampler::Settings;
use crate::template::Template;
use crate::vocabulary::{self, Specials};

/// A request that can be computed. It prints nothing of the prompt.
#[derive(Debug)]
pub struct Prepared {
    /// Of the request.
    pub id: u64,
    /// At least one, and fewer than the context window.
    pub prompt: Vec<LlamaToken>,
    /// Most tokens of the answer.
    pub max_tokens: u32,
    /// How tokens are chosen.
    pub settings: Settings,
    /// Texts that end the answer.
    pub stops: Vec<String>,
}

/// A text of at most this many bytes is read with the stack that every thread has.
const SHORT_BYTES: usize = 2 << 10;
/// Stack for a longer one: what every thread has, and for each byte twice what was measured (350 MB for 1 MiB of one letter).
const STACK_BYTES: usize = 2 << 20;
const STACK_PER_BYTE: usize = 700;

type Refusal = (ErrorKind, String);

/// Prepares requests.
#[derive(Debug)]
pub struct Preparer {
    model: &'static LlamaModel,
    template: Template,
    specials: Specials,
    context: u32,
}

impl Preparer {
    /// For this model, whose slots have `context` tokens each.
    pub fn new(model: &'static LlamaModel, template: Template, specials: Specials, context: u32) -> Self {
        Self { model, template, specials, context }
    }

    /// Works for as long as requests come.
    pub fn serve(&self, incoming: &Receiver<Generate>, requests: &Requests, output: &Output) {
        for request in incoming {
            let id = request.id;
            match self.prepare(request) {
                Ok(prepared) => requests.deliver(prepared),
                Err((kind, message)) => {
                    requests.release(id);
                    output.send(&Up::Error { id, kind, message });
                }
            }
        }
    }

    fn prepare(&self, request: Generate) -> Result<Prepared, Refusal> {
        check(&request).map_err(|message| (ErrorKind::Invalid, message))?;
        let settings = Settings::new(&request, RandomState::new().hash_one(request.id));
        let mut stops = request.stop;
        let prompt = match request.input {
            Input::Raw(text) => with_stack_for(&text, || vocabulary::tokenize_raw(self.model, &text))?,
            Input::Chat(messages) => {
                stops.extend(self.template.stops().iter().map(ToString::to_string));
                let text = self.render(messages)?;
                with_stack_for(&text, || vocabulary::tokenize_chat(self.model, &text))?
            }
        };
        if prompt.is_empty() {
            return Err((ErrorKind::Invalid, "the prompt is empty".to_owned()));
        }
        let room = room(prompt.len(), self.context)?;
        Ok(Prepared { id: request.id, prompt, max_tokens: request.max_tokens.unwrap_or(room).min(room), settings, stops })
    }

    fn render(&self, messages: Vec<Message>) -> Result<String, Refusal> {
        let neutral = |message: Message| Message { text: self.specials.neutralise(&message.text), ..message };
        let messages: Vec<_> = messages.into_iter().map(neutral).collect();
        self.template.render(&messages).map_err(|message| (ErrorKind::Invalid, message))
    }
}

/// Runs `work` with a stack for a text of this length. The regular expressions of some vocabularies recurse in llama.cpp for
/// every character of a match, some 350 bytes each: ten thousand equal letters overflow an ordinary stack, and so end the
/// process. The pages are given back with the thread.
fn with_stack_for<T: Send>(text: &str, work: impl FnOnce() -> T + Send) -> Result<T, Refusal> {
    if text.len() <= SHORT_BYTES {
        return Ok(work());
    }
    let failed = || (ErrorKind::Internal, "there is no memory to read so long a prompt".to_owned());
    thread::scope(|scope| {
        let reading = thread::Builder::new().stack_size(STACK_BYTES + text.len() * STACK_PER_BYTE).spawn_scoped(scope, work);
        reading.map_err(|_| failed())?.join().map_err(|_| failed())
    })
}

/// Tokens that an answer may have after a prompt of so many.
fn room(prompt: usize, context: u32) -> Result<u32, Refusal> {
    let room = u32::try_from(prompt).ok().and_then(|prompt| context.checked_sub(prompt)).filter(|room| *room > 0);
    room.ok_or_else(|| {
        let message = format!("the prompt has {prompt} tokens; the context window has {context}, one at least for the answer");
        (ErrorKind::ContextOverflow, message)
    })
}

fn check(request: &Generate) -> Result<(), String> {
    let (messages, bytes) = match &request.input {
        Input::Raw(text) => (1, text.len()),
        Input::Chat(messages) => (messages.len(), messages.iter().map(|message| message.text.len()).sum()),
    };
    if messages == 0 {
        return Err("the conversation has no message".to_owned());
    }
    if messages > MAX_MESSAGES {
        return Err(format!("the conversation has {messages} messages; at most {MAX_MESSAGES} are taken"));
    }
    if bytes > MAX_PROMPT_BYTES {
        return Err(format!("the prompt has {bytes} bytes; at most {MAX_PROMPT_BYTES} are taken"));
    }
    if request.stop.len() > MAX_STOPS {
        return Err(format!("there are {} stop texts; at most {MAX_STOPS} are taken", request.stop.len()));
    }
    match request.stop.iter().map(String::len).find(|length| !(1..=MAX_STOP_BYTES).contains(length)) {
        Some(length) => Err(format!("a stop text has {length} bytes; it needs 1 to {MAX_STOP_BYTES}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(input: Input, stop: Vec<String>) -> Generate {
        Generate { id: 1, input, max_tokens: None, temperature: None, top_p: None, seed: None, stop }
    }

    fn raw(stop: Vec<String>) -> Generate {
        request(Input::Raw("x".to_owned()), stop)
    }

    #[test]
    fn every_bound_holds_at_the_limit_and_refuses_one_past_it() {
        let message = Message { role: "user".to_owned(), text: "x".to_owned() };
        let talk = |count| request(Input::Chat(vec![message.clone(); count]), Vec::new());
        assert!(check(&talk(MAX_MESSAGES)).is_ok());
        assert!(check(&talk(MAX_MESSAGES + 1)).unwrap_err().contains("1025 messages"));
        assert!(check(&talk(0)).is_err());
        let text = |bytes| request(Input::Raw("x".repeat(bytes)), Vec::new());
        assert!(check(&text(MAX_PROMPT_BYTES)).is_ok());
        assert!(check(&text(MAX_PROMPT_BYTES + 1)).unwrap_err().contains("1048577 bytes"));
        assert!(check(&raw(vec!["x".to_owned(); MAX_STOPS])).is_ok());
        assert!(check(&raw(vec!["x".to_owned(); MAX_STOPS + 1])).is_err());
        assert!(check(&raw(vec!["x".repeat(MAX_STOP_BYTES)])).is_ok());
        assert!(check(&raw(vec!["x".repeat(MAX_STOP_BYTES + 1)])).is_err());
        assert!(check(&raw(vec![String::new()])).is_err());
    }

    #[test]
    fn an_answer_needs_room_for_one_token() {
        assert_eq!(room(511, 512), Ok(1));
        assert_eq!(room(1, 512), Ok(511));
        let (kind, message) = room(512, 512).unwrap_err();
        assert_eq!(kind, ErrorKind::ContextOverflow);
        assert!(message.contains("512 tokens"), "{message}");
        assert!(room(usize::MAX, 512).unwrap_err().1.contains("window has 512"));
    }
}
