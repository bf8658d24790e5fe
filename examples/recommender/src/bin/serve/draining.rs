//! The end of the server: what is still to be answered, and how long that may take.
//!
//! ```text
//! SIGTERM ── /readyz says 503, requests are answered ──> the listener is closed ── requests in flight ──> end
//!             --drain-delay-seconds                       --drain-seconds
//! ```
//!
//! A request is in flight when all of it has arrived. A client that never sends the rest of its request keeps nothing waiting but
//! half of the time, and is no reason for a failure: it has not been promised anything.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{ensure, Result};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// For answers that are on their way out.
const MOMENT: Duration = Duration::from_millis(100);

pub struct Draining {
    begun: AtomicBool,
    in_flight: watch::Sender<usize>,
}

/// Counts as a request in flight until it is dropped.
pub struct InFlight(watch::Sender<usize>);

impl Default for Draining {
    fn default() -> Self {
        Self {
            begun: AtomicBool::new(false),
            in_flight: watch::Sender::new(0),
        }
    }
}

impl Draining {
    /// From now on, no more requests are wanted.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// To be called when all of a request has arrived.
    pub fn enter(&self) -> InFlight {
        self.in_flight.send_modify(|count| *count += 1);
        InFlight(self.in_flight.clone())
    }

    /// Waits for the end of all `connections`, at most so long.
    ///
    /// # Errors
    /// Requests that are in flight then.
    pub async fn wait(&self, connections: impl Future<Output = ()>, most: Duration) -> Result<()> {
        let only_halves_left = async {
            sleep(most / 2).await;
            let mut in_flight = self.in_flight.subscribe();
            // The sender is `self`, so there is one.
            let _ = in_flight.wait_for(|count| *count == 0).await;
            sleep(MOMENT).await;
        };
        let end = async {
            tokio::select! {
                () = connections => {}
                () = only_halves_left => tracing::info!("the rest of some requests never came"),
            }
        };
        if timeout(most, end).await.is_err() {
            let left = *self.in_flight.borrow();
            ensure!(
                left == 0,
                "{left} requests were still in flight at the end of --drain-seconds"
            );
        }
        Ok(())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}
