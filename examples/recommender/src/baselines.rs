//! A model beside two that know less: one that recommends what is popular to everybody, and one that tells nothing apart.

use anyhow::Result;

use crate::data::{Data, Part};
use crate::evaluate::{scored, Metrics};
use crate::model::Dlrm;
use crate::ranking::{Lists, Ranking};

/// What can be said of one of the models.
pub struct Line {
    /// What it is called.
    pub name: &'static str,
    /// Between 0 and 1, the greater the better; `None` if all labels are equal.
    pub auc: Option<f64>,
    /// `None` if its scores are no probabilities.
    pub logloss: Option<f64>,
    /// `None` for clicks, and for the train part, of which nothing is left to be ranked.
    pub ranking: Option<Ranking>,
}

/// The model on a part of some examples, then the baselines. `train_rate` is the share of positive examples that it was trained on.
///
/// # Errors
/// What reading or the device says, or scores that are not finite.
pub fn compare(
    model: &Dlrm,
    data: &Data,
    part: Part,
    train_rate: Option<f64>,
) -> Result<Vec<Line>> {
    let (logits, labels) = scored(model, data.examples(), part)?;
    let metrics = Metrics::of(&logits, &labels).ensure_finite()?;
    let constant = train_rate.map(|rate| Metrics::of_constant(rate, &labels));
    let line = |name, metrics: Metrics, ranking| Line {
        name,
        auc: metrics.auc,
        logloss: Some(metrics.logloss),
        ranking,
    };
    let Data::Ratings(ratings) = data else {
        let constant = constant.map(|metrics| line("constant", metrics, None));
        let lines = [line("model", metrics, None)].into_iter();
        return Ok(lines.chain(constant).collect());
    };
    let lists = (part != Part::Train).then(|| Lists::new(ratings, part));
    let lists = lists.as_ref();
    let examples = ratings.examples_per_movie();
    let likes: Vec<f64> = ratings
        .examples(part)
        .iter()
        .map(|rating| examples[rating.movie as usize][1].into())
        .collect();
    let mut lines = vec![
        line(
            "model",
            metrics,
            lists.map(|l| l.of_model(model, ratings)).transpose()?,
        ),
        Line {
            name: "popularity",
            auc: Metrics::of(&likes, &labels).auc,
            logloss: None,
            ranking: lists.map(Lists::of_popularity).transpose()?,
        },
    ];
    if let Some(constant) = constant {
        let ranking = lists.map(Lists::of_constant).transpose()?;
        lines.push(line("constant", constant, ranking));
    }
    Ok(lines)
}
