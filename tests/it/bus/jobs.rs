//! Prompts and their callers: who is told what, who lets go of what, and when.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::Command;

use futures::StreamExt as _;
use opengateway::domain::prompt::{Done, FinishReason, Usage};
use rustix::fs::MemfdFlags;
use zbus::{MatchRule, MessageStream};

use super::*;
use crate::daemon::ERROR;

const JOB: &str = "org.opengateway.Gateway1.Job";
const INVALID: &str = "org.freedesktop.DBus.Error.InvalidArgs";

pub fn done() -> JobEvent {
    JobEvent::End(Ok(Done { finish: FinishReason::Stop, usage: Usage { prompt_tokens: 1, completion_tokens: 1 } }))
}

async fn prompt(caller: &Connection) -> Result<Message, (String, String)> {
    call(caller, "Prompt", &("", "x", Options::new())).await
}

pub async fn answer(start: &Start, text: &str) {
    for event in [taken(), JobEvent::Text(text.to_owned()), done()] {
        start.events.send(event).await.unwrap();
    }
}

/// The work at the serving node ends within a second: three on a busy machine.
async fn let_go(start: &Start, why: &str) {
    let gone = tokio::time::timeout(Duration::from_secs(3), start.events.closed()).await;
    assert!(gone.is_ok(), "{why}: the work goes on");
}

#[tokio::test]
async fn finished_comes_after_the_reply_to_the_caller_alone() {
    let Some(mut played) = Played::start().await else { return };
    let (caller, other) = (played.bus.connect().await, played.bus.connect().await);
    let rule = || MatchRule::builder().msg_type(zbus::message::Type::Signal).interface(JOB).member("Finished").build().unwrap();
    let mut overheard = MessageStream::for_match_rule(rule(), &other, None).await.unwrap();
    let mut messages = MessageStream::from(&caller);
    for round in 0..50 {
        let answering = async {
            let start = played.started().await;
            answer(&start, "4").await;
        };
        let ((job, stream), ()) = tokio::join!(start_prompt(&caller, "x"), answering);
        let mut replied = false;
        within(async {
            loop {
                let message = messages.next().await.unwrap().unwrap();
                replied |= message.message_type() == zbus::message::Type::MethodReturn;
                if member_of(&message) == "Finished" {
                    assert!(replied, "round {round}: before the reply");
                    assert_eq!(message.header().path().map(|path| path.to_string()), Some(job.to_string()));
                    let (result, details): (String, HashMap<String, OwnedVariant>) = message.body().deserialize().unwrap();
                    assert_eq!((result.as_str(), &*details["ServedByName"]), ("done", &Variant::from("NodeA")));
                    return;
                }
            }
        })
        .await;
        assert!(matches!(within(lines(stream)).await.last(), Some(Line::End { .. })));
    }
    // What the other one hears shows that it would have heard that too.
    caller.emit_signal(None::<&str>, "/x", JOB, "Finished", &("control",)).await.unwrap();
    let heard = within(overheard.next()).await.unwrap().unwrap();
    assert_eq!(heard.body().deserialize::<String>().unwrap(), "control", "a unicast signal was overheard");
}

