//! Loads the model: numbers within their bounds, progress told, and what it really took.

use std::ffi::c_void;
use std::fs;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;
use opengateway_engine_protocol::{Load, MAX_SLOTS, Ready};

use crate::kernels::Kernels;
use crate::process::MemoryGauge;
use crate::scheduler::MAX_CHUNK;
use crate::template::{Facts, Template};
use crate::vocabulary::{self, Specials};
use crate::{cpu, log, requests};

/// Largest context window of a slot, whatever the file says.
const MAX_CONTEXT: u32 = 1 << 24;
/// Kinds of models that compute, but answer nothing.
const ANSWERLESS: &[&str] = &["bert", "clip", "t5encoder", "wavtokenizer", "gemma-embedding", "llama-embed"];

/// What is to be loaded, checked before the sandbox closes.
#[derive(Debug)]
pub struct Plan {
    load: Load,
    path: PathBuf,
    threads: u32,
    memory: MemoryGauge,
}

/// A model that is ready to answer.
#[derive(Debug)]
pub struct Loaded {
    /// Lives as long as the process.
    pub model: &'static LlamaModel,
    /// Computes.
    pub context: LlamaContext<'static>,
    /// Renders conversations.
    pub template: Template,
    /// What users may not write.
    pub specials: Specials,
    /// What the daemon is told.
    pub ready: Ready,
}

impl Plan {
    /// Checks what was asked.
    ///
    /// # Errors
    /// A sentence.
    pub fn new(load: Load) -> Result<Self, String> {
        let path = PathBuf::from(&load.path);
        if !path.is_absolute() {
            return Err(format!("{} is no absolute path", path.display()));
        }
        let meta = fs::metadata(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        if !meta.is_file() {
            return Err(format!("{} is no file", path.display()));
        }
        let threads = cpu::threads(load.threads, cpu::usable(), meta.len());
        Ok(Self { load, path, threads, memory: MemoryGauge::open() })
    }

    /// The one file that is read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Loads it, in the sandbox.
    ///
    /// # Errors
    /// A sentence.
    pub fn load(self, kernels: &Kernels, progress: impl FnMut(f32) -> bool + 'static) -> Result<Loaded, String> {
        log::loading();
        let before = self.memory.anonymous().unwrap_or(0);
        let backend = LlamaBackend::init().map_err(|error| error.to_string())?;
        let mut parameters = LlamaModelParams::default().with_n_gpu_layers(self.load.gpu_layers);
        if self.load.gpu_layers == 0 {
            // A GPU that computes no layer would hold buffers all the same.
            parameters = parameters.with_devices(&[]).map_err(|error| error.to_string())?;
        }
        let parameters = parameters.with_progress_callback(progress);
        let model = LlamaModel::load_from_file(&backend, &self.path, &parameters).map_err(|_| self.refused())?;
        // The process ends without tidying up: nothing waits for threads of C++.
        let (backend, model) = (&*Box::leak(Box::new(backend)), &*Box::leak(Box::new(model)));
        refuse_answerless(model)?;
        let window = window(&self.load, model.n_ctx_train());
        let slots = self.load.slots.clamp(1, MAX_SLOTS);
        let mut context = self.context(backend, model, window, slots)?;
        warm_up(model, &mut context)?;
        let (template, specials) = self.template(model)?;
        let used = self.memory.anonymous().unwrap_or(0).saturating_sub(before);
        let ready = Ready {
            context: window,
            slots,
            threads: self.threads,
            template: template.name().to_owned(),
            parameters: model.n_params(),
            device: kernels.gpu.clone().filter(|_| self.load.gpu_layers > 0).unwrap_or_else(|| kernels.cpu.clone()),
            memory: used.max(log::buffers()),
        };
        Ok(Loaded { model, context, template, specials, ready })
    }

    fn refused(&self) -> String {
        let file = self.path.file_name().unwrap_or_default().to_string_lossy();
        let hint = if file.contains("-of-") { "; join the parts of a split model with llama-gguf-split --merge" } else { "" };
        format!("llama.cpp does not take {file}: {}{hint}", log::last_error().unwrap_or_else(|| "it gives no reason".to_owned()))
    }

    fn context(
        &self,
        backend: &LlamaBackend,
        model: &'static LlamaModel,
        window: u32,
        slots: u32,
    ) -> Result<LlamaContext<'static>, String> {
        let too_large =
            || format!("{slots} slots of {window} tokens are more than llama.cpp counts; use fewer slots or a smaller context");
        let cells = window.checked_mul(slots).filter(|cells| i32::try_from(*cells).is_ok()).ok_or_else(too_large)?;
        let threads = i32::try_from(self.threads).unwrap_or(1);
        let batch = MAX_CHUNK + slots;
        let gpu = self.load.gpu_layers > 0;
        let parameters = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(cells))
            .with_n_seq_max(slots)
            .with_n_batch(batch)
            // In one go: what is stopped in the middle leaves nothing behind.
            .with_n_ubatch(batch)
            .with_n_threads(threads)
            .with_n_threads_batch(threads)
            // One pass over the weights for all slots, whichever of them are in use.
            .with_kv_unified(true)
            .with_offload_kqv(gpu)
            .with_op_offload(gpu)
            .with_no_perf(true);
        model.new_context(backend, with_abort(parameters, slots)).map_err(|_| {
            let reason = log::last_error().unwrap_or_else(|| "it gives no reason".to_owned());
            format!("no memory for {slots} slots of {window} tokens: {reason}; use fewer slots or a smaller context")
        })
    }

    fn template(&self, model: &LlamaModel) -> Result<(Template, Specials), String> {
        let own = model.chat_template(None).ok().and_then(|template| template.to_string().ok());
        let specials = Specials::of(model, own.as_deref());
        let vocabulary = model.vocab();
        let facts = Facts {
            file: own.as_deref(),
            begin: vocabulary::text(model, vocabulary.bos()),
            end: vocabulary::text(model, vocabulary.eos()),
            has_chatml: specials.contains("<|im_start|>") && specials.contains("<|im_end|>"),
        };
        let template = if self.load.file_template { Template::of_file(facts) } else { Template::builtin(facts) };
        Ok((template?, specials))
    }
}

