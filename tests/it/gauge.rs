//! The gauge against recorded machines, against a fake NVIDIA library that is built here, and against this machine.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use opengateway::domain::resources::{Gpu, Resources};
use opengateway::domain::tier::{self, Need};
use opengateway::gauge::{Config, Handle, spawn};
use tempfile::TempDir;
use tokio::time::timeout;

/// No test waits longer for anything.
const DEADLINE: Duration = Duration::from_secs(60);
/// For tests in which something hangs; what does not is there long before.
const SHORT: Duration = Duration::from_secs(1);
const GB: u64 = 1_000_000_000;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn recorded(machine: &str) -> PathBuf {
    let root = fixtures().join("machines").join(machine);
    assert!(root.is_dir(), "there is no recorded machine {machine}");
    root
}

/// A test that cannot run here says why, and fails where everything that tests need was promised.
fn skip(reason: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "cannot run here: {reason}");
    eprintln!("SKIPPED: {reason}");
}

/// Of the machine recorded at `root`; it has no NVIDIA library. `scratch` takes models and profile.
fn config(root: &Path, scratch: &Path) -> Config {
    Config {
        proc_root: root.join("proc"),
        sys_root: root.join("sys"),
        cgroup_root: root.join("sys/fs/cgroup"),
        models_dir: scratch.to_owned(),
        profile: scratch.join("resources.json"),
        nvml_library: Some(scratch.join("no-such-library.so")),
        patience: DEADLINE,
    }
}

async fn fresh(handle: &Handle) -> Resources {
    let measured = timeout(DEADLINE, handle.fresh()).await.expect("the gauge answers");
    (*measured).clone()
}

async fn measure(root: &Path) -> Resources {
    let scratch = tempfile::tempdir().unwrap();
    fresh(&spawn(config(root, scratch.path())).0).await
}

// -- recorded machines --------------------------------------------------------------------------------------------------

struct Row {
    machine: &'static str,
    logical: u32,
    usable: f64,
    model: Option<&'static str>,
    load1: Option<f64>,
    /// Total, available, limit.
    memory: [Option<u64>; 3],
    /// Vendor, total and free.
    gpus: &'static [(&'static str, Option<u64>, Option<u64>)],
    /// How many sentences say what could not be read.
    warnings: usize,
    /// Given this much storage, the tiers that it qualifies for, by their place in the table.
    tiers: (u64, &'static [usize]),
}

const fn kb(number: u64) -> Option<u64> {
    Some(number * 1024)
}

const GIB: u64 = 1 << 30;

