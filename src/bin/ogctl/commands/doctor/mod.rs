//! `ogctl doctor`: what is wrong with the network, why, and the command that mends it; below that what is known.
//!
//! The daemon draws the findings; this prints them. Exits with 0 when none of them is an error, else with 1; with 10 when
//! the peer that was asked about is not known.

mod text;
mod view;

use crate::args::Doctor;
use crate::bus::Bus;
use crate::errors::Stop;
use crate::output::Output;
use crate::view::View as _;
use opengateway::api::keys::network_option;
use opengateway::api::names::exit;
use opengateway::api::proxy::Options;
use serde::Serialize;
use view::{Facts, Finding};
use zbus::Variant;

/// The code of the finding about a peer that nobody has heard of.
const UNKNOWN: &str = "peer-unknown";

#[derive(Debug, Serialize)]
struct Diagnosis {
    findings: Vec<Finding>,
    facts: Facts,
}

/// Prints findings and facts.
pub async fn run(bus: &mut Bus, out: &Output, asked: &Doctor) -> Result<(), Stop> {
    let mut options = Options::new();
    for (key, value) in [(network_option::PEER, &asked.peer), (network_option::CLUSTER, &asked.cluster)] {
        if let Some(value) = value {
            options.insert(key, Variant::from(value.as_str()));
        }
    }
    let (findings, facts) = bus.ask_network(async |network| network.diagnose(&options).await).await?;
    let diagnosis = Diagnosis { findings: findings.iter().map(Finding::read).collect(), facts: Facts::read(&facts) };
    let code = code(&diagnosis.findings);
    out.view(diagnosis, |view, style| text::of(view, asked, style))?;
    if code == exit::OK { Ok(()) } else { Err(Stop::Found(code)) }
}

fn code(findings: &[Finding]) -> u8 {
    if findings.iter().any(|finding| finding.code == UNKNOWN) {
        exit::NOT_FOUND
    } else if findings.iter().any(|finding| finding.severity == "error") {
        exit::FAILED
    } else {
        exit::OK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_and_unknown_peers_have_their_exit_codes_and_warnings_have_none() {
        let finding = |code: &str, severity: &str| Finding {
            code: code.into(),
            severity: severity.into(),
            sentence: String::new(),
            remedy: None,
            peer: None,
            cluster: None,
        };
        assert_eq!(code(&[]), 0);
        assert_eq!(code(&[finding("alone", "warning"), finding("peer-relayed", "info")]), 0);
        assert_eq!(code(&[finding("bootstrap-refused", "error"), finding("alone", "warning")]), 1);
        assert_eq!(code(&[finding(UNKNOWN, "error")]), 10);
    }
}
