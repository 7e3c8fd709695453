//! From offers and files to the `a{sv}` of models: which node has what, and where one name means two things.

use std::collections::{BTreeMap, BTreeSet};

use super::details::{Details, put, text};
use crate::domain::node::{ModelOffer, ModelState, NodeId};
use crate::models::{Local, hex};

/// A model of one node.
#[derive(Debug, Clone)]
pub(super) struct Offered {
    pub id: NodeId,
    pub node: String,
    pub local: bool,
    pub free_slots: Option<u16>,
    pub model: ModelOffer,
    pub problem: Option<String>,
    pub tokens_per_second: Option<f64>,
}

/// A file of this machine as an offer.
pub(super) fn offer_of(local: &Local) -> ModelOffer {
    ModelOffer {
        name: local.name.clone(),
        context_tokens: local.context.or(local.trained_context).unwrap_or(0),
        size: Some(local.size),
        parameters: local.parameters,
        quantisation: local.quantisation.clone(),
        digest: local.digest,
        state: local.state,
        source: crate::domain::node::ModelSource::Engine,
        slots: u16::try_from(local.slots).unwrap_or(u16::MAX),
    }
}

/// Details of a model file of this machine, as `ListLocal` and `ModelChanged` tell them.
pub(super) fn local(model: &Local) -> Details {
    let mut details = Details::from([
        ("State", model.state.as_str().into()),
        ("Path", text(&model.path.to_string_lossy())),
        ("Size", model.size.into()),
        ("Removable", model.removable.into()),
        ("Slots", model.slots.into()),
        ("Answered", model.answered.into()),
        ("PromptTokens", model.prompt_tokens.into()),
        ("CompletionTokens", model.completion_tokens.into()),
        ("Crashes", model.crashes.into()),
    ]);
    put(&mut details, "Digest", model.digest.as_ref().map(hex));
    put(&mut details, "Architecture", model.architecture.as_deref().map(text));
    put(&mut details, "Parameters", model.parameters);
    put(&mut details, "Quantisation", model.quantisation.as_deref().map(text));
    put(&mut details, "TrainedContext", model.trained_context);
    put(&mut details, "Context", model.context);
    put(&mut details, "Progress", model.progress.map(f64::from));
    put(&mut details, "Problem", model.problem.as_deref().map(text));
    put(&mut details, "Memory", model.memory);
    put(&mut details, "Device", model.device.as_deref().map(text));
    put(&mut details, "EnginePid", model.engine_pid);
    put(&mut details, "TokensPerSecond", finite(model.tokens_per_second));
    details
}

/// Name, state and progress, for `GetStatus`.
pub(super) fn in_short(model: &Local) -> Details {
    let mut details = Details::from([("Name", text(&model.name)), ("State", model.state.as_str().into())]);
    put(&mut details, "Progress", model.progress.map(f64::from));
    details
}

/// What a caller would be told of a model, without what moves with every prompt: to see whether it has changed.
pub(super) fn without_counters(model: &Local) -> Local {
    Local {
        answered: 0,
        prompt_tokens: 0,
        completion_tokens: 0,
        tokens_per_second: None,
        // In steps of 5 %.
        progress: model.progress.map(|progress| (progress * 20.0).floor() / 20.0),
        ..model.clone()
    }
}

/// The models of a cluster by name; with `wanted` that one alone.
pub(super) fn of_cluster(offered: Vec<Offered>, wanted: Option<&str>) -> Vec<(String, Details)> {
    let mut models: BTreeMap<String, Vec<Offered>> = BTreeMap::new();
    for one in offered {
        models.entry(super::errors::without_nul(one.model.name.clone())).or_default().push(one);
    }
    let rank = |nodes: &[Offered]| {
        let usable = nodes.iter().filter(|node| node.model.state != ModelState::Failed);
        usable.map(|node| node.model.rank()).max()
    };
    // The first of equals: whoever asks twice is told the same.
    let best = models.values().filter_map(|nodes| rank(nodes)).max();
    let default = models.iter().find(|(_, nodes)| best.is_some() && rank(nodes) == best).map(|(name, _)| name.clone());
    let wanted = models.into_iter().filter(|(name, _)| wanted.is_none_or(|wanted| wanted == name));
    wanted
        .map(|(name, nodes)| {
            let is_default = default.as_deref() == Some(name.as_str());
            let details = model(&name, &nodes, is_default);
            (name, details)
        })
        .collect()
}

