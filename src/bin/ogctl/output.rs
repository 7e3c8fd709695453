//! Where output goes: text or JSON on standard output, the rest on standard error.
//!
//! Every command writes through [`Output`]; a closed pipe becomes [`Stop::Closed`] and ends it quietly.

use crate::args::{Color, Globals};
use crate::errors::{Failure, Stop};
use crate::json::{self, Schema};
use crate::render::Style;
use opengateway::api::names::exit;
use rustix::fs::FileType;
use serde::Serialize;
use std::cell::Cell;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use tokio::io::Interest;
use tokio::net::unix::pipe;

/// How this run prints.
#[derive(Debug)]
pub struct Output {
    /// JSON instead of text.
    pub json: bool,
    /// For standard output.
    pub style: Style,
    /// Whether standard error shows colour.
    stderr_color: bool,
    /// Whether standard error is a terminal.
    stderr_terminal: bool,
    /// A line on it is to be overwritten.
    passing: Cell<bool>,
}

/// Waits until nobody reads standard output any more; a write would notice that only when there is something to write. What
/// is no pipe is never left by its reader.
pub async fn reader_gone() {
    if watch_stdout().await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn watch_stdout() -> io::Result<()> {
    let stdout = io::stdout().as_fd().try_clone_to_owned()?;
    if FileType::from_raw_mode(rustix::fs::fstat(&stdout)?.st_mode) != FileType::Fifo {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // Unchecked: it would be made non-blocking, for everybody who has it. Nothing is written by this one.
    let pipe = pipe::Sender::from_owned_fd_unchecked(stdout)?;
    while !pipe.ready(Interest::ERROR).await?.is_error() {}
    Ok(())
}

/// The error object of `--json`.
#[derive(Serialize)]
struct ErrorView<'a> {
    error: ErrorBody<'a>,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    name: &'a str,
    message: &'a str,
    hint: &'a str,
}

impl Output {
    /// Decides on colour and width from the options, the environment and the terminal.
    pub fn new(globals: &Globals) -> Self {
        let (out, err) = (io::stdout().is_terminal(), io::stderr().is_terminal());
        let width = if out { terminal_width() } else { None };
        Self {
            json: globals.json,
            style: Style { color: colored(globals.color, out), width },
            stderr_color: colored(globals.color, err),
            stderr_terminal: err && std::env::var_os("TERM").is_none_or(|term| term != "dumb"),
            passing: Cell::new(false),
        }
    }

    /// Writes text that is safe already.
    pub fn text(&self, text: &str) -> Result<(), Stop> {
        self.bytes(text.as_bytes())
    }

    /// Writes bytes and flushes: a reader sees each piece at once.
    pub fn bytes(&self, bytes: &[u8]) -> Result<(), Stop> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        Ok(out.flush()?)
    }

    /// Writes `view` as one line of JSON with its schema.
    pub fn object<T: Serialize>(&self, view: T) -> Result<(), Stop> {
        self.bytes(&json::line(&Schema::one(view)))
    }

    /// Writes `view` as JSON, or as the text that `render` makes of it.
    pub fn view<T: Serialize>(&self, view: T, render: impl FnOnce(&T, &Style) -> String) -> Result<(), Stop> {
        if self.json { self.object(view) } else { self.text(&render(&view, &self.style)) }
    }

    /// A remark on standard error; not with `--json`. Losing it is no failure.
    pub fn note(&self, line: &str) {
        if !self.json {
            let (on, off) = if self.stderr_color { ("\u{1b}[2m", "\u{1b}[0m") } else { ("", "") };
            let _ = writeln!(io::stderr(), "{on}{line}{off}");
        }
    }

    /// Tells on a terminal how many prompts are before this one; `None` takes that away.
    pub fn waiting(&self, before: Option<u32>) {
        self.passing(before.map(|before| match before {
            0 => "waiting, you are next".to_owned(),
            before => format!("waiting, {before} before you"),
        }));
    }

    /// A line on the terminal of standard error that the next one overwrites; `None` takes it away.
    pub fn passing(&self, line: Option<String>) {
        if self.json || !self.stderr_terminal || (line.is_none() && !self.passing.get()) {
            return;
        }
        self.passing.set(line.is_some());
        let mut err = io::stderr().lock();
        let _ = write!(err, "\r\u{1b}[K{}", line.unwrap_or_default()).and_then(|()| err.flush());
    }

    /// Reports how the command ended and gives the exit code.
    pub fn finish(&self, result: Result<(), Stop>) -> u8 {
        match result {
            Ok(()) | Err(Stop::Closed) => exit::OK,
            Err(Stop::Found(code)) => code,
            Err(Stop::Interrupted) => {
                let failure = Failure::new("UserInterrupt", "interrupted by the user", "", exit::INTERRUPTED);
                if self.json {
                    self.report(&failure);
                }
                exit::INTERRUPTED
            }
            Err(Stop::Failed(failure)) => {
                self.report(&failure);
                failure.code
            }
        }
    }

    /// Reports a failure that does not end the command.
    pub fn report(&self, failure: &Failure) {
        self.passing(None);
        let Failure { name, message, hint, .. } = failure;
        if self.json {
            let _ = self.object(ErrorView { error: ErrorBody { name, message, hint } });
            return;
        }
        let (red, off) = if self.stderr_color { ("\u{1b}[1;31m", "\u{1b}[0m") } else { ("", "") };
        let next = if hint.is_empty() {
            String::new()
        } else {
            let end = if message.ends_with(['.', '?', '!']) { "" } else { "." };
            format!("{end} {}", capital(hint))
        };
        let _ = writeln!(io::stderr(), "{red}ogctl:{off} {message}{next}");
    }
}

/// `text` with a capital first letter, as the second sentence of a line.
fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

/// Whether to use colour on a stream.
fn colored(wish: Color, terminal: bool) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    match wish {
        Color::Always => true,
        Color::Never => false,
        Color::Auto if set("NO_COLOR") => false,
        Color::Auto if set("CLICOLOR_FORCE") && std::env::var_os("CLICOLOR_FORCE").is_some_and(|value| value != "0") => true,
        Color::Auto => terminal && std::env::var_os("TERM").is_none_or(|term| term != "dumb"),
    }
}

/// Columns of the terminal that standard output is; `COLUMNS` wins.
fn terminal_width() -> Option<usize> {
    let told = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
    let asked = || rustix::termios::tcgetwinsize(io::stdout()).ok().map(|size| usize::from(size.ws_col));
    told.or_else(asked).filter(|&columns| columns > 0)
}

/// Prints what clap says. With `--json` on the command line an error is an object too.
pub fn clap_error(error: &clap::Error) -> ExitCode {
    if error.use_stderr() && std::env::args_os().any(|arg| arg == "--json") {
        let text = error.render().to_string();
        // The first paragraph says what is wrong; usage and tips follow.
        let paragraph: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
        let message = paragraph.join(" ");
        let _ = io::stdout().write_all(&json::line(&Schema::one(ErrorView {
            error: ErrorBody { name: "Usage", message: message.trim_start_matches("error: "), hint: "see: ogctl help" },
        })));
    } else {
        let _ = error.print();
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(exit::USAGE))
}
