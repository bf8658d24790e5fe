//! The order in which a training sees its examples.
//!
//! The train part is cut into shards of equal length, one per rank if nothing else is said; each is shuffled by a generator of its
//! own, and a batch takes as many examples from each. So the batches depend on the seed and on the number of shards, but not on
//! the number of ranks that the shards are divided among:
//!
//! ```text
//!               batch 0   batch 1   batch 2
//! shard 0   │ ░░░░░░░░░ ░░░░░░░░░ ░░░░░░░░░ │  rank 0 of 2  │  rank 0 of 1
//! shard 1   │ ░░░░░░░░░ ░░░░░░░░░ ░░░░░░░░░ │  rank 1 of 2  │
//! ```
//!
//! So that all ranks take as many steps, on as many examples each, at most `shards - 1` examples at the end of the part are left out.

use std::ops::Range;

use anyhow::{ensure, Result};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::SeedableRng;

use crate::data::{Bags, Batch, Batches, Examples, Part, Rows};
use crate::ranks::Ranks;

/// The order of the examples of a rank. Each epoch has another.
pub struct Order {
    /// The examples of a shard.
    shard_len: usize,
    /// The examples of a shard in a batch.
    share: usize,
    shards: usize,
    /// The shards of this rank.
    own: Range<usize>,
    /// Of each of them.
    rngs: Vec<StdRng>,
}

impl Order {
    /// For a train part of so many examples, and batches of all ranks together.
    ///
    /// # Errors
    /// A batch size that cannot be divided among the shards; fewer examples than shards.
    pub fn new(ranks: &Ranks, examples: usize, batch_size: usize, seed: u64) -> Result<Self> {
        let shards = ranks.shards();
        ensure!(
            batch_size.is_multiple_of(shards),
            "--batch-size is that of all ranks together: it must be a multiple of {shards}, got {batch_size}"
        );
        ensure!(
            examples >= shards,
            "{examples} examples are too few for {shards} shards"
        );
        let own = ranks.own_shards();
        // The first one's is the generator of a training with one shard; the golden ratio keeps neighbours apart.
        let seed = |shard| seed.wrapping_add(0x9E37_79B9_7F4A_7C15u64.wrapping_mul(shard as u64));
        Ok(Self {
            shard_len: examples / shards,
            share: batch_size / shards,
            shards,
            rngs: own
                .clone()
                .map(|shard| StdRng::seed_from_u64(seed(shard)))
                .collect(),
            own,
        })
    }

    /// The steps of an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.shard_len.div_ceil(self.share)
    }

    /// The examples of an epoch, of all ranks together.
    pub fn examples(&self) -> usize {
        self.shard_len * self.shards
    }

    /// The positions in the train part that this rank trains on.
    pub fn own_positions(&self) -> Range<usize> {
        self.own.start * self.shard_len..self.own.end * self.shard_len
    }

    /// The examples of this rank in one batch, of all its shards.
    pub fn own_batch_size(&self) -> usize {
        self.share * self.own.len()
    }

    /// The batches of the next epoch.
    ///
    /// # Errors
    /// What reading says.
    pub fn batches<'a>(&'a mut self, examples: &'a dyn Examples) -> Result<Batches<'a>> {
        let (share, shard_len) = (self.share, self.shard_len);
        let shards = self.own.clone().zip(&mut self.rngs).map(|(shard, rng)| {
            let positions = shard * shard_len..(shard + 1) * shard_len;
            examples.batches_at(Part::Train, positions, share, Some(rng))
        });
        let mut shards: Vec<Batches> = shards.collect::<Result<_>>()?;
        if shards.len() == 1 {
            return Ok(shards.remove(0));
        }
        Ok(Box::new(std::iter::from_fn(move || {
            let parts: Option<Result<Vec<_>>> = shards.iter_mut().map(Iterator::next).collect();
            Some(parts?.map(join))
        })))
    }

    /// The next epoch as positions among [`own_positions`](Self::own_positions), one batch after the other.
    ///
    /// # Errors
    /// More examples than 32-bit positions.
    pub fn positions(&mut self) -> Result<Vec<u32>> {
        let examples = self.own_positions().len();
        ensure!(
            u32::try_from(examples).is_ok(),
            "{examples} examples are too many"
        );
        let shard_len = self.shard_len as u32;
        let mut shards = Vec::new();
        for (shard, rng) in (0..).zip(&mut self.rngs) {
            let mut positions: Vec<u32> = (shard * shard_len..(shard + 1) * shard_len).collect();
            positions.shuffle(rng);
            shards.push(positions);
        }
        if shards.len() == 1 {
            return Ok(shards.remove(0));
        }
        let steps = 0..self.steps_per_epoch();
        let batches = steps.flat_map(|step| {
            let batch = step * self.share..self.shard_len.min((step + 1) * self.share);
            shards.iter().map(move |shard| &shard[batch.clone()])
        });
        Ok(batches.flatten().copied().collect())
    }
}

