//! How a prompt is asked: what `prompt` and `chat` share. One call, then lines from a pipe.
//!
//! Whatever ends it ends the work at the other end: an interrupt cancels the job, a dropped reader closes the pipe.

use super::micros;
use crate::args::Wishes;
use crate::bus::Bus;
use crate::errors::{Failure, Stop};
use crate::output::reader_gone;
use crate::render::short_id;
use crate::term;
use opengateway::api::keys::prompt_option;
use opengateway::api::names::{BUS_NAME, JOB_INTERFACE, exit};
use opengateway::api::proxy::Options;
use opengateway::api::stream::{Line, LineReader, ServedBy, StreamError, Timings, Usage};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::net::unix::pipe::Receiver;
use tokio::signal::unix::Signal;
use zbus::{OwnedObjectPath, Variant};

/// Time to the last token when `--timeout` does not say, as in the daemon.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// The daemon answers at the latest 1 s after the deadline; this is when we stop believing it.
const GRACE: Duration = Duration::from_secs(3);
/// Most time for the daemon to accept a prompt.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(15);

/// Asks, and lets `read` take the answer from the stream. `body` is the cluster ("" is the daemon's default one: looking it
/// up here would cost a round trip), the text and the options.
pub async fn run<T, R>(
    bus: &mut Bus,
    body: (&str, &str, &Options<'_>),
    timeout: Option<Duration>,
    interrupt: &mut Signal,
    read: impl FnOnce(Lines) -> R,
) -> Result<T, Stop>
where
    R: Future<Output = Result<T, Stop>>,
{
    let whole = timeout.unwrap_or(DEFAULT_TIMEOUT) + GRACE;
    bus.set_limit(whole.min(ACCEPT_TIMEOUT));
    let started = tokio::select! {
        biased;
        _ = interrupt.recv() => return Err(Stop::Interrupted), // leaving the bus cancels what has begun
        started = bus.change::<_, (OwnedObjectPath, zbus::OwnedFd)>("StartPrompt", &body) => started?,
    };
    let (job, stream) = started;
    // Not before the call: somebody may have typed a password meanwhile.
    let until = tokio::time::Instant::now() + whole;
    let ended = tokio::select! {
        biased;
        _ = interrupt.recv() => Err(Stop::Interrupted),
        ended = read(Lines::new(stream.into())?) => ended,
        () = reader_gone() => Err(Stop::Closed),
        () = tokio::time::sleep_until(until) => {
            Err(Failure::timeout(format!("no whole answer within {} s", timeout.unwrap_or(DEFAULT_TIMEOUT).as_secs_f32())).into())
        }
    };
    // The pipe is closed by now, which cancels too; the call says so without waiting for a full pipe to be noticed.
    if matches!(ended, Err(Stop::Interrupted | Stop::Closed))
        || matches!(&ended, Err(Stop::Failed(failure)) if failure.name == "Timeout")
    {
        let _ = tokio::time::timeout(Duration::from_secs(1), cancel(bus, &job)).await;
    }
    ended
}

async fn cancel(bus: &Bus, job: &OwnedObjectPath) -> zbus::Result<()> {
    zbus::Proxy::new(bus.connection(), BUS_NAME, job, JOB_INTERFACE).await?.call_noreply("Cancel", &()).await
}

/// The options of the call.
pub fn options(wishes: &Wishes, timeout: Option<Duration>) -> Options<'_> {
    let mut options = Options::new();
    let texts = [
        (prompt_option::MODEL, &wishes.model),
        (prompt_option::TIER, &wishes.tier),
        (prompt_option::NODE, &wishes.node),
        (prompt_option::SYSTEM, &wishes.system),
    ];
    for (key, value) in texts {
        if let Some(value) = value {
            options.insert(key, Variant::from(value.as_str()));
        }
    }
    for (key, value) in [(prompt_option::TEMPERATURE, wishes.temperature), (prompt_option::TOP_P, wishes.top_p)] {
        if let Some(value) = value {
            options.insert(key, Variant::from(value));
        }
    }
    if let Some(tokens) = wishes.max_tokens {
        options.insert(prompt_option::MAX_TOKENS, Variant::from(tokens));
    }
    if let Some(seed) = wishes.seed {
        options.insert(prompt_option::SEED, Variant::from(seed));
    }
    if !wishes.stop.is_empty() {
        options.insert(prompt_option::STOP, Variant::from(wishes.stop.iter().map(String::as_str).collect::<Vec<_>>()));
    }
    if let Some(timeout) = timeout {
        options.insert(prompt_option::TIMEOUT, Variant::from(micros(timeout)));
    }
    for (key, wish) in [(prompt_option::LOCAL_FIRST, wishes.local_first), (prompt_option::NO_LOCAL, wishes.no_local)] {
        if wish {
            options.insert(key, Variant::from(true));
        }
    }
    options
}

