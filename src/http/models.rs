//! What can be asked now, and where a request goes: the model's name, and wishes about cluster and node. A wish that cannot
//! be met is refused with what there is; it is never widened.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::Shared;
use super::errors::Refusal;
use crate::dispatch::default_cluster;
use crate::domain::cluster::ClusterId;
use crate::domain::node::{ClusterView, Liveness, Member, ModelOffer, ModelState, NodeId, Offer};
use crate::net::Snapshot;

/// Names that an error lists.
const MAX_LISTED: usize = 16;
/// Of what a client wrote, so many characters are repeated to it.
const MAX_SHOWN: usize = 64;

/// Where a prompt goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// `None`: this machine answers.
    pub cluster: Option<ClusterId>,
    /// `None`: the best one.
    pub model: Option<String>,
    /// This member alone.
    pub peer: Option<NodeId>,
}

/// What the client said about it.
#[derive(Debug, Default)]
pub(super) struct Wishes<'a> {
    pub model: Option<&'a str>,
    pub node: Option<&'a str>,
    pub cluster: Option<&'a str>,
}

/// Who can be asked: the members of the cluster that is meant, and this machine.
struct Scope<'a> {
    view: Option<&'a Arc<ClusterView>>,
    own: &'a Offer,
    me: &'a str,
    my_id: Option<&'a NodeId>,
}

/// One that is only known is connected when it is asked.
fn is_usable(member: &Member) -> bool {
    member.serving && !member.draining && member.liveness != Liveness::Suspect
}

fn has(models: &[ModelOffer], name: &str) -> bool {
    models.iter().any(|model| model.name == name && can_be_asked(model))
}

/// One that could not be loaded is as good as not there, but for the reason that is told to who asks for it.
fn can_be_asked(model: &ModelOffer) -> bool {
    model.state != ModelState::Failed
}

fn has_failed(models: &[ModelOffer], name: &str) -> bool {
    models.iter().any(|model| model.name == name && !can_be_asked(model))
}

/// The best rank among models; `None` without any.
fn rank<'a>(models: impl Iterator<Item = &'a ModelOffer>) -> Option<(u8, u64)> {
    models.filter(|model| can_be_asked(model)).map(ModelOffer::rank).max()
}

fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(MAX_SHOWN).collect::<String>())
}

