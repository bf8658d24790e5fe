//! The gradients.
//!
//! Rows of different bags meet in the slots of grad_weight. No result depends on the number of threads, because the work
//! is divided in one of two ways, chosen by the sizes alone:
//!
//! * *Parts*, where many values fall on each slot: the bags are divided into parts, each adds into a buffer of its own, and
//!   the buffers are added in order. There are so few parts that the buffers together hold at most a quarter as many values
//!   as are gathered.
//! * *Slices*, else: each thread owns a slice of grad_weight, goes over all rows and adds what falls into its slice. All go
//!   in the same order, so a slot gets its values in that order however the slices lie. Every thread hashes every row, and
//!   no memory is needed beside grad_weight.
//!
//! For max, the winners are found first, bags divided among threads; there are as many of them as output values.

use super::lanes::{dispatch, Lanes, Task};
use super::places::{Places, Rows};
use super::{
    block_of, combine, slice, with_block, Accumulator, Bags, Element, Mode, Pass, Sum, View,
    MIN_VALUES_PER_THREAD,
};
use crate::hash::{Locate, MAX_ROWS};
use candle_core::{CpuStorage, Result, WithDType};
use rayon::prelude::*;
use std::ops::Range;

/// The most parts.
const MAX_PARTS: usize = 16;

/// grad_weight `(len,)`, in the accumulator's dtype
pub(super) struct GradWeight<'a> {
    pub grad_output: View<'a, CpuStorage>,
}

impl Pass for GradWeight<'_> {
    fn run<T: Element, H: Locate>(self, bags: &Bags<T, H>) -> Result<CpuStorage> {
        let grad_output = slice::<T>(self.grad_output)?;
        let winners = (bags.lookup.table.mode == Mode::Max).then(|| winners(bags));
        let source = Source {
            bags,
            grad_output,
            winners,
        };
        let (len, num_bags) = (bags.hashed_weight.len(), bags.num_bags());
        let values = bags.gathered_values();
        let mut grad_weight = vec![T::Acc::ZERO; len];
        let parts = (values / (4 * len)).min(values / MIN_VALUES_PER_THREAD);
        if parts >= 2 {
            let parts = parts.min(MAX_PARTS);
            let bags_per_part = num_bags.div_ceil(parts).max(1);
            let parts: Vec<_> = (0..parts)
                .into_par_iter()
                .with_max_len(1)
                .map(|i| {
                    let start = (i * bags_per_part).min(num_bags);
                    let end = (start + bags_per_part).min(num_bags);
                    let mut part = vec![T::Acc::ZERO; len];
                    source.add(start..end, 0, &mut part);
                    part
                })
                .collect();
            let chunk = len.div_ceil(rayon::current_num_threads()).max(1 << 12);
            grad_weight
                .par_chunks_mut(chunk)
                .enumerate()
                .for_each(|(i, sums)| {
                    for part in &parts {
                        for (sum, &value) in sums.iter_mut().zip(&part[i * chunk..]) {
                            *sum += value;
                        }
                    }
                });
        } else {
            let threads = if values < 2 * MIN_VALUES_PER_THREAD {
                1
            } else {
                rayon::current_num_threads()
            };
            // Whole blocks, so that a block of a mix hash lies in one slice.
            let block = bags.hash.block();
            let owned = len.div_ceil(threads).div_ceil(block) * block;
            if threads == 1 {
                source.add(0..num_bags, 0, &mut grad_weight);
            } else {
                grad_weight
                    .par_chunks_mut(owned)
                    .enumerate()
                    .for_each(|(i, slots)| source.add(0..num_bags, i * owned, slots));
            }
        }
        Ok(T::Acc::to_cpu_storage_owned(grad_weight))
    }
}

/// What is added into grad_weight.
struct Source<'a, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    grad_output: &'a [T],
    /// For max, `(num_bags, embedding_dim)`.
    winners: Option<Vec<Winner>>,
}

impl<T: Element, H: Locate> Source<'_, T, H> {
    /// Adds to `slots`, the gradients of the slots from `first_slot` on, what some bags have for them.
    fn add(&self, bags: Range<usize>, first_slot: usize, slots: &mut [T::Acc]) {
        match &self.winners {
            Some(winners) => self.add_winners(bags, winners, first_slot, slots),
            None => with_block!(self.bags.hash, BLOCK => dispatch(Add::<BLOCK, _, _> {
                source: self,
                of: bags,
                first_slot,
                slots,
            })),
        }
    }

    fn add_winners(
        &self,
        bags: Range<usize>,
        winners: &[Winner],
        first_slot: usize,
        slots: &mut [T::Acc],
    ) {
        let embedding_dim = self.bags.embedding_dim();
        let values = bags.start * embedding_dim..bags.end * embedding_dim;
        for (winner, grad) in winners[values.clone()]
            .iter()
            .zip(&self.grad_output[values])
        {
            if let Some((slot, negative)) = winner.get() {
                if let Some(sum) = slots.get_mut(slot.wrapping_sub(first_slot)) {
                    *sum += grad.widen().flip(negative, 0);
                }
            }
        }
    }
}

