//! The peer protocol against golden messages that an independent program computed, and against every way to damage them.
//!
//! What one message alone can show is tested beside its code; here are the messages as they go over the wire.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::AsyncRead;
use futures::io::Cursor;
use opengateway::domain::cluster::ClusterId;
use opengateway::domain::node::{ModelOffer, ModelSource, ModelState};
use opengateway::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, Role, Text, Turn, Usage};
use opengateway::wire::control::{ByeReason, Control, ControlError, Heartbeat, State, View, ViewEntry};
use opengateway::wire::frame::{self, Decoder, FrameError, FrameReader};
use opengateway::wire::hello::{HelloError, Initiator, Responder};
use opengateway::wire::infer::{self, AnswerHash, InferError, Request, Response};
use opengateway::wire::keys::{self, Root};
use opengateway::wire::limits::{
    H1_BYTES, MAX_BYE_BYTES, MAX_CONTROL_FRAME_BYTES, MAX_HEARTBEAT_BYTES, MAX_HELLO_FRAME_BYTES, MAX_MESSAGE_BYTES,
    MAX_MODEL_NAME_BYTES, MAX_MODELS_BYTES, MAX_REQUEST_FRAME_BYTES, MAX_RESPONSE_FRAME_BYTES, MAX_STATE_BYTES,
};
use opengateway::wire::models::{Details, Models};
use opengateway::wire::roster::{Card, Roster, RosterEntry, Word};
use opengateway::wire::version::Versions;
use proptest::prelude::*;
use uuid::Uuid;

const ID: Uuid = Uuid::from_u128(0x0123_4567_89ab_4def_8123_4567_89ab_cdef);
const OURS: Versions = Versions::OURS;
const OLD: Versions = Versions::only(1);
const TWO: Versions = Versions { min: 1, max: 2 };

/// Versions that speak as the golden messages of one do.
fn versions_of(message: &str) -> Versions {
    match &message[.."member-1-".len()] {
        "member-1-" => OLD,
        "member-2-" => TWO,
        _ => OURS,
    }
}
const NONCES: [[u8; 32]; 2] = [[1; 32], [2; 32]];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/wire")
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        hex.chars().filter(|c| !c.is_whitespace()).map(|c| u8::try_from(c.to_digit(16).unwrap()).unwrap()).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// A whole frame, its length included.
fn golden_frame(name: &str) -> Vec<u8> {
    bytes_of(&fs::read_to_string(folder().join(name).with_extension("hex")).unwrap_or_else(|error| panic!("{name}: {error}")))
}

/// The body of a frame.
fn golden(name: &str) -> Vec<u8> {
    let whole = golden_frame(name);
    let (length, body) = whole.split_first_chunk().unwrap();
    assert_eq!(u32::from_be_bytes(*length) as usize, body.len(), "{name}");
    body.to_vec()
}

fn names(beginning: &str) -> Vec<String> {
    let entries = fs::read_dir(folder()).unwrap().flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = entries
        .filter_map(|name| name.strip_suffix(".hex").map(str::to_owned))
        .filter(|name| name.starts_with(beginning))
        .collect();
    names.sort();
    names
}

fn framed(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    frame::encode(body, &mut out);
    out
}

fn peer(key: &str) -> Vec<u8> {
    bytes_of(&format!("002408011220{key}"))
}

