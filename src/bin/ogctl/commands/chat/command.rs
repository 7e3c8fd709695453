//! What is typed to `ogctl chat` itself: a line that begins with a slash.

use crate::errors::Failure;
use opengateway::api::names::exit;

/// Told by `/help`.
pub const HELP: &str = "\
/model [NAME]   ask this model from now on; - takes the best one; alone: which there are
/node [NAME]    ask this node only; - takes any
/system [TEXT]  instructions before the conversation; - takes them away
/retry          ask the last question again
/reset          begin a new conversation
/save FILE      write the conversation into a new file
/quit           leave, as Ctrl-D does
//...           a question that begins with a slash";

/// A wish about the chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Tell the commands.
    Help,
    /// Leave.
    Quit,
    /// Forget what was said.
    Reset,
    /// Ask the last question again.
    Retry,
    /// Which model; `None` tells.
    Model(Option<String>),
    /// Which node; `None` tells.
    Node(Option<String>),
    /// Instructions; `None` tells.
    System(Option<String>),
    /// Write the conversation there.
    Save(String),
}

impl Command {
    /// The command of a line; `None` for what is to be asked.
    ///
    /// # Errors
    /// There is no such command, or it lacks its argument.
    pub fn parse(line: &str) -> Result<Option<Self>, Failure> {
        let Some(rest) = line.trim().strip_prefix('/').filter(|rest| !rest.starts_with('/')) else { return Ok(None) };
        let (word, argument) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let argument = Some(argument.trim()).filter(|argument| !argument.is_empty()).map(str::to_owned);
        let usage = |message: String| Failure::new("Usage", message, "see what there is with: /help", exit::USAGE);
        Ok(Some(match (word, argument) {
            ("help" | "?", _) => Self::Help,
            ("quit" | "exit" | "q", None) => Self::Quit,
            ("reset", None) => Self::Reset,
            ("retry", None) => Self::Retry,
            ("model", argument) => Self::Model(argument),
            ("node", argument) => Self::Node(argument),
            ("system", argument) => Self::System(argument),
            ("save", Some(path)) => Self::Save(path),
            ("save", None) => return Err(usage("/save needs the name of a file".to_owned())),
            ("quit" | "exit" | "q" | "reset" | "retry", Some(_)) => return Err(usage(format!("/{word} takes nothing more"))),
            _ => {
                let word: String = crate::term::line(word).chars().take(32).collect();
                return Err(usage(format!("there is no command /{word}; a question that begins with a slash begins with two")));
            }
        }))
    }
}

/// What is asked: of two slashes at the beginning one.
pub fn unescaped(text: &str) -> &str {
    if text.starts_with("//") { &text[1..] } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_makes_a_command_and_two_make_a_question() {
        let parse = |line: &str| Command::parse(line).unwrap();
        assert_eq!(parse("What is 2+2?"), None);
        assert_eq!((parse("//etc"), unescaped("//etc"), unescaped("a//b")), (None, "/etc", "a//b"));
        assert_eq!(parse(" /model  demo "), Some(Command::Model(Some("demo".into()))));
        assert_eq!(parse("/model"), Some(Command::Model(None)));
        assert_eq!(parse("/system Be\nbrief."), Some(Command::System(Some("Be\nbrief.".into()))));
        for (line, wanted) in [("/quit", Command::Quit), ("/reset", Command::Reset), ("/retry", Command::Retry)] {
            assert_eq!(parse(line), Some(wanted));
        }
        for bad in ["/nonsense", "/save", "/quit now", "/"] {
            assert_eq!(Command::parse(bad).unwrap_err().code, exit::USAGE, "{bad}");
        }
    }

    #[test]
    fn every_command_is_in_the_help() {
        for word in ["model", "node", "system", "retry", "reset", "save", "quit"] {
            assert!(HELP.contains(&format!("/{word} ")), "{word}");
        }
    }
}
