//! Chooses the next token.

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use opengateway_engine_protocol::{DEFAULT_TEMPERATURE, DEFAULT_TOP_P, Generate, MAX_TEMPERATURE};

/// Below this, temperature divides by next to nothing: the most likely token, then.
const GREEDY_BELOW: f64 = 1e-3;

/// The settings of a request, within their bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    temperature: f32,
    top_p: f32,
    seed: u32,
}

impl Settings {
    /// Clamps what was asked; `random` is the seed of a request without one.
    pub fn new(request: &Generate, random: u64) -> Self {
        let temperature = clamp(request.temperature, DEFAULT_TEMPERATURE, 0.0, MAX_TEMPERATURE);
        // Nothing is left at 0; so little leaves the most likely token.
        let top_p = clamp(request.top_p, DEFAULT_TOP_P, 1e-6, 1.0);
        let seed = request.seed.unwrap_or(random);
        // Numbers between 0 and 2: the narrower type holds them.
        #[allow(clippy::cast_possible_truncation)]
        Self {
            temperature: if temperature < GREEDY_BELOW { 0.0 } else { temperature as f32 },
            top_p: top_p as f32,
            seed: fold(seed),
        }
    }
}

fn clamp(asked: Option<f64>, default: f64, least: f64, most: f64) -> f64 {
    asked.filter(|number| !number.is_nan()).unwrap_or(default).clamp(least, most)
}

/// llama.cpp takes 32 bits, and its largest number for "any seed".
#[allow(clippy::cast_possible_truncation)]
fn fold(seed: u64) -> u32 {
    let seed = (seed ^ (seed >> 32)) as u32;
    if seed == u32::MAX { 0 } else { seed }
}

/// Chooses tokens by the settings of one request.
#[derive(Debug)]
pub enum Sampler {
    /// The most likely one.
    Greedy,
    /// One at random, likely ones more often.
    Random(LlamaSampler),
}

impl Sampler {
    /// For one request.
    pub fn new(settings: Settings) -> Self {
        if settings.temperature == 0.0 {
            return Self::Greedy;
        }
        let mut chain = vec![LlamaSampler::temp(settings.temperature)];
        if settings.top_p < 1.0 {
            chain.push(LlamaSampler::top_p(settings.top_p, 1));
        }
        chain.push(LlamaSampler::dist(settings.seed));
        Self::Random(LlamaSampler::chain(chain, true))
    }

    /// The token after the one whose logits have this place in the last batch; `None` when the model computed no numbers.
    pub fn next(&mut self, context: &LlamaContext<'_>, place: i32) -> Option<LlamaToken> {
        let likeliest = argmax(context.get_logits_ith(place))?;
        match self {
            Self::Greedy => Some(likeliest),
            Self::Random(chain) => Some(chain.sample(context, place)),
        }
    }
}

/// Place of the largest number; the first of equals; `None` if one of them is none.
fn argmax(logits: &[f32]) -> Option<LlamaToken> {
    let mut best = (0, f32::NEG_INFINITY);
    for (place, logit) in (0..).zip(logits) {
        if *logit > best.1 {
            best = (place, *logit);
        } else if logit.is_nan() {
            return None;
        }
    }
    best.1.is_finite().then(|| LlamaToken::new(best.0))
}

#[cfg(test)]
mod tests {
    use opengateway_engine_protocol::Input;

    use super::*;

    fn settings(temperature: Option<f64>, top_p: Option<f64>, seed: Option<u64>) -> Settings {
        let input = Input::Raw(String::new());
        Settings::new(&Generate { id: 1, input, max_tokens: None, temperature, top_p, seed, stop: Vec::new() }, 5)
    }

    #[test]
    #[allow(clippy::float_cmp)]
    fn every_number_is_clamped() {
        let of = |temperature| settings(Some(temperature), None, None).temperature;
        assert_eq!([of(-1.0), of(0.0), of(1e-9), of(0.5), of(2.0), of(3.0)], [0.0, 0.0, 0.0, 0.5, 2.0, 2.0]);
        assert_eq!([of(f64::INFINITY), of(f64::NEG_INFINITY)], [2.0, 0.0]);
        assert_eq!(of(f64::NAN), settings(None, None, None).temperature);
        let of = |top_p| settings(None, Some(top_p), None).top_p;
        assert_eq!([of(0.5), of(1.0), of(9.0)], [0.5, 1.0, 1.0]);
        assert!(of(0.0) > 0.0 && of(-5.0) > 0.0);
    }

    #[test]
    fn seeds_use_all_their_bits() {
        let of = |seed| settings(None, None, Some(seed)).seed;
        assert_eq!([of(0), of(7), of(1 << 32), of(u64::from(u32::MAX))], [0, 7, 1, 0]);
        assert_eq!(settings(None, None, None).seed, 5);
    }

    #[test]
    fn the_largest_number_is_found_and_none_is_noticed() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, -1.0]), Some(LlamaToken::new(1)));
        assert_eq!(argmax(&[f32::NEG_INFINITY, -2.0]), Some(LlamaToken::new(1)));
        assert_eq!(argmax(&[1.0, f32::NAN]), None);
        assert_eq!(argmax(&[f32::INFINITY, 0.0]), None);
        assert_eq!(argmax(&[]), None);
    }
}
