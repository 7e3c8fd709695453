//! `ogctl prompt`: one call, then text from a pipe to standard output as it comes.
//!
//! Whatever ends this command ends the work at the other end: an interrupt cancels the job, a closed
//! standard output closes the pipe. A stream that just stops is a failure, never an answer.

use super::micros;
use crate::args::Prompt;
use crate::bus::Bus;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::render::short_id;
use crate::term::{self, Filter};
use opengateway::api::keys::prompt_option;
use opengateway::api::names::{BUS_NAME, JOB_INTERFACE, MAX_PROMPT_BYTES};
use opengateway::api::proxy::Options;
use opengateway::api::stream::{Line, LineReader, ServedBy, StreamError, Timings, Usage};
use serde::Serialize;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::net::unix::pipe::Receiver;
use zbus::{OwnedObjectPath, Variant};

/// Time to the last token when `--timeout` does not say, as in the daemon.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// The daemon answers at the latest 1 s after the deadline; this is when we stop believing it.
const GRACE: Duration = Duration::from_secs(3);
/// Most time for the daemon to accept a prompt.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(15);

/// Refuses options that say nothing, or contradict each other, with or without `--json`. clap cannot: it checks a
/// global option only among those that come after the command's name.
pub fn check_options(ask: &Prompt, json: bool) -> Result<(), Failure> {
    match (json, ask.stream, ask.raw) {
        (false, true, _) => Err(Failure::usage("--stream goes with --json; text is streamed without it")),
        (true, _, true) => Err(Failure::usage("--raw does not go with --json: JSON escapes control characters anyway")),
        _ => Ok(()),
    }
}

/// The text to ask: the words of the command line, or standard input for `-`.
pub fn read_text(words: &[String]) -> Result<String, Failure> {
    let text = if words == ["-"] {
        let mut bytes = Vec::new();
        let limit = MAX_PROMPT_BYTES as u64 + 1;
        let read = std::io::stdin().lock().take(limit).read_to_end(&mut bytes);
        read.map_err(|error| Failure::usage(format!("cannot read standard input: {error}")))?;
        if bytes.len() > MAX_PROMPT_BYTES {
            return Err(too_long());
        }
        String::from_utf8(bytes).map_err(|_| Failure::usage("the prompt is not UTF-8 text"))?
    } else {
        words.join(" ")
    };
    check(&text)?;
    Ok(text)
}

fn check(text: &str) -> Result<(), Failure> {
    if text.len() > MAX_PROMPT_BYTES {
        return Err(too_long());
    }
    if text.contains('\0') {
        return Err(Failure::usage("the prompt must not contain a NUL character"));
    }
    if text.trim().is_empty() {
        return Err(Failure::usage("the prompt is empty"));
    }
    Ok(())
}

fn too_long() -> Failure {
    Failure::usage(format!("the prompt is longer than {} KiB", MAX_PROMPT_BYTES / 1024))
}

/// Asks and prints.
pub async fn run(bus: &mut Bus, out: &Output, ask: &Prompt, text: &str, timeout: Option<Duration>) -> Result<(), Stop> {
    // Registered before the call, so that no interrupt falls between.
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let whole = timeout.unwrap_or(DEFAULT_TIMEOUT) + GRACE;
    bus.set_limit(whole.min(ACCEPT_TIMEOUT));
    let options = options(ask, timeout);
    // An empty cluster id is the daemon's default cluster: looking it up here would cost a round trip.
    let body = (ask.cluster.as_deref().unwrap_or_default(), text, &options);
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
        ended = Answer::new(out, ask).read(stream.into()) => ended,
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

fn options(ask: &Prompt, timeout: Option<Duration>) -> Options<'_> {
    let mut options = Options::new();
    let texts = [
        (prompt_option::MODEL, &ask.model),
        (prompt_option::TIER, &ask.tier),
        (prompt_option::NODE, &ask.node),
        (prompt_option::SYSTEM, &ask.system),
    ];
    for (key, value) in texts {
        if let Some(value) = value {
            options.insert(key, Variant::from(value.as_str()));
        }
    }
    if let Some(tokens) = ask.max_tokens {
        options.insert(prompt_option::MAX_TOKENS, Variant::from(tokens));
    }
    if let Some(temperature) = ask.temperature {
        options.insert(prompt_option::TEMPERATURE, Variant::from(temperature));
    }
    if let Some(seed) = ask.seed {
        options.insert(prompt_option::SEED, Variant::from(seed));
    }
    if let Some(timeout) = timeout {
        options.insert(prompt_option::TIMEOUT, Variant::from(micros(timeout)));
    }
    for (key, wish) in [(prompt_option::LOCAL_FIRST, ask.local_first), (prompt_option::NO_LOCAL, ask.no_local)] {
        if wish {
            options.insert(key, Variant::from(true));
        }
    }
    options
}

/// The object of `--json`.
#[derive(Debug, Serialize)]
struct Whole<'a> {
    text: &'a str,
    served_by: &'a ServedBy,
    model: &'a str,
    finish_reason: &'a str,
    usage: Usage,
    timings: Timings,
}

/// How the pieces of an answer are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Text as it comes.
    Text,
    /// Text when it is whole.
    WholeText,
    /// One object when it is whole.
    Json,
    /// One object a piece.
    JsonLines,
}

/// An answer that comes in.
struct Answer<'a> {
    out: &'a Output,
    mode: Mode,
    raw: bool,
    filter: Filter,
    /// What is kept until the end, where the mode wants that.
    kept: String,
    /// The last character that was printed, to end with one line feed.
    last: Option<char>,
    model: String,
    served_by: ServedBy,
}

