//! One request in its slot: how far its prompt and its answer are.

use std::time::Instant;

use llama_cpp_2::token::LlamaToken;
use opengateway_engine_protocol::{Finish, MAX_UP_FRAME_BYTES, Up};

use crate::prepare::Prepared;
use crate::sampler::Sampler;
use crate::text::Answer;

/// Longest text of a delta: each of its bytes may take six in JSON.
const MAX_DELTA: usize = MAX_UP_FRAME_BYTES / 8;

/// A request that is being computed.
#[derive(Debug)]
pub struct Sequence {
    /// Of the request.
    pub id: u64,
    /// Chooses its tokens.
    pub sampler: Sampler,
    prompt: Vec<LlamaToken>,
    /// Tokens of the prompt that are in the cache.
    computed: usize,
    /// The last token of the answer, not in the cache yet.
    last: Option<LlamaToken>,
    answer: Answer,
    tokens: u32,
    max_tokens: u32,
    /// Tokens that no delta told of yet.
    untold: u32,
    begun: Instant,
    prompt_done: Option<Instant>,
}

impl Sequence {
    /// Begins.
    pub fn new(prepared: Prepared) -> Self {
        Self {
            id: prepared.id,
            sampler: Sampler::new(prepared.settings),
            prompt: prepared.prompt,
            computed: 0,
            last: None,
            answer: Answer::new(prepared.stops),
            tokens: 0,
            max_tokens: prepared.max_tokens,
            untold: 0,
            begun: Instant::now(),
            prompt_done: None,
        }
    }

    /// The frame that says so.
    pub fn started(&self) -> Up {
        Up::Started { id: self.id, prompt_tokens: count(self.prompt.len()) }
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    /// Tokens of the prompt that are still to be computed.
    pub fn prompt_left(&self) -> usize {
        self.prompt.len() - self.computed
    }

    /// The next tokens of the prompt with the place of the first, at most so many.
    pub fn take_prompt(&mut self, most: usize) -> (usize, &[LlamaToken]) {
        let first = self.computed;
        self.computed = (first + most).min(self.prompt.len());
        (first, &self.prompt[first..self.computed])
    }

    /// What was taken from this place on is not computed after all.
    pub fn take_back(&mut self, first: usize) {
        self.computed = self.computed.min(first);
    }

    /// The last token of the answer and its place, when the prompt is done.
    pub fn next_input(&self) -> Option<(LlamaToken, usize)> {
        let before = self.prompt.len() + self.tokens as usize;
        self.last.map(|token| (token, before.saturating_sub(1)))
    }

    /// Whether nothing may be answered.
    pub fn is_spent(&self) -> bool {
        self.tokens >= self.max_tokens
    }

    /// The prompt is computed.
    pub fn prompt_computed(&mut self) {
        self.prompt_done.get_or_insert_with(Instant::now);
    }

    /// Takes the next token of the answer. Its text goes to `tell`; says whether the answer ends with it.
    pub fn push(&mut self, token: LlamaToken, bytes: &[u8], tell: impl FnMut(Up)) -> Option<Finish> {
        self.tokens += 1;
        self.untold += 1;
        self.last = Some(token);
        let text = self.answer.push(bytes);
        self.tell(&text, tell);
        if self.answer.stopped() {
            Some(Finish::Stop)
        } else if self.is_spent() {
            Some(Finish::Length)
        } else {
            None
        }
    }

    /// Tells the rest and the end.
    pub fn finish(&mut self, finish: Finish, mut tell: impl FnMut(Up)) {
        let rest = self.answer.finish();
        self.tell(&rest, &mut tell);
        let now = Instant::now();
        let prompt_done = self.prompt_done.unwrap_or(now);
        tell(Up::Done {
            id: self.id,
            finish,
            prompt_tokens: count(self.prompt.len()),
            completion_tokens: self.tokens,
            prompt_us: micros(prompt_done - self.begun),
            generate_us: micros(now - prompt_done),
        });
    }

    fn tell(&mut self, text: &str, mut tell: impl FnMut(Up)) {
        let mut rest = text;
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.floor_char_boundary(MAX_DELTA));
            tell(Up::Delta { id: self.id, text: part.to_owned(), tokens: std::mem::take(&mut self.untold) });
            rest = after;
        }
    }
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
