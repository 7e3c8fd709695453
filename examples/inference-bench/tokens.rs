//! Long answers of a real model, in the terms of `engine-bench`: the same prompts, and tokens a second counted alike.

use std::collections::BTreeMap;
use std::time::Instant;

use clap::Args;
use futures::future::try_join_all;
use hyper::body::Bytes;
use serde_json::{Value, json};

use crate::client::{Answer, Client};
use crate::{Failed, Target};

#[derive(Debug, Args)]
pub struct Plan {
    #[arg(required = true)]
    targets: Vec<Target>,
    #[arg(long)]
    model: String,
    /// Answers at once
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// Words of a prompt, for the figure of prompts
    #[arg(long, default_value_t = 128)]
    prompt: usize,
    /// Tokens of an answer, for the figure of answers
    #[arg(long, default_value_t = 64)]
    generate: u32,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

/// A prompt of a few tokens, so that all streams generate from the first batch on.
const SHORT: usize = 8;

/// Prints for each target its rounds.
pub async fn run(plan: &Plan) -> Result<(), Failed> {
    let mut clients = Vec::new();
    for target in &plan.targets {
        let mut own = Vec::new();
        for _ in 0..plan.streams {
            own.push(Client::new(target).await?);
        }
        clients.push(own);
    }
    let mut rounds: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    let mut number = 0;
    // The first round warms up.
    for round in 0..=plan.rounds {
        for (target, own) in plan.targets.iter().zip(&mut clients) {
            let prompt = measure(own, plan, &mut number, plan.prompt, 1).await?;
            let answer = measure(own, plan, &mut number, SHORT, plan.generate).await?;
            if round > 0 {
                rounds.entry(&target.name).or_default().push(json!({
                    "prompt_tps": prompt.prompt_tps(), "generate_tps": answer.generate_tps(), "first_token_ms": answer.first * 1000.0,
                }));
            }
        }
    }
    println!("{}", json!(rounds));
    Ok(())
}

/// One run of all streams.
#[derive(Debug, Default)]
struct Run {
    /// From the question to the first text of the last stream, in seconds.
    first: f64,
    whole: f64,
    prompt_tokens: f64,
    /// Tokens of all answers after the first.
    tokens: f64,
}

impl Run {
    fn prompt_tps(&self) -> f64 {
        self.prompt_tokens / self.first
    }

    fn generate_tps(&self) -> f64 {
        self.tokens / (self.whole - self.first)
    }
}

async fn measure(clients: &mut [Client], plan: &Plan, number: &mut usize, words: usize, generate: u32) -> Result<Run, Failed> {
    let bodies: Vec<Bytes> = (*number..*number + clients.len()).map(|number| body(plan, number, words, generate)).collect();
    *number += clients.len();
    let begun = Instant::now();
    let answers = try_join_all(clients.iter_mut().zip(&bodies).map(|(client, body)| client.ask("/v1/completions", body))).await?;
    let mut run = Run { whole: begun.elapsed().as_secs_f64(), ..Run::default() };
    for answer in &answers {
        let usage = usage(answer)?;
        let count = |key: &str| usage[key].as_f64().unwrap_or_default();
        run.first = run.first.max(answer.first);
        run.prompt_tokens += count("prompt_tokens");
        run.tokens += (count("completion_tokens") - 1.0).max(0.0);
    }
    Ok(run)
}

fn body(plan: &Plan, number: usize, words: usize, generate: u32) -> Bytes {
    let body = json!({
        "model": plan.model, "prompt": text(number, words), "max_tokens": generate, "temperature": 0, "stream": true,
        "stream_options": { "include_usage": true },
    });
    body.to_string().into()
}

/// The usage of the last event that has one.
fn usage(answer: &Answer) -> Result<Value, Failed> {
    let body = std::str::from_utf8(&answer.body)?;
    let events = body.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
    let usage = events.map(|event| event["usage"].clone()).find(|usage| !usage.is_null());
    usage.ok_or_else(|| format!("an answer without its usage: {body}").into())
}

/// The text of `engine-bench`: about so many tokens, different for each number, without repeating itself.
fn text(number: usize, words: usize) -> String {
    let letters = "etaoinshrdlu";
    let letter = |place: usize| letters.as_bytes()[place % letters.len()] as char;
    (0..words)
        .map(|word| format!("{}{}", letter(word * 7 + number), letter(word * word + number * 5)))
        .collect::<Vec<_>>()
        .join(" ")
}
