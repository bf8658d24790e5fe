//! A model beside two that know less: one that recommends what is popular to everybody, and one that tells nothing apart.

use anyhow::Result;

use crate::data::{Data, Examples, Part, Ratings, Rows};
use crate::evaluate::{scored, Metrics, CHUNK};
use crate::model::Dlrm;
use crate::profiles::Side;
use crate::ranking::{Lists, Ranking};

/// What can be said of one of the models.
pub struct Line {
    /// What it is called.
    pub name: &'static str,
    /// Between 0 and 1, the greater the better; `None` if all labels are equal.
    pub auc: Option<f64>,
    /// `None` if its scores are no probabilities.
    pub logloss: Option<f64>,
    /// `None` for clicks, and where nothing is left to be ranked, as of the train part.
    pub ranking: Option<Ranking>,
}

/// The model on a part of some examples, then the baselines. `train_rate` is the share of positive examples that it was trained on, and
/// `lists` are those of the part, for ratings.
///
/// # Errors
/// What reading or the device says, or scores that are not finite.
pub fn compare(
    model: &Dlrm,
    data: &Data,
    part: Part,
    train_rate: Option<f64>,
    lists: Option<&Lists>,
) -> Result<Vec<Line>> {
    let (logits, labels) = scored(model, data.examples(), part)?;
    let metrics = Metrics::of(&logits, &labels).ensure_finite()?;
    let mut lines = vec![Line {
        name: "model",
        auc: metrics.auc,
        logloss: Some(metrics.logloss),
        ranking: None,
    }];
    if let (Data::Ratings(ratings), Some(lists)) = (data, lists) {
        lines[0].ranking = lists.of_model(model, ratings)?;
        let likes = likes(ratings, part, lists)?;
        lines.push(Line {
            name: "popularity",
            auc: Metrics::of(&likes, &labels).auc,
            logloss: None,
            ranking: lists.of_popularity()?,
        });
    }
    if let Some(rate) = train_rate {
        let constant = Metrics::of_constant(rate, &labels);
        lines.push(Line {
            name: "constant",
            auc: constant.auc,
            logloss: Some(constant.logloss),
            ranking: lists.map_or(Ok(None), Lists::of_constant)?,
        });
    }
    Ok(lines)
}

/// For each example, by how many its movie was liked in training.
fn likes(ratings: &Ratings, part: Part, lists: &Lists) -> Result<Vec<f64>> {
    let table = Side::Movie.first_table(&ratings.catalog);
    let mut likes = Vec::new();
    for batch in ratings.batches(part, CHUNK, None)? {
        let (batch, _) = batch?;
        let Rows::Bags(bags) = batch.rows else {
            continue;
        };
        let movies = bags[table].indices().iter();
        likes.extend(movies.map(|&movie| f64::from(lists.likes(movie))));
    }
    Ok(likes)
}