/// The batches of several shards as one, in the order of the shards.
fn join(parts: Vec<(Batch, Vec<bool>)>) -> (Batch, Vec<bool>) {
    let (batches, labels): (Vec<Batch>, Vec<Vec<bool>>) = parts.into_iter().unzip();
    let (mut one_per_table, mut bags) = (Vec::new(), Vec::new());
    for batch in &batches {
        match &batch.rows {
            Rows::OnePerTable(rows) => one_per_table.extend(rows),
            Rows::Bags(tables) => bags.push(tables),
        }
    }
    let rows = match bags.first() {
        None => Rows::OnePerTable(one_per_table),
        Some(first) => {
            let tables = 0..first.len();
            let of_table = |table: usize| bags.iter().map(|bags| &bags[table]).collect::<Bags>();
            Rows::Bags(tables.map(of_table).collect())
        }
    };
    let numbers = batches.iter().flat_map(|batch| &batch.numbers).copied();
    let batch = Batch {
        numbers: numbers.collect(),
        rows,
    };
    (batch, labels.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{write_generated, Clicks, Source};
    use candle_core::Device;
    use candle_hashed_embedding_bag::distributed::World;
    use std::time::Duration;

    /// All that is read of each batch of an epoch, as text.
    fn epoch(order: &mut Order, examples: &dyn Examples) -> Result<Vec<String>> {
        let batches = order.batches(examples)?;
        batches.map(|batch| Ok(format!("{:?}", batch?))).collect()
    }

    fn one_rank(shards: usize, examples: &dyn Examples, batch_size: usize) -> Result<Order> {
        let (world, limit) = (World::single(), Duration::MAX);
        let ranks = Ranks::connect(&world, &Device::Cpu, limit, Some(shards))?;
        Order::new(&ranks, examples.len(Part::Train), batch_size, 7)
    }

    /// What rank `rank` of `own.len()` would have.
    fn of_shard(shard: usize, shards: usize, examples: &dyn Examples) -> Result<Order> {
        let mut order = one_rank(shards, examples, 40 * shards)?;
        order.own = shard..shard + 1;
        order.rngs = vec![order.rngs.remove(shard)];
        Ok(order)
    }

    #[test]
    fn a_batch_of_all_shards_is_that_of_the_ranks_together() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("log");
        write_generated(&path, 1_003, 1)?;
        let clicks = Clicks::open(&path, Some(1000), false)?;
        let ratings = Source::Generated { seed: 1 }.load()?;
        for examples in [&clicks as &dyn Examples, &ratings] {
            let mut all = one_rank(2, examples, 80)?;
            let mut ranks = [of_shard(0, 2, examples)?, of_shard(1, 2, examples)?];
            for _ in 0..2 {
                let batches: Vec<_> = all.batches(examples)?.collect::<Result<_>>()?;
                assert_eq!(batches.len(), ranks[0].steps_per_epoch());
                let [first, second] = &mut ranks;
                let pairs = first.batches(examples)?.zip(second.batches(examples)?);
                let mut labels = 0;
                for ((first, second), both) in pairs.zip(&batches) {
                    assert_eq!(join(vec![first?, second?]), *both);
                    labels += both.1.len();
                }
                assert_eq!(labels, all.examples());
            }
            let len = examples.len(Part::Train);
            assert_eq!(all.examples(), len - len % 2);
        }
        Ok(())
    }

    #[test]
    fn every_epoch_has_an_order_of_its_own() -> Result<()> {
        let ratings = Source::Generated { seed: 1 }.load()?;
        for shards in [1, 3] {
            let mut order = one_rank(shards, &ratings, 300)?;
            let first = epoch(&mut order, &ratings)?;
            assert_ne!(first, epoch(&mut order, &ratings)?);
            assert_eq!(
                first,
                epoch(&mut one_rank(shards, &ratings, 300)?, &ratings)?
            );
        }
        Ok(())
    }

    #[test]
    fn positions_are_those_of_the_batches() -> Result<()> {
        let ratings = Source::Generated { seed: 1 }.load()?;
        let mut order = one_rank(3, &ratings, 300)?;
        let positions = order.positions()?;
        let (shard_len, mut left) = (order.shard_len as u32, positions.as_slice());
        while !left.is_empty() {
            let (batch, rest) = left.split_at(order.own_batch_size().min(left.len()));
            let mut shards = batch.chunk_by(|a, b| a / shard_len == b / shard_len);
            assert!((0..3).all(|i| shards.next().is_some_and(|s| s[0] / shard_len == i)));
            assert!(batch.len().is_multiple_of(3) && shards.next().is_none());
            left = rest;
        }
        let mut sorted = positions;
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..order.examples() as u32));
        Ok(())
    }

    #[test]
    fn what_cannot_be_divided_is_an_error() -> Result<()> {
        let ratings = Source::Generated { seed: 1 }.load()?;
        let said = |shards, batch| {
            one_rank(shards, &ratings, batch)
                .err()
                .map(|e| e.to_string())
        };
        let wrong = said(3, 100).unwrap_or_default();
        assert!(
            wrong.contains("must be a multiple of 3, got 100"),
            "{wrong}"
        );
        let wrong = said(1 << 30, 1 << 30).unwrap_or_default();
        assert!(wrong.contains("too few for 1073741824 shards"), "{wrong}");
        Ok(())
    }
}
