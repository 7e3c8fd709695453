//! Prompts: a rogue that asks, and a rogue that answers.

use std::time::{Duration, Instant};

use futures::{AsyncReadExt as _, AsyncWriteExt as _};
use libp2p::swarm::{ConnectionId, Stream};
use uuid::Uuid;

use super::rogue::{Rogue, Session, put, rest};
use super::*;
use crate::domain::prompt::MAX_ANSWER_BYTES;
use crate::wire::control::{ByeReason, Control};
use crate::wire::frame::FrameReader;
use crate::wire::infer::{self, AnswerHash, Request, Response};
use crate::wire::keys::Root;
use crate::wire::limits::{MAX_REQUEST_FRAME_BYTES, MAX_RESPONSE_FRAME_BYTES};
use crate::wire::version::INFERENCE_PROTOCOL;

/// Sends a request by the rules.
pub(super) async fn request(lane: &mut Stream, cluster: &str, prompt: &str, number: u128) {
    let mut out = Vec::new();
    let ask = Ask { prompt: Text::new(prompt), ..Ask::default() };
    let reference = Root::public(&id(cluster)).cluster_ref();
    infer::encode_request(&mut out, &Uuid::from_u128(number), &reference, &ask, Duration::from_secs(60)).unwrap();
    lane.write_all(&out).await.unwrap();
    lane.flush().await.unwrap();
}

/// A rogue that is a member of "home" and asks.
async fn asker(node: &Node) -> (Rogue, ConnectionId, Session) {
    let mut rogue = Rogue::beside(node, true).await;
    let connection = rogue.connect(&node.address().await).await;
    let session = rogue.greet(node, connection, "home").await;
    session.introduces("rogue");
    node.sees("home", &["rogue"]).await;
    (rogue, connection, session)
}

async fn serving(interactive: bool) -> Node {
    let node = Plan { interactive, ..plan("a") }.start().await;
    node.join("home", true, &[]).await;
    node
}

async fn response(reader: &mut FrameReader<Stream>, number: u128) -> Response<'static> {
    let frame = timeout(DEADLINE, reader.next(MAX_RESPONSE_FRAME_BYTES)).await.expect("a frame").unwrap().expect("a frame");
    Response::decode(&frame, &Uuid::from_u128(number)).unwrap().into_owned()
}

