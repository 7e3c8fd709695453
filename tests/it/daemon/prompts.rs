//! Prompts whose callers misbehave.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

#[tokio::test]
async fn a_caller_that_closes_its_stream_or_leaves_frees_the_slot() {
    // A server that never answers: its only slot is held until somebody lets go.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let (gone, mut closed) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = silent.accept().await {
            let gone = gone.clone();
            tokio::spawn(crate::openai::never_answers(stream, gone));
        }
    });
    let Some(bus) = bus_or_skip() else { return };
    let config = bus.dir().join("c.toml");
    std::fs::write(&config, format!("[[backend]]\nkind = \"openai\"\nurl = \"http://127.0.0.1:{port}/v1\"\nslots = 1\n"))
        .unwrap();
    let node = Node::start_on(bus, "a", &["--config", config.to_str().unwrap(), "--connect", "gatewayai-poc"]).await;
    node.until(&["status"], |status| status["backend"].as_str().is_some_and(|name| name.starts_with("openai"))).await;
    for how in ["interrupt", "kill", "cancel"] {
        let mut child = ogctl_on(&node.bus, &["prompt", "x", "--model", "slow"]).spawn().unwrap();
        let jobs = node
            .until(&["jobs"], |jobs| jobs["jobs"].as_array().is_some_and(|jobs| jobs.iter().any(|job| job["state"] == "queued")))
            .await;
        let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
        match how {
            "interrupt" => {
                rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
                assert_eq!(child.wait().await.unwrap().code(), Some(130));
            }
            "kill" => child.kill().await.unwrap(),
            _ => {
                let id =
                    jobs["jobs"].as_array().unwrap().iter().find(|job| job["state"] == "queued").unwrap()["id"].as_u64().unwrap();
                let connection = node.bus.connect().await;
                let path = format!("/org/opengateway/Gateway1/job/{id}");
                connection.call_method(Some(NAME), path, Some("org.opengateway.Gateway1.Job"), "Cancel", &()).await.unwrap();
                assert_eq!(child.wait().await.unwrap().code(), Some(1));
            }
        }
        tokio::time::timeout(Duration::from_secs(5), closed.recv())
            .await
            .unwrap_or_else(|_| panic!("{how}: the upstream is still connected"));
    }
}

/// A model server that says one word, and the rest when the test wants; or one that never stops.
struct Upstream {
    port: u16,
    go_on: tokio::sync::watch::Sender<bool>,
    written: Arc<AtomicUsize>,
    gone: tokio::sync::mpsc::UnboundedReceiver<()>,
}

impl Upstream {
    async fn start(floods: bool) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (go_on, wait) = tokio::sync::watch::channel(false);
        let (tell, gone) = tokio::sync::mpsc::unbounded_channel();
        let written = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&written);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(Self::answer(stream, floods, wait.clone(), Arc::clone(&count), tell.clone()));
            }
        });
        Self { port, go_on, written, gone }
    }

    async fn answer(
        mut stream: tokio::net::TcpStream,
        floods: bool,
        mut wait: tokio::sync::watch::Receiver<bool>,
        count: Arc<AtomicUsize>,
        tell: tokio::sync::mpsc::UnboundedSender<()>,
    ) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let Some((line, _)) = crate::openai::request(&mut stream).await else { return };
        if line.contains("/models") {
            crate::openai::models(&mut stream, crate::openai::MODELS).await;
            return;
        }
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
        let _ = stream.write_all(format!("{head}{}", crate::openai::event("first ")).as_bytes()).await;
        while floods && stream.write_all(crate::openai::event(&"x".repeat(1000)).as_bytes()).await.is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let mut byte = [0];
        let wanted = tokio::select! {
            wanted = wait.wait_for(|go_on| *go_on) => wanted.is_ok(),
            _ = stream.read(&mut byte) => false,
        };
        if wanted {
            let _ = stream.write_all(format!("{}{}", crate::openai::event("last"), crate::openai::STOP).as_bytes()).await;
        }
        let _ = tell.send(());
    }

    /// A daemon whose only real model is here.
    async fn node(&self) -> Option<Node> {
        let bus = bus_or_skip()?;
        let config = bus.dir().join("c.toml");
        std::fs::write(
            &config,
            format!("[[backend]]\nkind = \"openai\"\nurl = \"http://127.0.0.1:{}/v1\"\nslots = 1\n", self.port),
        )
        .unwrap();
        let node = Node::start_on(bus, "a", &["--config", config.to_str().unwrap(), "--connect", "gatewayai-poc"]).await;
        node.until(&["status"], |status| status["backend"].as_str().is_some_and(|name| name.starts_with("openai"))).await;
        Some(node)
    }

    async fn let_go(&mut self) {
        tokio::time::timeout(Duration::from_secs(5), self.gone.recv()).await.expect("the server is let go");
    }
}

