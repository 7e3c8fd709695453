//! `ogctl __complete`: answers the completion scripts in `packaging/completions/` at each key press.
//!
//! Not in the help: its form belongs to the scripts of the same version. It prints nothing rather than an error, and is
//! done within [`live::LIMIT`] whatever the daemon does.
//!
//! ```text
//! ogctl __complete bash WORDBREAKS LINE   one word a line, quoted for the place where the cursor is
//! ogctl __complete zsh|fish WORD...       a word, a tab, what it is; the last WORD is the one at the cursor
//! ```

mod line;
mod live;

use crate::args::{Args, Shell};
use crate::term;
use clap::{CommandFactory as _, ValueEnum as _};
use clap_complete::engine;
use std::ffi::OsString;
use std::io::Write as _;

/// A question of a completion script.
#[derive(Debug)]
pub struct Request {
    shell: Shell,
    rest: Vec<String>,
}

/// A word that may stand at the cursor.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    word: String,
    about: String,
}

/// The question on the command line, if this run is one.
pub fn request() -> Option<Request> {
    let mut args = std::env::args_os().skip(1);
    if args.next()? != "__complete" {
        return None;
    }
    let mut args = args.map(|arg| arg.to_string_lossy().into_owned());
    let shell = Shell::from_str(&args.next()?, false).ok()?;
    Some(Request { shell, rest: args.collect() })
}

/// Prints what may stand at the cursor.
pub fn answer(request: Request) {
    let lines: Vec<String> = match (request.shell, request.rest.as_slice()) {
        (Shell::Bash, [breaks, typed]) => {
            let words = line::split(typed, breaks);
            let cursor = words.last().cloned().unwrap_or_default();
            let found = candidates(words.into_iter().map(|word| word.text).collect());
            found.iter().filter_map(|candidate| cursor.complete(&candidate.word)).collect()
        }
        (Shell::Bash, _) => Vec::new(),
        (Shell::Zsh | Shell::Fish, _) => {
            candidates(request.rest).into_iter().map(|Candidate { word, about }| format!("{word}\t{about}")).collect()
        }
    };
    let mut out = std::io::stdout().lock();
    for line in lines {
        // A shell that has gone away wants no answer.
        if writeln!(out, "{line}").is_err() {
            return;
        }
    }
}

/// What may stand in place of the last of `words`; the first is the program.
fn candidates(words: Vec<String>) -> Vec<Candidate> {
    let Some(at) = words.len().checked_sub(1).filter(|&at| at > 0) else {
        return Vec::new();
    };
    let mut command = live::attach(Args::command(), &words);
    let typed_option = words[at].starts_with('-');
    let words = words.into_iter().map(OsString::from).collect();
    let found = engine::complete(&mut command, words, at, std::env::current_dir().ok().as_deref()).unwrap_or_default();
    found
        .iter()
        .filter_map(|candidate| {
            let word = candidate.get_value().to_str()?;
            let about = candidate.get_help().map(|help| help.to_string()).unwrap_or_default();
            let about = term::line(about.lines().next().unwrap_or_default());
            // Options are many: they are told when the first dash is there.
            let wanted = typed_option || !word.starts_with('-');
            (wanted && is_safe(word)).then(|| Candidate { word: word.to_owned(), about })
        })
        .collect()
}

/// Whether a word can be offered: nothing in it steers a terminal or breaks a line.
fn is_safe(word: &str) -> bool {
    !word.is_empty() && !word.chars().any(term::is_unsafe)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(typed: &[&str]) -> Vec<String> {
        let typed = ["ogctl"].iter().chain(typed).map(|&word| word.to_owned());
        candidates(typed.collect()).into_iter().map(|candidate| candidate.word).collect()
    }

    #[test]
    fn commands_options_and_their_values_need_no_daemon() {
        let commands = words(&[""]);
        assert!(commands.contains(&"status".into()) && commands.contains(&"prompt".into()), "{commands:?}");
        assert!(!commands.iter().any(|word| word.starts_with('-')), "{commands:?}");
        assert_eq!(words(&["monit"]), ["monitor"]);
        assert_eq!(words(&["prompt", "--max"]), ["--max-tokens"]);
        assert_eq!(words(&["status", "--color", ""]), ["auto", "always", "never"]);
        assert_eq!(words(&["status", "--color=al"]), ["--color=always"]);
        assert_eq!(words(&["--bus", "s"]), ["system", "session"]);
        assert_eq!(words(&["config", "ch"]), ["check"]);
    }

    #[test]
    fn nothing_is_offered_where_nothing_is_known() {
        assert!(words(&["monitor", ""]).is_empty());
        assert!(candidates(vec!["ogctl".into()]).is_empty() && candidates(Vec::new()).is_empty());
    }
}
