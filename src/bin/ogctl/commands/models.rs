//! `ogctl models`: what can be asked in a cluster, and the model files of this machine.

mod files;
mod listing;

use crate::args::{Models, ModelsCommand};
use crate::bus::Bus;
use crate::errors::Stop;
use crate::output::Output;

pub use files::{Source, open};
pub use listing::names;

/// Lists, or does what the command says. `source` is the file that `add` copies.
pub async fn run(bus: &mut Bus, out: &Output, options: Models, source: Option<Source>) -> Result<(), Stop> {
    match options.command {
        None if options.local => listing::local(bus, out).await,
        None => listing::models(bus, out, options.cluster, options.verbose).await,
        Some(ModelsCommand::Add { sha256, .. }) => match source {
            Some(source) => files::add(bus, out, source, sha256.as_deref()).await,
            None => Ok(()), // opened before, with its error
        },
        Some(ModelsCommand::Verify { name }) => files::verify(bus, out, &name).await,
        Some(ModelsCommand::Rm { name }) => files::change(bus, out, files::Change::Remove, &name).await,
        Some(ModelsCommand::Load { name }) => files::change(bus, out, files::Change::Load, &name).await,
        Some(ModelsCommand::Unload { name }) => files::change(bus, out, files::Change::Unload, &name).await,
    }
}
