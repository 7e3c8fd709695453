//! Clients that go away or do not read.

use super::*;

/// The time from a client's going to the cancelling, at most.
const SOON: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_client_that_is_gone_cancels_its_prompt_at_once_wherever_it_is() {
    let mut endpoint = Endpoint::start().await;
    for streamed in [false, true] {
        for stage in 0..4 {
            for reset in [false, true] {
                let mut stream = endpoint.connect().await;
                let body = chat_body(&json!({"stream": streamed})).to_string();
                stream.write_all(endpoint.request("POST", "/v1/chat/completions", "", &body).as_bytes()).await.unwrap();
                let start = endpoint.started().await;
                let all = vec![JobEvent::Queued { position: 1 }, started_by("NodeA"), JobEvent::Text("4".into())];
                play(&start, all.into_iter().take(stage).collect()).await;
                if streamed && stage > 1 {
                    let mut byte = [0];
                    within(stream.read_exact(&mut byte)).await.unwrap();
                }
                assert!(!start.events.is_closed());
                let began = Instant::now();
                if reset {
                    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
                }
                drop(stream);
                within(start.events.closed()).await;
                assert!(began.elapsed() < SOON, "streamed {streamed}, stage {stage}, reset {reset}: {:?}", began.elapsed());
                until("it is counted out", || endpoint.handle.active() == 0).await;
            }
        }
    }
}

#[tokio::test]
async fn a_client_that_reads_nothing_pauses_its_answer_and_is_given_up() {
    let mut endpoint = Endpoint::start().await;
    let stream = endpoint.connect().await;
    rustix::net::sockopt::set_socket_recv_buffer_size(&stream, 4096).unwrap();
    let mut stream = stream;
    let body = chat_body(&json!({"stream": true})).to_string();
    stream.write_all(endpoint.request("POST", "/v1/chat/completions", "", &body).as_bytes()).await.unwrap();
    let start = endpoint.started().await;
    play(&start, vec![started_by("NodeA")]).await;
    // Sends until nobody takes more.
    let (mut sent, mut stuck_at) = (0_usize, None);
    let began = Instant::now();
    while stuck_at.is_none() {
        match tokio::time::timeout(Duration::from_secs(2), start.events.send(JobEvent::Text("x".repeat(16 * 1024)))).await {
            Ok(sending) => {
                sending.unwrap();
                sent += 16 * 1024;
                assert!(sent < 64 << 20, "nothing holds it back");
            }
            Err(_) => stuck_at = Some(Instant::now()),
        }
    }
    assert!(began.elapsed() < Duration::from_secs(20));
    tokio::time::timeout(Duration::from_secs(35), start.events.closed()).await.expect("it is given up after 30 s");
    drop(stream);
}
