//! `opengatewayd`: exit code. The program is the library.

mod args;

use std::process::ExitCode;

use args::Arguments;
use clap::Parser as _;
use opengateway::daemon;
use opengateway::logging::Log;

fn main() -> ExitCode {
    let options = Arguments::parse().into_options();
    let settings = match daemon::settings(&options) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("opengatewayd: {error}");
            eprintln!("opengatewayd: nothing was started; check with: ogctl config check");
            return ExitCode::from(daemon::EXIT_CONFIG);
        }
    };
    let log = Log::start(&settings.log);
    // One thread: everything here waits most of the time, and a prompt crosses no threads.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("opengatewayd: the runtime cannot be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(daemon::run(options, settings, log));
    // A probe that hangs in a driver or on a dead file system must not keep the process.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}
