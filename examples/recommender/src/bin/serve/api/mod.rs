//! The routes: what requests and answers look like, and what is refused.
//!
//! | module | |
//! |---|---|
//! | [`ratings`] | `/recommend` and `/score`, of models of ratings |
//! | [`clicks`] | `/predict`, of models of clicks |
//! | [`embed`] | `/embed` |
//! | [`health`] | `/healthz`, `/readyz`, `/metrics`, `/reload` |
//! | [`id`], [`features`] | how users and movies are told |

mod clicks;
mod embed;
mod features;
mod health;
mod id;
mod ratings;

use std::fmt::Display;
use std::sync::Arc;

use anyhow::Result;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::from_fn_with_state;
use axum::response::Html;
use axum::routing::{get, post, MethodRouter};
use axum::{Json, Router};

use crate::batcher::Batcher;
use crate::draining::Draining;
use crate::error::ApiError;
use crate::input::BodyLimits;
use crate::metrics::{self, Metrics};
use crate::serving::{Model, Serving};

pub use health::Health;

pub struct App {
    pub batcher: Batcher,
    pub serving: Serving,
    pub metrics: Arc<Metrics>,
    pub body_limits: BodyLimits,
    pub draining: Draining,
}

type Answer<T> = Result<Json<T>, ApiError>;

type Routes = [(&'static str, MethodRouter<Arc<App>>); 9];

fn routes() -> Routes {
    [
        ("/", get(Html(include_str!("../page.html")))),
        ("/recommend", post(ratings::recommend)),
        ("/score", post(ratings::score)),
        ("/predict", post(clicks::predict)),
        ("/embed", post(embed::embed)),
        ("/healthz", get(health::healthz)),
        ("/readyz", get(health::readyz)),
        ("/metrics", get(health::metrics)),
        ("/reload", post(health::reload)),
    ]
}

pub fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    for (path, methods) in routes() {
        // So that their counters exist before the first request.
        app.metrics.know(path);
        router = router.route(path, methods);
    }
    router
        .fallback(|uri: Uri| async move {
            ApiError::new(StatusCode::NOT_FOUND, format!("no route {}", uri.path()))
        })
        .method_not_allowed_fallback(|method: Method, uri: Uri| async move {
            let error = format!("{} does not take {method}", uri.path());
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, error)
        })
        .layer(DefaultBodyLimit::max(app.body_limits.max_bytes))
        .layer(from_fn_with_state(app.metrics.clone(), metrics::track))
        .with_state(app)
}

impl App {
    /// Reads the checkpoint again; the model in service stays if the new one is refused. Both go to the log.
    pub async fn reload(&self) -> Result<Arc<Model>> {
        let model = self.serving.reload().await;
        self.metrics.reloaded(model.is_ok());
        match &model {
            Ok(model) => {
                tracing::info!(generation = model.generation, "model replaced");
                if let Some(change) = &model.change {
                    tracing::warn!("the catalogue has changed: {change}");
                }
            }
            Err(error) => tracing::warn!("model not replaced: {error:#}"),
        }
        model
    }
}

fn internal(error: impl Display) -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}"))
}

fn in_range<T: PartialOrd + Display>(
    field: impl Into<String>,
    value: T,
    least: T,
    most: T,
) -> Result<(), ApiError> {
    if least <= value && value <= most {
        return Ok(());
    }
    let error = format!("must lie in {least}..={most}, got {value}");
    Err(ApiError::field(field, error))
}

fn at_most(field: &str, len: usize, most: usize) -> Result<(), ApiError> {
    if len <= most {
        return Ok(());
    }
    let error = format!("must hold at most {most} values, got {len}");
    Err(ApiError::field(field, error))
}