#[tokio::test]
async fn a_request_id_is_answered_once() {
    let node = serving(false).await;
    let (rogue, connection, _session) = asker(&node).await;
    for round in 0..3 {
        // The same id on the same lane and on others.
        let mut lane = rogue.open(&node, connection, INFERENCE_PROTOCOL).await;
        request(&mut lane, "home", "x", 7).await;
        let mut reader = FrameReader::new(lane);
        match response(&mut reader, 7).await {
            Response::Token { .. } if round == 0 => assert!(matches!(response(&mut reader, 7).await, Response::End { .. })),
            Response::Error(failure) if round > 0 => assert_eq!(failure.kind, FailureKind::Duplicate),
            other => panic!("round {round}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_waiting_asker_hears_a_keep_alive_every_two_seconds() {
    let mut node = serving(true).await;
    let (rogue, connection, _session) = asker(&node).await;
    let mut lane = rogue.open(&node, connection, INFERENCE_PROTOCOL).await;
    request(&mut lane, "home", "x", 1).await;
    let _prompt = node.prompt().await;
    let mut reader = FrameReader::new(lane);
    for _ in 0..2 {
        let asked = Instant::now();
        assert!(matches!(response(&mut reader, 1).await, Response::KeepAlive { position: None }));
        let waited = asked.elapsed();
        assert!((Duration::from_millis(1500)..Duration::from_secs(4)).contains(&waited), "{waited:?}");
    }
}

#[tokio::test]
async fn every_way_of_going_frees_the_slot_within_a_second() {
    let mut node = serving(true).await;
    let freed = |prompt: InboundPrompt, how: &'static str| async move {
        let since = Instant::now();
        timeout(DEADLINE, prompt.reply.closed()).await.unwrap_or_else(|_| panic!("{how}: never"));
        assert!(since.elapsed() < Duration::from_secs(1), "{how}: {:?}", since.elapsed());
    };
    // The asker resets its stream.
    let (rogue, connection, _session) = asker(&node).await;
    let mut lane = rogue.open(&node, connection, INFERENCE_PROTOCOL).await;
    request(&mut lane, "home", "x", 1).await;
    let prompt = node.prompt().await;
    drop(lane);
    freed(prompt, "reset").await;
    // It closes its writing half.
    let mut lane = rogue.open(&node, connection, INFERENCE_PROTOCOL).await;
    request(&mut lane, "home", "x", 2).await;
    let prompt = node.prompt().await;
    lane.close().await.unwrap();
    freed(prompt, "close").await;
    // It speaks while it should wait.
    let mut lane = rogue.open(&node, connection, INFERENCE_PROTOCOL).await;
    request(&mut lane, "home", "x", 3).await;
    let prompt = node.prompt().await;
    request(&mut lane, "home", "y", 4).await;
    freed(prompt, "a second request").await;
    // Its whole connection goes.
    let mut lane = rogue.open(&node, connection, INFERENCE_PROTOCOL).await;
    request(&mut lane, "home", "x", 5).await;
    let prompt = node.prompt().await;
    rogue.disconnect(&node);
    freed(prompt, "connection").await;
}

#[tokio::test]
async fn a_membership_that_ends_takes_its_prompts_along_also_from_a_reader_that_reads_nothing() {
    let mut node = serving(true).await;
    let (rogue, connection, session) = asker(&node).await;
    let mut lane = rogue.open(&node, connection, INFERENCE_PROTOCOL).await;
    request(&mut lane, "home", "x", 1).await;
    let prompt = node.prompt().await;
    prompt.reply.send(AnswerEvent::Started { model: "m".to_owned() }).await.unwrap();
    // More than all buffers on the way hold: the node's write waits for the rogue, which does not read.
    let text = "z".repeat(64 * 1024);
    while timeout(Duration::from_millis(500), prompt.reply.send(AnswerEvent::Text(text.clone()))).await.is_ok() {}
    // The membership moves to another stream first: the prompts move with it.
    let second = rogue.greet(&node, connection, "home").await;
    second.introduces("rogue two");
    node.sees("home", &["rogue two"]).await;
    assert!(timeout(Duration::from_millis(300), prompt.reply.closed()).await.is_err(), "it goes on");
    drop(session);
    second.says(&Control::Bye(ByeReason::Leave));
    node.sees("home", &[]).await;
    let since = Instant::now();
    timeout(DEADLINE, prompt.reply.closed()).await.expect("cancelled");
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
}

#[tokio::test]
async fn a_request_may_be_one_mebibyte_and_not_a_byte_more() {
    let node = serving(false).await;
    let (rogue, connection, _session) = asker(&node).await;
    let mut lane = rogue.open(&node, connection, INFERENCE_PROTOCOL).await;
    let mut empty = Vec::new();
    let reference = Root::public(&id("home")).cluster_ref();
    infer::encode_request(&mut empty, &Uuid::from_u128(1), &reference, &Ask::default(), Duration::from_secs(60)).unwrap();
    let most = "a".repeat(MAX_REQUEST_FRAME_BYTES - (empty.len() - 4));
    request(&mut lane, "home", &most, 1).await;
    let mut reader = FrameReader::new(lane);
    let mut text = 0;
    loop {
        match response(&mut reader, 1).await {
            Response::Token { text: more, .. } => text += more.len(),
            Response::End { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(text, most.len());
    let mut lane = rogue.open(&node, connection, INFERENCE_PROTOCOL).await;
    let length = u32::try_from(MAX_REQUEST_FRAME_BYTES + 1).unwrap();
    lane.write_all(&length.to_be_bytes()).await.unwrap();
    lane.flush().await.unwrap();
    assert!(rest(&mut lane).await.is_empty());
}

#[tokio::test]
async fn a_prompt_for_a_cluster_that_the_asker_is_not_in_is_reset_unanswered() {
    let node = serving(false).await;
    node.join("lab", true, &[]).await;
    let (rogue, connection, _session) = asker(&node).await;
    let mut lane = rogue.open(&node, connection, INFERENCE_PROTOCOL).await;
    request(&mut lane, "lab", "x", 1).await;
    assert!(rest(&mut lane).await.is_empty());
}

#[tokio::test]
async fn prompts_that_are_given_up_at_any_moment_leave_every_lane_to_the_others() {
    let node = serving(false).await;
    let b = Plan { bootstrap: vec![node.address().await], ..plan("b") }.start().await;
    b.join("home", false, &[]).await;
    let member = b.sees("home", &["a"]).await[0].id.clone();
    for round in 0..400_u64 {
        // Many more callers than lanes, given up before, while and after a lane comes to them.
        let mut callers: Vec<AnswerStream> = (0..8).map(|_| b.ask("home", &member, "x").unwrap()).collect();
        for (at, caller) in callers.iter_mut().enumerate() {
            if at % 2 == 0 {
                let _ = timeout(Duration::from_micros(round % 40 * 10), caller.next()).await;
            }
        }
        tokio::task::yield_now().await;
    }
    let mut stream = b.ask("home", &member, "still there").unwrap();
    assert_eq!(timeout(Duration::from_secs(5), whole(&mut stream)).await.expect("a lane").unwrap(), "still there");
}

#[tokio::test]
async fn a_prompt_sent_the_moment_a_member_is_known_is_never_refused() {
    let a = serving(false).await;
    let boot = [a.address().await];
    let b = Plan { bootstrap: boot.to_vec(), ..plan("b") }.start().await;
    let mut ups = (a.handle.events(), b.handle.events());
    for round in 0..200 {
        b.join("home", true, &[]).await;
        let up = |event: Event| match event {
            Event::MemberUp { member, .. } => Some(member.id.clone()),
            Event::MemberDown { .. } => None,
        };
        let both = async {
            // Each side asks as soon as it hears of the other.
            let ask = async |node: &Node, events: &mut tokio::sync::broadcast::Receiver<Event>| {
                let member = loop {
                    if let Some(member) = up(events.recv().await.unwrap()) {
                        break member;
                    }
                };
                whole(&mut node.ask("home", &member, "x").unwrap()).await
            };
            tokio::join!(ask(&a, &mut ups.0), ask(&b, &mut ups.1))
        };
        let (from_a, from_b) = timeout(DEADLINE, both).await.expect("both know each other");
        assert_eq!((from_a.unwrap(), from_b.unwrap()), ("x".to_owned(), "x".to_owned()), "round {round}");
        b.handle.leave(id("home"), Duration::ZERO).await.unwrap();
        a.sees("home", &[]).await;
    }
}

/// A node that asks a rogue which serves "home": the node, its question in flight, and the rogue's end of the lane.
struct Liar {
    node: Node,
    rogue: Rogue,
    _session: Session,
}

impl Liar {
    async fn new() -> Self {
        let node = plan("asker").start().await;
        node.join("home", false, &[]).await;
        let mut rogue = Rogue::beside(&node, true).await;
        let connection = rogue.connect(&node.address().await).await;
        let session = rogue.greet(&node, connection, "home").await;
        session.introduces("liar");
        node.sees("home", &["liar"]).await;
        Self { node, rogue, _session: session }
    }

    /// Asks; gives the running question, the lane and the request's id.
    async fn asked(&mut self) -> (tokio::task::JoinHandle<Result<String, Failure>>, FrameReader<Stream>, Uuid) {
        let member = self.node.handle.snapshot().clusters[&id("home")].members[0].id.clone();
        let mut stream = self.node.ask("home", &member, "x").unwrap();
        let answer = tokio::spawn(async move { whole(&mut stream).await });
        let mut lane = FrameReader::new(self.rogue.accepted(INFERENCE_PROTOCOL).await.stream);
        let asked = Request::decode(&lane.next(MAX_REQUEST_FRAME_BYTES).await.unwrap().unwrap()).unwrap();
        (answer, lane, asked.request_id)
    }
}

async fn write(lane: &mut FrameReader<Stream>, bytes: &[u8]) {
    // The asker may have had enough already.
    let _ = lane.get_mut().write_all(bytes).await;
    let _ = lane.get_mut().flush().await;
}

#[tokio::test]
async fn lies_of_a_serving_node_have_a_name_each() {
    let mut liar = Liar::new().await;
    let end = |out: &mut Vec<u8>, id: &Uuid, bytes: u64, hash: &str| infer::encode_end(out, id, "m", done(), bytes, hash);
    let good = {
        let mut hash = AnswerHash::new();
        hash.update(b"two words");
        hash.finish()
    };
    type Lie<'a> = &'a dyn Fn(&mut Vec<u8>, &Uuid);
    let token = |out: &mut Vec<u8>, id: &Uuid| infer::encode_token(out, id, "two words", Some("m"));
    let lies: [(&str, Lie<'_>, Result<&str, FailureKind>); 9] = [
        (
            "the truth",
            &|out, id| {
                token(out, id);
                end(out, id, 9, &good);
            },
            Ok("two words"),
        ),
        (
            "another hash",
            &|out, id| {
                token(out, id);
                end(out, id, 9, &"0".repeat(64));
            },
            Err(FailureKind::Interrupted),
        ),
        (
            "no hash",
            &|out, id| {
                token(out, id);
                end(out, id, 9, "");
            },
            Err(FailureKind::Interrupted),
        ),
        (
            "another count",
            &|out, id| {
                token(out, id);
                end(out, id, 8, &good);
            },
            Err(FailureKind::Interrupted),
        ),
        ("no end", &|out, id| token(out, id), Err(FailureKind::Interrupted)),
        ("nothing at all", &|_, _| {}, Err(FailureKind::PeerLost)),
        ("another id", &|out, _| token(out, &Uuid::from_u128(1)), Err(FailureKind::ProtocolError)),
        ("an empty frame", &|out, _| out.extend_from_slice(&[0; 4]), Err(FailureKind::ProtocolError)),
        (
            "a frame one byte too long",
            &|out, _| {
                out.extend_from_slice(&u32::try_from(MAX_RESPONSE_FRAME_BYTES + 1).unwrap().to_be_bytes());
            },
            Err(FailureKind::ProtocolError),
        ),
    ];
    for (name, lie, outcome) in lies {
        let (answer, mut lane, id) = liar.asked().await;
        let mut out = Vec::new();
        lie(&mut out, &id);
        write(&mut lane, &out).await;
        if outcome.is_err() {
            let _ = lane.get_mut().close().await;
        }
        drop(lane);
        assert_eq!(answer.await.unwrap().as_deref().map_err(|failure| failure.kind), outcome, "{name}");
        if outcome.is_ok() {
            // It put the lane back, which is broken now: it must not be the next one's.
            liar = Liar::new().await;
        }
    }
}

#[tokio::test]
async fn an_answer_may_be_four_mebibytes_and_not_a_byte_more() {
    let mut liar = Liar::new().await;
    for (surplus, outcome) in [(0, Ok(MAX_ANSWER_BYTES)), (1, Err(FailureKind::AnswerTooLarge))] {
        let (answer, mut lane, id) = liar.asked().await;
        let (piece, mut hash, mut bytes) = ("p".repeat(2048), AnswerHash::new(), 0);
        while bytes < MAX_ANSWER_BYTES + surplus {
            let piece = &piece[..piece.len().min(MAX_ANSWER_BYTES + surplus - bytes)];
            let mut out = Vec::new();
            infer::encode_token(&mut out, &id, piece, Some("m"));
            hash.update(piece.as_bytes());
            bytes += piece.len();
            write(&mut lane, &out).await;
        }
        let mut out = Vec::new();
        infer::encode_end(&mut out, &id, "m", done(), bytes as u64, &hash.finish());
        write(&mut lane, &out).await;
        assert_eq!(answer.await.unwrap().map(|text| text.len()).map_err(|failure| failure.kind), outcome);
        liar = Liar::new().await;
    }
}

#[tokio::test]
async fn ten_silent_seconds_are_a_stall_and_keep_alives_prevent_it() {
    let mut liar = Liar::new().await;
    let (answer, mut lane, id) = liar.asked().await;
    let asked = Instant::now();
    // Alive for three keep-alives, then silent.
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let mut out = Vec::new();
        infer::encode_keepalive(&mut out, &id, None);
        write(&mut lane, &out).await;
    }
    assert_eq!(answer.await.unwrap().unwrap_err().kind, FailureKind::Stalled);
    let waited = asked.elapsed();
    assert!((Duration::from_secs(15)..Duration::from_secs(19)).contains(&waited), "{waited:?}");
    // The stream was reset, so that the serving node knows.
    let mut byte = [0];
    assert!(!matches!(timeout(DEADLINE, lane.get_mut().read(&mut byte)).await.unwrap(), Ok(1)));
}

#[tokio::test]
async fn a_stream_that_breaks_after_the_request_was_taken_is_a_lost_peer_and_no_duplicate() {
    let mut liar = Liar::new().await;
    let (answer, mut lane, id) = liar.asked().await;
    let mut out = Vec::new();
    let hash = AnswerHash::new().finish();
    infer::encode_end(&mut out, &id, "m", done(), 0, &hash);
    write(&mut lane, &out).await;
    answer.await.unwrap().unwrap();
    // The lane has carried a prompt: when it breaks now the asker tries once more, with the same id.
    let member = liar.node.handle.snapshot().clusters[&super::id("home")].members[0].id.clone();
    let mut stream = liar.node.ask("home", &member, "again").unwrap();
    let answer = tokio::spawn(async move { whole(&mut stream).await });
    let first = Request::decode(&lane.next(MAX_REQUEST_FRAME_BYTES).await.unwrap().unwrap()).unwrap().request_id;
    drop(lane);
    let mut lane = FrameReader::new(liar.rogue.accepted(INFERENCE_PROTOCOL).await.stream);
    let second = Request::decode(&lane.next(MAX_REQUEST_FRAME_BYTES).await.unwrap().unwrap()).unwrap().request_id;
    assert_eq!(first, second);
    let mut out = Vec::new();
    infer::encode_error(&mut out, &second, &Failure::new(FailureKind::Duplicate, "seen"));
    write(&mut lane, &out).await;
    assert_eq!(answer.await.unwrap().unwrap_err().kind, FailureKind::PeerLost);
}

#[tokio::test]
async fn no_time_left_is_told_before_anything_is_sent() {
    let liar = Liar::new().await;
    let member = liar.node.handle.snapshot().clusters[&id("home")].members[0].id.clone();
    let failure = liar.node.handle.ask(id("home"), member, Ask::default(), Duration::from_micros(900)).map(drop).unwrap_err();
    assert_eq!(failure.kind, FailureKind::DeadlineExceeded);
}

#[tokio::test]
async fn a_peer_that_opens_streams_without_end_does_not_keep_another_from_being_served() {
    let node = serving(false).await;
    let (rogue, connection, _session) = asker(&node).await;
    let friend = Plan { bootstrap: vec![node.address().await], ..plan("b") }.start().await;
    friend.join("home", false, &[]).await;
    let member = friend.until("a", |snapshot| listed(snapshot, "home").contains(&"a".to_owned())).await.clusters[&id("home")]
        .members[0]
        .id
        .clone();
    let rogue = Arc::new(rogue);
    let mut held = tokio::task::JoinSet::new();
    let node = Arc::new(node);
    for _ in 0..200 {
        let (rogue, node) = (Arc::clone(&rogue), Arc::clone(&node));
        held.spawn(async move {
            let mut stream = rogue.try_open(&node, connection, INFERENCE_PROTOCOL).await.ok()?;
            let _ = put(&mut stream, b"not JSON").await;
            Some(stream)
        });
    }
    for _ in 0..50 {
        let mut stream = friend
            .ask(
                "home",
                &friend.handle.snapshot().clusters[&id("home")]
                    .members
                    .iter()
                    .find(|m| m.name == "a")
                    .map_or(member.clone(), |m| m.id.clone()),
                "x",
            )
            .unwrap();
        assert_eq!(whole(&mut stream).await.unwrap(), "x");
    }
    held.abort_all();
}
