//! Every limit, at it and one past it; and what goes wrong on the wire.

use super::*;

/// As `http::body` has it: a prompt of 1 MiB and 64 KiB for the rest.
const MAX_BODY: usize = (1 << 20) + (64 << 10);

fn padded(bytes: usize) -> String {
    let body = chat_body(&json!({"user": ""})).to_string();
    body.replace("\"user\":\"\"", &format!("\"user\":\"{}\"", "x".repeat(bytes - body.len())))
}

#[tokio::test]
async fn a_body_at_the_limit_is_read_and_one_past_it_is_413() {
    let mut endpoint = Endpoint::start().await;
    let body = padded(MAX_BODY);
    assert_eq!(body.len(), MAX_BODY);
    let mut stream = endpoint.connect().await;
    let request = endpoint.request("POST", "/v1/chat/completions", "", &body);
    within(stream.write_all(request.as_bytes())).await.unwrap();
    endpoint.started().await;
    let large = endpoint.request("POST", "/v1/chat/completions", "", &padded(MAX_BODY + 1));
    let reply = endpoint.raw(large).await.unwrap();
    assert_eq!((reply.status, reply.code()), (413, json!("request_too_large")));
    // By its length alone, before a byte of it is sent.
    let head = endpoint.request(
        "POST",
        "/v1/chat/completions",
        &format!("Content-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: {}\r\n", MAX_BODY + 1),
        "",
    );
    assert_eq!(endpoint.raw(head).await.unwrap().status, 413);
    let kind = "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n";
    for (bytes, status) in [(MAX_BODY, None), (MAX_BODY + 1, Some(413))] {
        let head = endpoint.request("POST", "/v1/chat/completions", kind, "");
        let mut stream = endpoint.connect().await;
        let mut request = head.into_bytes();
        for chunk in padded(bytes).as_bytes().chunks(60_000) {
            request.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            request.extend_from_slice(chunk);
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"0\r\n\r\n");
        let _ = within(stream.write_all(&request)).await;
        match status {
            None => drop(endpoint.started().await),
            Some(status) => assert_eq!(within(response(&mut stream, true)).await.unwrap().status, status),
        }
    }
}

#[tokio::test]
async fn a_client_that_asks_first_is_told_to_go_on_or_not() {
    let mut endpoint = Endpoint::start().await;
    let body = chat_body(&json!({})).to_string();
    let expect = format!("Content-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: {}\r\n", body.len());
    let mut stream = endpoint.connect().await;
    stream.write_all(endpoint.request("POST", "/v1/chat/completions", &expect, "").as_bytes()).await.unwrap();
    assert_eq!(within(response(&mut stream, true)).await.unwrap().status, 100);
    stream.write_all(body.as_bytes()).await.unwrap();
    let start = endpoint.started().await;
    play(&start, vec![started_by("NodeA"), done()]).await;
    assert_eq!(within(response(&mut stream, true)).await.unwrap().status, 200);
    let unknown = endpoint.request("POST", "/v1/embeddings", &expect, "");
    assert_eq!(endpoint.raw(unknown).await.unwrap().status, 404, "without a byte of the body");
}

#[tokio::test]
async fn heads_are_bounded_in_size_and_number() {
    let endpoint = Endpoint::start().await;
    let with = async |headers: String| endpoint.raw(endpoint.request("GET", "/v1/models", &headers, "")).await;
    let fixed = endpoint.request("GET", "/v1/models", "X: \r\n", "").len();
    assert_eq!(with(format!("X: {}\r\n", "x".repeat(16 * 1024 - fixed))).await.unwrap().status, 200);
    assert_eq!(with(format!("X: {}\r\n", "x".repeat(16 * 1024 - fixed + 1))).await.unwrap().status, 431);
    assert_eq!(with("X: 1\r\n".repeat(98)).await.unwrap().status, 200);
    assert_eq!(with("X: 1\r\n".repeat(99)).await.unwrap().status, 431);
    // What is still being sent when the refusal comes may reset the connection.
    let huge = with(format!("X: {}\r\n", "x".repeat(1 << 20))).await;
    assert!(huge.is_none_or(|reply| reply.status == 431));
    let long = endpoint.raw(endpoint.request("GET", &format!("/{}", "x".repeat(70_000)), "", "")).await;
    assert!(long.is_none_or(|reply| [414, 431].contains(&reply.status)));
}