/// Tiers: 0 SmolLM-360M, 1 Qwen2-0.5B, 2 SmolLM-1.7B, 3 TinyLlama-1.1B, 4 Phi-2-2.7B, 5 Llama-3.2-1.5B, 6 Llama-3.2-3B,
/// 7 Llama-3.1-8B, 8 Llama-3.1-70B, 9 Llama-3.1-405B.
const MACHINES: [Row; 14] = [
    Row {
        machine: "laptop",
        logical: 8,
        usable: 8.0,
        model: Some("11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz"),
        load1: Some(0.42),
        memory: [kb(16_077_892), kb(9_421_040), None],
        gpus: &[("intel", None, None)],
        warnings: 0,
        tiers: (200, &[0, 1, 2, 3, 4, 5, 6]),
    },
    Row {
        machine: "eight-gib",
        logical: 12,
        usable: 12.0,
        model: Some("Intel(R) Core(TM) i5-10400 CPU @ 2.90GHz"),
        load1: Some(1.1),
        memory: [kb(7_912_148), kb(5_210_440), None],
        gpus: &[],
        warnings: 0,
        tiers: (20, &[0, 1, 2, 3, 4, 5, 6]),
    },
    Row {
        machine: "amd-desktop",
        logical: 16,
        usable: 16.0,
        model: Some("AMD Ryzen 7 7700X 8-Core Processor"),
        load1: Some(0.05),
        memory: [kb(65_739_496), kb(58_112_336), None],
        gpus: &[("amd", Some(GIB / 2), Some(GIB / 8)), ("amd", Some(25_753_026_560), Some(24_679_284_736))],
        warnings: 0,
        tiers: (400, &[0, 1, 2, 3, 4, 5, 6, 7, 8]),
    },
    Row {
        machine: "container",
        logical: 32,
        usable: 1.5,
        model: Some("AMD EPYC 7543 32-Core Processor"),
        load1: Some(7.8),
        memory: [Some(2 * GIB), Some(2 * GIB - GIB / 2), Some(2 * GIB)],
        gpus: &[],
        warnings: 0,
        tiers: (1000, &[0, 1]),
    },
    Row {
        machine: "container-host-path",
        logical: 32,
        usable: 4.0,
        model: Some("AMD EPYC 7543 32-Core Processor"),
        load1: Some(7.8),
        memory: [Some(3 * GIB), Some(0), Some(3 * GIB)],
        gpus: &[],
        warnings: 0,
        tiers: (4, &[0, 1, 3, 4]),
    },
    Row {
        machine: "limited-slice",
        logical: 16,
        usable: 4.0,
        model: Some("Intel(R) Xeon(R) E-2288G CPU @ 3.70GHz"),
        load1: Some(2.2),
        memory: [Some(6 * GIB), Some(GIB), Some(6 * GIB)],
        gpus: &[],
        warnings: 0,
        tiers: (100, &[0, 1, 2, 3, 4, 5]),
    },
    Row {
        machine: "cgroup1",
        logical: 28,
        usable: 2.5,
        model: Some("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz"),
        load1: Some(3.2),
        memory: [Some(4 * GIB), Some(3 * GIB), Some(4 * GIB)],
        gpus: &[],
        warnings: 0,
        tiers: (100, &[0, 1, 2, 3, 4, 5]),
    },
    Row {
        machine: "cgroup-mixed",
        logical: 8,
        usable: 3.0,
        model: Some("Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz"),
        load1: Some(0.8),
        memory: [Some(12 * GIB), Some(10 * GIB), Some(12 * GIB)],
        gpus: &[],
        warnings: 0,
        tiers: (100, &[0, 1, 2, 3, 4, 5]),
    },
    Row {
        machine: "server",
        logical: 64,
        usable: 64.0,
        model: Some("AMD EPYC 9334 32-Core Processor"),
        load1: Some(12.5),
        memory: [kb(263_838_932), kb(250_112_336), None],
        gpus: &[],
        warnings: 0,
        tiers: (2000, &[0, 1, 2, 3, 4, 5, 6]),
    },
    Row {
        machine: "arm-board",
        logical: 4,
        usable: 3.0,
        model: Some("Raspberry Pi 4 Model B Rev 1.5"),
        load1: Some(0.0),
        memory: [kb(3_884_116), kb(3_101_336), None],
        gpus: &[],
        warnings: 0,
        tiers: (2, &[0, 3]),
    },
    Row {
        machine: "trimmed",
        logical: 2,
        usable: 2.0,
        model: None,
        load1: None,
        memory: [kb(2_048_000), kb(1_024_000), None],
        gpus: &[],
        warnings: 0,
        tiers: (100, &[0, 1, 3, 4]),
    },
    Row {
        machine: "empty",
        logical: 1,
        usable: 1.0,
        model: None,
        load1: None,
        memory: [None, None, None],
        gpus: &[],
        warnings: 2,
        tiers: (1000, &[]),
    },
    Row {
        machine: "garbage",
        logical: 1,
        usable: 1.0,
        model: None,
        load1: None,
        memory: [None, None, None],
        gpus: &[("amd", None, None)],
        warnings: 2,
        tiers: (1000, &[]),
    },
    Row {
        machine: "odd-cards",
        logical: 4,
        usable: 4.0,
        model: None,
        load1: None,
        memory: [kb(16_384_000), kb(8_192_000), None],
        gpus: &[("amd", None, None), ("amd", Some(8_573_157_376), None), ("amd", Some(4 * GIB), Some(0)), ("amd", None, None)],
        warnings: 0,
        tiers: (30, &[0, 1, 2, 3, 4, 5, 6, 7]),
    },
];

#[test]
fn every_recorded_machine_is_in_the_table() {
    let known: BTreeSet<String> = MACHINES.iter().map(|row| row.machine.to_owned()).collect();
    let entries = fs::read_dir(fixtures().join("machines")).unwrap().flatten();
    let there = entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name().into_string().unwrap()).collect();
    assert_eq!(known, there);
}

