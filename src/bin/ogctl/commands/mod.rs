//! The commands: each asks the daemon, makes a view of the reply, and prints it as text or JSON.
//!
//! A view is a plain struct whose fields are the documented JSON keys; its text is made from the same struct,
//! so the two cannot tell different stories.

mod ask;
mod chat;
mod completion;
mod config;
mod doctor;
mod http;
mod jobs;
mod membership;
mod models;
mod monitor;
mod peers;
mod ping;
mod prompt;
mod resources;
mod status;
mod version;

use crate::args::{Args, Command, ConfigCommand, Models, ModelsCommand};
use crate::bus::Bus;
use crate::details::Read as _;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::term;
use opengateway::api::names::{DEFAULT_CLUSTER, ErrorName, exit};
use tokio::signal::unix::SignalKind;

/// Runs the command of `args`.
pub fn run(args: Args, out: &Output) -> Result<(), Stop> {
    match args.command {
        Command::Completion { shell } => return completion::run(shell, out),
        Command::Config { command: ConfigCommand::Check { config } } => return config::run(config.as_deref(), out),
        _ => {}
    }
    // Standard input is read before a connection is opened: it may take as long as it likes.
    let question = match &args.command {
        Command::Prompt(options) => {
            prompt::check_options(options, out.json)?;
            Some(prompt::read_text(&options.text)?)
        }
        _ => None,
    };
    let source = match &args.command {
        Command::Models(Models { command: Some(ModelsCommand::Add { file, name, .. }), .. }) => {
            Some(models::open(file, name.as_deref())?)
        }
        _ => None,
    };
    // Before any signal is listened for: the line editor takes SIGINT, and tokio, which comes after it, takes it too and
    // hands it on. The other way round Ctrl-C would not be heard while an answer comes.
    let input = match &args.command {
        Command::Chat(_) => Some(chat::Input::open(out.json)?),
        _ => None,
    };
    // One thread: a client waits most of its life, and threads cost time at the start.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new("System", format!("cannot start: {error}"), "", exit::FAILED))?;
    let own_interrupt = matches!(args.command, Command::Prompt(_) | Command::Chat(_) | Command::Ping(_));
    runtime.block_on(async {
        let signal = signalled(!own_interrupt)?;
        tokio::select! {
            biased;
            result = Box::pin(run_on_bus(args, out, question.as_deref().unwrap_or_default(), source, input)) => result,
            stop = signal => Err(stop),
        }
    })
}

/// Runs a command that needs the bus.
async fn run_on_bus(
    args: Args,
    out: &Output,
    question: &str,
    source: Option<models::Source>,
    input: Option<chat::Input>,
) -> Result<(), Stop> {
    let globals = &args.globals;
    if let Command::Version = args.command {
        return version::run(globals, out).await;
    }
    let mut bus = Bus::open(globals).await?;
    match args.command {
        Command::Status => status::run(&mut bus, out).await,
        Command::Clusters => membership::clusters(&mut bus, out).await,
        Command::Connect(options) => membership::connect(&mut bus, out, &options).await,
        Command::Disconnect(options) => membership::disconnect(&mut bus, out, &options).await,
        Command::Resources { fresh } => resources::resources(&mut bus, out, fresh).await,
        Command::Eligible { fresh, tier, explain } => resources::eligible(&mut bus, out, fresh, tier.as_deref(), explain).await,
        Command::Peers { cluster } => peers::peers(&mut bus, out, cluster).await,
        Command::Models(options) => models::run(&mut bus, out, options, source).await,
        Command::Chat(options) => match input {
            Some(input) => chat::run(&mut bus, out, options.wishes, globals.timeout, input).await,
            None => Ok(()), // opened above
        },
        Command::Prompt(options) => prompt::run(&mut bus, out, &options, question, globals.timeout).await,
        Command::Jobs { cancel: Some(id) } => jobs::cancel(&mut bus, out, id).await,
        Command::Jobs { cancel: None } => jobs::list(&mut bus, out).await,
        Command::Doctor(options) => doctor::run(&mut bus, out, &options).await,
        Command::Ping(options) => ping::run(&mut bus, out, &options).await,
        Command::Key(options) => http::key(&mut bus, out, &options).await,
        Command::Env { shell } => http::env(&mut bus, out, shell).await,
        Command::Monitor => monitor::run(&mut bus, out).await,
        Command::Version | Command::Completion { .. } | Command::Config { .. } => Ok(()), // done above
    }
}

/// How a signal ends the command: in order, so that an agent that asks for a password ends with it and the terminal is
/// as it was. `prompt`, `chat` and `ping` answer an interrupt themselves.
fn signalled(interrupts: bool) -> Result<impl Future<Output = Stop>, Failure> {
    let listen = |kind| {
        let failed = |error| Failure::new("System", format!("cannot wait for signals: {error}"), "", exit::FAILED);
        tokio::signal::unix::signal(kind).map_err(failed)
    };
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    Ok(async move {
        let ended = |name: &str, code| Failure::new("Terminated", format!("ended by {name}"), "", code).into();
        tokio::select! {
            _ = interrupt.recv(), if interrupts => Stop::Interrupted,
            _ = terminate.recv() => ended("SIGTERM", exit::TERMINATED),
            _ = hangup.recv() => ended("SIGHUP", exit::HUNG_UP),
        }
    })
}

/// The cluster meant when none is named: the only joined one, or [`DEFAULT_CLUSTER`] among several. The daemon has the
/// same rule for an empty cluster id; commands that show the name ask for it.
async fn default_cluster(bus: &mut Bus) -> Result<String, Failure> {
    let clusters = bus.ask(async |manager| manager.list_clusters().await).await?;
    let joined = clusters.into_iter().filter(|(_, _, details)| is_joined(&details.text_or_empty("State")));
    let joined: Vec<String> = joined.map(|(id, ..)| id).collect();
    let not_connected = |what: &str, hint: String| {
        let failure = Failure::named(ErrorName::NotConnected.as_str(), what);
        Err(Failure { hint, ..failure })
    };
    match joined.as_slice() {
        [] => not_connected("this node is in no cluster", format!("join one with: ogctl connect {DEFAULT_CLUSTER}")),
        [only] => Ok(only.clone()),
        several if several.iter().any(|id| id.eq_ignore_ascii_case(DEFAULT_CLUSTER)) => Ok(DEFAULT_CLUSTER.to_owned()),
        several => {
            let names = several.iter().map(|id| term::line(id)).collect::<Vec<_>>().join(", ");
            not_connected("this node is in several clusters", format!("name one of them: {names}"))
        }
    }
}

/// Whether a cluster in this state counts as joined.
pub fn is_joined(state: &str) -> bool {
    matches!(state, "discovering" | "connecting" | "connected" | "degraded")
}

/// Microseconds since the epoch.
fn now_us() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Microseconds of `time`, as the bus wants them.
fn micros(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
