//! Who may do what.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_may_everything_others_what_their_group_may_and_the_services_own_user_nothing() {
    let Some(system) = SystemBus::start(&["--serve"], "").await else { return };
    let (root, alice, bob) = (system.connect(0).await, system.connect(ALICE).await, system.connect(BOB).await);
    let service = system.connect(SERVICE).await;
    let refused = format!("{ERROR}NotAuthorized");
    may_all(&root, "root").await;
    verb(&root, "Connect", Ask::MayNot).await.unwrap();
    for (who, connection) in [("alice", &alice), ("the daemon's own user", &service)] {
        // Reading is free.
        assert_eq!(clusters(connection).await, ["room"], "{who}");
        may_nothing(connection, Ask::MayNot, INTERACTIVE, "with an administrator's password").await;
        may_nothing(connection, Ask::May, &refused, "there is nobody to ask").await;
    }
    // The members of the group, as long as they are; nobody else, and on the same connection.
    system.members(&["og-alice"]);
    may_all(&alice, "a member").await;
    verb(&alice, "Connect", Ask::MayNot).await.unwrap();
    may_nothing(&bob, Ask::May, &refused, "there is nobody to ask").await;
    system.members(&[]);
    may_nothing(&alice, Ask::May, &refused, "there is nobody to ask").await;
    may_nothing(&alice, Ask::MayNot, INTERACTIVE, "password").await;
    assert_eq!(clusters(&root).await, ["room"], "nothing was changed by who may not");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_right_is_one_and_managing_implies_the_others() {
    let rules = r#"polkit.addRule(function(action, subject) {
        if (subject.user == "og-alice" && action.id == "org.opengateway.gateway1.connect") { return polkit.Result.YES; }
        if (subject.user == "og-bob" && action.id == "org.opengateway.gateway1.manage") { return polkit.Result.YES; }
        if (subject.user == "opengateway" && action.id == "org.opengateway.gateway1.prompt") { return polkit.Result.NO; }
    });"#;
    let Some(system) = SystemBus::start(&["--serve"], rules).await else { return };
    let alice = system.connect(ALICE).await;
    for (name, action) in VERBS {
        let done = verb(&alice, name, Ask::MayNot).await;
        assert_eq!(done.is_ok(), action == "connect", "{name}: {done:?}");
    }
    may_all(&system.connect(BOB).await, "who manages").await;
    // A clear no needs no password.
    let (name, message) = verb(&system.connect(SERVICE).await, "Prompt", Ask::MayNot).await.unwrap_err();
    assert!(name == format!("{ERROR}NotAuthorized") && message.contains("has not allowed it"), "{name}: {message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_polkit_root_may_and_nobody_else_and_it_may_come_and_go() {
    let Some(mut system) = SystemBus::without_polkit("").await else { return };
    system.start_daemon(&["--serve"]).await;
    system.members(&["og-alice"]);
    let (root, alice) = (system.connect(0).await, system.connect(ALICE).await);
    let refused = format!("{ERROR}NotAuthorized");
    may_all(&root, "root").await;
    for may_ask in [Ask::May, Ask::MayNot] {
        may_nothing(&alice, may_ask, &refused, "polkit is not installed or cannot be started").await;
    }
    for round in 0..10 {
        system.start_polkit().await;
        may_all(&alice, &format!("round {round}")).await;
        system.kill_polkit().await;
        may_nothing(&alice, Ask::MayNot, &refused, "polkit is not installed or cannot be started").await;
        may_all(&root, "root").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ogctl_says_which_right_is_missing_and_exits_with_4() {
    let Some(system) = SystemBus::start(&["--connect", "gatewayai-poc"], "").await else { return };
    let run = |uid, args: &[&str]| {
        let output = system.ogctl_as(uid, args);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(run(ALICE, &["status"]).0, Some(0));
    for (args, action) in [
        (&["connect", "room", "--wait", "0"][..], "connect"),
        (&["disconnect", "gatewayai-poc"], "disconnect"),
        (&["prompt", "x"], "prompt"),
    ] {
        let (code, said) = run(ALICE, args);
        assert!(code == Some(4) && said.contains(&format!("{ACTION}{action}")), "{args:?}: {code:?}: {said}");
    }
    system.members(&["og-alice"]);
    assert_eq!(run(ALICE, &["connect", "room", "--wait", "0"]), (Some(0), String::new()));
}
