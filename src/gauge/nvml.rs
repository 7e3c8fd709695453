//! NVIDIA GPUs by the driver's own library, loaded at run time. No library is an ordinary machine.
//!
//! Every call here may hang with a broken driver: it is an errand, with a deadline.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use crate::domain::resources::Gpu;

/// What was found.
#[derive(Debug)]
pub(super) enum Found {
    /// No driver: nothing to say.
    NoDriver,
    /// These, and what could not be read.
    Gpus(Vec<Gpu>, Vec<String>),
}

/// As sysfs writes it: NVML gives the domain eight digits, sysfs four.
fn pci_address(nvml: &str) -> String {
    nvml.strip_prefix("0000").filter(|rest| rest.find(':') == Some(4)).unwrap_or(nvml).to_ascii_lowercase()
}

/// Has the library stay once it is there. NVIDIA's (driver 580) leaves a descriptor behind each time that it is unloaded: one
/// for each measurement. Between two measurements it is shut down all the same, and holds no GPU.
#[allow(unsafe_code)]
fn keep_loaded(library: &OsStr) {
    let Ok(name) = CString::new(library.as_bytes()) else { return };
    // SAFETY: the name ends with NUL and outlives the call, and the handle is closed once. What the library runs as it is loaded
    // it would run in `init` a moment later.
    unsafe {
        let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NODELETE);
        if !handle.is_null() {
            libc::dlclose(handle);
        }
    }
}

/// Measures. `library` is the file to load instead of the system's `libnvidia-ml.so.1`.
pub(super) fn probe(library: Option<&Path>) -> Found {
    let library = library.map_or_else(|| "libnvidia-ml.so.1".as_ref(), Path::as_os_str);
    keep_loaded(library);
    let nvml = match Nvml::builder().lib_path(library).init() {
        Ok(nvml) => nvml,
        // The library alone, as in an image that also runs where there is no such GPU, is no driver either.
        Err(NvmlError::LibloadingError(_) | NvmlError::DriverNotLoaded) => return Found::NoDriver,
        Err(error) => return Found::Gpus(Vec::new(), vec![format!("the NVIDIA driver is there and does not answer: {error}")]),
    };
    let mut warnings = Vec::new();
    let count = match nvml.device_count() {
        Ok(count) => count,
        Err(error) => return Found::Gpus(Vec::new(), vec![format!("the NVIDIA driver does not count its GPUs: {error}")]),
    };
    let driver = nvml.sys_driver_version().ok();
    let mut gpus = Vec::new();
    for index in 0..count.min(64) {
        let device = match nvml.device_by_index(index) {
            Ok(device) => device,
            Err(error) => {
                warnings.push(format!("GPU {index} cannot be opened: {error}"));
                continue;
            }
        };
        let memory = match device.memory_info() {
            Ok(memory) if memory.total > 0 => Some(memory),
            Ok(_) => {
                warnings.push(format!("the memory of GPU {index} is unknown: the driver says 0 bytes"));
                None
            }
            Err(error) => {
                warnings.push(format!("the memory of GPU {index} is unknown: {error}"));
                None
            }
        };
        gpus.push(Gpu {
            index,
            vendor: "nvidia".to_owned(),
            name: device.name().ok(),
            uuid: device.uuid().ok(),
            vram_total: memory.as_ref().map(|memory| memory.total),
            vram_free: memory.as_ref().map(|memory| memory.free),
            driver: driver.clone(),
            pci_address: device.pci_info().ok().map(|pci| pci_address(&pci.bus_id)),
        });
    }
    Found::Gpus(gpus, warnings)
}
