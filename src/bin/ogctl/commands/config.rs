//! `ogctl config check`: looks at the configuration files without a daemon.
//!
//! The check itself is the daemon's (`opengateway::config`); this command only prints its result.

use crate::errors::{Failure, Stop};
use crate::output::Output;
use opengateway::api::names::exit;
use opengateway::config::{Environment, Overrides, Roots};
use serde::Serialize;
use std::path::Path;

/// The JSON of a check.
#[derive(Debug, Serialize)]
struct View {
    valid: bool,
    /// Files that were read, in the order of merging.
    files: Vec<String>,
}

/// Checks the configuration whose main file is `main`, or the installed one.
pub fn run(main: Option<&Path>, out: &Output) -> Result<(), Stop> {
    let checked = check(main)?;
    out.view(checked, |view, _| match view.files.as_slice() {
        [] => "The configuration is valid: there is no file, so every default is in force.\n".to_owned(),
        files => format!("The configuration is valid. Read, the later ones win:\n  {}\n", files.join("\n  ")),
    })
}

/// Reads and merges as the daemon would, in the environment of this process.
fn check(main: Option<&Path>) -> Result<View, Failure> {
    let environment = Environment::of_process();
    let roots = match environment.per_user_root() {
        Some(root) => Roots::per_user(&root),
        None => Roots::system(),
    };
    let roots = match main {
        Some(main) => roots.with_main(main.to_owned()),
        None => roots,
    };
    let checked = opengateway::config::check(&roots, &environment, &Overrides::default()).map_err(|error| {
        let hint = "mend it and check again: ogctl config check; a running daemon keeps its old configuration";
        Failure::new("InvalidConfiguration", error.to_string(), hint, exit::FAILED)
    })?;
    Ok(View { valid: true, files: checked.files.iter().map(|path| path.display().to_string()).collect() })
}