/// Binary peer ids of the golden hello.
fn opener() -> Vec<u8> {
    peer("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
}

fn accepter() -> Vec<u8> {
    peer("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
}

fn id(name: &str) -> ClusterId {
    ClusterId::new(name).unwrap()
}

fn poc() -> Root {
    Root::public(&id("gatewayai-poc"))
}

// -- golden messages ----------------------------------------------------------------------------------------------------

#[test]
fn cluster_keys_are_the_golden_ones() {
    let text = fs::read_to_string(folder().join("cluster-keys-1.txt")).unwrap();
    let golden: BTreeMap<&str, Vec<u8>> =
        text.lines().map(|line| line.split_once(" = ").unwrap()).map(|(name, hex)| (name, bytes_of(hex))).collect();
    let llama = Root::public(&id("llama-3.2-3b"));
    let private = Root::private(&[7; 32], 3);
    assert_eq!(golden["public-cluster-ref gatewayai-poc"], poc().cluster_ref());
    assert_eq!(golden["public-cluster-ref Llama-3.2-3B"], llama.cluster_ref(), "written in any case, a name has one key");
    assert_eq!(golden["private-cluster-ref 07×32 3"], private.cluster_ref());
    assert_eq!(golden["public-dht-key gatewayai-poc 0 0"], keys::dht_key(&poc(), 0, 0));
    assert_eq!(golden["public-dht-key gatewayai-poc 0 1"], keys::dht_key(&poc(), 0, 1));
    assert_eq!(golden["private-dht-key 07×32 3 20000 5"], keys::dht_key(&private, 20_000, 5));
    // The roots themselves do not leave the library. They are the key of all of the above, and stand there for others.
    assert_eq!(golden.len(), 6 + 3);
    for (root, reference) in [
        ("public-root gatewayai-poc", "public-cluster-ref gatewayai-poc"),
        ("public-root Llama-3.2-3B", "public-cluster-ref Llama-3.2-3B"),
        ("private-root 07×32 3", "private-cluster-ref 07×32 3"),
    ] {
        use hmac::{KeyInit as _, Mac as _};
        let mut mac = hmac::Hmac::<sha2::Sha256>::new_from_slice(&golden[root]).unwrap();
        mac.update(b"\0\0\0\x03ref");
        assert_eq!(mac.finalize().into_bytes()[..16], golden[reference], "{root}");
    }
}

#[test]
fn the_hello_is_the_golden_one() {
    let (opener, accepter, root) = (opener(), accepter(), poc());
    let other = Root::public(&id("other"));
    // Old nodes among themselves and with us, and us among ourselves.
    for (opening, accepting, version) in [(OLD, OLD, 1), (OLD, OURS, 1), (TWO, TWO, 2), (TWO, OURS, 2), (OURS, OURS, 3)] {
        let name = |message: &str| format!("member-{version}-{message}");
        let (initiator, h1) = Initiator::new(opening, &root, &opener, &accepter, NONCES[0]);
        assert_eq!(framed(&h1), golden_frame(&name("h1")));
        let (matched, responder) =
            Responder::on_h1(accepting, &[&other, &root], &opener, &accepter, &golden(&name("h1")), NONCES[1]).unwrap();
        assert_eq!((matched, responder.version()), (1, Ok(version)));
        assert_eq!(framed(responder.h2()), golden_frame(&name("h2")));
        let (agreed, h3) = initiator.on_h2(&golden(&name("h2"))).unwrap();
        assert_eq!((agreed, framed(&h3)), (version, golden_frame(&name("h3"))));
        assert_eq!(responder.on_h3(&golden(&name("h3"))), Ok(()));
    }
}

#[test]
fn a_later_version_is_told_that_there_is_none_in_common() {
    let root = poc();
    let later = golden("member-1-h1-later-versions");
    let (_, responder) = Responder::on_h1(OURS, &[&root], &opener(), &accepter(), &later, NONCES[1]).unwrap();
    assert_eq!(responder.version(), Err(HelloError::VersionMismatch { min: 9, max: 12 }));
    assert_eq!(framed(responder.h2()), golden_frame("member-1-h2-no-common-version"));
}

fn address(text: &str) -> Vec<u8> {
    text.parse::<libp2p::Multiaddr>().unwrap().to_vec()
}

fn wire_card(quic: &[u8]) -> Card {
    Card {
        serving: true,
        name: "NodeA".to_owned(),
        models: vec!["llama3.2:3b".to_owned(), "echo".to_owned()],
        addresses: vec![quic.to_vec(), address("/ip6/2001:db8::7/tcp/4001")],
        ..Card::default()
    }
}

fn controls() -> BTreeMap<String, Control> {
    let model = |name: &str, context_tokens| ModelOffer { context_tokens, ..ModelOffer::named(name) };
    let beat = Heartbeat {
        seq: 7,
        serving: true,
        draining: false,
        probe: false,
        free_slots: 3,
        queued: 1,
        state_version: 9,
        echo_seq: 6,
        echo_delay_us: 1500,
    };
    let draining =
        Heartbeat { seq: 1 << 40, serving: true, draining: true, queued: 65_535, state_version: 1, ..Heartbeat::default() };
    let state = State {
        version: 2,
        node_name: "NodeA".to_owned(),
        software: "0.1.0".to_owned(),
        models: vec![model("llama3.2:3b", 131_072), model("echo", 0)],
        tiers: vec!["SmolLM-360M".to_owned(), "Qwen2-0.5B".to_owned()],
    };
    let consumer = State { version: 1, node_name: "Größe".to_owned(), software: "0.1.0".to_owned(), ..State::default() };
    let quic = address("/ip4/192.0.2.7/udp/4001/quic-v1");
    let card = wire_card(&quic);
    let roster = Roster {
        members: 200,
        entries: vec![
            RosterEntry { peer: accepter(), age_seconds: 4, word: Word::Here(card) },
            RosterEntry {
                peer: opener(),
                age_seconds: 0,
                word: Word::Here(Card { hearsay: true, draining: true, name: "Größe".to_owned(), ..Card::default() }),
            },
            RosterEntry { peer: accepter(), age_seconds: 17, word: Word::Lost },
        ],
    };
    let view = View {
        entries: vec![
            ViewEntry { peer: accepter(), age_seconds: 4, addresses: vec![quic.clone(), address("/ip6/2001:db8::7/tcp/4001")] },
            ViewEntry { peer: opener(), age_seconds: 0, addresses: vec![quic.clone()] },
        ],
    };
    let models = Models {
        state_version: 2,
        details: vec![
            Details {
                state: ModelState::Ready,
                source: ModelSource::Engine,
                slots: 4,
                size: Some(386_404_992),
                parameters: Some(361_821_120),
                quantisation: Some("Q8_0".to_owned()),
                digest: Some(std::array::from_fn(|at| u8::try_from(at).unwrap())),
            },
            Details {
                state: ModelState::Loading,
                source: ModelSource::Upstream,
                slots: 1,
                parameters: Some(8_030_261_248),
                ..Details::default()
            },
            Details { state: ModelState::Failed, size: Some(1), quantisation: Some(String::new()), ..Details::default() },
            Details { source: ModelSource::Echo, slots: u16::MAX, ..Details::default() },
        ],
    };
    let later = [
        ("member-2-models".to_owned(), Control::Models(models)),
        ("member-2-models-none".to_owned(), Control::Models(Models { state_version: 1 << 31, details: Vec::new() })),
        ("member-3-heartbeat-probe".to_owned(), Control::Heartbeat(Heartbeat { seq: 8, probe: true, ..beat })),
        ("member-3-roster".to_owned(), Control::Roster(roster)),
        ("member-3-notice-same-identity".to_owned(), Control::SameIdentity(quic)),
        ("member-3-bye-identity".to_owned(), Control::Bye(ByeReason::Identity)),
        ("member-3-bye-surplus".to_owned(), Control::Bye(ByeReason::Surplus)),
    ];
    let first = [
        ("heartbeat", Control::Heartbeat(beat)),
        ("heartbeat-draining", Control::Heartbeat(draining)),
        ("state", Control::State(state)),
        ("state-consumer", Control::State(consumer)),
        ("view", Control::View(view)),
        ("bye-shutdown", Control::Bye(ByeReason::Shutdown)),
        ("bye-leave", Control::Bye(ByeReason::Leave)),
        ("bye-duplicate", Control::Bye(ByeReason::Duplicate)),
        ("bye-revoked", Control::Bye(ByeReason::Revoked)),
    ]
    .map(|(name, control)| (format!("member-1-{name}"), control));
    first.into_iter().chain(later).collect()
}

#[test]
fn every_control_frame_is_the_golden_one() {
    for (name, control) in controls() {
        assert_eq!(Control::decode(&golden(&name)).as_ref(), Ok(&control), "{name}");
        assert_eq!(framed(&control.encode()), golden_frame(&name), "{name}");
        let version: u16 = name["member-".len()..][..1].parse().unwrap();
        assert_eq!(control.since(), version, "{name}");
    }
}

fn requests() -> BTreeMap<String, (Ask, Duration)> {
    let minimal = Ask { prompt: Text::new("What is 2+2?"), ..Ask::default() };
    let all = Ask {
        model: Some("llama3.2:3b".to_owned()),
        prompt: Text::new("What is \"2+2\"?\n\u{1f600}\u{1b}"),
        system: Some(Text::new("be brief")),
        max_tokens: Some(7),
        temperature: Some(0.5),
        seed: Some(u64::MAX),
        ..Ask::default()
    };
    let turn = |role, text: &str| Turn { role, text: Text::new(text) };
    let conversation = Ask {
        model: Some("llama3.2:3b".to_owned()),
        prompt: Text::new("And 3+3?"),
        system: Some(Text::new("be brief")),
        history: vec![turn(Role::User, "What is \"2+2\"?"), turn(Role::Assistant, "Four\n"), turn(Role::System, "")],
        top_p: Some(0.25),
        seed: Some(1),
        stop: vec![Text::new("\n\n"), Text::new("</s>")],
        ..Ask::default()
    };
    let raw = Ask { prompt: Text::new("2+2="), raw: true, max_tokens: Some(1), ..Ask::default() };
    [
        ("request-minimal", (minimal, Duration::from_secs(120))),
        ("request-all", (all, Duration::from_secs(3600))),
        ("request-conversation", (conversation, Duration::from_millis(1))),
        ("request-raw", (raw, Duration::from_secs(120))),
    ]
    .map(|(name, request)| (format!("inference-1-{name}"), request))
    .into()
}

#[test]
fn every_request_is_the_golden_one() {
    for (name, (ask, timeout)) in requests() {
        let read = Request::decode(&golden(&name)).unwrap();
        assert_eq!((read.request_id, read.cluster_ref, read.timeout), (ID, poc().cluster_ref(), timeout), "{name}");
        assert_eq!(read.ask, ask, "{name}");
        let mut out = Vec::new();
        infer::encode_request(&mut out, &read.request_id, &read.cluster_ref, &read.ask, read.timeout).unwrap();
        assert_eq!(out, golden_frame(&name), "{name}");
    }
}

const ANSWER: [&str; 3] = ["Four", ", says the \"machine\"\n", "\u{1f600}\u{1b}"];

fn responses() -> BTreeMap<String, Response<'static>> {
    let token =
        |text: &'static str, model: Option<&'static str>| Response::Token { text: text.into(), model: model.map(Into::into) };
    let end = |finish, usage, model: &'static str, pieces: &[&str]| {
        let mut hash = AnswerHash::new();
        pieces.iter().for_each(|piece| hash.update(piece.as_bytes()));
        let text_bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        Response::End { done: Done { finish, usage }, model: model.into(), text_bytes, hash: hash.finish().into() }
    };
    let error = |kind, detail: &str| Response::Error(Failure::new(kind, detail));
    let usage = Usage { prompt_tokens: 12, completion_tokens: 3 };
    let after = Some(Duration::from_secs(2));
    let loading = Failure { kind: FailureKind::ModelLoading, detail: "40 % are read".to_owned(), retry_after: after };
    let busy = Failure::busy("every slot is taken and 16 prompts wait", Duration::from_millis(1500));
    [
        ("token-first", token(ANSWER[0], Some("llama3.2:3b"))),
        ("token", token(ANSWER[1], None)),
        ("token-escaped", token(ANSWER[2], None)),
        ("keepalive", Response::KeepAlive { position: None }),
        ("keepalive-queued", Response::KeepAlive { position: Some(3) }),
        ("end-stop", end(FinishReason::Stop, usage, "llama3.2:3b", &ANSWER)),
        ("end-length", end(FinishReason::Length, Usage::default(), "echo", &[])),
        ("error-busy", Response::Error(busy)),
        ("error-not-authorized", error(FailureKind::NotAuthorized, "this node does not serve this cluster")),
        ("error-model", error(FailureKind::ModelUnavailable, "no model \"größer\" here")),
        ("error-backend", error(FailureKind::BackendFailed, "")),
        ("error-context", error(FailureKind::ContextOverflow, "9000 tokens, the window is 8192")),
        ("error-loading", Response::Error(loading)),
        ("error-quarantined", error(FailureKind::PromptQuarantined, "it ended the engine twice")),
    ]
    .map(|(name, response)| (format!("inference-1-response-{name}"), response))
    .into()
}

