//! The loss of a batch and its gradients.
//!
//! On a CPU, the tables are looked up for the whole batch, and what follows them is computed in shards, side by side on all cores
//! and each on one: the tensors of a shard stay in the cache of its core, and no operation is so small that dividing it costs more
//! than it saves. How a batch is divided depends on its size and on the model alone, and gradients are added in one order, so the
//! number of cores does not change a result. A GPU takes the batch as a whole.
//!
//! Shards run on the threads of candle's pool, which also do the lookups: between two pieces of work those threads keep looking
//! for the next, and another pool would compete with them. That pool serves one caller at a time, so an operation within a shard
//! must not be one that candle divides among it, or it would wait for itself. If a layer is so large that candle would divide its
//! gradient, or a single example, shards run on rayon's threads.

use std::ops::Range;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};
use candle_hashed_embedding_bag::optim::named_variables;
use candle_nn::VarMap;
use rayon::prelude::*;

use crate::model::{Dlrm, Inputs};
use crate::ops::{backward, in_pool};

/// candle divides operations on at least so many values among its pool.
const DIVIDED_BY_CANDLE: usize = 64 * 1024;

/// The most examples of a shard.
const SHARD: usize = 256;

/// The most sums of gradients that are kept beside each other.
const SUMS: usize = 32;

/// Computes losses and gradients of a model whose variables it knows.
pub struct Stepper<'a> {
    model: &'a Dlrm,
    /// The variables of the MLPs, by name.
    mlps: Vec<Var>,
    /// How often a positive example counts.
    positive_weight: f64,
}

/// The ending of the names of embedding tables.
pub const TABLE: &str = ".hashed_weight";

/// The variables of `vars` by name, in the order of their names: those of embedding tables if `tables`, else those of the MLPs.
pub fn variables(vars: &VarMap, tables: bool) -> Result<Vec<(String, Var)>> {
    let vars = named_variables(vars)?.into_iter();
    Ok(vars
        .filter(|(name, _)| name.ends_with(TABLE) == tables)
        .collect())
}

impl<'a> Stepper<'a> {
    /// For a model with variables in `vars`.
    ///
    /// # Errors
    /// A thread that panicked while it held the variables.
    pub fn new(model: &'a Dlrm, vars: &VarMap) -> Result<Self> {
        let mlps = variables(vars, false)?.into_iter().map(|(_, var)| var);
        Ok(Self {
            model,
            mlps: mlps.collect(),
            positive_weight: 1.0,
        })
    }

    /// The same, to which a positive example counts as if it came so often.
    pub fn weighing_positives(self, positive_weight: f64) -> Self {
        Self {
            positive_weight,
            ..self
        }
    }

    /// The sum of the losses of the examples, `()`, and the gradients of their mean with respect to all variables. `labels` are 0
    /// or 1, `(batch,)`.
    ///
    /// # Errors
    /// What the device says.
    pub fn step(&self, inputs: &Inputs, labels: &Tensor) -> Result<(Tensor, GradStore)> {
        let batch = labels.dim(0)?;
        let vectors = self.model.embeddings().forward(&inputs.lookups)?;
        if !self.model.device().is_cpu() {
            let logits = self.model.logits(inputs.numbers.as_ref(), &vectors)?;
            let (loss, gradient) = cross_entropy(&logits, labels, batch, self.positive_weight)?;
            return Ok((loss, backward(&logits, gradient)?));
        }
        let shards = shards(self.model, batch);
        let per_sum = shards.len().div_ceil(SUMS);
        let groups: Vec<_> = shards.chunks(per_sum.max(1)).collect();
        let sums = side_by_side(self.model, &groups, |shards| {
            let mut sum: Option<Shard> = None;
            for shard in *shards {
                let shard = self.shard(inputs, &vectors, labels, shard.clone())?;
                sum = Some(match sum {
                    Some(sum) => sum.add(shard)?,
                    None => shard,
                });
            }
            Ok(sum)
        })?;
        let mut sums = sums.into_iter().flatten();
        let Some(first) = sums.next() else {
            candle_core::bail!("a batch without examples has no loss")
        };
        let sum = sums.try_fold(first, Shard::add)?;
        let gradient = match &sum.vectors[..] {
            [gradient] => gradient.clone(),
            gradients => Tensor::cat(gradients, 0)?,
        };
        let mut gradients = backward(&vectors, gradient)?;
        for (var, gradient) in self.mlps.iter().zip(sum.mlps) {
            if let Some(gradient) = gradient {
                gradients.insert(var, gradient);
            }
        }
        Ok((sum.loss, gradients))
    }

    fn shard(
        &self,
        inputs: &Inputs,
        vectors: &Tensor,
        labels: &Tensor,
        shard: Range<usize>,
    ) -> Result<Shard> {
        let part = |tensor: &Tensor| tensor.narrow(0, shard.start, shard.len());
        let vectors = Var::from_tensor(&part(vectors)?.detach())?;
        let numbers = inputs.numbers.as_ref().map(part).transpose()?;
        let logits = self.model.logits(numbers.as_ref(), &vectors)?;
        let (loss, gradient) = cross_entropy(
            &logits,
            &part(labels)?,
            labels.dim(0)?,
            self.positive_weight,
        )?;
        let mut gradients = backward(&logits, gradient)?;
        let of_vectors = gradients.remove(&vectors);
        Ok(Shard {
            loss,
            mlps: self.mlps.iter().map(|var| gradients.remove(var)).collect(),
            vectors: vec![of_vectors.map_or_else(|| vectors.zeros_like(), Ok)?],
        })
    }
}

