//! `ogctl chat`: a conversation, turn by turn. It lives in this process alone and is gone with it, unless `/save` wrote it.
//!
//! Each turn is a prompt with the earlier ones as its messages: the serving nodes keep nothing. A turn without a whole answer
//! leaves the conversation as it was.

mod command;
mod input;

use super::ask::{self, Lines};
use super::prompt::{Whole, check};
use crate::args::Wishes;
use crate::bus::Bus;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::term::{self, Filter};
use command::Command;
pub use input::Input;
use input::Read;
use opengateway::api::keys::prompt_option;
use opengateway::api::names::{MAX_PROMPT_BYTES, exit};
use opengateway::api::stream::{Line, ServedBy, Timings, Usage};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use zbus::Variant;

/// Earlier messages that the daemon takes.
const MAX_MESSAGES: usize = 1024;

/// What was said so far, and how to ask on.
struct Chat<'a> {
    out: &'a Output,
    wishes: Wishes,
    timeout: Option<Duration>,
    /// Role and text, oldest first: a user's message and the answer to it, alternating.
    messages: Vec<(&'static str, String)>,
}

/// A whole answer.
struct Answer {
    text: String,
    model: String,
    served_by: ServedBy,
    reason: String,
    usage: Usage,
    timings: Timings,
}

/// Reads turns until there are no more.
pub async fn run(bus: &mut Bus, out: &Output, wishes: Wishes, timeout: Option<Duration>, mut input: Input) -> Result<(), Stop> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Finds the bus that has the daemon before anything is typed, and tells at once when there is none.
    bus.ask(async |manager| manager.get_status().await).await?;
    let mut chat = Chat { out, wishes, timeout, messages: Vec::new() };
    if input.is_terminal() {
        out.note("/help tells the commands; Ctrl-C stops an answer, Ctrl-D leaves");
    }
    loop {
        let text = tokio::select! {
            read = input.next() => match read? {
                Read::Text(text) => text,
                Read::TakenBack => {
                    out.note("Ctrl-C again, or Ctrl-D, leaves");
                    continue;
                }
                Read::End => return Ok(()),
            },
            // On a terminal Ctrl-C is a key while a line is being edited: this one comes from elsewhere.
            _ = interrupt.recv() => return Err(Stop::Interrupted),
        };
        if text.trim().is_empty() {
            continue;
        }
        let done = match Command::parse(&text) {
            Ok(None) => chat.say(bus, command::unescaped(&text), &mut interrupt).await,
            Ok(Some(Command::Quit)) => return Ok(()),
            Ok(Some(command)) => chat.obey(bus, command, &mut interrupt).await,
            Err(failure) => Err(failure.into()),
        };
        match done {
            Ok(()) => {}
            // Somebody is there who can try again; a script would go on with a conversation that has a hole.
            Err(Stop::Failed(failure)) if input.is_terminal() && failure.code != exit::NO_DAEMON => out.report(&failure),
            Err(Stop::Interrupted) if input.is_terminal() => out.note("\nstopped; Ctrl-D leaves"),
            Err(stop) => return Err(stop),
        }
    }
}

