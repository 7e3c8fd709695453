//! What servers say of their models, each kind in its own words. Reads bodies; asks nobody.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use crate::domain::node::{ModelOffer, ModelSource, ModelState};
use crate::domain::upstream::Api;
use crate::wire::limits::MAX_MODEL_NAME_BYTES;

/// How this program signs its own list: a node that asked itself would do so for ever.
pub(super) const OWN_NAME: &str = "opengateway";
/// Models that one server may offer.
pub(super) const MAX_MODELS: usize = 64;

/// A model, and what its server calls it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub offer: ModelOffer,
    pub id: String,
}

/// The OpenAI API and LM Studio list under `data`, Ollama under `models`; llama-server has both, and means `data`.
#[derive(Deserialize)]
struct Data<T> {
    /// Null in an Ollama without models.
    data: Option<Vec<T>>,
}

#[derive(Deserialize)]
struct Models<T> {
    models: Vec<T>,
}

#[derive(Deserialize, Default)]
struct Meta {
    n_ctx: Option<u32>,
    n_ctx_train: Option<u32>,
    n_params: Option<u64>,
    size: Option<u64>,
    ftype: Option<String>,
}

/// An entry of `/v1/models`, with what servers add to it.
#[derive(Deserialize)]
struct Entry {
    id: String,
    owned_by: Option<String>,
    /// vLLM.
    max_model_len: Option<u32>,
    /// EXO and others.
    context_length: Option<u32>,
    /// llama-server; null while it loads.
    meta: Option<Meta>,
    /// EXO.
    storage_size_megabytes: Option<u64>,
    quantization: Option<String>,
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn unreadable(error: serde_json::Error) -> String {
    format!("its list of models cannot be read: {error}")
}

fn data<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<Vec<T>, String> {
    serde_json::from_slice(body).map(|list: Data<T>| list.data.unwrap_or_default()).map_err(unreadable)
}

fn listed<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<Vec<T>, String> {
    serde_json::from_slice(body).map(|list: Models<T>| list.models).map_err(unreadable)
}

fn said(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty() && text.len() <= 32 && text.bytes().all(|byte| byte.is_ascii_graphic()))
}

/// The name by which the cluster knows a model. llama-server calls it by the path of its file.
fn name(id: &str, api: Api) -> &str {
    match (api, id.strip_suffix(".gguf")) {
        (Api::LlamaServer, Some(path)) => path.rsplit('/').next().unwrap_or(path),
        _ => id,
    }
}

/// Who owns the first model of a list: how vLLM, EXO, mesh-llm, llama-server and this program sign.
pub(super) fn owner(body: &[u8]) -> Option<String> {
    data::<Entry>(body).ok()?.into_iter().next()?.owned_by
}

/// What a server may be by the owner that it gives to its models; whether it is, only its own questions tell.
pub(super) fn candidates(list: &[u8]) -> &'static [Api] {
    let Ok(entries) = data::<Entry>(list) else { return &[] };
    let Some(first) = entries.first() else { return &[Api::Ollama, Api::LmStudio, Api::Exo] };
    match first.owned_by.as_deref() {
        None | Some(OWN_NAME) => &[],
        Some("llamacpp") => &[Api::LlamaServer],
        Some("vllm") => &[Api::Vllm],
        Some("exo") => &[Api::Exo],
        Some("mesh-llm") => &[Api::MeshLlm],
        Some("organization_owner") => &[Api::LmStudio],
        // Ollama names the account that a model is from.
        Some(_) => &[Api::Ollama, Api::LmStudio],
    }
}

/// `/v1/models` of any server.
pub(super) fn openai(body: &[u8], api: Api) -> Result<Vec<Found>, String> {
    let ready = matches!(api, Api::LlamaServer | Api::Vllm);
    let entries = data::<Entry>(body)?.into_iter().map(|entry| {
        let meta = entry.meta.unwrap_or_default();
        let context = entry.max_model_len.or(entry.context_length).or(meta.n_ctx).or(meta.n_ctx_train);
        let offer = ModelOffer {
            context_tokens: context.unwrap_or(0),
            size: meta.size.or(entry.storage_size_megabytes.map(|size| size.saturating_mul(1 << 20))).filter(|size| *size > 0),
            parameters: meta.n_params,
            quantisation: said(meta.ftype).or(said(entry.quantization)),
            state: if ready { ModelState::Ready } else { ModelState::Available },
            source: ModelSource::Upstream,
            ..ModelOffer::named(name(&entry.id, api))
        };
        Found { offer, id: entry.id }
    });
    Ok(entries.collect())
}

#[derive(Deserialize, Default)]
struct Details {
    parameter_size: Option<String>,
    quantization_level: Option<String>,
}

