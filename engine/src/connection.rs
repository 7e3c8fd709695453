//! The socket to the daemon: frames in by a thread that never computes, frames out under one lock.

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use opengateway_engine_protocol::{self as protocol, Down, ErrorKind, FrameError, Generate, Load, MAX_FRAME_BYTES, Up};
use serde::Deserialize;

use crate::process::{Exit, exit};
use crate::requests::Requests;

/// The way to the daemon. When nobody reads there any more, the process ends.
#[derive(Debug)]
pub struct Output(Mutex<File>);

impl Output {
    /// Over this descriptor.
    pub fn new(stream: File) -> Self {
        Self(Mutex::new(stream))
    }

    /// Sends one frame.
    pub fn send(&self, frame: &Up) {
        let mut bytes = Vec::new();
        append(&mut bytes, frame);
        self.write(&bytes);
    }

    /// Sends frames that were appended to `bytes`, in one write.
    pub fn write(&self, bytes: &[u8]) {
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if stream.write_all(bytes).is_err() {
            exit(Exit::Well);
        }
    }

    /// Says that the model cannot be loaded, and ends.
    pub fn load_failed(&self, reason: String) -> ! {
        self.send(&Up::LoadFailed { reason });
        exit(Exit::Load)
    }
}

/// Appends a frame to those that are to be sent.
pub fn append(bytes: &mut Vec<u8>, frame: &Up) {
    match protocol::encode(frame) {
        Ok(frame) => bytes.extend_from_slice(&frame),
        // Only a frame that is too long; deltas are cut to size and sentences are short.
        Err(error) => eprintln!("opengateway-engine: {error}"),
    }
}

/// The way from the daemon.
#[derive(Debug)]
pub struct Input {
    stream: File,
    body: Vec<u8>,
    output: Arc<Output>,
}

/// Finds the request in a frame that is otherwise not understood.
#[derive(Deserialize)]
struct Named {
    id: u64,
}

impl Input {
    /// Over this descriptor.
    pub fn new(stream: File, output: Arc<Output>) -> Self {
        Self { stream, body: Vec::new(), output }
    }

    /// The model to load: the first frame but pings.
    pub fn load(&mut self) -> Load {
        loop {
            match self.next() {
                Down::Load(load) => return load,
                Down::Ping { nonce } => self.output.send(&Up::Pong { nonce, running: 0 }),
                Down::Shutdown => exit(Exit::Well),
                Down::Generate(Generate { id, .. }) => self.refuse(id, ErrorKind::Busy, "no model is loaded yet"),
                Down::Cancel { .. } => {}
            }
        }
    }

    /// Reads for ever. Requests go to `prepare`.
    pub fn serve(mut self, requests: &Requests, prepare: &Sender<Generate>) -> ! {
        loop {
            match self.next() {
                Down::Ping { nonce } => self.output.send(&Up::Pong { nonce, running: requests.running() }),
                Down::Cancel { id } => requests.cancel(id),
                Down::Shutdown => exit(Exit::Well),
                Down::Load(_) => eprintln!("opengateway-engine: a second model is not loaded; start another engine"),
                Down::Generate(request) => {
                    if let Err((kind, message)) = requests.admit(request.id) {
                        self.refuse(request.id, kind, message);
                    } else if prepare.send(request).is_err() {
                        exit(Exit::Fault);
                    }
                }
            }
        }
    }

    /// The next frame that can be read. The end of the stream ends the process.
    fn next(&mut self) -> Down {
        loop {
            match protocol::read(&mut self.stream, MAX_FRAME_BYTES, &mut self.body) {
                Ok(Some(frame)) => return frame,
                Ok(None) | Err(FrameError::Io(_)) => exit(Exit::Well),
                Err(FrameError::Malformed(_)) => self.malformed(),
                // Where the next frame begins cannot be known.
                Err(error @ FrameError::TooLong(..)) => {
                    eprintln!("opengateway-engine: {error}");
                    exit(Exit::Usage);
                }
            }
        }
    }

    fn malformed(&mut self) {
        match serde_json::from_slice::<Named>(&self.body) {
            Ok(Named { id }) => self.refuse(id, ErrorKind::Invalid, "a frame that this version of the engine does not know"),
            Err(_) => eprintln!("opengateway-engine: a frame of {} bytes that it does not know", self.body.len()),
        }
    }

    fn refuse(&self, id: u64, kind: ErrorKind, message: &str) {
        self.output.send(&Up::Error { id, kind, message: message.to_owned() });
    }
}