fn encoded(response: Response<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    match response {
        Response::Token { text, model } => infer::encode_token(&mut out, &ID, &text, model.as_deref()),
        Response::KeepAlive { position } => infer::encode_keepalive(&mut out, &ID, position),
        Response::End { done, model, text_bytes, hash } => infer::encode_end(&mut out, &ID, &model, done, text_bytes, &hash),
        Response::Error(failure) => infer::encode_error(&mut out, &ID, &failure),
    }
    out
}

#[test]
fn every_response_is_the_golden_one() {
    for (name, response) in responses() {
        let body = golden(&name);
        let read = Response::decode(&body, &ID).unwrap();
        assert_eq!(read, response, "{name}");
        assert_eq!(encoded(read), golden_frame(&name), "{name}");
    }
}

#[test]
fn no_golden_message_is_forgotten() {
    let only = ["member-1-h1-later-versions", "member-1-h2-no-common-version"];
    let hello = HELLO.iter().chain(&HELLO_TWO).chain(&HELLO_THREE).chain(&only).map(ToString::to_string);
    let known: BTreeSet<String> =
        hello.chain(controls().into_keys()).chain(requests().into_keys()).chain(responses().into_keys()).collect();
    assert_eq!(names(""), known.into_iter().collect::<Vec<_>>());
}

