//! Text for people: tables fitted to the terminal, quantities, times, colours.
//!
//! Pure functions of what they are given. Callers pass text that is safe already (see `term`).

use std::fmt::Write as _;
use std::time::Duration;

/// How standard output wants its text.
#[derive(Debug, Clone, Copy, Default)]
pub struct Style {
    /// Colours and bold type.
    pub color: bool,
    /// Columns of the terminal; `None` when it is none, and nothing is cut then.
    pub width: Option<usize>,
}

/// Meaning of a piece of text, shown as a colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// No colour.
    Plain,
    /// Headings.
    Bold,
    /// As it should be.
    Good,
    /// Works, with a limit.
    Warn,
    /// Does not work.
    Bad,
}

impl Style {
    /// `text` in the colour of `tone`.
    pub fn paint(&self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            Tone::Bold => "1",
            Tone::Good => "32",
            Tone::Warn => "33",
            Tone::Bad => "31",
        };
        if self.color { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

/// The colour of a state of node, cluster or peer.
pub fn tone_of_state(state: &str) -> Tone {
    match state {
        "online" | "connected" | "alive" | "running" | "done" | "ready" => Tone::Good,
        "starting" | "joining" | "discovering" | "connecting" | "degraded" | "suspect" | "queued" | "stopping"
        | "disconnecting" | "loading" => Tone::Warn,
        "failed" | "cancelled" => Tone::Bad,
        _ => Tone::Plain,
    }
}

/// Columns that `text` takes on a terminal; wide East Asian characters and emoji take two.
pub fn width(text: &str) -> usize {
    text.chars().map(char_width).sum()
}

const fn char_width(c: char) -> usize {
    match c {
        '\u{300}'..='\u{36f}' | '\u{fe00}'..='\u{fe0f}' => 0,
        '\u{1100}'..='\u{115e}'
        | '\u{2e80}'..='\u{a4cf}'
        | '\u{ac00}'..='\u{d7a3}'
        | '\u{f900}'..='\u{faff}'
        | '\u{fe30}'..='\u{fe6f}'
        | '\u{ff00}'..='\u{ff60}'
        | '\u{ffe0}'..='\u{ffe6}'
        | '\u{1f300}'..='\u{1faff}'
        | '\u{20000}'..='\u{3fffd}' => 2,
        _ => 1,
    }
}

/// `text` in at most `columns`, with an ellipsis where it was cut.
fn cut(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let mut kept = String::new();
    let mut taken = 1; // the ellipsis
    for c in text.chars() {
        taken += char_width(c);
        if taken > columns {
            break;
        }
        kept.push(c);
    }
    kept.push('…');
    kept
}

/// `text` in lines of at most `columns`, broken at blanks; a word that is longer than a line is broken where the line ends.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split(' ') {
        if !line.is_empty() && width(&line) + 1 + width(word) > columns {
            lines.push(std::mem::take(&mut line));
        } else if !line.is_empty() {
            line.push(' ');
        }
        for c in word.chars() {
            if !line.is_empty() && width(&line) + char_width(c) > columns {
                lines.push(std::mem::take(&mut line));
            }
            line.push(c);
        }
    }
    lines.push(line);
    lines
}

/// A cell: its text and its colour.
pub type Cell = (String, Tone);

/// A plain cell.
pub fn cell(text: impl Into<String>) -> Cell {
    (text.into(), Tone::Plain)
}

/// A table with a header line.
#[derive(Debug)]
pub struct Table {
    headers: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
    /// Whether a cell that is too wide becomes several lines instead of being cut.
    wraps: bool,
}

/// Columns between two cells.
const GAP: usize = 2;
/// No column is cut below this.
const NARROWEST: usize = 8;

