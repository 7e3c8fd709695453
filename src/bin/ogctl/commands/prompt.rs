//! `ogctl prompt`: one call, then text from a pipe to standard output as it comes.
//!
//! Whatever ends this command ends the work at the other end: an interrupt cancels the job, a closed
//! standard output closes the pipe. A stream that just stops is a failure, never an answer.

use super::ask::{self, Lines};
use crate::args::Prompt;
use crate::bus::Bus;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::term::Filter;
use opengateway::api::keys::prompt_option;
use opengateway::api::names::MAX_PROMPT_BYTES;
use opengateway::api::stream::{Line, ServedBy, Timings, Usage};
use serde::Serialize;
use std::io::Read as _;
use std::time::Duration;
use zbus::Variant;

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

/// Refuses what no prompt can be.
pub fn check(text: &str) -> Result<(), Failure> {
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
pub async fn run(bus: &mut Bus, out: &Output, prompt: &Prompt, text: &str, timeout: Option<Duration>) -> Result<(), Stop> {
    // Registered before the call, so that no interrupt falls between.
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut options = ask::options(&prompt.wishes, timeout);
    if prompt.no_template {
        options.insert(prompt_option::RAW, Variant::from(true));
    }
    let cluster = prompt.wishes.cluster.as_deref().unwrap_or_default();
    let answer = Answer::new(out, prompt);
    let ended = ask::run(bus, (cluster, text, &options), timeout, &mut interrupt, |stream| answer.read(stream)).await;
    out.waiting(None);
    ended
}

/// The object of `--json`.
#[derive(Debug, Serialize)]
pub struct Whole<'a> {
    pub text: &'a str,
    pub served_by: &'a ServedBy,
    pub model: &'a str,
    pub finish_reason: &'a str,
    pub usage: Usage,
    pub timings: Timings,
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
    async fn read(mut self, mut lines: Lines) -> Result<(), Stop> {
        loop {
            let line = match lines.next().await {
                Ok(line) => line,
                Err(failure) => return self.fail(failure),
            };
            if self.mode == Mode::JsonLines && !matches!(line, Line::Error { .. } | Line::Unknown) {
                self.out.object(&line)?;
            }
            self.out.waiting(match line {
                Line::Queued { position } => Some(position),
                _ => None,
            });
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
        self.out.note(&ask::served_by(&self.served_by, &self.model, reason, usage, timings));
        Ok(())
    }

    fn fail(mut self, failure: Failure) -> Result<(), Stop> {
        self.finish_text()?;
        Err(failure.into())
    }
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
}