/// The winners of each column of each bag.
fn winners<T: Element, H: Locate>(bags: &Bags<T, H>) -> Vec<Winner> {
    let (embedding_dim, task) = (bags.embedding_dim(), bags.bags_per_task());
    let mut winners = vec![Winner::NONE; bags.num_bags() * embedding_dim];
    winners
        .par_chunks_mut(task * embedding_dim)
        .enumerate()
        .for_each(|(i, winners)| {
            let first = i * task;
            with_block!(bags.hash, BLOCK => dispatch(Win::<BLOCK, _, _> { bags, first, winners }));
        });
    winners
}

/// The slot that won a column of a bag, and its sign.
#[derive(Debug, Clone, Copy)]
struct Winner(u64);

impl Winner {
    const NONE: Self = Self(u64::MAX);

    #[inline(always)]
    fn new(slot: usize, signs: u32, i: usize) -> Self {
        let negative = (signs >> (i % 32)) & 1;
        Self((slot as u64) << 1 | u64::from(negative))
    }

    /// The slot, and 1 where its value is negated.
    fn get(self) -> Option<(usize, u32)> {
        (self.0 != Self::NONE.0).then_some(((self.0 >> 1) as usize, (self.0 & 1) as u32))
    }
}

/// Finds the winners of the bags from `first` on.
struct Win<'a, const BLOCK: usize, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    first: usize,
    winners: &'a mut [Winner],
}

impl<const BLOCK: usize, T: Element, H: Locate> Task for Win<'_, BLOCK, T, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let (bags, embedding_dim) = (self.bags, self.bags.embedding_dim());
        let block = block_of::<BLOCK, H>(&bags.hash);
        let last = self.first + self.winners.len() / embedding_dim;
        let mut places = Places::new(bags, self.first..last);
        // Written in turns: a value that goes where it came from becomes a masked store, which the next row waits for.
        let mut best = vec![T::Acc::ZERO; embedding_dim];
        let mut better = best.clone();
        let bags_of_winners = self.winners.chunks_exact_mut(embedding_dim);
        for (bag, winners) in (self.first..last).zip(bags_of_winners) {
            let (mut positions, mut seen) = (bags.range(bag), 0);
            while let Some(rows) = places.take(&mut positions) {
                let columns = best.chunks_mut(block).zip(better.chunks_mut(block));
                let columns = columns.zip(winners.chunks_mut(block));
                for (run, ((mut best, mut better), winners)) in columns.enumerate() {
                    for (row, &place) in (seen..).zip(rows.run(run)) {
                        let (slot, signs) = (bags.hash.slot(place, block), bags.hash.signs(place));
                        let values = &bags.hashed_weight[slot..slot + best.len()];
                        let columns = best.iter().zip(better.iter_mut()).zip(winners.iter_mut());
                        let values = values.iter().enumerate();
                        for ((i, value), ((best, better), winner)) in values.zip(columns) {
                            let value = value.widen().flip(signs, i);
                            let wins = row == 0 || value.wins(*best);
                            *better = if wins { value } else { *best };
                            *winner = if wins {
                                Winner::new(slot + i, signs, i)
                            } else {
                                *winner
                            };
                        }
                        std::mem::swap(&mut best, &mut better);
                    }
                    better.copy_from_slice(best);
                }
                seen += rows.positions.len();
            }
        }
    }
}

/// The numbers of the rows of a window.
const EVERY_ROW: [u8; MAX_ROWS] = {
    let mut rows = [0; MAX_ROWS];
    let mut i = 0;
    while i < MAX_ROWS {
        rows[i] = i as u8;
        i += 1;
    }
    rows
};

/// Adds the rows of some bags, in modes sum and mean.
struct Add<'a, const BLOCK: usize, T: Element, H: Locate> {
    source: &'a Source<'a, T, H>,
    of: Range<usize>,
    first_slot: usize,
    slots: &'a mut [T::Acc],
}

impl<const BLOCK: usize, T: Element, H: Locate> Task for Add<'_, BLOCK, T, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        let Source {
            bags, grad_output, ..
        } = *self.source;
        let (block, embedding_dim) = (block_of::<BLOCK, H>(&bags.hash), bags.embedding_dim());
        let mut places = Places::new(bags, self.of.clone());
        for bag in self.of.clone() {
            let grads = &grad_output[bag * embedding_dim..(bag + 1) * embedding_dim];
            let scale = bags.mean_scale(bag);
            let mut positions = bags.range(bag);
            while let Some(rows) = places.take(&mut positions) {
                for (run, grad) in grads.chunks(block).enumerate() {
                    self.add_block(lanes, &rows, run, grad, scale);
                }
            }
        }
    }
}

