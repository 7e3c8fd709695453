//! Where log lines go, and which of them: chosen at the start, changed by the configuration and over the bus.
//!
//! Lines are structured: under systemd each field of an event becomes a journal field `OPENGATEWAY_<FIELD>`.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt as _;

/// The name under which the journal has the lines.
pub const SYSLOG_IDENTIFIER: &str = "opengatewayd";
/// Before the name of each field in the journal.
const FIELD_PREFIX: &str = "OPENGATEWAY";

/// Why a level is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LevelError {
    /// It is no level and no filter.
    #[error("{0:?} is no level (error, warn, info, debug, trace) and no filter")]
    Unknown(String),
    /// The log of this process is not ours to set.
    #[error("the log of this process cannot be changed")]
    Fixed,
}

/// Where lines go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The journal, with fields.
    Journal,
    /// Standard error.
    Console,
}

type Apply = dyn Fn(EnvFilter) -> bool + Send + Sync;

/// A cheap clone that changes which lines are written.
#[derive(Clone)]
pub struct Log {
    apply: Arc<Apply>,
    level: Arc<Mutex<String>>,
    target: Target,
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("level", &self.level()).field("target", &self.target).finish_non_exhaustive()
    }
}

/// A plain level is about this program; its libraries speak at warnings and above, at "trace" too.
fn filter(level: &str) -> Result<EnvFilter, LevelError> {
    let directives = match level {
        "error" => "error".to_owned(),
        // libp2p-kad warns that a first node knows nobody to ask: that is how every cluster begins.
        "warn" | "info" | "debug" => format!("warn,libp2p_kad=error,opengateway={level},opengatewayd={level}"),
        other => other.to_owned(),
    };
    EnvFilter::try_new(directives).map_err(|_| LevelError::Unknown(level.to_owned()))
}

