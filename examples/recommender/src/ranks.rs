//! This process among those that train the same model together, and what they know only together.
//!
//! | | is of |
//! |---|---|
//! | a step: its batch, its learning rate | all ranks together |
//! | the examples that a rank reads | its own shards of the train part: see [`order`](crate::order) |
//! | gradients | the average over all ranks |
//! | losses and metrics | the whole part, of which each rank scores a range |
//! | what is printed and saved | rank 0 |

use std::ops::Range;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_hashed_embedding_bag::distributed::{AllReduceTimes, Communicator, World};
use twox_hash::XxHash64;

use crate::data::{Examples, Part};
use crate::evaluate::{scored_at, Metrics};
use crate::model::Dlrm;

/// All ranks, seen from this one.
pub struct Ranks {
    communicator: Communicator,
    shards: usize,
}

impl Ranks {
    /// This process alone, with the train part in one shard.
    ///
    /// # Errors
    /// None that is known: there is nothing to connect.
    pub fn single() -> Result<Self> {
        Self::connect(&World::single(), &Device::Cpu, Duration::MAX, None)
    }

    /// Connects all ranks of `world`. Each has the same number of the `shards`, of which there is one per rank if nothing else is
    /// said; `limit` is how long a rank may keep the others waiting.
    ///
    /// # Errors
    /// A number of shards that is no multiple of the ranks; what the [`Communicator`] says.
    pub fn connect(
        world: &World,
        device: &Device,
        limit: Duration,
        shards: Option<usize>,
    ) -> Result<Self> {
        let shards = shards.unwrap_or(world.size);
        ensure!(
            shards >= world.size && shards.is_multiple_of(world.size),
            "--shards must be a multiple of the {} ranks, got {shards}",
            world.size
        );
        Ok(Self {
            communicator: Communicator::new(world, device, limit)?,
            shards,
        })
    }

    /// Whether this is rank 0, which prints and saves.
    pub fn is_first(&self) -> bool {
        self.communicator.rank() == 0
    }

    /// The number of ranks.
    pub fn count(&self) -> usize {
        self.communicator.size()
    }

    /// The number of shards of all ranks.
    pub fn shards(&self) -> usize {
        self.shards
    }

    /// The shards of this rank.
    pub fn own_shards(&self) -> Range<usize> {
        part_of(self.shards, self.communicator.rank(), self.count())
    }

    /// Refuses ranks that were started with other options, other data or another model.
    ///
    /// # Errors
    /// What differs, by rank and name.
    pub fn ensure_same(&self, facts: &[(String, String)], vars: &[(String, Var)]) -> Result<()> {
        let facts = facts.iter().map(|(name, value)| (&name[..], value.clone()));
        let facts: Vec<_> = facts.collect();
        Ok(self.communicator.ensure_same(&facts, vars)?)
    }

    /// Sets variables to what they are at rank 0.
    ///
    /// # Errors
    /// A rank that was lost.
    pub fn broadcast(&self, vars: &[(String, Var)]) -> Result<()> {
        Ok(self.communicator.broadcast(vars)?)
    }

    /// Averages gradients over all ranks.
    ///
    /// # Errors
    /// A sparse gradient; a rank that was lost.
    pub fn average(&self, vars: &[(String, Var)], gradients: &mut GradStore) -> Result<()> {
        Ok(self.communicator.average_gradients(vars, gradients)?)
    }

    /// What that has taken so far, if there are several ranks.
    pub fn all_reduce_times(&self) -> Option<AllReduceTimes> {
        (self.count() > 1).then(|| self.communicator.all_reduce_times())
    }

    /// The sum of a number over all ranks, the same bits on all.
    ///
    /// # Errors
    /// A rank that was lost.
    pub fn sum(&self, number: f64) -> Result<f64> {
        let all = self.communicator.gather(&number.to_le_bytes())?;
        let sum = all.map(|all| -> Result<f64> {
            let numbers = all.into_iter().map(|bytes| f64_of(&bytes));
            numbers.sum()
        });
        let sum = sum.transpose()?.map(|sum| sum.to_le_bytes().to_vec());
        f64_of(&self.from_first(sum)?)
    }

