//! One prompt from the asking to its one outcome: choose, ask, retry before the first token, keep the deadline.
//!
//! Nothing runs behind the caller's back: polling a job drives it, not polling it slows the serving node down, dropping it
//! cancels the work there.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::handle::{JobEvent, Options, ServedBy};
use super::route::{self, Choice, Here, Tried, Wish};
use super::speed::Sample;
use super::tally::Tallies;
use crate::domain::cluster::ClusterId;
use crate::domain::node::{ClusterView, Member, ModelOffer, NodeId};
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, MAX_TIMEOUT};
use crate::net::{self, AnswerEvent, AnswerStream};
use crate::serve::{self, Requester, Served};

/// Other members that may be tried when the first one failed before its first token.
const MAX_RETRIES: usize = 2;
/// After an engine crash only one other: the prompt itself may be the poison.
const MAX_RETRIES_AFTER_CRASH: usize = 1;
/// Members without a connection that are dialled for a prompt which nobody else can answer, and how long each may take.
const MAX_REACHED: usize = 3;
const REACH: Duration = Duration::from_secs(3);
/// The same for one that is meant by name, where there is nobody else to be tried: time for a dial through a bad network.
const REACH_ONLY: Duration = Duration::from_secs(15);

/// What all jobs share: the way to the members and to this node's own backends, and who has how much to do.
#[derive(Debug)]
pub struct Router {
    net: net::Handle,
    serve: serve::Handle,
    name: String,
    tallies: Mutex<Tallies>,
    pub(super) active: Arc<AtomicU32>,
}

impl Router {
    /// A router for the node called `name`.
    pub fn new(net: net::Handle, serve: serve::Handle, name: String) -> Self {
        Self { net, serve, name, tallies: Mutex::default(), active: Arc::default() }
    }

    fn tallies(&self) -> MutexGuard<'_, Tallies> {
        // Held for a look or one change, never across an await.
        self.tallies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn speed(&self, id: &NodeId, model: &str) -> Option<f64> {
        self.tallies().seen(id, model, Instant::now()).map(|seen| seen.tokens_per_second)
    }

    fn begin(self: &Arc<Self>, id: &NodeId) -> Errand {
        self.tallies().begin(id, Instant::now());
        Errand { router: Arc::clone(self), id: id.clone() }
    }
}

/// Counts a prompt at a member for as long as it is there.
#[derive(Debug)]
struct Errand {
    router: Arc<Router>,
    id: NodeId,
}

impl Drop for Errand {
    fn drop(&mut self) {
        self.router.tallies().end(&self.id);
    }
}

/// An answer on its way; the errand is counted for as long as it is.
#[derive(Debug)]
struct Answer {
    source: Source,
    /// The model was not loaded when it was asked.
    cold: bool,
    _errand: Errand,
}

#[derive(Debug)]
enum Source {
    Remote(Box<AnswerStream>),
    Local(mpsc::Receiver<AnswerEvent>),
}

impl Answer {
    async fn next(&mut self) -> Option<AnswerEvent> {
        match &mut self.source {
            Source::Remote(stream) => stream.next().await,
            Source::Local(events) => events.recv().await,
        }
    }
}

/// A job that drives itself when polled.
#[derive(Debug)]
pub(super) struct Running {
    router: Arc<Router>,
    uid: u32,
    /// `None`: this machine alone.
    cluster: Option<ClusterId>,
    ask: Ask,
    options: Options,
    deadline: Instant,
    answer: Option<(Answer, ServedBy)>,
    watch: Watch,
    tried: Vec<Tried>,
    /// Members that were dialled for this prompt; the last one still is while `reaching`.
    reached: Vec<NodeId>,
    reaching: bool,
    attempts: usize,
    crashes: usize,
    /// Model and context window that were counted on; 0 when unknown.
    chosen: Option<(String, u32)>,
    /// See [`Wish::context_above`].
    context_above: Option<u32>,
    /// See [`Wish::real_only`].
    real_only: bool,
    started: bool,
    ended: bool,
    /// The failure to report when nobody is left to try.
    last: Option<Failure>,
    _active: Active,
}

