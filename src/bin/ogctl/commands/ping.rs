//! `ogctl ping`: signs of life of a peer, one a line, and a sum of them at the end, also after Ctrl-C.
//!
//! Exits with 0 when the peer answered at least once, with 1 when it did not, and with 10 when nobody knows it.

use crate::args::Ping;
use crate::bus::Bus;
use crate::details::Read as _;
use crate::errors::{Failure, Stop};
use crate::output::{Output, reader_gone};
use crate::render::{host, latency, relayed, short_id};
use crate::term;
use opengateway::api::names::{ErrorName, exit};
use opengateway::api::proxy::{Details, Options};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};

/// How it went in all.
#[derive(Debug, Default, Serialize)]
struct Sum {
    peer: String,
    /// Null when it never answered.
    peer_id: Option<String>,
    name: Option<String>,
    sent: u32,
    answered: u32,
    min_us: Option<u64>,
    avg_us: Option<u64>,
    max_us: Option<u64>,
    pings: Vec<One>,
}

/// One question, and its answer.
#[derive(Debug, Default, Serialize)]
struct One {
    /// Null when there was no answer.
    round_trip_us: Option<u64>,
    transport: Option<String>,
    address: Option<String>,
    /// False when relayed.
    direct: Option<bool>,
    relay: Option<String>,
    relay_name: Option<String>,
    error: Option<String>,
}

/// Asks until it was asked often enough, somebody interrupts, or nobody reads.
pub async fn run(bus: &mut Bus, out: &Output, asked: &Ping) -> Result<(), Stop> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut sum = Sum { peer: asked.peer.clone(), ..Sum::default() };
    let mut next = Instant::now();
    while sum.sent < asked.count {
        let ping = async {
            sleep_until(next).await;
            next = Instant::now() + asked.interval;
            bus.ask_network(async |network| network.ping(&asked.peer, &Options::new()).await).await
        };
        let answer = tokio::select! {
            biased;
            _ = interrupt.recv() => break,
            () = reader_gone() => return Err(Stop::Closed),
            answer = ping => answer,
        };
        let line = sum.enter(answer)?;
        if !out.json {
            out.text(&line)?;
        }
    }
    let code = if sum.answered > 0 { exit::OK } else { exit::FAILED };
    out.view(sum, |sum, _| sum.text())?;
    if code == exit::OK { Ok(()) } else { Err(Stop::Found(code)) }
}

impl Sum {
    /// Counts an answer; gives the line that tells it.
    ///
    /// # Errors
    /// Whatever asking again would not mend.
    fn enter(&mut self, answer: Result<Details, Failure>) -> Result<String, Failure> {
        let one = match answer {
            Ok(details) => {
                (self.peer_id, self.name) = (details.text("PeerId"), details.text("Name"));
                One {
                    round_trip_us: details.numbers("RoundTrips").first().copied(),
                    transport: details.text("Transport"),
                    address: details.text("Address"),
                    direct: details.flag("Direct"),
                    relay: details.text("Relay"),
                    relay_name: details.text("RelayName"),
                    error: None,
                }
            }
            // A peer that is silent now may answer in a second; one that was there may come back.
            Err(failure) if failure.name == ErrorName::NoAnswer.short() || self.answered > 0 && is_about_peer(&failure) => {
                One { error: Some(failure.name), ..One::default() }
            }
            Err(failure) => return Err(failure),
        };
        self.sent += 1;
        self.answered += u32::from(one.round_trip_us.is_some());
        let line = self.line(&one);
        self.pings.push(one);
        let times = || self.pings.iter().filter_map(|one| one.round_trip_us);
        (self.min_us, self.max_us) = (times().min(), times().max());
        self.avg_us = times().sum::<u64>().checked_div(u64::from(self.answered));
        Ok(line)
    }

