//! SIGTERM and Ctrl-C end the server, SIGHUP replaces its model. On systems other than Unix there is only Ctrl-C.

pub use platform::{terminated, HangUps};

#[cfg(unix)]
mod platform {
    use std::future::Future;
    use std::io;

    use tokio::signal::unix::{signal, Signal, SignalKind};

    /// Ends at the first SIGTERM or Ctrl-C after this call.
    pub fn terminated() -> io::Result<impl Future<Output = ()>> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        Ok(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
    }

    /// Receives every SIGHUP from its creation on.
    pub struct HangUps(Signal);

    impl HangUps {
        pub fn new() -> io::Result<Self> {
            signal(SignalKind::hangup()).map(Self)
        }

        pub async fn next(&mut self) {
            self.0.recv().await;
        }
    }
}

#[cfg(not(unix))]
mod platform {
    use std::future::{pending, Future};
    use std::io;

    /// Ends at the first Ctrl-C.
    pub fn terminated() -> io::Result<impl Future<Output = ()>> {
        Ok(async { tokio::signal::ctrl_c().await.unwrap_or_default() })
    }

    /// Never receives one.
    pub struct HangUps;

    impl HangUps {
        pub fn new() -> io::Result<Self> {
            Ok(Self)
        }

        pub async fn next(&mut self) {
            pending().await
        }
    }
}