fn description() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/protocol.md")).unwrap()
}

#[test]
fn every_limit_stands_in_the_description() {
    let limits = include_str!("../../src/wire/limits.rs");
    let names = limits.lines().filter_map(|line| line.strip_prefix("pub const ")?.split_once(':')).map(|(name, _)| name);
    let missing: Vec<&str> = names.filter(|name| !description().contains(&format!("`{name}`"))).collect();
    assert_eq!(missing, [""; 0]);
    let every_kind = FailureKind::ALL.iter().all(|kind| description().contains(&format!("`{}`", kind.as_str())));
    assert!(every_kind);
}

#[test]
fn the_examples_of_the_description_are_read() {
    let text = description();
    let blocks: Vec<&str> = text.split("```json").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    let messages = |block: &str| -> Vec<Vec<u8>> {
        serde_json::Deserializer::from_str(block)
            .into_iter::<serde_json::Value>()
            .map(|value| value.unwrap().to_string().into())
            .collect()
    };
    let [request, responses] = blocks[..] else { panic!("{} blocks", blocks.len()) };
    let request = Request::decode(&messages(request)[0]).unwrap();
    assert_eq!((request.request_id, request.cluster_ref), (ID, poc().cluster_ref()));
    let mut hash = AnswerHash::new();
    let mut events = 0;
    for message in messages(responses) {
        events += 1;
        match Response::decode(&message, &ID).unwrap() {
            Response::Token { text, .. } => hash.update(text.as_bytes()),
            Response::End { hash: told, text_bytes, .. } => assert_eq!((told.as_ref(), text_bytes), (hash.finish().as_str(), 4)),
            Response::KeepAlive { .. } | Response::Error(_) => {}
        }
    }
    assert_eq!(events, 4);
}

// -- damaged hellos -----------------------------------------------------------------------------------------------------

/// One message of the golden hello, delivered to the side that waits for it.
fn deliver(message: &str, bytes: &[u8]) -> Result<(), HelloError> {
    let (opener, accepter, root) = (opener(), accepter(), poc());
    let versions = versions_of(message);
    let (initiator, h1) = Initiator::new(versions, &root, &opener, &accepter, NONCES[0]);
    let accept = |h1: &[u8]| Responder::on_h1(versions, &[&root], &opener, &accepter, h1, NONCES[1]);
    match message.split_at("member-1-".len()).1 {
        "h1" => accept(bytes).map(|_| ()),
        "h2" => initiator.on_h2(bytes).map(|_| ()),
        "h3" => accept(&h1)?.1.on_h3(bytes),
        other => panic!("{other}"),
    }
}

const HELLO: [&str; 3] = ["member-1-h1", "member-1-h2", "member-1-h3"];
const HELLO_TWO: [&str; 3] = ["member-2-h1", "member-2-h2", "member-2-h3"];
const HELLO_THREE: [&str; 3] = ["member-3-h1", "member-3-h2", "member-3-h3"];

#[test]
fn a_hello_of_another_length_is_refused() {
    for name in HELLO.into_iter().chain(HELLO_TWO).chain(HELLO_THREE) {
        let whole = golden(name);
        assert_eq!(deliver(name, &whole), Ok(()));
        for length in 0..whole.len() {
            assert!(deliver(name, &whole[..length]).is_err(), "{name} cut to {length}");
            assert!(deliver(name, &whole[length + 1..]).is_err(), "{name} without its first {}", length + 1);
        }
        for longer in [whole.len() + 1, MAX_HELLO_FRAME_BYTES, MAX_HELLO_FRAME_BYTES + 1] {
            let mut bytes = whole.clone();
            bytes.resize(longer, 0);
            assert!(deliver(name, &bytes).is_err(), "{name} of {longer}");
        }
    }
}

#[test]
fn every_flipped_bit_of_a_hello_is_refused() {
    for name in HELLO.into_iter().chain(HELLO_TWO).chain(HELLO_THREE) {
        let whole = golden(name);
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(deliver(name, &bytes).is_err(), "{name}, bit {bit}");
        }
    }
}

