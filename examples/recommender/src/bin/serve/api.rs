//! The routes: what requests and answers look like, and what is refused.

use std::fmt::Display;
use std::sync::Arc;

use anyhow::Result;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{header, Method, StatusCode, Uri};
use axum::middleware::from_fn_with_state;
use axum::response::{Html, IntoResponse};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use crate::batcher::{Batcher, Work};
use crate::error::ApiError;
use crate::input::{BodyLimits, Input, Object};
use crate::metrics::{self, Metrics};
use crate::serving::{Model, Serving};
use recommender::data::Entities;
use recommender::evaluate::sigmoid;
use recommender::recommend::best;

pub struct App {
    pub batcher: Batcher,
    pub serving: Serving,
    pub metrics: Arc<Metrics>,
    pub body_limits: BodyLimits,
}

type Answer<T> = Result<Json<T>, ApiError>;

pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(Html(include_str!("page.html"))))
        .route("/recommend", post(recommend))
        .route("/score", post(score))
        .route("/embed", post(embed))
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics_text))
        .route("/reload", post(reload))
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
            Ok(model) => tracing::info!(generation = model.generation, "model replaced"),
            Err(error) => tracing::warn!("model not replaced: {error:#}"),
        }
        model
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recommend {
    /// Published id of the user.
    user: i64,
    /// How many movies.
    #[serde(default = "ten")]
    k: usize,
}

fn ten() -> usize {
    10
}

#[derive(Serialize)]
struct Recommended {
    user: i64,
    movies: Vec<Movie>,
}

#[derive(Serialize)]
struct Movie {
    movie: i64,
    /// That the user likes it.
    probability: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    title: Option<String>,
    genres: String,
}

/// The `k` movies which the user has not rated and will like best, best first.
async fn recommend(
    State(app): State<Arc<App>>,
    Input(input): Input<Recommend>,
) -> Answer<Recommended> {
    let model = app.serving.model();
    let catalog = model.catalog();
    let user = row(&catalog.users, "user", input.user, || "user".into())?;
    in_range("k", input.k, 1, catalog.movies.ids.len())?;
    let count = catalog.movies.ids.len();
    let mut logits = Vec::with_capacity(count);
    // One part after the other, so that a long list leaves room in the queue and in the batches for others.
    let most = app.batcher.max_rows();
    for start in (0..count).step_by(most) {
        let movies = start..count.min(start + most);
        let part = Work::Candidates { user, movies };
        logits.extend(app.batcher.compute(&model, part).await?);
    }
    let best = best(catalog, user, &logits, input.k)
        .map_err(|error| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")))?;
    let movies = best.into_iter().map(|best| {
        let movie = catalog.movies.ids[best.movie as usize];
        Movie {
            movie,
            probability: best.probability as f32,
            title: model.title(movie).map(str::to_owned),
            genres: catalog.movies.describe("genres", best.movie),
        }
    });
    Ok(Json(Recommended {
        user: input.user,
        movies: movies.collect(),
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Score {
    pairs: Vec<Object<Pair>>,
}

/// Published ids.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    user: i64,
    movie: i64,
}

#[derive(Serialize)]
struct Scored {
    /// Per pair, that the user likes the movie.
    probabilities: Vec<f32>,
}

/// The probability of each pair.
async fn score(State(app): State<Arc<App>>, Input(input): Input<Score>) -> Answer<Scored> {
    let model = app.serving.model();
    let catalog = model.catalog();
    at_most("pairs", input.pairs.len(), app.batcher.max_rows())?;
    let pairs = input.pairs.iter().enumerate().map(|(i, Object(pair))| {
        Ok((
            row(&catalog.users, "user", pair.user, || {
                format!("pairs[{i}].user")
            })?,
            row(&catalog.movies, "movie", pair.movie, || {
                format!("pairs[{i}].movie")
            })?,
        ))
    });
    let pairs = Work::Pairs(pairs.collect::<Result<_, ApiError>>()?);
    let logits = app.batcher.compute(&model, pairs).await?;
    let probabilities = logits.into_iter().map(|logit| sigmoid(logit.into()) as f32);
    Ok(Json(Scored {
        probabilities: probabilities.collect(),
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Embed {
    table: String,
    /// Rows of the table, in 0..num_embeddings.
    indices: Vec<i64>,
    /// Where in `indices` each bag starts.
    offsets: Vec<i64>,
}

#[derive(Serialize)]
struct Embedded {
    vectors: Vec<Vec<f32>>,
}

/// The pooled vector of each bag.
async fn embed(State(app): State<Arc<App>>, Input(input): Input<Embed>) -> Answer<Embedded> {
    let model = app.serving.model();
    let Some(table) = model.table(&input.table) else {
        let names: Vec<_> = model.tables().iter().map(|t| &*t.name).collect();
        let error = format!("no table {}, only {}", input.table, names.join(", "));
        return Err(ApiError::field("table", error));
    };
    at_most("indices", input.indices.len(), app.batcher.max_rows())?;
    at_most("offsets", input.offsets.len(), app.batcher.max_rows())?;
    let rows = table.num_embeddings();
    for (i, &index) in input.indices.iter().enumerate() {
        if Some(index) != table.layer.config().padding_idx {
            in_range(format!("indices[{i}]"), index, 0, rows as i64 - 1)?;
        }
    }
    let end = input.indices.len() as i64;
    if input.offsets.is_empty() && end > 0 {
        let error = format!("must start a bag for the {end} indices");
        return Err(ApiError::field("offsets", error));
    }
    // The first bag starts at 0, and no bag starts before the previous one.
    let (mut least, mut most) = (0, 0);
    for (i, &offset) in input.offsets.iter().enumerate() {
        in_range(format!("offsets[{i}]"), offset, least, most)?;
        (least, most) = (offset, end);
    }
    let dim = table.embedding_dim();
    let bags = Work::Bags {
        table: input.table,
        indices: input.indices,
        offsets: input.offsets,
    };
    let values = app.batcher.compute(&model, bags).await?;
    Ok(Json(Embedded {
        vectors: values.chunks(dim).map(<[f32]>::to_vec).collect(),
    }))
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
    /// 1 for the model the server started with, and one more for each that replaced it.
    generation: u64,
    users: Side,
    movies: Side,
    tables: Vec<TableShape>,
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
        Self {
            status: "ok",
            generation: model.generation,
            users: side(&model.catalog().users),
            movies: side(&model.catalog().movies),
            tables: tables.collect(),
        }
    }
}

async fn healthz(State(app): State<Arc<App>>) -> Json<Health> {
    Json(Health::from(&*app.serving.model()))
}

async fn metrics_text(State(app): State<Arc<App>>) -> Result<impl IntoResponse, ApiError> {
    let generation = app.serving.model().generation;
    let text = app
        .metrics
        .encode(app.batcher.queued_rows(), generation)
        .map_err(|error| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}

/// 409 if the checkpoint is refused: the request is valid, the file is not.
async fn reload(State(app): State<Arc<App>>) -> Answer<Health> {
    match app.reload().await {
        Ok(model) => Ok(Json(Health::from(&*model))),
        Err(error) => Err(ApiError::new(StatusCode::CONFLICT, format!("{error:#}"))),
    }
}

/// The row of a published id; `field` is the position of the id in the request.
fn row(
    entities: &Entities,
    kind: &str,
    id: i64,
    field: impl FnOnce() -> String,
) -> Result<u32, ApiError> {
    let unknown = || ApiError::field(field(), entities.unknown(kind, id));
    entities.row(id).ok_or_else(unknown)
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
