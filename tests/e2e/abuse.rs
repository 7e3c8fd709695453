//! Clients that misbehave. They run inside a host, as one of its users: this test binary, started again there with a role.

use std::collections::BTreeMap;

use zbus::{Connection, Message, Variant};

use crate::common::calls;
use crate::common::seeded::{Seeded, seed};
use crate::lab::Host;

const ROLE: &str = "OPENGATEWAY_E2E_ROLE";
const NAME: &str = "org.opengateway.Gateway1";
const MANAGER: &str = "org.opengateway.Gateway1.Manager";
const ROOT: &str = "/org/opengateway/Gateway1";
const PROGRAM: &str = "/usr/local/bin/abuse";
/// Calls of one client under way at once.
const AT_ONCE: usize = 16;

/// Lets `user` play a role with a number, say how many rounds; gives what it printed last.
pub fn play(host: &Host, user: &str, role: &str, rounds: usize) -> String {
    host.push(&std::env::current_exe().unwrap(), PROGRAM);
    let test = concat!(module_path!(), "::role_process");
    let test = test.split_once("::").unwrap().1;
    let script = format!("{ROLE}='{role} {rounds}' RUST_TEST_THREADS=1 {PROGRAM} {test} --exact --nocapture");
    let said = host.as_user(user, &script);
    assert_eq!(said.code, 0, "{said:?}");
    let told = said.stdout.lines().filter_map(|line| line.split_once("tells ")).next_back();
    told.unwrap_or_else(|| panic!("the role told nothing: {said:?}")).1.to_owned()
}

/// Not a test by itself: with a role set, this process plays it.
#[test]
fn role_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let (name, rounds) = role.split_once(' ').unwrap();
    let rounds = rounds.parse().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    match name {
        "races" => runtime.block_on(races(rounds)),
        "random" => runtime.block_on(random(rounds)),
        _ => panic!("{name} is no role"),
    }
}

/// Calls what it may not, and is gone before anybody can be asked about it.
async fn races(rounds: usize) {
    let options = BTreeMap::<&str, Variant<'_>>::new();
    for round in 0..rounds {
        let connection = Connection::system().await.unwrap();
        let cluster = format!("race-{round}");
        let message = |method: &'static str| Message::method_call(ROOT, method).destination(NAME).interface(MANAGER);
        let message = match round % 4 {
            0 | 1 => message("Connect").build(&(&cluster, &options)),
            2 => message("StartPrompt").build(&("", "race", &options)),
            _ => message("SetSharing").build(&(false, &options)),
        };
        connection.send(&message.unwrap()).await.unwrap();
        if round % 2 == 0 {
            connection.close().await.unwrap();
        }
    }
    println!("tells {rounds}");
}

/// Calls everything with anything, and tells how often it heard what.
async fn random(rounds: usize) {
    let mut random = Seeded(seed());
    let connection = Connection::system().await.unwrap();
    let mut running = tokio::task::JoinSet::new();
    let mut answered = BTreeMap::<String, usize>::new();
    for _ in 0..rounds {
        let (interface, method, types) = calls::METHODS[random.below(calls::METHODS.len())];
        let (body, path) = (calls::arguments(&mut random, types), calls::path(&mut random, method));
        let connection = connection.clone();
        running.spawn(async move {
            let call = async {
                match &body {
                    Some(body) => connection.call_method(Some(NAME), path, Some(interface), method, body).await,
                    None => connection.call_method(Some(NAME), path, Some(interface), method, &()).await,
                }
            };
            calls::outcome(method, call).await
        });
        while running.len() >= AT_ONCE {
            *answered.entry(running.join_next().await.unwrap().unwrap()).or_default() += 1;
        }
    }
    while let Some(answer) = running.join_next().await {
        *answered.entry(answer.unwrap()).or_default() += 1;
    }
    println!("tells {answered:?}");
}
