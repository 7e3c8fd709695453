//! The task that measures: at the start, when asked, and every minute; writes `resources.json` when something moved, or
//! when asked to.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::cgroup::Groups;
use super::errand::Errand;
use super::handle::{Command, Handle};
use super::{cpu, disk, drm, memory, nvml};
use crate::domain::resources::{Gpu, Resources, Storage, moved};
use crate::state;

/// Between two measurements that nobody asked for.
const PERIOD: Duration = Duration::from_secs(60);
/// A probe that takes longer is given up; its value is unknown until it comes back.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is measured, and where the result is kept.
#[derive(Debug, Clone)]
pub struct Config {
    /// `/proc`.
    pub proc_root: PathBuf,
    /// `/sys`.
    pub sys_root: PathBuf,
    /// `/sys/fs/cgroup`.
    pub cgroup_root: PathBuf,
    /// Where models are kept.
    pub models_dir: PathBuf,
    /// `resources.json`.
    pub profile: PathBuf,
    /// NVML's library, when it is not the system's.
    pub nvml_library: Option<PathBuf>,
    /// How long to wait for a driver or a file system.
    pub patience: Duration,
}

impl Config {
    /// Of this machine.
    pub fn of_machine(models_dir: PathBuf, profile: PathBuf) -> Self {
        Self {
            proc_root: "/proc".into(),
            sys_root: "/sys".into(),
            cgroup_root: "/sys/fs/cgroup".into(),
            models_dir,
            profile,
            nvml_library: None,
            patience: PATIENCE,
        }
    }
}

/// What files in memory can tell: microseconds, no waiting.
fn quick(config: &Config) -> Resources {
    let mut warnings = Vec::new();
    let groups = Groups::find(&config.proc_root, &config.cgroup_root);
    let cpu = cpu::probe(&config.proc_root, &config.sys_root, &groups, &mut warnings);
    let memory = memory::probe(&config.proc_root, &groups, &mut warnings);
    let now =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX));
    Resources {
        schema: 1,
        measured_at: now,
        cpu,
        memory,
        storage: Storage { path: config.models_dir.clone(), total: None, available: None, models: None },
        gpus: Vec::new(),
        warnings,
    }
}

/// Starts the sampler. Returns at once: what takes time is measured afterwards and published when it is there.
pub fn spawn(config: Config) -> (Handle, JoinHandle<()>) {
    // Of no time at all, so that nobody takes it for a recent measurement: storage and GPUs are missing.
    let first = Resources { measured_at: 0, ..quick(&config) };
    let told = Arc::new(first.clone());
    let (handle, commands, publish) = Handle::scripted(first);
    let sampler = Sampler {
        config,
        publish,
        told,
        written: None,
        disk: Errand::default(),
        nvml: Errand::default(),
        drm: Errand::default(),
        writing: Errand::default(),
        no_driver: false,
        unwritten: None,
    };
    (handle, tokio::spawn(sampler.run(commands)))
}

struct Sampler {
    config: Config,
    publish: watch::Sender<Arc<Resources>>,
    /// What those who watch were woken for last.
    told: Arc<Resources>,
    /// What `resources.json` holds.
    written: Option<Arc<Resources>>,
    disk: Errand<(Storage, Vec<String>)>,
    nvml: Errand<nvml::Found>,
    drm: Errand<Vec<Gpu>>,
    writing: Errand<Result<(), state::StorageError>>,
    /// That there is no NVIDIA driver was logged.
    no_driver: bool,
    /// Why `resources.json` was not written the last time.
    unwritten: Option<String>,
}

