//! Pooled vectors of the embedding tables.

use std::sync::Arc;

use axum::extract::State;
use axum::Json;
use serde::{Deserialize, Serialize};

use super::{at_most, in_range, Answer, App};
use crate::batcher::Work;
use crate::error::ApiError;
use crate::input::Input;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embed {
    table: String,
    /// Rows of the table, in 0..num_embeddings.
    indices: Vec<i64>,
    /// Where in `indices` each bag starts.
    offsets: Vec<i64>,
}

#[derive(Serialize)]
pub struct Embedded {
    vectors: Vec<Vec<f32>>,
}

/// The pooled vector of each bag.
pub async fn embed(
    State(app): State<Arc<App>>,
    Input(input, _in_flight): Input<Embed>,
) -> Answer<Embedded> {
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