/// Measures an answer, from asking to its end.
#[derive(Debug)]
struct Watch {
    asked: Instant,
    /// For a slot, or for the model to be loaded: the time to its first token says nothing of the next one's.
    waited: bool,
    /// The model, and when its first token came.
    first: Option<(String, Instant)>,
    /// When the reader was handed something, until it is back for more; and how long it was away in all.
    handed: Option<Instant>,
    away: Duration,
}

impl Watch {
    fn new(now: Instant, waited: bool) -> Self {
        Self { asked: now, waited, first: None, handed: None, away: Duration::ZERO }
    }

    /// The reader is back for more.
    fn resumed(&mut self, now: Instant) {
        if let Some(handed) = self.handed.take() {
            self.away += now.duration_since(handed);
        }
    }

    /// What the whole answer says of the node; nothing when it was the reader who was slow.
    fn sample(&self, done: &Done, now: Instant) -> Option<(&str, Sample)> {
        let (model, first) = self.first.as_ref()?;
        let streamed = now.duration_since(*first);
        if self.away > streamed / 4 {
            return None;
        }
        let first_token = (!self.waited).then(|| first.duration_since(self.asked));
        Some((model, Sample { tokens: done.usage.completion_tokens, streamed, first_token }))
    }
}

/// Counts a job for as long as it lives.
#[derive(Debug)]
struct Active(Arc<AtomicU32>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Running {
    pub(super) fn new(router: Arc<Router>, uid: u32, cluster: Option<ClusterId>, ask: Ask, options: Options) -> Self {
        router.active.fetch_add(1, Ordering::Relaxed);
        let active = Active(Arc::clone(&router.active));
        let now = Instant::now();
        let deadline = now + options.timeout.min(MAX_TIMEOUT);
        Self {
            router,
            uid,
            cluster,
            ask,
            options,
            deadline,
            answer: None,
            watch: Watch::new(now, false),
            tried: Vec::new(),
            reached: Vec::new(),
            reaching: false,
            attempts: 0,
            crashes: 0,
            chosen: None,
            context_above: None,
            real_only: false,
            started: false,
            ended: false,
            last: None,
            _active: active,
        }
    }

    /// The next piece; `None` after the end. Cancel-safe: all progress is kept in `self`.
    pub(super) async fn next(&mut self) -> Option<JobEvent> {
        if self.ended {
            return None;
        }
        self.watch.resumed(Instant::now());
        let event = self.advance().await;
        self.watch.handed = self.watch.first.is_some().then(Instant::now);
        event
    }

    async fn advance(&mut self) -> Option<JobEvent> {
        loop {
            // A timeout looks at the clock only when there is nothing to read: an endless stream would outlive it.
            if Instant::now() >= self.deadline {
                return self.too_late();
            }
            let Some((answer, by)) = &mut self.answer else {
                if self.reaching || self.may_reach_better() {
                    self.reach().await;
                    continue;
                }
                match self.begin() {
                    Ok(answer) => {
                        self.watch = Watch::new(Instant::now(), answer.0.cold);
                        self.answer = Some(answer);
                    }
                    Err(failure) if self.may_reach_somebody(&failure) => self.last = Some(failure),
                    Err(failure) => return self.end(Err(failure)),
                }
                continue;
            };
            let Ok(event) = timeout_at(self.deadline, answer.next()).await else { return self.too_late() };
            match event {
                Some(AnswerEvent::Queued { position }) => {
                    self.watch.waited = true;
                    return Some(JobEvent::Queued { position });
                }
                Some(AnswerEvent::Started { model }) => {
                    self.started = true;
                    self.watch.first = Some((model.clone(), Instant::now()));
                    return Some(JobEvent::Started { model, by: by.clone() });
                }
                Some(AnswerEvent::Text(text)) => return Some(JobEvent::Text(text)),
                Some(AnswerEvent::End(Ok(done))) => {
                    let now = Instant::now();
                    if let Some((model, sample)) = self.watch.sample(&done, now).filter(|(model, _)| *model != route::ECHO) {
                        self.router.tallies().saw(&by.id, model, sample, now);
                    }
                    return self.end(Ok(done));
                }
                Some(AnswerEvent::End(Err(failure))) => {
                    if let Some(end) = self.on_failure(failure) {
                        return self.end(Err(end));
                    }
                }
                None => {
                    let lost = Failure::new(FailureKind::PeerLost, "the answer ended without an outcome");
                    if let Some(end) = self.on_failure(lost) {
                        return self.end(Err(end));
                    }
                }
            }
        }
    }

    /// Nobody at our side can answer: chooses one of the members that are only known, if one may.
    fn may_reach_somebody(&mut self, failure: &Failure) -> bool {
        let kinds = [FailureKind::NoEligiblePeer, FailureKind::ModelUnavailable, FailureKind::PeerLost];
        if !kinds.contains(&failure.kind) || self.reached.len() >= MAX_REACHED || self.attempts > MAX_RETRIES {
            return false;
        }
        let snapshot = self.router.net.snapshot();
        let Some(view) = self.cluster.as_ref().and_then(|cluster| snapshot.clusters.get(cluster)) else { return false };
        let able = route::to_reach(view, &self.wish(), &self.reached);
        self.begin_to_reach(&able)
    }

    /// Whoever is at our side has but the echo, and one of the members that are only known says that it has a model: that one
    /// is tried first, once. (Its word is not proved, and may be old: it costs an echo a moment, and no answer.)
    fn may_reach_better(&mut self) -> bool {
        if self.ask.model.is_some() || self.real_only || !self.reached.is_empty() || self.attempts > 0 {
            return false;
        }
        let snapshot = self.router.net.snapshot();
        let Some(view) = self.cluster.as_ref().and_then(|cluster| snapshot.clusters.get(cluster)) else { return false };
        if route::has_real_model(view, &self.options) || self.has_real_model_here(&self.me(&snapshot)) {
            return false;
        }
        let able = route::to_reach(view, &Wish { real_only: true, ..self.wish() }, &[]);
        self.begin_to_reach(&able)
    }

    /// Chooses one of them, if there are any.
    fn begin_to_reach(&mut self, able: &[NodeId]) -> bool {
        let Some(chosen) = able.get(random_below(able.len())) else { return false };
        self.reached.push(chosen.clone());
        self.reaching = true;
        true
    }

    /// Waits until that member is at our side, or will not be. Asked again, when it was not waited for to the end.
    async fn reach(&mut self) {
        if let (Some(cluster), Some(member)) = (self.cluster.clone(), self.reached.last().cloned()) {
            let patience = if self.options.node.is_some() || self.options.peer.is_some() { REACH_ONLY } else { REACH };
            let until = self.deadline.min(Instant::now() + patience);
            let _ = timeout_at(until, self.router.net.reach(cluster, member, until)).await;
        }
        self.reaching = false;
    }

    fn too_late(&mut self) -> Option<JobEvent> {
        let what = if self.started { "the answer was not whole" } else { "no answer came" };
        let detail = format!("{what} within {} s", self.options.timeout.as_secs_f64());
        self.end(Err(Failure::new(FailureKind::DeadlineExceeded, detail)))
    }

    fn end(&mut self, outcome: Result<Done, Failure>) -> Option<JobEvent> {
        self.ended = true;
        self.answer = None;
        Some(JobEvent::End(outcome))
    }

    /// What a failure means: `Some` ends the job with it, `None` lets the next member try.
    fn on_failure(&mut self, failure: Failure) -> Option<Failure> {
        let Some((_, by)) = self.answer.take() else { return Some(failure) };
        if self.started {
            // Text was delivered: no other node goes on with it. Who was lost is noticed by the connection or by the
            // silence, whichever is first; to the reader of half an answer it is the same.
            return Some(match failure.kind {
                FailureKind::PeerLost | FailureKind::ShuttingDown | FailureKind::Stalled => {
                    Failure::new(FailureKind::Interrupted, failure.detail)
                }
                _ => failure,
            });
        }
        if !failure.kind.retries_elsewhere() && !self.may_fit_elsewhere(failure.kind) {
            return Some(failure);
        }
        if !says_nothing_of_the_node(failure.kind) {
            self.router.tallies().failed(&by.id, Instant::now());
        }
        self.avoid(by.id, failure.kind);
        if failure.kind == FailureKind::EngineCrashed {
            self.crashes += 1;
        }
        let exhausted = self.attempts > MAX_RETRIES || self.crashes > MAX_RETRIES_AFTER_CRASH;
        // Of several failures the one that tells when to come back is worth most.
        let better = self.last.as_ref().is_none_or(|last| last.retry_after.is_none() || failure.retry_after.is_some());
        if better {
            self.last = Some(failure);
        }
        if exhausted { self.last.take() } else { None }
    }

    /// Takes note of what is not to be asked again after a failure; the model at hand was noted when it was asked.
    fn avoid(&mut self, id: NodeId, kind: FailureKind) {
        if !says_nothing_of_other_models(kind) {
            self.tried.push(Tried { id, model: None });
        }
    }

    /// A prompt that is too long for a model here may fit the same model where it has a larger context window.
    fn may_fit_elsewhere(&mut self, kind: FailureKind) -> bool {
        match self.chosen.take() {
            Some((model, context)) if kind == FailureKind::ContextOverflow && context > 0 => {
                self.ask.model = Some(model);
                self.context_above = Some(context);
                true
            }
            _ => false,
        }
    }

    /// Chooses who answers next and asks.
    fn begin(&mut self) -> Result<(Answer, ServedBy), Failure> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let snapshot = self.router.net.snapshot();
        let me = self.me(&snapshot);
        self.real_only |= self.ask.model.is_none() && self.has_real_model_here(&me);
        let Some(cluster) = self.cluster.clone() else { return self.only_here(&me, left) };
        let Some(view) = snapshot.clusters.get(&cluster) else {
            return Err(Failure::new(FailureKind::NoEligiblePeer, format!("this node is not in cluster {cluster}")));
        };
        self.real_only |= self.ask.model.is_none() && route::has_real_model(view, &self.options);
        if self.options.local_first
            && !self.options.no_local
            && let Some(local) = self.ask_here(&me, left)
        {
            return local;
        }
        loop {
            let choice = match self.choose(view, &me.id) {
                Ok(choice) => choice,
                Err(nobody) => {
                    // This node itself with what it has, be it the echo: the last choice unless it was wished for.
                    let may = nobody.kind != FailureKind::InvalidRequest
                        && self.may_answer_here(&me)
                        && (view.serving || self.has_real_model_here(&me));
                    if may && let Some(local) = self.ask_here(&me, left) {
                        return local;
                    }
                    return Err(self.last.take().unwrap_or(nobody));
                }
            };
            let Choice { member, model } = choice;
            let id = member.as_ref().map_or(&me.id, |member| &member.id).clone();
            let asked = match member {
                Some(member) => self.ask_member(&cluster, &member, &model, left),
                None => match self.ask_here(&me, left) {
                    Some(asked) => asked,
                    // The model went away between two looks.
                    None => {
                        self.tried.push(Tried { id, model: None });
                        continue;
                    }
                },
            };
            match asked {
                Err(failure) if failure.kind.retries_elsewhere() && self.attempts <= MAX_RETRIES => {
                    self.avoid(id, failure.kind);
                    self.last = Some(failure);
                }
                asked => return asked,
            }
        }
    }

    fn wish(&self) -> Wish<'_> {
        let Self { ask, options, context_above, real_only, .. } = self;
        Wish { ask, options, context_above: *context_above, real_only: *real_only }
    }

    fn choose(&self, view: &ClusterView, me: &NodeId) -> Result<Choice, Failure> {
        let offer = self.router.serve.offer();
        let offer = offer.borrow();
        let here = Here { id: me, offer: &offer, serving: view.serving };
        let may = !offer.draining && self.wishes_allow(me, &self.router.name) && !self.options.no_local;
        let (mut tallies, now) = (self.router.tallies(), Instant::now());
        let known = |candidate: &route::Candidate<'_>| tallies.known(candidate, now);
        route::choose(view, &self.wish(), may.then_some(&here), &self.tried, known, random_below)
    }

    /// What is asked of `id`, with the model by its name: left to choose, it might end at its echo. The echo alone is asked
    /// without: meanwhile there may be something better.
    fn begin_with(&mut self, id: &NodeId, model: &ModelOffer) -> Ask {
        self.attempts += 1;
        self.chosen = Some((model.name.clone(), model.context_tokens));
        let name = self.ask.model.clone().or_else(|| route::is_real(model).then(|| model.name.clone()));
        self.tried.push(Tried { id: id.clone(), model: name.clone() });
        Ask { model: name, ..self.ask.clone() }
    }

    fn ask_member(
        &mut self,
        cluster: &ClusterId,
        member: &Member,
        model: &ModelOffer,
        left: Duration,
    ) -> Result<(Answer, ServedBy), Failure> {
        let ask = self.begin_with(&member.id, model);
        let stream = self.router.net.ask(cluster.clone(), member.id.clone(), ask, left)?;
        let by = ServedBy { id: member.id.clone(), name: member.name.clone(), local: false };
        let source = Source::Remote(Box::new(stream));
        Ok((Answer { source, cold: route::is_cold(model), _errand: self.router.begin(&member.id) }, by))
    }

    fn may_answer_here(&self, me: &ServedBy) -> bool {
        !self.options.no_local && self.wishes_allow(&me.id, &me.name)
    }

    /// This machine, as the one that answers.
    fn me(&self, snapshot: &net::Snapshot) -> ServedBy {
        let id = snapshot.peer_id.clone().unwrap_or_else(|| NodeId::new(""));
        ServedBy { id, name: self.router.name.clone(), local: true }
    }

    /// Whether there is a real model here for this prompt, tried or not.
    fn has_real_model_here(&self, me: &ServedBy) -> bool {
        let wish = Wish { real_only: true, ..self.wish() };
        let offer = self.router.serve.offer();
        let offer = offer.borrow();
        self.may_answer_here(me) && route::suited(&me.id, &offer.models, &wish, &[]).is_some_and(route::is_real)
    }

    /// Asks this node or nobody.
    fn only_here(&mut self, me: &ServedBy, left: Duration) -> Result<(Answer, ServedBy), Failure> {
        match self.wishes_allow(&me.id, &me.name).then(|| self.ask_here(me, left)).flatten() {
            Some(local) => local,
            None => Err(self.last.take().unwrap_or_else(|| match &self.ask.model {
                Some(model) => {
                    Failure::new(FailureKind::ModelUnavailable, format!("this machine does not serve model {model:?}"))
                }
                None => Failure::new(FailureKind::NoEligiblePeer, "this machine serves no model, and it is in no cluster"),
            })),
        }
    }

    fn wishes_allow(&self, id: &NodeId, name: &str) -> bool {
        self.options.tier.is_none()
            && self.options.peer.as_deref().is_none_or(|peer| peer == id.as_str())
            && self.options.node.as_deref().is_none_or(|node| node == name || node == id.as_str())
    }

    /// Asks this node's own backends, when they have a model that was not tried.
    fn ask_here(&mut self, me: &ServedBy, left: Duration) -> Option<Result<(Answer, ServedBy), Failure>> {
        let offer = self.router.serve.offer();
        let model = route::suited(&me.id, &offer.borrow().models, &self.wish(), &self.tried)?.clone();
        let ask = self.begin_with(&me.id, &model);
        let (events, receiver) = mpsc::channel(64);
        let prompt = Served { requester: Requester::Local(self.uid), ask, timeout: left, events };
        let errand = self.router.begin(&me.id);
        let answer = Answer { source: Source::Local(receiver), cold: route::is_cold(&model), _errand: errand };
        Some(self.router.serve.submit(prompt).map(|()| (answer, me.clone())))
    }
}

/// A full queue or a model that is not there is no reason to avoid a node for other prompts.
fn says_nothing_of_the_node(kind: FailureKind) -> bool {
    matches!(
        kind,
        FailureKind::Busy
            | FailureKind::QuotaExceeded
            | FailureKind::ModelUnavailable
            | FailureKind::ModelLoading
            | FailureKind::ContextOverflow
    )
}

/// What fails with one model, or one backend, may go well with another of the same node.
fn says_nothing_of_other_models(kind: FailureKind) -> bool {
    says_nothing_of_the_node(kind) || kind == FailureKind::BackendFailed
}

/// A number below `below`, which is not 0. Only fairness hangs on it.
fn random_below(below: usize) -> usize {
    if below < 2 {
        return 0;
    }
    let mut bytes = [0_u8; 8];
    if getrandom::fill(&mut bytes).is_err() {
        return 0;
    }
    usize::try_from(u64::from_le_bytes(bytes) % below as u64).unwrap_or(0)
}