impl Sampler {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        self.measure(false).await;
        let mut next = Instant::now() + PERIOD;
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Measure { keep, reply }) => {
                        let measured = self.measure(keep).await;
                        let _ = reply.send(measured);
                    }
                    None => return,
                },
                () = tokio::time::sleep_until(next) => {
                    self.measure(false).await;
                    next = Instant::now() + PERIOD;
                }
            }
        }
    }

    /// Measures, writes `resources.json` if something moved or `keep`, and publishes.
    async fn measure(&mut self, keep: bool) -> Arc<Resources> {
        let mut now = quick(&self.config);
        self.slow(&mut now).await;
        if keep || self.written.as_ref().is_none_or(|written| !moved(written, &now).is_empty()) {
            self.unwritten = self.write(&now).await.err();
            match &self.unwritten {
                None => self.written = Some(Arc::new(now.clone())),
                Some(problem) => tracing::warn!("{problem}"),
            }
        }
        now.warnings.extend(self.unwritten.clone());
        let now = Arc::new(now);
        // Against what was told, not against the last measurement: many small steps are a large one.
        let tell = !moved(&self.told, &now).is_empty();
        if tell {
            self.told = Arc::clone(&now);
        }
        // Readers that wait are woken only by what matters; readers that look see the newest.
        self.publish.send_if_modified(|known| {
            *known = Arc::clone(&now);
            tell
        });
        now
    }

    /// What may hang, all at the same time: the file system of the models, and the drivers of the GPUs.
    async fn slow(&mut self, now: &mut Resources) {
        let patience = self.config.patience;
        let models = self.config.models_dir.clone();
        let library = self.config.nvml_library.clone();
        let sys_root = self.config.sys_root.clone();
        let (storage, nvidia, others) = tokio::join!(
            self.disk.run(patience, move || {
                let mut warnings = Vec::new();
                let storage = disk::probe(&models, &mut warnings);
                (storage, warnings)
            }),
            self.nvml.run(patience, move || nvml::probe(library.as_deref())),
            self.drm.run(patience, move || drm::probe(&sys_root)),
        );
        match storage {
            Some((storage, warnings)) => {
                now.storage = storage;
                now.warnings.extend(warnings);
            }
            None => now.warnings.push(format!("the file system of {} does not answer", self.config.models_dir.display())),
        }
        match nvidia {
            Some(nvml::Found::Gpus(gpus, warnings)) => {
                now.gpus = gpus;
                now.warnings.extend(warnings);
            }
            Some(nvml::Found::NoDriver) => {
                if !std::mem::replace(&mut self.no_driver, true) {
                    tracing::info!("no NVIDIA driver on this machine");
                }
            }
            None => now.warnings.push("the NVIDIA driver does not answer".to_owned()),
        }
        match others {
            Some(others) => {
                for mut gpu in others {
                    gpu.index = u32::try_from(now.gpus.len()).unwrap_or(u32::MAX);
                    now.gpus.push(gpu);
                }
            }
            None => now.warnings.push("the driver of a graphics card does not answer".to_owned()),
        }
    }

    /// The reason is a sentence for the owner of the machine.
    async fn write(&mut self, resources: &Resources) -> Result<(), String> {
        let mut bytes =
            serde_json::to_vec_pretty(resources).map_err(|error| format!("the measurement cannot be written: {error}"))?;
        bytes.push(b'\n');
        let path = self.config.profile.clone();
        match self.writing.run(self.config.patience, move || state::write_file(&path, &bytes)).await {
            Some(outcome) => outcome.map_err(|error| format!("the measurement is not kept: {error}")),
            None => {
                Err(format!("the measurement is not kept: the file system of {} does not answer", self.config.profile.display()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_measurement_is_kept_in_the_file_and_models_that_are_not_there_take_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let profile = directory.path().join("resources.json");
        let (handle, _running) = spawn(Config::of_machine(directory.path().join("none/models"), profile.clone()));
        let measured = handle.fresh().await;
        assert!(measured.storage.available.is_some_and(|free| free > 0));
        assert_eq!((measured.storage.path.as_path(), measured.storage.models), (directory.path(), Some(0)));
        let kept: Resources = serde_json::from_slice(&std::fs::read(&profile).unwrap()).unwrap();
        assert_eq!(kept.cpu.logical, measured.cpu.logical);
    }
}
