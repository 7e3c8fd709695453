//! The daemon's side of the socket, as a test needs it: blocking, with deadlines.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use opengateway_engine_protocol::{
    self as protocol, Down, ErrorKind, Finish, FrameError, Generate, Input, Load, MAX_UP_FRAME_BYTES, Message, Ready, Up,
};

/// No step of a test takes longer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The model that comes with the program.
pub fn demo() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/opengateway-demo.gguf");
    path.canonicalize().expect("models/opengateway-demo.gguf is part of the repository")
}

/// A running child.
pub struct Engine {
    pub child: Child,
    pub stream: UnixStream,
    body: Vec<u8>,
    stderr: File,
}

/// What became of one request.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    pub started: Option<u32>,
    pub text: String,
    pub deltas: usize,
    pub told_tokens: u32,
    pub finish: Option<Finish>,
    pub completion_tokens: u32,
    pub error: Option<(ErrorKind, String)>,
}

impl Engine {
    /// Starts a child and takes its hello.
    pub fn start() -> (Self, String) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        ours.set_write_timeout(Some(PATIENCE)).unwrap();
        let stderr = tempfile::tempfile().unwrap();
        // A shell gives the socket the number 3 and becomes the child. A hostile file gets at most 8 GiB.
        let child = Command::new("/bin/sh")
            .args(["-c", "ulimit -v 8388608; exec \"$0\" 3<&0 0</dev/null", env!("CARGO_BIN_EXE_opengateway-engine")])
            .env("OPENGATEWAY_CANARY", "environment")
            .stdin(OwnedFd::from(theirs))
            .stderr(stderr.try_clone().unwrap())
            .spawn()
            .unwrap();
        let mut engine = Self { child, stream: ours, body: Vec::new(), stderr };
        match engine.next() {
            Up::Hello { protocol: protocol::VERSION, build, .. } => (engine, build),
            other => panic!("no hello: {other:?}"),
        }
    }

    /// Starts a child with the demo model.
    pub fn demo(slots: u32) -> Self {
        Self::loaded(&load(&demo(), slots)).0
    }

    /// Starts a child and loads.
    pub fn loaded(load: &Load) -> (Self, Ready) {
        let (mut engine, _) = Self::start();
        engine.send(&Down::Load(load.clone()));
        let ready = engine.ready().unwrap_or_else(|reason| panic!("{reason}"));
        (engine, ready)
    }

    /// Waits for the end of loading.
    pub fn ready(&mut self) -> Result<Ready, String> {
        loop {
            match self.next() {
                Up::Loading { progress } => assert!((0.0..=1.0).contains(&progress)),
                Up::Ready(ready) => return Ok(ready),
                Up::LoadFailed { reason } => return Err(reason),
                other => panic!("while loading: {other:?}"),
            }
        }
    }

    pub fn send(&mut self, frame: &Down) {
        protocol::write(&mut self.stream, frame).unwrap();
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next frame; `None` when the child is gone.
    pub fn try_next(&mut self) -> Option<Up> {
        match protocol::read(&mut self.stream, MAX_UP_FRAME_BYTES, &mut self.body) {
            Ok(frame) => frame,
            Err(FrameError::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("the child says nothing"),
            Err(FrameError::Io(_)) => None,
            Err(error) => panic!("{error}"),
        }
    }

    pub fn next(&mut self) -> Up {
        self.try_next().unwrap_or_else(|| panic!("the child is gone: {}", self.stderr()))
    }

    /// Asks and waits for the end.
    pub fn ask(&mut self, request: Generate) -> Outcome {
        let id = request.id;
        self.send(&Down::Generate(request));
        self.collect(&[id]).remove(&id).unwrap()
    }

    /// Answer to one question of a user, greedy.
    pub fn answer(&mut self, question: &str) -> String {
        let outcome = self.ask(chat(1, question));
        assert_eq!(outcome.finish, Some(Finish::Stop), "{question}: {outcome:?}");
        outcome.text
    }

    /// Takes frames until all these requests have ended.
    pub fn collect(&mut self, ids: &[u64]) -> BTreeMap<u64, Outcome> {
        let mut outcomes: BTreeMap<u64, Outcome> = ids.iter().map(|id| (*id, Outcome::default())).collect();
        while outcomes.values().any(|outcome| outcome.finish.is_none() && outcome.error.is_none()) {
            self.take(&mut outcomes);
        }
        outcomes
    }

    /// Takes one frame about one of these requests.
    pub fn take(&mut self, outcomes: &mut BTreeMap<u64, Outcome>) {
        let frame = self.next();
        let (Up::Started { id, .. } | Up::Delta { id, .. } | Up::Done { id, .. } | Up::Error { id, .. }) = frame else {
            panic!("not about a request: {frame:?}")
        };
        let outcome = outcomes.get_mut(&id).unwrap_or_else(|| panic!("of an unknown request: {frame:?}"));
        assert!(outcome.finish.is_none() && outcome.error.is_none(), "after the end: {frame:?}");
        match frame {
            Up::Started { prompt_tokens, .. } => {
                assert_eq!(outcome.started.replace(prompt_tokens), None, "started twice");
            }
            Up::Delta { text, tokens, .. } => {
                assert!(outcome.started.is_some() && !text.is_empty());
                outcome.text += &text;
                outcome.deltas += 1;
                outcome.told_tokens += tokens;
            }
            Up::Done { finish, prompt_tokens, completion_tokens, .. } => {
                assert_eq!(outcome.started, Some(prompt_tokens));
                outcome.finish = Some(finish);
                outcome.completion_tokens = completion_tokens;
            }
            Up::Error { kind, message, .. } => outcome.error = Some((kind, message)),
            _ => unreachable!("only frames about requests come here"),
        }
    }

    /// How the child ended; it has to within the deadline.
    pub fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the child lives on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it wrote to stderr so far.
    pub fn stderr(&self) -> String {
        let mut text = String::new();
        let mut file = self.stderr.try_clone().unwrap();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Loads this file with one thread.
pub fn load(path: &Path, slots: u32) -> Load {
    Load {
        path: path.to_str().unwrap().to_owned(),
        context: 0,
        max_context: 4096,
        slots,
        threads: 1,
        gpu_layers: 0,
        file_template: false,
    }
}

/// A question of a user, greedy.
pub fn chat(id: u64, question: &str) -> Generate {
    talk(id, &[("user", question)])
}

/// A conversation, greedy.
pub fn talk(id: u64, messages: &[(&str, &str)]) -> Generate {
    let message = |(role, text): &(&str, &str)| Message { role: (*role).to_owned(), text: (*text).to_owned() };
    greedy(id, Input::Chat(messages.iter().map(message).collect()))
}

/// Text as it stands, greedy.
pub fn raw(id: u64, text: &str) -> Generate {
    greedy(id, Input::Raw(text.to_owned()))
}

fn greedy(id: u64, input: Input) -> Generate {
    Generate { id, input, max_tokens: None, temperature: Some(0.0), top_p: None, seed: None, stop: Vec::new() }
}

/// A test that cannot run here says so; on a build server it must run.
pub fn skipped(reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "cannot run here: {reason}");
    println!("SKIPPED: {reason}");
}
