//! The real daemon with its endpoint, and the real `ogctl`.

use std::ffi::OsStr;
use std::path::Path;

use super::*;
use crate::common::bus::{bus_or_skip, ogctl_on};
use crate::common::node::{Node, Plan, skipped};

/// Where the endpoint of a node is.
async fn address(node: &Node) -> SocketAddr {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let status = node.json(&["status"]).await;
        if let Some(url) = status["http"][0].as_str() {
            return url.strip_prefix("http://").unwrap().strip_suffix("/v1").unwrap().parse().unwrap();
        }
        assert!(Instant::now() < deadline, "{status}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn ask(address: SocketAddr, key: &str, body: &Value) -> Option<Reply> {
    let body = body.to_string();
    let length = body.len();
    let mut stream = within(TcpStream::connect(address)).await.ok()?;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    within(stream.write_all(request.as_bytes())).await.ok()?;
    within(response(&mut stream, true)).await
}

fn question(text: &str, more: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": text}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn the_echo_answers_over_http_with_the_key_that_ogctl_gives() {
    let Some(node) = Node::start("a", &["--http", "127.0.0.1:0"]).await else { return };
    let address = address(&node).await;
    let home = node.bus.dir().join("home");
    let ogctl = async |args: &[&str]| {
        let out = ogctl_on(&node.bus, args).env("HOME", &home).env_remove("XDG_CONFIG_HOME").output().await.unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let file = ogctl(&["key"]).await;
    assert_eq!(Path::new(file.trim()), home.join(".config/opengateway/api-key"));
    let key = std::fs::read_to_string(file.trim()).unwrap().trim().to_owned();
    assert_eq!(ogctl(&["key", "--print"]).await.trim(), key);
    let env = ogctl(&["env"]).await;
    assert_eq!(env, format!("export OPENAI_BASE_URL=http://{address}/v1\nexport OPENAI_API_KEY={key}\n"));
    assert!(ogctl(&["env", "--shell", "fish"]).await.starts_with("set -gx OPENAI_BASE_URL http://"));
    let json: Value = serde_json::from_str(&ogctl(&["env", "--json"]).await).unwrap();
    assert_eq!(json["OPENAI_API_KEY"], *key);
    let reply = ask(address, &key, &question("what is 2+2", &json!({}))).await.unwrap();
    assert_eq!((reply.status, &reply.json()["choices"][0]["message"]["content"]), (200, &json!("what is 2+2")));
    assert_eq!((reply.header("x-opengateway-served-by"), reply.header("x-opengateway-model")), (Some("a"), Some("echo")));
    let renewed = ogctl(&["key", "--renew", "--print"]).await;
    assert_eq!(ask(address, &key, &question("x", &json!({}))).await.unwrap().status, 401);
    assert_eq!(ask(address, renewed.trim(), &question("x", &json!({}))).await.unwrap().status, 200);
    assert!(!node.log().contains(&key) && !node.log().contains("2+2"));
}

#[tokio::test]
async fn without_an_endpoint_ogctl_says_how_to_switch_it_on() {
    let Some(node) = Node::start("a", &[]).await else { return };
    let said = node.ogctl(&["env"]).await;
    assert!(
        said.code == 1 && said.stderr.contains("opengatewayd-http.socket") && said.stderr.contains("[http]"),
        "{}",
        said.stderr
    );
    assert_eq!(node.json(&["status"]).await["http"], json!([]));
    assert!(!node.bus.dir().join("state/http.secret").exists());
}

#[tokio::test]
async fn a_member_answers_over_http_and_is_named() {
    let Some(server) = Node::start("NodeA", &["--connect", "lab", "--serve"]).await else { return };
    let bootstrap = server.address().await;
    let args = ["--connect", "lab", "--consume", "--bootstrap", &bootstrap, "--http", "127.0.0.1:0"];
    let Some(client) = Node::start("NodeC", &args).await else { return };
    let address = address(&client).await;
    let key = client.ogctl(&["key", "--print"]).await.stdout.trim().to_owned();
    let deadline = Instant::now() + DEADLINE;
    let reply = loop {
        let reply = ask(address, &key, &question("hello there", &json!({"model": "echo@NodeA", "stream": true}))).await.unwrap();
        if reply.status == 200 {
            break reply;
        }
        assert!(Instant::now() < deadline, "{}", reply.text());
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(reply.header("x-opengateway-served-by"), Some("NodeA"));
    assert!(reply.text().ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn two_hundred_and_fifty_six_at_once_are_all_answered_or_told_to_come_back() {
    let Some(node) = Node::start("a", &["--http", "127.0.0.1:0"]).await else { return };
    let address = address(&node).await;
    let key = node.ogctl(&["key", "--print"]).await.stdout.trim().to_owned();
    let asking: Vec<_> = (0..256)
        .map(|number| {
            let key = key.clone();
            tokio::spawn(async move {
                let text = format!("prompt number {number}");
                loop {
                    // A client: it tries again when it is told to.
                    match ask(address, &key, &question(&text, &json!({}))).await {
                        Some(reply) if reply.status == 200 => {
                            assert_eq!(reply.json()["choices"][0]["message"]["content"], *text);
                            return;
                        }
                        Some(reply) => assert!([429, 503].contains(&reply.status), "{}", reply.text()),
                        None => {}
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
        })
        .collect();
    for task in asking {
        within(task).await.unwrap();
    }
}

/// Becomes the daemon with a listening socket as systemd passes it.
const ACTIVATE: &str = "import os, socket, sys
s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(8)
open(sys.argv[1], 'w').write(str(s.getsockname()[1]))
os.dup2(s.fileno(), 3); os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])";

#[tokio::test]
async fn a_socket_that_the_service_manager_passes_is_served() {
    if std::process::Command::new("python3").arg("--version").output().is_err() {
        return skipped("there is no python3 to pass a socket");
    }
    let dir = tempfile::tempdir().unwrap();
    let port = dir.path().join("port");
    let words = |name: &'static str| {
        [OsStr::new("python3"), OsStr::new("-c"), OsStr::new(ACTIVATE), port.as_os_str(), OsStr::new(name)].map(OsStr::to_owned)
    };
    for (name, served) in [("http", true), ("p2p", false)] {
        let words = words(name);
        let plan = Plan::loopback("a", &[]).under(&words.iter().map(|word| word.as_os_str()).collect::<Vec<_>>());
        let Some(bus) = bus_or_skip() else { return };
        let mut node = Node::on(bus, plan);
        node.ready().await;
        let port: u16 = std::fs::read_to_string(&port).unwrap().parse().unwrap();
        let status = node.json(&["status"]).await;
        if !served {
            assert_eq!(status["http"], json!([]), "another's socket is left alone");
            continue;
        }
        assert_eq!(address(&node).await.port(), port);
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        assert_eq!(within(response(&mut stream, true)).await.unwrap().json()["status"], "echo-only");
    }
}