#[tokio::test]
async fn what_two_servers_could_read_in_two_ways_is_refused_or_ends_the_connection() {
    let endpoint = Endpoint::start().await;
    let kind = "Content-Type: application/json\r\n";
    for (headers, name) in [
        ("Content-Length: 2\r\nContent-Length: 3\r\n", "two lengths"),
        ("Content-Length: +2\r\n", "a signed length"),
        ("Content-Length: 0x2\r\n", "a hexadecimal length"),
        ("Content-Length: 99999999999999999999\r\n", "a length past 64 bits"),
        ("Transfer-Encoding: gzip\r\n", "an encoding that is not chunked last"),
        ("Transfer-Encoding: chunked, gzip\r\n", "the same"),
        ("Content-Length : 2\r\n", "a blank before the colon"),
        (" X: folded\r\n", "a folded line"),
    ] {
        let reply = endpoint.raw(endpoint.request("POST", "/v1/chat/completions", &format!("{kind}{headers}"), "") + "{}").await;
        assert!(reply.is_none_or(|reply| reply.status == 400), "{name}");
    }
    // Both: the chunks are what counts (RFC 9112, 6.3), and nothing that follows on the connection is a request.
    for headers in ["Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n"]
    {
        let first = endpoint.request("POST", "/v1/chat/completions", &format!("{kind}{headers}"), "");
        let smuggled = endpoint.request("GET", "/v1/models", "", "");
        let mut stream = endpoint.connect().await;
        stream.write_all(format!("{first}2\r\n{{}}\r\n0\r\n\r\n{smuggled}").as_bytes()).await.unwrap();
        assert_eq!(within(response(&mut stream, true)).await.unwrap().status, 400, "no messages");
        assert!(within(response(&mut stream, true)).await.is_none(), "the connection is closed");
    }
    for garbage in [
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "GET / HTTP/3.0\r\n\r\n",
        "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\r\n\r\n",
    ] {
        assert!(endpoint.raw(garbage).await.is_none_or(|reply| reply.status == 400), "{garbage:?}");
    }
    let chunk = endpoint.request("POST", "/v1/chat/completions", &format!("{kind}Transfer-Encoding: chunked\r\n"), "zz\r\n");
    assert!(endpoint.raw(chunk).await.is_none_or(|reply| reply.status == 400));
}

#[tokio::test]
async fn requests_that_are_sent_ahead_are_answered_in_their_order() {
    let mut endpoint = Endpoint::start().await;
    let mut stream = endpoint.connect().await;
    let chat = endpoint.request("POST", "/v1/chat/completions", "", &chat_body(&json!({})).to_string());
    let all = endpoint.request("GET", "/v1/models/phi", "", "") + &chat + &endpoint.request("GET", "/v1/models/llama", "", "");
    stream.write_all(all.as_bytes()).await.unwrap();
    assert_eq!(within(response(&mut stream, true)).await.unwrap().json()["id"], "phi");
    let start = endpoint.started().await;
    play(&start, vec![started_by("NodeA"), JobEvent::Text("4".into()), done()]).await;
    assert_eq!(within(response(&mut stream, true)).await.unwrap().json()["choices"][0]["message"]["content"], "4");
    assert_eq!(within(response(&mut stream, true)).await.unwrap().json()["id"], "llama");
}

