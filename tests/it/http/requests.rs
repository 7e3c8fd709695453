//! What is asked for and what is refused: statuses, keys, hosts, pages, models, failures.

use opengateway::domain::prompt::{FailureKind, Role, Text, Turn};

use super::*;

#[tokio::test]
async fn a_whole_answer_has_its_text_its_usage_and_who_served_it() {
    let mut endpoint = Endpoint::start().await;
    let body = chat_body(&json!({"temperature": 0, "seed": 7, "max_completion_tokens": 5, "stop": ["x"]}));
    let request = endpoint.request("POST", "/v1/chat/completions", "X-OpenGateway-Timeout: 9.5\r\n", &body.to_string());
    let mut stream = endpoint.connect().await;
    stream.write_all(request.as_bytes()).await.unwrap();
    let start = endpoint.started().await;
    assert_eq!((start.uid, start.cluster.as_ref().map(ClusterId::as_str)), (1000, Some("lab")));
    assert_eq!(start.options.timeout, Duration::from_millis(9500));
    assert_eq!((start.ask.model.as_deref(), start.ask.prompt.as_str()), (Some("llama"), "What is 2+2?"));
    assert_eq!((start.ask.temperature, start.ask.seed, start.ask.max_tokens), (Some(0.0), Some(7), Some(5)));
    assert_eq!(start.ask.stop, [Text::new("x")]);
    play(
        &start,
        vec![
            JobEvent::Queued { position: 1 },
            started_by("Node Ä"),
            JobEvent::Text("4".into()),
            JobEvent::Text("!".into()),
            done(),
        ],
    )
    .await;
    let reply = within(response(&mut stream, true)).await.unwrap();
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("x-opengateway-served-by"), Some("Node%20%C3%84"));
    assert_eq!((reply.header("x-opengateway-peer"), reply.header("x-opengateway-model")), (Some("12a"), Some("llama")));
    let answer = reply.json();
    assert_eq!(answer["choices"][0]["message"], json!({"role": "assistant", "content": "4!", "refusal": null}));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"], json!({"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}));
    assert_eq!(answer["model"], "llama");
}