impl Table {
    /// A table without rows.
    pub fn new(headers: &[&'static str]) -> Self {
        Self { headers: headers.to_vec(), rows: Vec::new(), wraps: false }
    }

    /// The same, for text that must be read whole.
    #[must_use]
    pub fn wrapping(self) -> Self {
        Self { wraps: true, ..self }
    }

    /// Adds a row; it has as many cells as there are headers.
    pub fn row(&mut self, cells: Vec<Cell>) {
        debug_assert_eq!(cells.len(), self.headers.len());
        self.rows.push(cells);
    }

    /// Widths of the columns: what they need, less what the widest give up to fit.
    fn widths(&self, limit: Option<usize>) -> Vec<usize> {
        let mut widths: Vec<usize> = self.headers.iter().map(|header| width(header)).collect();
        for row in &self.rows {
            for (column, (text, _)) in widths.iter_mut().zip(row) {
                *column = (*column).max(width(text));
            }
        }
        let gaps = GAP * widths.len().saturating_sub(1);
        while let Some(limit) = limit {
            let widest = widths.iter().copied().max().unwrap_or(0);
            if widths.iter().sum::<usize>() + gaps <= limit || widest <= NARROWEST {
                break;
            }
            if let Some(column) = widths.iter_mut().rev().find(|column| **column == widest) {
                *column -= 1;
            }
        }
        widths
    }

    /// One line for each cell: for a terminal on which the columns would be of no use side by side.
    fn cards(&self, style: &Style) -> String {
        let label_width = self.headers.iter().map(|header| width(header) + 1).max().unwrap_or(0);
        let mut text = String::new();
        for (at, row) in self.rows.iter().enumerate() {
            if at > 0 {
                text.push('\n');
            }
            for (header, (content, tone)) in self.headers.iter().zip(row) {
                let label = format!("{header}:{}", " ".repeat(label_width - width(header)));
                writeln!(text, "{}{}", style.paint(Tone::Bold, &label), style.paint(*tone, content))
                    .expect("writing to a String does not fail");
            }
        }
        text
    }

    /// The table as lines. Without a terminal nothing is cut; on one that is too narrow for it each row becomes lines.
    pub fn render(&self, style: &Style) -> String {
        let widths = self.widths(style.width);
        let needed = widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1);
        if style.width.is_some_and(|limit| needed > limit) && !self.rows.is_empty() {
            return self.cards(style);
        }
        let mut text = String::new();
        let mut write_row = |cells: &mut dyn Iterator<Item = (&str, Tone)>| {
            let fitted = cells.zip(&widths).map(|((content, tone), &column)| {
                (if self.wraps { wrap(content, column) } else { vec![cut(content, column)] }, tone)
            });
            let fitted: Vec<(Vec<String>, Tone)> = fitted.collect();
            let height = fitted.iter().map(|(lines, _)| lines.len()).max().unwrap_or(0);
            for at in 0..height {
                let mut line = String::new();
                let mut pending = 0;
                for ((lines, tone), &column) in fitted.iter().zip(&widths) {
                    let content = lines.get(at).map(String::as_str).unwrap_or_default();
                    line.extend(std::iter::repeat_n(' ', pending));
                    pending = column - width(content) + GAP;
                    line.push_str(&style.paint(*tone, content));
                }
                text.push_str(line.trim_end());
                text.push('\n');
            }
        };
        write_row(&mut self.headers.iter().map(|&header| (header, Tone::Bold)));
        for row in &self.rows {
            write_row(&mut row.iter().map(|(content, tone)| (content.as_str(), *tone)));
        }
        text
    }
}

/// Lines of `label: value` with aligned values; empty values are left out.
pub fn fields(style: &Style, pairs: &[(&str, String)]) -> String {
    let label_width = pairs.iter().filter(|(_, value)| !value.is_empty()).map(|(label, _)| width(label) + 1).max().unwrap_or(0);
    let mut text = String::new();
    for (label, value) in pairs.iter().filter(|(_, value)| !value.is_empty()) {
        let pad = " ".repeat(label_width - width(label) - 1);
        for (at, line) in value.lines().enumerate() {
            let head =
                if at == 0 { format!("{}{pad}", style.paint(Tone::Bold, &format!("{label}:"))) } else { " ".repeat(label_width) };
            writeln!(text, "{head} {line}").expect("writing to a String does not fail");
        }
    }
    text
}

