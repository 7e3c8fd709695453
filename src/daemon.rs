//! Wiring and lifecycle: load → bind → spawn → serve the bus → ready → wait → drain → goodbye.

mod control;
mod recollect;
mod status;
mod watchdog;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use zbus::connection::Builder;

use crate::config::{self, BackendKind, BackendSettings, ConfigError, Environment, Overrides, Roots, Settings};
use crate::dbus::control::{Control, ControlState, Request};
use crate::dbus::{self, Mode, ServeError};
use crate::domain::resources::{Lent, Resources, lendable};
use crate::domain::tier;
use crate::logging::Log;
use crate::net::identity::Identity;
use crate::serve::backend::{Backend, Limits};
use crate::serve::{Echo, OpenAi, OpenAiError, OpenAiSettings};
use crate::state::{ClustersError, DirError, IdentityFileError, Memory, StateDir};
use crate::{dispatch, gauge, http, models, net, serve};
use status::Status;

/// Running prompts may end within this time after SIGTERM.
const DRAIN: Duration = Duration::from_secs(30);
/// What comes after that: goodbye to members and to the bus.
const GOODBYE: Duration = Duration::from_secs(5);
/// Exit code for a configuration or state that a restart does not mend (sysexits.h: EX_CONFIG). systemd does not restart it.
pub const EXIT_CONFIG: u8 = 78;

/// Which bus to be on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bus {
    /// The system bus.
    System,
    /// The session bus.
    Session,
    /// The bus at this D-Bus address.
    Address(String),
}

impl std::str::FromStr for Bus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "system" => Ok(Self::System),
            "session" => Ok(Self::Session),
            address if address.contains(':') => Ok(Self::Address(address.to_owned())),
            other => {
                Err(format!("{other:?} is neither \"system\" nor \"session\" nor a D-Bus address such as unix:path=/run/bus"))
            }
        }
    }
}

/// What the command line says.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which bus to be on.
    pub bus: Bus,
    /// A main configuration file of one's own.
    pub config: Option<PathBuf>,
    /// What wins over files and environment.
    pub overrides: Overrides,
}

