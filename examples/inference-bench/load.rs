//! Many short requests: what is in front of the stub is all that takes time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::Args;
use hyper::body::Bytes;
use serde_json::{Value, json};

use crate::client::Client;
use crate::{Failed, Target};

#[derive(Debug, Args)]
pub struct Plan {
    #[arg(required = true)]
    targets: Vec<Target>,
    /// Requests at once, each on a connection of its own
    #[arg(long, default_value_t = 1)]
    in_flight: usize,
    /// Seconds for each target in each round
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// All targets are asked in turn so many times
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    #[arg(long, default_value = "instant")]
    model: String,
    /// Ask for a stream
    #[arg(long)]
    stream: bool,
}

/// Prints for each target its rounds.
pub async fn run(plan: &Plan) -> Result<(), Failed> {
    let body = json!({
        "model": plan.model, "messages": [{ "role": "user", "content": "What is 2+2?" }], "stream": plan.stream,
    });
    let body = Bytes::from(body.to_string());
    let mut clients = Vec::new();
    for target in &plan.targets {
        let mut own = Vec::new();
        for _ in 0..plan.in_flight {
            let mut client = Client::new(target).await?;
            let answer = client.ask(PATH, &body).await?;
            if !String::from_utf8_lossy(&answer.body).contains(r#""4""#) {
                return Err(format!("{} did not say 4", target.name).into());
            }
            own.push(client);
        }
        clients.push(own);
    }
    let mut rounds: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    // The first round warms up.
    for round in 0..=plan.rounds {
        for (target, own) in plan.targets.iter().zip(&mut clients) {
            let seconds = if round == 0 { plan.seconds.min(0.5) } else { plan.seconds };
            let measured = measure(own, &body, Duration::from_secs_f64(seconds)).await?;
            if round > 0 {
                rounds.entry(&target.name).or_default().push(measured);
            }
        }
    }
    println!("{}", json!(rounds));
    Ok(())
}

const PATH: &str = "/v1/chat/completions";

async fn measure(clients: &mut [Client], body: &Bytes, time: Duration) -> Result<Value, Failed> {
    let begun = Instant::now();
    let asking = clients.iter_mut().map(|client| async move {
        let (mut first, mut whole) = (Vec::new(), Vec::new());
        while begun.elapsed() < time {
            let answer = client.ask(PATH, body).await?;
            first.push(answer.first * 1e6);
            whole.push(answer.whole * 1e6);
        }
        Ok::<_, Failed>((first, whole))
    });
    let all = futures::future::try_join_all(asking).await?;
    let seconds = begun.elapsed().as_secs_f64();
    let (first, whole): (Vec<_>, Vec<_>) = all.into_iter().unzip();
    let (first, whole) = (sorted(first.concat()), sorted(whole.concat()));
    #[allow(clippy::cast_precision_loss)]
    let per_s = whole.len() as f64 / seconds;
    Ok(json!({
        "n": whole.len(), "p50_us": at(&whole, 0.5), "p99_us": at(&whole, 0.99), "first_p50_us": at(&first, 0.5),
        "first_p99_us": at(&first, 0.99), "per_s": per_s,
    }))
}

fn sorted(mut times: Vec<f64>) -> Vec<f64> {
    times.sort_by(f64::total_cmp);
    times
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // a share of an index
fn at(sorted: &[f64], share: f64) -> f64 {
    let at = (sorted.len().saturating_sub(1) as f64 * share).round() as usize;
    sorted.get(at).map_or(0.0, |time| (time * 10.0).round() / 10.0)
}
