//! ggml's kernels. For the processor there is one library per generation, chosen at the start by what this one can; a library
//! for GPUs is used where somebody put one beside them.

use std::path::{Path, PathBuf};

use llama_cpp_2::llama_backend::load_backends_from_path;
use llama_cpp_2::{LlamaBackendDevice, LlamaBackendDeviceType, list_llama_ggml_backend_devices};

use crate::sandbox::Driver;

/// What ggml calls its kernels for NVIDIA's GPUs.
const CUDA: &str = "CUDA";
/// Libraries for GPUs, between "libggml-" and ".so".
const FOR_GPUS: &[&str] = &["cuda", "hip", "vulkan"];

/// What computes.
#[derive(Debug, Clone)]
pub struct Kernels {
    /// Such as "CPU haswell".
    pub cpu: String,
    /// Such as "Vulkan0 NVIDIA …", the first of them.
    pub gpu: Option<String>,
    /// Whose code came into the process with them.
    pub driver: Driver,
}

/// Loads the best kernels of the first folder that has any.
///
/// # Errors
/// A sentence that says where they were looked for.
pub fn load() -> Result<Kernels, String> {
    let program = std::env::current_exe().map_err(|error| format!("cannot find its own program: {error}"))?;
    let folders = folders(&program);
    let Some(folder) = folders.iter().find(|folder| has_kernels(folder)) else {
        let looked = folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(" and ");
        return Err(format!("no CPU kernels (libggml-cpu-*.so) in {looked}; install the package again"));
    };
    load_backends_from_path(folder);
    let devices = list_llama_ggml_backend_devices();
    if !devices.iter().any(|device| device.device_type == LlamaBackendDeviceType::Cpu) {
        return Err(format!("none of the CPU kernels in {} fits this processor", folder.display()));
    }
    let is_gpu = |kind| matches!(kind, LlamaBackendDeviceType::Gpu | LlamaBackendDeviceType::IntegratedGpu);
    let gpus: Vec<_> = devices.iter().filter(|device| is_gpu(device.device_type)).collect();
    if gpus.is_empty()
        && let Some(file) = for_gpus(folder)
    {
        // ggml is silent where a library cannot be loaded.
        let file = file.display();
        eprintln!("opengateway-engine: {file} finds no GPU: the driver, or a library that it needs (ldd {file}), is not there");
    }
    Ok(Kernels {
        cpu: format!("CPU {}", chosen().unwrap_or_else(|| "unknown".to_owned())),
        gpu: gpus.first().map(|device| format!("{} {}", device.name, device.description)),
        driver: driver(&gpus),
    })
}

fn driver(gpus: &[&LlamaBackendDevice]) -> Driver {
    if gpus.is_empty() {
        Driver::None
    } else if gpus.iter().all(|device| device.backend == CUDA) {
        Driver::Cuda
    } else {
        Driver::Other
    }
}

/// A library for GPUs in this folder.
fn for_gpus(folder: &Path) -> Option<PathBuf> {
    FOR_GPUS.iter().map(|name| folder.join(format!("libggml-{name}.so"))).find(|file| file.exists())
}

/// Installed, then the build tree.
fn folders(program: &Path) -> Vec<PathBuf> {
    let here = program.parent().unwrap_or(Path::new("/"));
    let mut folders = vec![here.join("ggml")];
    if let Some(prefix) = here.parent() {
        folders.insert(0, prefix.join("lib/opengateway"));
    }
    folders
}

fn has_kernels(folder: &Path) -> bool {
    std::fs::read_dir(folder)
        .is_ok_and(|entries| entries.flatten().any(|entry| kernel(&entry.file_name().to_string_lossy()).is_some()))
}

/// "haswell" of "libggml-cpu-haswell.so".
fn kernel(file: &str) -> Option<&str> {
    file.strip_prefix("libggml-cpu-")?.strip_suffix(".so")
}

/// ggml does not tell which library it kept; the kernel knows what is mapped.
fn chosen() -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().filter_map(|line| line.rsplit('/').next()).find_map(kernel).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_known_by_name_and_looked_for_beside_the_program() {
        assert_eq!(kernel("libggml-cpu-haswell.so"), Some("haswell"));
        assert_eq!(kernel("libggml-base.so.0"), None);
        assert_eq!(
            folders(Path::new("/usr/libexec/opengateway-engine")),
            [Path::new("/usr/lib/opengateway"), Path::new("/usr/libexec/ggml")]
        );
    }

    #[test]
    fn the_sandbox_follows_whose_gpus_there_are() {
        let gpu = |backend: &str| LlamaBackendDevice {
            index: 0,
            name: format!("{backend}0"),
            description: "a GPU".to_owned(),
            backend: backend.to_owned(),
            memory_total: 0,
            memory_free: 0,
            device_type: LlamaBackendDeviceType::Gpu,
        };
        let (cuda, vulkan) = (gpu("CUDA"), gpu("Vulkan"));
        assert_eq!(driver(&[]), Driver::None);
        assert_eq!(driver(&[&cuda, &cuda]), Driver::Cuda);
        assert_eq!(driver(&[&cuda, &vulkan]), Driver::Other);
    }

    #[test]
    fn a_library_for_gpus_is_known_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("libggml-cpu-x64.so"), "").unwrap();
        assert_eq!(for_gpus(folder.path()), None);
        let library = folder.path().join("libggml-cuda.so");
        std::fs::write(&library, "").unwrap();
        assert_eq!(for_gpus(folder.path()), Some(library));
    }
}
