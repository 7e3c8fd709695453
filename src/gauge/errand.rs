//! Work that may never come back: a call into a driver, or into a file system whose server is dead.
//!
//! It runs in a thread of its own, and not in the runtime's pool: neither the sampler nor the end of the runtime waits
//! for one that hangs.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

/// One kind of work, of which at most one piece is under way.
#[derive(Debug)]
pub(super) struct Errand<T> {
    /// What did not come back in time.
    late: Option<oneshot::Receiver<T>>,
}

impl<T> Default for Errand<T> {
    fn default() -> Self {
        Self { late: None }
    }
}

impl<T: Send + 'static> Errand<T> {
    /// Does `work`; `None` when it takes longer than `patience` or fails. While a late one is still out, no other is begun
    /// and nobody waits.
    pub(super) async fn run(&mut self, patience: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if let Some(late) = &mut self.late {
            if matches!(late.try_recv(), Err(oneshot::error::TryRecvError::Empty)) {
                return None;
            }
            // What it brings is as old as its delay: it is done again.
            self.late = None;
        }
        let (reply, mut answer) = oneshot::channel();
        let work = move || drop(reply.send(work()));
        std::thread::Builder::new().name("gauge".to_owned()).spawn(work).ok()?;
        match timeout(patience, &mut answer).await {
            Ok(answered) => answered.ok(),
            Err(_) => {
                self.late = Some(answer);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn what_hangs_is_waited_for_once_and_done_again_when_it_is_back() {
        let mut errand = Errand::default();
        let (release, held) = mpsc::channel::<()>();
        let (back, is_back) = oneshot::channel::<()>();
        let hang = move || {
            let _ = held.recv();
            drop(back);
            1
        };
        assert_eq!(errand.run(Duration::from_millis(10), hang).await, None);
        assert_eq!(timeout(Duration::from_secs(10), errand.run(LONG, || 2)).await, Ok(None), "no second one is begun");
        release.send(()).unwrap();
        let _ = is_back.await;
        let again = async {
            loop {
                if let Some(answer) = errand.run(LONG, || 3).await {
                    return answer;
                }
                tokio::task::yield_now().await;
            }
        };
        assert_eq!(timeout(LONG, again).await, Ok(3));
    }

    #[tokio::test]
    async fn what_panics_gives_nothing_and_does_not_hinder_the_next() {
        let mut errand = Errand::default();
        assert_eq!(errand.run(LONG, || -> u8 { panic!("as a broken library does") }).await, None);
        assert_eq!(errand.run(LONG, || 1).await, Some(1));
    }
}
