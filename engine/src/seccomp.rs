//! The list of system calls.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};

use crate::sandbox::Driver;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Calls that are allowed whatever their arguments: memory, threads, time, and the descriptors that are open.
const ALLOWED: &[i64] = &[
    // Descriptors that are open.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    libc::SYS_getcwd,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_mincore,
    libc::SYS_membarrier,
    libc::SYS_get_mempolicy,
    // Threads. What `clone3` is told lies in memory, out of a filter's sight: it is refused by a second filter, see below.
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_futex,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_getcpu,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_arch_prctl,
    // Signals to itself, so that abort() ends it.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    // Time and facts.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrandom,
    // A filter can only be made stricter.
    libc::SYS_seccomp,
];

/// More, where a driver that nobody has looked at lives in the process: it maps code that it makes, and speaks to its devices.
const FOR_DRIVERS: &[i64] = &[
    libc::SYS_ioctl,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_pipe2,
    libc::SYS_fcntl,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_openat,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_prctl,
    libc::SYS_mbind,
    libc::SYS_set_mempolicy,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_getpriority,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
];

/// Installs the allow-list for all threads: a driver of a GPU has begun some.
pub fn restrict_calls(driver: Driver) -> Result<()> {
    // For clone3 the C library takes ENOSYS for "an old kernel", and uses clone, whose flags can be read.
    let old_kernel = u32::try_from(libc::ENOSYS)?;
    apply_filter_all_threads(&program(names(&[libc::SYS_clone3]), SeccompAction::Allow, SeccompAction::Errno(old_kernel))?)?;
    apply_filter_all_threads(&program(allow_list(driver)?, refusal(), SeccompAction::Allow)?)?;
    Ok(())
}

/// No thread opens a file any more.
pub fn refuse_open() -> Result<()> {
    let mut open = names(&[libc::SYS_openat]);
    #[cfg(target_arch = "x86_64")]
    open.insert(libc::SYS_open, Vec::new());
    apply_filter_all_threads(&program(open, SeccompAction::Allow, refusal())?)?;
    Ok(())
}

fn refusal() -> SeccompAction {
    SeccompAction::Errno(libc::EPERM.unsigned_abs())
}

fn program(rules: Rules, otherwise: SeccompAction, matching: SeccompAction) -> Result<BpfProgram> {
    Ok(SeccompFilter::new(rules, otherwise, matching, std::env::consts::ARCH.try_into()?)?.try_into()?)
}

/// Rules that hold whatever the arguments.
fn names(calls: &[i64]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

fn allow_list(driver: Driver) -> Result<Rules> {
    let mut rules = names(ALLOWED);
    // A thread of this process, never another process.
    let thread = mask(0, libc::CLONE_THREAD, libc::CLONE_THREAD)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![thread])?]);
    // A signal to this process only.
    let own = SeccompCondition::new(0, Dword, SeccompCmpOp::Eq, u64::from(std::process::id()))?;
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![own])?]);
    // Names of threads, and "no new privileges", which can only be given up.
    let option = |option: i32| {
        SeccompRule::new(vec![SeccompCondition::new(0, Dword, SeccompCmpOp::Eq, u64::from(option.unsigned_abs()))?])
    };
    rules.insert(
        libc::SYS_prctl,
        vec![option(libc::PR_SET_NAME)?, option(libc::PR_GET_NAME)?, option(libc::PR_SET_NO_NEW_PRIVS)?, option(PR_SET_VMA)?],
    );
    // Reading whether descriptors are open, and their flags.
    let command = |command: i32| {
        SeccompRule::new(vec![SeccompCondition::new(1, Dword, SeccompCmpOp::Eq, u64::from(command.unsigned_abs()))?])
    };
    rules.insert(libc::SYS_fcntl, vec![command(libc::F_GETFD)?, command(libc::F_GETFL)?, command(libc::F_SETFD)?]);
    // Its own limits, to be read.
    let read = SeccompCondition::new(2, seccompiler::SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![read])?]);
    // No memory becomes code: all of it is mapped by now.
    let not_code = || Ok::<_, Box<dyn std::error::Error>>(vec![SeccompRule::new(vec![mask(2, libc::PROT_EXEC, 0)?])?]);
    rules.insert(libc::SYS_mmap, not_code()?);
    rules.insert(libc::SYS_mprotect, not_code()?);
    // Opening to read, nothing else.
    let flags = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC;
    rules.insert(libc::SYS_openat, vec![SeccompRule::new(vec![mask(2, flags, libc::O_RDONLY)?])?]);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, vec![SeccompRule::new(vec![mask(1, flags, libc::O_RDONLY)?])?]);
    match driver {
        Driver::None => {}
        Driver::Cuda => drop(rules.insert(libc::SYS_ioctl, nvidia()?)),
        Driver::Other => rules.extend(names(FOR_DRIVERS)),
    }
    Ok(rules)
}

/// What NVIDIA's driver says to its devices: the kind 'F' to nvidia0 and nvidiactl, and plain small numbers to nvidia-uvm.
fn nvidia() -> Result<Vec<SeccompRule>> {
    let (kind, number) = (0xff00, 0xff);
    Ok(vec![SeccompRule::new(vec![mask(1, kind, i32::from(b'F') << 8)?])?, SeccompRule::new(vec![mask(1, !number, 0)?])?])
}

/// `PR_SET_VMA`: the C library names its memory.
const PR_SET_VMA: i32 = 0x5356_4d41;

/// Of argument `index` the bits `bits` are `value`.
fn mask(index: u8, bits: i32, value: i32) -> Result<SeccompCondition> {
    let bits = u64::from(bits.cast_unsigned());
    Ok(SeccompCondition::new(index, Dword, SeccompCmpOp::MaskedEq(bits), u64::from(value.cast_unsigned()))?)
}
