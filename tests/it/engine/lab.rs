//! A machine of its own: models directory, queue, owner task, and as much memory as the test says.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use opengateway::domain::node::ModelState;
use opengateway::domain::prompt::{Ask, Done, Failure, FailureKind, Text};
use opengateway::domain::resources::{Cpu, Memory, Resources, Storage};
use opengateway::gauge;
use opengateway::models::{self, Local, Models, Settings};
use opengateway::net::AnswerEvent;
use opengateway::serve::{self, Requester, Served};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::common::gguf::Gguf;

/// Most time that anything may take that takes well under a second on an idle machine.
pub const DEADLINE: Duration = Duration::from_secs(30);
pub const MEMORY: u64 = 8_000_000_000;

/// What a prompt came to.
#[derive(Debug)]
pub struct Answer {
    pub text: String,
    pub outcome: Result<Done, Failure>,
}

impl Answer {
    pub fn kind(&self) -> Option<FailureKind> {
        self.outcome.as_ref().err().map(|failure| failure.kind)
    }
}

#[derive(Debug)]
pub struct Lab {
    pub serve: serve::Handle,
    pub models: Option<Models>,
    pub settings: watch::Sender<Settings>,
    memory: watch::Sender<u64>,
    directory: tempfile::TempDir,
}

fn resources(available: u64) -> Resources {
    Resources {
        schema: 1,
        measured_at: 0,
        cpu: Cpu { logical: 2, usable: 2.0, model: None, arch: "x86_64".to_owned(), load1: None },
        memory: Memory { total: Some(MEMORY), available: Some(available), limit: None },
        storage: Storage { path: "/".into(), total: None, available: None, models: None },
        gpus: Vec::new(),
        warnings: Vec::new(),
    }
}

/// A script that becomes the mock, with the socket as its standard input.
pub fn write_program(path: &Path) {
    let this = std::env::current_exe().unwrap();
    let script = format!("#!/bin/sh\nexec '{}' --exact engine::mock::child --ignored --nocapture <&3 3>&-\n", this.display());
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, script).unwrap();
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(temporary, path).unwrap();
}

impl Lab {
    /// With these models there from the beginning, and settings as `change` leaves them.
    pub async fn with(names: &[&str], change: impl FnOnce(&mut Settings)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        write_program(&root.join("libexec/engine"));
        let mut settings = Settings {
            directory: root.join("models"),
            also: vec![root.join("also")],
            enabled: true,
            program: root.join("libexec/engine"),
            threads: None,
            context: None,
            slots: Some(4),
            keep: Vec::new(),
            idle: None,
            file_template: false,
            gpu_layers: None,
        };
        change(&mut settings);
        std::fs::create_dir_all(root.join("state")).unwrap();
        std::fs::create_dir_all(root.join("models")).unwrap();
        let mut lab = Self::start(directory, settings);
        for name in names {
            lab.put(name);
        }
        for name in names {
            lab.until(name, |_| true).await;
        }
        lab
    }

    fn start(directory: tempfile::TempDir, settings: Settings) -> Self {
        let (gauge, mut commands, _) = gauge::Handle::scripted(resources(MEMORY));
        let (memory, available) = watch::channel(MEMORY);
        tokio::spawn(async move {
            while let Some(gauge::Command::Measure { reply, .. }) = commands.recv().await {
                let _ = reply.send(Arc::new(resources(*available.borrow())));
            }
        });
        let (_, tiers) = watch::channel(Vec::new());
        let (serve, _) = serve::spawn(serve::Config { backends: Vec::new(), tiers });
        let (settings, receiver) = watch::channel(settings);
        let state_dir = directory.path().join("state");
        let models = models::spawn(models::Config { settings: receiver, state_dir, serve: serve.clone(), gauge });
        Self { serve, models: Some(models), settings, memory, directory }
    }