/// Sets what the binding has no functions for: who may stop a batch in the middle, and that only the last token of each slot
/// has logits, so that no buffer is made for those of all.
#[allow(unsafe_code)]
fn with_abort(mut parameters: LlamaContextParams, slots: u32) -> LlamaContextParams {
    type Raw = sys::llama_context_params;
    // A struct with one field, as large as that field: it lies at its beginning.
    const { assert!(size_of::<LlamaContextParams>() == size_of::<Raw>() && align_of::<LlamaContextParams>() == align_of::<Raw>()) };
    // SAFETY: by the assertion the wrapper is its one field, and nothing else refers to it.
    let raw = unsafe { &mut *(&raw mut parameters).cast::<Raw>() };
    raw.abort_callback = Some(abort);
    raw.n_outputs_max = slots;
    parameters
}

#[allow(unsafe_code)]
unsafe extern "C" fn abort(_: *mut c_void) -> bool {
    requests::should_abort()
}

/// Tokens of each slot: as asked or as trained, and never more than the model knows.
fn window(load: &Load, trained: u32) -> u32 {
    let trained = trained.clamp(1, MAX_CONTEXT);
    match (load.context, load.max_context) {
        (0, 0) => trained,
        (0, bound) => trained.min(bound),
        (asked, _) => asked.min(trained),
    }
}

fn refuse_answerless(model: &LlamaModel) -> Result<(), String> {
    if model.n_vocab() <= 0 {
        return Err("the file has no vocabulary".to_owned());
    }
    let kind = model.meta_val_str("general.architecture").unwrap_or_default();
    if ANSWERLESS.iter().any(|answerless| kind.contains(answerless)) {
        return Err(format!("a model of the kind \"{kind}\" answers no prompts"));
    }
    Ok(())
}

/// One token, so that the memory is really there and a model that cannot compute fails here.
fn warm_up(model: &LlamaModel, context: &mut LlamaContext<'_>) -> Result<(), String> {
    let vocabulary = model.vocab();
    let token = [vocabulary.bos(), vocabulary.eos()].into_iter().find(|token| token.0 >= 0).unwrap_or(LlamaToken::new(0));
    let mut batch = LlamaBatch::new(1, 1);
    batch.add(token, 0, &[0], true).map_err(|error| error.to_string())?;
    context.decode(&mut batch).map_err(|error| format!("llama.cpp cannot compute with it: {error}"))?;
    context.synchronize();
    context.clear_kv_cache();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(context: u32, max_context: u32) -> Load {
        Load { path: String::new(), context, max_context, slots: 1, threads: 0, gpu_layers: 0, file_template: false }
    }

    #[test]
    fn the_window_is_never_more_than_trained_or_bounded() {
        assert_eq!(window(&load(0, 4096), 512), 512);
        assert_eq!(window(&load(0, 4096), 131_072), 4096);
        assert_eq!(window(&load(0, 0), 2048), 2048);
        assert_eq!(window(&load(8192, 4096), 131_072), 8192);
        assert_eq!(window(&load(8192, 4096), 512), 512);
        assert_eq!(window(&load(0, 0), u32::MAX), MAX_CONTEXT);
        assert_eq!(window(&load(u32::MAX, 0), 0), 1);
    }

    #[test]
    fn what_is_no_file_is_refused_with_a_sentence() {
        let plan = |path: &str| Plan::new(Load { path: path.to_owned(), ..load(0, 0) }).unwrap_err();
        assert_eq!(plan("a.gguf"), "a.gguf is no absolute path");
        assert!(plan("/nowhere.gguf").starts_with("cannot read /nowhere.gguf: "));
        assert_eq!(plan("/tmp"), "/tmp is no file");
    }
}