#[test]
fn a_message_of_the_hello_in_the_place_of_another_is_refused() {
    for place in HELLO.into_iter().chain(HELLO_TWO).chain(HELLO_THREE) {
        for name in names("") {
            // What another version would open with is no less a hello.
            let opening = |name: &str| name.contains("-h1");
            let fits = place == name || (opening(place) && opening(&name));
            assert_eq!(deliver(place, &golden(&name)).is_ok(), fits, "{name} for {place}");
        }
    }
}

#[test]
fn a_recorded_hello_is_of_no_use_to_anybody() {
    let (opener, accepter, root) = (opener(), accepter(), poc());
    let stranger = peer(&"11".repeat(32));
    let [h1, h2, h3] = HELLO.map(golden);
    let accept = |from: &[u8], at: &[u8], nonce| Responder::on_h1(OURS, &[&root], from, at, &h1, nonce);
    // By another peer, at another node, back to its sender.
    for (from, at) in [(&stranger, &accepter), (&opener, &stranger), (&accepter, &opener)] {
        assert_eq!(accept(from, at, NONCES[1]).unwrap_err(), HelloError::NoMatch);
    }
    // By the same peer at the same node: the accepter's nonce is another one, and H3 does not fit.
    let (_, again) = accept(&opener, &accepter, [3; 32]).unwrap();
    assert_ne!(again.h2(), h2);
    assert_eq!(again.on_h3(&h3), Err(HelloError::BadTag("H3")));
    // A recorded H2 for a new H1.
    let (initiator, _) = Initiator::new(OURS, &root, &opener, &accepter, [4; 32]);
    assert_eq!(initiator.on_h2(&h2).unwrap_err(), HelloError::BadTag("H2"));
    // Both open to each other at once: what one sent does not do for the other.
    let (reverse, _) = Initiator::new(OURS, &root, &accepter, &opener, NONCES[0]);
    assert_eq!(reverse.on_h2(&h2).unwrap_err(), HelloError::BadTag("H2"));
    // In a cluster with another root.
    let other = Root::public(&id("gatewayai-poc2"));
    let (initiator, _) = Initiator::new(OURS, &other, &opener, &accepter, NONCES[0]);
    assert_eq!(initiator.on_h2(&h2).unwrap_err(), HelloError::BadTag("H2"));
}

// -- damaged frames -----------------------------------------------------------------------------------------------------

fn control_names() -> Vec<String> {
    controls().into_keys().collect()
}

fn inference_names() -> Vec<String> {
    requests().into_keys().chain(responses().into_keys()).collect()
}

/// A control frame that is read is within every limit, and there is one way alone to write it.
fn read_control(bytes: &[u8]) -> Result<Control, ControlError> {
    let read = Control::decode(bytes)?;
    assert!(bytes.len() <= MAX_CONTROL_FRAME_BYTES);
    assert_eq!(read.encode(), bytes, "{read:?}");
    Ok(read)
}

/// An inference message that is read is within every limit, and what is not says nothing of its text.
fn read_inference(bytes: &[u8]) -> Result<(), InferError> {
    let quiet = |error: InferError| {
        assert!(!format!("{error} {error:?}").contains("2+2"), "{error:?}");
        error
    };
    let request = Request::decode(bytes).map_err(quiet);
    if let Ok(request) = &request {
        let Ask { model, max_tokens, temperature, top_p, history, stop, raw, system, .. } = &request.ask;
        assert!(top_p.is_none_or(|top_p| top_p > 0.0 && top_p <= 1.0) && history.len() <= 1024 && stop.len() <= 16);
        assert!(stop.iter().all(|text| (1..=256).contains(&text.as_str().len())));
        assert!(!raw || (system.is_none() && history.is_empty()));
        assert!(model.as_ref().is_none_or(|model| (1..=MAX_MODEL_NAME_BYTES).contains(&model.len())));
        assert!(*max_tokens != Some(0) && temperature.is_none_or(|temperature| (0.0..=2.0).contains(&temperature)));
        assert!(!request.timeout.is_zero() && request.timeout <= Duration::from_secs(3600));
    }
    let response = Response::decode(bytes, &ID).map_err(quiet);
    match &response {
        Ok(Response::Token { model: Some(model), .. } | Response::End { model, .. }) => {
            assert!(model.len() <= MAX_MODEL_NAME_BYTES);
        }
        Ok(Response::Error(failure)) => {
            assert!(failure.detail.len() <= MAX_MESSAGE_BYTES && !failure.detail.contains(char::is_control));
            assert!(failure.retry_after.is_none_or(|after| after <= Duration::from_secs(3600)));
        }
        Ok(Response::Token { model: None, .. } | Response::KeepAlive { .. }) | Err(_) => {}
    }
    assert!(request.is_err() || response.is_err(), "one message is never both");
    request.map(|_| ()).or(response.map(|_| ()))
}

#[test]
fn every_truncation_and_every_extension_of_a_frame_is_refused() {
    for name in control_names() {
        let whole = golden(&name);
        for length in 0..whole.len() {
            assert!(read_control(&whole[..length]).is_err(), "{name} cut to {length}");
        }
        for more in 0..=255 {
            assert!(read_control(&[whole.as_slice(), &[more]].concat()).is_err(), "{name} and {more:#x}");
        }
    }
    for name in inference_names() {
        let whole = golden(&name);
        for length in 0..whole.len() {
            assert!(read_inference(&whole[..length]).is_err(), "{name} cut to {length}");
        }
        for more in 0..=255 {
            // Blank space after JSON is still the same JSON.
            let blank = matches!(more, b' ' | b'\t' | b'\n' | b'\r');
            assert_eq!(read_inference(&[whole.as_slice(), &[more]].concat()).is_ok(), blank, "{name} and {more:#x}");
        }
    }
}