impl<'a> Answer<'a> {
    fn new(out: &'a Output, ask: &Prompt) -> Self {
        let mode = match (out.json, ask.stream, ask.no_stream) {
            (true, true, _) => Mode::JsonLines,
            (true, false, _) => Mode::Json,
            (false, _, true) => Mode::WholeText,
            (false, _, false) => Mode::Text,
        };
        let (model, served_by) = Default::default();
        Self { out, mode, raw: ask.raw, filter: Filter::default(), kept: String::new(), last: None, model, served_by }
    }

    /// Reads the stream to its end.
    async fn read(mut self, stream: OwnedFd) -> Result<(), Stop> {
        let receiver = Receiver::from_owned_fd(stream).map_err(|error| broken(&StreamError::Io(error)))?;
        let mut lines = LineReader::new(receiver);
        loop {
            let line = match lines.next().await {
                Ok(Some(line)) => line,
                Ok(None) | Err(StreamError::CutOff) => return self.fail(Failure::daemon_gone()),
                Err(error) => return self.fail(broken(&error)),
            };
            if self.mode == Mode::JsonLines && !matches!(line, Line::Error { .. } | Line::Unknown) {
                self.out.object(&line)?;
            }
            match line {
                Line::Start { model, served_by } => (self.model, self.served_by) = (model, served_by),
                Line::Text { text } => self.text(&text)?,
                Line::End { reason, usage, timings } => return self.end(&reason, usage, timings),
                Line::Error { name, message } => return self.fail(Failure::named(&name, &message)),
                Line::Queued { .. } | Line::Unknown => {}
            }
        }
    }

    fn text(&mut self, text: &str) -> Result<(), Stop> {
        match self.mode {
            Mode::JsonLines => Ok(()),
            Mode::Json => {
                self.kept.push_str(text);
                Ok(())
            }
            Mode::Text | Mode::WholeText => {
                if self.raw {
                    self.kept.push_str(text);
                } else {
                    self.filter.push(text, &mut self.kept);
                }
                if self.mode == Mode::Text { self.print_kept() } else { Ok(()) }
            }
        }
    }

    fn print_kept(&mut self) -> Result<(), Stop> {
        if let Some(last) = self.kept.chars().next_back() {
            self.last = Some(last);
            self.out.text(&self.kept)?;
            self.kept.clear();
        }
        Ok(())
    }

    /// Prints what is left of the text, and a line feed if it has none at its end.
    fn finish_text(&mut self) -> Result<(), Stop> {
        if matches!(self.mode, Mode::Text | Mode::WholeText) {
            self.print_kept()?;
            if !self.raw && self.last.is_some_and(|last| last != '\n') {
                self.out.text("\n")?;
            }
        }
        Ok(())
    }

    fn end(mut self, reason: &str, usage: Usage, timings: Timings) -> Result<(), Stop> {
        self.finish_text()?;
        if self.mode == Mode::Json {
            return self.out.object(Whole {
                text: &self.kept,
                served_by: &self.served_by,
                model: &self.model,
                finish_reason: reason,
                usage,
                timings,
            });
        }
        self.out.note(&served_by(&self.served_by, &self.model, reason, usage, timings));
        Ok(())
    }

    fn fail(mut self, failure: Failure) -> Result<(), Stop> {
        self.finish_text()?;
        Err(failure.into())
    }
}

fn broken(error: &StreamError) -> Failure {
    let cause = std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
    let hint = "compare versions with: ogctl version";
    Failure::new("BrokenStream", format!("{error}{cause}"), hint, opengateway::api::names::exit::FAILED)
}

/// "served by NodeA (…9fHk2Qxa), echo, 12 tokens, 0.05 s to first, 900 tok/s".
fn served_by(node: &ServedBy, model: &str, reason: &str, usage: Usage, timings: Timings) -> String {
    let mut parts = vec![match (term::line(&node.name), short_id(&node.peer_id)) {
        (name, id) if name.is_empty() => format!("served by {id}"),
        (name, id) if id.is_empty() => format!("served by {name}"),
        (name, id) => format!("served by {name} ({id})"),
    }];
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
    fn a_prompt_at_the_limit_passes_and_one_byte_more_does_not() {
        assert!(check(&"a".repeat(MAX_PROMPT_BYTES)).is_ok());
        assert!(check(&"a".repeat(MAX_PROMPT_BYTES + 1)).is_err());
        assert!(check("a\0b").is_err() && check(" \n").is_err());
    }

    #[test]
    fn words_are_joined() {
        assert_eq!(read_text(&["What".into(), "is".into(), "2+2?".into()]).unwrap(), "What is 2+2?");
    }

    #[test]
    fn the_last_line_tells_who_what_and_how_fast() {
        let node = ServedBy { peer_id: "12D3KooWabcdefgh12345678".into(), name: "Node\u{1b}[2JA".into() };
        let usage = Usage { prompt_tokens: 3, completion_tokens: 11 };
        let timings = Timings { first_token_us: 50_000, duration_us: 150_000 };
        let line = served_by(&node, "echo", "stop", usage, timings);
        assert_eq!(line, "served by NodeA (…12345678), echo, 11 tokens, 0.05 s to first, 100 tok/s");
        let unknown = served_by(&ServedBy::default(), "", "length", Usage::default(), Timings::default());
        assert_eq!(unknown, "served by , 0 tokens, cut at the limit of tokens");
    }
}
