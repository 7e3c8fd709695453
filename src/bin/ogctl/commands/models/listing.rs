//! What can be asked in a cluster, and what lies on this machine.

use crate::bus::Bus;
use crate::commands::{default_cluster, is_joined};
use crate::details::Read as _;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::render::{Style, Table, Tone, cell, file_size, list, short_id, tone_of_state};
use crate::term;
use opengateway::api::proxy::{Details, Options};
use serde::Serialize;

#[derive(Debug, Serialize)]
struct Models {
    /// Null where this node is in no cluster: then its own models are listed.
    cluster: Option<String>,
    models: Vec<Model>,
}

/// What is known of a model, of a whole cluster or of one node.
#[derive(Debug, Serialize)]
struct About {
    state: String,
    source: Option<String>,
    context: Option<u64>,
    slots: Option<u64>,
    tokens_per_second: Option<f64>,
    size: Option<u64>,
    parameters: Option<u64>,
    quantisation: Option<String>,
    digest: Option<String>,
    problem: Option<String>,
}

#[derive(Debug, Serialize)]
struct Model {
    model: String,
    /// A prompt that names no model goes to this one.
    default: bool,
    nodes: Vec<Node>,
    /// Prompts that its nodes would take now, by their own word.
    free_slots: u64,
    /// How many different files have this name; null: one, or nobody knows.
    variants: Option<u64>,
    #[serde(flatten)]
    about: About,
}

#[derive(Debug, Serialize)]
struct Node {
    peer_id: String,
    name: String,
    local: bool,
    free_slots: Option<u64>,
    #[serde(flatten)]
    about: About,
}

fn about(details: &Details) -> About {
    About {
        state: details.text_or_empty("State"),
        source: details.text("Source").filter(|source| source != "unknown"),
        context: details.number("Context"),
        slots: details.number("Slots"),
        tokens_per_second: details.real("TokensPerSecond"),
        size: details.number("Size"),
        parameters: details.number("Parameters"),
        quantisation: details.text("Quantisation"),
        digest: details.text("Digest"),
        problem: details.text("Problem"),
    }
}

fn model((model, details): (String, Details)) -> Model {
    let node = |details: &Details| Node {
        peer_id: details.text_or_empty("PeerId"),
        name: details.text_or_empty("Name"),
        local: details.flag("Local").unwrap_or(false),
        free_slots: details.number("FreeSlots"),
        about: about(details),
    };
    let nodes: Vec<Node> = details.inners("Nodes").iter().map(node).collect();
    Model {
        model,
        default: details.flag("Default").unwrap_or(false),
        free_slots: nodes.iter().filter_map(|node| node.free_slots).fold(0, u64::saturating_add),
        nodes,
        variants: details.number("Variants"),
        about: about(&details),
    }
}

/// Prints the models of a cluster; where this node is in none, its own.
pub async fn models(bus: &mut Bus, out: &Output, cluster: Option<String>, verbose: bool) -> Result<(), Stop> {
    let cluster = match cluster {
        Some(cluster) => Some(cluster),
        None if is_alone(bus).await? => None,
        None => Some(default_cluster(bus).await?),
    };
    let name = cluster.as_deref().unwrap_or_default();
    let models = bus.ask_models(async |models| models.list_models(name, &Options::new()).await).await?;
    let view = Models { models: models.into_iter().map(model).collect(), cluster };
    out.view(view, |view, style| text(view, style, verbose))
}

/// Names of the models of a cluster; "" is the default one.
///
/// # Errors
/// Whatever the daemon says.
pub async fn names(bus: &mut Bus, cluster: &str) -> Result<Vec<String>, Failure> {
    let models = bus.ask_models(async |models| models.list_models(cluster, &Options::new()).await).await?;
    Ok(models.into_iter().map(|(name, _)| name).collect())
}

async fn is_alone(bus: &mut Bus) -> Result<bool, Failure> {
    let clusters = bus.ask(async |manager| manager.list_clusters().await).await?;
    Ok(!clusters.iter().any(|(_, _, details)| is_joined(&details.text_or_empty("State"))))
}

fn tokens(number: Option<u64>) -> String {
    number.map_or_else(|| "-".to_owned(), |number| number.to_string())
}

fn speed(speed: Option<f64>) -> String {
    match speed {
        None => "-".to_owned(),
        Some(speed) if speed < 10.0 => format!("{speed:.1}"),
        Some(speed) => format!("{speed:.0}"),
    }
}

