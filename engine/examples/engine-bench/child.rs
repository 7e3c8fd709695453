//! The engine, over its socket.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use opengateway_engine_protocol::{self as protocol, Down, Generate, Input, Load, MAX_UP_FRAME_BYTES, Up};

use crate::{Plan, Run, cpu_time, text};

/// A running engine with one slot for each stream.
#[derive(Debug)]
pub struct Child {
    process: std::process::Child,
    stream: UnixStream,
    body: Vec<u8>,
    streams: u32,
    next_id: u64,
    /// Threads that it computes with.
    pub threads: u32,
}

impl Child {
    /// Starts it and loads the model.
    pub fn start(plan: &Plan, streams: u32) -> Result<Self, String> {
        let (ours, theirs) = UnixStream::pair().map_err(|error| error.to_string())?;
        let process = Command::new("/bin/sh")
            .args(["-c", "exec \"$0\" 3<&0 0</dev/null"])
            .arg(&plan.engine)
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut child = Self { process, stream: ours, body: Vec::new(), streams, next_id: 0, threads: 0 };
        child.send(&Down::Load(Load {
            path: plan.model.to_string_lossy().into_owned(),
            context: 0,
            max_context: 1024,
            slots: streams,
            threads: plan.threads,
            gpu_layers: 0,
            file_template: false,
        }))?;
        loop {
            match child.next()? {
                Up::Hello { .. } | Up::Loading { .. } => {}
                Up::Ready(ready) => {
                    child.threads = ready.threads;
                    return Ok(child);
                }
                other => return Err(format!("{other:?}")),
            }
        }
    }

    /// One run of all streams.
    pub fn run(&mut self, prompt: usize, generate: u32) -> Result<Run, String> {
        let first = self.next_id;
        self.next_id += u64::from(self.streams);
        let requests: Vec<_> = (first..self.next_id).map(|id| request(id, prompt, generate)).collect();
        let (begun, cpu) = (Instant::now(), cpu_time(self.process.id()));
        for request in &requests {
            self.send(request)?;
        }
        let (mut waiting, mut running): (BTreeSet<_>, BTreeSet<_>) =
            ((first..self.next_id).collect(), (first..self.next_id).collect());
        let mut run = Run { prompt: Duration::ZERO, generate: Duration::ZERO, prompt_tokens: 0, tokens: 0, cpu: Duration::ZERO };
        while !running.is_empty() {
            match self.next()? {
                Up::Delta { id, .. } => {
                    if waiting.remove(&id) && waiting.is_empty() {
                        run.prompt = begun.elapsed();
                    }
                }
                Up::Done { id, prompt_tokens, completion_tokens, .. } => {
                    running.remove(&id);
                    // An answer of bytes that are no text has no delta until its end.
                    if waiting.remove(&id) && waiting.is_empty() {
                        run.prompt = begun.elapsed();
                    }
                    run.prompt_tokens += prompt_tokens as usize;
                    run.tokens += (completion_tokens as usize).saturating_sub(1);
                }
                Up::Started { .. } => {}
                other => return Err(format!("{other:?}")),
            }
        }
        run.generate = begun.elapsed() - run.prompt;
        run.cpu = cpu_time(self.process.id()) - cpu;
        Ok(run)
    }

    fn send(&mut self, frame: &Down) -> Result<(), String> {
        protocol::write(&mut self.stream, frame).map_err(|error| error.to_string())
    }

    fn next(&mut self) -> Result<Up, String> {
        protocol::read(&mut self.stream, MAX_UP_FRAME_BYTES, &mut self.body)
            .map_err(|error| error.to_string())?
            .ok_or_else(|| "the engine is gone".to_owned())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn request(id: u64, prompt: usize, generate: u32) -> Down {
    Down::Generate(Generate {
        id,
        input: Input::Raw(text(usize::try_from(id).unwrap_or(0), prompt)),
        max_tokens: Some(generate),
        temperature: Some(0.0),
        top_p: None,
        seed: None,
        stop: Vec::new(),
    })
}
