//! ggml's CPU kernels: one library per generation of processors, chosen at the start by what this one can.

use std::path::{Path, PathBuf};

use llama_cpp_2::llama_backend::load_backends_from_path;
use llama_cpp_2::{LlamaBackendDeviceType, list_llama_ggml_backend_devices};

/// What computes.
#[derive(Debug, Clone)]
pub struct Kernels {
    /// Such as "CPU haswell".
    pub cpu: String,
    /// Such as "Vulkan0 NVIDIA …", the first of them.
    pub gpu: Option<String>,
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
    let gpu = devices.iter().find(|device| is_gpu(device.device_type));
    Ok(Kernels {
        cpu: format!("CPU {}", chosen().unwrap_or_else(|| "unknown".to_owned())),
        gpu: gpu.map(|device| format!("{} {}", device.name, device.description)),
    })
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
}