fn or_dash(text: Option<&String>) -> String {
    text.map_or_else(|| "-".to_owned(), |text| term::line(text))
}

fn state(state: &str) -> (String, Tone) {
    (if state.is_empty() { "-".to_owned() } else { term::line(state) }, tone_of_state(state))
}

fn node_name(node: &Node) -> String {
    let name = if node.name.is_empty() { short_id(&node.peer_id) } else { node.name.clone() };
    if node.local { format!("{name} (here)") } else { name }
}

fn text(view: &Models, style: &Style, verbose: bool) -> String {
    let place =
        view.cluster.as_deref().map_or_else(|| "on this machine".to_owned(), |cluster| format!("in {}", term::line(cluster)));
    if view.models.is_empty() {
        return format!("No model {place} now. Add one with: ogctl models add FILE.gguf\n");
    }
    let mut shown = if verbose { each_node(view, style) } else { each_model(view, style) };
    if view.cluster.is_none() {
        shown.push_str("This node is in no cluster: these are its own models.\n");
    }
    if let Some(default) = view.models.iter().find(|model| model.default) {
        shown.push_str(&format!("A prompt that names no model goes to {}.\n", term::line(&default.model)));
    }
    for model in &view.models {
        let of_nodes =
            model.nodes.iter().filter_map(|node| Some(format!("{}: {}", node_name(node), node.about.problem.as_ref()?)));
        for problem in model.about.problem.iter().cloned().chain(of_nodes) {
            shown.push_str(&format!("{} {}: {}\n", style.paint(Tone::Warn, "!"), term::line(&model.model), term::line(&problem)));
        }
    }
    shown
}

fn each_model(view: &Models, style: &Style) -> String {
    let mut table = Table::new(&["MODEL", "NODES", "CONTEXT", "QUANT", "SIZE", "STATE", "TOK/S"]);
    for model in &view.models {
        let names: Vec<String> = model.nodes.iter().map(node_name).collect();
        let differs = model.variants.is_some();
        table.row(vec![
            cell(term::line(&model.model)),
            cell(list(&names)),
            cell(tokens(model.about.context)),
            cell(if differs { "differs".to_owned() } else { or_dash(model.about.quantisation.as_ref()) }),
            cell(if differs { "differs".to_owned() } else { file_size(model.about.size) }),
            state(&model.about.state),
            cell(speed(model.about.tokens_per_second)),
        ]);
    }
    table.render(style)
}

fn each_node(view: &Models, style: &Style) -> String {
    let mut table = Table::new(&["MODEL", "NODE", "SOURCE", "STATE", "CONTEXT", "SLOTS", "QUANT", "SIZE", "TOK/S", "SHA-256"]);
    for model in &view.models {
        for node in &model.nodes {
            let about = &node.about;
            table.row(vec![
                cell(term::line(&model.model)),
                cell(term::line(&node_name(node))),
                cell(or_dash(about.source.as_ref())),
                state(&about.state),
                cell(tokens(about.context)),
                cell(tokens(about.slots)),
                cell(or_dash(about.quantisation.as_ref())),
                cell(file_size(about.size)),
                cell(speed(about.tokens_per_second)),
                cell(or_dash(about.digest.as_ref())),
            ]);
        }
    }
    table.render(style)
}

#[derive(Debug, Serialize)]
struct Local {
    models: Vec<File>,
}

#[derive(Debug, Serialize)]
struct File {
    model: String,
    state: String,
    /// From 0 to 1 while it is being loaded.
    progress: Option<f64>,
    problem: Option<String>,
    path: String,
    size: Option<u64>,
    digest: Option<String>,
    architecture: Option<String>,
    parameters: Option<u64>,
    quantisation: Option<String>,
    trained_context: Option<u64>,
    context: Option<u64>,
    slots: Option<u64>,
    /// Bytes besides the file.
    memory: Option<u64>,
    device: Option<String>,
    engine_pid: Option<u64>,
    removable: bool,
    answered: Option<u64>,
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    tokens_per_second: Option<f64>,
    crashes: Option<u64>,
}

fn file((model, details): (String, Details)) -> File {
    File {
        model,
        state: details.text_or_empty("State"),
        progress: details.real("Progress"),
        problem: details.text("Problem"),
        path: details.text_or_empty("Path"),
        size: details.number("Size"),
        digest: details.text("Digest"),
        architecture: details.text("Architecture"),
        parameters: details.number("Parameters"),
        quantisation: details.text("Quantisation"),
        trained_context: details.number("TrainedContext"),
        context: details.number("Context"),
        slots: details.number("Slots"),
        memory: details.number("Memory"),
        device: details.text("Device"),
        engine_pid: details.number("EnginePid"),
        removable: details.flag("Removable").unwrap_or(false),
        answered: details.number("Answered"),
        prompt_tokens: details.number("PromptTokens"),
        completion_tokens: details.number("CompletionTokens"),
        tokens_per_second: details.real("TokensPerSecond"),
        crashes: details.number("Crashes"),
    }
}