#[test]
fn every_flipped_bit_of_a_frame_is_refused_or_is_another_message_within_the_limits() {
    let flipped = |name: &str| {
        let whole = golden(name);
        (0..whole.len() * 8).map(move |bit| {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            bytes
        })
    };
    for name in control_names() {
        let original = read_control(&golden(&name));
        for bytes in flipped(&name) {
            let read = read_control(&bytes);
            assert!(read.is_err() || read != original, "{name}: every bit means something");
        }
    }
    for name in inference_names() {
        for bytes in flipped(&name) {
            let _ = read_inference(&bytes);
        }
    }
}

/// Reads one frame of `body` bytes where `limit` are allowed.
fn read_frame(body: usize, limit: usize) -> Result<usize, FrameError> {
    let mut reader = FrameReader::new(Cursor::new(framed(&vec![b'x'; body])));
    futures::executor::block_on(reader.next(limit)).map(|frame| frame.unwrap().len())
}

#[test]
fn every_limit_of_a_frame_holds_at_the_limit_and_one_past_it() {
    for limit in [H1_BYTES, MAX_HELLO_FRAME_BYTES, MAX_CONTROL_FRAME_BYTES, MAX_REQUEST_FRAME_BYTES, MAX_RESPONSE_FRAME_BYTES] {
        assert_eq!(read_frame(limit, limit).unwrap(), limit);
        let error = read_frame(limit + 1, limit).unwrap_err();
        assert!(
            matches!(error, FrameError::TooLong { announced, limit: told } if announced == limit + 1 && told == limit),
            "{error}"
        );
        assert!(error.is_violation());
    }
}

#[test]
fn every_limit_of_a_control_frame_holds_at_the_limit_and_one_past_it() {
    let too_long = |bytes: &[u8]| matches!(Control::decode(bytes), Err(ControlError::TooLong { .. }));
    for (kind, limit) in [
        (0x10, MAX_HEARTBEAT_BYTES),
        (0x11, MAX_STATE_BYTES),
        (0x12, MAX_CONTROL_FRAME_BYTES),
        (0x13, MAX_MODELS_BYTES),
        (0x1f, MAX_BYE_BYTES),
    ] {
        let sized = |length: usize| std::iter::once(kind).chain(std::iter::repeat_n(0, length - 1)).collect::<Vec<u8>>();
        assert!(!too_long(&sized(limit)), "{kind:#x}");
        assert!(too_long(&sized(limit + 1)), "{kind:#x}");
    }
    // A state that is read fills its limit: 61 models with names of 127 bytes, and one that makes it whole.
    let full = |last: usize| {
        let mut body = vec![0x11, 0, 0, 0, 1, 0, 0, 62];
        for length in std::iter::repeat_n(127, 61).chain([last]) {
            body.push(u8::try_from(length).unwrap());
            body.extend(std::iter::repeat_n(b'm', length));
            body.extend([0; 4]);
        }
        body.push(0);
        body
    };
    let rest = MAX_STATE_BYTES - full(0).len();
    assert!(rest < MAX_MODEL_NAME_BYTES, "{rest}");
    assert!(Control::decode(&full(rest)).is_ok());
    assert!(too_long(&full(rest + 1)));
}

#[test]
fn a_request_of_one_mebibyte_is_read_and_one_byte_more_is_not() {
    let sized = |length: usize| {
        let text = String::from_utf8(golden("inference-1-request-minimal")).unwrap();
        let more = length - text.len();
        text.replace("What is", &format!("{}What is", "a".repeat(more)))
    };
    let whole = sized(MAX_REQUEST_FRAME_BYTES);
    let mut reader = FrameReader::new(Cursor::new(framed(whole.as_bytes())));
    let frame = futures::executor::block_on(reader.next(MAX_REQUEST_FRAME_BYTES)).unwrap().unwrap();
    assert!(Request::decode(&frame).is_ok());
    assert!(read_frame(sized(MAX_REQUEST_FRAME_BYTES + 1).len(), MAX_REQUEST_FRAME_BYTES).is_err());
}

#[test]
fn an_empty_frame_and_an_endless_one_are_refused_for_every_kind() {
    for limit in [H1_BYTES, MAX_HELLO_FRAME_BYTES, MAX_CONTROL_FRAME_BYTES, MAX_REQUEST_FRAME_BYTES, MAX_RESPONSE_FRAME_BYTES] {
        let first = |prefix: u32| {
            let mut reader = FrameReader::new(Cursor::new(prefix.to_be_bytes()));
            futures::executor::block_on(reader.next(limit)).map(|_| ()).unwrap_err()
        };
        assert!(matches!(first(0), FrameError::Empty) && first(0).is_violation());
        assert!(matches!(first(u32::MAX), FrameError::TooLong { .. }));
        assert!(matches!(first(1), FrameError::Truncated) && !first(1).is_violation(), "who goes away breaks no rule");
    }
    assert!(Control::decode(&[]).is_err());
    assert!(read_inference(&[]).is_err());
}

/// Gives one byte at a time.
struct Trickle(Cursor<Vec<u8>>);

