//! Whether there is memory for one more engine. Questions are answered one after the other, so that two engines that start
//! together do not count the same memory.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::domain::node::ModelState;
use crate::gauge;
use crate::serve::engine::{Engine, MayStart};

/// Engines that may ask at once.
const QUESTIONS: usize = 256;
/// Memory is looked at this often while somebody has too little of it.
const LOOK: Duration = Duration::from_secs(1);

/// What is told of an engine that has memory or is about to take it.
fn taken(engine: &Engine) -> u64 {
    let (spec, status) = (engine.spec(), engine.status());
    match status.state {
        // Its file is in memory, but counts as available there: it could be thrown out, and would be missed at once.
        ModelState::Ready => spec.offer.size.unwrap_or(0),
        ModelState::Loading if status.pid.is_some() => spec.needed,
        ModelState::Loading | ModelState::Available | ModelState::Failed => 0,
    }
}

/// Starts the task that answers. It ends with the last engine.
pub(super) fn start(gauge: gauge::Handle, engines: watch::Receiver<Vec<Arc<Engine>>>) -> mpsc::Sender<MayStart> {
    let (sender, mut questions) = mpsc::channel::<MayStart>(QUESTIONS);
    tokio::spawn(async move {
        // Those that were refused, with what they need.
        let mut refused = BTreeMap::new();
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                question = questions.recv() => {
                    let Some(question) = question else { break };
                    let answer = judge(&gauge, &engines, &question).await;
                    match &answer {
                        Ok(()) => drop(refused.remove(&question.model)),
                        Err(_) => drop(refused.insert(question.model, question.needed)),
                    }
                    let _ = question.reply.send(answer);
                }
                _ = look.tick(), if !refused.is_empty() => tell_of_room(&gauge, &engines, &mut refused).await,
            }
        }
    });
    sender
}

/// Tells those for which there is memory by now, without taking it from others.
async fn tell_of_room(gauge: &gauge::Handle, engines: &watch::Receiver<Vec<Arc<Engine>>>, refused: &mut BTreeMap<String, u64>) {
    let available = gauge.measured().await.memory.available.unwrap_or(u64::MAX);
    let engines: Vec<Arc<Engine>> = engines.borrow().clone();
    let taken: u64 = engines.iter().map(|engine| taken(engine)).sum();
    refused.retain(|model, needed| {
        let is_short = available.saturating_sub(taken) < *needed;
        let engine = engines.iter().find(|engine| engine.spec().offer.name == *model);
        if let Some(engine) = engine.filter(|_| !is_short) {
            engine.memory_is_back();
        }
        is_short && engine.is_some()
    });
}

async fn judge(gauge: &gauge::Handle, engines: &watch::Receiver<Vec<Arc<Engine>>>, question: &MayStart) -> Result<(), String> {
    let mut tried_again = false;
    loop {
        let memory = gauge.measured().await.memory.clone();
        let others: Vec<Arc<Engine>> =
            engines.borrow().iter().filter(|engine| engine.spec().offer.name != question.model).cloned().collect();
        let taken: u64 = others.iter().map(|engine| taken(engine)).sum();
        let Some(available) = memory.available else { return Ok(()) };
        let free = available.saturating_sub(taken);
        if free >= question.needed {
            return Ok(());
        }
        let longest_idle = others
            .iter()
            .filter(|engine| !engine.is_kept())
            .filter_map(|engine| Some((engine.status().idle_since?, engine)))
            .min_by_key(|(since, _)| *since);
        let ended = match longest_idle {
            Some((_, engine)) => {
                tracing::info!(
                    model = engine.spec().offer.name,
                    "unloading {} to make room for {}",
                    engine.spec().offer.name,
                    question.model
                );
                engine.unload_if_idle().await
            }
            None => return Err(short(question.needed, free, memory.limit)),
        };
        if !ended {
            // It got a prompt in this moment, or ended by itself: then there is room.
            if tried_again {
                return Err(short(question.needed, free, memory.limit));
            }
            tried_again = true;
        }
    }
}

fn short(needed: u64, free: u64, limit: Option<u64>) -> String {
    let gb = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
    let of = limit.map_or_else(String::new, |limit| format!(" (this service may use {})", gb(limit)));
    format!(
        "it needs about {} of memory and {} are free{of}; a smaller context ([engine] context, slots) or a smaller model takes less",
        gb(needed),
        gb(free)
    )
}