fn model(name: &str, nodes: &[Offered], is_default: bool) -> Details {
    let best = nodes.iter().max_by_key(|node| usefulness(node.model.state)).expect("a model is there because a node has it");
    let mut details = Details::from([
        ("State", best.model.state.as_str().into()),
        ("Source", best.model.source.as_str().into()),
        ("Default", is_default.into()),
        ("Nodes", nodes.iter().map(node).collect::<Vec<Details>>().into()),
    ]);
    put(&mut details, "Context", nodes.iter().filter_map(context).max());
    let slots: u32 = nodes.iter().map(|node| u32::from(node.model.slots)).sum();
    put(&mut details, "Slots", Some(slots).filter(|&slots| slots > 0));
    let speeds = nodes.iter().filter_map(|node| finite(node.tokens_per_second));
    put(&mut details, "TokensPerSecond", speeds.reduce(f64::max));
    let contents: BTreeSet<[u8; 32]> = nodes.iter().filter_map(|node| node.model.digest).collect();
    if contents.len() > 1 {
        details.insert("Variants", u32::try_from(contents.len()).unwrap_or(u32::MAX).into());
        let problem = format!(
            "{name:?} is not the same model on all nodes: there are {} different files of this name; name the node too",
            contents.len()
        );
        details.insert("Problem", text(&problem));
        return details;
    }
    put(&mut details, "Size", agreed(nodes.iter().map(|node| node.model.size)));
    put(&mut details, "Parameters", agreed(nodes.iter().map(|node| node.model.parameters)));
    let quantisation = agreed(nodes.iter().map(|node| node.model.quantisation.as_deref()));
    put(&mut details, "Quantisation", quantisation.map(text));
    put(&mut details, "Digest", contents.first().map(hex));
    details
}

fn node(node: &Offered) -> Details {
    let model = &node.model;
    let mut details = Details::from([
        ("PeerId", node.id.to_string().into()),
        ("Name", text(&node.node)),
        ("Local", node.local.into()),
        ("State", model.state.as_str().into()),
        ("Source", model.source.as_str().into()),
    ]);
    put(&mut details, "Context", context(node));
    put(&mut details, "Slots", Some(u32::from(model.slots)).filter(|&slots| slots > 0));
    put(&mut details, "FreeSlots", node.free_slots.map(u32::from));
    put(&mut details, "TokensPerSecond", finite(node.tokens_per_second));
    put(&mut details, "Size", model.size);
    put(&mut details, "Parameters", model.parameters);
    put(&mut details, "Quantisation", model.quantisation.as_deref().map(text));
    put(&mut details, "Digest", model.digest.as_ref().map(hex));
    put(&mut details, "Problem", node.problem.as_deref().map(text));
    details
}

fn context(node: &Offered) -> Option<u32> {
    Some(node.model.context_tokens).filter(|&tokens| tokens > 0)
}

fn finite(number: Option<f64>) -> Option<f64> {
    number.filter(|number| number.is_finite())
}

const fn usefulness(state: ModelState) -> u8 {
    match state {
        ModelState::Failed => 0,
        ModelState::Loading => 1,
        ModelState::Available => 2,
        ModelState::Ready => 3,
    }
}

/// What all say that say anything.
fn agreed<T: PartialEq>(said: impl Iterator<Item = Option<T>>) -> Option<T> {
    let mut said = said.flatten();
    let first = said.next()?;
    said.all(|other| other == first).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbus::Variant;

    fn offered(node: &str, model: ModelOffer) -> Offered {
        Offered {
            id: NodeId::new(format!("12D3KooW{node}")),
            node: node.to_owned(),
            local: false,
            free_slots: Some(1),
            model,
            problem: None,
            tokens_per_second: None,
        }
    }

    fn file(name: &str, size: u64, digest: u8) -> ModelOffer {
        ModelOffer { size: Some(size), digest: Some([digest; 32]), ..ModelOffer::named(name) }
    }

    fn is_default(details: &Details) -> bool {
        details["Default"] == Variant::from(true)
    }

    #[test]
    fn nodes_of_one_model_are_together_and_what_they_agree_on_is_the_models() {
        let old = ModelOffer::named("demo");
        let models =
            of_cluster(vec![offered("A", file("demo", 7, 1)), offered("B", old), offered("C", ModelOffer::named("echo"))], None);
        let names: Vec<&str> = models.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["demo", "echo"]);
        let demo = &models[0].1;
        assert_eq!((&demo["Size"], &demo["Digest"]), (&Variant::from(7_u64), &Variant::from("01".repeat(32))));
        assert!(is_default(demo) && !is_default(&models[1].1));
        assert!(!demo.contains_key("Variants") && !demo.contains_key("Context") && !demo.contains_key("Slots"));
    }

    #[test]
    fn one_name_for_two_files_is_told_and_nothing_is_said_of_both() {
        let models = of_cluster(vec![offered("A", file("demo", 7, 1)), offered("B", file("demo", 7, 2))], None);
        let demo = &models[0].1;
        assert_eq!(demo["Variants"], Variant::from(2_u32));
        assert!(demo.contains_key("Problem") && !demo.contains_key("Digest") && !demo.contains_key("Size"));
    }

    #[test]
    fn the_default_is_the_greatest_that_is_not_failed_and_the_echo_only_when_there_is_no_other() {
        let broken = ModelOffer { state: ModelState::Failed, ..file("huge", 900_000_000_000, 1) };
        let all =
            vec![offered("A", broken), offered("A", file("large", 4_000_000_000, 2)), offered("A", file("toy", 900_000, 3))];
        let default = |offered: Vec<Offered>| {
            of_cluster(offered, None).into_iter().find(|(_, details)| is_default(details)).map(|(name, _)| name)
        };
        assert_eq!(default(all.clone()).as_deref(), Some("large"));
        assert_eq!(default(all[..1].to_vec()), None);
        assert_eq!(default(vec![offered("A", ModelOffer::named("echo"))]).as_deref(), Some("echo"));
        let one = of_cluster(all, Some("toy"));
        assert!(one.len() == 1 && !is_default(&one[0].1), "the default is that of all");
    }
}
