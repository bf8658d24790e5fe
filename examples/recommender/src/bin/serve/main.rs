//! An HTTP server for the models that `recommender` trains.
//!
//! ```text
//! cargo run --release -p recommender                                 train and save a model
//! cargo run --release -p recommender --bin serve                     serve it on http://127.0.0.1:8080
//! cargo run --release -p recommender --bin serve -- --data ml-1m     a model of a MovieLens set, with its titles
//! ```
//!
//! ```text
//!  request ──> api ── valid for this model? ──> batcher ── bounded queue, deadline ──> model.compute (a blocking thread)
//!               │ 400 413 415 422                  │ 503                                  │
//!  answer  <────┴──────────────────────────────────┴──────────────────────────────────────┘
//! ```
//!
//! | module | |
//! |---|---|
//! | [`options`] | the command line |
//! | [`connections`] | how many there are, and how long a client may take |
//! | [`api`] | the routes: what requests and answers look like, and what is refused |
//! | [`input`] | the body of a request, from JSON |
//! | [`error`] | every refusal as JSON that names the field |
//! | [`batcher`] | concurrent requests gathered into batches, behind a bounded queue |
//! | [`serving`] | the model in service, and its replacement while requests run |
//! | [`metrics`] | counters for Prometheus |
//! | [`signals`] | SIGTERM and SIGHUP |

mod api;
mod batcher;
mod connections;
mod error;
mod input;
mod metrics;
mod options;
mod serving;
mod signals;

use std::env;
use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use recommender::allocator::Allocator;
use recommender::{output, say};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

use crate::api::App;
use crate::batcher::Batcher;
use crate::metrics::Metrics;
use crate::options::Options;
use crate::serving::Serving;
use crate::signals::HangUps;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator {};

fn main() -> Result<()> {
    // Requests keep the cores busy, each batch one of them. Dividing a batch among threads would only make them wait for each
    // other. candle reads this once, when it first computes; there are no other threads yet.
    for variable in ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"] {
        if env::var_os(variable).is_none() {
            env::set_var(variable, "1");
        }
    }
    serve(Options::parse())
}

#[tokio::main]
async fn serve(options: Options) -> Result<()> {
    let start = Instant::now();
    start_log()?;
    // Before anything else, because the default action of these signals ends the process.
    let (terminated, hang_ups) = (signals::terminated()?, HangUps::new()?);

    let metrics = Arc::new(Metrics::default());
    let app = Arc::new(App {
        batcher: Batcher::start(options.limits()?, &metrics),
        serving: Serving::open(options.model.clone())?,
        metrics,
        body_limits: options.body_limits(),
    });
    let listener = TcpListener::bind(&options.listen)
        .await
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    let address = listener.local_addr()?;
    tokio::spawn(reload_at(hang_ups, app.clone()));

    say!("listening on http://{address}");
    tracing::info!(%address, seconds = start.elapsed().as_secs_f64(), "listening");

    let in_flight = connections::serve(
        listener,
        api::router(app),
        options.max_connections.get() as usize,
        options.read_timeout(),
        terminated,
    )
    .await;
    tracing::info!("finishing what is in flight");
    timeout(options.drain(), in_flight)
        .await
        .context("requests were still in flight at the end of --drain-seconds")?;
    tracing::info!("stopped");
    output::finish()
}

/// Starts the log on standard error, as RUST_LOG specifies.
fn start_log() -> Result<()> {
    let wanted = match env::var("RUST_LOG") {
        Ok(wanted) => wanted.parse().context("RUST_LOG")?,
        Err(_) => Targets::new().with_default(tracing::Level::INFO),
    };
    let log = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        // It would panic if standard error is closed.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal());
    tracing_subscriber::registry().with(log).with(wanted).init();
    Ok(())
}

/// Replaces the model at every SIGHUP.
async fn reload_at(mut hang_ups: HangUps, app: Arc<App>) {
    loop {
        hang_ups.next().await;
        // The log says how it went.
        app.reload().await.ok();
    }
}