impl Chat<'_> {
    /// One turn: kept when its answer is whole.
    async fn say(&mut self, bus: &mut Bus, text: &str, interrupt: &mut Signal) -> Result<(), Stop> {
        check(text)?;
        let said: usize = self.messages.iter().map(|(_, text)| text.len()).sum();
        let whole = said + text.len() + self.wishes.system.as_deref().map_or(0, str::len);
        if whole > MAX_PROMPT_BYTES || self.messages.len() + 2 > MAX_MESSAGES {
            let message = format!("the conversation is longer than {} KiB or {MAX_MESSAGES} messages", MAX_PROMPT_BYTES / 1024);
            return Err(Failure::new("Usage", message, "begin a new one with: /reset", exit::USAGE).into());
        }
        let mut options = ask::options(&self.wishes, self.timeout);
        if !self.messages.is_empty() {
            let messages: Vec<(&str, &str)> = self.messages.iter().map(|(role, text)| (*role, text.as_str())).collect();
            options.insert(prompt_option::MESSAGES, Variant::from(messages));
        }
        let cluster = self.wishes.cluster.as_deref().unwrap_or_default();
        let out = self.out;
        let answered = ask::run(bus, (cluster, text, &options), self.timeout, interrupt, |lines| read(lines, out)).await;
        out.waiting(None);
        let answer = answered?;
        if out.json {
            let Answer { text, served_by, model, reason, usage, timings } = &answer;
            out.object(Whole { text, served_by, model, finish_reason: reason, usage: *usage, timings: *timings })?;
        } else {
            out.note(&ask::served_by(&answer.served_by, &answer.model, &answer.reason, answer.usage, answer.timings));
        }
        self.messages.extend([("user", text.to_owned()), ("assistant", answer.text)]);
        Ok(())
    }

    async fn obey(&mut self, bus: &mut Bus, command: Command, interrupt: &mut Signal) -> Result<(), Stop> {
        match command {
            Command::Help => self.out.note(command::HELP),
            Command::Quit => {}
            Command::Reset => {
                self.messages.clear();
                self.out.note("a new conversation");
            }
            Command::Model(None) => {
                let cluster = self.wishes.cluster.clone().unwrap_or_default();
                let names = super::models::names(bus, &cluster).await?;
                let names: Vec<String> = names.iter().map(|name| term::line(name)).collect();
                let now = told(self.wishes.model.as_deref(), "the best one");
                self.out.note(&format!("model: {now}; there are: {}", names.join(", ")));
            }
            Command::Model(Some(model)) => self.wish("model", model, "the best one", |wishes| &mut wishes.model),
            Command::Node(None) => self.out.note(&format!("node: {}", told(self.wishes.node.as_deref(), "any"))),
            Command::Node(Some(node)) => self.wish("node", node, "any", |wishes| &mut wishes.node),
            Command::System(None) => self.out.note(&format!("system: {}", told(self.wishes.system.as_deref(), "none"))),
            Command::System(Some(text)) => self.wish("system", text, "none", |wishes| &mut wishes.system),
            Command::Retry => {
                let Some(at) = self.messages.len().checked_sub(2) else {
                    return Err(Failure::usage("there is nothing to ask again").into());
                };
                let before = self.messages.split_off(at);
                let ended = self.say(bus, &before[0].1, interrupt).await;
                if ended.is_err() {
                    self.messages.extend(before);
                }
                return ended;
            }
            Command::Save(path) => {
                self.save(&path)?;
                self.out.note(&format!("saved to {}", term::line(&path)));
            }
        }
        Ok(())
    }

    /// Sets a wish; `-` takes it back.
    fn wish(&mut self, what: &str, value: String, default: &str, of: impl Fn(&mut Wishes) -> &mut Option<String>) {
        let value = Some(value).filter(|value| value != "-");
        self.out.note(&format!("{what}: {}", told(value.as_deref(), default)));
        *of(&mut self.wishes) = value;
    }

    /// Writes the conversation into a new file that its owner alone can read.
    fn save(&self, path: &str) -> Result<(), Failure> {
        let failed = |error: std::io::Error| {
            let message = format!("cannot write {}: {error}", term::line(path));
            Failure::new("Output", message, "name a file that is not there yet", exit::FAILED)
        };
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        let system = self.wishes.system.iter().map(|text| ("system", text));
        for (role, text) in system.chain(self.messages.iter().map(|(role, text)| (*role, text))) {
            writeln!(file, "## {role}\n\n{text}\n").map_err(failed)?;
        }
        Ok(())
    }
}

fn told(wish: Option<&str>, default: &str) -> String {
    wish.map_or_else(|| default.to_owned(), term::line)
}

/// Prints an answer as it comes, and keeps it.
async fn read(mut lines: Lines, out: &Output) -> Result<Answer, Stop> {
    let mut filter = Filter::default();
    let (mut text, mut model, mut served_by) = (String::new(), String::new(), ServedBy::default());
    // The last character on the screen, to end with one line feed.
    let mut last = '\n';
    let end_line = |last: char| if out.json || last == '\n' { Ok(()) } else { out.text("\n") };
    loop {
        let line = lines.next().await;
        out.waiting(match line {
            Ok(Line::Queued { position }) => Some(position),
            _ => None,
        });
        let failure = match line {
            Ok(Line::Start { model: name, served_by: node }) => {
                (model, served_by) = (name, node);
                continue;
            }
            Ok(Line::Text { text: piece }) => {
                text.push_str(&piece);
                if !out.json {
                    let mut safe = String::new();
                    filter.push(&piece, &mut safe);
                    last = safe.chars().next_back().unwrap_or(last);
                    out.text(&safe)?;
                }
                continue;
            }
            Ok(Line::End { reason, usage, timings }) => {
                end_line(last)?;
                return Ok(Answer { text, model, served_by, reason, usage, timings });
            }
            Ok(Line::Queued { .. } | Line::Unknown) => continue,
            Ok(Line::Error { name, message }) => Failure::named(&name, &message),
            Err(failure) => failure,
        };
        end_line(last)?;
        return Err(failure.into());
    }
}