/// The lines of an answer. A stream that just stops is a failure, never an answer.
#[derive(Debug)]
pub struct Lines(LineReader<Receiver>);

impl Lines {
    fn new(stream: OwnedFd) -> Result<Self, Failure> {
        let receiver = Receiver::from_owned_fd(stream).map_err(|error| broken(&StreamError::Io(error)))?;
        Ok(Self(LineReader::new(receiver)))
    }

    /// The next line.
    ///
    /// # Errors
    /// The daemon is gone, or the stream is broken.
    pub async fn next(&mut self) -> Result<Line, Failure> {
        match self.0.next().await {
            Ok(Some(line)) => Ok(line),
            Ok(None) | Err(StreamError::CutOff) => Err(Failure::daemon_gone()),
            Err(error) => Err(broken(&error)),
        }
    }
}

/// A stream that is not understood.
pub fn broken(error: &StreamError) -> Failure {
    let cause = std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
    let hint = "compare versions with: ogctl version";
    Failure::new("BrokenStream", format!("{error}{cause}"), hint, exit::FAILED)
}

/// "served by NodeA, opengateway-demo, 12 tokens, 0.05 s to first, 900 tok/s".
pub fn served_by(node: &ServedBy, model: &str, reason: &str, usage: Usage, timings: Timings) -> String {
    let name = term::line(&node.name);
    // Without a name the end of the peer id tells nodes apart.
    let mut parts = vec![format!("served by {}", if name.is_empty() { short_id(&node.peer_id) } else { name })];
    if !model.is_empty() {
        parts.push(term::line(model));
    }
    let tokens = usage.completion_tokens;
    parts.push(if tokens == 1 { "1 token".into() } else { format!("{tokens} tokens") });
    let (first, whole) = (Duration::from_micros(timings.first_token_us), Duration::from_micros(timings.duration_us));
    if !first.is_zero() {
        parts.push(match first.as_secs_f64() {
            seconds if seconds < 0.01 => format!("{:.1} ms to first", seconds * 1000.0),
            seconds => format!("{seconds:.2} s to first"),
        });
    }
    // The first token's time is the prompt's: the rate is that of the tokens after it.
    let rate = f64::from(tokens.saturating_sub(1)) / whole.saturating_sub(first).as_secs_f64();
    if rate.is_finite() && rate > 0.0 {
        parts.push(if rate < 10.0 { format!("{rate:.1} tok/s") } else { format!("{rate:.0} tok/s") });
    }
    if reason == "length" {
        parts.push("cut at the limit of tokens".into());
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_tells_who_what_and_how_fast() {
        let node = ServedBy { peer_id: "12D3KooWabcdefgh12345678".into(), name: "Node\u{1b}[2JA".into() };
        let usage = Usage { prompt_tokens: 3, completion_tokens: 11 };
        let timings = Timings { first_token_us: 50_000, duration_us: 150_000 };
        let line = served_by(&node, "echo", "stop", usage, timings);
        assert_eq!(line, "served by NodeA, echo, 11 tokens, 0.05 s to first, 100 tok/s");
        let nameless = ServedBy { name: String::new(), ..node };
        assert!(served_by(&nameless, "", "stop", usage, timings).starts_with("served by …12345678, 11 tokens"));
        let unknown = served_by(&ServedBy::default(), "", "length", Usage::default(), Timings::default());
        assert_eq!(unknown, "served by , 0 tokens, cut at the limit of tokens");
    }
}
