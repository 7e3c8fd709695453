//! Connections are kept, replaced when they are dead, and closed when an answer is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use opengateway::domain::prompt::FailureKind;
use opengateway::domain::upstream::Api;
use opengateway::serve::backend::Backend as _;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::stand::{Reply, Stand};
use super::{DEADLINE, answer, ask, backend, models};

const LIST: &str = r#"{"object":"list","data":[{"id":"m"}]}"#;

async fn stand(chat: impl Fn() -> Reply + Send + Sync + 'static) -> Stand {
    Stand::start(move |asked| if asked.path.ends_with("/models") { Reply::ok(LIST) } else { chat() }).await
}

#[tokio::test]
async fn a_hundred_prompts_one_after_the_other_use_one_connection() {
    let stand = stand(Reply::four).await;
    let backend = backend(&stand.url(), Some(Api::OpenAi));
    models(&backend).await;
    for _ in 0..100 {
        assert_eq!(answer(&backend, "m", ask("What is 2+2?")).await.unwrap().0, "4");
    }
    assert_eq!((stand.connections(), backend.connections()), (1, 1), "the look's connection served all of them");
}

#[tokio::test]
async fn prompts_at_once_have_a_connection_each_and_no_more_than_that_are_kept() {
    let stand = stand(Reply::four).await;
    let backend = backend(&stand.url(), Some(Api::OpenAi));
    models(&backend).await;
    for _ in 0..10 {
        let all = (0..8).map(|_| answer(&backend, "m", ask("What is 2+2?")));
        for outcome in futures::future::join_all(all).await {
            assert_eq!(outcome.unwrap().0, "4");
        }
    }
    assert!(stand.connections() <= 9, "{}", stand.connections());
}

#[tokio::test]
async fn an_error_does_not_cost_the_connection() {
    let stand = stand(|| Reply::Json(400, r#"{"error":{"message":"no"}}"#.to_owned())).await;
    let backend = backend(&stand.url(), Some(Api::OpenAi));
    models(&backend).await;
    for _ in 0..5 {
        assert_eq!(answer(&backend, "m", ask("x")).await.unwrap_err().kind, FailureKind::InvalidRequest);
    }
    assert_eq!(stand.connections(), 1);
}

#[tokio::test]
async fn a_connection_that_died_idle_is_replaced_unseen() {
    let idle = Some(Duration::from_millis(50));
    let chat = |asked: &super::stand::Asked| if asked.path.ends_with("/models") { Reply::ok(LIST) } else { Reply::four() };
    let stand = Stand::listen("127.0.0.1:0".parse().unwrap(), idle, chat).await;
    let backend = backend(&stand.url(), Some(Api::OpenAi));
    models(&backend).await;
    for round in 2..5 {
        // Longer than the server keeps it.
        sleep(Duration::from_millis(120)).await;
        assert_eq!(answer(&backend, "m", ask("x")).await.unwrap().0, "4");
        assert_eq!(stand.connections(), round);
    }
}

#[tokio::test]
async fn a_connection_that_is_closed_in_the_face_of_a_request_is_tried_once_more() {
    // Every second prompt finds its connection closed, as when the server's patience ended at that moment.
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let stand = stand(move || if counted.fetch_add(1, Ordering::SeqCst) % 2 == 0 { Reply::Close } else { Reply::four() }).await;
    let backend = backend(&stand.url(), Some(Api::OpenAi));
    models(&backend).await;
    assert_eq!(answer(&backend, "m", ask("x")).await.unwrap().0, "4");
    assert_eq!((count.load(Ordering::SeqCst), stand.connections()), (2, 2));
}

#[tokio::test]
async fn a_server_that_closes_every_connection_is_asked_twice_and_not_for_ever() {
    let stand = stand(|| Reply::Close).await;
    let backend = backend(&stand.url(), Some(Api::OpenAi));
    models(&backend).await;
    assert_eq!(answer(&backend, "m", ask("x")).await.unwrap_err().kind, FailureKind::BackendFailed);
    assert_eq!(stand.asked("POST").len(), 2);
}

#[tokio::test]
async fn dropping_an_answer_frees_the_slot_of_the_server_within_a_second() {
    let stand = stand(|| Reply::Hang).await;
    let backend = backend(&stand.url(), Some(Api::OpenAi));
    models(&backend).await;
    for _ in 0..3 {
        let (out, _pieces) = mpsc::channel(4);
        let mut answering = backend.answer("m".to_owned(), ask("x"), out);
        let begun = Instant::now();
        while stand.busy() == 0 {
            assert!(timeout(Duration::from_millis(5), &mut answering).await.is_err() && begun.elapsed() < DEADLINE);
        }
        drop(answering);
        let begun = Instant::now();
        while stand.busy() > 0 {
            assert!(begun.elapsed() < Duration::from_secs(1), "the slot is free within a second");
            sleep(Duration::from_millis(2)).await;
        }
    }
}
