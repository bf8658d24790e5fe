//! How good the scores are: the area under the ROC curve, and the logloss.

use std::ops::Range;

use anyhow::{ensure, Result};
use serde::{Deserialize, Serialize};

use crate::data::{Batch, Catalog, Examples, Part, Truth};
use crate::model::Dlrm;
use crate::step;

/// Examples scored at once: large enough to amortise a launch, small enough for any memory.
pub const CHUNK: usize = 8192;

/// How good a set of scores is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// The share of pairs of a positive and a negative example that the scores put in the right order; `None` if all labels
    /// are equal.
    pub auc: Option<f64>,
    /// The mean of `-ln` of the probability given to the true label.
    pub logloss: f64,
}

/// The model's logits of (user row, movie row) pairs.
pub fn logits(model: &Dlrm, catalog: &Catalog, pairs: &[(u32, u32)]) -> Result<Vec<f64>> {
    let chunks = pairs.chunks(CHUNK);
    let scored: Result<Vec<_>> = chunks
        .map(|chunk| logits_of(model, &catalog.batch(chunk)))
        .collect();
    Ok(scored?.concat())
}

/// The metrics of the model on a part of some examples.
pub fn evaluate(model: &Dlrm, examples: &dyn Examples, part: Part) -> Result<Metrics> {
    let (logits, labels) = scored(model, examples, part)?;
    Ok(Metrics::of(&logits, &labels))
}

/// The logits of the model for a part of some examples, and the labels of these.
pub fn scored(model: &Dlrm, examples: &dyn Examples, part: Part) -> Result<(Vec<f64>, Vec<bool>)> {
    scored_at(model, examples, part, 0..examples.len(part))
}

/// [`scored`], for the examples at these positions of the part.
pub fn scored_at(
    model: &Dlrm,
    examples: &dyn Examples,
    part: Part,
    positions: Range<usize>,
) -> Result<(Vec<f64>, Vec<bool>)> {
    let (mut logits, mut labels) = (Vec::new(), Vec::new());
    for batch in examples.batches_at(part, positions, CHUNK, None)? {
        let (batch, batch_labels) = batch?;
        logits.extend(logits_of(model, &batch)?);
        labels.extend(batch_labels);
    }
    Ok((logits, labels))
}

fn logits_of(model: &Dlrm, batch: &Batch) -> Result<Vec<f64>> {
    let scored = step::logits(model, &model.inputs(batch)?)?;
    Ok(scored.into_iter().map(f64::from).collect())
}

impl Metrics {
    /// From logits; the AUC counts a tie as half.
    pub fn of(logits: &[f64], labels: &[bool]) -> Self {
        let losses = logits
            .iter()
            .zip(labels)
            .map(|(&logit, &label)| softplus(logit) - if label { logit } else { 0.0 });
        Self {
            auc: auc(logits, labels),
            logloss: losses.sum::<f64>() / logits.len() as f64,
        }
    }

    /// Whether these are better than `other`, on the same examples: by AUC or, if there is none, by logloss.
    pub fn is_better(&self, other: &Self) -> bool {
        match (self.auc, other.auc) {
            (Some(auc), Some(other)) => auc > other,
            _ => self.logloss < other.logloss,
        }
    }

    /// # Errors
    /// Scores that are not finite.
    pub fn ensure_finite(self) -> Result<Self> {
        ensure!(
            self.logloss.is_finite(),
            "the logloss is {}: the model's training has diverged",
            self.logloss
        );
        Ok(self)
    }

    /// Of a model that gives every example the same probability.
    pub fn of_constant(probability: f64, labels: &[bool]) -> Self {
        // Finite, even if all training examples had one label.
        let logit = (probability / (1.0 - probability)).ln().clamp(-30.0, 30.0);
        Self::of(&vec![logit; labels.len()], labels)
    }

    /// The metrics of the best possible model.
    pub fn of_truth(truth: &Truth) -> Self {
        let logits: Vec<f64> = truth
            .probabilities
            .iter()
            .map(|p| (p / (1.0 - p)).ln())
            .collect();
        Self::of(&logits, &truth.labels)
    }
}

/// See [`Metrics::auc`].
fn auc(logits: &[f64], labels: &[bool]) -> Option<f64> {
    let mut examples: Vec<(f64, bool)> =
        logits.iter().copied().zip(labels.iter().copied()).collect();
    examples.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let (mut positives, mut negatives, mut right) = (0.0, 0.0, 0.0);
    for ties in examples.chunk_by(|a, b| a.0 == b.0) {
        let positive = ties.iter().filter(|(_, label)| *label).count() as f64;
        let negative = ties.len() as f64 - positive;
        right += positive * (negatives + negative / 2.0);
        positives += positive;
        negatives += negative;
    }
    let pairs = positives * negatives;
    (pairs > 0.0).then(|| right / pairs)
}

/// `ln(1 + e^x)`, without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// The probability that a logit stands for.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auc_counts_ties_as_half() {
        // Of the six (liked, not liked) pairs, 2 > 1, 2 > 0, 2 > -1, 1 > 0 and 1 > -1 are right, and 1 = 1 counts half.
        let metrics = Metrics::of(
            &[2.0, 1.0, 1.0, 0.0, -1.0],
            &[true, true, false, false, false],
        );
        assert_eq!(metrics.auc, Some(5.5 / 6.0));
        let all_ties = Metrics::of(&[0.5; 4], &[true, false, true, false]);
        assert_eq!(all_ties.auc, Some(0.5));
    }

    #[test]
    fn one_class_is_judged_by_logloss() {
        let of = |logit| Metrics::of(&[logit, 2.0], &[true, true]);
        assert_eq!(of(1.0).auc, None);
        assert_eq!(Metrics::of(&[], &[]).auc, None);
        assert!(of(1.5).is_better(&of(1.0)) && !of(1.0).is_better(&of(1.5)));
    }

    #[test]
    fn scores_that_are_not_finite_are_an_error() {
        for logits in [[f64::NAN, 0.0], [f64::INFINITY, f64::INFINITY]] {
            let metrics = Metrics::of(&logits, &[true, false]);
            assert!(metrics.ensure_finite().is_err(), "{metrics:?}");
        }
        assert!(Metrics::of(&[1.0], &[true]).ensure_finite().is_ok());
    }

    #[test]
    fn logloss_of_known_probabilities() {
        let metrics = Metrics::of(&[0.0, 3f64.ln()], &[true, false]);
        assert!((metrics.logloss - (2f64.ln() + 4f64.ln()) / 2.0).abs() < 1e-12);
        assert!(Metrics::of(&[1e9, -1e9], &[true, false]).logloss.abs() < 1e-12);
    }
}
