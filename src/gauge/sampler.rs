//! The task that measures: at the start, when asked, and every minute; writes `resources.json` when something moved.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::cgroup::Groups;
use super::handle::{Command, Handle};
use super::{cpu, disk, drm, memory, nvml};
use crate::domain::resources::{Gpu, Resources, Storage, moved};
use crate::state;

/// Between two measurements that nobody asked for.
const PERIOD: Duration = Duration::from_secs(60);
/// A probe that hangs is given up after this; its value is unknown until it comes back.
const PROBE: Duration = Duration::from_secs(3);

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
        }
    }
}

fn affinity() -> Option<u32> {
    let set = rustix::thread::sched_getaffinity(None).ok()?;
    Some(set.count())
}

/// What files in memory can tell: microseconds, no waiting.
fn quick(config: &Config) -> Resources {
    let mut warnings = Vec::new();
    let groups = Groups::find(&config.proc_root, &config.cgroup_root);
    let cpu = cpu::probe(&config.proc_root, &config.sys_root, &groups, affinity(), &mut warnings);
    let memory = memory::probe(&config.proc_root, &groups, &mut warnings);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX));
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
    let first = quick(&config);
    let (handle, commands, publish) = Handle::scripted(first);
    let sampler = Sampler { config, publish, written: None, disk: None, gpus: None, gpus_known: None };
    (handle, tokio::spawn(sampler.run(commands)))
}

type Probe<T> = JoinHandle<T>;

struct Sampler {
    config: Config,
    publish: watch::Sender<Arc<Resources>>,
    written: Option<Resources>,
    /// Probes that did not come back in time: waited for, not started again.
    disk: Option<Probe<(Storage, Vec<String>)>>,
    gpus: Option<Probe<nvml::Found>>,
    gpus_known: Option<bool>,
}

impl Sampler {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        self.measure().await;
        let mut next = Instant::now() + PERIOD;
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Measure { reply }) => {
                        let measured = self.measure().await;
                        let _ = reply.send(measured);
                    }
                    None => return,
                },
                () = tokio::time::sleep_until(next) => {
                    self.measure().await;
                    next = Instant::now() + PERIOD;
                }
            }
        }
    }

    async fn measure(&mut self) -> Arc<Resources> {
        let mut now = quick(&self.config);
        match self.storage().await {
            Some((storage, warnings)) => {
                now.storage = storage;
                now.warnings.extend(warnings);
            }
            None => now.warnings.push(format!("the file system of {} does not answer", self.config.models_dir.display())),
        }
        let (gpus, warnings) = self.graphics().await;
        now.gpus = gpus;
        now.warnings.extend(warnings);
        let now = Arc::new(now);
        let moved = !moved(&self.publish.borrow(), &now).is_empty();
        // Readers that wait are woken only by what matters; readers that look see the newest.
        self.publish.send_if_modified(|known| {
            *known = Arc::clone(&now);
            moved
        });
        if self.written.as_ref().is_none_or(|written| !self::moved(written, &now).is_empty()) {
            self.write(&now).await;
        }
        now
    }

    async fn storage(&mut self) -> Option<(Storage, Vec<String>)> {
        let models = self.config.models_dir.clone();
        let probe = self.disk.get_or_insert_with(|| {
            tokio::task::spawn_blocking(move || {
                let mut warnings = Vec::new();
                let storage = disk::probe(&models, &mut warnings);
                (storage, warnings)
            })
        });
        let found = timeout(PROBE, probe).await.ok()?;
        self.disk = None;
        found.ok()
    }

    async fn graphics(&mut self) -> (Vec<Gpu>, Vec<String>) {
        let library = self.config.nvml_library.clone();
        let probe = self.gpus.get_or_insert_with(|| tokio::task::spawn_blocking(move || nvml::probe(library.as_deref())));
        let (mut gpus, warnings) = match timeout(PROBE, probe).await {
            Err(_) => (Vec::new(), vec!["the NVIDIA driver does not answer".to_owned()]),
            Ok(found) => {
                self.gpus = None;
                match found {
                    Ok(nvml::Found::Gpus(gpus, warnings)) => (gpus, warnings),
                    Ok(nvml::Found::NoDriver) | Err(_) => {
                        if self.gpus_known.replace(false).is_none() {
                            tracing::info!("no NVIDIA driver on this machine");
                        }
                        (Vec::new(), Vec::new())
                    }
                }
            }
        };
        for mut gpu in drm::probe(&self.config.sys_root) {
            gpu.index = u32::try_from(gpus.len()).unwrap_or(u32::MAX);
            gpus.push(gpu);
        }
        (gpus, warnings)
    }

    async fn write(&mut self, resources: &Resources) {
        let Ok(bytes) = serde_json::to_vec_pretty(resources) else { return };
        let path = self.config.profile.clone();
        let written = tokio::task::spawn_blocking(move || write(&path, &bytes)).await;
        match written {
            Ok(Ok(())) => self.written = Some(resources.clone()),
            Ok(Err(error)) => tracing::warn!(%error, "resources.json is not written"),
            Err(error) => tracing::warn!(%error, "resources.json is not written"),
        }
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), state::StorageError> {
    state::write_file(path, bytes)
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
