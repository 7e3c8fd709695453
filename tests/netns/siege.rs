//! What a flood does to the node that it is for, and to its friends: measured from outside, on real daemons.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use opengateway::api::names::BUS_NAME;
use zbus::wire::Variant;

use super::*;
use crate::lab::Family;
use crate::roles::Role;

/// Longest that a prompt, a join or an attack may take before a test gives up on it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two prompts of an honest member.
const PACE: Duration = Duration::from_millis(50);
/// Descriptors that come and go without a flood.
const DESCRIPTORS: usize = 5;

/// Whether the whole floods are wanted: `OPENGATEWAY_FLOODS=full`. Otherwise each takes a few seconds.
pub fn full() -> bool {
    std::env::var("OPENGATEWAY_FLOODS").is_ok_and(|how| how == "full")
}

/// `whole` in a full run, `short` otherwise.
pub fn either<T>(whole: T, short: T) -> T {
    if full() { whole } else { short }
}

/// NodeA on a1, which is attacked; NodeB on a2, its friend, which asks it all the time; NodeC on a4, which joins during the
/// attack; the rogue on a3.
pub struct Siege {
    lab: Lab,
    pub a: Node,
    pub b: Node,
    c: Node,
    /// Where NodeC finds NodeA.
    at: String,
}

/// What came of honest prompts.
#[derive(Debug, Default)]
pub struct Prompts {
    pub failed: Vec<String>,
    times: Vec<Duration>,
}

impl Prompts {
    pub fn answered(&self) -> usize {
        self.times.len()
    }

    /// The time within which `part` of the answers came.
    pub fn within(&self, part: f64) -> Duration {
        let mut sorted = self.times.clone();
        sorted.sort_unstable();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let at = (sorted.len() as f64 * part) as usize;
        sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(Duration::MAX)
    }
}

/// What was measured under one attack.
#[derive(Debug)]
pub struct Figures {
    attack: String,
    /// Rise of the resident memory at its highest, in KiB.
    pub rise: u64,
    pub descriptors: [usize; 3],
    /// Share of one processor that NodeA used.
    pub cpu: f64,
    pub lines: usize,
    pub before: Prompts,
    pub during: Prompts,
    /// How long NodeC took to be a member and to be answered.
    pub join: Duration,
    pub counted: String,
}

impl Figures {
    /// A row of the table in `docs/floods.md`.
    pub fn print(&self) {
        let [before, during, after] = self.descriptors;
        eprintln!(
            "| {} | {:.1} MiB | {before} / {during} / {after} | {:.0} % | {} | {} of {} | {} / {} / {} ms | {:.2} s | {} |",
            self.attack,
            self.rise as f64 / 1024.0,
            self.cpu * 100.0,
            self.lines,
            self.during.answered(),
            self.during.answered() + self.during.failed.len(),
            self.before.within(0.5).as_millis(),
            self.during.within(0.5).as_millis(),
            self.during.within(0.95).as_millis(),
            self.join.as_secs_f64(),
            self.counted,
        );
    }

    /// What every attack must leave intact.
    pub fn hold(&self, rise_mib: u64) {
        assert!(self.during.failed.is_empty(), "{}: honest prompts failed: {:?}", self.attack, self.during.failed);
        assert!(self.during.answered() > 0, "{}: no prompt was answered", self.attack);
        assert!(self.rise <= rise_mib * 1024, "{}: memory rose by {} KiB, {rise_mib} MiB are allowed", self.attack, self.rise);
        let [before, _, after] = self.descriptors;
        assert!(after <= before + DESCRIPTORS, "{}: {before} descriptors before, {after} after", self.attack);
    }
}

/// Asks `node` once; the echo comes whole, so its time is that of the first token.
async fn ask(bus: &zbus::Connection) -> Result<Duration, String> {
    let begun = Instant::now();
    let options: HashMap<&str, Variant<'_>> = HashMap::new();
    let body = (CLUSTER, "What is 2+2?", options);
    let (path, interface) = ("/org/opengateway/Gateway1", "org.opengateway.Gateway1.Manager");
    let call = bus.call_method(Some(BUS_NAME), path, Some(interface), "Prompt", &body);
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(Ok(_)) => Ok(begun.elapsed()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {PATIENCE:?}")),
    }
}

