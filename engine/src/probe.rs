//! `--probe-sandbox MODEL`: enters the sandbox as for a model, tries what it forbids, and prints what happened as JSON.
//!
//! For tests and for people who want to know what their kernel can do.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal};
use serde_json::json;

use crate::process::{Exit, exit, harden};
use crate::{kernels, log, sandbox};

/// Prints `{"strength": …, "refused": {…}, "allowed": {…}}`: for each attempt what became of it.
pub fn run(model: &Path) -> ! {
    if let Err(error) = harden() {
        fail(&format!("cannot harden itself: {error}"));
    }
    log::install();
    let kernels = kernels::load().unwrap_or_else(|reason| fail(&reason));
    // As the child has it: the model is loaded between the two.
    let strength = sandbox::enter(model, kernels.driver).unwrap_or_else(|reason| fail(&reason));
    let allowed = json!({ "model": outcome(File::open(model)), "thread": outcome(thread()) });
    let mut refused = serde_json::Map::new();
    for (name, attempt) in forbidden(model) {
        refused.insert(name.to_owned(), outcome(attempt()).into());
    }
    if let Err(reason) = sandbox::close_files(kernels.driver) {
        fail(&reason);
    }
    refused.insert("model_once_loaded".to_owned(), outcome(File::open(model)).into());
    println!("{:#}", json!({ "kernels": kernels.cpu, "strength": strength.name(), "allowed": allowed, "refused": refused }));
    exit(Exit::Well)
}

fn fail(reason: &str) -> ! {
    eprintln!("opengateway-engine: {reason}");
    exit(Exit::Load)
}

fn outcome<T>(result: io::Result<T>) -> String {
    match result {
        Ok(_) => "done".to_owned(),
        Err(error) => error.to_string(),
    }
}

type Attempt<'a> = Box<dyn Fn() -> io::Result<()> + 'a>;

fn forbidden(model: &Path) -> Vec<(&'static str, Attempt<'_>)> {
    let sibling = model.with_file_name("probe-of-the-sandbox");
    let parent = rustix::process::getppid();
    vec![
        ("tcp", Box::new(|| TcpStream::connect("127.0.0.1:9").map(drop))),
        ("unix_socket", Box::new(|| UnixDatagram::unbound().map(drop))),
        ("passwd", Box::new(|| fs::read("/etc/passwd").map(drop))),
        ("folder_of_model", Box::new(move || fs::read_dir(model.parent().unwrap_or(model)).map(drop))),
        ("proc", Box::new(|| fs::read("/proc/self/environ").map(drop))),
        ("write_model", Box::new(move || OpenOptions::new().append(true).open(model).map(drop))),
        ("create", Box::new(move || File::create(&sibling).map(drop))),
        ("remove_model", Box::new(move || fs::remove_file(model))),
        ("folder", Box::new(|| fs::create_dir("/tmp/probe-of-the-sandbox"))),
        ("exec", Box::new(|| Command::new("/bin/true").status().map(drop))),
        ("signal_parent", Box::new(move || Ok(rustix::process::kill_process(parent.unwrap_or(Pid::INIT), Signal::CONT)?))),
        ("fork", Box::new(fork)),
        ("ptrace", Box::new(|| call(|| raw(libc::SYS_ptrace, [0, 0, 0])))),
        ("read_other_memory", Box::new(|| call(|| raw(libc::SYS_process_vm_readv, [1, 0, 0])))),
        ("memory_as_code", Box::new(code)),
        ("io_uring", Box::new(|| call(|| raw(libc::SYS_io_uring_setup, [1, 0, 0])))),
        ("bpf", Box::new(|| call(|| raw(libc::SYS_bpf, [0, 0, 0])))),
        ("mount", Box::new(|| call(|| raw(libc::SYS_mount, [0, 0, 0])))),
        ("dumpable", Box::new(|| Ok(rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)?))),
    ]
}

fn thread() -> io::Result<()> {
    std::thread::Builder::new().spawn(|| {})?.join().map_err(|_| io::Error::other("it panicked"))
}

fn call(number: impl Fn() -> i64) -> io::Result<()> {
    if number() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[allow(unsafe_code)]
fn raw(number: i64, arguments: [usize; 3]) -> i64 {
    // SAFETY: the arguments are numbers that these calls refuse, or null where they want memory; refused is what is expected.
    unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2], 0_usize, 0_usize, 0_usize) }
}

#[allow(unsafe_code)]
fn fork() -> io::Result<()> {
    // SAFETY: should it succeed, the child does nothing but end.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => exit(Exit::Well),
        _ => Ok(()),
    }
}

#[allow(unsafe_code)]
fn code() -> io::Result<()> {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: new memory at a place that the kernel chooses touches none of ours.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), 4096, access, kind, -1, 0) };
    if memory == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}
