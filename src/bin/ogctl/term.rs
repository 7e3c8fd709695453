//! Makes text from other machines safe to show.
//!
//! Everything that a peer, a model or an error message says passes here before it reaches a terminal
//! or a pipe. What comes out never holds a control character, whatever goes in and however it is split.

/// How far an escape sequence has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// Plain text.
    #[default]
    Ground,
    /// After ESC, and its intermediates.
    Escape,
    /// Inside a control sequence (CSI), until its final byte.
    Control,
    /// Inside a control string (OSC, DCS, APC, PM, SOS), until its terminator.
    String,
    /// ESC inside a control string: the terminator's first half.
    StringEscape,
}

/// Removes control characters and whole escape sequences, and makes hidden characters visible.
///
/// Keeps its state from one piece to the next: a sequence that is split over two tokens is removed as well.
#[derive(Debug, Default)]
pub struct Filter {
    state: State,
}

impl Filter {
    /// Appends what is safe of `text` to `safe`.
    pub fn push(&mut self, text: &str, safe: &mut String) {
        safe.reserve(text.len());
        for c in text.chars() {
            self.step(c, safe);
        }
    }

    fn step(&mut self, c: char, safe: &mut String) {
        self.state = match (self.state, c) {
            // A line feed ends every sequence, so that an unfinished one cannot hide more than its line.
            (_, '\n') => {
                safe.push('\n');
                State::Ground
            }
            (State::String, '\u{1b}') => State::StringEscape,
            (State::String | State::StringEscape, '\u{07}' | '\u{18}' | '\u{1a}' | '\u{9c}') => State::Ground,
            (State::String, _) => State::String,
            (State::StringEscape, '\\') => State::Ground,
            // ESC and something else: the string is over and a new sequence begins.
            (State::StringEscape, _) => escape(c),
            (_, '\u{1b}') => State::Escape,
            (_, '\u{9b}') => State::Control,
            (_, '\u{90}' | '\u{98}' | '\u{9d}' | '\u{9e}' | '\u{9f}') => State::String,
            (State::Escape, _) if c.is_ascii() => escape(c),
            (State::Control, ' '..='?') => State::Control,
            (State::Control, '@'..='~') => State::Ground,
            (State::Control, '\u{18}' | '\u{1a}') => State::Ground,
            (State::Control, _) if c.is_control() => State::Control,
            (_, _) => {
                show(c, safe);
                State::Ground
            }
        };
    }
}

/// Where the character after ESC leads.
fn escape(c: char) -> State {
    match c {
        '[' => State::Control,
        ']' | 'P' | 'X' | '^' | '_' => State::String,
        ' '..='/' | '\u{1b}' => State::Escape,
        _ => State::Ground,
    }
}

/// Appends one character of plain text.
fn show(c: char, safe: &mut String) {
    if c == '\t' || !(c.is_control() || is_hidden(c)) {
        safe.push(c);
    } else if is_hidden(c) {
        safe.extend(c.escape_unicode());
    }
}

/// Whether `c` turns the order of text round, or takes no room: both make text look like other text.
pub const fn is_hidden(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}'
        | '\u{ffa0}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// Whether `c` must not be written as it is, even inside JSON.
pub fn is_unsafe(c: char) -> bool {
    c.is_control() || is_hidden(c)
}

/// `text` as safe text of one line: line feeds and tabs become blanks.
pub fn line(text: &str) -> String {
    let mut safe = String::new();
    Filter::default().push(text, &mut safe);
    if safe.contains(['\n', '\t']) { safe.replace(['\n', '\t'], " ") } else { safe }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn filter<'a>(pieces: impl IntoIterator<Item = &'a str>) -> String {
        let mut filter = Filter::default();
        let mut safe = String::new();
        for piece in pieces {
            filter.push(piece, &mut safe);
        }
        safe
    }

    #[test]
    fn escape_sequences_go_whole() {
        for (attack, left) in [
            ("a\u{1b}[31mred\u{1b}[0mb", "aredb"),
            ("a\u{1b}]0;title\u{07}b", "ab"),
            ("a\u{1b}]52;c;ZXZpbA==\u{1b}\\b", "ab"),
            ("a\u{1b}P$q\"p\u{1b}\\b", "ab"),
            ("a\u{9b}2Jb", "ab"),
            ("a\u{9d}0;t\u{9c}b", "ab"),
            ("a\u{1b}(0b", "ab"),
            ("a\u{1b}cb", "ab"),
            ("a\u{1b}\u{1b}[2Jb", "ab"),
            ("a\u{1b}]x\u{1b}[2Jb", "ab"),
            ("a\rb\u{08}c\u{7f}d\u{0}e\u{85}f", "abcdef"),
            ("a\u{1b}[12ä", "aä"),
            ("a\u{1b}ä", "aä"),
        ] {
            assert_eq!(filter([attack]), left, "{attack:?}");
            let split: Vec<String> = attack.chars().map(String::from).collect();
            assert_eq!(filter(split.iter().map(String::as_str)), left, "{attack:?} split");
        }
    }

    #[test]
    fn an_unfinished_sequence_hides_no_more_than_its_line() {
        assert_eq!(filter(["a\u{1b}]hidden", "hidden\nshown"]), "a\nshown");
    }

    #[test]
    fn hidden_characters_become_visible() {
        assert_eq!(filter(["a\u{202e}b\u{200b}c\u{feff}"]), "a\\u{202e}b\\u{200b}c\\u{feff}");
        assert_eq!(filter(["tab\tline\nä€😀"]), "tab\tline\nä€😀");
    }

    #[test]
    fn one_line_stays_one_line() {
        assert_eq!(line("NodeA\n\u{1b}[2Jfake\tx"), "NodeA fake x");
    }

    /// Characters that steer a terminal, often.
    fn attack() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            any::<char>(),
            prop::sample::select(vec![
                '\u{1b}', '[', ']', 'P', '\\', '\u{07}', '\u{9b}', '\u{9c}', '\u{9d}', ';', 'm', '\n', '\u{18}', '\u{202e}'
            ])
        ];
        prop::collection::vec(piece, 0..64).prop_map(|chars| chars.into_iter().collect())
    }

    proptest! {
        #[test]
        fn nothing_that_steers_a_terminal_comes_out_however_it_is_split(text in attack(), cuts in prop::collection::vec(0usize..64, 0..6)) {
            let whole = filter([text.as_str()]);
            prop_assert!(whole.chars().all(|c| c == '\n' || c == '\t' || !is_unsafe(c)));
            let chars: Vec<char> = text.chars().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(chars.len())).collect();
            cuts.extend([0, chars.len()]);
            cuts.sort_unstable();
            let pieces: Vec<String> = cuts.windows(2).map(|cut| chars[cut[0]..cut[1]].iter().collect()).collect();
            prop_assert_eq!(filter(pieces.iter().map(String::as_str)), whole);
        }
    }
}