/// Why the daemon ended, other than by being asked to.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The state directory cannot be used.
    #[error("{0}")]
    State(#[from] DirError),
    /// The identity cannot be used; it was not touched.
    #[error("{0}")]
    Identity(#[from] IdentityFileError),
    /// The saved clusters cannot be used; they were not touched.
    #[error("{0}")]
    Clusters(#[from] ClustersError),
    /// A backend cannot be used.
    #[error("{0}")]
    Backend(#[from] OpenAiError),
    /// The network cannot be started.
    #[error("{0}")]
    Network(#[from] net::StartError),
    /// The bus cannot be served.
    #[error("{0}")]
    Bus(#[from] ServeError),
    /// The bus went away.
    #[error("the connection to the bus is lost")]
    BusLost,
    /// A task that must not end did.
    #[error("{0}")]
    Task(String),
    /// Signals cannot be received.
    #[error("signals cannot be received: {0}")]
    Signals(io::Error),
}

impl DaemonError {
    /// The exit code: 78 for what a restart does not mend, else 1.
    pub const fn exit_code(&self) -> u8 {
        match self {
            // A full disk: nothing is damaged, and there may be space at the next try.
            Self::Identity(IdentityFileError::Unsaved { .. }) => 1,
            Self::Config(_)
            | Self::Identity(_)
            | Self::Clusters(_)
            | Self::Backend(_)
            | Self::Network(net::StartError::Address { .. }) => EXIT_CONFIG,
            Self::State(_) | Self::Network(_) | Self::Bus(_) | Self::BusLost | Self::Task(_) | Self::Signals(_) => 1,
        }
    }
}

/// Where this installation keeps its files.
pub fn roots(options: &Options, environment: &Environment) -> Roots {
    let roots = match environment.per_user_root() {
        Some(root) => Roots::per_user(&root),
        None => Roots::system(),
    };
    match &options.config {
        Some(main) => roots.with_main(main.clone()),
        None => roots,
    }
}

/// Reads the configuration, as [`run`] will.
///
/// # Errors
/// [`ConfigError`].
pub fn settings(options: &Options) -> Result<Settings, ConfigError> {
    let environment = Environment::of_process();
    config::load(&roots(options, &environment), &environment, &options.overrides)
}

/// SIGTERM and SIGINT.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn register() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Resolves when this process is told to stop. Cancel-safe.
    async fn wanted(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// [`DaemonError`], with its exit code.
pub async fn run(options: Options, settings: Settings, log: Log) -> Result<(), DaemonError> {
    let started_at = SystemTime::now();
    // Before anybody can see this process: whoever stops it as soon as its name is on the bus gets the orderly end.
    let mut stop = Stop::register().map_err(DaemonError::Signals)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(DaemonError::Signals)?;
    let state = StateDir::open(&settings.state_dir)?;
    let identity = identity(&state)?;
    let (memory, warning) = Memory::load(state.path())?;
    if let Some(warning) = &warning {
        tracing::error!("{warning}");
    }
    let (sharing, lent) = memory.sharing.clone().unwrap_or((settings.serve, settings.lent.clone()));
    let profile = state.path().join("resources.json");
    let (gauge, _gauging) = gauge::spawn(gauge::Config::of_machine(settings.models_dir.clone(), profile));
    let (lent_sender, lent_receiver) = watch::channel(lent.clone());
    let tiers = follow_tiers(gauge.clone(), lent_receiver);
    let backends = settings.backends.iter().map(backend).collect::<Result<Vec<_>, _>>()?;
    let (serve, mut serving) = serve::spawn(serve::Config { backends, tiers });
    let (model_settings, model_receiver) = watch::channel(model_settings(&settings));
    let models = models::spawn(models::Config {
        settings: model_receiver,
        state_dir: state.path().to_owned(),
        serve: serve.clone(),
        gauge: gauge.clone(),
    });
    let mut model_problems = models.problems.clone();
    let peers = settings.remember.then(|| recollect::load(state.path()));
    let (peers, remembered, peers_warning) = match peers {
        Some((file, remembered, warning)) => (Some(file), remembered, warning),
        None => (None, Vec::new(), None),
    };
    let net_config = net::Config { remembered, ..net_config(&settings) };
    let (net, mut network) = net::start(net_config, &identity, Arc::new(serve.clone())).await?;
    let discovering = discover(&serve, &settings);
    let dispatch = dispatch::Handle::new(dispatch::Router::new(net.clone(), serve.clone(), settings.node_name.clone()));

    let http = http::start(
        http::Parts {
            net: net.clone(),
            serve: serve.clone(),
            dispatch: dispatch.clone(),
            node_name: settings.node_name.clone(),
            state_dir: state.path().to_owned(),
            settings: settings.http.clone(),
        },
        http::passed_sockets(),
    );

    let mut shown =
        ControlState { saved: control::shown(&memory, &settings), sharing, lent, stopping: false, problems: Vec::new() };
    if let Some(warning) = &peers_warning {
        tracing::error!("{warning}");
    }
    shown.problems.extend(warning.into_iter().chain(peers_warning));
    let (control, requests, publish) = Control::new(shown);
    let node = dbus::Node {
        net: net.clone(),
        doctor: crate::diagnosis::Doctor::new(net.clone()),
        serve: serve.clone(),
        dispatch,
        models: models.handle.clone(),
        engine: model_settings.subscribe(),
        gauge: gauge.clone(),
        http: http.clone(),
        control,
        version: crate::domain::version::VERSION.to_owned(),
        node_name: settings.node_name.clone(),
        features: vec!["prompt-fd".to_owned(), "nvml".to_owned()],
        started_at,
        log: log.clone(),
    };
    let recollector = peers.map(|file| recollect::Recollector::start(file, &net, publish.clone()));
    let environment = Environment::of_process();
    let roots = roots(&options, &environment);
    let mut status = Status::new(&net, publish.subscribe());
    let mut keeper = control::Keeper {
        log,
        started_with: settings.clone(),
        settings,
        wishes: BTreeMap::new(),
        unjoined: BTreeMap::new(),
        restart_note: None,
        roots,
        environment,
        overrides: options.overrides.clone(),
        memory,
        directory: state.path().to_owned(),
        net: net.clone(),
        gauge,
        publish,
        lent: lent_sender,
        models: model_settings,
        model_problems: Vec::new(),
    };
    keeper.join_at_start().await;
    let (builder, mode) = bus(&options.bus);
    let served = tokio::select! {
        served = dbus::serve(builder, node, mode) => served,
        () = stop.wanted() => {
            net.shutdown().await;
            return Ok(());
        }
    };
    let mut service = match served {
        Ok(service) => service,
        Err(error) => {
            net.shutdown().await;
            return Err(error.into());
        }
    };
    status.ready();
    watchdog::start(watchdog::Parts { net: net.clone(), serve: serve.clone(), bus: service.pinger() });
    let (name, peer_id) = (&keeper.settings.node_name, identity.peer_id());
    tracing::info!(name, %peer_id, "ready: node {name}, peer id {peer_id}");

    let mut requests = requests;
    let outcome = loop {
        tokio::select! {
            Some(request) = requests.recv() => {
                let reload = matches!(request, Request::Reload(_));
                if reload { status::reloading() }
                keeper.on_request(request).await;
                if reload { status.ready() }
            }
            () = stop.wanted() => break Ok(()),
            _ = hangup.recv() => {
                status::reloading();
                match keeper.reload().await {
                    Ok(()) => tracing::info!("configuration read again"),
                    Err(error) => tracing::error!(%error, "the old configuration stays in force: {error}"),
                }
                status.ready();
            }
            () = status.told() => {}
            Ok(()) = model_problems.changed() => keeper.note_models(model_problems.borrow_and_update().clone()),
            closed = service.closed() => break Err(match closed {
                dbus::Closed::BusLost => DaemonError::BusLost,
                dbus::Closed::Mute => DaemonError::Task("the task that announces changes on the bus ended".to_owned()),
            }),
            ended = &mut network => break Err(DaemonError::Task(match ended {
                Ok(Err(stopped)) => stopped.to_string(),
                Ok(Ok(())) | Err(_) => "the network task ended".to_owned(),
            })),
            _ = &mut serving => break Err(DaemonError::Task("the serving task ended".to_owned())),
        }
    };
    tracing::info!("stopping");
    if let Some(discovering) = discovering {
        discovering.abort();
    }
    // Who asks from now on, and who still waits, is told that the daemon stops.
    drop(requests);
    keeper.stopping();
    service.prepare_for_shutdown().await;
    status::stopping(DRAIN + GOODBYE);
    http.stop();
    drain(&serve, &service, &http, &mut stop).await;
    net.shutdown().await;
    if let Some(recollector) = recollector {
        recollector.finish().await;
    }
    models.stop().await;
    service.stop().await;
    outcome
}

/// Lets running prompts end: those of members and those of this machine's users. A second signal ends the patience.
async fn drain(serve: &serve::Handle, service: &dbus::Service, http: &http::Handle, stop: &mut Stop) {
    let ended = async {
        serve.drain(DRAIN).await;
        let deadline = tokio::time::Instant::now() + DRAIN;
        while service.active_jobs() + http.active() > 0 && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        () = ended => {}
        () = stop.wanted() => tracing::info!("asked again: not waiting for running prompts"),
        () = tokio::time::sleep(DRAIN) => {}
    }
}

fn identity(state: &StateDir) -> Result<Identity, IdentityFileError> {
    let decode = |bytes: &[u8]| Identity::decode(bytes).map(|identity| identity.peer_id()).map_err(|error| error.to_string());
    let bytes = crate::state::load_or_create(state.path(), || Identity::generate().encode().unwrap_or_default(), decode)?;
    Identity::decode(&bytes)
        .map_err(|error| IdentityFileError::Damaged { path: state.path().to_owned(), reason: error.to_string() })
}

fn bus(bus: &Bus) -> (Builder<'_>, Mode) {
    let own = Mode::PerUser(rustix::process::geteuid().as_raw());
    match bus {
        Bus::System => (Builder::system(), Mode::System),
        Bus::Session => (Builder::session(), own),
        Bus::Address(address) => (Builder::address(address.as_str()), own),
    }
}

fn backend(settings: &BackendSettings) -> Result<Arc<dyn Backend>, OpenAiError> {
    let limits = Limits {
        slots: settings.slots,
        queued: settings.queue,
        running_per_peer: settings.running_per_peer,
        queued_per_peer: settings.queued_per_peer,
    };
    Ok(match &settings.kind {
        BackendKind::Echo => Arc::new(Echo::new(limits)),
        BackendKind::OpenAi { url, api_key_file, models, api, allow_http, learns_slots } => {
            Arc::new(OpenAi::start(OpenAiSettings {
                url: url.clone(),
                api_key_file: api_key_file.clone(),
                models: models.clone(),
                api: *api,
                allow_http: *allow_http,
                limits,
                learns_slots: *learns_slots,
            })?)
        }
    })
}

/// Looks for servers of models on this machine, beside those that are configured.
fn discover(serve: &serve::Handle, settings: &Settings) -> Option<tokio::task::JoinHandle<()>> {
    let url = |backend: &BackendSettings| match &backend.kind {
        BackendKind::OpenAi { url, .. } => Some(url.clone()),
        BackendKind::Echo => None,
    };
    let configured = settings.backends.iter().filter_map(url).collect();
    settings.discover.then(|| serve::discover::start(serve.clone(), serve::discover::Config::usual(configured)))
}

/// What the configuration says about models, with whole paths.
fn model_settings(settings: &Settings) -> models::Settings {
    let whole = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
    let engine = &settings.engine;
    models::Settings {
        directory: whole(settings.models_dir.clone()),
        also: settings.models_also.iter().cloned().map(whole).collect(),
        enabled: engine.enabled,
        program: whole(engine.program(&std::env::current_exe().unwrap_or_default())),
        threads: engine.threads,
        context: engine.context,
        slots: engine.slots,
        keep: engine.keep.clone(),
        idle: engine.idle,
        file_template: engine.file_template,
        gpu_layers: engine.gpu_layers,
    }
}

/// Nearly all connections of a relay come in; of those of another node two thirds at most.
fn connection_caps(settings: &Settings) -> net::ConnectionCaps {
    let most = settings.max_connections;
    let usual = net::ConnectionCaps::default();
    let (incoming, pending) = if settings.relay.enabled { (most / 9 * 8, 256) } else { (most * 2 / 3, usual.pending_incoming) };
    net::ConnectionCaps { established: most, established_incoming: incoming.max(1), pending_incoming: pending, ..usual }
}

fn net_config(settings: &Settings) -> net::Config {
    net::Config {
        node_name: settings.node_name.clone(),
        version: crate::domain::version::VERSION.to_owned(),
        listen: settings.listen.clone(),
        any_port: settings.any_port,
        bootstrap: settings.bootstrap.clone(),
        mdns: settings.mdns,
        timings: net::Timings::default(),
        caps: connection_caps(settings),
        relaying: net::Relaying {
            enabled: settings.relay.enabled,
            reservations: settings.relay.reservations as usize,
            circuits: settings.relay.circuits as usize,
            circuit_bytes: settings.relay.circuit_bytes,
            circuit_duration: Duration::from_secs(u64::from(settings.relay.circuit_hours) * 3600),
        },
        announce: settings.announce.clone(),
        versions: crate::wire::version::Versions::OURS,
        ..net::Config::default()
    }
}

/// The tiers that members are told: what this machine qualifies for with what is lent, and has the memory to load. Who may
/// serve the cluster of a tier is another question, which the table alone answers (`control.rs`).
fn follow_tiers(gauge: gauge::Handle, mut lent: watch::Receiver<Lent>) -> watch::Receiver<Vec<String>> {
    let servable = |resources: &Resources, lent: &Lent| tier::servable(&lendable(resources, lent));
    let (publish, tiers) = watch::channel(servable(&gauge.latest(), &lent.borrow()));
    tokio::spawn(async move {
        let mut resources = gauge.watch();
        loop {
            let now = servable(&gauge.latest(), &lent.borrow_and_update());
            publish.send_if_modified(|known| {
                let changed = *known != now;
                *known = now;
                changed
            });
            tokio::select! {
                changed = resources.changed() => if changed.is_err() { return },
                changed = lent.changed() => if changed.is_err() { return },
            }
        }
    });
    tiers
}
