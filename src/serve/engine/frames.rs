//! What the child says, and what follows from it. Whatever has no place in the conversation is its end.

use opengateway_engine_protocol::{Down, ErrorKind, Finish, Ready, Up, VERSION};
use tokio::time::Instant;

use super::request::Answer;
use super::task::{Flight, State, Task, sentence};
use crate::domain::prompt::{Done, Failure, FailureKind, FinishReason, Usage};

/// An answer of fewer tokens tells nothing about the speed.
const LEAST_TOKENS: u32 = 4;

impl Task {
    pub(super) fn on_frame(&mut self, frame: Up) -> Result<(), String> {
        let State::Up(running) = &mut self.state else { return Ok(()) };
        running.heard = Instant::now();
        match frame {
            Up::Hello { protocol, version, build } if !running.greeted => {
                if protocol != VERSION {
                    let why = format!(
                        "the engine program (version {version}) speaks protocol {protocol}, this daemon {VERSION}; install both of one version"
                    );
                    self.end_for_good(why);
                    return Ok(());
                }
                running.greeted = true;
                tracing::debug!(version, build, "engine {version}: {build}");
                running.child.send(&Down::Load(self.spec.load.clone())).map_err(|error| error.to_string())
            }
            Up::Loading { progress } if running.greeted && running.ready.is_none() => {
                running.progress = if progress.is_finite() { progress.clamp(0.0, 1.0).max(running.progress) } else { 0.0 };
                Ok(())
            }
            Up::Ready(ready) if running.greeted && running.ready.is_none() && ready.slots > 0 && ready.context > 0 => {
                self.on_ready(ready);
                Ok(())
            }
            Up::LoadFailed { reason } if running.greeted && running.ready.is_none() => {
                self.end_for_good(sentence(&reason));
                Ok(())
            }
            Up::Pong { nonce, .. } if running.ping == Some(nonce) => {
                running.ping = None;
                Ok(())
            }
            Up::Started { id, .. } => self.flight(id, "started").and_then(|flight| {
                if std::mem::replace(&mut flight.started, true) { Err("it started a prompt twice".to_owned()) } else { Ok(()) }
            }),
            Up::Delta { id, text, .. } => self.on_delta(id, text),
            Up::Done { id, finish, prompt_tokens, completion_tokens, generate_us, .. } => {
                self.flight(id, "done")?;
                self.on_done(id, finish, Usage { prompt_tokens, completion_tokens }, generate_us);
                Ok(())
            }
            Up::Error { id, kind, message } => {
                self.flight(id, "error")?;
                self.on_error(id, kind, &message);
                Ok(())
            }
            Up::Hello { .. } | Up::Loading { .. } | Up::Ready(_) | Up::LoadFailed { .. } | Up::Pong { .. } => {
                Err("it sent a frame that has no place there".to_owned())
            }
        }
    }

    fn flight(&mut self, id: u64, what: &str) -> Result<&mut Flight, String> {
        self.flights.get_mut(&id).ok_or_else(|| format!("it sent \"{what}\" of a prompt that it does not have"))
    }

    fn on_ready(&mut self, ready: Ready) {
        let State::Up(running) = &mut self.state else { return };
        tracing::info!(
            model = self.spec.offer.name,
            "{} is loaded: {} prompts at once, {} tokens each, on {}, in {:.1} s",
            self.spec.offer.name,
            ready.slots,
            ready.context,
            sentence(&ready.device),
            running.since.elapsed().as_secs_f64()
        );
        self.counts.context = Some(ready.context);
        self.counts.slots = Some(ready.slots);
        self.counts.memory = Some(ready.memory);
        self.counts.device = Some(sentence(&ready.device));
        running.ready = Some(ready);
        self.load_crashes = 0;
        self.wanted = false;
        self.problem = None;
        self.idle_since = Some(Instant::now());
    }

    fn on_delta(&mut self, id: u64, text: String) -> Result<(), String> {
        let flight = self.flight(id, "delta")?;
        let Some(answer) = flight.answer.as_mut().filter(|_| flight.cancelled.is_none()) else { return Ok(()) };
        if let Err(failure) = answer.text(text) {
            // It ends here for its reader; the child still has it.
            if let Some(answer) = flight.answer.take() {
                answer.end(Err(failure));
            }
            self.on_cancel(id);
        }
        Ok(())
    }

    fn on_done(&mut self, id: u64, finish: Finish, usage: Usage, generate_us: u64) {
        let Some(answer) = self.landed(id) else { return };
        self.deaths = 0;
        let finish = match finish {
            Finish::Stop => FinishReason::Stop,
            Finish::Length => FinishReason::Length,
            Finish::Cancelled => {
                return answer.end(Err(Failure::new(FailureKind::BackendFailed, "the engine ended the prompt")));
            }
        };
        self.counts.answered += 1;
        self.counts.prompt_tokens += u64::from(usage.prompt_tokens);
        self.counts.completion_tokens += u64::from(usage.completion_tokens);
        if usage.completion_tokens >= LEAST_TOKENS && generate_us > 0 {
            let speed = f64::from(usage.completion_tokens) * 1e6 / generate_us as f64;
            self.counts.tokens_per_second = Some(self.counts.tokens_per_second.map_or(speed, |mean| mean * 0.8 + speed * 0.2));
        }
        answer.end(Ok(Done { finish, usage }));
    }

    fn on_error(&mut self, id: u64, kind: ErrorKind, message: &str) {
        let Some(answer) = self.landed(id) else { return };
        let kind = match kind {
            ErrorKind::ContextOverflow => FailureKind::ContextOverflow,
            ErrorKind::Invalid => FailureKind::InvalidRequest,
            ErrorKind::Busy => FailureKind::Busy,
            ErrorKind::Internal => FailureKind::BackendFailed,
        };
        answer.end(Err(Failure::new(kind, sentence(message))));
    }

    /// The child is done with a prompt, which it survived. Gives the reader, if there is still one.
    fn landed(&mut self, id: u64) -> Option<Answer> {
        let flight = self.flights.remove(&id)?;
        self.quarantine.survived(flight.digest);
        if self.flights.is_empty() {
            self.idle_since = Some(Instant::now());
        }
        flight.answer
    }
}