/// Prints the model files of this machine.
pub async fn local(bus: &mut Bus, out: &Output) -> Result<(), Stop> {
    let models = bus.ask_models(async |models| models.list_local().await).await?;
    out.view(Local { models: models.into_iter().map(file).collect() }, local_text)
}

fn local_text(view: &Local, style: &Style) -> String {
    if view.models.is_empty() {
        return "No model files on this machine. Add one with: ogctl models add FILE.gguf\n".to_owned();
    }
    let mut table = Table::new(&["MODEL", "STATE", "QUANT", "SIZE", "MEMORY", "CONTEXT", "SLOTS", "ANSWERED", "TOK/S", "PATH"]);
    for file in &view.models {
        let (mut word, tone) = state(&file.state);
        if let Some(progress) = file.progress {
            word.push_str(&format!(" {:.0} %", progress * 100.0));
        }
        table.row(vec![
            cell(term::line(&file.model)),
            (word, tone),
            cell(or_dash(file.quantisation.as_ref())),
            cell(file_size(file.size)),
            cell(file_size(file.memory)),
            cell(tokens(file.context.or(file.trained_context))),
            cell(tokens(file.slots)),
            cell(tokens(file.answered)),
            cell(speed(file.tokens_per_second)),
            cell(term::line(&file.path)),
        ]);
    }
    let mut shown = table.render(style);
    for file in &view.models {
        if let Some(problem) = &file.problem {
            shown.push_str(&format!("{} {}: {}\n", style.paint(Tone::Bad, "!"), term::line(&file.model), term::line(problem)));
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use zbus::Variant;

    fn details(pairs: Vec<(&str, Variant<'static>)>) -> Details {
        pairs.into_iter().map(|(key, value)| (key.to_owned(), value.try_into_owned().unwrap())).collect()
    }

    fn sample(name: &str) -> Model {
        let node = |name: &str, local: bool| -> HashMap<String, Variant<'static>> {
            HashMap::from([
                ("PeerId".to_owned(), Variant::from("12D3KooWabcdefgh12345678")),
                ("Name".to_owned(), Variant::from(name.to_owned())),
                ("Local".to_owned(), Variant::from(local)),
                ("FreeSlots".to_owned(), Variant::from(2_u32)),
            ])
        };
        let nodes = vec![node("\u{1b}[2JNodeA", false), node("", true)];
        let pairs = vec![
            ("Nodes", Variant::from(nodes)),
            ("State", Variant::from("ready")),
            ("Default", Variant::from(true)),
            ("Problem", Variant::from("no\u{1b}[2J\nproblem")),
        ];
        model((name.to_owned(), details(pairs)))
    }

    #[test]
    fn a_model_has_its_nodes_and_what_is_unknown_is_null() {
        let model = sample("demo");
        assert_eq!((model.nodes.len(), model.free_slots), (2, 4));
        let json = serde_json::to_value(&model).unwrap();
        assert!(json["digest"].is_null() && json["size"].is_null() && json["nodes"][0]["digest"].is_null(), "{json}");
        assert_eq!(json["default"], true);
    }

    #[test]
    fn what_a_node_says_of_a_model_steers_no_terminal() {
        let view = Models { cluster: Some("c".into()), models: vec![sample("\u{1b}]0;owned\u{7}de\u{1b}[2Jmo")] };
        for verbose in [false, true] {
            let shown = text(&view, &Style::default(), verbose);
            assert!(!shown.contains('\u{1b}') && !shown.contains("owned"), "{shown}");
            assert!(shown.contains("demo") && shown.contains("NodeA") && shown.contains("…12345678 (here)"), "{shown}");
        }
        assert_eq!(text(&view, &Style::default(), false).lines().count(), 4, "a problem is one line");
    }

    #[test]
    fn nothing_is_told_with_the_next_command() {
        let empty = Models { cluster: None, models: Vec::new() };
        assert!(text(&empty, &Style::default(), false).contains("ogctl models add"));
        assert!(local_text(&Local { models: Vec::new() }, &Style::default()).contains("ogctl models add"));
    }
}
