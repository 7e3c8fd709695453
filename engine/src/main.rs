//! The child of `opengatewayd` that runs one GGUF model with llama.cpp.
//!
//! ```text
//! daemon ⇄ descriptor 3 ─ connection (reader thread) ─ prepare (thread) ─ scheduler (main thread) ─ llama.cpp
//! ```
//!
//! The reader answers pings and ends the process at the end of the stream, whatever the others do. The preparer makes tokens
//! of prompts. The scheduler owns the context and computes all slots in one batch. `requests` is what they share.

mod builtin;
mod connection;
mod cpu;
mod kernels;
mod load;
mod log;
mod prepare;
mod probe;
mod process;
mod requests;
mod sampler;
mod sandbox;
mod scheduler;
mod seccomp;
mod sequence;
mod template;
mod text;
mod vocabulary;

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use opengateway_engine_protocol::{CHILD_FD, Up, VERSION};

use connection::{Input, Output};
use kernels::Kernels;
use load::{Loaded, Plan};
use prepare::Preparer;
use process::{Exit, exit};
use requests::Requests;
use scheduler::Scheduler;

/// Progress is told this often.
const TICK: Duration = Duration::from_millis(250);

fn main() {
    if let Err(error) = process::clean_environment() {
        usage(&format!("cannot start itself with an empty environment: {error}"));
    }
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => serve(),
        ["--version"] => println!("opengateway-engine {}", env!("CARGO_PKG_VERSION")),
        ["--probe-sandbox", model] => probe::run(Path::new(model)),
        _ => usage("it takes no arguments but --version"),
    }
}

fn usage(reason: &str) -> ! {
    eprintln!("opengateway-engine: {reason}; opengatewayd starts it by itself, with a socket as descriptor {CHILD_FD}");
    exit(Exit::Usage)
}

fn serve() -> ! {
    let Some((stream, copy)) = socket() else { usage(&format!("descriptor {CHILD_FD} is no socket")) };
    if let Err(error) = process::harden() {
        usage(&format!("cannot harden itself: {error}"));
    }
    log::install();
    let kernels = kernels::load();
    let output = Arc::new(Output::new(copy));
    output.send(&Up::Hello {
        protocol: VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        build: build(kernels.as_ref().ok()),
    });
    let mut input = Input::new(stream, Arc::clone(&output));
    let load = input.load();
    let plan = kernels.and_then(|kernels| Ok((Plan::new(load)?, kernels)));
    let (plan, kernels) = plan.unwrap_or_else(|reason| output.load_failed(reason));
    match sandbox::enter(plan.path(), kernels.driver) {
        Ok(sandbox::Strength::Full) => {}
        Ok(strength) => eprintln!("opengateway-engine: this kernel guards files less than it should ({})", strength.name()),
        Err(reason) => output.load_failed(reason),
    }
    let requests = Arc::new(Requests::default());
    let (to_preparer, incoming) = mpsc::channel();
    let reader = (Arc::clone(&requests), to_preparer);
    spawn("reader", move || input.serve(&reader.0, &reader.1));
    let loaded = with_progress(&output, |progress| plan.load(&kernels, progress))
        .and_then(|loaded| sandbox::close_files(kernels.driver).map(|()| loaded));
    let Loaded { model, context, template, specials, ready } = loaded.unwrap_or_else(|reason| output.load_failed(reason));
    log::serving();
    let slots = ready.slots;
    let preparer = Preparer::new(model, template, specials, ready.context);
    let shared = (Arc::clone(&requests), Arc::clone(&output));
    spawn("preparer", move || preparer.serve(&incoming, &shared.0, &shared.1));
    requests.open(slots as usize);
    output.send(&Up::Ready(ready));
    Scheduler::new(model, context, slots, requests, output).run()
}

/// Descriptor 3, for reading and for writing.
#[allow(unsafe_code)]
fn socket() -> Option<(File, File)> {
    // SAFETY: it is only looked at; a descriptor that is not open gives an error.
    let inherited = unsafe { BorrowedFd::borrow_raw(CHILD_FD) };
    rustix::net::sockopt::socket_type(inherited).ok()?;
    let duplicate = || inherited.try_clone_to_owned().map(File::from).ok();
    let streams = (duplicate()?, duplicate()?);
    // SAFETY: it is open, and nothing else in this process knows its number.
    drop(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(CHILD_FD) });
    Some(streams)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    if let Err(error) = thread::Builder::new().name(name.to_owned()).spawn(work) {
        eprintln!("opengateway-engine: no thread: {error}");
        exit(Exit::Fault);
    }
}

/// Loads while another thread tells how far it is.
fn with_progress<T>(output: &Arc<Output>, load: impl FnOnce(Box<dyn FnMut(f32) -> bool>) -> T) -> T {
    let progress = Arc::new(AtomicU32::new(0));
    let (done, until) = mpsc::channel::<()>();
    let (seen, told) = (Arc::clone(&progress), Arc::clone(output));
    let ticker = thread::spawn(move || {
        loop {
            told.send(&Up::Loading { progress: f32::from_bits(seen.load(Ordering::Relaxed)) });
            if until.recv_timeout(TICK) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    });
    let loaded = load(Box::new(move |now| {
        progress.store(now.clamp(0.0, 1.0).to_bits(), Ordering::Relaxed);
        true
    }));
    drop(done);
    // No progress is told after the end.
    let _ = ticker.join();
    loaded
}

/// llama.cpp's and ggml's versions, and the kernels.
#[allow(unsafe_code)]
fn build(kernels: Option<&Kernels>) -> String {
    // SAFETY: each is a string with NUL that lives as long as the library.
    let (llama, ggml) =
        unsafe { (CStr::from_ptr(llama_cpp_sys_2::llama_version()), CStr::from_ptr(llama_cpp_sys_2::ggml_version())) };
    let computes = kernels.map_or("no kernels", |kernels| kernels.cpu.as_str());
    let mut build = format!("llama.cpp {}, ggml {}, {computes}", llama.to_string_lossy(), ggml.to_string_lossy());
    if let Some(gpu) = kernels.and_then(|kernels| kernels.gpu.as_ref()) {
        build = format!("{build}, {gpu}");
    }
    build
}
