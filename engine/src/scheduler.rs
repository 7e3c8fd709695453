//! The loop that computes: all slots in one batch, a token of each answer and a chunk of the prompts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::llama_batch::{BatchAddError, LlamaBatch};
use llama_cpp_2::model::LlamaModel;
use opengateway_engine_protocol::{ErrorKind, Finish, Up};

use crate::connection::{Output, append};
use crate::prepare::Prepared;
use crate::process::{Exit, exit};
use crate::requests::Requests;
use crate::sequence::Sequence;

/// Most tokens of prompts in a batch.
pub const MAX_CHUNK: u32 = 512;
/// Prompts alone while all slots are taken: nobody can come. A cancel stops the batch between two operations, which must not be
/// too large for that.
const FULL_HOUSE: Chunks = Chunks { least: 64, time: Duration::from_secs(30) };
/// Prompts alone, where small batches cost: with chunks of 256 tokens a model of 360 million parameters computes 120 tokens in a
/// second of a processor, with 128 115, with 64 106, with 32 90. A cancel stops the batch in the middle, so it only must not
/// keep a newcomer waiting for long.
const ALONE: Chunks = Chunks { least: 64, time: Duration::from_millis(2500) };
/// Prompts beside answers, which stand still for as long as the batch takes; and where a cancel waits for it.
const BESIDE_ANSWERS: Chunks = Chunks { least: 32, time: Duration::from_millis(500) };
/// Batches that may fail one after another before the process gives up.
const MAX_FAILURES: u32 = 3;

/// Computes for ever.
#[derive(Debug)]
pub struct Scheduler {
    model: &'static LlamaModel,
    context: LlamaContext<'static>,
    requests: Arc<Requests>,
    output: Arc<Output>,
    slots: Vec<Option<Sequence>>,
    batch: LlamaBatch<'static>,
    /// Tokens of prompts in a second.
    rate: f64,
    /// The slot whose prompt comes first in the next batch.
    turn: usize,
    /// Whether the model forgets the last tokens of a slot alone; a state that every token changes cannot.
    can_take_back: bool,
    /// The last batch was stopped for one of its requests.
    stopped: bool,
    failures: u32,
    /// Frames of this step, sent together.
    frames: Vec<u8>,
    piece: Vec<u8>,
}

/// What a batch holds of one slot.
#[derive(Debug)]
struct Part {
    slot: usize,
    /// Where in the slot its first token belongs.
    first: usize,
    /// Where in the batch the logits will lie for the next token of the answer.
    logits: Option<i32>,
}

/// What a batch holds.
#[derive(Debug, Default)]
struct Content {
    parts: Vec<Part>,
    /// There are tokens of prompts in it.
    prompts: bool,
    /// And as many as there may be.
    full: bool,
}

impl Scheduler {
    /// With `slots` slots.
    pub fn new(
        model: &'static LlamaModel,
        context: LlamaContext<'static>,
        slots: u32,
        requests: Arc<Requests>,
        output: Arc<Output>,
    ) -> Self {
        Self {
            model,
            context,
            requests,
            output,
            slots: (0..slots).map(|_| None).collect(),
            batch: LlamaBatch::new((MAX_CHUNK + slots) as usize, 1),
            rate: 0.0,
            turn: 0,
            can_take_back: !model.is_recurrent() && !model.is_hybrid(),
            stopped: false,
            failures: 0,
            frames: Vec::new(),
            piece: Vec::new(),
        }
    }

    /// The loop.
    pub fn run(mut self) -> ! {
        loop {
            let orders = self.requests.orders(self.slots.iter().all(Option::is_none));
            for prepared in orders.begin {
                self.begin(prepared);
            }
            for id in orders.cancel {
                if let Some(slot) = self.slot_of(id) {
                    self.end(slot, Finish::Cancelled);
                }
            }
            // Nobody waits a whole batch to hear that a request has begun or was cancelled.
            self.tell();
            self.step();
            self.tell();
        }
    }

    fn tell(&mut self) {
        if !self.frames.is_empty() {
            self.output.write(&self.frames);
            self.frames.clear();
        }
    }

