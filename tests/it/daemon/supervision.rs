//! What a service manager sees: readiness, reload, stop, exit codes; and what the environment says.

use std::os::unix::net::UnixDatagram;

use rustix::process::Signal;

use super::*;

/// A notify socket, as systemd has one.
struct Notified(UnixDatagram);

impl Notified {
    fn bind(bus: &Bus) -> (Self, PathBuf) {
        let path = bus.dir().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        (Self(socket), path)
    }

    /// The next message that tells of a change of state, as lines.
    async fn next(&self) -> Vec<String> {
        loop {
            let message = self.any().await;
            if message.len() > 1 || !(message[0].starts_with("STATUS=") || message[0] == "WATCHDOG=1") {
                return message;
            }
        }
    }

    /// Waits for a message that is this line alone.
    async fn until(&self, line: &str) {
        while self.any().await != [line] {}
    }

    /// The lines that come within `time`.
    fn within(&self, time: Duration) -> Vec<String> {
        self.0.set_read_timeout(Some(time)).unwrap();
        let (end, mut bytes) = (std::time::Instant::now() + time, [0; 4096]);
        let mut lines = Vec::new();
        while std::time::Instant::now() < end {
            let Ok(length) = self.0.recv(&mut bytes) else { break };
            lines.extend(String::from_utf8(bytes[..length].to_vec()).unwrap().lines().map(str::to_owned));
        }
        self.0.set_read_timeout(Some(DEADLINE)).unwrap();
        lines
    }

    /// The next message, as lines.
    async fn any(&self) -> Vec<String> {
        let socket = self.0.try_clone().unwrap();
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = [0; 4096];
            let length = socket.recv(&mut bytes).expect("a message in time");
            String::from_utf8(bytes[..length].to_vec()).unwrap()
        });
        read.await.unwrap().lines().map(str::to_owned).collect()
    }
}

fn says(message: &[String], line: &str) -> bool {
    message.iter().any(|found| found == line)
}

