//! What the server says of itself.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{header, StatusCode};
use axum::response::IntoResponse;
use axum::Json;
use serde::Serialize;

use super::{internal, Answer, App};
use crate::error::ApiError;
use crate::metrics;
use crate::serving::{Kind, Model};
use recommender::about::About;
use recommender::data::Entities;

#[derive(Serialize)]
pub struct Health {
    status: &'static str,
    /// Of the server.
    version: &'static str,
    /// 1 for the model the server started with, and one more for each that replaced it.
    generation: u64,
    /// `ratings` or `clicks`.
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    users: Option<Side>,
    #[serde(skip_serializing_if = "Option::is_none")]
    movies: Option<Side>,
    tables: Vec<TableShape>,
    /// What the checkpoint says of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    about: Option<About>,
    /// How the movies differ from those of the model before.
    #[serde(skip_serializing_if = "Option::is_none")]
    catalogue_change: Option<String>,
}

/// The published ids of all users, or of all movies.
#[derive(Serialize)]
struct Side {
    count: usize,
    first_id: Option<i64>,
    last_id: Option<i64>,
}

#[derive(Serialize)]
struct TableShape {
    name: String,
    num_embeddings: usize,
    embedding_dim: usize,
}

impl From<&Model> for Health {
    fn from(model: &Model) -> Self {
        let side = |entities: &Entities| Side {
            count: entities.ids.len(),
            first_id: entities.ids.first().copied(),
            last_id: entities.ids.last().copied(),
        };
        let tables = model.tables().iter().map(|table| TableShape {
            name: table.name.clone(),
            num_embeddings: table.num_embeddings(),
            embedding_dim: table.embedding_dim(),
        });
        let catalog = match &model.kind {
            Kind::Ratings(ratings) => Some(ratings.catalog()),
            Kind::Clicks(_) => None,
        };
        Self {
            status: "ok",
            version: env!("CARGO_PKG_VERSION"),
            generation: model.generation,
            kind: model.kind.name(),
            users: catalog.map(|catalog| side(&catalog.users)),
            movies: catalog.map(|catalog| side(&catalog.movies)),
            tables: tables.collect(),
            about: model.about().cloned(),
            catalogue_change: model.change.as_ref().map(ToString::to_string),
        }
    }
}

/// Whether the process works.
pub async fn healthz(State(app): State<Arc<App>>) -> Json<Health> {
    Json(Health::from(&*app.serving.model()))
}

#[derive(Serialize)]
pub struct Ready {
    status: &'static str,
}

/// Whether to send requests here: not once the server is about to end.
pub async fn readyz(State(app): State<Arc<App>>) -> Answer<Ready> {
    if app.draining.has_begun() {
        let error = "the server is about to end";
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, error));
    }
    Ok(Json(Ready { status: "ready" }))
}

pub async fn metrics(State(app): State<Arc<App>>) -> Result<impl IntoResponse, ApiError> {
    let generation = app.serving.model().generation;
    let text = app.metrics.encode(app.batcher.queued_rows(), generation);
    let text = text.map_err(internal)?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}

/// 409 if the checkpoint is refused: the request is valid, the file is not.
pub async fn reload(State(app): State<Arc<App>>) -> Answer<Health> {
    let _in_flight = app.draining.enter();
    match app.reload().await {
        Ok(model) => Ok(Json(Health::from(&*model))),
        Err(error) => Err(ApiError::new(StatusCode::CONFLICT, format!("{error:#}"))),
    }
}
