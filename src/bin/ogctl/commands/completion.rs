//! `ogctl completion`: the script of a shell, the same that the packages install.
//!
//! The scripts know no option and no command: they ask `ogctl` at each key press (see `complete`).

use crate::args::Shell;
use crate::errors::Stop;
use crate::output::Output;

/// Writes the script to standard output.
pub fn run(shell: Shell, out: &Output) -> Result<(), Stop> {
    out.text(match shell {
        Shell::Bash => include_str!("../../../../packaging/completions/ogctl.bash"),
        Shell::Zsh => include_str!("../../../../packaging/completions/_ogctl"),
        Shell::Fish => include_str!("../../../../packaging/completions/ogctl.fish"),
    })
}