/// Bytes in GiB, `-` when unknown.
pub fn gib(bytes: Option<u64>) -> String {
    match bytes {
        None => "-".to_owned(),
        Some(bytes) => {
            #[allow(clippy::cast_precision_loss)] // one decimal is shown
            let gib = bytes as f64 / f64::from(1 << 30);
            if gib > 0.0 && gib < 0.1 { "<0.1 GiB".to_owned() } else { format!("{gib:.1} GiB") }
        }
    }
}

/// Bytes of a file, in the 10^6 and 10^9 bytes in which files are told; `-` when unknown.
pub fn file_size(bytes: Option<u64>) -> String {
    #[allow(clippy::cast_precision_loss)] // one decimal is shown
    match bytes {
        None => "-".to_owned(),
        Some(bytes @ 0..1_000) => format!("{bytes} B"),
        Some(bytes @ 1_000..100_000) => format!("{:.1} kB", bytes as f64 / 1e3),
        Some(bytes @ 100_000..1_000_000_000) => format!("{:.1} MB", bytes as f64 / 1e6),
        Some(bytes) => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// A latency: microseconds below one millisecond, then milliseconds, then seconds; `-` when unknown.
pub fn latency(micros: Option<u64>) -> String {
    #[allow(clippy::cast_precision_loss)] // latencies are small
    match micros {
        None => "-".to_owned(),
        Some(micros @ 0..1_000) => format!("{micros} µs"),
        Some(micros @ 1_000..1_000_000) => format!("{:.1} ms", micros as f64 / 1e3),
        Some(micros) => format!("{:.2} s", micros as f64 / 1e6),
    }
}

/// A length of time in its two largest units.
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    if days > 0 {
        format!("{days} d {} h", hours % 24)
    } else if hours > 0 {
        format!("{hours} h {} min", minutes % 60)
    } else if minutes > 0 {
        format!("{minutes} min {} s", seconds % 60)
    } else {
        format!("{seconds} s")
    }
}

/// How long ago something was, from microseconds: "now", "3 s ago".
pub fn ago(micros: u64) -> String {
    match Duration::from_micros(micros) {
        time if time < Duration::from_secs(1) => "now".to_owned(),
        time => format!("{} ago", span(time)),
    }
}

/// The way through another node, as `peers`, `ping` and `doctor` call it.
pub fn relayed(by: Option<&str>) -> String {
    by.map_or_else(|| "relayed".to_owned(), |name| format!("relayed via {}", crate::term::line(name)))
}

/// The machine that a multiaddr names: "10.0.0.2" of "/ip4/10.0.0.2/udp/4001/quic-v1".
pub fn host(address: &str) -> String {
    let mut parts = address.split('/').skip(1);
    let kind = parts.next().unwrap_or_default();
    let host = parts.next().filter(|_| kind.starts_with("ip") || kind.starts_with("dns"));
    crate::term::line(host.unwrap_or(address))
}

/// `list` with commas, `-` when empty.
pub fn list(list: &[String]) -> String {
    if list.is_empty() { "-".to_owned() } else { list.iter().map(|item| crate::term::line(item)).collect::<Vec<_>>().join(", ") }
}

/// The end of a peer id, which differs where the beginning does not.
pub fn short_id(peer_id: &str) -> String {
    let safe = crate::term::line(peer_id);
    let count = safe.chars().count();
    if count <= 10 { safe } else { format!("…{}", safe.chars().skip(count - 8).collect::<String>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&["NAME", "MODELS"]);
        table.row(vec![cell("NodeA"), cell("a-very-long-model-name-that-does-not-fit")]);
        table.row(vec![cell("日本"), cell("echo")]);
        table
    }

    #[test]
    fn a_table_fits_the_terminal_and_is_whole_in_a_pipe() {
        let narrow = table().render(&Style { color: false, width: Some(24) });
        assert!(narrow.lines().all(|line| width(line) <= 24), "{narrow}");
        assert!(narrow.contains('…'));
        let piped = table().render(&Style::default());
        assert_eq!(piped, "NAME   MODELS\nNodeA  a-very-long-model-name-that-does-not-fit\n日本   echo\n");
    }

    #[test]
    fn a_wrapping_table_loses_nothing_and_fits() {
        let mut table = Table::new(&["TIER", "WHY NOT"]).wrapping();
        table.row(vec![cell("Llama"), cell("needs 4 cores, 2 usable: 2 missing")]);
        let shown = table.render(&Style { color: false, width: Some(24) });
        assert_eq!(shown, "TIER   WHY NOT\nLlama  needs 4 cores, 2\n       usable: 2 missing\n");
        assert_eq!(table.render(&Style::default()).lines().count(), 2, "a pipe has no width");
        assert_eq!(wrap("abcdef gh", 4), ["abcd", "ef", "gh"]);
        assert_eq!((wrap("", 4), wrap("日本語", 4)), (vec![String::new()], vec!["日本".to_owned(), "語".to_owned()]));
    }

    #[test]
    fn on_a_terminal_too_narrow_for_its_columns_each_row_becomes_lines_and_nothing_is_cut() {
        let narrow = table().render(&Style { color: false, width: Some(12) });
        assert_eq!(narrow, "NAME:   NodeA\nMODELS: a-very-long-model-name-that-does-not-fit\n\nNAME:   日本\nMODELS: echo\n");
    }

    #[test]
    fn a_terminal_of_one_column_does_not_hang() {
        assert!(!table().render(&Style { color: true, width: Some(1) }).is_empty());
    }

    #[test]
    fn no_colour_means_no_escape_sequence() {
        assert!(!table().render(&Style::default()).contains('\u{1b}'));
        assert!(table().render(&Style { color: true, width: None }).contains("\u{1b}[1mNAME"));
    }

    #[test]
    fn ways_to_a_peer_read_well() {
        assert_eq!(host("/ip4/10.0.0.2/udp/4001/quic-v1"), "10.0.0.2");
        assert_eq!((host("/dns4/a.example/tcp/1").as_str(), host("nonsense").as_str()), ("a.example", "nonsense"));
        assert_eq!(host("/ip6/fe80::1/tcp/4001"), "fe80::1");
        assert_eq!((relayed(Some("Node\u{1b}[2JW")), relayed(None)), ("relayed via NodeW".into(), "relayed".into()));
        assert_eq!((ago(999_999), ago(3_000_000)), ("now".into(), "3 s ago".into()));
    }

    #[test]
    fn quantities_and_times_read_well() {
        assert_eq!(gib(Some(8 << 30)), "8.0 GiB");
        assert_eq!((gib(Some(1)), gib(Some(0)), gib(None)), ("<0.1 GiB".into(), "0.0 GiB".into(), "-".into()));
        assert_eq!(
            (file_size(Some(999)), file_size(Some(900_000)), file_size(None)),
            ("999 B".into(), "0.9 MB".into(), "-".into())
        );
        assert_eq!((file_size(Some(1_500)), file_size(Some(2_019_377_696))), ("1.5 kB".into(), "2.0 GB".into()));
        assert_eq!(latency(Some(999)), "999 µs");
        assert_eq!(latency(Some(1_000)), "1.0 ms");
        assert_eq!(latency(Some(1_500_000)), "1.50 s");
        assert_eq!(span(Duration::from_secs(59)), "59 s");
        assert_eq!(span(Duration::from_secs(3_660)), "1 h 1 min");
        assert_eq!(span(Duration::from_secs(90_000)), "1 d 1 h");
    }
}
