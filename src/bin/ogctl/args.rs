//! The command line: what is accepted, with which limits.
//!
//! Read once by `main`; completion and man page come from the same definitions.

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// Talk to the OpenGateway daemon of this machine.
#[derive(Debug, Parser)]
#[command(name = "ogctl", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Args {
    /// Options of every command.
    #[command(flatten)]
    pub globals: Globals,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 ok, 1 failed, 2 usage, 3 timeout, 4 refused by authorisation, \
5 no node can serve, 6 join or leave failed, 8 daemon not running, 10 not found, 130 interrupted.";

/// Options that every command takes.
#[derive(Debug, Clone, ClapArgs)]
pub struct Globals {
    /// Bus to find the daemon on: system, session or a D-Bus address
    ///
    /// Without it: the system bus (DBUS_SYSTEM_BUS_ADDRESS when that is set); if no daemon is there, the session
    /// bus when there is one and a daemon is on it.
    #[arg(long, global = true, value_name = "BUS", help_heading = "Global options")]
    pub bus: Option<String>,
    /// Print JSON, with "schema": 1
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// When to use colour (NO_COLOR and CLICOLOR_FORCE count with auto)
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto", help_heading = "Global options")]
    pub color: Color,
    /// Most seconds to wait for the daemon (default 10); with prompt, for the whole answer (default 120)
    #[arg(long, global = true, value_name = "SEC", value_parser = seconds, help_heading = "Global options")]
    pub timeout: Option<Duration>,
}

/// When to use colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// A shell that can complete command lines of `ogctl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// Bash.
    Bash,
    /// Zsh.
    Zsh,
    /// Fish.
    Fish,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Health, name, addresses and clusters of this node (exit code 8 when the daemon does not run)
    Status,
    /// Clusters that this node knows
    Clusters,
    /// Join a cluster
    #[command(visible_alias = "join")]
    Connect(Connect),
    /// Leave a cluster
    #[command(visible_alias = "leave")]
    Disconnect(Disconnect),
    /// What this machine has and lends
    Resources {
        /// Measure now instead of taking a value of the last 2 s
        #[arg(long)]
        fresh: bool,
    },
    /// Model tiers that this machine qualifies for, with reasons
    Eligible {
        /// Measure now instead of taking a value of the last 2 s
        #[arg(long)]
        fresh: bool,
        /// This tier only
        #[arg(long, value_name = "TIER")]
        tier: Option<String>,
        /// Also what a model of each tier takes, by estimate, and whether that is free now
        #[arg(long)]
        explain: bool,
    },
    /// Members of a cluster
    Peers {
        /// Default: the only joined cluster, else gatewayai-poc
        cluster: Option<String>,
    },
    /// Ask a cluster; the answer goes to standard output as it comes
    Prompt(Prompt),
    /// Talk with a model turn by turn; /help tells the commands there
    Chat(Chat),
    /// Models of a cluster; model files of this machine
    Models(Models),
    /// Prompts in progress
    Jobs {
        /// Cancel this one
        #[arg(long, value_name = "ID")]
        cancel: Option<u64>,
    },
    /// Say why this node finds the others, or does not, and what mends it
    ///
    /// Exit code 1 when something does not work, 0 when nothing is wrong or works less well than it could, 10 when nobody
    /// knows the peer.
    Doctor(Doctor),
    /// Ask a peer for signs of life: the way to it, and how long an answer takes
    Ping(Ping),
    /// Get your key for the OpenAI endpoint, and keep it in a file that only you can read
    Key(Key),
    /// Print the lines that let a program use the OpenAI endpoint: eval "$(ogctl env)"
    Env {
        /// For this kind of shell; --json for programs
        #[arg(long, value_name = "SHELL", default_value = "sh")]
        shell: Dialect,
    },
    /// Tell what happens as it happens, until interrupted
    Monitor,
    /// Look at the configuration
    Config {
        /// What to do with it
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Write a completion script to standard output
    Completion {
        /// For this shell
        shell: Shell,
    },
    /// Versions of ogctl and of the daemon
    Version,
}

