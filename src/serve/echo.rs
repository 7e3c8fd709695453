//! The backend that answers with the prompt's own text, token by token: the proof of the path.

use tokio::sync::{mpsc, watch};

use super::backend::{Answering, Availability, Backend, Limits};
use crate::domain::node::{ModelOffer, ModelSource};
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, Text, Usage};

/// Its name, and that of its only model.
pub const NAME: &str = "echo";
/// An echo costs no computation worth a queue; the bounds only keep memory in bounds.
const LIMITS: Limits = Limits { slots: 64, queued: 256, running_per_peer: 64, queued_per_peer: 256 };
/// Words that are shorter than this come together, so that a long prompt is not a thousand frames.
const MAX_PIECE_BYTES: usize = 2 * 1024;

/// Answers with the prompt's own text.
#[derive(Debug)]
pub struct Echo {
    availability: watch::Receiver<Availability>,
    _publish: watch::Sender<Availability>,
    limits: Limits,
}

impl Default for Echo {
    fn default() -> Self {
        Self::new(LIMITS)
    }
}

impl Echo {
    /// With other limits than the usual ones.
    pub fn new(limits: Limits) -> Self {
        let models = vec![ModelOffer { source: ModelSource::Echo, ..ModelOffer::named(NAME) }];
        let (publish, availability) = watch::channel(Availability { models, problem: None });
        Self { availability, _publish: publish, limits }
    }

    /// The usual limits.
    pub const fn default_limits() -> Limits {
        LIMITS
    }
}

/// Words with the space that follows them.
fn tokens(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let word = rest.find(char::is_whitespace).unwrap_or(rest.len());
        let end = rest[word..].find(|c: char| !c.is_whitespace()).map_or(rest.len(), |space| word + space);
        let (token, tail) = rest.split_at(end);
        rest = tail;
        Some(token)
    })
}

fn count(text: &str) -> u32 {
    u32::try_from(tokens(text).count()).unwrap_or(u32::MAX)
}

/// The whole echo of `ask`: pieces on token borders, and how it ended.
fn echo(ask: &Ask) -> (Vec<Text>, Done) {
    let most = ask.max_tokens.unwrap_or(u32::MAX);
    let text = ask.prompt.as_str();
    let mut pieces: Vec<Text> = Vec::new();
    let mut piece = String::new();
    let mut said = 0;
    let mut finish = FinishReason::Stop;
    // Short answers come token by token, long ones in pieces of some tokens.
    let together = text.len() > MAX_PIECE_BYTES;
    for token in tokens(text) {
        if said == most {
            finish = FinishReason::Length;
            break;
        }
        said += 1;
        if !piece.is_empty() && (!together || piece.len() + token.len() > MAX_PIECE_BYTES) {
            pieces.push(Text::new(std::mem::take(&mut piece)));
        }
        piece.push_str(token);
    }
    if !piece.is_empty() {
        pieces.push(Text::new(piece));
    }
    let prompt_tokens = count(text) + ask.system.as_ref().map_or(0, |system| count(system.as_str()));
    (pieces, Done { finish, usage: Usage { prompt_tokens, completion_tokens: said } })
}

impl Backend for Echo {
    fn name(&self) -> &str {
        NAME
    }

    fn is_last_resort(&self) -> bool {
        true
    }

    fn availability(&self) -> watch::Receiver<Availability> {
        self.availability.clone()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn answer_now(&self, _: &str, ask: &Ask) -> Option<(Vec<Text>, Done)> {
        Some(echo(ask))
    }

    fn answer(&self, _: String, ask: Ask, out: mpsc::Sender<Text>) -> Answering<'_> {
        Box::pin(async move {
            let (pieces, done) = echo(&ask);
            for piece in pieces {
                out.send(piece).await.map_err(|_| Failure::new(FailureKind::Cancelled, "the asker is gone"))?;
            }
            Ok(done)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ask(text: &str, max_tokens: Option<u32>) -> Ask {
        Ask { prompt: Text::new(text), max_tokens, ..Ask::default() }
    }

    #[test]
    fn the_answer_comes_token_by_token() {
        let (pieces, done) = echo(&ask("What is 2+2?", None));
        let words: Vec<&str> = pieces.iter().map(Text::as_str).collect();
        assert_eq!(words, ["What ", "is ", "2+2?"]);
        assert_eq!(done, Done { finish: FinishReason::Stop, usage: Usage { prompt_tokens: 3, completion_tokens: 3 } });
    }

    #[test]
    fn max_tokens_ends_it_with_length() {
        let (pieces, done) = echo(&ask("one two three", Some(2)));
        assert_eq!(pieces.len(), 2);
        assert_eq!(done.finish, FinishReason::Length);
        assert_eq!(echo(&ask("one two", Some(2))).1.finish, FinishReason::Stop);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_cut_inside_a_character(text in "\\PC{0,3000}") {
            let (pieces, _) = echo(&ask(&text, None));
            prop_assert_eq!(pieces.iter().map(Text::as_str).collect::<String>(), text);
        }
    }
}