#[tokio::test]
async fn recorded_machines_are_measured_as_they_are() {
    for row in MACHINES {
        let found = measure(&recorded(row.machine)).await;
        let name = row.machine;
        assert_eq!((found.cpu.logical, found.cpu.usable), (row.logical, row.usable), "{name}: processors");
        assert_eq!((found.cpu.model.as_deref(), found.cpu.load1), (row.model, row.load1), "{name}: model and load");
        let memory = [found.memory.total, found.memory.available, found.memory.limit];
        assert_eq!(memory, row.memory, "{name}: memory");
        let gpus: Vec<_> = found.gpus.iter().map(|gpu| (gpu.vendor.as_str(), gpu.vram_total, gpu.vram_free)).collect();
        assert_eq!(gpus, row.gpus, "{name}: GPUs");
        let indexes: Vec<u32> = found.gpus.iter().map(|gpu| gpu.index).collect();
        assert_eq!(indexes, (0..u32::try_from(gpus.len()).unwrap()).collect::<Vec<_>>(), "{name}");
        assert_eq!(found.warnings.len(), row.warnings, "{name}: {:?}", found.warnings);
    }
}

#[tokio::test]
async fn recorded_machines_qualify_for_the_tiers_of_the_table() {
    for row in MACHINES {
        let mut found = measure(&recorded(row.machine)).await;
        found.storage.available = Some(row.tiers.0 * GB);
        found.storage.models = Some(0);
        let expected: Vec<&str> = row.tiers.1.iter().map(|&at| tier::TIERS[at].name).collect();
        assert_eq!(tier::qualified(&found), expected, "{}", row.machine);
    }
}

#[tokio::test]
async fn what_limits_a_recorded_machine_is_named_with_what_is_missing() {
    let short = |found: &Resources, name: &str| {
        let unmet = tier::assess(tier::find(name).unwrap(), found).unmet;
        unmet.iter().map(|unmet| (unmet.need, unmet.missing)).collect::<Vec<_>>()
    };
    let mut container = measure(&recorded("container")).await;
    container.storage.available = Some(4 * GB);
    container.storage.models = None;
    let missing_memory = (4 * GB - 2 * GIB) as f64;
    assert_eq!(
        short(&container, "Llama-3.2-1.5B"),
        [(Need::Cores, 0.5), (Need::Memory, missing_memory), (Need::Storage, GB as f64)]
    );
    let mut laptop = measure(&recorded("laptop")).await;
    laptop.storage.available = None;
    assert_eq!(short(&laptop, "SmolLM-360M"), [(Need::Storage, 2.0 * GB as f64)], "what is unknown is missing in whole");
    laptop.storage.available = Some(1000 * GB);
    let verdict = tier::assess(tier::find("Llama-3.1-8B").unwrap(), &laptop);
    assert_eq!(short(&laptop, "Llama-3.1-8B"), [(Need::Vram, 8.0 * GB as f64)]);
    assert!(verdict.unmet[0].sentence.contains("unknown"), "an Intel GPU has memory, only not told: {verdict:?}");
    let mut eight = measure(&recorded("eight-gib")).await;
    eight.storage.available = Some(1000 * GB);
    let total = eight.memory.total.unwrap();
    assert!(total < 8 * GIB && total > 8 * GB);
    assert_eq!(short(&eight, "Llama-3.2-3B"), []);
    let verdict = tier::assess(tier::find("Llama-3.1-8B").unwrap(), &eight);
    assert_eq!(short(&eight, "Llama-3.1-8B"), [(Need::Memory, (12 * GB - total) as f64), (Need::Vram, 8.0 * GB as f64)]);
    assert!(verdict.unmet[1].sentence.contains("has none"), "no GPU at all is known: {verdict:?}");
}

#[tokio::test]
async fn an_amd_gpu_is_named_with_driver_and_address() {
    let found = measure(&recorded("amd-desktop")).await;
    let expected = Gpu {
        index: 1,
        vendor: "amd".to_owned(),
        name: Some("Radeon RX 7900 XTX".to_owned()),
        uuid: Some("6f1a0c2b9e4d7788".to_owned()),
        vram_total: Some(25_753_026_560),
        vram_free: Some(24_679_284_736),
        driver: Some("amdgpu".to_owned()),
        pci_address: Some("0000:03:00.0".to_owned()),
    };
    assert_eq!(found.gpus[1], expected);
    assert_eq!((found.gpus[0].name.as_deref(), found.gpus[0].uuid.as_deref()), (None, None));
}