impl<'a> Scope<'a> {
    fn members(&self) -> &'a [Arc<Member>] {
        self.view.map(|view| view.members.as_slice()).unwrap_or_default()
    }

    fn usable(&self) -> impl Iterator<Item = &'a Arc<Member>> {
        self.members().iter().filter(|member| is_usable(member))
    }

    fn offers(&self, name: &str) -> bool {
        has(&self.own.models, name) || self.usable().any(|member| has(&member.models, name))
    }

    /// Why a model that nobody offers cannot be asked.
    fn missing(&self, name: &str) -> Refusal {
        if has_failed(&self.own.models, name) {
            let what = format!("model {} could not be loaded on this machine; see why with: ogctl models", shown(name));
            return Refusal::model_failed(what);
        }
        if let Some(member) = self.usable().find(|member| has_failed(&member.models, name)) {
            let what = format!("node {} could not load model {}; see: ogctl models", shown(&member.name), shown(name));
            return Refusal::model_failed(what);
        }
        Refusal::no_model(format!("there is no model {} here; there are: {}", shown(name), self.names()))
    }

    /// All names, the best first.
    fn names(&self) -> String {
        let models = self.usable().flat_map(|member| &member.models).chain(&self.own.models);
        listed(models)
    }

    fn nodes(&self) -> String {
        let mut names: Vec<String> = self.members().iter().take(MAX_LISTED).map(|member| shown(&member.name)).collect();
        names.push(format!("{} (this machine)", shown(self.me)));
        names.join(", ")
    }

    /// The model alone decides.
    fn by_model(&self, model: Option<String>) -> Route {
        let here = match &model {
            Some(name) => !self.usable().any(|member| has(&member.models, name)),
            None => {
                let theirs = rank(self.usable().flat_map(|member| &member.models));
                let ours = rank(self.own.models.iter());
                // A real model here before somebody's echo. Among real ones the dispatcher chooses.
                theirs.is_none() || (theirs < Some((1, 0)) && ours >= Some((1, 0)))
            }
        };
        Route { cluster: if here { None } else { self.view.map(|view| view.id.clone()) }, model, peer: None }
    }

    /// This node alone.
    fn by_node(&self, model: Option<String>, node: &str) -> Result<Route, Refusal> {
        let is_me = node == self.me || self.my_id.is_some_and(|id| id.as_str() == node);
        let mut found = self.members().iter().filter(|member| member.name == node || member.id.as_str() == node);
        let (member, more) = (found.next(), found.next());
        let (models, place): (&[ModelOffer], _) = match (is_me, member, more) {
            (true, None, _) => (&self.own.models, None),
            (false, Some(member), None) => (&member.models, Some(member)),
            (false, None, _) => {
                let what = format!("there is no node {}; there are: {}", shown(node), self.nodes());
                return Err(Refusal::not_found("node_not_found", what));
            }
            _ => {
                let what = format!("two nodes are called {}: name the one you mean by its peer id", shown(node));
                return Err(Refusal::bad_request("node_ambiguous", what));
            }
        };
        if let Some(name) = &model
            && !has(models, name)
        {
            if has_failed(models, name) {
                let what = format!("node {} could not load model {}; see: ogctl models", shown(node), shown(name));
                return Err(Refusal::model_failed(what));
            }
            let there = listed(models.iter());
            return Err(Refusal::no_model(format!("node {} does not have model {}; it has: {there}", shown(node), shown(name))));
        }
        let cluster = place.and(self.view).map(|view| view.id.clone());
        Ok(Route { cluster, model, peer: place.map(|member| member.id.clone()) })
    }

    fn route(&self, wishes: &Wishes<'_>) -> Result<Route, Refusal> {
        let written = wishes.model.unwrap_or_default();
        let literal = self.offers(written);
        // "name@node", unless a model is called just so.
        let (name, node) = match written.rsplit_once('@').filter(|_| !literal) {
            Some((_, "")) => return Err(Refusal::field("model", "model names no node after the @")),
            Some((name, node)) => (name, Some(node)),
            None => (written, None),
        };
        let node = match (node, wishes.node) {
            (Some(one), Some(other)) if one != other => {
                return Err(Refusal::bad_request("node_ambiguous", "model and X-OpenGateway-Node name different nodes"));
            }
            (one, other) => one.or(other),
        };
        let any = name.is_empty() || (!self.offers(name) && matches!(name, "auto" | "default"));
        let model = (!any).then(|| name.to_owned());
        if let Some(node) = node {
            return self.by_node(model, node);
        }
        if let Some(name) = &model
            && !self.offers(name)
        {
            return Err(self.missing(name));
        }
        Ok(self.by_model(model))
    }
}

fn listed<'a>(models: impl Iterator<Item = &'a ModelOffer>) -> String {
    let models = models.filter(|model| can_be_asked(model));
    let mut models: Vec<_> = models.map(|model| (model.rank(), model.name.as_str())).collect();
    models.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(b.1)));
    models.dedup_by(|a, b| a.1 == b.1);
    let names: Vec<&str> = models.into_iter().map(|(_, name)| name).collect();
    match names.len() {
        0 => "none now".to_owned(),
        count => {
            let more = if count > MAX_LISTED { ", …" } else { "" };
            names.into_iter().take(MAX_LISTED).map(|name| name.escape_debug().to_string()).collect::<Vec<_>>().join(", ") + more
        }
    }
}

/// The cluster that is meant: the named one, the only one, the default one.
fn cluster<'a>(snapshot: &'a Snapshot, named: Option<&str>) -> Result<Option<&'a Arc<ClusterView>>, Refusal> {
    let joined = || snapshot.clusters.keys().map(ClusterId::as_str).collect::<Vec<_>>().join(", ");
    match named {
        Some(name) => {
            let id = ClusterId::new(name).ok();
            let view = id.and_then(|id| snapshot.clusters.get(&id));
            view.map(Some).ok_or_else(|| {
                let what = format!("this node is not in cluster {}; it is in: {}", shown(name), joined());
                Refusal::not_found("cluster_not_found", what)
            })
        }
        None if snapshot.clusters.is_empty() => Ok(None),
        None => match default_cluster(snapshot.clusters.keys()) {
            Some(id) => Ok(snapshot.clusters.get(id)),
            None => {
                let what = format!(
                    "this node is in several clusters: name one with the header X-OpenGateway-Cluster; it is in: {}",
                    joined()
                );
                Err(Refusal::bad_request("cluster_ambiguous", what))
            }
        },
    }
}

/// Where a prompt with these wishes goes.
///
/// # Errors
/// 400 or 404, with what there is.
pub(super) fn route(shared: &Shared, wishes: &Wishes<'_>) -> Result<Route, Refusal> {
    let snapshot = shared.net.snapshot();
    let offer = shared.serve.offer();
    let own = offer.borrow();
    let view = cluster(&snapshot, wishes.cluster)?;
    Scope { view, own: &own, me: &shared.node_name, my_id: snapshot.peer_id.as_ref() }.route(wishes)
}

