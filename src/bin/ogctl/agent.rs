//! Polkit's agent for terminals, which asks a person for the password.
//!
//! Ends with the value, however that goes: the agent gets SIGTERM, on which it lets go of the terminal, and the terminal
//! is put back as it was, because an agent that dies while somebody types leaves it without echo.

use rustix::process::{Pid, Signal, getpgrp, kill_process};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};
use std::fs::File;
use std::io::IsTerminal as _;
use std::os::fd::AsRawFd as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe::Receiver;

/// Most time until polkit knows the agent.
const REGISTER_LIMIT: Duration = Duration::from_secs(10);
/// Most time for the agent to end by itself.
const END_LIMIT: Duration = Duration::from_secs(2);

/// The terminal of a person who can be asked now.
#[derive(Debug)]
pub struct Terminal {
    tty: File,
    settings: Termios,
}

impl Terminal {
    /// The terminal, if this process is in its foreground and not just somewhere below it: who gave us both standard
    /// input and standard error from elsewhere does not expect a question.
    pub fn of_process() -> Option<Self> {
        if !(std::io::stdin().is_terminal() || std::io::stderr().is_terminal()) {
            return None;
        }
        let tty = File::options().read(true).write(true).open("/dev/tty").ok()?;
        let settings = tcgetattr(&tty).ok()?;
        (tcgetpgrp(&tty).ok()? == getpgrp()).then_some(Self { tty, settings })
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    terminal: Terminal,
}

impl Agent {
    /// Starts it and waits until polkit knows it. `None` where it is not installed or cannot register.
    pub async fn start(terminal: Terminal) -> Option<Self> {
        // No close-on-exec: the child closes its end when it is registered, which is how systemctl waits too.
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::empty()).ok()?;
        let mut registered = Receiver::from_owned_fd(read).ok()?;
        let subject = std::process::id().to_string();
        let mut command = Command::new("pkttyagent");
        command.args(["--process", &subject, "--notify-fd", &write.as_raw_fd().to_string()]);
        // In a session its own agent comes first. Without a session (no logind, sshd without PAM) polkit looks at no
        // fallback at all.
        if std::env::var_os("XDG_SESSION_ID").is_some() {
            command.arg("--fallback");
        }
        // Its questions go to the terminal itself; our own input and output are not its to hold open.
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut agent = Self { child: command.spawn().ok()?, terminal };
        drop(write);
        let _ = tokio::time::timeout(REGISTER_LIMIT, registered.read(&mut [0])).await;
        // One that could not register has closed its end too, by ending.
        match agent.child.try_wait() {
            Ok(None) => Some(agent),
            _ => None,
        }
    }

    /// Whether it has ended by itself within the time.
    fn ends(&mut self) -> bool {
        let until = Instant::now() + END_LIMIT;
        while Instant::now() < until {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        false
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
            && matches!(self.child.try_wait(), Ok(None))
        {
            let _ = kill_process(pid, Signal::TERM);
            // One that was stopped hears nothing before it goes on.
            let _ = kill_process(pid, Signal::CONT);
            if !self.ends() {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
        let _ = tcsetattr(&self.terminal.tty, OptionalActions::Now, &self.terminal.settings);
    }
}