/// `ogctl connect`.
#[derive(Debug, ClapArgs)]
pub struct Connect {
    /// Name of the cluster
    pub cluster: String,
    /// Serve: lend this machine's models to the cluster
    #[arg(long, conflicts_with = "consume")]
    pub serve: bool,
    /// Join without serving
    #[arg(long)]
    pub consume: bool,
    /// Address of a node that is in the cluster already (see its `ogctl status`); may be repeated
    #[arg(long, value_name = "ADDR", num_args = 1)]
    pub bootstrap: Vec<String>,
    /// File with the cluster's secret
    #[arg(long, value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
    /// Most seconds to wait for a first peer; 0 does not wait. Finding nobody in that time fails (exit code 6).
    /// Without this option it looks round for 5 s, and being alone is no failure
    #[arg(long, value_name = "SEC", value_parser = seconds_or_zero)]
    pub wait: Option<Duration>,
}

/// `ogctl disconnect`.
#[derive(Debug, ClapArgs)]
pub struct Disconnect {
    /// Name of the cluster
    pub cluster: String,
    /// Drop it from the saved clusters too
    #[arg(long)]
    pub forget: bool,
    /// Most seconds to let work in progress end (default 10)
    #[arg(long, value_name = "SEC", value_parser = seconds_or_zero)]
    pub drain: Option<Duration>,
}

/// `ogctl prompt`.
#[derive(Debug, ClapArgs)]
pub struct Prompt {
    /// The prompt (several words are joined by a space), or - to read it from standard input
    #[arg(required = true, value_name = "TEXT")]
    pub text: Vec<String>,
    /// Whom and how to ask.
    #[command(flatten)]
    pub wishes: Wishes,
    /// The text is continued as it stands, without the chat template of the model
    #[arg(long, conflicts_with = "system")]
    pub no_template: bool,
    /// Print the answer when it is whole
    #[arg(long, conflicts_with = "stream")]
    pub no_stream: bool,
    /// With --json: one object a line as the answer comes
    #[arg(long)]
    pub stream: bool,
    /// Print the answer byte for byte: no filter of control characters, no line feed added
    #[arg(long)]
    pub raw: bool,
}

/// Whom and how to ask.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Wishes {
    /// Cluster to ask; default: the only joined one, else gatewayai-poc
    #[arg(long, short = 'c', value_name = "CLUSTER")]
    pub cluster: Option<String>,
    /// Model to ask for; default: the best one that somebody serves
    #[arg(long, short = 'm', value_name = "MODEL")]
    pub model: Option<String>,
    /// Only nodes that qualify for this tier
    #[arg(long, value_name = "TIER")]
    pub tier: Option<String>,
    /// Only this node, by name or peer id
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,
    /// Most tokens of the answer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// Sampling temperature, 0 to 2; at 0 the likeliest token always
    #[arg(long, value_name = "T", value_parser = temperature)]
    pub temperature: Option<f64>,
    /// Draw only from the likeliest tokens that are so probable together, above 0 to 1
    #[arg(long, value_name = "P", value_parser = top_p)]
    pub top_p: Option<f64>,
    /// End the answer before this text; may be repeated
    #[arg(long, value_name = "TEXT", num_args = 1, value_parser = stop)]
    pub stop: Vec<String>,
    /// Seed of the sampler, where the backend has one
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Instructions before the prompt
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Answer on this machine when it serves the model
    #[arg(long)]
    pub local_first: bool,
    /// Never answer on this machine
    #[arg(long, conflicts_with = "local_first")]
    pub no_local: bool,
}

/// `ogctl chat`.
#[derive(Debug, ClapArgs)]
pub struct Chat {
    /// Whom and how to ask.
    #[command(flatten)]
    pub wishes: Wishes,
}

/// `ogctl models`.
#[derive(Debug, ClapArgs)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Models {
    /// Default: the only joined cluster, else gatewayai-poc
    pub cluster: Option<String>,
    /// The model files of this machine, with what is wrong with them
    #[arg(long, conflicts_with = "cluster")]
    pub local: bool,
    /// Each node of each model, with digests
    #[arg(long, short = 'v')]
    pub verbose: bool,
    /// What to do with the model files of this machine
    #[command(subcommand)]
    pub command: Option<ModelsCommand>,
}

