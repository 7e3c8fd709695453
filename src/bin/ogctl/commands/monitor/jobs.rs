//! The pipe on which the daemon tells how jobs go.

use crate::bus::Bus;
use crate::output::Output;
use opengateway::api::names::ErrorName;
use opengateway::api::proxy::Options;
use opengateway::api::stream::{JobLine, LineReader};
use tokio::net::unix::pipe::Receiver;

/// Lines about jobs; none where the daemon tells none.
#[derive(Debug)]
pub struct Jobs(Option<LineReader<Receiver>>);

impl Jobs {
    /// Nothing is told.
    pub fn none() -> Self {
        Self(None)
    }

    /// Asks the daemon to tell. Without that the rest is worth watching all the same; what hinders it is remarked on.
    pub async fn watch(bus: &mut Bus, out: &Output) -> Self {
        match bus.ask(async |manager| manager.watch_jobs(&Options::new()).await).await {
            Ok(stream) => Self(Receiver::from_owned_fd(stream.into()).ok().map(LineReader::new)),
            // A daemon of an older version; or one that is gone again, of which the next event is.
            Err(failure) if failure.name == ErrorName::UnknownMethod.short() || failure.is_no_daemon() => Self::none(),
            Err(failure) => {
                out.note(&format!("jobs are not shown: {}", failure.message));
                Self::none()
            }
        }
    }

    /// The next line; waits for ever when there are no more. Cancel-safe.
    pub async fn next(&mut self) -> JobLine {
        if let Some(lines) = &mut self.0 {
            match lines.next_job().await {
                Ok(Some(line)) => return line,
                // The daemon is gone, which the bus tells; a stream that is not understood is of no use either.
                Ok(None) | Err(_) => self.0 = None,
            }
        }
        std::future::pending().await
    }
}
