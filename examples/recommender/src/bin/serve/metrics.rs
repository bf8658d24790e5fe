//! The metrics that `GET /metrics` gives to Prometheus, in the OpenMetrics text format.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use prometheus_client::encoding::{text, EncodeLabelSet};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{exponential_buckets, Histogram};
use prometheus_client::registry::Registry;

use crate::process::Process;

pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub struct Metrics {
    registry: Registry,
    requests: Family<Answered, Counter>,
    seconds: Family<Route, Histogram>,
    reloads: Family<Outcome, Counter>,
    generation: Gauge,
    queued_rows: Gauge,
    pub batches: Batches,
}

/// The measurements of each batch.
#[derive(Clone)]
pub struct Batches {
    pub requests: Histogram,
    pub rows: Histogram,
    pub seconds: Histogram,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    route: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    route: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// Of a reload, without and with success.
const OUTCOMES: [&str; 2] = ["refused", "replaced"];

/// From 0.1 ms to 3.3 s.
fn durations() -> Histogram {
    Histogram::new(exponential_buckets(1e-4, 2.0, 16))
}

/// From 1 to 65,536.
fn counts() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 4.0, 9))
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Registry::default(),
            requests: Family::default(),
            seconds: Family::new_with_constructor(durations),
            reloads: Family::default(),
            generation: Gauge::default(),
            queued_rows: Gauge::default(),
            batches: Batches {
                requests: counts(),
                rows: counts(),
                seconds: durations(),
            },
        };
        metrics.registered()
    }
}

impl Metrics {
    fn registered(mut self) -> Self {
        let to = &mut self.registry;
        to.register("http_requests", "Requests answered", self.requests.clone());
        to.register(
            "http_request_duration_seconds",
            "From the head of a request to the head of its answer",
            self.seconds.clone(),
        );
        to.register(
            "batch_requests",
            "Requests computed together",
            self.batches.requests.clone(),
        );
        to.register(
            "batch_rows",
            "Rows computed together",
            self.batches.rows.clone(),
        );
        to.register(
            "batch_duration_seconds",
            "Computation of a batch",
            self.batches.seconds.clone(),
        );
        to.register(
            "queued_rows",
            "Rows that wait or are being computed",
            self.queued_rows.clone(),
        );
        to.register("reloads", "Checkpoints read again", self.reloads.clone());
        to.register(
            "model_generation",
            "Number of the model in service: 1 for the first",
            self.generation.clone(),
        );
        to.register_collector(Box::new(Process));
        for outcome in OUTCOMES {
            drop(self.reloads.get_or_create(&Outcome { outcome }));
        }
        self
    }

    /// Makes the counters of a route, so that its first request shows as an increase from zero.
    pub fn know(&self, route: &str) {
        let route = route.to_owned();
        let answered = Answered {
            route: route.clone(),
            status: 200,
        };
        drop(self.requests.get_or_create(&answered));
        drop(self.seconds.get_or_create(&Route { route }));
    }

    /// Records the outcome of a reload.
    pub fn reloaded(&self, ok: bool) {
        let outcome = OUTCOMES[usize::from(ok)];
        self.reloads.get_or_create(&Outcome { outcome }).inc();
    }

    /// All metrics as text, with these values of the gauges.
    pub fn encode(&self, queued_rows: usize, generation: u64) -> Result<String, fmt::Error> {
        self.queued_rows.set(queued_rows as i64);
        self.generation.set(generation as i64);
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Counts and times every request.
pub async fn track(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    // The route as declared, so that callers cannot create new label values.
    let route = match request.extensions().get::<MatchedPath>() {
        Some(path) => path.as_str().to_owned(),
        None => "none".to_owned(),
    };
    let start = Instant::now();
    let response = next.run(request).await;
    let seconds = start.elapsed().as_secs_f64();
    let status = response.status().as_u16();
    tracing::debug!(route, status, seconds, "request");
    let answered = Answered {
        route: route.clone(),
        status,
    };
    metrics.requests.get_or_create(&answered).inc();
    metrics
        .seconds
        .get_or_create(&Route { route })
        .observe(seconds);
    response
}