/// What to do with the model files of this machine.
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Copy a GGUF file into the models directory and serve it
    Add {
        /// The file, or - to read it from standard input
        file: PathBuf,
        /// What to call it; default: the name of the file without .gguf
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// Refuse the file unless it has this SHA-256
        #[arg(long, value_name = "HEX", value_parser = sha256)]
        sha256: Option<String>,
    },
    /// Remove a model's file
    Rm {
        /// The model
        name: String,
    },
    /// Read a model's file and compare it with the digest that it had
    Verify {
        /// The model
        name: String,
    },
    /// Load a model now, also one that had failed
    Load {
        /// The model
        name: String,
    },
    /// End the engine of a model when its prompts have ended
    Unload {
        /// The model
        name: String,
    },
}

/// `ogctl doctor`.
#[derive(Debug, ClapArgs)]
pub struct Doctor {
    /// Only what is known of this peer, by name or peer id
    #[arg(value_parser = peer)]
    pub peer: Option<String>,
    /// Only what is about this cluster
    #[arg(long, short = 'c', value_name = "CLUSTER", conflicts_with = "peer")]
    pub cluster: Option<String>,
}

/// `ogctl ping`.
#[derive(Debug, ClapArgs)]
pub struct Ping {
    /// Whom, by name or peer id
    #[arg(value_parser = peer)]
    pub peer: String,
    /// How often; Ctrl-C ends it earlier
    #[arg(long, short = 'c', value_name = "N", default_value = "3", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,
    /// Seconds from one to the next
    #[arg(long, short = 'i', value_name = "SEC", default_value = "1", value_parser = interval)]
    pub interval: Duration,
}

/// `ogctl key`.
#[derive(Debug, ClapArgs)]
pub struct Key {
    /// Make another key; the old one is worth nothing from then on
    #[arg(long)]
    pub renew: bool,
    /// Where to keep it; default: $XDG_CONFIG_HOME/opengateway/api-key
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Print it instead
    #[arg(long, conflicts_with = "file")]
    pub print: bool,
}

/// How a shell sets variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dialect {
    /// Bash, zsh, and other shells like sh.
    Sh,
    /// Fish.
    Fish,
}

