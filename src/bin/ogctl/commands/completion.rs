//! `ogctl completion`: a script for the shell, made from the definitions of the command line.

use crate::args::Args;
use crate::errors::Stop;
use crate::output::Output;
use clap::CommandFactory as _;
use clap_complete::Shell;

/// Writes the script to standard output.
pub fn run(shell: Shell, out: &Output) -> Result<(), Stop> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "ogctl", &mut script);
    out.bytes(&script)
}