    /// Ends everything and begins again with the same files.
    pub async fn restart(mut self) -> Self {
        self.models.take().unwrap().stop().await;
        let settings = self.settings.borrow().clone();
        Self::start(self.directory, settings)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn models(&self) -> &Models {
        self.models.as_ref().unwrap()
    }

    pub fn available(&self, bytes: u64) {
        self.memory.send_replace(bytes);
    }

    /// Puts a model of this name there, whole and at once.
    pub fn put(&mut self, name: &str) {
        let temporary = self.path("temporary");
        std::fs::write(&temporary, Gguf::default().bytes()).unwrap();
        std::fs::rename(temporary, self.path(&format!("models/{name}.gguf"))).unwrap();
    }

    pub fn local(&self, name: &str) -> Option<Local> {
        self.models().handle.list().into_iter().find(|local| local.name == name)
    }

    /// Waits until a model is there and as wanted.
    pub async fn until(&self, name: &str, wanted: impl Fn(&Local) -> bool) -> Local {
        self.until_within(DEADLINE, name, wanted).await
    }

    pub async fn until_within(&self, limit: Duration, name: &str, wanted: impl Fn(&Local) -> bool) -> Local {
        let mut models = self.models().handle.watch();
        let found = timeout(limit, async {
            loop {
                if let Some(local) = models.borrow_and_update().iter().find(|local| local.name == name && wanted(local)) {
                    return local.clone();
                }
                models.changed().await.unwrap();
            }
        });
        found.await.unwrap_or_else(|_| panic!("{name} stays {:?}", self.local(name)))
    }

    pub async fn until_state(&self, name: &str, state: ModelState) -> Local {
        self.until(name, |local| local.state == state).await
    }

    /// Waits until a model is gone from the list.
    pub async fn until_gone(&self, name: &str) {
        let mut models = self.models().handle.watch();
        let gone = models.wait_for(|models| models.iter().all(|local| local.name != name));
        drop(timeout(DEADLINE, gone).await.unwrap_or_else(|_| panic!("{name} stays")));
    }

    /// Hands a prompt in; its answer comes out of the channel.
    pub fn ask(&self, model: &str, prompt: &str) -> mpsc::Receiver<AnswerEvent> {
        self.ask_within(model, prompt, Duration::from_secs(60))
    }

    pub fn ask_within(&self, model: &str, prompt: &str, left: Duration) -> mpsc::Receiver<AnswerEvent> {
        let (events, receiver) = mpsc::channel(64);
        let ask = Ask { model: Some(model.to_owned()), prompt: Text::new(prompt), temperature: Some(0.0), ..Ask::default() };
        self.serve.submit(Served { requester: Requester::Local(0), ask, timeout: left, events }).unwrap();
        receiver
    }

    pub async fn answer(&self, model: &str, prompt: &str) -> Answer {
        collect(self.ask(model, prompt)).await
    }
}

pub async fn collect(mut events: mpsc::Receiver<AnswerEvent>) -> Answer {
    let mut text = String::new();
    let collected = timeout(Duration::from_secs(60), async {
        while let Some(event) = events.recv().await {
            match event {
                AnswerEvent::Text(more) => text.push_str(&more),
                AnswerEvent::End(outcome) => return outcome,
                _ => {}
            }
        }
        panic!("the answer has no end")
    });
    let outcome = collected.await.expect("no end within 60 s");
    Answer { text, outcome }
}

/// Waits for the first text of an answer.
pub async fn first_text(events: &mut mpsc::Receiver<AnswerEvent>) {
    let waited = timeout(DEADLINE, async { while !matches!(events.recv().await, Some(AnswerEvent::Text(_))) {} });
    waited.await.expect("no text");
}

pub fn is_running(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    !status.is_empty() && !status.contains("State:\tZ")
}

pub async fn until_ended(pid: u32, limit: Duration) {
    let deadline = Instant::now() + limit;
    while is_running(pid) {
        assert!(Instant::now() < deadline, "process {pid} still runs after {limit:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