// -- a recorded machine that changes ------------------------------------------------------------------------------------

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let (kind, target) = (entry.file_type().unwrap(), to.join(entry.file_name()));
        if kind.is_dir() {
            copy(&entry.path(), &target);
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path()).unwrap(), target).unwrap();
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A copy of a recorded machine that the test changes, and a place for its models and profile.
fn changing(machine: &str) -> (TempDir, TempDir) {
    let root = tempfile::tempdir().unwrap();
    copy(&recorded(machine), root.path());
    (root, tempfile::tempdir().unwrap())
}

#[tokio::test]
async fn a_card_that_vanishes_is_gone_and_one_that_loses_a_file_keeps_the_rest() {
    let (root, scratch) = changing("amd-desktop");
    let (handle, _) = spawn(config(root.path(), scratch.path()));
    assert_eq!(fresh(&handle).await.gpus.len(), 2);
    fs::remove_file(root.path().join("sys/class/drm/card10/device/mem_info_vram_used")).unwrap();
    let found = fresh(&handle).await;
    assert_eq!((found.gpus[1].vram_total, found.gpus[1].vram_free), (Some(25_753_026_560), None));
    fs::remove_dir_all(root.path().join("sys/class/drm/card10")).unwrap();
    assert_eq!(fresh(&handle).await.gpus.len(), 1);
    fs::remove_dir_all(root.path().join("sys/class/drm")).unwrap();
    let found = fresh(&handle).await;
    assert!(found.gpus.is_empty() && found.warnings.is_empty(), "{found:?}");
}

#[tokio::test]
async fn a_card_whose_driver_hangs_holds_up_nothing_else() {
    let (root, scratch) = changing("amd-desktop");
    // A reader of a pipe that nobody writes to waits for ever.
    let pipe = root.path().join("sys/class/drm/card2/device/mem_info_vram_used");
    fs::remove_file(&pipe).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let (handle, _) = spawn(Config { patience: SHORT, ..config(root.path(), scratch.path()) });
    for _ in 0..3 {
        let found = fresh(&handle).await;
        assert_eq!((found.cpu.logical, found.memory.total), (16, kb(65_739_496)));
        assert!(found.gpus.is_empty());
        assert!(found.warnings.iter().any(|warning| warning.contains("graphics card does not answer")), "{:?}", found.warnings);
    }
}

#[tokio::test]
async fn small_steps_are_told_once_they_add_up() {
    let (root, scratch) = changing("trimmed");
    let set = |available: u64| {
        fs::write(root.path().join("proc/meminfo"), format!("MemTotal: 2048000 kB\nMemAvailable: {available} kB\n")).unwrap();
    };
    let (handle, _) = spawn(config(root.path(), scratch.path()));
    fresh(&handle).await;
    let mut watch = handle.watch();
    watch.borrow_and_update();
    for (available, told) in [(1_000_000, false), (980_000, false), (960_000, true), (950_000, false), (1_024_000, true)] {
        set(available);
        assert_eq!(fresh(&handle).await.memory.available, kb(available), "the newest is always shown");
        assert_eq!(watch.has_changed().unwrap(), told, "{available}");
        watch.borrow_and_update();
    }
}

// -- NVIDIA -------------------------------------------------------------------------------------------------------------

/// Builds the fake library; `None`, said aloud, where there is no compiler.
fn fake_nvml(scratch: &Path, variant: &[&str]) -> Option<PathBuf> {
    let library = scratch.join("libnvidia-ml.so.1");
    let source = fixtures().join("nvml/fakenvml.c");
    match Command::new("cc").args(["-Wall", "-Werror", "-shared", "-fPIC", "-o"]).arg(&library).args(variant).arg(source).output()
    {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(library)
        }
        Err(error) => {
            skip(&format!("no C compiler: {error}"));
            None
        }
    }
}

/// What the gauge finds on the recorded server with this variant of the library.
async fn server_with(variant: &[&str], patience: Duration) -> Option<Resources> {
    let scratch = tempfile::tempdir().unwrap();
    let library = fake_nvml(scratch.path(), variant)?;
    let config = Config { nvml_library: Some(library), patience, ..config(&recorded("server"), scratch.path()) };
    let found = fresh(&spawn(config).0).await;
    assert_eq!((found.cpu.logical, found.memory.total), (64, kb(263_838_932)), "the rest of the gauge answers");
    assert!(found.storage.available.is_some());
    Some(found)
}

