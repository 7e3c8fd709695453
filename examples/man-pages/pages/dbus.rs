//! The interface files in `dbus/` as sections of a manual page: what they declare, and what their comments say.

use super::markdown::inline;
use super::roff::{escape, example, line, quoted};

/// An interface file.
#[derive(Debug, Default)]
pub struct File {
    /// The comment before everything.
    head: String,
    name: String,
    about: String,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    /// "method", "signal" or "property".
    kind: String,
    name: String,
    doc: String,
    /// Direction (empty in signals), type, name.
    args: Vec<(String, String, String)>,
    /// Type of a property.
    kind_of_value: String,
    /// How a property tells that it changed.
    emits: Option<String>,
}

impl File {
    /// Reads a file.
    pub fn read(xml: &str) -> Self {
        let mut file = Self::default();
        let mut doc = String::new();
        let mut rest = xml;
        while let Some(start) = rest.find('<') {
            rest = &rest[start..];
            let (end, skip) = if rest.starts_with("<!--") { ("-->", 4) } else { (">", 1) };
            let length = rest.find(end).expect("what begins ends");
            let inner = &rest[skip..length];
            if skip == 4 {
                doc = inner.to_owned();
            } else {
                file.tag(inner.trim_end_matches('/'), &mut doc);
            }
            rest = &rest[length + end.len()..];
        }
        file
    }

    fn tag(&mut self, tag: &str, doc: &mut String) {
        let attribute = |key: &str| {
            let value = tag.split_once(&format!(" {key}=\""))?.1;
            Some(value.split('"').next().unwrap_or_default().to_owned())
        };
        let text = |key: &str| attribute(key).unwrap_or_default();
        match tag.split_whitespace().next().unwrap_or_default() {
            "node" => self.head = std::mem::take(doc),
            "interface" => {
                self.name = text("name");
                self.about = std::mem::take(doc);
            }
            kind @ ("method" | "signal" | "property") => self.members.push(Member {
                kind: kind.to_owned(),
                name: text("name"),
                doc: std::mem::take(doc),
                args: Vec::new(),
                kind_of_value: text("type"),
                emits: None,
            }),
            "arg" => {
                let arg = (text("direction"), text("type"), text("name"));
                self.members.last_mut().expect("an argument belongs to a member").args.push(arg);
            }
            "annotation" if text("name").ends_with("EmitsChangedSignal") => {
                self.members.last_mut().expect("an annotation belongs to a member").emits = attribute("value");
            }
            _ => {}
        }
    }

    /// The whole interface: a listing, then each member with its text.
    pub fn section(&self) -> String {
        let (_, about) = entries(self.about.split_once("@short_description:").expect("an interface says what it is").1);
        let mut out = paragraphs(&about);
        out.push_str(&example(self.listing().lines()));
        for (kind, title) in [("method", "Methods"), ("signal", "Signals"), ("property", "Properties")] {
            let mut members = self.members.iter().filter(|member| member.kind == kind).peekable();
            if members.peek().is_some() {
                let interface = self.name.rsplit('.').next().unwrap_or_default();
                out.push_str(&format!(".SS {}\n", quoted(&format!("{title} of {interface}"))));
            }
            members.for_each(|member| out.push_str(&member.text()));
        }
        out
    }

    fn listing(&self) -> String {
        let mut out = format!("interface {} {{\n", self.name);
        for (kind, title) in [("method", "methods"), ("signal", "signals"), ("property", "properties")] {
            let members: Vec<&Member> = self.members.iter().filter(|member| member.kind == kind).collect();
            if !members.is_empty() {
                out.push_str(&format!("  {title}:\n"));
            }
            for member in members {
                out.push_str(&member.declaration());
            }
        }
        out + "};\n"
    }

