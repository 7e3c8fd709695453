//! Requests and responses, read back, at their limits and past them.

use super::*;
use crate::wire::limits::{MAX_RESPONSE_FRAME_BYTES, MAX_TOKEN_TEXT_BYTES};
use proptest::prelude::*;

const ID: Uuid = Uuid::from_u128(0x0123_4567_89ab_4def_8123_4567_89ab_cdef);

fn request(ask: &Ask) -> Result<Request, InferError> {
    let mut out = Vec::new();
    encode_request(&mut out, &ID, &[3; 16], ask, Duration::from_secs(9)).unwrap();
    Request::decode(&out[4..])
}

fn turn(text: &str) -> Turn {
    Turn { role: Role::User, text: Text::new(text) }
}

#[test]
fn a_request_reads_back() {
    let ask = Ask {
        model: Some("m".to_owned()),
        prompt: Text::new("What is \"2+2\"?\n\u{1f600}"),
        system: Some(Text::new("be brief")),
        max_tokens: Some(7),
        temperature: Some(0.5),
        seed: Some(u64::MAX),
        ..Ask::default()
    };
    let read = request(&ask).unwrap();
    assert_eq!((read.ask, read.request_id, read.cluster_ref, read.timeout), (ask, ID, [3; 16], Duration::from_secs(9)));
}

#[test]
fn a_prompt_fits_up_to_the_frame_and_one_byte_more_does_not() {
    let sized = |length: usize| {
        let mut out = Vec::new();
        let ask = Ask { prompt: Text::new("a".repeat(length)), ..Ask::default() };
        encode_request(&mut out, &ID, &[3; 16], &ask, Duration::from_secs(9)).map(|()| out.len() - 4)
    };
    let envelope = sized(0).unwrap();
    let most = MAX_REQUEST_FRAME_BYTES - envelope;
    assert_eq!(sized(most).unwrap(), MAX_REQUEST_FRAME_BYTES);
    assert_eq!(sized(most + 1).unwrap_err().kind, FailureKind::InvalidRequest);
}

#[test]
fn fields_out_of_range_are_named() {
    for (ask, field) in [
        (Ask { temperature: Some(2.1), ..Ask::default() }, "temperature"),
        (Ask { temperature: Some(f64::NAN), ..Ask::default() }, "temperature"),
        (Ask { max_tokens: Some(0), ..Ask::default() }, "max_tokens"),
        (Ask { model: Some("m".repeat(129)), ..Ask::default() }, "model"),
        (Ask { model: Some(String::new()), ..Ask::default() }, "model"),
        (Ask { top_p: Some(0.0), ..Ask::default() }, "top_p"),
        (Ask { top_p: Some(1.01), ..Ask::default() }, "top_p"),
        (Ask { top_p: Some(f64::NAN), ..Ask::default() }, "top_p"),
        (Ask { history: vec![turn(""); MAX_TURNS + 1], ..Ask::default() }, "messages"),
        (Ask { stop: vec![Text::new("s"); MAX_STOPS + 1], ..Ask::default() }, "stop"),
        (Ask { stop: vec![Text::new("s".repeat(MAX_STOP_BYTES + 1))], ..Ask::default() }, "stop"),
        (Ask { stop: vec![Text::default()], ..Ask::default() }, "stop"),
        (Ask { raw: true, system: Some(Text::default()), ..Ask::default() }, "raw"),
        (Ask { raw: true, history: vec![turn("")], ..Ask::default() }, "raw"),
    ] {
        let failure = encode_request(&mut Vec::new(), &ID, &[0; 16], &ask, Duration::from_secs(1)).unwrap_err();
        assert!(failure.detail.contains(field), "{failure}");
    }
}

#[test]
fn a_conversation_is_read_up_to_its_limits() {
    for ask in [
        Ask {
            history: vec![turn("x"); MAX_TURNS],
            system: Some(Text::new("s")),
            stop: vec![Text::new("s".repeat(MAX_STOP_BYTES)); MAX_STOPS],
            top_p: Some(1.0),
            ..Ask::default()
        },
        Ask { raw: true, top_p: Some(f64::MIN_POSITIVE), ..Ask::default() },
    ] {
        assert_eq!(request(&ask).unwrap().ask, ask);
    }
}