/// The logits of a batch, in the order of its examples.
///
/// # Errors
/// What the device says.
pub fn logits(model: &Dlrm, inputs: &Inputs) -> Result<Vec<f32>> {
    let vectors = model.embeddings().forward(&inputs.lookups)?.detach();
    if !model.device().is_cpu() {
        return model.logits(inputs.numbers.as_ref(), &vectors)?.to_vec1();
    }
    let shards = shards(model, vectors.dim(0)?);
    let logits = side_by_side(model, &shards, |shard| {
        let part = |tensor: &Tensor| tensor.narrow(0, shard.start, shard.len());
        let numbers = inputs.numbers.as_ref().map(part).transpose()?;
        model
            .logits(numbers.as_ref(), &part(&vectors)?)?
            .to_vec1::<f32>()
    })?;
    Ok(logits.concat())
}

/// Applies `work` to all items, such as [`shards`], on all cores, and returns the results in order.
pub fn side_by_side<I: Sync, R: Send>(
    model: &Dlrm,
    items: &[I],
    work: impl Fn(&I) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    if let [item] = items {
        return Ok(vec![work(item)?]);
    }
    if model.largest().max(model.widest()) >= DIVIDED_BY_CANDLE {
        return items.par_iter().map(&work).collect();
    }
    in_pool(items, work)
}

/// The shards of a batch on the CPU.
pub fn shards(model: &Dlrm, batch: usize) -> Vec<Range<usize>> {
    let most = (DIVIDED_BY_CANDLE - 1) / model.widest().max(1);
    // As equal as can be: the last to be done keeps all others waiting.
    let count = batch.div_ceil(most.clamp(1, SHARD));
    let end = |i| batch * i / count.max(1);
    (0..count).map(|i| end(i)..end(i + 1)).collect()
}

/// What is known of some consecutive examples.
struct Shard {
    /// The sum of their losses, `()`.
    loss: Tensor,
    /// The gradient of each variable of the MLPs.
    mlps: Vec<Option<Tensor>>,
    /// The gradients of their vectors, in order.
    vectors: Vec<Tensor>,
}

impl Shard {
    /// Both, the examples of `next` after those of `self`.
    fn add(mut self, next: Self) -> Result<Self> {
        let mlps = self.mlps.into_iter().zip(next.mlps);
        let mlps = mlps.map(|pair| match pair {
            (Some(a), Some(b)) => Ok(Some((a + b)?)),
            (a, b) => Ok(a.or(b)),
        });
        self.vectors.extend(next.vectors);
        Ok(Self {
            loss: (self.loss + next.loss)?,
            mlps: mlps.collect::<Result<_>>()?,
            vectors: self.vectors,
        })
    }
}

/// The sum over the examples of `ln(1 + e^logit) - label * logit`, and its gradient with respect to the logits over `batch`, without
/// a graph.
///
/// It is written so that no logit overflows. `candle_nn`'s loss takes the logarithm of a sigmoid, which is infinite for a logit that
/// is confidently wrong.
fn cross_entropy(
    logits: &Tensor,
    labels: &Tensor,
    batch: usize,
    positive_weight: f64,
) -> Result<(Tensor, Tensor)> {
    let logits = logits.detach();
    let softplus = (logits.relu()? + (logits.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    let mut loss = (softplus - (&logits * labels)?)?;
    let mut gradient = (candle_nn::ops::sigmoid(&logits)? - labels)?;
    if positive_weight != 1.0 {
        let weights = labels.affine(positive_weight - 1.0, 1.0)?;
        (loss, gradient) = ((loss * &weights)?, (gradient * weights)?);
    }
    Ok((loss.sum_all()?, (gradient / batch as f64)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn cross_entropy_of_extreme_logits_is_finite() -> Result<()> {
        let logits = Tensor::new(&[0f32, 1000.0, -1000.0, 1000.0], &Device::Cpu)?;
        let labels = Tensor::new(&[1f32, 1.0, 1.0, 0.0], &Device::Cpu)?;
        let (loss, gradient) = cross_entropy(&logits, &labels, 4, 1.0)?;
        assert!((loss.to_scalar::<f32>()? - (2f32.ln() + 2000.0)).abs() < 1e-2);
        assert_eq!(gradient.to_vec1::<f32>()?, [-0.125, 0.0, -0.25, 0.25]);
        // The positive examples count three times.
        let (loss, gradient) = cross_entropy(&logits, &labels, 4, 3.0)?;
        assert!((loss.to_scalar::<f32>()? - (3.0 * 2f32.ln() + 4000.0)).abs() < 1e-2);
        assert_eq!(gradient.to_vec1::<f32>()?, [-0.375, 0.0, -0.75, 0.25]);
        Ok(())
    }
}
