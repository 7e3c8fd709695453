//! `opengatewayd`: logging, exit code. The program is the library.

mod args;

use std::process::ExitCode;

use args::Arguments;
use clap::Parser as _;
use opengateway::daemon;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// A plain level is about this program; its libraries speak at warnings and above, at "trace" too.
fn filter(level: &str) -> EnvFilter {
    let directives = match level {
        "error" => "error".to_owned(),
        // libp2p-kad warns that a first node knows nobody to ask: that is how every cluster begins.
        "warn" | "info" | "debug" => format!("warn,libp2p_kad=error,opengateway={level},opengatewayd={level}"),
        other => other.to_owned(),
    };
    EnvFilter::try_new(directives).unwrap_or_else(|_| EnvFilter::new("info"))
}

fn start_logging(level: &str) {
    let registry = tracing_subscriber::registry().with(filter(level));
    // systemd sets JOURNAL_STREAM for what it connects to the journal.
    if std::env::var_os("JOURNAL_STREAM").is_some()
        && let Ok(journald) = tracing_journald::layer()
    {
        registry.with(journald).init();
        return;
    }
    let colour = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colour).with_target(false)).init();
}

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
    start_logging(&settings.log);
    // One thread: everything here waits most of the time, and a prompt crosses no threads.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("opengatewayd: the runtime cannot be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(daemon::run(options, settings));
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