/// Asks until told to stop.
async fn ask_on(bus: zbus::Connection, stop: Arc<AtomicBool>, most: usize) -> Prompts {
    let mut prompts = Prompts::default();
    while !stop.load(Ordering::Relaxed) && prompts.times.len() + prompts.failed.len() < most {
        match ask(&bus).await {
            Ok(time) => prompts.times.push(time),
            Err(error) => prompts.failed.push(error),
        }
        tokio::time::sleep(PACE).await;
    }
    prompts
}

/// User and system time of a process so far, in seconds.
fn cpu(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<u32>().map(f64::from).unwrap();
    (ticks(11) + ticks(12)) / 100.0
}

impl Siege {
    /// Waits until the three are up and NodeA and NodeB see each other.
    pub async fn lay() -> Option<Self> {
        let lab = Lab::one_lan(4, Family::Both)?;
        let quiet: &[&str] = &["--no-mdns", "--no-discover"];
        Self::with(lab, quiet).await
    }

    pub async fn with(lab: Lab, quiet: &[&str]) -> Option<Self> {
        let serve = [&["--serve", "--connect", CLUSTER], quiet].concat();
        let [a] = cast(&lab, [("a1", "NodeA", &serve[..])]).await;
        let at = address_with(&a, "/ip4/10.71.0.11/tcp").await;
        let friend = [&["--consume", "--connect", CLUSTER, "--bootstrap", &at], quiet].concat();
        let [b, c] = cast(&lab, [("a2", "NodeB", &friend[..]), ("a4", "NodeC", quiet)]).await;
        all_see_each_other(&[&a, &b], Instant::now(), DEADLINE).await;
        Some(Self { lab, a, b, c, at })
    }

    /// NodeC joins and is answered.
    async fn join(&self) -> Duration {
        let begun = Instant::now();
        let said = self.c.ogctl(&["connect", CLUSTER, "--consume", "--bootstrap", &self.at, "--wait", "25"]).await;
        assert_eq!(said.code, 0, "NodeC: {said:?}\n{}\n{}", self.c.log(), self.a.log());
        self.c.until(&["peers", CLUSTER], |peers| names_of(peers).contains("NodeA")).await;
        echoed(&self.c, "May I come in?").await;
        begun.elapsed()
    }

    /// Plays `attack` and measures.
    pub async fn under(&self, attack: &str, title: &str, settings: &[(&str, &str)]) -> Figures {
        let id = self.a.json(&["status"]).await["peer_id"].as_str().unwrap().to_owned();
        let own = [("ATTACK", attack), ("VICTIM", "10.71.0.11"), ("VICTIM_ID", id.as_str())];
        // From the last attack.
        self.c.ogctl(&["disconnect", CLUSTER]).await;
        let mut rogue = Role::start(&self.lab, "a3", "rogue", &[&own, settings].concat());
        assert_eq!(rogue.told_within(PATIENCE).await, "ready");
        let bus = self.b.bus.connect().await;
        let before = ask_on(bus.clone(), Arc::default(), 20).await;
        assert!(before.failed.is_empty(), "{:?}", before.failed);
        let pid = self.a.pid();
        let (descriptors, lines, idle) = (self.a.descriptors(), self.a.log().lines().count(), self.a.kib("VmRSS"));
        std::fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
        let (begun, used) = (Instant::now(), cpu(pid));
        let stop = Arc::new(AtomicBool::new(false));
        let asking = tokio::spawn(ask_on(bus, Arc::clone(&stop), usize::MAX));
        rogue.say("go");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let join = self.join().await;
        let mut most = self.a.descriptors();
        let counted = loop {
            if let Some(word) = rogue.told_already() {
                break word.strip_prefix("over ").unwrap_or(&word).to_owned();
            }
            assert!(begun.elapsed() < 3 * PATIENCE, "{title} does not end");
            most = most.max(self.a.descriptors());
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        most = most.max(self.a.descriptors());
        let share = (cpu(pid) - used) / begun.elapsed().as_secs_f64();
        let rise = self.a.kib("VmHWM").saturating_sub(idle);
        stop.store(true, Ordering::Relaxed);
        let during = asking.await.unwrap();
        drop(rogue);
        let ended = Instant::now();
        // One more for NodeC, and what it keeps open to ask.
        while self.a.descriptors() > descriptors + DESCRIPTORS && ended.elapsed() < Duration::from_secs(40) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let figures = Figures {
            attack: title.to_owned(),
            rise,
            descriptors: [descriptors, most, self.a.descriptors()],
            cpu: share,
            lines: self.a.log().lines().count() - lines,
            before,
            during,
            join,
            counted,
        };
        figures.print();
        figures
    }
}