#[tokio::test]
async fn two_nvidia_gpus_are_told_apart_and_the_larger_one_counts() {
    let Some(mut found) = server_with(&[], DEADLINE).await else { return };
    let expected = [
        Gpu {
            index: 0,
            vendor: "nvidia".to_owned(),
            name: Some("NVIDIA H100 80GB HBM3".to_owned()),
            uuid: Some("GPU-00000000-1111-2222-3333-444444444444".to_owned()),
            vram_total: Some(80 * GIB),
            vram_free: Some(79 * GIB),
            driver: Some("999.1".to_owned()),
            pci_address: Some("0000:17:00.0".to_owned()),
        },
        Gpu {
            index: 1,
            vendor: "nvidia".to_owned(),
            name: Some("NVIDIA RTX A4000".to_owned()),
            uuid: Some("GPU-55555555-6666-7777-8888-999999999999".to_owned()),
            vram_total: Some(16 * GIB),
            vram_free: Some(3 * GIB),
            driver: Some("999.1".to_owned()),
            pci_address: Some("0000:ca:00.0".to_owned()),
        },
    ];
    assert_eq!(found.gpus, expected);
    assert!(found.warnings.is_empty(), "{:?}", found.warnings);
    found.storage.available = Some(500 * GB);
    found.storage.models = Some(0);
    assert_eq!(tier::qualified(&found).len(), tier::TIERS.len());
    found.storage.available = Some(500 * GB - 1);
    assert_eq!(tier::qualified(&found).len(), tier::TIERS.len() - 1);
}

#[tokio::test]
async fn an_nvidia_gpu_whose_memory_is_not_told_is_shown_without_it() {
    for variant in ["-DNO_MEMORY_V2", "-DNO_VRAM", "-DZERO_VRAM"] {
        let Some(mut found) = server_with(&[variant], DEADLINE).await else { return };
        let gpus: Vec<_> = found.gpus.iter().map(|gpu| (gpu.name.is_some(), gpu.vram_total, gpu.vram_free)).collect();
        assert_eq!(gpus, [(true, None, None); 2], "{variant}");
        assert_eq!(found.warnings.len(), 2, "{variant}: one sentence a GPU: {:?}", found.warnings);
        found.storage.available = Some(1000 * GB);
        assert_eq!(tier::qualified(&found).len(), 7, "{variant}: unknown is not enough where it is required, and well where not");
    }
}

#[tokio::test]
async fn a_lost_gpu_does_not_hide_the_other() {
    let Some(found) = server_with(&["-DLOST_GPU=0"], DEADLINE).await else { return };
    assert_eq!(found.gpus.iter().map(|gpu| gpu.index).collect::<Vec<_>>(), [1]);
    assert!(found.warnings[0].contains("GPU 0"), "{:?}", found.warnings);
}

/// The real one (driver 580) leaves a descriptor behind each time that it is unloaded: the daemon had one more every minute.
#[tokio::test]
async fn the_nvidia_library_is_loaded_once() {
    let variants: [&[&str]; 2] = [&[], &["-DINIT_ERROR=9"]];
    for variant in variants {
        let scratch = tempfile::tempdir().unwrap();
        let loads = scratch.path().join("loads");
        let tell = format!("-DLOADS=\"{}\"", loads.display());
        let Some(library) = fake_nvml(scratch.path(), &[variant, &[tell.as_str()][..]].concat()) else { return };
        let handle = spawn(Config { nvml_library: Some(library), ..config(&recorded("server"), scratch.path()) }).0;
        for _ in 0..3 {
            fresh(&handle).await;
        }
        assert_eq!(fs::read_to_string(&loads).unwrap(), "loaded\n", "{variant:?}");
    }
}

#[tokio::test]
async fn a_library_without_a_driver_is_an_ordinary_machine() {
    let Some(found) = server_with(&["-DINIT_ERROR=9"], DEADLINE).await else { return };
    assert!(found.gpus.is_empty() && found.warnings.is_empty(), "{:?}", found.warnings);
}