impl<const BLOCK: usize, T: Element, H: Locate> Add<'_, BLOCK, T, H> {
    /// Adds `grad`, of block `run`, for each of some rows.
    #[inline(always)]
    fn add_block<L: Lanes>(
        &mut self,
        lanes: L,
        rows: &Rows,
        run: usize,
        grad: &[T],
        scale: Option<T::Acc>,
    ) {
        let (bags, first_slot) = (self.source.bags, self.first_slot);
        let block = block_of::<BLOCK, H>(&bags.hash);
        let end_slot = first_slot + self.slots.len();
        let places = rows.run(run);
        let mut found = EVERY_ROW;
        let hits = if self.slots.len() == bags.hashed_weight.len() {
            places.len()
        } else {
            // The rows with slots in the slice, found without branches: no processor could foretell them.
            let mut hits = 0;
            for (i, &place) in (0..).zip(places) {
                let slot = bags.hash.slot(place, block);
                found[hits] = i;
                hits += usize::from(slot < end_slot && slot + block > first_slot);
            }
            hits
        };
        for &i in &found[..hits] {
            let i = usize::from(i);
            let place = places[i];
            let (slot, signs) = (bags.hash.slot(place, block), bags.hash.signs(place));
            let scale = scale.or_else(|| bags.scale(rows, i));
            let start = slot.wrapping_sub(first_slot);
            if BLOCK == 0 || grad.len() == BLOCK {
                // Not at the edge of the slice, which a block of an affine hash may straddle.
                if let Some(slots) = self.slots.get_mut(start..start.wrapping_add(grad.len())) {
                    combine::<Sum, _, _>(lanes, slots, &grad[..slots.len()], signs, scale);
                    continue;
                }
            }
            for (i, grad) in grad.iter().enumerate() {
                if let Some(sum) = self.slots.get_mut(start.wrapping_add(i)) {
                    let (one, grad) = (std::slice::from_mut(sum), std::slice::from_ref(grad));
                    combine::<Sum, _, _>(lanes, one, grad, signs >> (i % 32), scale);
                }
            }
        }
    }
}

/// gradient of per_sample_weights `(nnz,)`: of the weight at position `i` in bag `b`, `<row i, grad_output[b]>`
pub(super) struct GradPerSampleWeights<'a> {
    pub grad_output: View<'a, CpuStorage>,
}

impl Pass for GradPerSampleWeights<'_> {
    fn run<T: Element, H: Locate>(self, bags: &Bags<T, H>) -> Result<CpuStorage> {
        let grad_output = slice::<T>(self.grad_output)?;
        let task = bags.bags_per_task();
        let tasks = bags.num_bags().div_ceil(task);
        // Each task has the gradients of its own bags, in order.
        let gradients: Vec<Vec<T>> = (0..tasks)
            .into_par_iter()
            .map(|i| {
                let of = i * task..((i + 1) * task).min(bags.num_bags());
                with_block!(bags.hash, BLOCK => dispatch(Dot::<BLOCK, _, _> { bags, grad_output, of }))
            })
            .collect();
        let mut grad_weights = vec![T::from_f64(0.0); bags.indices.len()];
        let positions = (0..bags.num_bags())
            .flat_map(|bag| bags.range(bag))
            .filter(|&position| bags.counts(position));
        for (position, gradient) in positions.zip(gradients.into_iter().flatten()) {
            grad_weights[position] = gradient;
        }
        Ok(T::to_cpu_storage_owned(grad_weights))
    }
}

/// The dot products of the rows of some bags with their grad_output.
struct Dot<'a, const BLOCK: usize, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    grad_output: &'a [T],
    of: Range<usize>,
}

impl<const BLOCK: usize, T: Element, H: Locate> Task for Dot<'_, BLOCK, T, H> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) -> Vec<T> {
        let (bags, embedding_dim) = (self.bags, self.bags.embedding_dim());
        let block = block_of::<BLOCK, H>(&bags.hash);
        let mut places = Places::new(bags, self.of.clone());
        let mut dots = vec![];
        for bag in self.of {
            let grads = &self.grad_output[bag * embedding_dim..(bag + 1) * embedding_dim];
            let mut positions = bags.range(bag);
            while let Some(rows) = places.take(&mut positions) {
                let mut sums = [T::Acc::ZERO; MAX_ROWS];
                for (run, grads) in grads.chunks(block).enumerate() {
                    for (sum, &place) in sums.iter_mut().zip(rows.run(run)) {
                        let (slot, signs) = (bags.hash.slot(place, block), bags.hash.signs(place));
                        let values = &bags.hashed_weight[slot..slot + grads.len()];
                        for (i, (grad, value)) in grads.iter().zip(values).enumerate() {
                            *sum += grad.widen() * value.widen().flip(signs, i);
                        }
                    }
                }
                let sums = &sums[..rows.positions.len()];
                dots.extend(sums.iter().map(|sum| T::from_f64(sum.to_f64())));
            }
        }
        dots
    }
}
