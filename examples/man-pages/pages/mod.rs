//! The pages: prose from `docs/man/`, options from the command lines themselves, and what other files know.
//!
//! A line of the prose that is a comment is a place for something else:
//!
//! ```text
//! <!-- options -->                        options of the program
//! <!-- commands -->                       commands of the program, each with its options
//! <!-- include docs/FILE.md: HEADING -->  what stands below that heading there, up to the next of its level
//! <!-- interface NAME -->                 an interface of dbus/
//! <!-- errors -->                         the error names of the bus
//! ```

// Each user of this module needs its part of what it shares with the programs.
#![allow(dead_code)]

mod dbus;
mod markdown;
mod roff;

#[path = "../../../src/bin/opengatewayd/args.rs"]
mod daemon_args;
#[path = "../../../src/bin/ogctl/args.rs"]
mod ogctl_args;

use clap::{Command, CommandFactory as _};
use roff::{escape, line, quoted};

/// Date of the release that the pages describe. A date of the build would change them at every build.
const RELEASED: &str = "2026-11-25";

/// Every page: file name and text.
pub fn all() -> Vec<(&'static str, String)> {
    let daemon = daemon_args::Arguments::command();
    let client = ogctl_args::Args::command();
    vec![
        ("opengatewayd.8", page("opengatewayd", "8", include_str!("../../../docs/man/opengatewayd.8.md"), Some(&daemon))),
        ("ogctl.1", page("ogctl", "1", include_str!("../../../docs/man/ogctl.1.md"), Some(&client))),
        ("opengatewayd.toml.5", page("opengatewayd.toml", "5", include_str!("../../../docs/man/opengatewayd.toml.5.md"), None)),
        (
            "org.opengateway.Gateway1.5",
            page("org.opengateway.Gateway1", "5", include_str!("../../../docs/man/org.opengateway.Gateway1.5.md"), None),
        ),
    ]
}

fn page(name: &str, section: &str, prose: &str, command: Option<&Command>) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut out = String::from(
        ".\\\" Generated from docs/man, the command line and dbus/*.xml: edit those, then run\n\
         .\\\"   cargo run --example man-pages -- packaging/man\n",
    );
    // The title as it is written: it is the name of a file, or of a bus.
    out.push_str(&format!(".TH {} {section} {RELEASED} \"OpenGateway {version}\"\n", quoted(&escape(name))));
    // Names that are cut at a hyphen are hard to read and not to be copied.
    out.push_str(".nr HY 0\n.nh\n.ad l\n");
    let mut text = String::new();
    for prose_line in prose.lines() {
        match prose_line.strip_prefix("<!-- ").and_then(|text| text.strip_suffix(" -->")) {
            Some(directive) => {
                out.push_str(&markdown::render(&std::mem::take(&mut text)));
                out.push_str(&directed(directive, command));
            }
            None => text.extend([prose_line, "\n"]),
        }
    }
    out + &markdown::render(&text)
}

fn directed(directive: &str, command: Option<&Command>) -> String {
    let (word, rest) = directive.split_once(' ').unwrap_or((directive, ""));
    let manager = include_str!("../../../dbus/org.opengateway.Gateway1.Manager.xml");
    match (word, rest) {
        ("options", _) => options(command.expect("the page is that of a program")),
        ("commands", _) => command.expect("the page is that of a program").get_subcommands().map(subcommand).collect(),
        ("include", rest) => markdown::render(&included(rest)),
        ("errors", _) => dbus::File::read(manager).errors(),
        ("interface", "Manager") => dbus::File::read(manager).section(),
        ("interface", "Cluster") => {
            dbus::File::read(include_str!("../../../dbus/org.opengateway.Gateway1.Cluster.xml")).section()
        }
        ("interface", "Models") => dbus::File::read(include_str!("../../../dbus/org.opengateway.Gateway1.Models.xml")).section(),
        ("interface", "Network") => {
            dbus::File::read(include_str!("../../../dbus/org.opengateway.Gateway1.Network.xml")).section()
        }
        ("interface", "Job") => dbus::File::read(include_str!("../../../dbus/org.opengateway.Gateway1.Job.xml")).section(),
        ("interface", "Http") => dbus::File::read(include_str!("../../../dbus/org.opengateway.Gateway1.Http.xml")).section(),
        _ => panic!("unknown directive {directive:?}"),
    }
}

