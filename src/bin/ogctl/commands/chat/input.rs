//! Where turns come from: a line editor on a terminal, else lines of standard input.
//!
//! Both block, so both are read on a thread of their own: the connection to the bus goes on, and a signal is heard.

use crate::errors::{Failure, Stop};
use opengateway::api::names::{MAX_PROMPT_BYTES, exit};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};
use std::io::{BufRead as _, IsTerminal as _, Read as _};
use std::sync::mpsc as blocking;
use tokio::sync::mpsc;

/// Lines that the editor remembers.
const REMEMBERED: usize = 1000;

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// A turn; several lines where they were pasted together.
    Text(String),
    /// Ctrl-C took back what was typed.
    TakenBack,
    /// There is no more.
    End,
}

/// The source of turns.
#[derive(Debug)]
pub struct Input {
    /// Asks the thread for one more.
    wishes: blocking::Sender<()>,
    turns: mpsc::Receiver<Result<Read, Failure>>,
    /// The terminal as it was, put back at the end: the editor cannot do that when a signal ends this process.
    before: Option<Termios>,
}

impl Input {
    /// A line editor where people type and read, unless JSON is wanted.
    ///
    /// # Errors
    /// The terminal cannot be used, or no thread can be started.
    pub fn open(json: bool) -> Result<Self, Failure> {
        let terminal = !json && std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        let before = terminal.then(|| tcgetattr(std::io::stdin()).ok()).flatten();
        let (wishes, wished) = blocking::channel();
        let (send, turns) = mpsc::channel(1);
        let failed = |error: &dyn std::fmt::Display| Failure::new("System", format!("cannot read: {error}"), "", exit::FAILED);
        let builder = std::thread::Builder::new().name("input".to_owned());
        let started = if before.is_some() {
            let editor = editor().map_err(|error| failed(&error))?;
            builder.spawn(move || edit(editor, &wished, &send))
        } else {
            builder.spawn(move || lines(&wished, &send))
        };
        started.map_err(|error| failed(&error))?;
        Ok(Self { wishes, turns, before })
    }

    /// Whether a person types.
    pub const fn is_terminal(&self) -> bool {
        self.before.is_some()
    }

    /// The next turn.
    ///
    /// # Errors
    /// It cannot be read, or is too long.
    pub async fn next(&mut self) -> Result<Read, Stop> {
        if self.wishes.send(()).is_err() {
            return Ok(Read::End);
        }
        Ok(self.turns.recv().await.unwrap_or(Ok(Read::End))?)
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}

fn editor() -> rustyline::Result<Editor<(), MemHistory>> {
    let config = Config::builder().max_history_size(REMEMBERED)?.auto_add_history(true).bracketed_paste(true).build();
    let history = MemHistory::with_config(&config);
    Editor::with_history(config, history)
}

/// Edits a line for each wish. Ctrl-C takes back what was typed, which the editor does not tell; a second one in a row leaves.
fn edit(mut editor: Editor<(), MemHistory>, wished: &blocking::Receiver<()>, send: &mpsc::Sender<Result<Read, Failure>>) {
    let mut was_taken_back = false;
    while wished.recv().is_ok() {
        let line = editor.readline("> ");
        let is_taken_back = matches!(line, Err(ReadlineError::Interrupted));
        let read = match line {
            Ok(text) => Ok(Read::Text(text)),
            Err(ReadlineError::Interrupted) if !was_taken_back => Ok(Read::TakenBack),
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(Read::End),
            // The window has another size.
            Err(ReadlineError::Signal(_)) => Ok(Read::Text(String::new())),
            Err(error) => Err(Failure::new("System", format!("cannot read the terminal: {error}"), "", exit::FAILED)),
        };
        was_taken_back = is_taken_back;
        if send.blocking_send(read).is_err() {
            return;
        }
    }
}

/// Reads a line for each wish.
fn lines(wished: &blocking::Receiver<()>, send: &mpsc::Sender<Result<Read, Failure>>) {
    let mut stdin = std::io::stdin().lock();
    while wished.recv().is_ok() {
        let mut line = Vec::new();
        let read = match stdin.by_ref().take(MAX_PROMPT_BYTES as u64 + 2).read_until(b'\n', &mut line) {
            Ok(0) => Ok(Read::End),
            Ok(_) => text_of(line),
            Err(error) => Err(Failure::usage(format!("cannot read standard input: {error}"))),
        };
        if send.blocking_send(read).is_err() {
            return;
        }
    }
}

fn text_of(mut line: Vec<u8>) -> Result<Read, Failure> {
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    if line.len() > MAX_PROMPT_BYTES {
        return Err(Failure::usage(format!("a line is longer than {} KiB", MAX_PROMPT_BYTES / 1024)));
    }
    String::from_utf8(line).map(Read::Text).map_err(|_| Failure::usage("a line is not UTF-8 text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_at_the_limit_passes_and_one_byte_more_does_not() {
        let line = |length: usize| [vec![b'a'; length], b"\n".to_vec()].concat();
        assert_eq!(text_of(line(MAX_PROMPT_BYTES)).unwrap(), Read::Text("a".repeat(MAX_PROMPT_BYTES)));
        assert!(text_of(line(MAX_PROMPT_BYTES + 1)).is_err());
        assert_eq!(text_of(b"x\r\n".to_vec()).unwrap(), Read::Text("x".to_owned()));
        assert!(text_of(b"\xff\n".to_vec()).is_err());
    }
}
