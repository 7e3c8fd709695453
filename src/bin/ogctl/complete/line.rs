//! A command line as bash holds it: taken apart into words, and one word put back.
//!
//! Bash hands over its own split, which cuts at the characters of `COMP_WORDBREAKS`: `llama3.2:3b` would be three
//! words. So the line itself is read here, by bash's rules for quotes; only what stands after the last such character
//! is replaced, because that is what bash replaces.

/// A word without its quotes, and what of it bash replaces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Word {
    /// The word as the program would get it.
    pub text: String,
    /// Bytes of `text` that bash leaves as they are.
    kept: usize,
    /// The quote that is still open at its end.
    open: Option<char>,
}

impl Word {
    /// What bash must put in place of this word's end to make it `whole`; nothing if it does not begin like it.
    pub fn complete(&self, whole: &str) -> Option<String> {
        let rest = whole.strip_prefix(&self.text[..self.kept])?;
        Some(match self.open {
            Some('\'') => rest.replace('\'', r"'\''"),
            Some(_) => escaped(rest, |c| matches!(c, '"' | '\\' | '$' | '`')),
            None => escaped(rest, |c| !(c.is_alphanumeric() || "-_./:=@%+,".contains(c))),
        })
    }
}

/// `text` with a backslash before each character that `special` finds.
fn escaped(text: &str, special: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if special(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// The words of `line`, which ends at the cursor; the last one is that at the cursor, and may be empty.
pub fn split(line: &str, breaks: &str) -> Vec<Word> {
    let mut words = Vec::new();
    let mut word = Word::default();
    let mut begun = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match (word.open, c) {
            (None, ' ' | '\t' | '\n') => {
                if std::mem::take(&mut begun) {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            (None, '\'' | '"') => {
                word.open = Some(c);
                word.kept = word.text.len();
            }
            (Some(open), _) if open == c => {
                word.open = None;
                word.kept = word.text.len();
            }
            (None, '\\') => word.text.extend(chars.next()),
            (Some('"'), '\\') => match chars.peek() {
                Some('"' | '\\' | '$' | '`') => word.text.extend(chars.next()),
                _ => word.text.push(c),
            },
            (open, _) => {
                word.text.push(c);
                if open.is_none() && breaks.contains(c) {
                    word.kept = word.text.len();
                }
            }
        }
        begun = true;
    }
    words.push(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What bash has by default.
    const BREAKS: &str = " \t\n\"'><=;|&(:";

    fn texts(line: &str) -> Vec<String> {
        split(line, BREAKS).into_iter().map(|word| word.text).collect()
    }

    /// What bash is given to complete `line` with `whole`.
    fn put(line: &str, whole: &str) -> Option<String> {
        split(line, BREAKS).last().unwrap().complete(whole)
    }

    #[test]
    fn quotes_are_read_as_bash_reads_them() {
        assert_eq!(texts(r#"ogctl prompt --node "Node A" 'b"c' d\ e"#), ["ogctl", "prompt", "--node", "Node A", "b\"c", "d e"]);
        assert_eq!(texts(r#"a "x\"\y" "#), ["a", "x\"\\y", ""]);
        assert_eq!(texts(r#"a "open it"#), ["a", "open it"]);
        assert_eq!(texts("a '' "), ["a", "", ""]);
        assert_eq!(texts(""), [""]);
    }

    #[test]
    fn only_what_bash_replaces_is_given_back() {
        assert_eq!(put("o -m lla", "llama3.2:3b").as_deref(), Some("llama3.2:3b"));
        assert_eq!(put("o -m llama3.2:", "llama3.2:3b").as_deref(), Some("3b"));
        assert_eq!(put("o --model=ll", "--model=llama3.2:3b").as_deref(), Some("llama3.2:3b"));
        assert_eq!(put("o --node N", "Node A's").as_deref(), Some(r"Node\ A\'s"));
        assert_eq!(put("o --node 'N", "Node A's").as_deref(), Some(r"Node A'\''s"));
        assert_eq!(put("o --node \"N", "Node \"$A\"").as_deref(), Some(r#"Node \"\$A\""#));
        assert_eq!(put("o --node=\"N", "--node=Node A").as_deref(), Some("Node A"));
        assert_eq!(put("o x:y", "other"), None);
    }

    proptest! {
        #[test]
        fn what_is_put_back_reads_as_the_word_again(whole in "[^\\x00-\\x1f\\x7f]{1,12}", quote in prop::sample::select(vec!["", "'", "\""])) {
            let back = put(&format!("o {quote}"), &whole).unwrap();
            let line = format!("o {quote}{back}{quote}");
            prop_assert_eq!(texts(&line).pop(), Some(whole));
        }
    }
}
