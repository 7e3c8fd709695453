//! From bytes of tokens to text that may be sent: whole characters, and no part of a stop text.

/// Collects the bytes of an answer.
#[derive(Debug)]
pub struct Answer {
    /// Bytes that may yet become a character.
    tail: Vec<u8>,
    /// Whole characters that may yet become a stop text.
    held: String,
    stops: Vec<String>,
    stopped: bool,
}

impl Answer {
    /// An empty answer; `stops` are not empty texts.
    pub fn new(stops: Vec<String>) -> Self {
        Self { tail: Vec::new(), held: String::new(), stops, stopped: false }
    }

    /// Takes the bytes of one more token; gives the text that is sure.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.tail.extend_from_slice(bytes);
        let length = whole_characters(&mut self.tail, &mut self.held);
        self.tail.drain(..length);
        if let Some(place) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            self.held.truncate(place);
            return std::mem::take(&mut self.held);
        }
        let sure = self.held.len() - self.stops.iter().map(|stop| begun(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(sure);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop text came.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The rest, at the end: what was held back, and a replacement character for a character that was never finished.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        let mut rest = std::mem::take(&mut self.held);
        rest.push_str(&String::from_utf8_lossy(&std::mem::take(&mut self.tail)));
        rest
    }
}

/// Appends the characters at the front of `bytes`; what can be no character becomes U+FFFD. Returns how many bytes are done:
/// all but the beginning of a character.
fn whole_characters(bytes: &mut [u8], text: &mut String) -> usize {
    let mut done = 0;
    loop {
        match std::str::from_utf8(&bytes[done..]) {
            Ok(rest) => {
                text.push_str(rest);
                return bytes.len();
            }
            Err(error) => {
                let valid = done + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[done..valid]));
                let Some(bad) = error.error_len() else { return valid };
                text.push(char::REPLACEMENT_CHARACTER);
                done = valid + bad;
            }
        }
    }
}

/// Length of the longest end of `text` that `stop` begins with.
fn begun(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|length| text.as_bytes()[text.len() - length..] == stop.as_bytes()[..*length]).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(stops: &[&str], pieces: &[&[u8]]) -> (Vec<String>, String, bool) {
        let mut answer = Answer::new(stops.iter().map(ToString::to_string).collect());
        let parts: Vec<_> = pieces.iter().map(|piece| answer.push(piece)).take_while(|_| true).collect();
        let rest = answer.finish();
        (parts, rest, answer.stopped())
    }

    #[test]
    fn characters_are_never_cut() {
        let smile = "\u{1f600}".as_bytes();
        let pieces: Vec<&[u8]> = smile.chunks(1).collect();
        let (parts, rest, _) = answer(&[], &pieces);
        assert_eq!(parts, ["", "", "", "\u{1f600}"]);
        assert_eq!(rest, "");
        // The answer ends inside a character.
        let (parts, rest, _) = answer(&[], &pieces[..3]);
        assert_eq!((parts.concat(), rest), (String::new(), "\u{fffd}".to_owned()));
        // What can never become one does not hold up the rest.
        assert_eq!(answer(&[], &[b"a\xffb", b"\xc3", b"("]).0, ["a\u{fffd}b", "", "\u{fffd}("]);
    }

    #[test]
    fn a_stop_text_never_shows_however_it_is_split() {
        let text = "one two END three";
        for size in 1..text.len() {
            let pieces: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
            let mut held = Answer::new(vec!["END".to_owned()]);
            let mut shown = String::new();
            for piece in pieces {
                shown += &held.push(piece);
                if held.stopped() {
                    break;
                }
            }
            assert!(held.stopped(), "{size}");
            assert_eq!(shown + &held.finish(), "one two ", "{size}");
        }
    }

    #[test]
    fn what_only_began_like_a_stop_text_is_told_in_the_end() {
        let (parts, rest, stopped) = answer(&["END", "\n\n"], &[b"the EN", b"GINE\n", b"EN"]);
        assert_eq!(parts, ["the ", "ENGINE", "\n"]);
        assert_eq!((rest.as_str(), stopped), ("EN", false));
    }

    #[test]
    fn the_first_of_several_stop_texts_counts() {
        let (parts, _, stopped) = answer(&["b", "ab"], &[b"xxab"]);
        assert_eq!((parts.concat(), stopped), ("xx".to_owned(), true));
        // A stop text of several bytes a character.
        let (parts, _, stopped) = answer(&["\u{1f600}"], &[b"a\xf0\x9f", b"\x98\x80b"]);
        assert_eq!((parts.concat(), stopped), ("a".to_owned(), true));
    }

    proptest::proptest! {
        #[test]
        fn nothing_is_lost_or_added(bytes: Vec<u8>, cuts: Vec<u8>) {
            let mut answer = Answer::new(vec!["\u{0}\u{1}\u{2}".to_owned()]);
            let (mut shown, mut rest) = (String::new(), bytes.as_slice());
            for cut in cuts {
                let (piece, after) = rest.split_at(rest.len().min(cut.into()));
                shown += &answer.push(piece);
                rest = after;
            }
            shown += &answer.push(rest);
            shown += &answer.finish();
            if !answer.stopped() {
                proptest::prop_assert_eq!(shown, String::from_utf8_lossy(&bytes));
            }
        }
    }
}
