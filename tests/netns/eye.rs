//! Looks at daemons and asks them over their buses: far cheaper than a program for each look, which with fifty nodes would
//! be most of the load.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use opengateway::api::proxy::{Details, ManagerProxy};
use opengateway::api::stream::{Line, LineReader, StreamError};
use zbus::Variant;

use crate::CLUSTER;
use crate::common::node::Node;
use crate::history::{End, Record};

/// Most time that a look may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A member as a daemon lists it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub name: String,
    /// "alive", "suspect", "known".
    pub liveness: String,
    pub direct: bool,
    /// "quic", "tcp", "relay".
    pub transport: String,
}

impl Seen {
    /// It would be given prompts.
    pub fn usable(&self) -> bool {
        self.liveness == "alive"
    }

    /// For a table: "direct, quic" or "relayed, quic".
    pub fn path(&self) -> String {
        format!("{}, {}", if self.direct { "direct" } else { "relayed" }, self.transport)
    }
}

/// One who looks at a daemon.
#[derive(Debug, Clone)]
pub struct Eye {
    name: String,
    manager: ManagerProxy<'static>,
}

fn text(details: &Details, key: &str) -> String {
    details.get(key).and_then(|value| value.clone().try_into().ok()).unwrap_or_default()
}

impl Eye {
    pub async fn on(node: &Node) -> Self {
        let manager = ManagerProxy::new(&node.bus.connect().await).await.unwrap();
        Self { name: node.name().to_owned(), manager }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The members that the daemon lists; none when it is not there.
    pub async fn peers(&self) -> Vec<Seen> {
        let options = HashMap::new();
        let listed = tokio::time::timeout(PATIENCE, self.manager.list_peers(CLUSTER, &options)).await.expect("a list in time");
        let seen = |(_, details): (String, Details)| Seen {
            name: text(&details, "Name"),
            liveness: text(&details, "Liveness"),
            direct: details.get("Direct").is_some_and(|direct| bool::try_from(direct.clone()).unwrap_or_default()),
            transport: text(&details, "Transport"),
        };
        listed.unwrap_or_default().into_iter().map(seen).collect()
    }

    /// Asks with a limit, of `node` or of any other; gives everything that came back.
    pub async fn ask(&self, prompt: &str, node: Option<&str>, limit: Duration) -> Record {
        let micros = u64::try_from(limit.as_micros()).unwrap();
        let mut options = HashMap::from([("Timeout", Variant::from(micros)), ("NoLocal", Variant::from(true))]);
        if let Some(node) = node {
            options.insert("Node", Variant::from(node.to_owned()));
        }
        let mut record = Record::new(&self.name, prompt, limit);
        let begun = Instant::now();
        // Far beyond the promise: what takes longer is noted as never ended.
        let reading = tokio::time::timeout(limit + PATIENCE, self.read(prompt, &options, begun, &mut record.lines));
        record.end = reading.await.unwrap_or(End::Never);
        record.took = begun.elapsed();
        record
    }

    async fn read(
        &self,
        prompt: &str,
        options: &HashMap<&str, Variant<'_>>,
        begun: Instant,
        lines: &mut Vec<(Duration, Line)>,
    ) -> End {
        let pipe = match self.manager.start_prompt(CLUSTER, prompt, options).await {
            Ok((_, pipe)) => pipe,
            Err(zbus::Error::MethodError(name, ..)) => return End::Refused(name.to_string()),
            Err(zbus::Error::FDO(error)) => return End::Refused(zbus::DBusError::name(&*error).to_string()),
            Err(error) => return End::Broken(error.to_string()),
        };
        let pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(pipe.into()).unwrap();
        let mut reader = LineReader::new(pipe);
        loop {
            match reader.next().await {
                Ok(Some(line)) => lines.push((begun.elapsed(), line)),
                Ok(None) => return End::Closed,
                Err(error @ (StreamError::CutOff | StreamError::Io(_))) => return End::Broken(error.to_string()),
                Err(error) => panic!("{}: {error}", self.name),
            }
        }
    }

    /// Prompts of this daemon that have not ended.
    pub async fn jobs(&self) -> u32 {
        tokio::time::timeout(PATIENCE, self.manager.active_jobs()).await.expect("a number in time").unwrap()
    }
}

/// Eyes on all of `nodes`.
pub async fn eyes(nodes: &[Node]) -> Vec<Eye> {
    let mut eyes = Vec::new();
    for node in nodes {
        eyes.push(Eye::on(node).await);
    }
    eyes
}

/// Between two looks at so many daemons: looking is work for each of them, and more of it the more members it has.
pub fn pace(daemons: usize) -> Duration {
    Duration::from_millis(50) + Duration::from_millis(15) * u32::try_from(daemons).unwrap()
}

/// Members by what they are: names where there are few, else how many.
fn told(peers: &[Seen]) -> String {
    let mut by_liveness: std::collections::BTreeMap<&str, Vec<&str>> = Default::default();
    for peer in peers {
        by_liveness.entry(&peer.liveness).or_default().push(&peer.name);
    }
    let tell = |(liveness, names): (&str, Vec<&str>)| match names.len() {
        0..=8 => format!("{liveness} {}", names.join(" ")),
        many => format!("{many} {liveness}"),
    };
    by_liveness.into_iter().map(tell).collect::<Vec<_>>().join(", ")
}

/// Waits until `wanted` holds for the lists of all eyes; gives the time, or `None` and the last lists when it does not.
pub async fn until(eyes: &[Eye], limit: Duration, wanted: impl Fn(&str, &[Seen]) -> bool) -> Result<Duration, Vec<String>> {
    let begun = Instant::now();
    let mut waiting: Vec<&Eye> = eyes.iter().collect();
    loop {
        let mut still = Vec::new();
        let mut lists = Vec::new();
        for eye in waiting {
            let peers = eye.peers().await;
            if !wanted(eye.name(), &peers) {
                lists.push(format!("{}: {}", eye.name(), told(&peers)));
                still.push(eye);
            }
        }
        if still.is_empty() {
            return Ok(begun.elapsed());
        }
        if begun.elapsed() > limit {
            return Err(lists);
        }
        waiting = still;
        tokio::time::sleep(pace(eyes.len())).await;
    }
}