    fn slot_of(&self, id: u64) -> Option<usize> {
        self.slots.iter().position(|slot| slot.as_ref().is_some_and(|sequence| sequence.id == id))
    }

    fn begin(&mut self, prepared: Prepared) {
        // As many are admitted as there are slots.
        let Some(slot) = self.slots.iter().position(Option::is_none) else { exit(Exit::Fault) };
        let sequence = Sequence::new(prepared);
        append(&mut self.frames, &sequence.started());
        let spent = sequence.is_spent();
        self.slots[slot] = Some(sequence);
        if spent {
            self.end(slot, Finish::Length);
        }
    }

    /// Computes one batch and takes a token for every answer.
    fn step(&mut self) {
        let Ok(content) = self.fill() else { exit(Exit::Fault) };
        if self.batch.n_tokens() == 0 {
            return;
        }
        // Never twice in a row: who cancels all the time must not keep the others from getting on.
        let stops_for_one = content.prompts && self.can_take_back && !self.stopped;
        self.requests.computing(self.slots.iter().flatten().map(|sequence| sequence.id), stops_for_one);
        let before = Instant::now();
        let computed = self.context.decode(&mut self.batch);
        let aborted = self.requests.aborted();
        self.stopped = aborted && computed.is_err();
        match computed {
            Err(_) if aborted && stops_for_one => return self.take_back(&content.parts),
            // Each of them was cancelled; the next orders end them.
            Err(_) if aborted => return,
            Err(error) => return self.fail(&format!("llama.cpp cannot compute: {error}")),
            Ok(()) => self.failures = 0,
        }
        if content.full {
            self.context.synchronize();
            self.learn(self.batch.n_tokens().unsigned_abs(), before.elapsed());
        }
        for part in content.parts {
            if let Some(place) = part.logits {
                self.sample(part.slot, place);
            }
        }
    }

    /// The batch was stopped: what it held of those that go on is computed again.
    fn take_back(&mut self, parts: &[Part]) {
        for part in parts {
            let Some(sequence) = self.slots[part.slot].as_mut() else { continue };
            sequence.take_back(part.first);
            let (slot, first) = (small(part.slot).unsigned_abs(), small(part.first).unsigned_abs());
            if !matches!(self.context.clear_kv_cache_seq(Some(slot), Some(first), None), Ok(true)) {
                self.abandon(part.slot, "llama.cpp does not forget a batch that was stopped");
            }
        }
    }

    /// The next batch.
    fn fill(&mut self) -> Result<Content, BatchAddError> {
        self.batch.clear();
        let mut content = Content::default();
        for (slot, sequence) in self.slots.iter().enumerate() {
            let Some((token, first)) = sequence.as_ref().and_then(Sequence::next_input) else { continue };
            content.parts.push(Part { slot, first, logits: Some(self.batch.n_tokens()) });
            self.batch.add(token, small(first), &[small(slot)], true)?;
        }
        self.fill_prompts(&mut content)?;
        Ok(content)
    }

    /// A fair share of the chunk for every prompt; what one does not need goes to the next.
    fn fill_prompts(&mut self, content: &mut Content) -> Result<(), BatchAddError> {
        let count = self.slots.len();
        let left = |slot: &Option<Sequence>| slot.as_ref().map_or(0, Sequence::prompt_left);
        let mut prompts = self.slots.iter().filter(|slot| left(slot) > 0).count();
        let stops_for_none = self.stopped || (prompts > 1 && !self.can_take_back);
        let mut budget = match content.parts.is_empty() && !stops_for_none {
            true if self.slots.iter().all(Option::is_some) => FULL_HOUSE.size(self.rate),
            true => ALONE.size(self.rate),
            false => BESIDE_ANSWERS.size(self.rate),
        } as usize;
        for slot in (0..count).map(|offset| (self.turn + offset) % count) {
            let Some(sequence) = self.slots[slot].as_mut().filter(|sequence| sequence.prompt_left() > 0) else { continue };
            let whole = sequence.prompt_tokens();
            let (first, tokens) = sequence.take_prompt((budget / prompts).max(1).min(budget));
            // Only what comes after the very last token is of interest.
            let last = first + tokens.len() == whole;
            for (place, token) in tokens.iter().enumerate() {
                self.batch.add(*token, small(first + place), &[small(slot)], last && place + 1 == tokens.len())?;
            }
            content.parts.push(Part { slot, first, logits: last.then(|| self.batch.n_tokens() - 1) });
            content.prompts = true;
            budget -= tokens.len();
            prompts -= 1;
            if budget == 0 {
                content.full = true;
                self.turn = (slot + 1) % count;
                break;
            }
        }
        Ok(())
    }