#[test]
fn lists_that_are_too_long_are_refused_while_they_are_read() {
    let with = |key: &str, item: &str, count: usize| {
        let list = vec![item; count].join(",");
        let text = format!(
            r#"{{"type":"inference_request","version":1,"request_id":"{ID}","cluster_ref":"{}","prompt":"p","timeout_ms":5,"{key}":[{list}]}}"#,
            "03".repeat(16)
        );
        Request::decode(text.as_bytes()).is_ok()
    };
    let turn = r#"{"role":"user","text":""}"#;
    assert!(with("messages", turn, MAX_TURNS) && !with("messages", turn, MAX_TURNS + 1));
    assert!(with("stop", "\"s\"", MAX_STOPS) && !with("stop", "\"s\"", MAX_STOPS + 1));
    assert!(!with("messages", r#"{"role":"tool","text":""}"#, 1));
}

#[test]
fn an_error_has_a_name_for_old_readers_and_its_own_for_new_ones() {
    let read = |error: &str, reason: &str| {
        let text = format!(
            r#"{{"type":"inference_response","request_id":"{ID}","event":"error","error":"{error}","reason":"{reason}","message":"why"}}"#
        );
        match Response::decode(text.as_bytes(), &ID) {
            Ok(Response::Error(failure)) => (failure.kind, failure.detail),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(read("InvalidRequest", "ContextOverflow"), (FailureKind::ContextOverflow, "why".to_owned()));
    assert_eq!(read("Busy", "NotYetInvented"), (FailureKind::Busy, "why".to_owned()));
    let (kind, detail) = read("NotYetInvented", "NorThis");
    assert_eq!((kind, detail.as_str()), (FailureKind::BackendFailed, "the serving node says NotYetInvented: why"));
    assert!(read(&"N".repeat(1000), "").1.len() < 128);
    let unnamed = format!(r#"{{"type":"inference_response","request_id":"{ID}","event":"error","message":"why"}}"#);
    assert!(Response::decode(unnamed.as_bytes(), &ID).is_err(), "an error has a name");
}

#[test]
fn requests_that_lie_are_refused() {
    let good = r#"{"type":"inference_request","version":1,"request_id":"01234567-89ab-4def-8123-456789abcdef","cluster_ref":"03030303030303030303030303030303","prompt":"p","timeout_ms":5,"new_key":[1]}"#;
    assert!(Request::decode(good.as_bytes()).is_ok(), "unknown keys are ignored");
    for (from, to) in [
        ("inference_request", "inference_response"),
        ("\"version\":1", "\"version\":2"),
        ("01234567", "0123456"),
        ("0303\"", "03\""),
        ("0303\"", "03zz\""),
        ("\"timeout_ms\":5", "\"timeout_ms\":0"),
        ("\"timeout_ms\":5", "\"timeout_ms\":3600001"),
        ("\"timeout_ms\":5", "\"timeout_ms\":-5"),
        ("\"prompt\":\"p\",", ""),
    ] {
        assert!(Request::decode(good.replace(from, to).as_bytes()).is_err(), "{from} → {to}");
    }
    for length in 0..good.len() {
        assert!(Request::decode(&good.as_bytes()[..length]).is_err());
    }
}

#[test]
fn parse_errors_do_not_quote_the_text() {
    let error = Request::decode(br#"{"prompt":"canary","version":"canary"}"#).unwrap_err();
    assert!(!error.to_string().contains("canary") && !format!("{error:?}").contains("canary"));
}

#[test]
fn the_worst_token_still_fits_its_frame() {
    let mut out = Vec::new();
    encode_token(&mut out, &ID, &"\u{1}".repeat(MAX_TOKEN_TEXT_BYTES), Some(&"\u{1}".repeat(MAX_MODEL_NAME_BYTES)));
    assert!(out.len() - 4 <= MAX_RESPONSE_FRAME_BYTES, "{}", out.len());
}

#[test]
fn responses_read_back() {
    let done = Done { finish: FinishReason::Length, usage: Usage { prompt_tokens: 1, completion_tokens: 2 } };
    let read = |write: &dyn Fn(&mut Vec<u8>), check: &dyn Fn(Response<'_>)| {
        let mut out = Vec::new();
        write(&mut out);
        check(Response::decode(&out[4..], &ID).unwrap());
    };
    read(&|out| encode_token(out, &ID, "hé", Some("m")), &|got| {
        assert_eq!(got, Response::Token { text: "hé".into(), model: Some("m".into()) });
    });
    for position in [None, Some(0), Some(u32::MAX)] {
        read(&|out| encode_keepalive(out, &ID, position), &|got| assert_eq!(got, Response::KeepAlive { position }));
    }
    read(&|out| encode_end(out, &ID, "m", done.clone(), 5, "ab"), &|got| {
        assert_eq!(got, Response::End { done: done.clone(), model: "m".into(), text_bytes: 5, hash: "ab".into() });
    });
    let failure = Failure::busy("come back", Duration::from_millis(1500));
    read(&|out| encode_error(out, &ID, &failure), &|got| assert_eq!(got, Response::Error(failure.clone())));
}

#[test]
fn the_message_of_an_error_is_one_line_of_at_most_512_bytes_on_both_sides() {
    let read = |detail: &str| {
        let mut out = Vec::new();
        encode_error(&mut out, &ID, &Failure::new(FailureKind::BackendFailed, detail));
        let Ok(Response::Error(failure)) = Response::decode(&out[4..], &ID) else { panic!("not read") };
        failure.detail
    };
    for sentence in ["", "the model \"größer\" is gone: C:\\x", &"m".repeat(MAX_MESSAGE_BYTES)] {
        assert_eq!(read(sentence), sentence);
    }
    assert_eq!(read("two\nlines\u{1b}[0m"), "twolines[0m");
    assert_eq!(read(&"m".repeat(MAX_MESSAGE_BYTES + 1)).len(), MAX_MESSAGE_BYTES);
    assert_eq!(read(&format!("m{}", "\u{1f600}".repeat(MAX_MESSAGE_BYTES))).len(), MAX_MESSAGE_BYTES - 3);
    let long = "\u{1f600}".repeat(MAX_MESSAGE_BYTES);
    let frame =
        format!(r#"{{"type":"inference_response","request_id":"{ID}","event":"error","error":"Busy","message":"{long}"}}"#);
    let Ok(Response::Error(failure)) = Response::decode(frame.as_bytes(), &ID) else { panic!("not read") };
    assert_eq!(failure.detail.len(), MAX_MESSAGE_BYTES);
}

#[test]
fn a_deadline_that_is_nearly_over_or_far_away_is_still_one_that_is_accepted() {
    for (timeout, read) in [
        (Duration::ZERO, Duration::from_millis(1)),
        (Duration::from_micros(999), Duration::from_millis(1)),
        (Duration::from_micros(2999), Duration::from_millis(2)),
        (MAX_TIMEOUT, MAX_TIMEOUT),
        (Duration::MAX, MAX_TIMEOUT),
    ] {
        let mut out = Vec::new();
        encode_request(&mut out, &ID, &[3; 16], &Ask::default(), timeout).unwrap();
        assert_eq!(Request::decode(&out[4..]).unwrap().timeout, read, "{timeout:?}");
    }
}

#[test]
fn an_answer_to_another_request_is_refused() {
    let mut out = Vec::new();
    encode_keepalive(&mut out, &Uuid::from_u128(1), None);
    assert!(Response::decode(&out[4..], &ID).is_err());
}

#[test]
fn the_hash_is_sha256_over_all_pieces() {
    let mut hash = AnswerHash::new();
    hash.update(b"ab");
    hash.update(b"c");
    assert_eq!(hash.finish(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

proptest! {
    #[test]
    fn any_text_survives(prompt in ".*", system in proptest::option::of(".*")) {
        let ask = Ask { prompt: Text::new(prompt), system: system.map(Text::new), ..Ask::default() };
        prop_assert_eq!(request(&ask).unwrap().ask, ask);
    }

    #[test]
    fn nonsense_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Request::decode(&bytes).is_err());
        prop_assert!(Response::decode(&bytes, &ID).is_err());
    }
}

#[test]
fn the_id_is_found_in_the_beginning_of_a_request() {
    let mut out = Vec::new();
    let ask = Ask { prompt: Text::new("a".repeat(5000)), ..Ask::default() };
    encode_request(&mut out, &ID, &[3; 16], &ask, Duration::from_secs(9)).unwrap();
    assert_eq!(id_in(&out[4..1028]), Some(ID));
    let quoted = br#"{"prompt":"\"request_id\":\"01234567-89ab-4def-8123-456789abcdef\"","#;
    for head in [&out[4..60], quoted, br#""request_id":"x""#, br#""request_id":""#, b""] {
        assert_eq!(id_in(head), None, "{}", String::from_utf8_lossy(head));
    }
}