impl AsyncRead for Trickle {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<std::io::Result<usize>> {
        let most = buffer.len().min(1);
        Pin::new(&mut self.0).poll_read(context, &mut buffer[..most])
    }
}

#[test]
fn ten_thousand_frames_arrive_one_byte_at_a_time() {
    let bodies: Vec<Vec<u8>> = names("member-").iter().map(|name| golden(name)).collect();
    let sent: Vec<&[u8]> = bodies.iter().cycle().take(10_000).map(Vec::as_slice).collect();
    let mut bytes = Vec::new();
    sent.iter().for_each(|body| frame::encode(body, &mut bytes));
    let mut decoder = Decoder::default();
    let mut arrived = 0;
    for byte in &bytes {
        decoder.push(std::slice::from_ref(byte));
        while let Some(frame) = decoder.next(MAX_CONTROL_FRAME_BYTES).unwrap() {
            assert_eq!(&*frame, sent[arrived]);
            arrived += 1;
        }
        assert!(decoder.pending() <= PREFIX + bodies.iter().map(Vec::len).max().unwrap());
    }
    assert_eq!(arrived, sent.len());
    let mut reader = FrameReader::new(Trickle(Cursor::new(bytes)));
    futures::executor::block_on(async {
        for body in &sent {
            assert_eq!(&*reader.next(MAX_CONTROL_FRAME_BYTES).await.unwrap().unwrap(), *body);
        }
        assert!(reader.next(MAX_CONTROL_FRAME_BYTES).await.unwrap().is_none());
    });
}

const PREFIX: usize = frame::PREFIX_BYTES;

// -- properties ---------------------------------------------------------------------------------------------------------

fn any_peer() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 34..43)
}

fn any_control() -> impl Strategy<Value = Control> {
    let heartbeat = any::<((u64, [bool; 3], u16), (u16, u32, u64, u32))>().prop_map(
        |((seq, [serving, draining, probe], free_slots), (queued, state_version, echo_seq, echo_delay_us))| {
            let flags = Heartbeat { serving, draining, probe, ..Heartbeat::default() };
            Control::Heartbeat(Heartbeat { seq, free_slots, queued, state_version, echo_seq, echo_delay_us, ..flags })
        },
    );
    // Beyond every limit too: what is sent is always read.
    let model =
        (".{0,200}", any::<u32>()).prop_map(|(name, context_tokens)| ModelOffer { context_tokens, ..ModelOffer::named(name) });
    let models = proptest::collection::vec(model, 0..80);
    let tiers = proptest::collection::vec(".{0,90}", 0..40);
    let state = (any::<u32>(), ".{0,90}", ".{0,40}", models, tiers).prop_map(|(version, node_name, software, models, tiers)| {
        Control::State(State { version, node_name, software, models, tiers })
    });
    let bytes = |most: usize| proptest::collection::vec(any::<u8>(), 0..most);
    let entry = (bytes(70), any::<u32>(), proptest::collection::vec(bytes(110), 0..6))
        .prop_map(|(peer, age_seconds, addresses)| ViewEntry { peer, age_seconds, addresses });
    let view = proptest::collection::vec(entry, 0..40).prop_map(|entries| Control::View(View { entries }));
    prop_oneof![heartbeat, state, view, any_models(), any_roster()]
}

fn any_roster() -> impl Strategy<Value = Control> {
    let bytes = |most: usize| proptest::collection::vec(any::<u8>(), 0..most);
    let texts = proptest::collection::vec(".{0,150}", 0..6);
    let card = (any::<[bool; 3]>(), ".{0,90}", texts, proptest::collection::vec(bytes(110), 0..6)).prop_map(
        |([hearsay, serving, draining], name, models, addresses)| Card { hearsay, serving, draining, name, models, addresses },
    );
    let word = prop_oneof![card.prop_map(Word::Here), Just(Word::Lost)];
    let entry = (bytes(70), any::<u32>(), word).prop_map(|(peer, age_seconds, word)| RosterEntry { peer, age_seconds, word });
    (any::<u16>(), proptest::collection::vec(entry, 0..40))
        .prop_map(|(members, entries)| Control::Roster(Roster { members, entries }))
}

fn any_models() -> impl Strategy<Value = Control> {
    let state = prop::sample::select(vec![ModelState::Available, ModelState::Loading, ModelState::Ready, ModelState::Failed]);
    let source = prop::sample::select(vec![ModelSource::Unknown, ModelSource::Echo, ModelSource::Engine, ModelSource::Upstream]);
    let numbers = any::<(u16, Option<u64>, Option<u64>, Option<[u8; 32]>)>();
    let details = (state, source, numbers, proptest::option::of(".{0,20}")).prop_map(
        |(state, source, (slots, size, parameters, digest), quantisation)| Details {
            state,
            source,
            slots,
            size,
            parameters,
            quantisation,
            digest,
        },
    );
    (any::<u32>(), proptest::collection::vec(details, 0..80))
        .prop_map(|(state_version, details)| Control::Models(Models { state_version, details }))
}

fn any_turns() -> impl Strategy<Value = Vec<Turn>> {
    let role = prop::sample::select(vec![Role::System, Role::User, Role::Assistant]);
    proptest::collection::vec((role, ".*").prop_map(|(role, text)| Turn { role, text: Text::new(text) }), 0..6)
}

