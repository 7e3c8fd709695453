//! Callers who are gone before they are judged, and callers who send anything.

use zbus_xml::{ArgDirection, Node as Description};

use super::*;
use crate::common::calls::arguments;
use crate::common::seeded::{Seeded, seed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_thousand_callers_who_leave_right_after_their_call_none_is_authorised() {
    let Some(system) = SystemBus::start(&["--serve", "--connect", "gatewayai-poc"], "").await else { return };
    let root = system.connect(0).await;
    let begun = Instant::now();
    let mut before = None;
    for round in [100, 1000] {
        for number in 0..round {
            // Some are of the daemon's own user: polkit owns it to tell it of others, not to let it in.
            let caller = system.connect(if number % 10 == 0 { SERVICE } else { ALICE }).await;
            let call = |method| Message::method_call(ROOT, method).destination(NAME).interface(MANAGER);
            let call = match number % 3 {
                0 => call("Connect").build(&(format!("race{number}"), Options::new())),
                1 => call("StartPrompt").build(&("", "x", Options::new())),
                _ => call("Disconnect").build(&("gatewayai-poc", Options::new())),
            };
            caller.send(&call.unwrap()).await.unwrap();
            caller.close().await.unwrap();
        }
        // Those that are still judged are judged before this one is answered, or leave no trace afterwards.
        may_nothing(&system.connect(BOB).await, Ask::MayNot, INTERACTIVE, "password").await;
        before.get_or_insert_with(|| system.kib("VmRSS"));
    }
    assert_eq!((clusters(&root).await, active_jobs(&root).await), (vec!["gatewayai-poc".to_owned()], 0));
    let reply = manager(&root, "ListJobs", &(), Ask::MayNot).await.unwrap();
    let jobs: Vec<(u64, OwnedObjectPath, HashMap<String, OwnedVariant>)> = reply.body().deserialize().unwrap();
    assert!(jobs.is_empty(), "{jobs:?}");
    let (before, now) = (before.unwrap(), system.kib("VmRSS"));
    eprintln!("1000 callers left in {:?}; resident: {before} KiB, then {now} KiB", begun.elapsed());
    assert!(now < before + 8 * 1024, "it grew from {before} to {now} KiB");
}

/// Most questions of one user that wait for polkit.
const QUESTIONS: usize = 32;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_polkit_that_hangs_costs_who_needs_it_a_refusal_and_nobody_else_anything() {
    let Some(mut system) = SystemBus::start(&["--serve", "--connect", "gatewayai-poc"], "").await else { return };
    let (root, alice, bob) = (system.connect(0).await, system.connect(ALICE).await, system.connect(BOB).await);
    system.signal_polkit(rustix::process::Signal::STOP);
    let begun = Instant::now();
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..QUESTIONS {
        let alice = alice.clone();
        waiting.spawn(async move { (verb(&alice, "Connect", Ask::MayNot).await, begun.elapsed()) });
    }
    // One user's questions are counted, and the next is refused at once; those before it may still be on their way.
    let (name, message) = loop {
        let more = tokio::time::timeout(Duration::from_millis(500), verb(&alice, "Prompt", Ask::MayNot)).await;
        if let Ok(refused) = more {
            break refused.unwrap_err();
        }
        assert!(begun.elapsed() < DEADLINE);
    };
    assert!(name == format!("{ERROR}Busy") && message.contains("wait for polkit"), "{name}: {message}");
    let others = tokio::spawn(async move { verb(&bob, "Prompt", Ask::MayNot).await });
    let asked = Instant::now();
    may_all(&root, "root").await;
    assert_eq!(clusters(&alice).await, ["gatewayai-poc", "room"]);
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    // Before busctl and others give up, which is after 25 s.
    while let Some(answer) = waiting.join_next().await {
        let (answer, after) = answer.unwrap();
        let (name, message) = answer.unwrap_err();
        assert!(after < Duration::from_secs(25), "{after:?}");
        let limit = name == format!("{ERROR}Busy") || message.contains("polkit did not decide within 20 s");
        assert!(limit, "{name}: {message}");
    }
    assert_eq!(others.await.unwrap().unwrap_err().0, format!("{ERROR}NotAuthorized"));
    system.signal_polkit(rustix::process::Signal::CONT);
    system.members(&["og-alice"]);
    // Those that nobody waits for any longer are answered first.
    while let Err((name, message)) = verb(&alice, "Connect", Ask::MayNot).await {
        assert!(name == format!("{ERROR}Busy") && begun.elapsed() < 2 * DEADLINE, "{name}: {message}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    may_all(&alice, "polkit goes on").await;
}

/// A property that waits holds a lock of zbus's; whoever starts a prompt wants that lock, and everybody else is behind him.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_the_job_of_another_holds_up_nobody_though_polkit_hangs() {
    const READERS: usize = 20;
    let Some(mut system) = SystemBus::start(&["--serve", "--connect", "gatewayai-poc"], "").await else { return };
    let root = system.connect(0).await;
    let start = async || {
        let reply = manager(&root, "StartPrompt", &("", "x", Options::new()), Ask::MayNot).await.unwrap();
        reply.body().deserialize::<(OwnedObjectPath, zbus::OwnedFd)>().unwrap()
    };
    let (job, _stream) = start().await;
    system.signal_polkit(rustix::process::Signal::STOP);
    let mut reading = tokio::task::JoinSet::new();
    for _ in 0..READERS {
        // A connection that the service has never seen.
        let bob = system.connect(BOB).await;
        for _ in 0..10 {
            let (bob, job) = (bob.clone(), job.clone());
            reading.spawn(async move {
                let arguments = ("org.opengateway.Gateway1.Job", "Uid");
                ask(&bob, job.as_str(), "org.freedesktop.DBus.Properties", "Get", &arguments, Ask::MayNot).await
            });
        }
    }
    for _ in 0..20 {
        tokio::time::timeout(Duration::from_secs(5), start()).await.expect("a prompt starts meanwhile");
        assert!(tokio::time::timeout(Duration::from_secs(5), may_still_be_asked(&root)).await.expect("it answers meanwhile"));
    }
    while let Some(read) = reading.join_next().await {
        assert_eq!(read.unwrap().unwrap_err().0, format!("{ERROR}NotAuthorized"));
    }
    let arguments = ("org.opengateway.Gateway1.Job", "Uid");
    assert!(ask(&root, job.as_str(), "org.freedesktop.DBus.Properties", "Get", &arguments, Ask::MayNot).await.is_ok());
}

/// Interface, method, and a letter for each argument, as `arguments` wants them: from the daemon itself.
async fn methods(connection: &Connection, path: &str) -> Vec<(String, String, String)> {
    let reply = ask(connection, path, "org.freedesktop.DBus.Introspectable", "Introspect", &(), Ask::MayNot).await.unwrap();
    let text: String = reply.body().deserialize().unwrap();
    let description = Description::from_reader(text.as_bytes()).unwrap();
    let mut found = Vec::new();
    for interface in description.interfaces() {
        for method in interface.methods() {
            let inputs = method.args().iter().filter(|argument| argument.direction() != Some(ArgDirection::Out));
            let letters = inputs.map(|argument| match argument.ty().to_string().as_str() {
                "a{sv}" => 'o',
                letter if letter.len() == 1 => letter.chars().next().unwrap(),
                _ => '?',
            });
            found.push((interface.name().to_string(), method.name().to_string(), letters.collect()));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_calls_with_any_arguments_of_members_and_of_others_leave_it_alive_and_flat() {
    const CALLS: usize = 10_000;
    const AT_ONCE: usize = 16;
    let mut random = Seeded(seed());
    let Some(system) = SystemBus::start(&["--serve", "--connect", "gatewayai-poc"], "").await else { return };
    system.members(&["og-alice"]);
    let root = system.connect(0).await;
    let paths = [ROOT, "/org/opengateway/Gateway1/cluster/gatewayai_2dpoc"];
    let mut targets = Vec::new();
    for path in paths {
        targets.extend(methods(&root, path).await.into_iter().map(|method| (path.to_owned(), method)));
    }
    targets.push((format!("{ROOT}/job/1"), ("org.opengateway.Gateway1.Job".to_owned(), "Cancel".to_owned(), String::new())));
    assert!(targets.len() > 15, "{targets:?}");
    let callers = [system.connect(ALICE).await, system.connect(BOB).await];
    let (begun, mut answered, mut before) = (Instant::now(), HashMap::<String, usize>::new(), None);
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..CALLS {
        let (path, (interface, method, types)) = targets[number % targets.len()].clone();
        let path = if interface.ends_with(".Job") { format!("{ROOT}/job/{}", random.below(500)) } else { path };
        let body = arguments(&mut random, &types);
        let caller = callers[random.below(callers.len())].clone();
        let may_ask = if random.below(4) == 0 { Ask::May } else { Ask::MayNot };
        calls.spawn(async move {
            let outcome = match &body {
                Some(body) => ask(&caller, &path, &interface, &method, body, may_ask).await,
                None => ask(&caller, &path, &interface, &method, &(), may_ask).await,
            };
            outcome.map_or_else(|(name, _)| name, |_| "ok".to_owned())
        });
        while calls.len() >= AT_ONCE || (number + 1 == CALLS && !calls.is_empty()) {
            *answered.entry(calls.join_next().await.unwrap().unwrap()).or_default() += 1;
        }
        if number == CALLS / 5 {
            before = Some(system.kib("VmRSS"));
        }
    }
    let (before, now) = (before.unwrap(), system.kib("VmRSS"));
    eprintln!("{CALLS} calls in {:?}: {answered:?}; resident: {before} KiB, then {now} KiB", begun.elapsed());
    assert!(answered["ok"] > CALLS / 10 && answered.contains_key(INTERACTIVE), "{answered:?}");
    for name in ["org.freedesktop.DBus.Error.NoReply", "org.freedesktop.DBus.Error.Failed"] {
        assert!(!answered.contains_key(name), "{answered:?}: {}", system.log());
    }
    assert!(now < before + 8 * 1024, "it grew from {before} to {now} KiB");
    assert!(may_still_be_asked(&root).await);
}

async fn may_still_be_asked(connection: &Connection) -> bool {
    manager(connection, "GetStatus", &(), Ask::MayNot).await.is_ok()
}