#[tokio::test]
async fn a_caller_that_leaves_the_bus_ends_the_work_whenever_it_goes() {
    let Some(mut played) = Played::start().await else { return };
    let witness = played.bus.connect().await;
    // 0: before the service asks the bus about its caller; 1: while it may be asking; 2: after that.
    for when in 0..3_u64 {
        for method in ["Prompt", "StartPrompt"] {
            let caller = played.bus.connect().await;
            let body = ("", "x", Options::new());
            let call = caller.call_method(Some(NAME), ROOT, Some(MANAGER), method, &body);
            let mut call = Box::pin(call);
            let start = tokio::select! {
                start = played.started() => start,
                reply = &mut call => { drop(reply.unwrap()); played.started().await }
            };
            start.events.send(taken()).await.unwrap();
            if when > 0 {
                // The condition is a moment of the service's own clock.
                tokio::time::sleep(Duration::from_millis(200 * when)).await;
            }
            // The stream stays open: it is the bus that tells.
            let stream = (method == "StartPrompt").then(|| futures::FutureExt::now_or_never(call));
            caller.close().await.unwrap();
            let_go(&start, &format!("{method} {when}")).await;
            drop(stream);
        }
    }
    within(async {
        loop {
            let reply = call(&witness, "ListJobs", &()).await.unwrap();
            let jobs: Vec<(u64, OwnedObjectPath, HashMap<String, OwnedVariant>)> = reply.body().deserialize().unwrap();
            if jobs.is_empty() {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_stream_that_is_closed_ends_the_work() {
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let (_, stream) = start_prompt(&caller, "x").await;
    let start = played.started().await;
    drop(stream);
    let_go(&start, "nothing was written yet").await;
    let (_, stream) = start_prompt(&caller, "x").await;
    let start = played.started().await;
    start.events.send(taken()).await.unwrap();
    fill(&caller, &start).await;
    drop(stream);
    let_go(&start, "the pipe was full").await;
}

/// Sends text until the pipe, and all that stands before it, is full.
async fn fill(caller: &Connection, start: &Start) {
    let mut full = 0;
    while full < 20 {
        match start.events.try_send(JobEvent::Text("x".repeat(1000))) {
            Ok(()) => full = 0,
            Err(mpsc::error::TrySendError::Closed(_)) => panic!("the job ended"),
            // A round trip lets the service do all that it can.
            Err(mpsc::error::TrySendError::Full(_)) => {
                full += 1;
                drop(caller.call_method(Some(NAME), ROOT, Some(MANAGER), "GetStatus", &()).await.unwrap());
            }
        }
    }
}

#[tokio::test]
async fn cancelling_a_job_whose_pipe_is_full_ends_the_work_and_the_stream_has_whole_lines() {
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let (job, stream) = start_prompt(&caller, "x").await;
    let start = played.started().await;
    start.events.send(taken()).await.unwrap();
    fill(&caller, &start).await;
    let begun = std::time::Instant::now();
    caller.call_method(Some(NAME), &job, Some(JOB), "Cancel", &()).await.unwrap();
    let_go(&start, "cancelled").await;
    assert!(begun.elapsed() < Duration::from_secs(3));
    within(lines_of_cancelled(stream)).await;
}

/// A job that was cancelled has whole lines, then why there are no more, unless its reader was too slow even for that.
async fn lines_of_cancelled(stream: OwnedFd) {
    let told = lines(stream).await;
    assert!(told.len() > 10);
    assert!(matches!(told.last(), Some(Line::Error { name, .. }) if *name == format!("{ERROR}Cancelled")), "{:?}", told.last());
}

#[tokio::test]
async fn a_reader_that_stops_is_given_up_after_thirty_seconds_and_learns_why_when_it_comes_back() {
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let (job, stream) = start_prompt(&caller, "x").await;
    let start = played.started().await;
    start.events.send(taken()).await.unwrap();
    let frozen = Frozen::now();
    fill(&caller, &start).await;
    frozen.pass(Duration::from_secs(29)).await;
    fill(&caller, &start).await;
    assert!(!start.events.is_closed(), "given up too early");
    frozen.pass(Duration::from_secs(2)).await;
    while !start.events.is_closed() {
        drop(caller.call_method(Some(NAME), ROOT, Some(MANAGER), "GetStatus", &()).await.unwrap());
    }
    let state = property(&caller, &job, JOB, "State").await.unwrap();
    assert_eq!(*state, Variant::from("failed"));
    let reading = lines(stream);
    let told = reading.await;
    assert!(
        matches!(told.last(), Some(Line::Error { name, .. }) if *name == format!("{ERROR}SlowConsumer")),
        "{:?}",
        told.last()
    );
}

#[tokio::test]
async fn a_job_can_be_looked_at_for_thirty_seconds_after_its_end_and_its_number_never_comes_again() {
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let frozen = Frozen::now();
    let mut numbers = BTreeSet::new();
    let mut last = String::new();
    for _ in 0..40 {
        let answering = async {
            let start = played.starts.recv().await.unwrap();
            answer(&start, "4").await;
        };
        let ((job, stream), ()) = tokio::join!(start_prompt_frozen(&caller), answering);
        lines(stream).await;
        let number = u64::try_from(property(&caller, &job, JOB, "Id").await.unwrap()).unwrap();
        assert!(numbers.last().is_none_or(|last| *last < number) && numbers.insert(number));
        last = job.to_string();
    }
    while *property(&caller, &last, JOB, "State").await.unwrap() != Variant::from("done") {}
    frozen.pass(Duration::from_secs(29)).await;
    for number in &numbers {
        property(&caller, &format!("/org/opengateway/Gateway1/job/{number}"), JOB, "Id").await.unwrap();
    }
    frozen.pass(Duration::from_secs(2)).await;
    for number in &numbers {
        let path = format!("/org/opengateway/Gateway1/job/{number}");
        // Gone for good, soon after the time is over.
        while property(&caller, &path, JOB, "Id").await.is_ok() {}
    }
    let answering = async { answer(&played.starts.recv().await.unwrap(), "4").await };
    let ((job, _stream), ()) = tokio::join!(start_prompt_frozen(&caller), answering);
    assert!(!numbers.contains(&u64::try_from(property(&caller, &job, JOB, "Id").await.unwrap()).unwrap()));
}

/// As [`start_prompt`], without a time limit that a frozen clock would hold.
async fn start_prompt_frozen(caller: &Connection) -> (OwnedObjectPath, OwnedFd) {
    let reply = caller.call_method(Some(NAME), ROOT, Some(MANAGER), "StartPrompt", &("", "x", Options::new())).await.unwrap();
    let (job, stream): (OwnedObjectPath, zbus::OwnedFd) = reply.body().deserialize().unwrap();
    (job, stream.into())
}

#[tokio::test]
async fn sixteen_prompts_of_one_user_run_at_once_and_one_more_does_not() {
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let mut open = Vec::new();
    for _ in 0..16 {
        open.push((start_prompt(&caller, "x").await, played.started().await));
    }
    let refused = call(&caller, "Prompt", &("", "x", Options::new())).await.unwrap_err();
    assert_eq!(refused.0, format!("{ERROR}Busy"));
    let ((_, stream), start) = open.pop().unwrap();
    answer(&start, "4").await;
    within(lines(stream)).await;
    let ((), reply) = tokio::join!(async { answer(&played.started().await, "4").await }, prompt(&caller));
    reply.unwrap();
}

fn memfd(bytes: &[u8]) -> OwnedFd {
    let fd = rustix::fs::memfd_create("prompt", MemfdFlags::CLOEXEC).unwrap();
    let mut file = std::fs::File::from(fd);
    file.write_all(bytes).unwrap(); // and not rewound: its position is at its end
    file.into()
}

#[tokio::test]
async fn a_prompt_from_a_descriptor_has_the_limits_of_one_in_the_call() {
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let ask = async |fd: OwnedFd, prompt: &str| {
        let options = Options::from([("PromptFd", Variant::Fd(fd.into()))]);
        call(&caller, "StartPrompt", &("", prompt, options)).await
    };
    let limit = 1 << 20;
    for size in [0, 1, limit] {
        let (reply, start) = tokio::join!(async { ask(memfd(&vec![b'x'; size]), "").await }, played.started());
        reply.unwrap();
        assert_eq!(start.ask.prompt.as_str().len(), size);
    }
    let (pipe, _open) = std::io::pipe().unwrap();
    let (socket, _open) = std::os::unix::net::UnixStream::pair().unwrap();
    let directory: OwnedFd = std::fs::File::open("/").unwrap().into();
    let zeros: OwnedFd = std::fs::File::open("/dev/zero").unwrap().into();
    for (fd, prompt, what) in [
        (memfd(&vec![b'x'; limit + 1]), "", "one past the limit"),
        (memfd(b"a\0b"), "", "a NUL"),
        (memfd(b"a\xff"), "", "no UTF-8"),
        (memfd(b"x"), "x", "a prompt in the call too"),
        (pipe.into(), "", "a pipe, which may never end"),
        (socket.into(), "", "a socket"),
        (directory, "", "a directory"),
        (zeros, "", "a device"),
    ] {
        let begun = std::time::Instant::now();
        let (name, message) = ask(fd, prompt).await.unwrap_err();
        assert_eq!(name, INVALID, "{what}: {message}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{what}: {:?}", begun.elapsed());
    }
    let (name, _) =
        call(&caller, "Prompt", &("", "", Options::from([("PromptFd", Variant::Fd(memfd(b"x").into()))]))).await.unwrap_err();
    assert_eq!(name, INVALID, "only StartPrompt takes it");
}

#[tokio::test]
async fn a_stop_is_told_to_those_who_still_wait_for_an_answer() {
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let (_, stream) = start_prompt(&caller, "x").await;
    let first = played.started().await;
    first.events.send(taken()).await.unwrap();
    let waiting = caller.clone();
    let waits = tokio::spawn(async move { call(&waiting, "Prompt", &("", "x", Options::new())).await });
    let second = played.started().await;
    played.service.prepare_for_shutdown().await;
    assert_eq!(call(&caller, "Prompt", &("", "x", Options::new())).await.unwrap_err().0, format!("{ERROR}ShuttingDown"));
    within(played.service.stop()).await;
    assert!(first.events.is_closed() && second.events.is_closed());
    assert_eq!(within(waits).await.unwrap().unwrap_err().0, format!("{ERROR}ShuttingDown"));
    let told = within(lines(stream)).await;
    assert!(matches!(told.last(), Some(Line::Error { name, .. }) if *name == format!("{ERROR}ShuttingDown")), "{told:?}");
}

#[tokio::test]
async fn another_user_sees_no_jobs_and_cancels_none() {
    if !rustix::process::geteuid().is_root() {
        crate::common::node::skipped("only root can become another user");
        return;
    }
    let Some(mut played) = Played::start().await else { return };
    played.bus.open_to_all();
    let caller = played.bus.connect().await;
    let (job, _stream) = start_prompt(&caller, "x").await;
    let start = played.started().await;
    // The program must be where that user can read it.
    let copy = played.bus.dir().join("ogctl");
    std::fs::copy(env!("CARGO_BIN_EXE_ogctl"), &copy).unwrap();
    let other = async |args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&copy);
        command.args(["--bus", played.bus.address()]).args(args);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).unwrap())
    };
    assert_eq!(other(&["jobs"]).await, (Some(0), "No prompts in progress.\n".to_owned()));
    let number = job.rsplit('/').next().unwrap();
    let (code, said) = other(&["jobs", "--cancel", number]).await;
    assert!(code == Some(4) && said.contains("belongs to another user"), "{said}");
    assert!(!start.events.is_closed());
    let reply = call(&caller, "ListJobs", &()).await.unwrap();
    let jobs: Vec<(u64, OwnedObjectPath, HashMap<String, OwnedVariant>)> = reply.body().deserialize().unwrap();
    assert_eq!(jobs.len(), 1);
    caller.call_method(Some(NAME), &job, Some(JOB), "Cancel", &()).await.unwrap();
    let_go(&start, "its owner cancelled it").await;
    // Cancelling an ended job succeeds, for as long as it is known.
    let again = caller.call_method(Some(NAME), &job, Some(JOB), "Cancel", &()).await;
    assert!(again.is_ok() || again.unwrap_err().to_string().contains("Unknown object"));
}