/// `ogctl prompt`, which has printed the first word.
async fn asking(node: &Node) -> tokio::process::Child {
    use tokio::io::AsyncReadExt as _;
    let mut child = ogctl_on(&node.bus, &["prompt", "x", "--model", "slow"]).spawn().unwrap();
    let mut first = [0; 6];
    tokio::time::timeout(DEADLINE, child.stdout.as_mut().unwrap().read_exact(&mut first)).await.unwrap().unwrap();
    assert_eq!(&first, b"first ");
    child
}

async fn ended(child: tokio::process::Child) -> (Option<i32>, String, String) {
    let output = tokio::time::timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_is_killed_in_the_middle_of_an_answer_is_no_success() {
    let upstream = Upstream::start(false).await;
    let Some(mut node) = upstream.node().await else { return };
    let child = asking(&node).await;
    node.signal(rustix::process::Signal::KILL);
    node.ended().await;
    let (code, _, said) = ended(child).await;
    assert!(
        code == Some(8) && said.contains("went away before the answer was whole") && said.contains("journalctl"),
        "{code:?} {said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_lets_the_running_prompt_end_and_takes_no_new_one() {
    let mut upstream = Upstream::start(false).await;
    let Some(mut node) = upstream.node().await else { return };
    let child = asking(&node).await;
    node.signal(rustix::process::Signal::TERM);
    node.until(&["status"], |status| status["state"] == "stopping").await;
    // Whatever is asked from now on is refused by its name and at once.
    let connection = node.bus.connect().await;
    for (method, body) in [("Connect", ("x", Options::new())), ("Disconnect", ("gatewayai-poc", Options::new()))] {
        let begun = Instant::now();
        assert_eq!(call(&connection, method, &body).await.unwrap_err().0, format!("{ERROR}ShuttingDown"));
        assert!(begun.elapsed() < Duration::from_secs(2), "{method}: {:?}", begun.elapsed());
    }
    let said = node.ogctl(&["prompt", "x"]).await;
    assert!(said.code == 1 && said.stderr.contains("stopping"), "{said:?}");
    upstream.go_on.send_replace(true);
    let (code, text, said) = ended(child).await;
    assert_eq!((code, text.as_str()), (Some(0), "last\n"), "{said}");
    assert_eq!(node.ended().await, Some(0));
    upstream.let_go().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_stops_at_once_and_says_so_to_who_waits() {
    let mut upstream = Upstream::start(false).await;
    let Some(mut node) = upstream.node().await else { return };
    let child = asking(&node).await;
    node.signal(rustix::process::Signal::TERM);
    node.until(&["status"], |status| status["state"] == "stopping").await;
    let begun = Instant::now();
    node.signal(rustix::process::Signal::TERM);
    assert_eq!(node.ended().await, Some(0));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let (code, _, said) = ended(child).await;
    assert!(code == Some(1) && said.contains("the daemon is stopping"), "{code:?} {said}");
    upstream.let_go().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stops_slows_the_model_and_costs_no_memory() {
    let mut upstream = Upstream::start(true).await;
    let Some(node) = upstream.node().await else { return };
    let connection = node.bus.connect().await;
    let before = node.kib("VmRSS");
    let reply = call(&connection, "StartPrompt", &("", "x", Options::from([("Model", Variant::from("slow"))]))).await.unwrap();
    let (_, stream): (OwnedObjectPath, zbus::OwnedFd) = reply.body().deserialize().unwrap();
    drop(reply); // it holds the descriptor too
    // Until the server cannot write any more: everything in between is full.
    let (mut count, mut same) = (0, 0);
    let deadline = Instant::now() + DEADLINE;
    while same < 50 {
        assert!(Instant::now() < deadline, "the server still writes");
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = upstream.written.load(Ordering::Relaxed);
        same = if now == count && now > 0 { same + 1 } else { 0 };
        count = now;
    }
    let now = node.kib("VmRSS");
    assert!(now < before + 16 * 1024, "it grew from {before} to {now} KiB");
    assert_eq!(node.ogctl(&["status"]).await.code, 0);
    drop(stream);
    upstream.let_go().await;
}