    /// The table of error names in the first comment, as a list.
    pub fn errors(&self) -> String {
        let table = self.head.split_once("Error names, all with the prefix").expect("the errors are listed").1;
        let (table, _) = table.split_once("NotAuthorized is a name of our own").expect("the list has an end");
        let mut out = String::new();
        for text in table.lines().skip(1).filter(|text| !text.trim().is_empty()) {
            match text.strip_prefix("    ").filter(|text| !text.starts_with(' ')).and_then(|text| text.split_once("  ")) {
                Some((name, what)) => out.push_str(&format!(".TP\n\\fB{}\\fR\n{}", escape(name), line(&escape(what.trim())))),
                None => out.push_str(&line(&escape(text.trim()))),
            }
        }
        out
    }
}

impl Member {
    fn declaration(&self) -> String {
        if self.kind == "property" {
            let emits = self.emits.as_deref().unwrap_or("true");
            return format!("    readonly {} {};   EmitsChangedSignal={emits}\n", self.kind_of_value, self.name);
        }
        let args: Vec<String> = self
            .args
            .iter()
            .map(|(direction, kind, name)| format!("{direction} {kind} {name}").trim_start().to_owned())
            .collect();
        let indent = format!(",\n{}", " ".repeat(5 + self.name.len()));
        format!("    {}({});\n", self.name, args.join(&indent))
    }

    fn text(&self) -> String {
        let doc = self.doc.trim_start();
        let doc = doc.strip_prefix(&format!("{}:", self.name)).expect("a comment begins with the name");
        let (args, text) = entries(doc);
        let mut out = format!(".TP\n\\fB{}\\fR", escape(&self.name));
        if self.kind == "property" {
            out.push_str(&format!(" (\\fI{}\\fR)", escape(&self.kind_of_value)));
        } else {
            out.push_str("()");
        }
        out.push('\n');
        let mut first = true;
        for (name, what) in &args {
            let kind = self.args.iter().find(|(_, _, arg)| arg == name).map(|(_, kind, _)| kind.as_str());
            let kind = kind.unwrap_or_else(|| panic!("{}: no argument {name}", self.name));
            let head = format!("\\fI{}\\fR (\\fI{}\\fR): ", escape(name), escape(kind));
            if !std::mem::take(&mut first) {
                out.push_str(".sp .5v\n");
            }
            out.push_str(&line(&format!("{head}{}", inline(what))));
        }
        for paragraph in &text {
            if !std::mem::take(&mut first) {
                out.push_str(".sp .5v\n");
            }
            out.push_str(&line(&inline(&capital(paragraph))));
        }
        if first {
            out.push_str("\\&\n");
        }
        out
    }
}

fn paragraphs(texts: &[String]) -> String {
    texts.iter().map(|text| format!(".PP\n{}", line(&inline(text)))).collect()
}

/// `text` with a capital first letter.
fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

/// The arguments that a comment describes, and its paragraphs. What polkit asks and which errors there are is always a
/// paragraph.
fn entries(doc: &str) -> (Vec<(String, String)>, Vec<String>) {
    let mut args: Vec<(String, String)> = Vec::new();
    let mut paragraphs: Vec<String> = Vec::new();
    let mut in_arg = false;
    let mut in_text = false;
    for text in doc.lines().map(str::trim) {
        if let Some((name, what)) = text.strip_prefix('@').and_then(|text| text.split_once(':')) {
            args.push((name.to_owned(), what.trim().to_owned()));
            in_arg = true;
        } else if text.is_empty() {
            (in_arg, in_text) = (false, false);
        } else if in_arg {
            let last = &mut args.last_mut().expect("one was begun").1;
            *last = format!("{last} {text}").trim().to_owned();
        } else if in_text && !text.starts_with("Errors:") {
            let last = paragraphs.last_mut().expect("one was begun");
            *last = format!("{last} {text}");
        } else {
            paragraphs.push(text.to_owned());
            in_text = true;
        }
    }
    let split = |text: String| -> Vec<String> {
        match text.split_once(".  Errors:") {
            Some((before, errors)) => vec![format!("{before}."), format!("Errors:{errors}")],
            None => vec![text],
        }
    };
    (args, paragraphs.into_iter().flat_map(split).collect())
}
