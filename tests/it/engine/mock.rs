//! A child that speaks the protocol of the engine and misbehaves on request: how it loads is in the name of its model, how
//! it answers in the prompt. It is this test binary itself, started by a script of the lab with the socket as its standard
//! input: so it is always built, and taking the descriptor needs no unsafe code.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opengateway_engine_protocol::{
    self as protocol, Down, ErrorKind, Finish, Generate, Input, MAX_FRAME_BYTES, Ready, Up, VERSION,
};

/// Requests whose thread has begun and not ended.
static ANSWERING: AtomicUsize = AtomicUsize::new(0);

/// Where the socket is; cancelled prompts.
#[derive(Clone)]
struct Mock {
    stream: Arc<Mutex<UnixStream>>,
    cancelled: Arc<Mutex<HashSet<u64>>>,
}

impl Mock {
    fn say(&self, frame: &Up) {
        let _ = protocol::write(&mut *self.stream.lock().unwrap(), frame);
    }

    fn bytes(&self, bytes: &[u8]) {
        let _ = std::io::Write::write_all(&mut *self.stream.lock().unwrap(), bytes);
    }

    fn delta(&self, id: u64, text: &str) {
        self.say(&Up::Delta { id, text: text.to_owned(), tokens: 1 });
    }

    fn done(&self, id: u64, finish: Finish, tokens: u32) {
        let generate_us = u64::from(tokens) * 1000;
        self.say(&Up::Done { id, finish, prompt_tokens: 3, completion_tokens: tokens, prompt_us: 10, generate_us });
    }

    fn is_cancelled(&self, id: u64) -> bool {
        self.cancelled.lock().unwrap().contains(&id)
    }
}

fn forever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

#[test]
#[ignore = "it is the child that the other tests start"]
fn child() {
    let Ok(socket) = std::io::stdin().as_fd().try_clone_to_owned() else { return };
    if rustix::net::getsockname(&socket).is_err() {
        // Somebody runs the ignored tests.
        return;
    }
    let mut reading = UnixStream::from(socket);
    let mock = Mock { stream: Arc::new(Mutex::new(reading.try_clone().unwrap())), cancelled: Arc::default() };
    let mut body = Vec::new();
    mock.say(&Up::Hello { protocol: VERSION, version: "mock".to_owned(), build: "mock".to_owned() });
    let Ok(Some(Down::Load(load))) = protocol::read(&mut reading, MAX_FRAME_BYTES, &mut body) else { std::process::exit(0) };
    let model = Path::new(&load.path).file_stem().unwrap().to_str().unwrap().to_owned();
    self::load(&mock, &model);
    mock.say(&Up::Ready(Ready {
        context: 512,
        slots: load.slots,
        threads: 1,
        template: "mock".to_owned(),
        parameters: 88,
        device: "mock".to_owned(),
        memory: 1 << 20,
    }));
    loop {
        match protocol::read(&mut reading, MAX_FRAME_BYTES, &mut body) {
            Ok(Some(Down::Generate(generate))) => {
                let mock = mock.clone();
                ANSWERING.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || {
                    answer(&mock, generate);
                    ANSWERING.fetch_sub(1, Ordering::SeqCst);
                });
            }
            Ok(Some(Down::Cancel { id })) => {
                mock.cancelled.lock().unwrap().insert(id);
            }
            Ok(Some(Down::Ping { nonce })) => {
                if model != "mute" {
                    mock.say(&Up::Pong { nonce, running: 0 });
                }
            }
            Ok(Some(Down::Shutdown)) if model == "stubborn" => forever(),
            _ => std::process::exit(0),
        }
    }
}

