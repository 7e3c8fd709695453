//! Compares the engine with plain llama.cpp: the same build, file, threads and streams, in turns, medians side by side.
//!
//! ```text
//! engine-bench MODEL.gguf [--engine PROGRAM] [--streams 1,8] [--prompt 128] [--generate 64] [--rounds 5] [--threads 0]
//! engine-bench MODEL.gguf --reference [--threads 1]       # plain llama.cpp alone, and what it said
//! ```
//!
//! Prints JSON. Of each run the time on the clock is measured, and the time on the processors: on a machine that does other
//! things too only the second one compares. "prompt" is tokens of prompts in a second from the question to the first token of the last stream; "generate"
//! is tokens of answers in a second, all streams together; "first_token_ms" is the first token of a short prompt.

mod child;
mod reference;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

/// What is measured, and how often.
#[derive(Debug, Clone)]
pub struct Plan {
    model: PathBuf,
    engine: PathBuf,
    streams: Vec<u32>,
    prompt: usize,
    generate: u32,
    rounds: usize,
    threads: u32,
}

/// One run of all streams.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// From the question to the first token of the last stream.
    pub prompt: Duration,
    /// From then to the end.
    pub generate: Duration,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Tokens of all answers after the first.
    pub tokens: usize,
    /// On the processors, of the whole run.
    pub cpu: Duration,
}

/// How long the threads of a process ran so far.
pub fn cpu_time(process: u32) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let ran = |task: std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    };
    Duration::from_nanos(tasks.filter_map(ran).sum())
}

/// A prompt of a few tokens, so that all streams generate from the first batch on.
pub const SHORT: usize = 8;

fn main() {
    match run() {
        Ok(report) => println!("{report:#}"),
        Err(error) => {
            eprintln!("engine-bench: {error}");
            std::process::exit(1);
        }
    }
}

fn run() -> Result<Value, String> {
    let (plan, reference_only) = arguments()?;
    let kernels = plan.engine.parent().unwrap_or(Path::new(".")).join("ggml");
    if reference_only {
        let mut reference =
            reference::Reference::new(&plan.model, &kernels, 1, plan.threads.max(1), plan.prompt + plan.generate as usize)?;
        return Ok(json!({ "text": reference.answer(plan.generate)? }));
    }
    let mut rows = Vec::new();
    let mut threads = 0;
    for streams in &plan.streams {
        let mut engine = child::Child::start(&plan, *streams)?;
        threads = engine.threads;
        let window = plan.prompt + plan.generate as usize + SHORT;
        let mut reference = reference::Reference::new(&plan.model, &kernels, *streams, threads, window)?;
        let mut measured = [Samples::default(), Samples::default()];
        // The first round warms up.
        for round in 0..=plan.rounds {
            let runs = [
                [engine.run(plan.prompt, 1)?, engine.run(SHORT, plan.generate)?],
                [reference.run(plan.prompt, 1)?, reference.run(SHORT, plan.generate)?],
            ];
            if round > 0 {
                for (samples, [prompt, generate]) in measured.iter_mut().zip(runs) {
                    samples.add(prompt, generate);
                }
            }
        }
        rows.push(row(*streams, &measured));
    }
    Ok(json!({
        "model": plan.model.file_name().unwrap_or_default().to_string_lossy(), "threads": threads, "rounds": plan.rounds,
        "prompt_tokens": plan.prompt, "generated_tokens": plan.generate, "streams": rows,
    }))
}

fn row(streams: u32, [engine, reference]: &[Samples; 2]) -> Value {
    let ratio = |of: fn(&Samples) -> f64| (of(engine) / of(reference) * 1000.0).round() / 1000.0;
    json!({
        "streams": streams, "engine": engine.report(), "reference": reference.report(),
        "ratio": { "prompt": ratio(|samples| median(&samples.prompt)), "generate": ratio(|samples| median(&samples.generate)) },
        "ratio_cpu": {
            "prompt": ratio(|samples| median(&samples.prompt_cpu)), "generate": ratio(|samples| median(&samples.generate_cpu)),
        },
    })
}

#[derive(Debug, Default)]
struct Samples {
    prompt: Vec<f64>,
    generate: Vec<f64>,
    first_token_ms: Vec<f64>,
    prompt_cpu: Vec<f64>,
    generate_cpu: Vec<f64>,
}

impl Samples {
    #[allow(clippy::cast_precision_loss)]
    fn add(&mut self, prompt: Run, generate: Run) {
        self.prompt.push(prompt.prompt_tokens as f64 / prompt.prompt.as_secs_f64());
        self.generate.push(generate.tokens as f64 / generate.generate.as_secs_f64());
        self.first_token_ms.push(generate.prompt.as_secs_f64() * 1000.0);
        self.prompt_cpu.push(prompt.prompt_tokens as f64 / prompt.cpu.as_secs_f64());
        self.generate_cpu.push(generate.tokens as f64 / generate.cpu.as_secs_f64());
    }

    fn report(&self) -> Value {
        let rounded = |samples: &[f64], unit: f64| (median(samples) * unit).round() / unit;
        json!({
            "prompt_tps": rounded(&self.prompt, 10.0), "generate_tps": rounded(&self.generate, 10.0),
            "first_token_ms": rounded(&self.first_token_ms, 1000.0),
            "prompt_per_cpu_second": rounded(&self.prompt_cpu, 10.0), "generate_per_cpu_second": rounded(&self.generate_cpu, 10.0),
        })
    }
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Text of about so many tokens, different for each number, without repeating itself.
pub fn text(number: usize, words: usize) -> String {
    let letters = "etaoinshrdlu";
    let letter = |place: usize| letters.as_bytes()[place % letters.len()] as char;
    (0..words)
        .map(|word| format!("{}{}", letter(word * 7 + number), letter(word * word + number * 5)))
        .collect::<Vec<_>>()
        .join(" ")
}

fn arguments() -> Result<(Plan, bool), String> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().ok_or("usage: engine-bench MODEL.gguf [--engine PROGRAM] [--streams 1,8] [--prompt N] [--generate N] [--rounds N] [--threads N] [--reference]")?;
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let beside = own.ancestors().nth(2).unwrap_or(Path::new(".")).join("opengateway-engine");
    let mut plan =
        Plan { model: model.into(), engine: beside, streams: vec![1, 8], prompt: 128, generate: 64, rounds: 5, threads: 0 };
    let mut reference_only = false;
    while let Some(name) = arguments.next() {
        if name == "--reference" {
            reference_only = true;
            continue;
        }
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        let number = || value.parse::<u32>().map_err(|_| format!("{name} {value} is no number"));
        match name.as_str() {
            "--engine" => plan.engine = value.into(),
            "--streams" => {
                plan.streams = value
                    .split(',')
                    .map(|count| count.parse().map_err(|_| format!("{count} is no number")))
                    .collect::<Result<_, _>>()?;
            }
            "--prompt" => plan.prompt = number()? as usize,
            "--generate" => plan.generate = number()?,
            "--rounds" => plan.rounds = number()? as usize,
            "--threads" => plan.threads = number()?,
            _ => return Err(format!("{name} is not known")),
        }
    }
    plan.model = plan.model.canonicalize().map_err(|error| format!("{}: {error}", plan.model.display()))?;
    Ok((plan, reference_only))
}
