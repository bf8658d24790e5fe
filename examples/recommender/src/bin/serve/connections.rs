//! Connections: how many there are at a time, and how long a client may take to send a request.

use std::future::Future;
use std::io::{Error, ErrorKind};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// How long to wait if no connection can be accepted, for example because no file descriptor is left.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers requests until `stop`. Returns a future that waits for the requests in flight at that time.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    max_connections: usize,
    head_timeout: Duration,
    stop: impl Future<Output = ()>,
) -> impl Future<Output = ()> {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(head_timeout);
    let service = TowerToHyperService::new(router);
    let (room, connections) = (
        Arc::new(Semaphore::new(max_connections)),
        GracefulShutdown::new(),
    );
    let mut stop = pin!(stop);
    loop {
        // Without room, clients wait until the system accepts no more for us.
        let accepted = async {
            let place = room.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if is_of_client(&error) => continue,
            Err(error) => {
                tracing::error!(%error, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        answer_at_once(&stream);
        let connection = http.serve_connection(TokioIo::new(stream), service.clone());
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            // The client has gone, sent something other than HTTP, or sent nothing for too long.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    connections.shutdown()
}

/// An answer is one small write: nothing is gained by waiting for more.
fn answer_at_once(stream: &TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
}

/// Whether a connection was not accepted because its client left first.
fn is_of_client(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted | ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset
    )
}
