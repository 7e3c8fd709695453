//! Text as groff wants it.

/// `text` for a paragraph: escaped, and to be broken after a comma where there is no blank.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for (at, part) in text.split(',').enumerate() {
        if at > 0 {
            out.push_str(if part.is_empty() || part.starts_with(' ') { "," } else { ",\\:" });
        }
        out.push_str(&literal(part));
    }
    out
}

/// `text` with everything escaped that groff would take for something else.
fn literal(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\(rs"),
            // A minus, which can be copied into a shell, and not a hyphen.
            '-' => out.push_str("\\-"),
            '\'' => out.push_str("\\(aq"),
            '`' => out.push_str("\\(ga"),
            '^' => out.push_str("\\(ha"),
            '~' => out.push_str("\\(ti"),
            _ => out.push(c),
        }
    }
    out
}

/// A line of text that is no request, whatever it begins with.
pub fn line(escaped: &str) -> String {
    let guard = if escaped.starts_with(['.', '\'']) { "\\&" } else { "" };
    format!("{guard}{escaped}\n")
}

/// An argument of a request or macro.
pub fn quoted(escaped: &str) -> String {
    format!("\"{}\"", escaped.replace('"', "\\(dq"))
}

/// Lines as they are, set in the fixed font, indented.
pub fn example<'a>(lines: impl IntoIterator<Item = &'a str>) -> String {
    let mut out = String::from(".PP\n.RS 4\n.EX\n");
    for text in lines {
        out.push_str(&line(&literal(text)));
    }
    out + ".EE\n.RE\n"
}