fn any_ask() -> impl Strategy<Value = Ask> {
    let option = proptest::option::of::<&'static str>;
    let numbers = (
        proptest::option::of(1_u32..),
        proptest::option::of((0..=200).prop_map(|hundredths| f64::from(hundredths) / 100.0)),
        any::<Option<u64>>(),
    );
    let top_p = proptest::option::of((1..=100).prop_map(|hundredths| f64::from(hundredths) / 100.0));
    let stop = proptest::collection::vec(".{1,60}".prop_map(Text::new), 0..=16);
    (option(".{1,30}"), ".*", option(".*"), numbers, (any_turns(), any::<bool>(), top_p, stop)).prop_map(
        |(model, prompt, system, (max_tokens, temperature, seed), (history, raw, top_p, stop))| Ask {
            model,
            prompt: Text::new(prompt),
            system: system.map(Text::new).filter(|_| !raw),
            history: if raw { Vec::new() } else { history },
            raw,
            max_tokens,
            temperature,
            top_p,
            seed,
            stop,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_two_members_of_a_cluster_greet_each_other_and_others_do_not(
        secrets in any::<[[u8; 32]; 2]>(), peers in [any_peer(), any_peer(), any_peer()], nonces in any::<[[u8; 32]; 2]>(),
    ) {
        prop_assume!(secrets[0] != secrets[1] && peers[0] != peers[1] && peers[1] != peers[2] && peers[0] != peers[2]);
        let roots = secrets.map(|secret| Root::private(&secret, 0));
        let (initiator, h1) = Initiator::new(OURS, &roots[0], &peers[0], &peers[1], nonces[0]);
        let accept = |root: &Root, from: usize, at: usize| Responder::on_h1(OURS, &[root], &peers[from], &peers[at], &h1, nonces[1]);
        prop_assert_eq!(accept(&roots[1], 0, 1).unwrap_err(), HelloError::NoMatch);
        prop_assert_eq!(accept(&roots[0], 2, 1).unwrap_err(), HelloError::NoMatch);
        prop_assert_eq!(accept(&roots[0], 0, 2).unwrap_err(), HelloError::NoMatch);
        let (_, responder) = accept(&roots[0], 0, 1).unwrap();
        let (version, h3) = initiator.on_h2(responder.h2()).unwrap();
        prop_assert_eq!(version, 3);
        prop_assert_eq!(responder.on_h3(&h3), Ok(()));
    }

    #[test]
    fn no_bytes_are_taken_for_a_hello(bytes in proptest::collection::vec(any::<u8>(), 0..100), kind in 1_u8..4) {
        for name in HELLO {
            prop_assert!(deliver(name, &bytes).is_err());
            let mut kind_fits = vec![kind];
            kind_fits.extend_from_slice(&bytes);
            prop_assert!(deliver(name, &kind_fits).is_err());
        }
    }

    #[test]
    fn whatever_a_node_sends_is_read_and_within_the_limits(control in any_control()) {
        let bytes = control.encode();
        let read = read_control(&bytes);
        prop_assert!(read.is_ok(), "{:?}", read);
        // What was within the limits is there in whole.
        if let (Control::Heartbeat(_), Ok(read)) = (&control, read) {
            prop_assert_eq!(read, control);
        }
    }

    #[test]
    fn control_frames_of_nonsense_are_refused_or_have_one_way_to_be_written(
        kind in prop_oneof![Just(0x10_u8), Just(0x11), Just(0x12), Just(0x13), Just(0x1f)], rest in proptest::collection::vec(any::<u8>(), 0..80),
    ) {
        let _ = read_control(&[&[kind], rest.as_slice()].concat());
    }

    #[test]
    fn any_request_reads_back(ask in any_ask(), millis in 1_u64..=3_600_000, reference in any::<[u8; 16]>(), id in any::<u128>()) {
        let (id, timeout) = (Uuid::from_u128(id), Duration::from_millis(millis));
        let mut out = Vec::new();
        infer::encode_request(&mut out, &id, &reference, &ask, timeout).unwrap();
        let read = Request::decode(&out[PREFIX..]).unwrap();
        prop_assert_eq!((read.ask, read.request_id, read.cluster_ref, read.timeout), (ask, id, reference, timeout));
    }

    #[test]
    fn any_response_reads_back(text in ".*", model in proptest::option::of(".{1,30}"), counts in any::<(u32, u32, u64)>(), kind in 0..FailureKind::ALL.len()) {
        let usage = Usage { prompt_tokens: counts.0, completion_tokens: counts.1 };
        let done = Done { finish: FinishReason::Stop, usage };
        let name = model.clone().unwrap_or_default();
        let end = || Response::End { done: done.clone(), model: name.clone().into(), text_bytes: counts.2, hash: "ab".into() };
        let failure = || Response::Error(Failure { kind: FailureKind::ALL[kind], detail: "why".to_owned(), retry_after: Some(Duration::ZERO) });
        let token = || Response::Token { text: text.as_str().into(), model: model.as_deref().map(Into::into) };
        for (sent, expected) in [(token(), token()), (end(), end()), (failure(), failure())] {
            let bytes = encoded(sent);
            prop_assert_eq!(Response::decode(&bytes[PREFIX..], &ID).unwrap(), expected);
        }
    }

    #[test]
    fn damaged_json_never_makes_a_reader_panic(which in 0_usize..12, at in any::<prop::sample::Index>(), put in proptest::collection::vec(any::<u8>(), 0..8), cut in 0_usize..8) {
        let names = inference_names();
        let mut bytes = golden(&names[which % names.len()]);
        let at = at.index(bytes.len());
        let end = (at + cut).min(bytes.len());
        bytes.splice(at..end, put);
        let _ = read_inference(&bytes);
    }
}