#[tokio::test]
async fn a_driver_that_fails_is_no_gpu_and_one_sentence() {
    for variant in ["-DINIT_ERROR=999", "-DNO_INIT"] {
        let Some(found) = server_with(&[variant], DEADLINE).await else { return };
        assert!(found.gpus.is_empty());
        assert_eq!(found.warnings.len(), 1, "{variant}: {:?}", found.warnings);
        assert!(found.warnings[0].contains("NVIDIA"), "{variant}: {:?}", found.warnings);
    }
}

#[tokio::test]
async fn a_file_that_is_no_library_is_no_gpu() {
    let scratch = tempfile::tempdir().unwrap();
    let library = scratch.path().join("libnvidia-ml.so.1");
    fs::write(&library, "not an ELF file").unwrap();
    let config = Config { nvml_library: Some(library), ..config(&recorded("laptop"), scratch.path()) };
    let found = fresh(&spawn(config).0).await;
    assert_eq!(found.gpus.iter().map(|gpu| gpu.vendor.as_str()).collect::<Vec<_>>(), ["intel"]);
}

#[test]
fn a_driver_that_hangs_is_given_up_and_does_not_hold_up_the_end() {
    for variant in ["-DHANG_INIT", "-DHANG_MEMORY"] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let Some(found) = runtime.block_on(server_with(&[variant], SHORT)) else { return };
        assert!(found.gpus.is_empty());
        assert_eq!(found.warnings, ["the NVIDIA driver does not answer"], "{variant}");
        // The end of the runtime waits for its blocking work. That call never ends, so it must be none.
        let began = Instant::now();
        drop(runtime);
        assert!(began.elapsed() < DEADLINE, "{variant}");
    }
}

// -- storage ------------------------------------------------------------------------------------------------------------

/// Whatever the disk of this machine takes meanwhile.
fn near(a: Option<u64>, b: u64) -> bool {
    a.is_some_and(|a| a.abs_diff(b) <= 2 * GB)
}

#[tokio::test]
async fn storage_is_that_of_the_file_system_and_what_models_take_there() {
    let scratch = tempfile::tempdir().unwrap();
    let models = scratch.path().join("models");
    fs::create_dir_all(models.join("below")).unwrap();
    fs::write(models.join("a.gguf"), vec![1; 1000]).unwrap();
    fs::write(models.join("below/b.gguf"), vec![1; 234]).unwrap();
    std::os::unix::fs::symlink("a.gguf", models.join("linked.gguf")).unwrap();
    let config = Config { models_dir: models.clone(), ..config(&recorded("laptop"), scratch.path()) };
    let found = fresh(&spawn(config).0).await.storage;
    let there = rustix::fs::statvfs(&models).unwrap();
    assert_eq!((found.path.as_path(), found.models), (models.as_path(), Some(1234)), "a link takes nothing");
    assert_eq!(found.total, Some(there.f_blocks * there.f_frsize));
    assert!(near(found.available, there.f_bavail * there.f_frsize), "{found:?}");
    assert!(found.available <= found.total);
}

#[tokio::test]
async fn a_models_directory_that_is_not_there_is_measured_where_it_would_be() {
    let scratch = tempfile::tempdir().unwrap();
    let config = Config { models_dir: scratch.path().join("not/yet/there"), ..config(&recorded("laptop"), scratch.path()) };
    let found = fresh(&spawn(config).0).await.storage;
    assert_eq!((found.path.as_path(), found.models), (scratch.path(), Some(0)));
    assert!(found.total.is_some_and(|total| total > 0));
}

#[tokio::test]
async fn what_storage_does_not_tell_stays_unknown() {
    let scratch = tempfile::tempdir().unwrap();
    // A path that leads in a circle: models may be there, and cannot be looked at.
    let circle = scratch.path().join("circle");
    std::os::unix::fs::symlink(&circle, &circle).unwrap();
    let found = fresh(&spawn(Config { models_dir: circle, ..config(&recorded("laptop"), scratch.path()) }).0).await.storage;
    assert_eq!(found.models, None);
    assert!(found.total.is_some());
    // A file system that counts no blocks.
    let config = Config { models_dir: "/proc/self/attr".into(), ..config(&recorded("laptop"), scratch.path()) };
    let found = fresh(&spawn(config).0).await.storage;
    assert_eq!((found.total, found.available), (None, None));
}

