//! `ogctl config check`: looks at the configuration files without a daemon.
//!
//! The check itself is the daemon's (`opengateway::config`); this command only prints its result.

use crate::errors::{Failure, Stop};
use crate::output::Output;
use opengateway::api::names::exit;
use serde::Serialize;
use std::path::Path;

/// The JSON of a check.
#[derive(Debug, Serialize)]
struct View {
    valid: bool,
    /// Files that were read, in the order of merging.
    files: Vec<String>,
    /// What is legal and probably not meant.
    warnings: Vec<String>,
}

/// Checks the configuration whose main file is `main`, or the installed one.
pub fn run(main: Option<&Path>, out: &Output) -> Result<(), Stop> {
    let checked = check(main)?;
    out.view(checked, |view, _| {
        let mut text: String = view.warnings.iter().map(|warning| format!("warning: {warning}\n")).collect();
        text.push_str(&format!("The configuration is valid ({} files read).\n", view.files.len()));
        text
    })
}

/// The seam to the daemon's own check: reads and merges as the daemon would and returns what it found.
fn check(_main: Option<&Path>) -> Result<View, Failure> {
    let hint = "see: journalctl -u opengatewayd after: systemctl reload opengatewayd";
    Err(Failure::new(
        "Unsupported",
        "this build of ogctl has no configuration check",
        hint,
        exit::FAILED,
    ))
}
