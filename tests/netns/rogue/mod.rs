//! A program without manners: one attack per process, played in a namespace of its own against a real daemon.
//!
//! `ATTACK` names it and `VICTIM` whom it is for; each attack has numbers of its own. It prepares, says "ready", waits for
//! "go", says "over" with what it counted, and holds what it has until it is killed.

use std::fmt::Display;
use std::net::Ipv4Addr;
use std::process::Command;
use std::str::FromStr;

mod connections;
mod frames;
mod initial;
mod members;
mod multicast;
mod records;
mod streams;
mod wire;

use crate::roles::tell;

/// The first of the addresses that a rogue takes beside its own: 10.71.0.100.
const FIRST_ADDRESS: u32 = 0x0a47_0064;

/// A word for this attack.
pub fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// A number for this attack.
pub fn number<N: FromStr>(name: &str, otherwise: N) -> N {
    setting(name).and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

pub fn victim() -> Ipv4Addr {
    setting("VICTIM").unwrap().parse().unwrap()
}

/// Takes `count` addresses of the LAN: so many hosts, as far as anybody can see. FIRST leaves out those from which somebody
/// was banned before.
fn addresses(count: u32) -> Vec<Ipv4Addr> {
    let addresses: Vec<Ipv4Addr> = (0..count).map(|at| Ipv4Addr::from(FIRST_ADDRESS + number("FIRST", 0) + at)).collect();
    for address in &addresses {
        let added = Command::new("ip").args(["addr", "replace", &format!("{address}/24"), "dev", "eth0"]).status().unwrap();
        assert!(added.success(), "{address}");
    }
    addresses
}

/// Waits for the word, and says that all is prepared.
async fn go() {
    tell("ready");
    tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new())).await.unwrap().unwrap();
}

/// Says what came of it, and stays.
async fn over(counted: impl Display) {
    tell(&format!("over {counted}"));
    std::future::pending::<()>().await;
}

pub async fn play() {
    match setting("ATTACK").unwrap().as_str() {
        "connections" => connections::dials().await,
        "half-open" => connections::half_open().await,
        "initials" => connections::initials().await,
        "streams" => streams::open().await,
        "stuffed" => streams::stuffed().await,
        "malformed" => frames::malformed().await,
        "huge" => frames::huge().await,
        "empty" => frames::empty().await,
        "records" => records::provide().await,
        "sybils" => records::sybils().await,
        "slow-readers" => members::slow_readers().await,
        "views" => members::views().await,
        "pushes" => members::pushes().await,
        "pings" => members::pings().await,
        "mdns" => multicast::answers().await,
        other => panic!("{other:?} is no attack"),
    }
}