/// A model as OpenAI lists it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Listed {
    pub id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    context_length: Option<u32>,
    #[serde(skip)]
    rank: (u8, u64),
}

/// The models that can be asked now, the best first and the echo last: those of the cluster that is meant, or of all of
/// them where none is, and those of this machine.
///
/// # Errors
/// 404: no such cluster.
pub(super) fn list(shared: &Shared, named: Option<&str>) -> Result<Vec<Listed>, Refusal> {
    let snapshot = shared.net.snapshot();
    let views: Vec<&Arc<ClusterView>> = match cluster(&snapshot, named) {
        Ok(view) => view.into_iter().collect(),
        Err(_) if named.is_none() => snapshot.clusters.values().collect(),
        Err(refusal) => return Err(refusal),
    };
    let offer = shared.serve.offer();
    let own = offer.borrow();
    let ours = own.models.iter().filter(|_| !own.draining);
    let theirs = views.iter().flat_map(|view| &view.members).filter(|member| is_usable(member));
    let theirs = theirs.flat_map(|member| &member.models);
    let mut models: BTreeMap<&str, Listed> = BTreeMap::new();
    for model in theirs.chain(ours).filter(|model| can_be_asked(model)) {
        let rank = model.rank();
        let context_length = Some(model.context_tokens).filter(|&tokens| tokens > 0);
        let known = models.entry(&model.name).or_insert_with(|| Listed {
            id: model.name.clone(),
            object: "model",
            created: 0,
            owned_by: "opengateway",
            context_length,
            rank,
        });
        // Nodes may differ; what every one of them can do is said.
        known.context_length = known.context_length.into_iter().chain(context_length).min();
        known.rank = known.rank.max(rank);
    }
    let mut models: Vec<Listed> = models.into_values().collect();
    models.sort_by(|a, b| b.rank.cmp(&a.rank).then_with(|| a.id.cmp(&b.id)));
    Ok(models)
}