#[tokio::test]
async fn a_conversation_and_a_completion_reach_the_dispatcher_as_they_were_meant() {
    let mut endpoint = Endpoint::start().await;
    let messages = json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"}, {"role": "user", "content": [{"type": "text", "text": "bye"}]}]);
    let chat = endpoint.request("POST", "/v1/chat/completions", "", &json!({"messages": messages}).to_string());
    let mut stream = endpoint.connect().await;
    stream.write_all(chat.as_bytes()).await.unwrap();
    let start = endpoint.started().await;
    assert_eq!((start.ask.model, start.ask.system), (None, Some(Text::new("be brief"))));
    let turn = |role, text: &str| Turn { role, text: Text::new(text) };
    assert_eq!(start.ask.history, [turn(Role::User, "hi"), turn(Role::Assistant, "hello")]);
    assert_eq!((start.ask.prompt.as_str(), start.ask.raw), ("bye", false));
    drop(stream);
    let completion = endpoint.request("POST", "/v1/completions", "", r#"{"model": "phi", "prompt": ["2+2="]}"#);
    let mut stream = endpoint.connect().await;
    stream.write_all(completion.as_bytes()).await.unwrap();
    let start = endpoint.started().await;
    assert_eq!((start.ask.prompt.as_str(), start.ask.raw), ("2+2=", true));
    play(&start, vec![started_by("NodeB"), JobEvent::Text("4".into()), done()]).await;
    let answer = within(response(&mut stream, true)).await.unwrap().json();
    assert_eq!((&answer["object"], &answer["choices"][0]["text"]), (&json!("text_completion"), &json!("4")));
}

#[tokio::test]
async fn the_models_are_those_that_can_be_asked_now_and_the_echo_is_last() {
    let endpoint = Endpoint::start().await;
    let models = async |endpoint: &Endpoint| {
        let list = endpoint.get("/v1/models").await.json();
        assert_eq!(list["object"], "list");
        list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(models(&endpoint).await, ["llama", "phi", "echo"]);
    let model = endpoint.get("/v1/models/phi").await.json();
    assert_eq!((&model["object"], &model["owned_by"]), (&json!("model"), &json!("opengateway")));
    assert!(model["created"].is_u64());
    let gone = endpoint.get("/v1/models/gpt-4o").await;
    assert_eq!((gone.status, gone.code()), (404, json!("model_not_found")));
    assert_eq!(
        endpoint.raw(endpoint.request("GET", "/health", "", "")).await.unwrap().json(),
        json!({"status": "ok", "models": 3})
    );
    endpoint.net.state.send_replace(snapshot(&[]));
    assert_eq!(models(&endpoint).await, ["echo"]);
    assert_eq!(endpoint.get("/health").await.json(), json!({"status": "echo-only", "models": 1}));
    let two = [("a", vec![member("12a", "a", &["m"])]), ("b", vec![member("12b", "b", &["n/x:1"])])];
    endpoint.net.state.send_replace(snapshot(&two));
    assert_eq!(models(&endpoint).await, ["m", "n/x:1", "echo"]);
    assert_eq!(endpoint.get("/v1/models/n%2Fx%3A1").await.status, 200);
    assert_eq!(endpoint.get("/v1/models/n/x:1").await.status, 200);
    let named = endpoint.request("GET", "/v1/models", "X-OpenGateway-Cluster: B\r\n", "");
    assert_eq!(endpoint.raw(named).await.unwrap().json()["data"][0]["id"], "n/x:1");
    let ambiguous = endpoint.chat(&json!({"model": "m"})).await;
    assert_eq!((ambiguous.status, ambiguous.code()), (400, json!("cluster_ambiguous")));
    let unknown = endpoint.post("/v1/chat/completions", "X-OpenGateway-Cluster: c\r\n", &chat_body(&json!({}))).await;
    assert_eq!((unknown.status, unknown.code()), (404, json!("cluster_not_found")));
}

#[tokio::test]
async fn a_wish_is_met_or_refused_and_says_who_is_there() {
    let mut endpoint = Endpoint::start().await;
    for (model, header, peer) in
        [("llama@NodeA", "", "12a"), ("phi", "X-OpenGateway-Node: NodeB\r\n", "12b"), ("@12b", "", "12b")]
    {
        let request = endpoint.request("POST", "/v1/chat/completions", header, &chat_body(&json!({"model": model})).to_string());
        let mut stream = endpoint.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        assert_eq!(endpoint.started().await.options.peer.as_deref(), Some(peer), "{model}");
    }
    let request = endpoint.request("POST", "/v1/chat/completions", "", &chat_body(&json!({"model": "echo@me"})).to_string());
    let mut stream = endpoint.connect().await;
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(endpoint.started().await.cluster, None, "this machine alone");
    for (model, status, code, says) in [
        ("gpt-4o", 404, "model_not_found", "llama, phi, echo"),
        ("llama@NodeX", 404, "node_not_found", "\"NodeA\", \"NodeB\", \"me\" (this machine)"),
        ("phi@NodeA", 404, "model_not_found", "it has: llama"),
        ("llama@", 400, "invalid_value", "no node"),
    ] {
        let reply = endpoint.chat(&json!({"model": model})).await;
        assert_eq!((reply.status, reply.code()), (status, json!(code)), "{model}");
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains(says), "{}", reply.text());
    }
    for bad in [
        "X-OpenGateway-Timeout: 0",
        "X-OpenGateway-Timeout: 3601",
        "X-OpenGateway-Timeout: 1\r\nX-OpenGateway-Timeout: 1",
        "X-OpenGateway-Node: ",
    ] {
        let reply = endpoint.post("/v1/chat/completions", &format!("{bad}\r\n"), &chat_body(&json!({}))).await;
        assert_eq!((reply.status, reply.code()), (400, json!("invalid_header")), "{bad}");
    }
}

#[tokio::test]
async fn every_failure_before_the_first_text_has_its_status_streamed_or_not() {
    let mut endpoint = Endpoint::start().await;
    for kind in FailureKind::ALL {
        for stream in [false, true] {
            let request =
                endpoint.request("POST", "/v1/chat/completions", "", &chat_body(&json!({"stream": stream})).to_string());
            let mut connection = endpoint.connect().await;
            connection.write_all(request.as_bytes()).await.unwrap();
            let start = endpoint.started().await;
            let failure = Failure { retry_after: Some(Duration::from_millis(6001)), ..Failure::new(kind, "because") };
            play(&start, vec![failed(failure)]).await;
            let reply = within(response(&mut connection, true)).await.unwrap();
            let wanted = match kind {
                FailureKind::InvalidRequest | FailureKind::ContextOverflow => 400,
                FailureKind::NotAuthorized => 403,
                FailureKind::ModelUnavailable => 404,
                FailureKind::Cancelled | FailureKind::SlowConsumer => 408,
                FailureKind::Duplicate => 409,
                FailureKind::PromptQuarantined => 422,
                FailureKind::Busy | FailureKind::QuotaExceeded => 429,
                FailureKind::NoEligiblePeer | FailureKind::ModelLoading | FailureKind::ShuttingDown => 503,
                FailureKind::DeadlineExceeded | FailureKind::Stalled => 504,
                _ => 502,
            };
            assert_eq!(reply.status, wanted, "{kind:?}");
            assert_eq!(reply.json()["error"]["message"], "because");
            assert_eq!(reply.header("retry-after"), [429, 503].contains(&wanted).then_some("7"), "{kind:?}");
            if kind == FailureKind::ContextOverflow {
                assert_eq!(reply.code(), "context_length_exceeded");
            }
        }
    }
}

#[tokio::test]
async fn only_who_has_a_key_is_served_and_a_renewed_key_is_another() {
    let endpoint = Endpoint::start().await;
    let with = async |authorization: &str| {
        endpoint.raw(format!("GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{authorization}\r\n")).await.unwrap()
    };
    let key = &endpoint.key;
    assert_eq!(with(&format!("Authorization: Bearer {key}\r\n")).await.status, 200);
    assert_eq!(with(&format!("authorization: bearer {key}\r\n")).await.status, 200);
    let flipped = format!("{}{}", &key[..key.len() - 1], if key.ends_with('0') { '1' } else { '0' });
    for bad in [
        String::new(),
        format!("Authorization: {key}\r\n"),
        format!("Authorization: Basic {key}\r\n"),
        format!("Authorization: Bearer {flipped}\r\n"),
        "Authorization: Bearer DUMMY_KEY\r\n".into(),
        "Authorization: Bearer \r\n".into(),
    ] {
        let reply = with(&bad).await;
        assert_eq!((reply.status, reply.code()), (401, json!("invalid_api_key")), "{bad}");
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
        assert!(!reply.text().contains("og-"), "a key is not repeated");
    }
    assert_eq!(endpoint.raw("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap().status, 200);
    let new = endpoint.handle.key(1000, true).await.unwrap();
    assert_eq!(with(&format!("Authorization: Bearer {key}\r\n")).await.status, 401);
    assert_eq!(with(&format!("Authorization: Bearer {new}\r\n")).await.status, 200);
}

#[tokio::test]
async fn without_keys_any_bearer_will_do_and_a_true_one_still_counts() {
    let mut endpoint = Endpoint::with(HttpSettings { key_required: false, ..loopback() }).await;
    let body = chat_body(&json!({})).to_string();
    for (authorization, uid) in [
        ("".to_owned(), 65_534),
        ("Authorization: Bearer DUMMY_KEY\r\n".into(), 65_534),
        (format!("Authorization: Bearer {}\r\n", endpoint.key), 1000),
    ] {
        let length = body.len();
        let mut stream = endpoint.connect().await;
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{authorization}Content-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        assert_eq!(endpoint.started().await.uid, uid);
    }
}

#[tokio::test]
async fn a_page_of_a_browser_gets_nothing_unless_it_is_named() {
    let settings = HttpSettings { origins: vec!["https://app.example".into()], hosts: vec!["gateway.lan".into()], ..loopback() };
    let endpoint = Endpoint::with(settings).await;
    let key = &endpoint.key;
    let with = async |method: &str, headers: &str| {
        endpoint.raw(format!("{method} /v1/models HTTP/1.1\r\nAuthorization: Bearer {key}\r\n{headers}\r\n")).await.unwrap()
    };
    for host in ["evil.example", "127.0.0.1.evil.example:80", "192.0.2.1", "localhost.evil.example"] {
        let reply = with("GET", &format!("Host: {host}\r\n")).await;
        assert_eq!((reply.status, reply.code()), (403, json!("host_not_allowed")), "{host}");
    }
    for host in ["localhost", "127.0.0.1:11480", "[::1]:11480", "Gateway.LAN:11480"] {
        assert_eq!(with("GET", &format!("Host: {host}\r\n")).await.status, 200, "{host}");
    }
    assert_eq!(with("GET", "").await.status, 400, "no host");
    assert_eq!(with("GET", "Host: localhost\r\nHost: localhost\r\n").await.status, 400, "two hosts");
    let absolute =
        format!("GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n\r\n");
    assert_eq!(endpoint.raw(absolute).await.unwrap().status, 403);
    for origin in ["https://evil.example", "null", "http://localhost", "https://app.example.evil.example"] {
        for method in ["GET", "OPTIONS"] {
            let reply = with(method, &format!("Host: localhost\r\nOrigin: {origin}\r\n")).await;
            assert_eq!((reply.status, reply.code()), (403, json!("origin_not_allowed")), "{origin}");
            assert_eq!(reply.header("access-control-allow-origin"), None);
        }
    }
    let page = "Host: localhost\r\nOrigin: https://app.example\r\n";
    let preflight = with("OPTIONS", &format!("{page}Access-Control-Request-Method: POST\r\n")).await;
    assert_eq!((preflight.status, preflight.header("access-control-allow-origin")), (204, Some("https://app.example")));
    assert!(preflight.header("access-control-allow-headers").unwrap().contains("authorization"));
    let reply = with("GET", page).await;
    assert_eq!(
        (reply.status, reply.header("access-control-allow-origin"), reply.header("vary")),
        (200, Some("https://app.example"), Some("Origin"))
    );
}

#[tokio::test]
async fn paths_methods_and_types_have_their_statuses() {
    let endpoint = Endpoint::start().await;
    for path in [
        "/",
        "/v1",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/audio/speech",
        "/v1/models/",
        "/v1/chat/completions/",
        "/../v1/models",
        "/v1/models%2F",
    ] {
        for (method, body) in [("GET", ""), ("POST", "{}")] {
            let reply = endpoint.raw(endpoint.request(method, path, "", body)).await.unwrap();
            let wanted = if path == "/v1/models/" && method == "POST" { 405 } else { 404 };
            assert_eq!(reply.status, wanted, "{method} {path}");
            assert!(reply.json()["error"]["message"].is_string());
        }
    }
    for (method, path) in [
        ("POST", "/v1/models"),
        ("DELETE", "/v1/models/phi"),
        ("GET", "/v1/chat/completions"),
        ("PUT", "/v1/completions"),
        ("POST", "/health"),
        ("OPTIONS", "/v1/models"),
    ] {
        let reply = endpoint.raw(endpoint.request(method, path, "", "")).await.unwrap();
        assert_eq!((reply.status, reply.code()), (405, json!("method_not_allowed")), "{method} {path}");
    }
    let body = chat_body(&json!({})).to_string();
    for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"] {
        let request = endpoint.request("POST", "/v1/chat/completions", "", &body).replace("application/json", kind);
        assert_eq!(endpoint.raw(request).await.unwrap().status, 415, "{kind}");
    }
    let mut stream = endpoint.connect().await;
    for path in ["/v1/models", "/health"] {
        stream.write_all(endpoint.request("HEAD", path, "", "").as_bytes()).await.unwrap();
        let head = within(response(&mut stream, false)).await.unwrap();
        assert!(head.status == 200 && head.header("content-length").unwrap().parse::<usize>().unwrap() > 10);
    }
    for body in ["{", "[]", "not json", "{\"messages\": 5}"] {
        let reply = endpoint.raw(endpoint.request("POST", "/v1/chat/completions", "", body)).await.unwrap();
        assert_eq!((reply.status, &reply.json()["error"]["type"]), (400, &json!("invalid_request_error")), "{body}");
    }
}
