//! The child process and the socket to it. What it writes to its standard error goes to the log, line by line.

use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt as _, FdMapping};
use opengateway_engine_protocol::{self as protocol, CHILD_FD, Down, MAX_UP_FRAME_BYTES, Up};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{self, ChildStderr};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

/// A line of the log.
const LINE: usize = 1024;
/// Lines of one child in a period; what is more is counted, not told.
const LINES: u32 = 200;
const PERIOD: Duration = Duration::from_secs(10);
/// Between the end of its socket and the end of the process.
const LINGER: Duration = Duration::from_millis(500);

/// A running child. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Child {
    process: process::Child,
    pid: Option<u32>,
    reader: OwnedReadHalf,
    /// Bytes that came, of which the first `taken` were read.
    buffer: Vec<u8>,
    taken: usize,
    writer: mpsc::UnboundedSender<Vec<u8>>,
    /// Its socket has ended; until then its exit status is waited for.
    ended: Option<Instant>,
}

impl Child {
    /// Starts `program`. It gets its end of the socket, an empty environment, and no other descriptor: all of the daemon's
    /// are closed by the kernel when the program begins.
    pub(super) fn start(program: &Path, model: &str) -> io::Result<Self> {
        let (ours, theirs) = StdStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut command = std::process::Command::new(program);
        command
            .env_clear()
            // An abort in ggml would start a debugger, and hang until that ends.
            .env("GGML_NO_BACKTRACE", "1")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C at a terminal is for the daemon, which lets prompts end.
            .process_group(0)
            .fd_mappings(vec![FdMapping { parent_fd: theirs.into(), child_fd: CHILD_FD }])
            .map_err(io::Error::other)?;
        let mut command = process::Command::from(command);
        command.kill_on_drop(true);
        let mut process = command.spawn()?;
        // Our copy of its end: the end of the stream would never come.
        drop(command);
        let (reader, writing) = UnixStream::from_std(ours)?.into_split();
        let (writer, frames) = mpsc::unbounded_channel();
        tokio::spawn(write(writing, frames));
        if let Some(stderr) = process.stderr.take() {
            tokio::spawn(log(stderr, model.to_owned()));
        }
        let pid = process.id();
        Ok(Self { process, pid, reader, buffer: Vec::new(), taken: 0, writer, ended: None })
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Hands a frame to the writer. Whoever sends keeps count: a prompt at most twice, a ping when the last one came back.
    pub(super) fn send(&self, frame: &Down) -> Result<(), protocol::FrameError> {
        let _ = self.writer.send(protocol::encode(frame)?);
        Ok(())
    }

    /// The next frame.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// A sentence about the end of the child, or about what it said wrong.
    pub(super) async fn next(&mut self) -> Result<Up, String> {
        loop {
            if let Some(until) = self.ended {
                return Err(match timeout_at(until, self.process.wait()).await {
                    Ok(Ok(status)) => describe(status),
                    _ => "it closed its socket".to_owned(),
                });
            }
            if let Some(frame) = self.parse()? {
                return Ok(frame);
            }
            match self.reader.read_buf(&mut self.buffer).await {
                Ok(0) | Err(_) => self.ended = Some(Instant::now() + LINGER),
                Ok(_) => {}
            }
        }
    }

    fn parse(&mut self) -> Result<Option<Up>, String> {
        let bytes = &self.buffer[self.taken..];
        let whole = match bytes.first_chunk() {
            Some(header) => 4 + protocol::length(*header, MAX_UP_FRAME_BYTES).map_err(|error| format!("it sent {error}"))?,
            None => usize::MAX,
        };
        if bytes.len() < whole {
            self.buffer.drain(..self.taken);
            self.taken = 0;
            return Ok(None);
        }
        let frame = protocol::decode(&bytes[4..whole]).map_err(|error| format!("it sent {error}"))?;
        self.taken += whole;
        Ok(Some(frame))
    }

    /// Ends it now.
    pub(super) fn kill(mut self) {
        let _ = self.process.start_kill();
        tokio::spawn(async move { self.process.wait().await });
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => {
            let name = match signal {
                4 => " (illegal instruction)",
                6 => " (abort)",
                7 => " (bus error: its file became shorter?)",
                9 => " (killed: out of memory?)",
                11 => " (segmentation fault)",
                31 => " (forbidden system call)",
                _ => "",
            };
            format!("it was ended by signal {signal}{name}")
        }
        (None, Some(code)) => format!("it exited with {code}"),
        (None, None) => "it ended".to_owned(),
    }
}

/// Writes frames until there are no more or the child is gone. A child that does not read stops this task alone.
async fn write(mut writing: OwnedWriteHalf, mut frames: mpsc::UnboundedReceiver<Vec<u8>>) {
    while let Some(frame) = frames.recv().await {
        if writing.write_all(&frame).await.is_err() {
            return;
        }
    }
}

/// Tells what the child says, escaped and bounded.
async fn log(mut stderr: ChildStderr, model: String) {
    let mut buffer = Vec::with_capacity(LINE);
    let (mut told, mut since, mut lost) = (0, Instant::now(), 0_u64);
    // A line that is too long is told in pieces.
    while matches!((&mut stderr).take((LINE - buffer.len()) as u64).read_buf(&mut buffer).await, Ok(1..)) {
        if since.elapsed() >= PERIOD {
            if lost > 0 {
                tracing::warn!(model, "engine of {model}: {lost} lines more were not told");
            }
            (told, since, lost) = (0, Instant::now(), 0);
        }
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n').or((buffer.len() >= LINE).then_some(LINE - 1)) {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if told < LINES {
                told += 1;
                tracing::info!(model, "engine of {model}: {}", line.trim_end().escape_debug());
            } else {
                lost += 1;
            }
        }
    }
    if !buffer.is_empty() || lost > 0 {
        tracing::info!(model, lost, "engine of {model}: {}", String::from_utf8_lossy(&buffer).trim_end().escape_debug());
    }
}
