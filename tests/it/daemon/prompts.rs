//! Prompts whose callers misbehave.

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
    std::fs::write(&config, format!("[[backend]]\nkind = \"openai\"\nurl = \"http://127.0.0.1:{port}/v1\"\nslots = 1\n")).unwrap();
    let args = vec!["--config".to_owned(), config.to_str().unwrap().to_owned(), "--connect".to_owned(), "gatewayai-poc".to_owned()];
    let child = launch(&bus, "a", &bus.dir().join("state"), &args);
    let mut node = Node { bus, child, name: "a".to_owned(), args };
    node.ready().await;
    node.until(&["status"], |status| status["backend"].as_str().is_some_and(|name| name.starts_with("openai"))).await;
    for how in ["interrupt", "kill", "cancel"] {
        let mut child = ogctl_on(&node.bus, &["prompt", "x", "--model", "slow"]).spawn().unwrap();
        let jobs = node.until(&["jobs"], |jobs| jobs["jobs"].as_array().is_some_and(|jobs| jobs.iter().any(|job| job["state"] == "queued"))).await;
        let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
        match how {
            "interrupt" => {
                rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
                assert_eq!(child.wait().await.unwrap().code(), Some(130));
            }
            "kill" => child.kill().await.unwrap(),
            _ => {
                let id = jobs["jobs"].as_array().unwrap().iter().find(|job| job["state"] == "queued").unwrap()["id"].as_u64().unwrap();
                let connection = node.bus.connect().await;
                let path = format!("/org/opengateway/Gateway1/job/{id}");
                connection.call_method(Some(NAME), path, Some("org.opengateway.Gateway1.Job"), "Cancel", &()).await.unwrap();
                assert_eq!(child.wait().await.unwrap().code(), Some(1));
            }
        }
        tokio::time::timeout(Duration::from_secs(5), closed.recv()).await.unwrap_or_else(|_| panic!("{how}: the upstream is still connected"));
    }
}