    /// Bytes that rank 0 has, on all ranks.
    ///
    /// # Errors
    /// A rank that was lost.
    pub fn from_first(&self, bytes: Option<Vec<u8>>) -> Result<Vec<u8>> {
        Ok(self.communicator.broadcast_bytes(bytes)?)
    }

    /// The metrics of the model on a part of some examples, the same on all ranks. Each scores a range of the part.
    ///
    /// # Errors
    /// What reading says; a rank that was lost.
    pub fn evaluate(&self, model: &Dlrm, examples: &dyn Examples, part: Part) -> Result<Metrics> {
        let own = part_of(examples.len(part), self.communicator.rank(), self.count());
        let (logits, labels) = scored_at(model, examples, part, own)?;
        if self.count() == 1 {
            return Ok(Metrics::of(&logits, &labels));
        }
        let mut scores = Vec::with_capacity(5 * logits.len());
        for (logit, label) in logits.iter().zip(labels) {
            // The model computes in f32.
            scores.extend((*logit as f32).to_le_bytes());
            scores.push(label.into());
        }
        let all = self.communicator.gather(&scores)?;
        let metrics = all.map(|all| {
            let (mut logits, mut labels) = (Vec::new(), Vec::new());
            for [a, b, c, d, label] in all.iter().flat_map(|scores| scores.as_chunks().0) {
                logits.push(f64::from(f32::from_le_bytes([*a, *b, *c, *d])));
                labels.push(*label != 0);
            }
            let Metrics { auc, logloss } = Metrics::of(&logits, &labels);
            // No number stands for none.
            [auc.unwrap_or(f64::NAN), logloss]
                .map(f64::to_le_bytes)
                .concat()
        });
        let metrics = self.from_first(metrics)?;
        let (auc, logloss) = metrics.split_at_checked(8).context("no metrics")?;
        let auc = f64_of(auc)?;
        Ok(Metrics {
            auc: (!auc.is_nan()).then_some(auc),
            logloss: f64_of(logloss)?,
        })
    }

    /// Checks that variables have the same bits on all ranks.
    ///
    /// # Errors
    /// The first rank with others.
    pub fn ensure_replicas_are_equal(&self, vars: &[(String, Var)]) -> Result<()> {
        if self.count() == 1 {
            return Ok(());
        }
        let mut hash = 0;
        for (_, var) in vars {
            hash = hash_of(var, hash)?;
        }
        let all = self.communicator.gather(&hash.to_le_bytes())?;
        let odd = all.map(
            |all| match all.iter().position(|theirs| *theirs != all[0]) {
                Some(rank) => rank.to_string().into_bytes(),
                None => Vec::new(),
            },
        );
        let odd = String::from_utf8(self.from_first(odd)?)?;
        ensure!(
            odd.is_empty(),
            "rank {odd} has other parameters than rank 0"
        );
        Ok(())
    }

    /// Ends the connection, once all ranks are done.
    ///
    /// # Errors
    /// A rank that was lost.
    pub fn leave(self) -> Result<()> {
        Ok(self.communicator.leave()?)
    }
}

/// The part of `len` things that is number `i` of `parts`, which are as equal as can be.
fn part_of(len: usize, i: usize, parts: usize) -> Range<usize> {
    let end = |i| (len as u128 * i as u128 / parts as u128) as usize;
    end(i)..end(i + 1)
}

fn f64_of(bytes: &[u8]) -> Result<f64> {
    Ok(f64::from_le_bytes(bytes.try_into()?))
}

fn hash_of(tensor: &Tensor, seed: u64) -> Result<u64> {
    // f64 holds the values of all dtypes of parameters.
    let values = tensor
        .flatten_all()?
        .to_dtype(DType::F64)?
        .to_vec1::<f64>()?;
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Ok(XxHash64::oneshot(seed, &bytes))
}
