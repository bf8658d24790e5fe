//! Features of users and movies in a request: texts, numbers, or lists of them by name.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::id::Id;
use crate::error::ApiError;
use crate::serving::Ratings;
use recommender::profiles::{Given, Profile, Side};
use recommender::recommend::Basis;

/// `{"gender": "F", "age": 25}`, or `{"genres": ["Drama", "War"], "title": "Lost Sea (1995)"}`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct Features(BTreeMap<String, OneOrMany>);

#[derive(Clone, Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "a value must be text, an integer, or a list of them"
)]
enum OneOrMany {
    One(Id),
    Many(Vec<Id>),
}

impl Features {
    fn given(&self) -> Given {
        let texts = |values: &OneOrMany| match values {
            OneOrMany::One(value) => vec![value.to_string()],
            OneOrMany::Many(values) => values.iter().map(Id::to_string).collect(),
        };
        let features = self.0.iter();
        features
            .map(|(name, values)| (name.clone(), texts(values)))
            .collect()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The values of a feature.
    pub fn values(&self, name: &str) -> Vec<String> {
        self.given().remove(name).unwrap_or_default()
    }
}

/// A user or movie of a request.
pub struct Asked {
    /// Where the catalogue has it.
    pub row: Option<u32>,
    pub profile: Profile,
    /// What is known of it.
    pub basis: Basis,
}

impl Asked {
    /// `field` is the position of the features in the request.
    pub fn new(
        ratings: &Ratings,
        side: Side,
        id: Option<&Id>,
        features: Option<&Features>,
        field: impl Fn() -> String,
    ) -> Result<Self, ApiError> {
        let (model, catalog) = (&ratings.recommender.model, ratings.catalog());
        let row = id.and_then(Id::number);
        let row = row.and_then(|number| side.of(catalog).row(number));
        let given = features.map(Features::given).unwrap_or_default();
        let profile = Profile::new(model, catalog, side, row, &given).map_err(|wrong| {
            ApiError::field(format!("{}.{}", field(), wrong.name), wrong.complaint)
        })?;
        let has_own_row = row.is_some_and(|row| !ratings.is_rare(side, row));
        let basis = match (row, has_own_row) {
            (_, true) => Basis::Known,
            // Of a rare one, the catalogue has the features.
            (Some(_), false) => Basis::Features,
            (None, _) if !given.is_empty() => Basis::Features,
            (None, _) => Basis::Popularity,
        };
        Ok(Self {
            row,
            profile,
            basis,
        })
    }
}
