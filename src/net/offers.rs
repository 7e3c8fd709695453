//! What this node offers, told to the members: names in the state, details to those that understand them.

use std::time::Duration;

use tokio::time::Instant;

use super::session::Generation;
use super::task::{Due, Task};
use crate::domain::cluster::ClusterId;
use crate::domain::node::{ModelOffer, ModelState, Offer};
use crate::wire::control::{Control, State};
use crate::wire::models::{Details, Models};
use crate::wire::version::MEMBER_VERSION_TWO;

/// Between two rounds of details of models, such as how one is being loaded.
pub(super) const MODELS_AGAIN: Duration = Duration::from_millis(250);
/// Between two rounds of heartbeats because the last free slot was taken or given back.
const BEAT_AGAIN: Duration = Duration::from_millis(100);

impl Task<'_> {
    /// The models that are told to a member which speaks `protocol`.
    fn models_for(&self, cluster: &ClusterId, protocol: u16) -> Vec<ModelOffer> {
        if self.clusters.get(cluster).is_none_or(|cluster| !cluster.serve) {
            return Vec::new();
        }
        let mut models = self.offer.borrow().models.clone();
        if protocol < MEMBER_VERSION_TWO {
            // It would take every model that it hears of for one that can be asked.
            models.retain(|model| model.state != ModelState::Failed);
        }
        models
    }

    pub(super) fn send_state(&mut self, generation: Generation, cluster: &ClusterId, protocol: u16) {
        let models = self.models_for(cluster, protocol);
        let state = self.state_for(models.clone());
        self.send(generation, &Control::State(state));
        self.send_models(generation, &models, protocol);
    }

    fn send_models(&mut self, generation: Generation, models: &[ModelOffer], protocol: u16) {
        if protocol >= MEMBER_VERSION_TWO {
            let details = models.iter().map(Details::of).collect();
            self.send(generation, &Control::Models(Models { state_version: self.state_version, details }));
        }
    }

    /// Tells the members that understand it what is new about models that they know by name.
    pub(super) fn tell_models(&mut self, now: Instant) {
        self.models_told = now;
        let sessions: Vec<(Generation, ClusterId, u16)> =
            self.sessions.iter().map(|(&generation, session)| (generation, session.cluster.clone(), session.protocol)).collect();
        for (generation, cluster, protocol) in sessions {
            let models = self.models_for(&cluster, protocol);
            self.send_models(generation, &models, protocol);
        }
    }

    fn state_for(&self, models: Vec<ModelOffer>) -> State {
        let offer = self.offer.borrow();
        State {
            version: self.state_version,
            node_name: self.lasting.config.node_name.clone(),
            software: self.lasting.config.version.clone(),
            models,
            tiers: offer.tiers.clone(),
        }
    }

    /// What this node offers has changed: models at once, and whether a slot is free; the rest waits for a heartbeat.
    pub(super) fn on_offer(&mut self) {
        let offer = self.offer.borrow_and_update().clone();
        let free = offer.free_slots > 0;
        let last = self.last_offer.replace(offer.clone());
        let same_state = |last: &Offer| {
            let told = |model: &ModelOffer| (model.name.clone(), model.context_tokens, model.state == ModelState::Failed);
            last.models.iter().map(told).eq(offer.models.iter().map(told))
                && (&last.tiers, last.draining) == (&offer.tiers, offer.draining)
        };
        if !last.as_ref().is_some_and(same_state) {
            self.last_free = free;
            return self.state_changed();
        }
        if last.is_some_and(|last| last.models != offer.models) {
            self.agenda.no_later(Due::Models, Instant::now().max(self.models_told + MODELS_AGAIN));
        }
        if free != self.last_free {
            // At once, but not a hundred times a second when short prompts come and go.
            self.agenda.no_later(Due::Beat, Instant::now().max(self.last_beat + BEAT_AGAIN));
        }
        self.last_free = free;
    }

    /// Tells every member the new state, with a heartbeat that carries the flags.
    pub(super) fn state_changed(&mut self) {
        self.state_version = self.state_version.wrapping_add(1);
        let now = Instant::now();
        let sessions: Vec<(Generation, ClusterId, u16)> =
            self.sessions.iter().map(|(&generation, session)| (generation, session.cluster.clone(), session.protocol)).collect();
        for (generation, cluster, protocol) in sessions {
            self.send_state(generation, &cluster, protocol);
        }
        self.models_told = now;
        self.beat(now, |_, _| true);
        self.publish_permits();
    }
}
