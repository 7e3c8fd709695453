//! The control frame with the details of a node's models, from version 2 of the membership stream on.

use super::control::{Control, ControlError, Fields, MODELS, put_list, put_text};
use super::limits::{MAX_MODELS, MAX_QUANTISATION_BYTES};
use crate::domain::node::{ModelOffer, ModelSource, ModelState};

/// What a node tells of the models of its state, beyond their names and contexts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Models {
    /// The state that they belong to.
    pub state_version: u32,
    /// One for each model of that state, in the same order.
    pub details: Vec<Details>,
}

/// One model in [`Models`]; see [`ModelOffer`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Details {
    /// Whether it can be asked at once.
    pub state: ModelState,
    /// Where the node has it from.
    pub source: ModelSource,
    /// Prompts that it answers at once; 0 when unknown.
    pub slots: u16,
    /// Bytes of its file.
    pub size: Option<u64>,
    /// Weights.
    pub parameters: Option<u64>,
    /// Such as "Q4_K_M".
    pub quantisation: Option<String>,
    /// SHA-256 of its file.
    pub digest: Option<[u8; 32]>,
}

/// Which of the optional details follow.
const HAS_SIZE: u8 = 1;
const HAS_PARAMETERS: u8 = 2;
const HAS_QUANTISATION: u8 = 4;
const HAS_DIGEST: u8 = 8;

const STATES: [ModelState; 4] = [ModelState::Available, ModelState::Loading, ModelState::Ready, ModelState::Failed];
const SOURCES: [ModelSource; 4] = [ModelSource::Unknown, ModelSource::Echo, ModelSource::Engine, ModelSource::Upstream];

/// The place of `item` in `all`, as it is written.
fn place<T: PartialEq>(all: &[T; 4], item: &T) -> u8 {
    all.iter().position(|known| known == item).and_then(|at| u8::try_from(at).ok()).unwrap_or(0)
}

impl Models {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.push(MODELS);
        out.extend_from_slice(&self.state_version.to_be_bytes());
        put_list(out, self.details.iter().take(MAX_MODELS), |out, model| model.encode(out));
    }

    pub(super) fn decode(mut fields: Fields<'_>) -> Result<Control, ControlError> {
        let state_version = fields.u32("state_version")?;
        let count = fields.count("models", MAX_MODELS)?;
        let details = (0..count).map(|_| Details::decode(&mut fields)).collect::<Result<_, _>>()?;
        fields.end(Control::Models(Self { state_version, details }))
    }
}

impl Details {
    /// What is to be told of `model`.
    pub fn of(model: &ModelOffer) -> Self {
        let ModelOffer { name: _, context_tokens: _, size, parameters, quantisation, digest, state, source, slots } =
            model.clone();
        Self { state, source, slots, size, parameters, quantisation, digest }
    }