#[tokio::test]
async fn slow_clients_are_cut_off_and_keep_nobody_out() {
    let endpoint = Endpoint::start().await;
    let mut slow = Vec::new();
    for _ in 0..64 {
        let mut stream = endpoint.connect().await;
        stream.write_all(b"GET /v1/models HTTP/1.1\r\nHost: local").await.unwrap();
        slow.push(stream);
    }
    let began = Instant::now();
    // A client that comes back when it is told to; the oldest of them make room.
    while endpoint.get("/v1/models").await.status != 200 {
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for stream in &mut slow {
        let mut byte = [0];
        let end = tokio::time::timeout(Duration::from_secs(8), stream.read(&mut byte)).await.expect("it is cut off");
        assert!(matches!(end, Ok(0) | Err(_)));
    }
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
}

#[tokio::test]
async fn so_many_are_answered_at_once_and_one_more_is_told_to_come_back() {
    let mut endpoint = Endpoint::with(HttpSettings { max_connections: 4, ..loopback() }).await;
    let chat = endpoint.request("POST", "/v1/chat/completions", "", &chat_body(&json!({})).to_string());
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut stream = endpoint.connect().await;
        stream.write_all(chat.as_bytes()).await.unwrap();
        held.push((stream, endpoint.started().await));
    }
    let reply = endpoint.raw(&chat).await.unwrap();
    assert_eq!((reply.status, reply.header("retry-after"), reply.code()), (503, Some("1"), json!("no_connection")));
    let (mut stream, start) = held.pop().unwrap();
    play(&start, vec![started_by("NodeA"), done()]).await;
    assert_eq!(within(response(&mut stream, true)).await.unwrap().status, 200);
    until("it rests", || endpoint.handle.active() == 3).await;
    assert_eq!(endpoint.get("/v1/models").await.status, 200, "one that rests makes room");
}

#[tokio::test]
async fn a_socket_of_the_machine_needs_no_key_and_knows_who_asks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("http.sock");
    let mut endpoint =
        Endpoint::with(HttpSettings { listen: vec![HttpAddress::Unix(path.clone())], ..HttpSettings::default() }).await;
    assert_eq!(endpoint.handle.addresses(), [format!("unix:{}", path.display())]);
    let mut stream = within(tokio::net::UnixStream::connect(&path)).await.unwrap();
    let body = chat_body(&json!({})).to_string();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: whatever\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let start = endpoint.started().await;
    assert_eq!(start.uid, rustix::process::geteuid().as_raw());
    endpoint.handle.stop();
    let late = tokio::net::UnixStream::connect(&path).await;
    play(&start, vec![started_by("NodeA"), JobEvent::Text("4".into()), done()]).await;
    let reply = within(response(&mut stream, true)).await.unwrap();
    assert_eq!(reply.json()["choices"][0]["message"]["content"], "4", "what runs may end");
    drop(late);
    until("the socket is gone", || !path.exists()).await;
    assert!(endpoint.handle.addresses().is_empty());
}

#[tokio::test]
async fn an_address_that_is_taken_is_a_problem_until_it_is_free() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let (net, _scripted) = net::Handle::scripted();
    let (dispatch, _starts, _active) = dispatch::Handle::scripted();
    let (_, tiers) = watch::channel(Vec::new());
    let (serve, _) = serve::spawn(serve::Config { backends: vec![Arc::new(Echo::default())], tiers });
    let dir = tempfile::tempdir().unwrap();
    let settings = HttpSettings { listen: vec![HttpAddress::Tcp(address)], ..HttpSettings::default() };
    let (node_name, state_dir) = ("me".to_owned(), dir.path().to_owned());
    let handle = http::start(http::Parts { net, serve, dispatch, node_name, state_dir, settings }, Vec::new());
    assert!(handle.problems()[0].contains(&address.to_string()), "{:?}", handle.problems());
    drop(taken);
    until("it listens", || !handle.addresses().is_empty()).await;
    assert!(handle.problems().is_empty());
}