    /// Learns from a full batch: a small one says little about a large one.
    fn learn(&mut self, tokens: u32, elapsed: Duration) {
        let rate = f64::from(tokens) / elapsed.as_secs_f64().max(1e-6);
        self.rate = if self.rate == 0.0 { rate } else { (self.rate + rate) / 2.0 };
    }

    fn sample(&mut self, slot: usize, place: i32) {
        let Some(sequence) = self.slots[slot].as_mut() else { return };
        sequence.prompt_computed();
        let Some(token) = sequence.sampler.next(&self.context, place) else {
            return self.abandon(slot, "the model computed something that is no number");
        };
        let vocabulary = self.model.vocab();
        if vocabulary.is_eog(token) {
            return self.end(slot, Finish::Stop);
        }
        self.piece.clear();
        vocabulary.token_to_piece_into(token, &mut self.piece, false, None);
        if let Some(finish) = sequence.push(token, &self.piece, |frame| append(&mut self.frames, &frame)) {
            self.end(slot, finish);
        }
    }

    fn end(&mut self, slot: usize, finish: Finish) {
        let Some(mut sequence) = self.vacate(slot) else { return };
        sequence.finish(finish, |frame| append(&mut self.frames, &frame));
    }

    fn abandon(&mut self, slot: usize, message: &str) {
        let Some(sequence) = self.vacate(slot) else { return };
        append(&mut self.frames, &Up::Error { id: sequence.id, kind: ErrorKind::Internal, message: message.to_owned() });
    }

    /// Frees a slot before anyone is told.
    fn vacate(&mut self, slot: usize) -> Option<Sequence> {
        let sequence = self.slots[slot].take()?;
        self.requests.release(sequence.id);
        let number = u32::try_from(slot).unwrap_or(u32::MAX);
        if !matches!(self.context.clear_kv_cache_seq(Some(number), None, None), Ok(true)) {
            eprintln!("opengateway-engine: llama.cpp does not clear a slot");
            exit(Exit::Fault);
        }
        Some(sequence)
    }

    /// No slot of the batch can be trusted.
    fn fail(&mut self, message: &str) {
        for slot in 0..self.slots.len() {
            self.abandon(slot, message);
        }
        self.failures += 1;
        if self.failures >= MAX_FAILURES {
            self.output.write(&self.frames);
            exit(Exit::Fault);
        }
    }
}

/// Places and slots are bounded by the context window and the number of slots.
fn small(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// How many tokens of prompts one batch takes.
#[derive(Debug)]
struct Chunks {
    /// However slow the model is, and while its speed is not known.
    least: u32,
    /// Above that, and up to the most that a batch takes, it takes about this long.
    time: Duration,
}

impl Chunks {
    /// For a model of so many tokens a second. Whole multiples of the least, so that batches have few different shapes.
    fn size(&self, rate: f64) -> u32 {
        // Between the two bounds, so it fits.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let tokens = (rate * self.time.as_secs_f64()).min(f64::from(MAX_CHUNK)) as u32;
        (tokens / self.least * self.least).clamp(self.least, MAX_CHUNK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_as_large_as_the_model_is_fast() {
        let of = |chunks: &Chunks| [0.0, 40.0, 120.0, 1e9, f64::INFINITY].map(|rate| chunks.size(rate));
        assert_eq!(of(&FULL_HOUSE), [64, 512, 512, 512, 512]);
        assert_eq!(of(&ALONE), [64, 64, 256, 512, 512]);
        assert_eq!(of(&BESIDE_ANSWERS), [32, 32, 32, 512, 512]);
    }
}