/// The part of a document below a heading, without the heading.
fn included(what: &str) -> String {
    let (file, heading) = what.split_once(": ").expect("include FILE: HEADING");
    let document = match file {
        "docs/configuration.md" => include_str!("../../../docs/configuration.md"),
        "docs/json.md" => include_str!("../../../docs/json.md"),
        _ => panic!("{file} is not known here"),
    };
    let level = |line: &str| line.starts_with('#').then(|| line.chars().take_while(|&c| c == '#').count());
    let mut lines = document.lines();
    if heading == "(beginning)" {
        lines.by_ref().next();
        return lines.take_while(|line| level(line).is_none()).collect::<Vec<_>>().join("\n");
    }
    let found = lines.by_ref().find(|line| level(line).is_some() && line.trim_start_matches('#').trim() == heading);
    let own = level(found.unwrap_or_else(|| panic!("{file} has no heading {heading:?}"))).unwrap_or_default();
    lines.take_while(|line| level(line).is_none_or(|other| other > own)).collect::<Vec<_>>().join("\n")
}

/// The options as clap has them, without a heading of their own.
fn options(command: &Command) -> String {
    let mut rendered = Vec::new();
    let page = clap_mangen::Man::new(command.clone().disable_help_flag(true).disable_version_flag(true));
    page.render_options_section(&mut rendered).expect("memory takes what is written");
    let rendered = String::from_utf8(rendered).expect("it is text");
    let lines = rendered.lines().filter(|line| !is_preamble(line));
    // The apostrophe of clap_mangen is a macro that its preamble defines; its code is between backticks.
    lines.map(|line| format!("{}\n", code_bold(&line.replace("\\*(Aq", "\\(aq")))).collect()
}

/// What stands between backticks, bold.
fn code_bold(line: &str) -> String {
    let mut parts = line.split('`');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for (at, part) in parts.enumerate() {
        out.push_str(if at % 2 == 0 { "\\fB" } else { "\\fR" });
        out.push_str(part);
    }
    out
}

/// What belongs to a whole page, or is a heading.
fn is_preamble(line: &str) -> bool {
    line.starts_with(".SH") || line.starts_with(".ie") || line.starts_with(".el")
}

/// A command of `ogctl`: how it is called, what it does, its options.
fn subcommand(command: &Command) -> String {
    if command.get_name() == "help" {
        return String::new();
    }
    let nested: String = command.get_subcommands().map(|inner| entry(inner, &format!("{} ", command.get_name()))).collect();
    // A command that does something by itself has an entry of its own.
    let own = nested.is_empty() || command.get_positionals().next().is_some();
    let own = if own { entry(command, "") } else { String::new() };
    own + &nested
}

fn entry(command: &Command, parent: &str) -> String {
    let mut synopsis = format!("{parent}{}", command.get_name());
    if command.get_opts().next().is_some() {
        synopsis.push_str(" [OPTION...]");
    }
    for positional in command.get_positionals() {
        let name = positional.get_value_names().map_or_else(String::new, |names| names.join(" ")).to_uppercase();
        synopsis.push_str(&if positional.is_required_set() { format!(" {name}") } else { format!(" [{name}]") });
    }
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let aliases: Vec<&str> = command.get_visible_aliases().collect();
    let also = if aliases.is_empty() { String::new() } else { format!(" Also: \\fB{}\\fR.", aliases.join("\\fR, \\fB")) };
    let mut out = format!(".SS {}\n{}", quoted(&escape(&synopsis)), line(&format!("{}.{also}", escape(&about))));
    out.push_str(&options(command));
    out
}
