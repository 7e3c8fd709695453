//! `ogctl`: a small client of the daemon's bus.
//!
//! Owns the process: arguments in, exit code out. It holds no state and no rule of the gateway; what it
//! knows comes from the daemon by D-Bus, in the words of `opengateway::api`. One connection a run, no
//! introspection, no property cache, one thread: a prompt costs one method call and a pipe.

mod agent;
mod args;
mod bus;
mod commands;
mod complete;
mod details;
mod errors;
mod json;
mod output;
mod render;
mod term;
mod unit;
mod view;

use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(request) = complete::request() {
        complete::answer(request);
        return ExitCode::SUCCESS;
    }
    let args = match args::Args::try_parse() {
        Ok(args) => args,
        Err(error) => return output::clap_error(&error),
    };
    let out = output::Output::new(&args.globals);
    let result = commands::run(args, &out);
    ExitCode::from(out.finish(result))
}