// -- resources.json -----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn resources_json_holds_the_documented_fields() {
    let scratch = tempfile::tempdir().unwrap();
    let config = config(&recorded("amd-desktop"), scratch.path());
    let found = fresh(&spawn(config).0).await;
    let text = fs::read_to_string(scratch.path().join("resources.json")).unwrap();
    assert!(text.ends_with("}\n"));
    assert_eq!(serde_json::from_str::<Resources>(&text).unwrap(), found);
    let written: serde_json::Value = serde_json::from_str(&text).unwrap();
    let expected = serde_json::json!({
        "schema": 1,
        "measured_at": found.measured_at,
        "cpu": {
            "logical": 16,
            "usable": 16.0,
            "model": "AMD Ryzen 7 7700X 8-Core Processor",
            "arch": std::env::consts::ARCH,
            "load1": 0.05,
        },
        "memory": { "total": 67_317_243_904_u64, "available": 59_507_032_064_u64, "limit": null },
        "storage": {
            "path": scratch.path(),
            "total": found.storage.total,
            "available": found.storage.available,
            "models": found.storage.models,
        },
        "gpus": [
            {
                "index": 0, "vendor": "amd", "name": null, "uuid": null, "vram_total": 536_870_912, "vram_free": 134_217_728,
                "driver": "amdgpu", "pci_address": "0000:0f:00.0",
            },
            {
                "index": 1, "vendor": "amd", "name": "Radeon RX 7900 XTX", "uuid": "6f1a0c2b9e4d7788",
                "vram_total": 25_753_026_560_u64, "vram_free": 24_679_284_736_u64, "driver": "amdgpu", "pci_address": "0000:03:00.0",
            },
        ],
        "warnings": [],
    });
    assert_eq!(written, expected);
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!(Duration::from_micros(found.measured_at).abs_diff(since_epoch) < DEADLINE, "microseconds");
}

#[tokio::test]
async fn resources_json_is_replaced_whole_and_on_request_also_when_nothing_moved() {
    use std::os::unix::fs::MetadataExt as _;
    let scratch = tempfile::tempdir().unwrap();
    let profile = scratch.path().join("profile/resources.json");
    fs::create_dir(profile.parent().unwrap()).unwrap();
    let (handle, _) = spawn(Config { profile: profile.clone(), ..config(&recorded("laptop"), scratch.path()) });
    let first = fresh(&handle).await;
    // Whoever has the old file open reads all of it for ever.
    let held = fs::File::open(&profile).unwrap();
    let second = fresh(&handle).await;
    assert!(second.measured_at > first.measured_at);
    assert_eq!(serde_json::from_reader::<_, Resources>(&held).unwrap().measured_at, first.measured_at);
    assert_eq!(serde_json::from_slice::<Resources>(&fs::read(&profile).unwrap()).unwrap().measured_at, second.measured_at);
    assert_ne!(held.metadata().unwrap().ino(), fs::metadata(&profile).unwrap().ino());
    assert_eq!(fs::metadata(&profile).unwrap().mode() & 0o777, 0o600);
    let names: Vec<_> = fs::read_dir(profile.parent().unwrap()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["resources.json"], "nothing else is left");
}

#[tokio::test]
async fn a_profile_that_cannot_be_written_is_a_problem_and_not_the_end() {
    let scratch = tempfile::tempdir().unwrap();
    let blocked = scratch.path().join("profile");
    fs::write(&blocked, "a file where a directory should be").unwrap();
    // Nobody creates files in /sys, root neither.
    for profile in [PathBuf::from("/sys/resources.json"), blocked.join("resources.json")] {
        let (handle, running) = spawn(Config { profile: profile.clone(), ..config(&recorded("laptop"), scratch.path()) });
        for _ in 0..2 {
            let found = fresh(&handle).await;
            assert_eq!(found.cpu.logical, 8, "the gauge answers");
            assert_eq!(found.warnings.len(), 1, "{:?}", found.warnings);
            assert!(found.warnings[0].contains(profile.to_str().unwrap()), "{:?}", found.warnings);
        }
        assert!(!running.is_finished());
    }
    // The problem ends with its cause.
    let (handle, _) = spawn(Config { profile: blocked.join("resources.json"), ..config(&recorded("laptop"), scratch.path()) });
    assert_eq!(fresh(&handle).await.warnings.len(), 1);
    fs::remove_file(&blocked).unwrap();
    fs::create_dir(&blocked).unwrap();
    assert!(fresh(&handle).await.warnings.is_empty());
    assert!(blocked.join("resources.json").exists());
}