    /// "NodeB over quic, direct (10.0.0.2): 0.8 ms".
    fn line(&self, one: &One) -> String {
        let name = self.name.as_deref().filter(|name| !name.is_empty()).map(term::line);
        let who = name.or_else(|| self.peer_id.as_deref().map(short_id)).unwrap_or_else(|| term::line(&self.peer));
        if let Some(error) = &one.error {
            let what = if *error == ErrorName::NoAnswer.short() { "no answer" } else { "not reachable" };
            return format!("{who}: {what}\n");
        }
        let way = match one.direct {
            Some(false) => format!(", {}", relayed(one.relay_name.as_deref().or(one.relay.as_deref()))),
            Some(true) => format!(", direct{}", one.address.as_deref().map_or_else(String::new, |at| format!(" ({})", host(at)))),
            None => String::new(),
        };
        let transport = one.transport.as_deref().map_or_else(String::new, |transport| format!(" over {}", term::line(transport)));
        format!("{who}{transport}{way}: {}\n", latency(one.round_trip_us))
    }

    fn text(&self) -> String {
        let mut text = format!("{} sent, {} answered", self.sent, self.answered);
        if self.answered > 0 {
            let [min, avg, max] = [self.min_us, self.avg_us, self.max_us].map(latency);
            text.push_str(&format!("; least {min}, mean {avg}, most {max}"));
        }
        text.push('\n');
        text
    }
}

fn is_about_peer(failure: &Failure) -> bool {
    [ErrorName::PeerUnreachable, ErrorName::NoSuchPeer].iter().any(|name| name.short() == failure.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbus::Variant;

    fn answer(pairs: Vec<(&str, Variant<'static>)>) -> Result<Details, Failure> {
        Ok(pairs.into_iter().map(|(key, value)| (key.to_owned(), value.try_into_owned().unwrap())).collect())
    }

    #[test]
    fn each_answer_is_a_line_that_tells_the_way_and_the_sum_counts_the_silence() {
        let mut sum = Sum { peer: "NodeB".into(), ..Sum::default() };
        let direct = answer(vec![
            ("PeerId", Variant::from("12D3KooWb")),
            ("Name", Variant::from("Node\u{1b}[2JB")),
            ("Transport", Variant::from("quic")),
            ("Address", Variant::from("/ip4/10.0.0.2/udp/4001/quic-v1")),
            ("Direct", Variant::from(true)),
            ("RoundTrips", Variant::from(vec![1_000_u64])),
        ]);
        assert_eq!(sum.enter(direct).unwrap(), "NodeB over quic, direct (10.0.0.2): 1.0 ms\n");
        let carried = answer(vec![
            ("Name", Variant::from("NodeB")),
            ("Transport", Variant::from("tcp")),
            ("Direct", Variant::from(false)),
            ("RelayName", Variant::from("NodeW")),
            ("RoundTrips", Variant::from(vec![3_000_u64])),
        ]);
        assert_eq!(sum.enter(carried).unwrap(), "NodeB over tcp, relayed via NodeW: 3.0 ms\n");
        let silent = || Err(Failure::named(ErrorName::NoAnswer.as_str(), "why"));
        assert_eq!(sum.enter(silent()).unwrap(), "NodeB: no answer\n");
        assert_eq!(sum.text(), "3 sent, 2 answered; least 1.0 ms, mean 2.0 ms, most 3.0 ms\n");
        assert_eq!((sum.min_us, sum.avg_us, sum.max_us), (Some(1_000), Some(2_000), Some(3_000)));
    }

    #[test]
    fn a_peer_that_nobody_knows_ends_it_and_one_that_never_answered_is_a_failure() {
        let mut sum = Sum::default();
        let unknown = sum.enter(Err(Failure::named(ErrorName::NoSuchPeer.as_str(), "why"))).unwrap_err();
        assert_eq!((unknown.code, sum.sent), (exit::NOT_FOUND, 0));
        assert_eq!(sum.text(), "0 sent, 0 answered\n");
    }
}
