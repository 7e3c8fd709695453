//! `ogctl doctor` and `ogctl ping` against a daemon that the test plays.

use std::time::Duration;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_tells_the_worst_first_with_what_to_do_and_then_what_is_known() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let told = ogctl(&bus, &["doctor"]).await;
    assert_eq!((told.code, told.stderr.as_str()), (exit::FAILED, ""), "{told:?}");
    let begin = "✗ 192.0.2.1 refuses connections [bootstrap-refused]\n    on that machine: systemctl start opengatewayd\n\
                 ! nothing was heard on eth0 [mdns-silent]\n\n";
    assert!(told.stdout.starts_with(begin), "{}", told.stdout);
    for fact in [
        "eth0 IPv4: 12 sent, 0 heard",
        "behind a router that keeps ports",
        "NodeB (12D3KooWb): member of gatewayai-poc",
        "relayed via evil",
        "/ip4/10.0.0.2/udp/4001/quic-v1: timed out, 3 s ago",
        "the clock is right",
    ] {
        assert!(told.stdout.contains(fact), "no {fact:?} in:\n{}", told.stdout);
    }
    assert!(!told.stdout.contains(['\u{1b}', '\u{9b}', '\u{202e}']));

    let json = ogctl(&bus, &["doctor", "--json"]).await;
    assert_eq!(json.code, exit::FAILED);
    let told = parse(&json.stdout);
    assert_eq!(
        told["findings"][1],
        json!({"code": "mdns-silent", "severity": "warning", "sentence": "nothing was heard on eth0", "remedy": null, "peer": null, "cluster": null})
    );
    let facts = &told["facts"];
    assert_eq!(
        (&facts["mdns"]["interfaces"][0]["sent"], &facts["mdns"]["interfaces"][0]["heard_us"]),
        (&json!(12), &Value::Null)
    );
    assert_eq!((&facts["peers"][0]["attempts"][0]["outcome"], &facts["firewall"]), (&json!("timed-out"), &Value::Null));
    assert_eq!(facts["peers"][0]["links"][0]["relay_name"], fake::EVIL_NAME);
    assert_eq!(daemon.calls(), ["Diagnose ", "Diagnose "]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_is_asked_about_a_peer_or_a_cluster() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let one = ogctl(&bus, &["doctor", "NodeB"]).await;
    assert_eq!(one.code, 0, "an info is nothing wrong: {one:?}");
    assert!(one.stdout.starts_with("· NodeB is reached through NodeW [peer-relayed]\n"), "{one:?}");
    assert!(!one.stdout.contains("Listens on") && one.stdout.contains("NodeB (12D3KooWb)"), "{one:?}");
    let nobody = ogctl(&bus, &["doctor", "nobody"]).await;
    assert_eq!(nobody.code, exit::NOT_FOUND, "{nobody:?}");
    assert!(nobody.stdout.contains("[peer-unknown]"), "{nobody:?}");
    assert_eq!(ogctl(&bus, &["doctor", "nobody", "--json"]).await.code, exit::NOT_FOUND);
    let nowhere = ogctl(&bus, &["doctor", "--cluster", "nowhere"]).await;
    assert_eq!((nowhere.code, nowhere.stdout.as_str()), (exit::NOT_FOUND, ""), "{nowhere:?}");
    assert!(nowhere.stderr.contains("ogctl clusters"), "{nowhere:?}");
    let calls = ["Diagnose Peer=NodeB", "Diagnose Peer=nobody", "Diagnose Peer=nobody", "Diagnose Cluster=nowhere"];
    assert_eq!(daemon.calls(), calls);
    for wrong in
        [&["doctor", "a", "--cluster", "b"][..], &["doctor", ""], &["doctor", "a", "b"], &["ping"], &["ping", "a", "-c", "0"]]
    {
        assert_eq!(ogctl(&bus, wrong).await.code, exit::USAGE, "{wrong:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_asks_for_ever_nor_starts_a_daemon() {
    let Some(bus) = bus_or_skip() else { return };
    let marker = bus.dir().join("started");
    bus.add_service(&format!("/bin/sh -c 'touch {}; exit 1'", marker.display())).await;
    for command in [&["doctor"][..], &["ping", "NodeB"]] {
        let stopped = ogctl(&bus, command).await;
        assert_eq!((stopped.code, stopped.stdout.as_str()), (exit::NO_DAEMON, ""), "{stopped:?}");
    }
    assert!(!marker.exists(), "asking starts nothing");
    let daemon = Fake::serve(&bus).await;
    daemon.hang();
    for command in [&["doctor", "--timeout", "0.3"][..], &["ping", "NodeB", "--timeout", "0.3"]] {
        let hung = ogctl(&bus, command).await;
        assert_eq!(hung.code, exit::TIMEOUT, "{hung:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pings_are_lines_and_a_sum() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let said = ogctl(&bus, &["ping", "NodeB", "-c", "2", "-i", "0.1"]).await;
    let line = "NodeB over quic, direct (10.0.0.2): 800 µs\n";
    assert_eq!(
        (said.code, said.stdout),
        (0, format!("{line}{line}2 sent, 2 answered; least 800 µs, mean 800 µs, most 800 µs\n"))
    );
    assert_eq!(daemon.calls(), ["Ping NodeB", "Ping NodeB"]);
    let json = parse(&ogctl(&bus, &["ping", "NodeB", "-c", "1", "--json"]).await.stdout);
    assert_eq!((&json["name"], &json["answered"], &json["avg_us"]), (&json!("NodeB"), &json!(1), &json!(800)));
    assert_eq!((&json["pings"][0]["direct"], &json["pings"][0]["relay"]), (&json!(true), &Value::Null));

    let silent = format!("reply {}", ErrorName::NoAnswer);
    let said = ogctl(&bus, &["ping", &silent, "-c", "2", "-i", "0.1"]).await;
    assert_eq!(said.code, exit::FAILED, "{said:?}");
    assert!(said.stdout.ends_with(": no answer\n2 sent, 0 answered\n"), "{said:?}");
    for (name, code) in [
        (ErrorName::NoSuchPeer, exit::NOT_FOUND),
        (ErrorName::PeerUnreachable, exit::FAILED),
        (ErrorName::Busy, exit::NO_NODE),
        (ErrorName::InvalidArgs, exit::USAGE),
    ] {
        let said = ogctl(&bus, &["ping", &format!("reply {name}"), "--json"]).await;
        assert_eq!(said.code, code, "{said:?}");
        assert_eq!(parse(&said.stdout)["error"]["name"], name.short());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupt_sums_up_and_a_closed_pipe_ends_it_quietly() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let mut child = ogctl_on(&bus, &["ping", "NodeB", "-c", "10000", "-i", "0.1"]).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut line = async || tokio::time::timeout(LIMIT, stdout.next_line()).await.unwrap().unwrap().unwrap();
    assert!(line().await.starts_with("NodeB over quic"));
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    while !line().await.contains("answered; least") {}
    assert_eq!(tokio::time::timeout(LIMIT, child.wait()).await.unwrap().unwrap().code(), Some(0));

    let mut child = ogctl_on(&bus, &["ping", "NodeB", "-c", "10000", "-i", "3600"]).spawn().unwrap();
    let before = daemon.calls().len();
    daemon.wait_for(|seen| seen.calls.len() > before).await;
    drop(child.stdout.take());
    let out = tokio::time::timeout(Duration::from_secs(20), child.wait_with_output()).await.expect("it ends").unwrap();
    assert_eq!((out.status.code(), out.stderr.as_slice()), (Some(0), b"".as_slice()));
}
