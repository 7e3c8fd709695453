//! `[engine]` and `[models] also` as checked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::raw;

/// Models that may be kept.
const MAX_KEPT: usize = 64;
/// Directories beside the one that is written to.
const MAX_DIRECTORIES: usize = 16;
/// Without a prompt for this long a model is unloaded.
const DEFAULT_IDLE: u64 = 600;

/// How models are computed here.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineSettings {
    /// They are.
    pub enabled: bool,
    /// The program; `None` is the one beside the daemon.
    pub program: Option<PathBuf>,
    /// Threads; `None` is what suits the machine.
    pub threads: Option<u32>,
    /// Context window of a prompt, in tokens; `None` is that of the model, up to 8192.
    pub context: Option<u32>,
    /// Prompts at once; `None` is what suits machine and model.
    pub slots: Option<u32>,
    /// Models that are loaded at the start and stay.
    pub keep: Vec<String>,
    /// The others are unloaded after this time without a prompt; `None` is never.
    pub idle: Option<Duration>,
    /// Use the chat template of the file.
    pub file_template: bool,
    /// Layers that go to a GPU; `None` is all.
    pub gpu_layers: Option<u32>,
}

/// What is relative would depend on where the daemon was started.
pub(super) fn absolute(key: &str, path: Option<PathBuf>) -> Result<Option<PathBuf>, String> {
    match path {
        Some(path) if !path.is_absolute() => Err(format!("{key} is {path:?}; it is an absolute path, which begins with /")),
        path => Ok(path),
    }
}

fn bounded(key: &str, value: Option<u32>, least: u32, most: u32) -> Result<Option<u32>, String> {
    match value {
        Some(value) if !(least..=most).contains(&value) => {
            Err(format!("engine.{key} is {value}; it is between {least} and {most}"))
        }
        value => Ok(value),
    }
}

impl EngineSettings {
    pub(super) fn check(raw: raw::Engine) -> Result<Self, String> {
        let keep = raw.keep.unwrap_or_default();
        if keep.len() > MAX_KEPT {
            return Err(format!("engine.keep has {} models; at most {MAX_KEPT} are taken", keep.len()));
        }
        let idle = match raw.idle.unwrap_or(DEFAULT_IDLE) {
            0 => None,
            seconds @ 1..=31_536_000 => Some(Duration::from_secs(seconds)),
            seconds => return Err(format!("engine.idle is {seconds}; it is 0 for never, or 1 to 31536000 seconds")),
        };
        Ok(Self {
            enabled: raw.enabled.unwrap_or(true),
            program: absolute("engine.program", raw.program)?,
            threads: bounded("threads", raw.threads, 0, 1024)?.filter(|threads| *threads > 0),
            context: bounded("context", raw.context, 0, 16_777_216)?.filter(|context| *context > 0),
            slots: bounded("slots", raw.slots, 0, 256)?.filter(|slots| *slots > 0),
            keep,
            idle,
            file_template: raw.file_template.unwrap_or(false),
            gpu_layers: raw.gpu_layers,
        })
    }

    /// What a reload applies is taken away: two that differ in the rest need a restart.
    pub(super) fn fixed(&self) -> Self {
        Self { keep: Vec::new(), idle: None, ..self.clone() }
    }

    /// The program when the configuration names none: as installed beside a daemon in `bin`, else as built beside it.
    pub fn program(&self, daemon: &Path) -> PathBuf {
        const NAME: &str = "opengateway-engine";
        self.program.clone().unwrap_or_else(|| {
            let directory = daemon.parent().unwrap_or(Path::new("/usr/bin"));
            let installed = directory.parent().unwrap_or(directory).join("libexec").join(NAME);
            let built = directory.join(NAME);
            if !installed.exists() && built.exists() { built } else { installed }
        })
    }
}

/// The directories of models that are read only.
pub(super) fn directories(list: Vec<PathBuf>) -> Result<Vec<PathBuf>, String> {
    if list.len() > MAX_DIRECTORIES {
        return Err(format!("models.also has {} directories; at most {MAX_DIRECTORIES} are taken", list.len()));
    }
    list.into_iter().filter_map(|path| absolute("models.also", Some(path)).transpose()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<EngineSettings, String> {
        EngineSettings::check(toml::from_str(text).unwrap())
    }

    #[test]
    fn limits_hold_and_one_past_them_is_named() {
        for (good, bad) in [
            ("threads = 1024", "threads = 1025"),
            ("context = 16777216", "context = 16777217"),
            ("slots = 256", "slots = 257"),
            ("idle = 31536000", "idle = 31536001"),
        ] {
            assert!(check(good).is_ok(), "{good}");
            let key = bad.split(' ').next().unwrap();
            assert!(check(bad).unwrap_err().contains(&format!("engine.{key}")), "{bad}");
        }
        let list = |count: usize| format!("keep = [{}]", vec!["\"m\""; count].join(","));
        assert!(check(&list(MAX_KEPT)).is_ok() && check(&list(MAX_KEPT + 1)).is_err());
        assert!(directories(vec!["/a".into(); MAX_DIRECTORIES]).is_ok());
        assert!(directories(vec!["/a".into(); MAX_DIRECTORIES + 1]).is_err());
    }

    #[test]
    fn relative_paths_are_named() {
        assert!(check("program = \"libexec/engine\"").unwrap_err().contains("engine.program"));
        assert!(check("program = \"\"").is_err());
        assert!(directories(vec!["/a".into(), "rel".into()]).unwrap_err().contains("models.also is \"rel\""));
        assert!(absolute("models.directory", Some("rel".into())).unwrap_err().contains("models.directory"));
        assert_eq!(absolute("models.directory", Some("/a".into())), Ok(Some("/a".into())));
    }

    #[test]
    fn nought_is_what_suits_and_never() {
        let nought = check("threads = 0\ncontext = 0\nslots = 0\nidle = 0").unwrap();
        let never = EngineSettings { idle: None, ..check("").unwrap() };
        assert_eq!(nought, never);
        assert_eq!(check("").unwrap().idle, Some(Duration::from_secs(600)));
    }

    #[test]
    fn the_program_is_beside_the_daemon() {
        let root = tempfile::tempdir().unwrap();
        let daemon = root.path().join("bin/opengatewayd");
        let installed = root.path().join("libexec/opengateway-engine");
        let settings = check("").unwrap();
        assert_eq!(settings.program(&daemon), installed);
        std::fs::create_dir_all(root.path().join("bin")).unwrap();
        let built = root.path().join("bin/opengateway-engine");
        std::fs::write(&built, "").unwrap();
        assert_eq!(settings.program(&daemon), built);
        std::fs::create_dir_all(root.path().join("libexec")).unwrap();
        std::fs::write(&installed, "").unwrap();
        assert_eq!(settings.program(&daemon), installed);
        assert_eq!(check("program = \"/x\"").unwrap().program(&daemon), Path::new("/x"));
    }
}