/// One word for what can be served now, and how many models.
pub(super) fn health(shared: &Shared) -> (&'static str, usize) {
    let models = list(shared, None).unwrap_or_default();
    let state = match models.iter().map(|model| model.rank).max() {
        _ if shared.serve.offer().borrow().draining => "stopping",
        None => "unavailable",
        Some((0, _)) => "echo-only",
        Some(_) => "ok",
    };
    (state, models.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::node::{ClusterState, FoundBy};
    use std::time::SystemTime;

    fn member(id: &str, name: &str, models: &[&str]) -> Arc<Member> {
        Arc::new(Member {
            id: NodeId::new(id),
            name: name.to_owned(),
            version: String::new(),
            protocol: 1,
            addresses: Vec::new(),
            found_by: FoundBy::Mdns,
            direct: true,
            relay: None,
            transport: "quic",
            connected_at: SystemTime::now(),
            last_seen: SystemTime::now(),
            latency_us: None,
            serving: true,
            draining: false,
            free_slots: 1,
            queued: 0,
            models: models.iter().map(|&name| ModelOffer::named(name)).collect(),
            tiers: Vec::new(),
            liveness: Liveness::Alive,
        })
    }

    fn view(members: Vec<Arc<Member>>) -> Arc<ClusterView> {
        let id = ClusterId::new("lab").unwrap();
        let (state, joined_at) = (ClusterState::Connected, SystemTime::now());
        Arc::new(ClusterView { id, state, serving: true, joined_at, announced: true, discovery: Vec::new(), members })
    }

    fn asked(model: &str, node: Option<&str>, members: Vec<Arc<Member>>, own: &[&str]) -> Result<Route, (u16, String)> {
        let view = view(members);
        let own = Offer { models: own.iter().map(|&name| ModelOffer::named(name)).collect(), ..Offer::default() };
        let id = NodeId::new("12me");
        let scope = Scope { view: Some(&view), own: &own, me: "me", my_id: Some(&id) };
        scope
            .route(&Wishes { model: Some(model), node, cluster: None })
            .map_err(|refusal| (refusal.status.as_u16(), String::from_utf8(refusal.json_text()).unwrap()))
    }

    fn route(cluster: bool, model: Option<&str>, peer: Option<&str>) -> Route {
        Route {
            cluster: cluster.then(|| ClusterId::new("lab").unwrap()),
            model: model.map(str::to_owned),
            peer: peer.map(NodeId::new),
        }
    }

    #[test]
    fn a_model_goes_to_whoever_has_it() {
        let lab = || vec![member("12a", "a", &["llama", "echo"]), member("12b", "b", &["phi"])];
        assert_eq!(asked("phi", None, lab(), &["own"]).unwrap(), route(true, Some("phi"), None));
        assert_eq!(asked("own", None, lab(), &["own"]).unwrap(), route(false, Some("own"), None));
        for any in ["", "auto", "default"] {
            assert_eq!(asked(any, None, lab(), &["own"]).unwrap(), route(true, None, None), "{any}");
            assert_eq!(asked(any, None, vec![], &["own"]).unwrap(), route(false, None, None), "{any}");
        }
        assert_eq!(asked("", None, vec![member("12a", "a", &["echo"])], &["own"]).unwrap(), route(false, None, None));
        assert_eq!(asked("auto", None, vec![member("12a", "a", &["auto"])], &[]).unwrap(), route(true, Some("auto"), None));
        let (status, text) = asked("gpt-4o", None, lab(), &["own"]).unwrap_err();
        assert!(status == 404 && text.contains("model_not_found") && text.contains("llama, own, phi, echo"), "{text}");
    }

    #[test]
    fn a_node_that_is_wished_for_is_the_only_one() {
        let lab = || vec![member("12a", "a", &["llama"]), member("12b", "b", &["phi", "odd@b"]), member("12c", "b@c", &["phi"])];
        assert_eq!(asked("llama@a", None, lab(), &[]).unwrap(), route(true, Some("llama"), Some("12a")));
        assert_eq!(asked("@12b", None, lab(), &[]).unwrap(), route(true, None, Some("12b")));
        assert_eq!(asked("phi", Some("b"), lab(), &[]).unwrap(), route(true, Some("phi"), Some("12b")));
        assert_eq!(asked("phi", Some("b@c"), lab(), &[]).unwrap(), route(true, Some("phi"), Some("12c")));
        assert_eq!(asked("odd@b", None, lab(), &[]).unwrap(), route(true, Some("odd@b"), None), "a model that is called so");
        for me in ["own@me", "own@12me"] {
            assert_eq!(asked(me, None, lab(), &["own"]).unwrap(), route(false, Some("own"), None));
        }
        let (status, text) = asked("llama@nobody", None, lab(), &[]).unwrap_err();
        assert!(status == 404 && text.contains("node_not_found") && text.contains("this machine"), "{text}");
        let (status, text) = asked("phi@a", None, lab(), &[]).unwrap_err();
        assert!(status == 404 && text.contains("model_not_found") && text.contains("it has: llama"), "{text}");
        assert_eq!(asked("llama@", None, lab(), &[]).unwrap_err().0, 400);
        assert_eq!(asked("llama@a", Some("b"), lab(), &[]).unwrap_err().0, 400);
        let twins = vec![member("12a", "a", &["m"]), member("12b", "a", &["m"])];
        assert_eq!(asked("m@a", None, twins, &[]).unwrap_err().0, 400);
    }

    #[test]
    fn a_model_that_could_not_be_loaded_is_not_listed_and_asking_for_it_says_so() {
        let failed = |name: &str| ModelOffer { state: ModelState::Failed, size: Some(9_000_000_000), ..ModelOffer::named(name) };
        let mut broken = Arc::unwrap_or_clone(member("12a", "a", &["echo"]));
        broken.models.push(failed("llama"));
        let view = view(vec![Arc::new(broken)]);
        let own = Offer { models: vec![failed("mine"), ModelOffer::named("own")], ..Offer::default() };
        let scope = Scope { view: Some(&view), own: &own, me: "me", my_id: None };
        let refused = |model: &str| {
            let refusal = scope.route(&Wishes { model: Some(model), ..Wishes::default() }).unwrap_err();
            (refusal.status.as_u16(), String::from_utf8(refusal.json_text()).unwrap())
        };
        for model in ["llama", "mine", "llama@a", "mine@me"] {
            let (status, text) = refused(model);
            assert!(status == 503 && text.contains("model_unavailable") && text.contains("load"), "{model}: {text}");
        }
        let (status, text) = refused("gpt-4o");
        assert!(status == 404 && text.contains("there are: own, echo\""), "{text}");
        // What answers a prompt without a name is the real model here.
        assert_eq!(scope.route(&Wishes::default()).unwrap(), route(false, None, None));
    }

    #[test]
    fn one_that_cannot_serve_is_not_listed() {
        let mut draining = Arc::unwrap_or_clone(member("12a", "a", &["llama"]));
        draining.draining = true;
        assert_eq!(asked("llama", None, vec![Arc::new(draining)], &[]).unwrap_err().0, 404);
    }
}
