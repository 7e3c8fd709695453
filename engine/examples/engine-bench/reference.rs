//! Plain llama.cpp as its own examples use it: one batch for a prompt, then one for each round of tokens.

use std::num::NonZeroU32;
use std::path::Path;
use std::time::Instant;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::{LlamaBackend, load_backends_from_path};
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;

use crate::{Run, cpu_time, text};

/// Most tokens of a batch, as llama.cpp has it by default.
const BATCH: u32 = 2048;

/// A loaded model.
#[derive(Debug)]
pub struct Reference {
    model: &'static LlamaModel,
    context: LlamaContext<'static>,
    streams: u32,
    next: usize,
}

fn backend() -> &'static LlamaBackend {
    static BACKEND: std::sync::OnceLock<LlamaBackend> = std::sync::OnceLock::new();
    BACKEND.get_or_init(|| {
        let mut backend = LlamaBackend::init().expect("nobody else starts it");
        backend.void_logs();
        backend
    })
}

fn words<E: std::fmt::Display>(error: E) -> String {
    error.to_string()
}

impl Reference {
    /// Loads with llama.cpp's own settings but for what is compared.
    pub fn new(model: &Path, kernels: &Path, streams: u32, threads: u32, window: usize) -> Result<Self, String> {
        static KERNELS: std::sync::Once = std::sync::Once::new();
        KERNELS.call_once(|| load_backends_from_path(kernels));
        let backend = backend();
        let model = LlamaModel::load_from_file(backend, model, &LlamaModelParams::default()).map_err(words)?;
        let model = &*Box::leak(Box::new(model));
        let threads = i32::try_from(threads).map_err(words)?;
        let window = u32::try_from(window).map_err(words)?.next_multiple_of(256);
        let parameters = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(window * streams))
            .with_n_seq_max(streams)
            .with_n_batch(BATCH)
            .with_n_threads(threads)
            .with_n_threads_batch(threads);
        let context = model.new_context(backend, parameters).map_err(words)?;
        Ok(Self { model, context, streams, next: 0 })
    }

    /// One run of all streams.
    pub fn run(&mut self, prompt: usize, generate: u32) -> Result<Run, String> {
        self.context.clear_kv_cache();
        let prompts: Vec<_> = (0..self.streams as usize).map(|stream| self.tokens(&text(self.next + stream, prompt))).collect();
        self.next += self.streams as usize;
        let (begun, cpu) = (Instant::now(), cpu_time(std::process::id()));
        let mut last = self.prompts(&prompts)?;
        let prompt = begun.elapsed();
        let mut tokens = 0;
        let mut batch = LlamaBatch::new(self.streams as usize, 1);
        let mut sampler = LlamaSampler::greedy();
        for step in 1..generate {
            batch.clear();
            for ((stream, token), prompt) in (0..).zip(&last).zip(&prompts) {
                let place = i32::try_from(prompt.len()).map_err(words)? + i32::try_from(step).map_err(words)? - 1;
                batch.add(*token, place, &[stream], true).map_err(words)?;
            }
            self.context.decode(&mut batch).map_err(words)?;
            for (stream, token) in (0..).zip(&mut last) {
                *token = sampler.sample(&self.context, stream);
            }
            tokens += last.len();
        }
        let generate = begun.elapsed() - prompt;
        let cpu = cpu_time(std::process::id()) - cpu;
        Ok(Run { prompt, generate, prompt_tokens: prompts.iter().map(Vec::len).sum(), tokens, cpu })
    }

    /// "What is 2+2?" as the demo model was taught to hear it.
    pub fn answer(&mut self, most: u32) -> Result<String, String> {
        let question = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n";
        let prompt = self.model.vocab().tokenize(question.as_bytes(), false, true);
        let mut token = self.prompts(std::slice::from_ref(&prompt))?[0];
        let (mut sampler, mut batch, mut answer) = (LlamaSampler::greedy(), LlamaBatch::new(1, 1), Vec::new());
        for place in (i32::try_from(prompt.len()).map_err(words)?..).take(most as usize) {
            if self.model.vocab().is_eog(token) {
                break;
            }
            self.model.vocab().token_to_piece_into(token, &mut answer, false, None);
            batch.clear();
            batch.add(token, place, &[0], true).map_err(words)?;
            self.context.decode(&mut batch).map_err(words)?;
            token = sampler.sample(&self.context, 0);
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    fn tokens(&self, text: &str) -> Vec<LlamaToken> {
        self.model.vocab().tokenize(text.as_bytes(), true, false)
    }

    /// Computes all prompts in as few batches as they fit into; the first token of each answer.
    fn prompts(&mut self, prompts: &[Vec<LlamaToken>]) -> Result<Vec<LlamaToken>, String> {
        let mut batch = LlamaBatch::new(BATCH as usize, 1);
        let (mut first, mut ends) = (Vec::new(), Vec::new());
        let mut sampler = LlamaSampler::greedy();
        for (stream, prompt) in (0..).zip(prompts) {
            if batch.n_tokens().unsigned_abs() as usize + prompt.len() > BATCH as usize {
                self.context.decode(&mut batch).map_err(words)?;
                first.extend(ends.drain(..).map(|end| sampler.sample(&self.context, end)));
                batch.clear();
            }
            for (place, token) in (0..).zip(prompt) {
                batch.add(*token, place, &[stream], place as usize + 1 == prompt.len()).map_err(words)?;
            }
            ends.push(batch.n_tokens() - 1);
        }
        self.context.decode(&mut batch).map_err(words)?;
        first.extend(ends.drain(..).map(|end| sampler.sample(&self.context, end)));
        Ok(first)
    }
}
