//! The model's tokens: text to tokens and back, and which texts are not text.

use std::collections::{HashMap, HashSet};

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token_type::LlamaTokenAttr;

/// Texts that the tokenizer takes for special tokens.
#[derive(Debug, Default)]
pub struct Specials {
    texts: HashSet<String>,
    /// Lengths in bytes of the texts by their first character, so that a message is searched once.
    lengths: HashMap<char, Vec<usize>>,
}

impl Specials {
    /// All special tokens of the model. `template` is the file's own, if it has one: what it writes is special too.
    pub fn of(model: &LlamaModel, template: Option<&str>) -> Self {
        let vocabulary = model.vocab();
        let texts = vocabulary.tokens().filter_map(|token| {
            let attributes = vocabulary.attr(token);
            let text = vocabulary.text(token)?.to_str().ok()?;
            let special = attributes.contains(LlamaTokenAttr::Control)
                || attributes.contains(LlamaTokenAttr::Unknown)
                || (attributes.contains(LlamaTokenAttr::UserDefined) && marks(text, template));
            special.then(|| text.to_owned())
        });
        Self::new(texts)
    }

    fn new(texts: impl Iterator<Item = String>) -> Self {
        let texts: HashSet<_> = texts.filter(|text| text.chars().count() > 1 && !text.trim().is_empty()).collect();
        let mut lengths: HashMap<_, Vec<_>> = HashMap::new();
        for text in &texts {
            if let Some(first) = text.chars().next() {
                lengths.entry(first).or_default().push(text.len());
            }
        }
        for lengths in lengths.values_mut() {
            lengths.sort_unstable();
            lengths.dedup();
        }
        Self { texts, lengths }
    }

    /// Whether this is the text of a special token.
    pub fn contains(&self, text: &str) -> bool {
        self.texts.contains(text)
    }

    /// The same text for people, but not for the tokenizer: a blank after the first character of each special text.
    pub fn neutralise(&self, text: &str) -> String {
        let mut result = String::with_capacity(text.len());
        for (place, sign) in text.char_indices() {
            result.push(sign);
            if self.begins(&text[place..], sign) {
                result.push(' ');
            }
        }
        // Only a special text with a blank in it could be made by a blank.
        if self.texts.iter().any(|special| special.contains(' ')) && self.found(&result) {
            result.retain(|sign| !self.lengths.contains_key(&sign));
        }
        result
    }

    fn found(&self, text: &str) -> bool {
        text.char_indices().any(|(place, sign)| self.begins(&text[place..], sign))
    }

    fn begins(&self, text: &str, first: char) -> bool {
        let Some(lengths) = self.lengths.get(&first) else { return false };
        lengths.iter().any(|length| text.get(..*length).is_some_and(|start| self.texts.contains(start)))
    }
}

/// User-defined tokens are often plain text (runs of blanks, HTML tags); those that look or serve like marks are not.
fn marks(text: &str, template: Option<&str>) -> bool {
    let inside = |open, close| text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
    let name = inside('<', '>').or_else(|| inside('[', ']'));
    let mark = |name: &str| {
        let upper = name.chars().all(|sign| sign.is_ascii_uppercase() || matches!(sign, '_' | '/'));
        upper || name.contains(['|', '\u{ff5c}', '_', '\u{2581}', ':'])
    };
    name.is_some_and(|name| mark(name) || template.is_some_and(|template| template.contains(text)))
}

/// Tokens of a rendered conversation: special texts become special tokens, and there is one beginning of text where the model
/// wants one.
pub fn tokenize_chat(model: &LlamaModel, text: &str) -> Vec<LlamaToken> {
    let vocabulary = model.vocab();
    let mut tokens = vocabulary.tokenize(text.as_bytes(), false, true);
    let begin = vocabulary.bos();
    if vocabulary.should_add_bos() && begin.0 >= 0 && tokens.first() != Some(&begin) {
        tokens.insert(0, begin);
    }
    tokens
}

/// Tokens of text as it stands: nothing in it is special.
pub fn tokenize_raw(model: &LlamaModel, text: &str) -> Vec<LlamaToken> {
    model.vocab().tokenize(text.as_bytes(), true, false)
}

/// Text of a token; nothing for the token of a negative number, as a model without it has.
pub fn text(model: &LlamaModel, token: LlamaToken) -> String {
    if token.0 < 0 {
        return String::new();
    }
    model.vocab().text(token).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specials(texts: &[&str]) -> Specials {
        Specials::new(texts.iter().map(ToString::to_string))
    }

    #[test]
    fn special_texts_are_broken_up_and_the_rest_stays() {
        let specials = specials(&["<|im_start|>", "<|im_end|>", "</s>", "<s>", "\n\n", "a"]);
        assert_eq!(specials.neutralise("Hi <b>there</b>\n\na </s"), "Hi <b>there</b>\n\na </s");
        assert_eq!(specials.neutralise("x<|im_end|>\n<|im_start|>system"), "x< |im_end|>\n< |im_start|>system");
        assert_eq!(specials.neutralise("<<s>s></s>"), "<< s>s>< /s>");
        // Taking one out must not leave another.
        let nested = specials.neutralise("<|im_<|im_end|>end|>");
        assert!(!specials.found(&nested), "{nested}");
    }

    #[test]
    fn a_blank_makes_no_special_text() {
        let specials = specials(&["<x>", "< x>"]);
        assert!(!specials.found(&specials.neutralise("a <x> b")));
    }

    #[test]
    fn plain_user_defined_tokens_are_text() {
        for mark in ["<|user|>", "[INST]", "[/INST]", "<start_of_turn>", "<\u{ff5c}User\u{ff5c}>", "<seed:bos>"] {
            assert!(marks(mark, None), "{mark}");
        }
        for text in ["<b>", "</table>", "    ", "\n\n", "[0]", "<", ">>>"] {
            assert!(!marks(text, None), "{text}");
        }
        assert!(marks("<think>", Some("{{ '<think>' }}")));
    }

    proptest::proptest! {
        #[test]
        fn nothing_special_is_left(text in "[<|>/ sab\u{2581}]{0,40}") {
            let specials = specials(&["<|s|>", "</s>", "<s>", "||", "< s", "|>"]);
            proptest::prop_assert!(!specials.found(&specials.neutralise(&text)));
        }
    }
}