/// An entry of Ollama's `/api/tags`.
#[derive(Deserialize)]
struct Tag {
    name: String,
    size: Option<u64>,
    digest: Option<String>,
    #[serde(default)]
    details: Details,
    /// A model that is not here: Ollama passes its prompts on to a machine of somebody else.
    remote_host: Option<String>,
}

/// A model of Ollama before its details are known, with the digest of its manifest.
pub(super) struct Tagged {
    pub found: Found,
    pub manifest: String,
}

/// Ollama's `/api/tags`, without the models that run elsewhere.
pub(super) fn ollama(body: &[u8]) -> Result<Vec<Tagged>, String> {
    let here = listed::<Tag>(body)?.into_iter().filter(|tag| tag.remote_host.as_ref().is_none_or(String::is_empty));
    let tagged = here.map(|tag| {
        let offer = ModelOffer {
            size: tag.size,
            parameters: tag.details.parameter_size.as_deref().and_then(parameters),
            quantisation: said(tag.details.quantization_level),
            source: ModelSource::Upstream,
            ..ModelOffer::named(tag.name.as_str())
        };
        Tagged { manifest: tag.digest.unwrap_or_default(), found: Found { offer, id: tag.name } }
    });
    Ok(tagged.collect())
}

/// "4.3B", "567.75M", or the plain number.
fn parameters(text: &str) -> Option<u64> {
    let (number, unit) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1e3),
        b'M' => (&text[..text.len() - 1], 1e6),
        b'B' => (&text[..text.len() - 1], 1e9),
        b'T' => (&text[..text.len() - 1], 1e12),
        _ => (text, 1.0),
    };
    let count = number.parse::<f64>().ok()? * unit;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // checked to be in range
    (count.is_finite() && (1.0..1e16).contains(&count)).then_some(count as u64)
}

/// What Ollama's `/api/show` adds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Shown {
    pub context: Option<u32>,
    pub parameters: Option<u64>,
    pub digest: Option<[u8; 32]>,
    /// It makes embeddings and answers nobody.
    pub mute: bool,
}

/// Ollama's `/api/show`. The digest of `/api/tags` is that of a manifest; the file's own is in the name of the blob that the
/// Modelfile begins from.
pub(super) fn ollama_show(body: &[u8]) -> Shown {
    let shown: Value = serde_json::from_slice(body).unwrap_or_default();
    let info = shown.get("model_info").and_then(Value::as_object);
    let number = |ending: &str| info?.iter().find(|(key, _)| key.ends_with(ending))?.1.as_u64();
    let option = |key: &str| {
        let lines = shown.get("parameters")?.as_str()?.lines();
        lines.filter_map(|line| line.trim().split_once(char::is_whitespace)).find(|(name, _)| *name == key)?.1.trim().parse().ok()
    };
    let capabilities = shown.get("capabilities").and_then(Value::as_array);
    let blob = shown.get("modelfile").and_then(Value::as_str).and_then(|file| {
        let from = file.lines().find_map(|line| line.strip_prefix("FROM "))?;
        digest(from.trim().rsplit_once("sha256-")?.1)
    });
    Shown {
        context: option("num_ctx").or_else(|| number(".context_length").and_then(|context| u32::try_from(context).ok())),
        parameters: number("general.parameter_count"),
        digest: blob,
        mute: capabilities.is_some_and(|can| !can.is_empty() && !can.iter().any(|can| can == "completion" || can == "thinking")),
    }
}