fn load(mock: &Mock, model: &str) {
    match model {
        "dies-loading" => std::process::abort(),
        "refuses" => {
            mock.say(&Up::LoadFailed { reason: "tensor 'x' has \u{1b}[31ma wrong shape".to_owned() });
            std::process::exit(1);
        }
        "slow" => {
            for step in 0..50_u8 {
                mock.say(&Up::Loading { progress: f32::from(step) / 100.0 });
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        "babbles" => mock.bytes(&[0xff; 64]),
        "out-of-place" => mock.say(&Up::Pong { nonce: 7, running: 0 }),
        _ => {}
    }
}

fn input(generate: &Generate) -> &str {
    match &generate.input {
        Input::Chat(messages) => messages.last().map_or("", |message| &message.text),
        Input::Raw(text) => text,
    }
}

/// "words 5", "drip 5 100" (milliseconds between), "crash", "crash-after 3", …
fn answer(mock: &Mock, generate: Generate) {
    let id = generate.id;
    let words: Vec<&str> = input(&generate).split(' ').collect();
    let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    mock.say(&Up::Started { id, prompt_tokens: 3 });
    match words[0] {
        "crash" => std::process::abort(),
        "crash-after" => {
            (0..number(1)).for_each(|_| mock.delta(id, "word "));
            std::thread::sleep(Duration::from_millis(100));
            std::process::abort();
        }
        "crash-slowly" => {
            std::thread::sleep(Duration::from_millis(number(1)));
            std::process::abort();
        }
        "garbage" => mock.bytes(b"\x00\x00\x00\x04{\"a}"),
        "huge" => mock.bytes(&u32::MAX.to_be_bytes()),
        "stranger" => mock.delta(id + 1000, "not yours"),
        "twice" => (0..2).for_each(|_| mock.done(id, Finish::Stop, 1)),
        "starts-twice" => mock.say(&Up::Started { id, prompt_tokens: 3 }),
        "closes" => drop(mock.stream.lock().unwrap().shutdown(std::net::Shutdown::Both)),
        "deaf" => loop {
            mock.delta(id, "la ");
            std::thread::sleep(Duration::from_millis(20));
        },
        "silent" => forever(),
        // So many times 64 KiB, in pieces of which the channels on the way hold few.
        "flood" => {
            for _ in 0..64 * number(1) {
                mock.delta(id, &"x".repeat(1024));
            }
            mock.done(id, Finish::Stop, 1);
        }
        // What was written before has arrived when this answer does.
        "settled" => {
            while ANSWERING.load(Ordering::SeqCst) > 1 {
                std::thread::sleep(Duration::from_millis(5));
            }
            mock.delta(id, "settled");
            mock.done(id, Finish::Stop, 1);
        }
        "overflow" => {
            let message = "the prompt has 900 tokens, and 512 fit\n".to_owned();
            mock.say(&Up::Error { id, kind: ErrorKind::ContextOverflow, message });
        }
        "descriptors" => {
            let list = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            let mut targets: Vec<String> =
                list.filter_map(|entry| Some(std::fs::read_link(entry.path()).ok()?.to_str()?.to_owned())).collect();
            targets.sort();
            mock.delta(id, &targets.join(" "));
            mock.done(id, Finish::Stop, 1);
        }
        "environment" => {
            let mut names: Vec<String> = std::env::vars().map(|(name, _)| name).collect();
            names.sort();
            mock.delta(id, &names.join(" "));
            mock.done(id, Finish::Stop, 1);
        }
        "conversation" => {
            let Input::Chat(messages) = &generate.input else { return };
            messages.iter().for_each(|message| mock.delta(id, &format!("{}:{};", message.role, message.text)));
            mock.done(id, Finish::Length, 1);
        }
        _ => {
            for said in 0..number(1) {
                if mock.is_cancelled(id) {
                    return mock.done(id, Finish::Cancelled, u32::try_from(said).unwrap());
                }
                mock.delta(id, "word ");
                std::thread::sleep(Duration::from_millis(number(2)));
            }
            mock.done(id, Finish::Stop, u32::try_from(number(1)).unwrap());
        }
    }
}