/// Whether this stream is the one that systemd connected to the journal: its device and inode are in JOURNAL_STREAM, which
/// children inherit though their streams may lead elsewhere (systemd.exec(5)).
fn is_the_journal(stream: impl AsFd, named: &str) -> bool {
    rustix::fs::fstat(stream).is_ok_and(|stat| named == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Lines of one place in the program: how many at once, and then one in how long.
struct Pace {
    burst: f64,
    every: Duration,
}

const WARNINGS: Pace = Pace { burst: 10.0, every: Duration::from_secs(10) };
/// Those about what happens, such as members that come and go.
const NEWS: Pace = Pace { burst: 100.0, every: Duration::from_secs(1) };

/// What one place in the program said.
#[derive(Debug, Clone, Copy)]
struct Said {
    tokens: f64,
    at: Instant,
    left_out: u64,
}

impl Said {
    /// Whether the next line is written, and how many before it were not.
    fn more(&mut self, pace: &Pace, now: Instant) -> Option<u64> {
        let gained = now.duration_since(self.at).as_secs_f64() / pace.every.as_secs_f64();
        self.tokens = (self.tokens + gained).min(pace.burst);
        self.at = now;
        if self.tokens < 1.0 {
            self.left_out += 1;
            return None;
        }
        self.tokens -= 1.0;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// Keeps whoever can make this program write a line from filling the disk with them: each place in the program has its
/// pace. Debugging is left alone: who asks for it wants all of it.
#[derive(Default)]
struct Calm(Mutex<HashMap<&'static str, Said>>);

impl Calm {
    fn more(&self, place: &'static str, pace: &Pace, now: Instant) -> Option<u64> {
        // As many entries as there are places in the program.
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.entry(place).or_insert(Said { tokens: pace.burst, at: now, left_out: 0 }).more(pace, now)
    }
}

impl<S: tracing::Subscriber> Layer<S> for Calm {
    fn event_enabled(&self, event: &tracing::Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        let pace = match *metadata.level() {
            tracing::Level::ERROR | tracing::Level::WARN => &WARNINGS,
            tracing::Level::INFO => &NEWS,
            _ => return true,
        };
        match self.more(metadata.name(), pace, Instant::now()) {
            None => false,
            Some(0) => true,
            Some(left_out) => {
                tracing::warn!(left_out, "{left_out} lines like the next one were left out: there were too many of them");
                true
            }
        }
    }
}

impl Log {
    /// Starts the log of this process. A level that is no level counts as "info".
    pub fn start(level: &str) -> Self {
        let (filter, handle) = reload::Layer::new(filter(level).unwrap_or_else(|_| EnvFilter::new("info")));
        let registry = tracing_subscriber::registry().with(filter).with(Calm::default());
        let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
        let journald = is_the_journal(std::io::stderr(), &named).then(tracing_journald::layer).and_then(Result::ok);
        let target = match journald {
            Some(layer) => {
                let layer =
                    layer.with_syslog_identifier(SYSLOG_IDENTIFIER.to_owned()).with_field_prefix(Some(FIELD_PREFIX.into()));
                registry.with(layer).init();
                Target::Journal
            }
            None => {
                let colour = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
                let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colour).with_target(false);
                registry.with(layer).init();
                Target::Console
            }
        };
        let apply = Arc::new(move |filter| handle.reload(filter).is_ok());
        Self { apply, level: Arc::new(Mutex::new(level.to_owned())), target }
    }

    /// A log that somebody else started, such as a test.
    pub fn fixed() -> Self {
        Self { apply: Arc::new(|_| false), level: Arc::new(Mutex::new("info".to_owned())), target: Target::Console }
    }

    /// Writes lines of this level or filter from now on.
    ///
    /// # Errors
    /// [`LevelError`]; the old level stays.
    pub fn set(&self, level: &str) -> Result<(), LevelError> {
        if !(self.apply)(filter(level)?) {
            return Err(LevelError::Fixed);
        }
        *self.level.lock().unwrap_or_else(PoisonError::into_inner) = level.to_owned();
        Ok(())
    }

    /// The level or filter as it was set.
    pub fn level(&self) -> String {
        self.level.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where lines go.
    pub const fn target(&self) -> Target {
        self.target
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_journal_when_it_is_the_one_that_is_named() {
        use std::os::unix::fs::MetadataExt as _;
        let file = tempfile::tempfile().unwrap();
        let metadata = file.metadata().unwrap();
        assert!(is_the_journal(&file, &format!("{}:{}", metadata.dev(), metadata.ino())));
        for other in ["", "1", "1:2", "x:y"] {
            assert!(!is_the_journal(&file, other), "{other}");
        }
    }

    #[test]
    fn levels_and_filters_are_taken_and_nonsense_is_not() {
        for level in ["error", "warn", "info", "debug", "trace", "info,opengateway::net=debug"] {
            assert!(filter(level).is_ok(), "{level}");
        }
        assert_eq!(filter("a=b=c").unwrap_err(), LevelError::Unknown("a=b=c".into()));
        assert_eq!(Log::fixed().set("debug"), Err(LevelError::Fixed));
        assert_eq!(Log::fixed().level(), "info");
    }

    #[test]
    fn ten_thousand_warnings_are_ten_lines_and_then_one_in_ten_seconds_with_their_number() {
        let (calm, now) = (Calm::default(), Instant::now());
        let written = |place, at| calm.more(place, &WARNINGS, at);
        assert_eq!((0..10_000).filter(|_| written("a", now).is_some()).count(), 10);
        assert_eq!(written("b", now), Some(0), "another place speaks for itself");
        let later = now + Duration::from_secs(10);
        assert_eq!([written("a", later), written("a", later)], [Some(9990), None]);
        let much_later = now + Duration::from_secs(1000);
        assert_eq!(written("a", much_later), Some(1));
        assert_eq!((0..100).filter(|_| written("a", much_later).is_some()).count(), 9, "who was quiet may speak as before");
    }

    #[test]
    fn the_layer_writes_what_is_left_and_says_what_is_not() {
        #[derive(Clone, Default)]
        struct Lines(Arc<Mutex<Vec<String>>>);
        impl<S: tracing::Subscriber> Layer<S> for Lines {
            fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
                self.0.lock().unwrap().push(event.metadata().level().to_string());
            }
        }
        let lines = Lines::default();
        let subscriber = tracing_subscriber::registry().with(Calm::default()).with(lines.clone());
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..1000 {
                tracing::warn!("again");
                tracing::debug!("in detail");
            }
        });
        let lines = lines.0.lock().unwrap();
        assert_eq!(lines.iter().filter(|level| *level == "WARN").count(), 10);
        assert_eq!(lines.iter().filter(|level| *level == "DEBUG").count(), 1000);
    }
}
