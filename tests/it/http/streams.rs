//! Answers as server-sent events.

use opengateway::domain::prompt::FailureKind;

use super::*;

async fn begin(endpoint: &mut Endpoint, more: &Value) -> (TcpStream, Start) {
    let mut body = chat_body(&json!({"stream": true}));
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let mut stream = endpoint.connect().await;
    stream.write_all(endpoint.request("POST", "/v1/chat/completions", "", &body.to_string()).as_bytes()).await.unwrap();
    (stream, endpoint.started().await)
}

/// The events of a stream without their "data: ".
fn events(reply: &Reply) -> Vec<&str> {
    reply.text().split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap_or(event)).collect()
}

#[tokio::test]
async fn a_stream_has_role_text_finish_usage_and_its_end() {
    let mut endpoint = Endpoint::start().await;
    for usage in [true, false] {
        let (mut stream, start) = begin(&mut endpoint, &json!({"stream_options": {"include_usage": usage}})).await;
        play(&start, vec![started_by("NodeA"), JobEvent::Text("4".into()), JobEvent::Text("\n😀".into()), done()]).await;
        let reply = within(response(&mut stream, true)).await.unwrap();
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("text/event-stream")));
        assert_eq!(
            (reply.header("x-opengateway-served-by"), reply.header("x-opengateway-model")),
            (Some("NodeA"), Some("llama"))
        );
        let mut events = events(&reply);
        assert_eq!(events.pop(), Some("[DONE]"));
        let chunks: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
        let deltas: Vec<&Value> = chunks[..4].iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
        let wanted =
            [json!({"role": "assistant", "content": ""}), json!({"content": "4"}), json!({"content": "\n😀"}), json!({})];
        assert_eq!(deltas, wanted.iter().collect::<Vec<_>>());
        assert_eq!(chunks[3]["choices"][0]["finish_reason"], "stop");
        assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["created"] == chunks[0]["created"]));
        assert_eq!(chunks.get(4).map(|chunk| &chunk["usage"]["total_tokens"]), usage.then_some(&json!(9)));
        // The connection goes on.
        stream.write_all(endpoint.request("GET", "/v1/models", "", "").as_bytes()).await.unwrap();
        assert_eq!(within(response(&mut stream, true)).await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn a_failure_after_the_first_text_is_an_event_and_there_is_no_end_mark() {
    let mut endpoint = Endpoint::start().await;
    let (mut stream, start) = begin(&mut endpoint, &json!({})).await;
    let lost = failed(Failure::new(FailureKind::Interrupted, "the node was lost"));
    play(&start, vec![started_by("NodeA"), JobEvent::Text("4".into()), lost]).await;
    let reply = within(response(&mut stream, true)).await.unwrap();
    let events = events(&reply);
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!((reply.status, &last["error"]["code"]), (200, &json!("interrupted")));
    assert!(!reply.text().contains("[DONE]"));
    // The dispatcher that vanishes is an error too, never a short answer.
    let (mut stream, start) = begin(&mut endpoint, &json!({})).await;
    play(&start, vec![started_by("NodeA"), JobEvent::Text("4".into())]).await;
    drop(start);
    let reply = within(response(&mut stream, true)).await.unwrap();
    assert!(reply.text().contains("\"shutting_down\"") && !reply.text().contains("[DONE]"));
}

#[tokio::test]
async fn who_waits_is_told_its_place_and_then_who_serves() {
    let mut endpoint = Endpoint::start().await;
    let (mut stream, start) = begin(&mut endpoint, &json!({})).await;
    play(&start, vec![JobEvent::Queued { position: 3 }]).await;
    // After a second the headers come, though nobody has taken the prompt up.
    let mut head = Vec::new();
    within(async {
        while !head.ends_with(b": queued 3\n\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
    })
    .await;
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 200") && !head.contains("x-opengateway-served-by"), "{head}");
    // And a sign of life while nothing happens.
    let mut more = Vec::new();
    within(async {
        while !more.ends_with(b": waiting\n\n\r\n") {
            more.push(stream.read_u8().await.unwrap());
        }
    })
    .await;
    let by = ServedBy { id: NodeId::new("12a"), name: "bad\n\ndata: [DONE]".to_owned(), local: false };
    play(
        &start,
        vec![
            JobEvent::Queued { position: 1 },
            JobEvent::Started { model: "llama".into(), by },
            JobEvent::Text("4".into()),
            done(),
        ],
    )
    .await;
    let mut rest = Vec::new();
    within(async {
        while !rest.ends_with(b"0\r\n\r\n") {
            rest.push(stream.read_u8().await.unwrap());
        }
    })
    .await;
    let rest = String::from_utf8(rest).unwrap();
    assert!(rest.contains(": queued 1\n\n") && rest.contains(": served-by bad%0A%0Adata:%20[DONE] 12a llama\n\n"), "{rest}");
    assert_eq!(rest.matches("data: [DONE]\n").count(), 1);
}