/// `ogctl config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check the configuration files without starting anything
    Check {
        /// Main file; its drop-ins are read from the directory FILE.d
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

/// Longest time that can be asked for, as in the daemon.
const MAX_SECONDS: f64 = 3600.0;

/// Reads a time above zero.
fn seconds(text: &str) -> Result<Duration, String> {
    seconds_or_zero(text).and_then(|time| if time.is_zero() { Err("must be more than 0".into()) } else { Ok(time) })
}

/// Reads seconds, such as `5` or `0.5`; at most an hour.
fn seconds_or_zero(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if !(0.0..=MAX_SECONDS).contains(&seconds) {
        return Err(format!("must be from 0 to {MAX_SECONDS} seconds"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Reads the time between two pings: a shorter one would be a flood.
fn interval(text: &str) -> Result<Duration, String> {
    let time = seconds(text)?;
    if time < Duration::from_millis(100) { Err("must be at least 0.1 seconds".into()) } else { Ok(time) }
}

/// Reads the name or id of a peer, as the daemon takes it.
fn peer(text: &str) -> Result<String, String> {
    match text.len() {
        0 => Err("must not be empty".into()),
        1..=128 => Ok(text.to_owned()),
        length => Err(format!("is {length} bytes long; at most 128 are taken")),
    }
}

/// Reads a sampling temperature.
fn temperature(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=2.0).contains(&value) { Ok(value) } else { Err("must be from 0 to 2".into()) }
}

/// Reads the probability of nucleus sampling.
fn top_p(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if value > 0.0 && value <= 1.0 { Ok(value) } else { Err("must be above 0 and at most 1".into()) }
}

/// Reads a text that ends an answer.
fn stop(text: &str) -> Result<String, String> {
    match text.len() {
        0 => Err("must not be empty".into()),
        1..=256 => Ok(text.to_owned()),
        length => Err(format!("is {length} bytes long; at most 256 are taken")),
    }
}

/// Reads a SHA-256, also as `sha256sum` and registries write it.
fn sha256(text: &str) -> Result<String, String> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    if digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Ok(digits.to_ascii_lowercase())
    } else {
        Err("no SHA-256: 64 hexadecimal digits".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn join_and_leave_are_other_words_for_connect_and_disconnect() {
        let join = Args::try_parse_from(["ogctl", "join", "x"]).unwrap();
        assert!(matches!(join.command, Command::Connect(Connect { cluster, .. }) if cluster == "x"));
        let leave = Args::try_parse_from(["ogctl", "leave", "x", "--forget"]).unwrap();
        assert!(matches!(leave.command, Command::Disconnect(Disconnect { forget: true, .. })));
    }

    #[test]
    fn numbers_at_their_limits_pass_and_past_them_do_not() {
        assert_eq!(seconds("3600"), Ok(Duration::from_secs(3600)));
        assert_eq!(seconds_or_zero("0"), Ok(Duration::ZERO));
        assert_eq!((temperature("0"), temperature("2")), (Ok(0.0), Ok(2.0)));
        for bad in ["0", "3600.1", "-1", "nan", "inf", "", "1s"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
        assert_eq!((top_p("1"), top_p("0.001")), (Ok(1.0), Ok(0.001)));
        assert!(top_p("0").is_err() && top_p("1.001").is_err() && top_p("nan").is_err());
        assert!(stop(&"x".repeat(256)).is_ok() && stop(&"x".repeat(257)).is_err() && stop("").is_err());
        assert_eq!(sha256(&format!("sha256:{}", "Ab".repeat(32))), Ok("ab".repeat(32)));
        assert!(sha256(&"a".repeat(63)).is_err() && sha256(&"a".repeat(65)).is_err() && sha256(&"g".repeat(64)).is_err());
        assert!(interval("0.1").is_ok() && interval("0.09").is_err() && interval("nan").is_err());
        assert!(peer(&"x".repeat(128)).is_ok() && peer(&"x".repeat(129)).is_err() && peer("").is_err());
        let ping = |count: &str| Args::try_parse_from(["ogctl", "ping", "x", "-c", count]).is_ok();
        assert!(ping("1") && ping("10000") && !ping("0") && !ping("10001"));
        assert!(Args::try_parse_from(["ogctl", "doctor", "x", "--cluster", "y"]).is_err());
        assert!(temperature("2.01").is_err() && temperature("-0.1").is_err() && temperature("nan").is_err());
        assert!(Args::try_parse_from(["ogctl", "prompt", "--max-tokens", "0", "x"]).is_err());
        assert!(Args::try_parse_from(["ogctl", "prompt", "--max-tokens", "1", "x"]).is_ok());
        assert!(Args::try_parse_from(["ogctl", "prompt", "--max-tokens", "4294967296", "x"]).is_err());
    }

    #[test]
    fn models_has_commands_of_its_own_beside_the_name_of_a_cluster() {
        let models = |line: &str| match Args::try_parse_from(line.split(' ')) {
            Ok(Args { command: Command::Models(models), .. }) => models,
            other => panic!("{line}: {other:?}"),
        };
        assert!(matches!(models("ogctl models"), Models { cluster: None, command: None, .. }));
        assert_eq!(models("ogctl models room -v").cluster.as_deref(), Some("room"));
        assert!(matches!(models("ogctl models rm demo").command, Some(ModelsCommand::Rm { name }) if name == "demo"));
        assert!(matches!(models("ogctl models add - --name x").command, Some(ModelsCommand::Add { .. })));
        assert!(Args::try_parse_from(["ogctl", "models", "room", "--local"]).is_err());
        assert!(Args::try_parse_from(["ogctl", "prompt", "--no-template", "--system", "s", "x"]).is_err());
    }

    #[test]
    fn a_prefix_of_a_command_is_no_command() {
        assert!(Args::try_parse_from(["ogctl", "stat"]).is_err());
    }
}
