//! Servers on this machine appear and disappear by themselves, and nothing else does.

use std::time::Duration;

use opengateway::domain::node::Offer;
use opengateway::domain::upstream::Api;
use opengateway::serve::discover::{self, Config, Place, Timings};
use opengateway::serve::{self, Handle};
use tokio::sync::watch;
use tokio::time::timeout;

use super::DEADLINE;
use super::llama_server::llama_server;
use super::lm_studio::lm_studio;
use super::ollama::ollama;
use super::stand::{Asked, Reply, Stand};
use super::vllm::vllm;

const TIMINGS: Timings = Timings {
    look: Duration::from_millis(50),
    seldom: Duration::from_millis(100),
    patience: 100,
    stranger: Duration::from_millis(300),
    gone: Duration::from_millis(200),
};

fn serving() -> Handle {
    let (_tiers, tiers) = watch::channel(Vec::new());
    serve::spawn(serve::Config { backends: vec![std::sync::Arc::new(serve::Echo::default())], tiers }).0
}

fn look(serve: &Handle, port: u16, candidates: &[Api], configured: Vec<String>) -> tokio::task::JoinHandle<()> {
    let places = vec![Place { port, candidates: candidates.to_vec() }];
    discover::start(serve.clone(), Config { places, configured, timings: TIMINGS })
}

async fn until(serve: &Handle, wanted: impl FnMut(&Offer) -> bool) {
    timeout(DEADLINE, serve.offer().wait_for(wanted)).await.expect("in time").unwrap();
}

fn has_model(offer: &Offer) -> bool {
    offer.models.len() > 1
}

/// All kinds are asked for; each finds its own.
#[tokio::test]
async fn a_server_appears_with_its_slots() {
    let kinds: [(Api, fn(&Asked) -> Reply, u16); 4] =
        [(Api::Ollama, ollama, 4), (Api::LlamaServer, llama_server, 2), (Api::Vllm, vllm, 32), (Api::LmStudio, lm_studio, 4)];
    for (api, answer, slots) in kinds {
        let serve = serving();
        let stand = Stand::start(answer).await;
        let looking = look(&serve, stand.port, &Api::ALL, Vec::new());
        until(&serve, |offer| has_model(offer) && offer.free_slots == slots).await;
        assert_eq!(serve.backends().0, format!("{} at http://127.0.0.1:{}", api.as_str(), stand.port));
        assert_eq!(serve.backends().1, Vec::<String>::new(), "and there is no problem");
        looking.abort();
    }
}

#[tokio::test]
async fn one_that_ends_is_dropped_and_one_that_comes_back_is_found_again() {
    let serve = serving();
    let stand = Stand::start(llama_server).await;
    let port = stand.port;
    let _looking = look(&serve, port, &[Api::LlamaServer], Vec::new());
    until(&serve, has_model).await;
    drop(stand);
    // Its backend notices when a prompt fails.
    let (events, mut ended) = tokio::sync::mpsc::channel(64);
    let prompt = serve::Served { requester: serve::Requester::Local(0), ask: super::ask("x"), timeout: DEADLINE, events };
    serve.submit(prompt).unwrap();
    while timeout(DEADLINE, ended.recv()).await.expect("an outcome").is_some() {}
    until(&serve, |offer| !has_model(offer)).await;
    let begun = std::time::Instant::now();
    while !serve.backends().1.is_empty() {
        assert!(begun.elapsed() < DEADLINE, "{:?}", serve.backends());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let _stand = Stand::listen(format!("127.0.0.1:{port}").parse().unwrap(), None, llama_server).await;
    until(&serve, has_model).await;
}

#[tokio::test]
async fn something_else_on_the_port_is_asked_seldom_and_never_taken() {
    let pages: [fn(&Asked) -> Reply; 5] = [
        |_| Reply::Raw("SSH-2.0-OpenSSH_9.2p1\r\n".to_owned()),
        |_| Reply::Raw("HTTP/1.1 200 OK\r\ncontent-type: text/html\r\n\r\n<html>Jenkins</html>".to_owned()),
        |_| Reply::ok(r#"{"status":"ok","version":"1.2.3","data":[],"models":7}"#),
        |_| Reply::Close,
        // An OpenAI endpoint of no known kind: it may be anything, this program's own too.
        |asked| {
            if asked.path == "/v1/models" {
                Reply::ok(r#"{"object":"list","data":[{"id":"m","owned_by":"opengateway"}]}"#)
            } else {
                Reply::not_found()
            }
        },
    ];
    for page in pages {
        let serve = serving();
        let stand = Stand::start(page).await;
        let looking = look(&serve, stand.port, &Api::ALL, Vec::new());
        let begun = std::time::Instant::now();
        while stand.asked("").is_empty() {
            assert!(begun.elapsed() < DEADLINE);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Some looks later it was asked once: the questions of all kinds, twice for none.
        let connections = stand.connections();
        while stand.connections() < connections + 3 && begun.elapsed() < Duration::from_secs(2) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(!has_model(&serve.offer().borrow()));
        assert_eq!(serve.backends().0, "echo");
        looking.abort();
    }
}

#[tokio::test]
async fn what_the_configuration_names_is_not_found_a_second_time() {
    for host in ["127.0.0.1", "localhost", "[::1]"] {
        let serve = serving();
        let stand = Stand::start(llama_server).await;
        let configured = vec![format!("http://{host}:{}/v1", stand.port)];
        let other = Stand::start(llama_server).await;
        let places = [stand.port, other.port].map(|port| Place { port, candidates: vec![Api::LlamaServer] }).to_vec();
        let looking = discover::start(serve.clone(), Config { places, configured, timings: TIMINGS });
        // The other one is found, by which time this one would have been.
        until(&serve, has_model).await;
        assert_eq!(stand.connections(), 0, "{host}");
        looking.abort();
    }
}

#[tokio::test]
async fn a_server_on_the_ipv6_loopback_is_found() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return super::super::common::node::skipped("this machine has no IPv6 loopback");
    }
    let serve = serving();
    let stand = Stand::listen("[::1]:0".parse().unwrap(), None, ollama).await;
    let _looking = look(&serve, stand.port, &[Api::Ollama], Vec::new());
    until(&serve, has_model).await;
    assert_eq!(serve.backends().0, format!("ollama at http://[::1]:{}", stand.port));
}
