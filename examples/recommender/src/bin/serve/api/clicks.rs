//! What models of clicks answer: probabilities of rows of fields.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use axum::extract::State;
use axum::Json;
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{at_most, Answer, App};
use crate::batcher::Work;
use crate::error::ApiError;
use crate::input::{Input, Object};
use crate::serving::Kind;
use recommender::data::{batch_of_fields, Value};
use recommender::evaluate::sigmoid;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Predict {
    /// Fields by name; those that are left out are missing.
    rows: Vec<Object<BTreeMap<String, Field>>>,
}

#[derive(Serialize)]
pub struct Predicted {
    /// Per row, that it is clicked.
    probabilities: Vec<f32>,
}

/// The probability of each row.
pub async fn predict(
    State(app): State<Arc<App>>,
    Input(input, _in_flight): Input<Predict>,
) -> Answer<Predicted> {
    let model = app.serving.model();
    let Kind::Clicks(clicks) = &model.kind else {
        return Err(ApiError::other_kind("ratings", "/recommend and /score"));
    };
    let count = input.rows.len();
    at_most("rows", count, app.batcher.max_rows())?;
    let rows = input.rows.iter().map(|Object(row)| {
        let fields = row.iter();
        fields.map(|(name, Field(value))| (name.as_str(), value))
    });
    let batch = batch_of_fields(rows, clicks.rows_per_field).map_err(|wrong| {
        ApiError::field(
            format!("rows[{}].{}", wrong.row, wrong.field),
            wrong.complaint,
        )
    })?;
    let work = Work::Examples { batch, count };
    let logits = app.batcher.compute(&model, work).await?;
    let probabilities = logits.into_iter().map(|logit| sigmoid(logit.into()) as f32);
    Ok(Json(Predicted {
        probabilities: probabilities.collect(),
    }))
}

struct Field(Value);

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AField;

        impl Visitor<'_> for AField {
            type Value = Field;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("text, an integer or null")
            }

            fn visit_unit<E: Error>(self) -> Result<Field, E> {
                Ok(Field(Value::Missing))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Field, E> {
                Ok(Field(Value::Text(text.to_owned())))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Field, E> {
                Ok(Field(Value::Integer(value)))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Field, E> {
                let integer = i64::try_from(value);
                let integer =
                    integer.map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self));
                Ok(Field(Value::Integer(integer?)))
            }
        }

        deserializer.deserialize_any(AField)
    }
}