    /// Enters what was told into `model`.
    pub fn enter(&self, model: &mut ModelOffer) {
        let Self { state, source, slots, size, parameters, quantisation, digest } = self.clone();
        let (name, context_tokens) = (std::mem::take(&mut model.name), model.context_tokens);
        *model = ModelOffer { name, context_tokens, size, parameters, quantisation, digest, state, source, slots };
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let has = |there: bool, flag: u8| u8::from(there) * flag;
        out.push(
            has(self.size.is_some(), HAS_SIZE)
                | has(self.parameters.is_some(), HAS_PARAMETERS)
                | has(self.quantisation.is_some(), HAS_QUANTISATION)
                | has(self.digest.is_some(), HAS_DIGEST),
        );
        out.push(place(&STATES, &self.state));
        out.push(place(&SOURCES, &self.source));
        out.extend_from_slice(&self.slots.to_be_bytes());
        for number in [self.size, self.parameters].into_iter().flatten() {
            out.extend_from_slice(&number.to_be_bytes());
        }
        if let Some(quantisation) = &self.quantisation {
            put_text(out, quantisation, MAX_QUANTISATION_BYTES);
        }
        out.extend_from_slice(self.digest.as_ref().map_or(&[], <[u8; 32]>::as_slice));
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, ControlError> {
        let has = fields.u8("flags")?;
        if has & !(HAS_SIZE | HAS_PARAMETERS | HAS_QUANTISATION | HAS_DIGEST) != 0 {
            return fields.bad("flags");
        }
        let Some(&state) = STATES.get(usize::from(fields.u8("model state")?)) else { return fields.bad("model state") };
        let Some(&source) = SOURCES.get(usize::from(fields.u8("model source")?)) else { return fields.bad("model source") };
        Ok(Self {
            state,
            source,
            slots: fields.u16("slots")?,
            size: (has & HAS_SIZE != 0).then(|| fields.u64("size")).transpose()?,
            parameters: (has & HAS_PARAMETERS != 0).then(|| fields.u64("parameters")).transpose()?,
            quantisation: (has & HAS_QUANTISATION != 0)
                .then(|| fields.text("quantisation", MAX_QUANTISATION_BYTES))
                .transpose()?,
            digest: (has & HAS_DIGEST != 0).then(|| fields.take("digest")).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> ModelOffer {
        ModelOffer {
            name: "m".to_owned(),
            context_tokens: 4096,
            size: Some(386_000_000),
            parameters: Some(362_000_000),
            quantisation: Some("Q8_0".to_owned()),
            digest: Some([0xab; 32]),
            state: ModelState::Ready,
            source: ModelSource::Engine,
            slots: 4,
        }
    }

    fn frame(details: Vec<Details>) -> Vec<u8> {
        Control::Models(Models { state_version: 3, details }).encode()
    }

    #[test]
    fn an_offer_is_whole_again_after_its_name_and_its_details_came_apart() {
        for state in STATES {
            for source in SOURCES {
                let told = ModelOffer { state, source, ..full() };
                let mut known = ModelOffer { context_tokens: 4096, ..ModelOffer::named("m") };
                let Ok(Control::Models(read)) = Control::decode(&frame(vec![Details::of(&told)])) else { panic!("not read") };
                read.details[0].enter(&mut known);
                assert_eq!(known, told);
            }
        }
    }

    #[test]
    fn limits_hold_at_the_limit_and_one_past_it() {
        let counted = |count: u8| {
            let mut bytes = vec![MODELS, 0, 0, 0, 1, count];
            bytes.extend(std::iter::repeat_n([0_u8; 5], usize::from(count)).flatten());
            Control::decode(&bytes)
        };
        assert!(counted(64).is_ok());
        assert!(counted(65).is_err());
        let quantised = |length: u8| {
            let mut bytes = vec![MODELS, 0, 0, 0, 1, 1, HAS_QUANTISATION, 0, 0, 0, 0, length];
            bytes.extend(std::iter::repeat_n(b'Q', usize::from(length)));
            Control::decode(&bytes)
        };
        assert!(quantised(16).is_ok());
        assert!(quantised(17).is_err());
        for (place, past) in [(6, 16), (7, 4), (8, 4)] {
            let mut bytes = vec![MODELS, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0];
            assert!(Control::decode(&bytes).is_ok());
            bytes[place] = past;
            assert!(Control::decode(&bytes).is_err(), "{place}");
        }
    }

    #[test]
    fn what_is_too_much_to_say_is_cut_and_still_reads() {
        let long = ModelOffer { quantisation: Some("ä".repeat(100)), ..full() };
        let bytes = frame(vec![Details::of(&long); 200]);
        assert!(bytes.len() <= super::super::limits::MAX_MODELS_BYTES);
        let Ok(Control::Models(read)) = Control::decode(&bytes) else { panic!("not read") };
        assert_eq!((read.details.len(), read.details[0].quantisation.as_deref()), (64, Some("ä".repeat(8).as_str())));
    }
}
