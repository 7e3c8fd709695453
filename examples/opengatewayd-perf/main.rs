//! What `benches/side-by-side` measures OpenGateway with. Prints what happens as JSON lines.
//!
//! The node under test is the real `opengatewayd`. This program is the client beside it (`bus`), or the asking daemon
//! without its bus (`swarm`), where the time on the bus shall not count:
//!
//! ```text
//! bus joined  --bus ADDR --cluster C      {"ev":"joined"}: has the bus name, is in the cluster, listens
//! bus ask     --bus ADDR --cluster C      {"ev":"peer","name":…} each, {"ev":"response"}
//! bus watch   --bus ADDR --cluster C      as ask, then {"ev":"peer"…} and {"ev":"gone","name":…}
//! bus bench   --bus ADDR --cluster C      as ask, then {"ev":"bench",…}
//! bus exec    --bus ADDR --cluster C -- PROGRAM …   waits for a member that serves, then becomes PROGRAM
//! swarm ask | bench | flood   --cluster C --state DIR [--mdns] [--bootstrap ADDR]
//! ```
//!
//! A client may be started before its daemon: it waits for the bus name.

mod bus;
mod swarm;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use clap::{Parser, ValueEnum};

type Failed = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Side {
    Bus,
    Swarm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    Joined,
    Ask,
    Watch,
    Bench,
    Exec,
    Flood,
}

#[derive(Debug, Parser)]
struct Arguments {
    side: Side,
    role: Role,
    #[arg(long, default_value = "perf")]
    cluster: String,
    /// D-Bus address of the daemon's bus
    #[arg(long, default_value = "")]
    bus: String,
    /// Name of the asking node
    #[arg(long, default_value = "C")]
    name: String,
    /// State directory of the asking node
    #[arg(long)]
    state: Option<PathBuf>,
    #[arg(long)]
    bootstrap: Vec<String>,
    /// Look for members on the local network
    #[arg(long)]
    mdns: bool,
    /// Members to see before the first role is over
    #[arg(long, default_value_t = 2)]
    members: usize,
    /// Prompts one after the other
    #[arg(short, default_value_t = 10_000)]
    n: usize,
    /// Prompts, `--in-flight` at once; `flood`: prompts before the first is counted
    #[arg(short, default_value_t = 20_000)]
    m: usize,
    #[arg(long, default_value_t = 64)]
    in_flight: usize,
    /// Bytes of a prompt
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// `exec`: what to become
    #[arg(last = true)]
    program: Vec<String>,
}

fn say(event: &serde_json::Value) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{event}");
    let _ = out.flush();
}

/// Percentiles of times in microseconds.
fn figures(mut times: Vec<f64>, seconds: f64) -> serde_json::Value {
    times.sort_by(f64::total_cmp);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a share of an index
    let at = |share: f64| times.get((times.len().saturating_sub(1) as f64 * share).round() as usize).copied().unwrap_or_default();
    serde_json::json!({
        "n": times.len(), "p50_us": at(0.5), "p90_us": at(0.9), "p99_us": at(0.99), "per_s": times.len() as f64 / seconds,
    })
}

/// Prompts one after the other, then `in_flight` at once, after a warm-up.
async fn measure<F>(arguments: &Arguments, prompt: impl Fn(String) -> F + Sync) -> Result<(), Failed>
where
    F: Future<Output = Result<usize, Failed>> + Send,
{
    let text = "a".repeat(arguments.size);
    let once = || async {
        let begun = Instant::now();
        match prompt(text.clone()).await {
            Ok(bytes) if bytes == text.len() => Ok(begun.elapsed().as_secs_f64() * 1e6),
            Ok(bytes) => Err(format!("{bytes} bytes came back of {}", text.len())),
            Err(error) => Err(error.to_string()),
        }
    };
    for _ in 0..arguments.n.min(200) {
        once().await?;
    }
    let begun = Instant::now();
    let mut times = Vec::with_capacity(arguments.n);
    for _ in 0..arguments.n {
        times.push(once().await?);
    }
    let rtt = figures(times, begun.elapsed().as_secs_f64());
    let left = AtomicUsize::new(arguments.m);
    let begun = Instant::now();
    let worker = || async {
        let mut times = Vec::new();
        while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
            times.push(once().await?);
        }
        Ok::<_, String>(times)
    };
    let all = futures::future::join_all((0..arguments.in_flight).map(|_| worker())).await;
    let seconds = begun.elapsed().as_secs_f64();
    let times = all.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
    say(&serde_json::json!({ "ev": "bench", "rtt": rtt, "flight": figures(times, seconds) }));
    Ok(())
}

fn main() {
    let arguments = Arguments::parse();
    if let Ok(filter) = std::env::var("RUST_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    // One thread, as the daemon has.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    // A task, as a prompt is in the daemon: waking the outermost future costs two system calls more.
    let outcome = runtime.block_on(async {
        let running = tokio::spawn(async move {
            match arguments.side {
                Side::Bus => bus::run(&arguments).await,
                Side::Swarm => swarm::run(&arguments).await,
            }
        });
        running.await?
    });
    if let Err(error) = outcome {
        say(&serde_json::json!({ "ev": "error", "error": error.to_string() }));
        std::process::exit(1);
    }
}
