//! llama.cpp's log: its errors go to stderr, a bounded number of short lines; of the rest only sizes are read.

use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use llama_cpp_sys_2 as sys;

/// Longest line that is written.
const MAX_LINE: usize = 300;
/// Lines that are written in the life of the process.
const MAX_LINES: u64 = 100;

static LINES: AtomicU64 = AtomicU64::new(0);
static SERVING: AtomicBool = AtomicBool::new(false);
static BUFFERS: AtomicU64 = AtomicU64::new(0);
static LAST_ERROR: Mutex<String> = Mutex::new(String::new());

/// Takes over llama.cpp's log.
#[allow(unsafe_code)]
pub fn install() {
    // SAFETY: the callback is a plain function that lives as long as the program and uses no data pointer.
    unsafe { sys::llama_log_set(Some(on_line), std::ptr::null_mut()) };
}

/// From now on prompts are computed: only the name of the function that complains is written.
pub fn serving() {
    SERVING.store(true, Ordering::Relaxed);
}

/// What the search for GPUs complained about is not why a model cannot be loaded.
pub fn loading() {
    if let Ok(mut last) = LAST_ERROR.lock() {
        last.clear();
    }
}

/// The last error while loading, without the name of the function.
pub fn last_error() -> Option<String> {
    let line = LAST_ERROR.lock().ok()?;
    (!line.is_empty()).then(|| line.clone())
}

/// Bytes of main memory in the buffers that llama.cpp said it allocated for the KV cache and for computing.
pub fn buffers() -> u64 {
    BUFFERS.load(Ordering::Relaxed)
}

#[allow(unsafe_code)]
unsafe extern "C" fn on_line(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() || (level != sys::GGML_LOG_LEVEL_ERROR && SERVING.load(Ordering::Relaxed)) {
        return;
    }
    // SAFETY: llama.cpp passes a string that ends with NUL and lives through the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    if level == sys::GGML_LOG_LEVEL_ERROR {
        on_error(text.trim());
    } else if let Some(bytes) = buffer_size(&text) {
        BUFFERS.fetch_add(bytes, Ordering::Relaxed);
    }
}

fn on_error(line: &str) {
    if crate::requests::should_abort() {
        // That a batch was not finished is what was wanted.
        return;
    }
    if LINES.fetch_add(1, Ordering::Relaxed) >= MAX_LINES {
        return;
    }
    if SERVING.load(Ordering::Relaxed) {
        // What follows the name might have come from a prompt.
        let function = line.split(|sign: char| !sign.is_ascii_alphanumeric() && sign != '_').next().unwrap_or_default();
        eprintln!("llama.cpp: an error in {function}");
        return;
    }
    let line: String = line.chars().filter(|sign| !sign.is_control()).take(MAX_LINE).collect();
    eprintln!("llama.cpp: {line}");
    if let Ok(mut last) = LAST_ERROR.lock() {
        // The first says what is wrong; those after it, what could therefore not be done.
        if last.is_empty() {
            line.split_once(": ").map_or(line.as_str(), |(_, message)| message).clone_into(&mut last);
        }
    }
}

/// "…: CPU KV buffer size = 12.50 MiB", "… compute buffer size = …". The file's own pages ("model buffer") are no allocation, and
/// what is called after a GPU ("CUDA0") lies in the memory of that; "CUDA_Host" is main memory.
fn buffer_size(line: &str) -> Option<u64> {
    let (before, size) = line.split_once("buffer size =")?;
    let place = before.split_once(": ")?.1.split_whitespace().next()?;
    if !place.starts_with("CPU") && !place.ends_with("_Host") {
        return None;
    }
    if before.contains("_Mapped model") || before.contains("CPU model") {
        return None;
    }
    let mebibytes: f64 = size.trim().strip_suffix("MiB")?.trim().parse().ok()?;
    // A size in MiB is far from the bounds of the type.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    (mebibytes.is_finite() && mebibytes > 0.0).then_some((mebibytes * 1_048_576.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_from_the_log() {
        assert_eq!(buffer_size("llama_kv_cache:        CPU KV buffer size =     1.50 MiB\n"), Some(1_572_864));
        assert_eq!(buffer_size("sched_reserve:        CPU compute buffer size =     2.00 MiB\n"), Some(2_097_152));
        assert_eq!(buffer_size("load_tensors:   CPU_Mapped model buffer size =   383.00 MiB\n"), None);
        assert_eq!(buffer_size("load_tensors: offloaded 1 layers\n"), None);
        assert_eq!(buffer_size("load_tensors:        CUDA0 model buffer size =  7605.33 MiB\n"), None);
        assert_eq!(buffer_size("llama_kv_cache:      CUDA0 KV buffer size =   256.00 MiB\n"), None);
        assert_eq!(buffer_size("sched_reserve:  CUDA_Host compute buffer size =     2.00 MiB\n"), Some(2_097_152));
    }
}