#[tokio::test]
async fn the_first_look_is_not_taken_for_a_measurement() {
    let scratch = tempfile::tempdir().unwrap();
    let (handle, _) = spawn(config(&recorded("amd-desktop"), scratch.path()));
    let first = handle.latest();
    assert!(first.measured_at == 0 && first.gpus.is_empty() && first.cpu.logical == 16);
    let recent = timeout(DEADLINE, handle.recent()).await.unwrap();
    assert!(recent.storage.available.is_some() && recent.gpus.len() == 2, "asked at once, and still whole: {recent:?}");
    assert_eq!(timeout(DEADLINE, handle.recent()).await.unwrap().measured_at, recent.measured_at, "a recent one is not repeated");
}

// -- this machine -------------------------------------------------------------------------------------------------------

fn of_this_machine(scratch: &Path) -> Config {
    Config { patience: DEADLINE, ..Config::of_machine(scratch.to_owned(), scratch.join("resources.json")) }
}

fn meminfo(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn this_machine_is_measured_as_its_kernel_says() {
    let scratch = tempfile::tempdir().unwrap();
    let found = fresh(&spawn(of_this_machine(scratch.path())).0).await;
    let allowed = rustix::thread::sched_getaffinity(None).unwrap().count();
    assert!(found.cpu.logical >= allowed);
    assert!(found.cpu.usable > 0.0 && found.cpu.usable <= f64::from(allowed), "{:?}", found.cpu);
    let total = meminfo("MemTotal");
    assert_eq!(found.memory.total, Some(found.memory.limit.unwrap_or(total)));
    assert!(found.memory.total <= Some(total));
    assert!(found.memory.available.is_some_and(|available| available <= total), "{:?}", found.memory);
    let now = meminfo("MemAvailable");
    assert!(found.memory.limit.is_some() || near(found.memory.available, now), "{:?}, now {now}", found.memory);
}

/// Run as a child with fewer processors; on its own it tells its number to nobody.
#[tokio::test]
async fn tells_its_processors() {
    let scratch = tempfile::tempdir().unwrap();
    // Without the quota of a control group, so that the mask alone decides.
    let config = Config { cgroup_root: scratch.path().join("none"), ..of_this_machine(scratch.path()) };
    let found = fresh(&spawn(config).0).await;
    if let Some(file) = std::env::var_os("OPENGATEWAY_TEST_TELL") {
        fs::write(file, format!("{} {}", found.cpu.usable, found.cpu.logical)).unwrap();
    }
}

#[test]
fn a_process_that_may_use_one_processor_counts_one() {
    let told_by = |command: &mut Command| {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("told");
        let output = command.args(["--exact", "gauge::tells_its_processors"]).env("OPENGATEWAY_TEST_TELL", &file).output()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let told = fs::read_to_string(file)?;
        let (usable, logical) = told.split_once(' ').unwrap();
        Ok::<(f64, u32), std::io::Error>((usable.parse().unwrap(), logical.parse().unwrap()))
    };
    let this = std::env::current_exe().unwrap();
    let mask = rustix::thread::sched_getaffinity(None).unwrap();
    let (usable, logical) = told_by(&mut Command::new(&this)).unwrap();
    assert_eq!(usable, f64::from(mask.count()));
    let one = (0..1024).find(|&at| mask.is_set(at)).unwrap().to_string();
    match told_by(Command::new("taskset").args(["-c", &one]).arg(&this)) {
        Ok(told) => assert_eq!(told, (1.0, logical)),
        Err(error) => skip(&format!("no taskset: {error}")),
    }
}

// -- the daemon ---------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_cluster_named_like_a_tier_is_served_from_the_start() {
    let scratch = tempfile::tempdir().unwrap();
    let here = fresh(&spawn(of_this_machine(scratch.path())).0).await;
    if tier::qualified(&here).is_empty() {
        return skip("this machine qualifies for no tier");
    }
    let name = tier::qualified(&here)[0].clone();
    let Some(node) = crate::common::node::Node::start("served", &["--serve", "--connect", &name]).await else { return };
    let joined = node.until(&["clusters"], |clusters| clusters["clusters"].as_array().is_some_and(|list| !list.is_empty())).await;
    assert_eq!(joined["clusters"][0]["role"], "serve", "{joined}");
}