fn digest(hex: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    for (at, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(digest)
}

/// Ollama's `/api/ps`: context of the models that are loaded, by name.
pub(super) fn ollama_loaded(body: &[u8]) -> HashMap<String, Option<u32>> {
    #[derive(Deserialize)]
    struct Loaded {
        name: String,
        context_length: Option<u32>,
    }
    let loaded = listed::<Loaded>(body).unwrap_or_default();
    loaded.into_iter().map(|loaded| (loaded.name, loaded.context_length.filter(|context| *context > 0))).collect()
}

/// An entry of LM Studio's `/api/v0/models`.
#[derive(Deserialize)]
struct Studio {
    id: String,
    r#type: Option<String>,
    state: Option<String>,
    quantization: Option<String>,
    max_context_length: Option<u32>,
    loaded_context_length: Option<u32>,
}

/// LM Studio's `/api/v0/models`, without those that make embeddings.
pub(super) fn lm_studio(body: &[u8]) -> Result<Vec<Found>, String> {
    let speaking = data::<Studio>(body)?.into_iter().filter(|model| model.r#type.as_deref() != Some("embeddings"));
    let found = speaking.map(|model| {
        let state = match model.state.as_deref() {
            Some("loaded") => ModelState::Ready,
            Some("loading") => ModelState::Loading,
            _ => ModelState::Available,
        };
        let offer = ModelOffer {
            context_tokens: model.loaded_context_length.or(model.max_context_length).unwrap_or(0),
            quantisation: said(model.quantization),
            state,
            source: ModelSource::Upstream,
            ..ModelOffer::named(model.id.as_str())
        };
        Found { offer, id: model.id }
    });
    Ok(found.collect())
}

/// Whether this is LM Studio's list: every entry says whether it is loaded.
pub(super) fn is_lm_studio(body: &[u8]) -> bool {
    data::<Studio>(body).is_ok_and(|models| {
        let known = |state: &str| matches!(state, "loaded" | "not-loaded" | "loading");
        !models.is_empty() && models.iter().all(|model| model.r#type.is_some() && model.state.as_deref().is_some_and(known))
    })
}

/// What llama-server's `/props` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Props {
    pub slots: Option<usize>,
    pub context: Option<u32>,
}

/// llama-server's `/props`; `None` when this is something else. As a router it has no slots of its own.
pub(super) fn props(body: &[u8]) -> Option<Props> {
    let props: Value = serde_json::from_slice(body).ok()?;
    let slots = props.get("total_slots").and_then(Value::as_u64).and_then(|slots| usize::try_from(slots).ok());
    let settings = props.get("default_generation_settings")?.as_object()?;
    if slots.is_none() && props.get("role").and_then(Value::as_str) != Some("router") {
        return None;
    }
    let context = settings.get("n_ctx").and_then(Value::as_u64).and_then(|context| u32::try_from(context).ok());
    Some(Props { slots: slots.filter(|slots| *slots > 0), context: context.filter(|context| *context > 0) })
}

/// What is offered of what was found: the wanted ones, with names that can be told, the greatest first.
pub(super) fn offered(found: Vec<Found>, wanted: &[String], slots: usize) -> Vec<Found> {
    let is_wanted = |found: &Found| wanted.is_empty() || wanted.contains(&found.id) || wanted.contains(&found.offer.name);
    let has_name = |found: &Found| !found.offer.name.is_empty() && found.offer.name.len() <= MAX_MODEL_NAME_BYTES;
    let mut offered: Vec<Found> = found.into_iter().filter(|found| is_wanted(found) && has_name(found)).collect();
    offered.sort_by_key(|found| std::cmp::Reverse(found.offer.rank()));
    offered.truncate(MAX_MODELS);
    for found in &mut offered {
        found.offer.slots = u16::try_from(slots).unwrap_or(u16::MAX);
    }
    offered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_filtered_and_bounded() {
        let body = br#"{"object":"list","data":[{"id":"a","max_model_len":4096},{"id":"b"},{"id":""}]}"#;
        let found = openai(body, Api::OpenAi).unwrap();
        let all = offered(found.clone(), &[], 3);
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].offer.name.as_str(), all[0].offer.context_tokens, all[0].offer.slots), ("a", 4096, 3));
        assert_eq!(offered(found, &["b".to_owned()], 3)[0].id, "b");
        assert!(openai(b"<html>", Api::OpenAi).is_err());
        let named = |bytes| vec![Found { offer: ModelOffer::named("n".repeat(bytes)), id: "n".repeat(bytes) }];
        assert_eq!(offered(named(MAX_MODEL_NAME_BYTES), &[], 1).len(), 1);
        assert_eq!(offered(named(MAX_MODEL_NAME_BYTES + 1), &[], 1).len(), 0);
        let many: Vec<Found> = (0..100).flat_map(|_| named(3)).collect();
        assert_eq!(offered(many, &[], 1).len(), MAX_MODELS);
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(parameters("4.3B"), Some(4_300_000_000));
        assert_eq!(parameters("567.75M"), Some(567_750_000));
        assert_eq!(parameters("116829156672"), Some(116_829_156_672));
        for nonsense in ["", "B", "-1B", "nanB", "1e99T", "\u{1f600}"] {
            assert_eq!(parameters(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn a_digest_is_that_of_the_file_or_none() {
        let file = |from: &str| serde_json::json!({"modelfile": format!("# Modelfile\n\nFROM {from}\nTEMPLATE x")}).to_string();
        let hex = "ab".repeat(32);
        let shown = ollama_show(file(&format!("/usr/share/ollama/.ollama/models/blobs/sha256-{hex}")).as_bytes());
        assert_eq!(shown.digest, Some([0xab; 32]));
        for other in ["llama3.2:3b", "/x/sha256-abc", "/x/sha256-", &format!("/x/sha256-{}", "\u{e4}".repeat(32))] {
            assert_eq!(ollama_show(file(other).as_bytes()).digest, None, "{other}");
        }
        assert_eq!(ollama_show(b"<html>"), Shown::default());
    }

    #[test]
    fn the_path_of_a_file_is_no_name() {
        assert_eq!(name("../models/SmolLM.Q8_0.gguf", Api::LlamaServer), "SmolLM.Q8_0");
        assert_eq!(name("an-alias", Api::LlamaServer), "an-alias");
        assert_eq!(name("org/model.gguf", Api::OpenAi), "org/model.gguf");
    }
}
