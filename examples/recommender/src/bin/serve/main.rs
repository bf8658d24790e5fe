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
//! | [`process`] | what the process uses, for the same |
//! | [`draining`] | the end of the server |
//! | [`signals`] | SIGTERM and SIGHUP |

mod api;
mod batcher;
mod connections;
mod draining;
mod error;
mod input;
mod metrics;
mod options;
mod process;
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
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

use crate::api::{App, Health};
use crate::batcher::Batcher;
use crate::draining::Draining;
use crate::metrics::Metrics;
use crate::options::{LogFormat, Options};
use crate::serving::{Model, Serving};
use crate::signals::HangUps;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator {};

fn main() -> Result<()> {
    let options = Options::parse();
    // Requests keep the cores busy, each batch one of them. Dividing a batch among threads would only make them wait for each
    // other. candle reads this once, when it first computes; there are no other threads yet.
    for variable in ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"] {
        if env::var_os(variable).is_none() {
            env::set_var(variable, "1");
        }
    }
    if options.inspect {
        let model = Model::open(&options.model, &options.model.device()?)?;
        say!("{}", serde_json::to_string_pretty(&Health::from(&model))?);
        return output::finish();
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(options.threads())
        .enable_all()
        .build()?
        .block_on(serve(options))
}

async fn serve(options: Options) -> Result<()> {
    let start = Instant::now();
    start_log(options.log_format)?;
    // Before anything else, because the default action of these signals ends the process.
    let (terminated, hang_ups) = (signals::terminated()?, HangUps::new()?);

    let metrics = Arc::new(Metrics::default());
    let app = Arc::new(App {
        batcher: Batcher::start(options.limits()?, &metrics),
        serving: Serving::open(options.model.clone(), options.keep_catalogue)?,
        metrics,
        body_limits: options.body_limits(),
        draining: Draining::default(),
    });
    let listener = TcpListener::bind(&options.listen)
        .await
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    let address = listener.local_addr()?;
    tokio::spawn(reload_at(hang_ups, app.clone()));

    say!("listening on http://{address}");
    tracing::info!(%address, seconds = start.elapsed().as_secs_f64(), "listening");

    let stop = async {
        terminated.await;
        app.draining.begin();
        tokio::time::sleep(options.drain_delay()).await;
    };
    let connections = connections::serve(
        listener,
        api::router(app.clone()),
        options.max_connections.get() as usize,
        options.read_timeout(),
        stop,
    )
    .await;
    tracing::info!("finishing what is in flight");
    app.draining.wait(connections, options.drain()).await?;
    tracing::info!("stopped");
    output::finish()
}

/// Starts the log on standard error, as RUST_LOG specifies.
fn start_log(format: LogFormat) -> Result<()> {
    let wanted = match env::var("RUST_LOG") {
        Ok(wanted) => wanted.parse().context("RUST_LOG")?,
        Err(_) => Targets::new().with_default(tracing::Level::INFO),
    };
    let log = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        // It would panic if standard error is closed.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal());
    let log = match format {
        LogFormat::Text => log.boxed(),
        LogFormat::Json => log.json().flatten_event(true).boxed(),
    };
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
