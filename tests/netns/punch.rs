//! How often a hole is punched, and how soon: counted, not promised. `scripts/lab.sh punch` runs it.

use super::*;
use crate::eye::Eye;
use crate::lab::Nat;
use crate::nat::{Over, PUNCHED, QUIC, TCP, args, direct, relay};
use crate::report::{self, Table};

const TABLE: Table = Table {
    title: "Hole punching between two homes",
    head: &["routers", "transport", "direct", "median s", "slowest s", "relayed"],
};

/// One try in a lab of its own: a router remembers flows for minutes. The time from both daemons' start to a direct way;
/// `None` when the relay goes on carrying.
async fn attempt(kind: Nat, over: Over) -> Option<Option<Duration>> {
    let lab = Lab::homes([kind; 2], [1, 1], 1)?;
    let (_relay, at) = relay(&lab, over).await;
    let [a, b] =
        cast(&lab, [("a1", "NodeA", &args("--serve", over, &at)[..]), ("b1", "NodeB", &args("--serve", over, &at))]).await;
    let begun = Instant::now();
    b.sees_in(CLUSTER, &["NodeA", "Relay"], DEADLINE).await;
    let eye = Eye::on(&a).await;
    Some(direct(&eye, "NodeB", PUNCHED).await.map(|_| begun.elapsed()))
}

#[tokio::test]
async fn holes_are_counted_for_each_kind_of_router_and_transport() {
    if !report::long() {
        return;
    }
    let runs = std::env::var("OPENGATEWAY_PUNCH_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(20_usize);
    let kinds =
        [(Nat::KeepsPorts, "keep ports, drop"), (Nat::Rejects, "keep ports, reject"), (Nat::Symmetric, "a port for each flow")];
    for (kind, what) in kinds {
        for over in [QUIC, TCP] {
            let (mut times, mut relayed) = (Vec::new(), 0);
            for _ in 0..runs {
                match attempt(kind, over).await {
                    None => return,
                    Some(Some(time)) => times.push(time.as_secs_f64()),
                    Some(None) => relayed += 1,
                }
            }
            times.sort_by(f64::total_cmp);
            let show = |time: Option<&f64>| time.map_or("–".to_owned(), |time| format!("{time:.1}"));
            TABLE.row(vec![
                what.to_owned(),
                over.0.to_owned(),
                format!("{} of {runs}", times.len()),
                show(times.get(times.len() / 2)),
                show(times.last()),
                relayed.to_string(),
            ]);
        }
    }
}