async fn has_owner(connection: &Connection) -> bool {
    let bus = "org.freedesktop.DBus";
    let reply = connection.call_method(Some(bus), "/org/freedesktop/DBus", Some(bus), "NameHasOwner", &NAME).await.unwrap();
    reply.body().deserialize().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_watchdog_is_fed_by_a_daemon_that_answers_and_by_no_other() {
    let Some(bus) = bus_or_skip() else { return };
    let (notified, path) = Notified::bind(&bus);
    let plan = Plan::loopback("a", &[]).with("NOTIFY_SOCKET", &path).with("WATCHDOG_USEC", Path::new("400000"));
    let node = Node::on(bus, plan);
    for _ in 0..3 {
        notified.until("WATCHDOG=1").await;
    }
    // The bus does not answer: the daemon may be well, but nobody can reach it.
    node.bus.signal(Signal::STOP);
    let _ = notified.within(Duration::from_millis(400));
    let fed = notified.within(Duration::from_secs(2));
    node.bus.signal(Signal::CONT);
    assert!(!fed.iter().any(|line| line == "WATCHDOG=1"), "{fed:?}");
    notified.until("WATCHDOG=1").await;
    assert!(node.log().contains("no answer from bus"), "{}", node.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_line_says_where_the_node_is() {
    let Some(bus) = bus_or_skip() else { return };
    let (notified, path) = Notified::bind(&bus);
    let mut node = Node::on(bus, Plan::loopback("a", &[]).with("NOTIFY_SOCKET", &path));
    let first = notified.next().await;
    assert!(says(&first, "STATUS=In no cluster; join one with: ogctl connect CLUSTER"), "{first:?}");
    assert_eq!(node.ogctl(&["connect", "home", "--serve", "--wait", "0"]).await.code, 0);
    notified.until("STATUS=home: 0 peers, serving, looking for peers").await;
    node.signal(Signal::TERM);
    let stopping = notified.next().await;
    assert!(says(&stopping, "STOPPING=1") && says(&stopping, "EXTEND_TIMEOUT_USEC=35000000"), "{stopping:?}");
    assert_eq!(node.ended().await, Some(0));
}

#[tokio::test]
async fn the_log_level_is_set_over_the_bus_and_by_a_reload() {
    let Some(bus) = bus_or_skip() else { return };
    let config = bus.dir().join("opengatewayd.toml");
    std::fs::write(&config, "").unwrap();
    let node = Node::start_on(bus, "a", &["--config", config.to_str().unwrap()]).await;
    let connection = node.bus.connect().await;
    let (path, properties, of) =
        ("/org/freedesktop/LogControl1", Some("org.freedesktop.DBus.Properties"), "org.freedesktop.LogControl1");
    let level = async || {
        let reply = connection.call_method(Some(NAME), path, properties, "Get", &(of, "LogLevel")).await.unwrap();
        String::try_from(reply.body().deserialize::<zbus::OwnedVariant>().unwrap()).unwrap()
    };
    let set = async |name: &str, value: &str| {
        let value = zbus::Variant::from(value);
        let set = connection.call_method(Some(NAME), path, properties, "Set", &(of, name, value)).await;
        set.map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(level().await, "info");
    set("LogLevel", "debug").await.unwrap();
    assert_eq!(level().await, "debug");
    assert!(set("LogLevel", "loud").await.unwrap_err().contains("emerg, alert"));
    assert!(set("LogTarget", "kmsg").await.unwrap_err().contains("console"));
    std::fs::write(&config, "[log]\nlevel = \"error\"\n").unwrap();
    call(&connection, "Reload", &()).await.unwrap();
    assert_eq!(level().await, "err");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_manager_is_told_ready_reloading_and_stopping_in_this_order() {
    let Some(bus) = bus_or_skip() else { return };
    let (notified, path) = Notified::bind(&bus);
    let mut node = Node::on(bus, Plan::loopback("a", &["--connect", "gatewayai-poc"]).with("NOTIFY_SOCKET", &path));
    let first = notified.next().await;
    assert!(says(&first, "READY=1") && first.iter().any(|line| line.starts_with("STATUS=")), "{first:?}");
    let connection = node.bus.connect().await;
    assert!(has_owner(&connection).await, "the name comes before READY");
    for how in ["signal", "method"] {
        match how {
            "signal" => node.signal(Signal::HUP),
            _ => drop(call(&connection, "Reload", &()).await.unwrap()),
        }
        let reloading = notified.next().await;
        assert!(
            says(&reloading, "RELOADING=1") && reloading.iter().any(|line| line.starts_with("MONOTONIC_USEC=")),
            "{how}: {reloading:?}"
        );
        assert!(says(&notified.next().await, "READY=1"), "{how}");
    }
    let mut signals = MessageStream::for_match_rule(
        zbus::MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender(NAME)
            .member("PrepareForShutdown")
            .build()
            .unwrap(),
        &connection,
        None,
    )
    .await
    .unwrap();
    node.signal(Signal::TERM);
    let stopping = notified.next().await;
    assert!(says(&stopping, "STOPPING=1") && stopping.iter().any(|line| line.starts_with("STATUS=")), "{stopping:?}");
    let told = tokio::time::timeout(DEADLINE, futures::StreamExt::next(&mut signals)).await.unwrap();
    assert!(told.unwrap().unwrap().body().deserialize::<bool>().unwrap());
    assert_eq!(node.ended().await, Some(0));
    assert!(!has_owner(&connection).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_the_name_finds_everything_behind_it() {
    use futures::StreamExt as _;
    let Some(bus) = bus_or_skip() else { return };
    let connection = bus.connect().await;
    let rule =
        zbus::MatchRule::builder().sender("org.freedesktop.DBus").member("NameOwnerChanged").add_arg(NAME).build().unwrap();
    let mut owners = MessageStream::for_match_rule(rule, &connection, None).await.unwrap();
    for _ in 0..5 {
        let mut child = Plan::loopback("a", &["--serve", "--connect", "gatewayai-poc"]).command(&bus).spawn().unwrap();
        let came = async {
            while owners.next().await.unwrap().unwrap().body().deserialize::<(String, String, String)>().unwrap().2.is_empty() {}
        };
        tokio::time::timeout(DEADLINE, came).await.unwrap();
        // At once, all together: a reply or a refusal of the service's own, never "no such object".
        let none = Options::new;
        let ask = async |method: &'static str, reply: Result<Message, (String, String)>| {
            if let Err((name, message)) = reply {
                panic!("{method}: {name}: {message}");
            }
        };
        let on = &connection;
        tokio::join!(
            async { ask("GetStatus", call(on, "GetStatus", &()).await).await },
            async { ask("ListClusters", call(on, "ListClusters", &()).await).await },
            async { ask("ListPeers", call(on, "ListPeers", &("", none())).await).await },
            async { ask("GetResources", call(on, "GetResources", &(none(),)).await).await },
            async { ask("ListEligible", call(on, "ListEligible", &(none(),)).await).await },
            async { ask("ListJobs", call(on, "ListJobs", &()).await).await },
            async { ask("Prompt", call(on, "Prompt", &("gatewayai-poc", "x", none())).await).await },
            async { ask("StartPrompt", call(on, "StartPrompt", &("gatewayai-poc", "x", none())).await).await },
            async { ask("Connect", call(on, "Connect", &("other", none())).await).await },
            async { ask("SetSharing", call(on, "SetSharing", &(true, none())).await).await },
            async { ask("Reload", call(on, "Reload", &()).await).await },
            async {
                let cluster = "/org/opengateway/Gateway1/cluster/gatewayai_2dpoc";
                for (path, interface, member) in [
                    (ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"),
                    (cluster, "org.freedesktop.DBus.Peer", "Ping"),
                ] {
                    on.call_method(Some(NAME), path, Some(interface), member, &()).await.unwrap();
                }
                let all = ("org.opengateway.Gateway1.Cluster",);
                on.call_method(Some(NAME), cluster, Some("org.freedesktop.DBus.Properties"), "GetAll", &all).await.unwrap();
            },
        );
        call(on, "Disconnect", &("other", none())).await.unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_environment_says_what_the_document_says_and_the_prompt_is_not_for_the_daemon() {
    let Some(bus) = bus_or_skip() else { return };
    let root = bus.dir().join("root");
    std::fs::create_dir_all(root.join("config")).unwrap();
    std::fs::write(root.join("config/opengatewayd.toml"), "[serve]\nenabled = true\n").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_opengatewayd"));
    let log = std::fs::File::create(bus.dir().join("daemon.log")).unwrap();
    command.args(["--bus", bus.address(), "--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--no-mdns", "--no-discover"]).stderr(log);
    command.env("NODE_NAME", "Named").env("POC_CLUSTER_ID", "room").env("POC_SERVE", "0").env("OPENGATEWAY_POC_ROOT", &root);
    command
        .env("OPENGATEWAY_BOOTSTRAP", "/ip4/127.0.0.1/udp/9/quic-v1,/ip4/127.0.0.1/udp/10/quic-v1")
        .env("POC_PROMPT", "canary-3b7");
    command.env_remove("NOTIFY_SOCKET").env_remove("JOURNAL_STREAM");
    let child = command.spawn().unwrap();
    let mut node = Node::of(bus, child, Plan::loopback("", &[]));
    node.ready().await;
    let status = node.json(&["status"]).await;
    assert_eq!((&status["node_name"], &status["sharing"]), (&Value::from("Named"), &Value::from(false)));
    assert_eq!(status["clusters"][0]["id"], "room");
    assert!(root.join("state/identity.key").exists());
    assert_eq!(status["jobs"], 0);
    node.signal(Signal::TERM);
    assert_eq!(node.ended().await, Some(0));
    assert!(!node.log().contains("canary-3b7"));
    // A mistake in it is a mistake in the configuration.
    let output = command.env("POC_SERVE", "perhaps").stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(78) && said.contains("POC_SERVE") && said.contains("neither 1 nor 0"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_waits_for_a_silent_bus_can_be_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let bus = directory.path().join("bus");
    let listener = std::os::unix::net::UnixListener::bind(&bus).unwrap();
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_opengatewayd"))
        .args(["--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--no-mdns", "--no-discover", "--bus"])
        .arg(format!("unix:path={}", bus.display()))
        .env("OPENGATEWAY_POC_ROOT", directory.path().join("root"))
        .env_remove("NOTIFY_SOCKET")
        .env_remove("JOURNAL_STREAM")
        .spawn()
        .unwrap();
    // It is waiting when it has said its first word, and nothing is ever said to it.
    let (_connection, _) = tokio::task::spawn_blocking(move || listener.accept().unwrap()).await.unwrap();
    let pid = rustix::process::Pid::from_child(&daemon);
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    let ended = tokio::task::spawn_blocking(move || daemon.wait().unwrap());
    let code = tokio::time::timeout(DEADLINE, ended).await.expect("it ends").unwrap().code();
    assert_eq!(code, Some(0));
}

#[tokio::test]
async fn exit_codes_tell_a_mistake_of_the_command_line_from_one_of_the_machine() {
    let Some(bus) = bus_or_skip() else { return };
    let run = |change: &dyn Fn(&mut Command)| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_opengatewayd"));
        command.args(["--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--no-mdns", "--no-discover"]);
        command.env("OPENGATEWAY_POC_ROOT", bus.dir().join("codes"));
        command.env_remove("NOTIFY_SOCKET").env_remove("JOURNAL_STREAM");
        change(&mut command);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = run(&|command| _ = command.arg("--nonsense"));
    assert!(code == Some(2) && said.contains("--nonsense"), "{said}");
    let (code, said) = run(&|command| _ = command.args(["--bus", "nonsense"]));
    assert!(code == Some(2) && said.contains("nonsense"), "{said}");
    let (code, said) = run(&|command| _ = command.args(["--bus", "unix:path=/nonexistent/bus"]));
    assert!(code == Some(1) && said.contains("cannot connect to the bus"), "{said}");
    let (code, said) = run(&|command| _ = command.args(["--bus", bus.address(), "--connect", "../x"]));
    assert!(code == Some(78) && said.contains("../x"), "{said}");
    let (code, said) = run(&|command| _ = command.args(["--bus", bus.address(), "--config", "/nonexistent/c.toml"]));
    assert!(code == Some(78) && said.contains("/nonexistent/c.toml"), "{said}");
    let (code, said) = run(&|command| _ = command.args(["--bus", bus.address(), "--state-dir", "/proc/nonexistent"]));
    assert!(code == Some(1) && said.contains("/proc/nonexistent"), "{said}");
}
