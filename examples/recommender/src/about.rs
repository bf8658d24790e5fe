//! What a checkpoint says of itself: version, data, hyper-parameters, metrics, and the catalogue that it belongs to.
//!
//! It is JSON in a tensor of bytes and not in the file's metadata, whose keys safetensors writes in random order: the same training
//! writes the same bytes. For the same reason it has no time and no path.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use twox_hash::XxHash64;

use crate::data::{Data, Ratings, Rules, Source};
use crate::evaluate::Metrics;
use crate::ranking::Ranking;
use crate::rare::TrainCounts;

/// See the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// Of the program that trained the model.
    pub version: String,
    /// What it was trained on.
    pub data: TrainedOn,
    /// How, by the names of the command line.
    pub hyper_parameters: Value,
    /// How well it did.
    pub metrics: Reached,
    /// Of a model of ratings, the [`fingerprint`] of the titles of its movies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub catalogue: Option<String>,
}

/// A data set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainedOn {
    /// `generated ratings`, `ratings`, `interactions` or `clicks`.
    pub kind: String,
    /// A hash of all examples, in hexadecimal.
    pub fingerprint: String,
    /// Examples of the train part.
    pub train_examples: u64,
    /// Of those, the share that was liked or clicked.
    pub train_rate: f64,
    /// How a MovieLens set was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<Rules>,
}

/// What a training reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reached {
    /// The epoch that was kept.
    pub best_epoch: usize,
    /// Of the valid part.
    pub valid: Metrics,
    /// Of the test part, by the model as it is in the checkpoint.
    pub test: Metrics,
    /// The top tens of the test part, for ratings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_ranking: Option<Ranking>,
}

impl About {
    /// Of a model that this program has just trained.
    ///
    /// # Errors
    /// Titles that cannot be read.
    pub fn new(
        data: &Data,
        counts: &TrainCounts,
        hyper_parameters: Value,
        metrics: Reached,
    ) -> Result<Self> {
        let (kind, catalogue) = match data {
            Data::Ratings(ratings) => {
                let kind = match ratings.source {
                    Source::Generated { .. } => "generated ratings",
                    Source::Files { .. } => "ratings",
                    Source::Interactions(_) => "interactions",
                };
                (kind, Some(fingerprint(&ratings.source.titles()?)))
            }
            Data::Clicks(_) => ("clicks", None),
        };
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            data: TrainedOn {
                kind: kind.to_owned(),
                fingerprint: hexadecimal(data.fingerprint()),
                train_examples: counts.examples,
                train_rate: counts.rate(),
                rules: match data {
                    Data::Ratings(Ratings {
                        source: Source::Files { rules, .. },
                        ..
                    }) => Some(*rules),
                    _ => None,
                },
            },
            hyper_parameters,
            metrics,
            catalogue,
        })
    }
}

/// A hash of published ids and titles, in hexadecimal, by which a checkpoint tells the titles of its movies from those of others.
pub fn fingerprint(titles: &BTreeMap<i64, String>) -> String {
    let mut bytes = Vec::new();
    for (id, title) in titles {
        bytes.extend(id.to_le_bytes());
        bytes.extend((title.len() as u64).to_le_bytes());
        bytes.extend(title.as_bytes());
    }
    hexadecimal(XxHash64::oneshot(0, &bytes))
}

fn hexadecimal(hash: u64) -> String {
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_that_of_ids_and_titles() {
        let of = |titles: &[(i64, &str)]| {
            let titles = titles.iter().map(|&(id, title)| (id, title.to_owned()));
            fingerprint(&titles.collect())
        };
        let one = of(&[(1, "Alien"), (2, "Brazil")]);
        assert_eq!(of(&[(2, "Brazil"), (1, "Alien")]), one);
        for other in [
            &[(1, "Brazil"), (2, "Alien")][..],
            &[(1, "Alien"), (3, "Brazil")],
            &[(1, "Alien")],
            &[(1, "AlienB"), (2, "razil")],
        ] {
            assert_ne!(of(other), one);
        }
    }
}
