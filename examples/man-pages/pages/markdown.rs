//! Markdown to roff: the subset that the documentation of this project is written in.
//!
//! Headings, paragraphs, lists, definition lists (`:   ` below a term), tables, code blocks; in a line, code, emphasis
//! and links. Tables become lists of terms: a terminal has no room for five columns.

use super::roff::{escape, example, line, quoted};

/// Headers of columns that need no label: their text speaks for itself.
const PLAIN: [&str; 7] = ["", "meaning", "note", "what", "further keys", "on reload", "error names"];

/// `markdown` as roff.
pub fn render(markdown: &str) -> String {
    let lines: Vec<&str> = markdown.lines().collect();
    let mut out = String::new();
    let mut at = 0;
    while at < lines.len() {
        let (block, used) = block(&lines[at..]);
        out.push_str(&block);
        at += used;
    }
    out
}

/// The block that `lines` begin with, and how many of them it is.
fn block(lines: &[&str]) -> (String, usize) {
    let first = lines[0];
    if first.trim().is_empty() {
        return (String::new(), 1);
    }
    if let Some(heading) = first.strip_prefix("# ") {
        return (format!(".SH {}\n", quoted(&inline(&heading.to_uppercase()))), 1);
    }
    if let Some(heading) = first.strip_prefix("## ").or_else(|| first.strip_prefix("### ")) {
        return (format!(".SS {}\n", quoted(&inline(heading))), 1);
    }
    if first.starts_with("```") {
        let end = lines[1..].iter().position(|line| line.starts_with("```")).expect("a code block ends");
        return (example(lines[1..=end].iter().copied()), end + 2);
    }
    if first.starts_with('|') {
        let count = lines.iter().take_while(|line| line.starts_with('|')).count();
        return (table(&lines[..count]), count);
    }
    if lines.get(1).is_some_and(|next| next.starts_with(":   ")) {
        let count = 2 + lines[2..].iter().take_while(|line| line.starts_with("    ")).count();
        let body: Vec<&str> = lines[1..count].iter().map(|line| line[1..].trim()).collect();
        return (format!(".TP\n{}{}", line(&inline(first)), line(&inline(&body.join(" ")))), count);
    }
    if let Some((mark, indent)) = list_mark(first) {
        let more = |line: &&&str| line.starts_with(&" ".repeat(indent)) && !line.trim().is_empty();
        let count = 1 + lines[1..].iter().take_while(more).count();
        let text: Vec<&str> = lines[..count].iter().map(|line| line[indent..].trim()).collect();
        return (format!(".IP {mark} {indent}\n{}", line(&inline(&text.join(" ")))), count);
    }
    let starts_block = |line: &&&str| {
        line.trim().is_empty() || line.starts_with(['|', '#']) || line.starts_with("```") || list_mark(line).is_some()
    };
    let count = 1 + lines[1..].iter().take_while(|line| !starts_block(line)).count();
    (format!(".PP\n{}", line(&inline(&lines[..count].join(" ")))), count)
}

/// Mark and indentation of a list item.
fn list_mark(line: &str) -> Option<(String, usize)> {
    if line.starts_with("- ") {
        return Some(("\\(bu".to_owned(), 2));
    }
    let (number, _) = line.split_once(". ")?;
    number.chars().all(|c| c.is_ascii_digit()).then(|| (format!("{number}."), number.len() + 2))
}

/// A table as a list: the first column is the term.
fn table(lines: &[&str]) -> String {
    let cells =
        |line: &str| -> Vec<String> { line.trim().trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect() };
    let headers = cells(lines[0]);
    // Without a header for the terms, the other headers are what tells the columns apart.
    let label_all = headers[0].is_empty() && headers.len() > 2;
    let mut out = String::new();
    for row in lines[2..].iter().map(|line| cells(line)) {
        out.push_str(&format!(".TP\n{}", line(&term(&row[0]))));
        let mut texts: Vec<String> = Vec::new();
        let mut labelled = false;
        for (header, cell) in headers.iter().zip(&row).skip(1).filter(|(_, cell)| !cell.is_empty()) {
            let before = std::mem::replace(&mut labelled, label_all || headers.len() > 2 && !PLAIN.contains(&header.as_str()));
            match texts.last_mut().filter(|_| before && labelled) {
                Some(last) => *last = format!("{last}; {header}: {cell}"),
                None if labelled => texts.push(format!("{header}: {cell}")),
                None => texts.push(cell.clone()),
            }
        }
        let texts: Vec<String> = texts.iter().map(|text| sentence(text)).collect();
        out.push_str(&texts.iter().map(|text| line(&inline(text))).collect::<Vec<_>>().join(".br\n"));
        if texts.is_empty() {
            out.push_str("\\&\n");
        }
    }
    out
}

/// The term of a list: bold where it is not marked up already.
fn term(cell: &str) -> String {
    if cell.contains('`') { inline(cell) } else { format!("\\fB{}\\fR", escape(cell)) }
}

/// A cell as a sentence: with a capital, unless it begins with code, and a full stop.
fn sentence(cell: &str) -> String {
    let mut chars = cell.chars();
    let first = chars.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    let end = if cell.ends_with(['.', ':', '!', '?']) { "" } else { "." };
    format!("{first}{}{end}", chars.as_str())
}

/// Code bold, emphasis italic, links as their text.
pub fn inline(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['`', '*', '[']) {
        let (before, marked) = rest.split_at(at);
        out.push_str(&escape(before));
        let (shown, used) = marked_up(marked).unwrap_or_else(|| (escape(&marked[..1]), 1));
        out.push_str(&shown);
        rest = &marked[used..];
    }
    out + &escape(rest)
}

/// What `text` begins with, if that is marked up, and its length.
fn marked_up(text: &str) -> Option<(String, usize)> {
    for (mark, font) in [("**", 'B'), ("`", 'B'), ("*", 'I')] {
        if let Some(inner) = text.strip_prefix(mark) {
            let length = inner.find(mark).filter(|&length| length > 0)?;
            return Some((format!("\\f{font}{}\\fR", escape(&inner[..length])), length + 2 * mark.len()));
        }
    }
    let (label, target) = text.strip_prefix('[')?.split_once("](")?;
    let target = target.split_once(')')?.0;
    // A bracket that belongs to the text, as in `[[cluster]]`, is no link.
    (!label.contains(['[', ']'])).then(|| (inline(label), label.len() + target.len() + 4))
}
