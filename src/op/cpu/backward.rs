//! The gradients.
//!
//! Rows of different bags meet in the slots of grad_weight. No result depends on the number of threads, because the work
//! is divided in one of two ways, chosen by the sizes alone:
//!
//! * *Parts*, where many values fall on each slot: the bags are divided into parts, each adds into a buffer of its own, and
//!   the buffers are added in order. There are so few parts that the buffers together hold at most a quarter as many values
//!   as are gathered.
//! * *Slices*, else: each thread owns a slice of grad_weight, goes over all rows and adds what falls into its slice. A slot
//!   gets its values in the order of the rows however the slices lie. The hash is computed once per thread, and no memory
//!   is needed beside grad_weight.
//!
//! For max, the winners are found first, bags divided among threads; there are as many of them as output values.

use super::lanes::{dispatch, Lanes, Task};
use super::places::{prefetch, Places};
use super::{
    block_of, combine, slice, with_block, Accumulator, Bags, Element, Mode, Pass, Sum, View,
    MIN_VALUES_PER_THREAD,
};
use crate::hash::{Locate, Place};
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
        let mut best = vec![T::Acc::ZERO; embedding_dim];
        let rows = self.winners.chunks_exact_mut(embedding_dim);
        for (bag, winners) in (self.first..last).zip(rows) {
            let mut first = true;
            for position in bags.positions(bag) {
                let columns = best.chunks_mut(block).zip(winners.chunks_mut(block));
                for ((best, winners), &place) in columns.zip(places.of(position)) {
                    let (slot, signs) = (bags.hash.slot(place, block), bags.hash.signs(place));
                    let values = &bags.hashed_weight[slot..slot + best.len()];
                    let values = values.iter().enumerate();
                    for ((i, value), (best, winner)) in values.zip(best.iter_mut().zip(winners)) {
                        let value = value.widen().flip(signs, i);
                        let wins = first || value.wins(*best);
                        *best = if wins { value } else { *best };
                        *winner = if wins {
                            Winner::new(slot + i, signs, i)
                        } else {
                            *winner
                        };
                    }
                }
                first = false;
            }
        }
    }
}

/// A block of a row of which some slots lie in the slice.
#[derive(Debug, Clone, Copy)]
struct Hit<A> {
    place: Place,
    /// Where its gradient starts in grad_output.
    grad: usize,
    /// What multiplies the gradient: the weight of the sample, or 1 / count.
    scale: A,
}

/// How many hits are on their way while as many are added.
const HITS_AHEAD: usize = 64;

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
        let (bags, first_slot) = (self.source.bags, self.first_slot);
        let (block, end_slot) = (
            block_of::<BLOCK, H>(&bags.hash),
            first_slot + self.slots.len(),
        );
        let mut places = vec![0; bags.runs.len()];
        let none = Hit {
            place: 0,
            grad: 0,
            scale: T::Acc::ONE,
        };
        // A row more than needed: hits are written before it is known whether they are any.
        let mut found = vec![none; HITS_AHEAD + places.len() + 1];
        let mut prefetched = found.clone();
        let (mut n, mut n_prefetched) = (0, 0);
        for bag in self.of.clone() {
            let scale = T::Acc::ONE / bags.divisor(bag);
            for position in bags.positions(bag) {
                let scale = match bags.per_sample_weights {
                    Some(weights) => weights[position].widen(),
                    None => scale,
                };
                let row = bags.row(position);
                bags.hash
                    .locate(std::iter::once(row), &bags.runs, &mut places);
                let mut grad = bag * bags.embedding_dim();
                for &place in &places {
                    let slot = bags.hash.slot(place, block);
                    found[n] = Hit { place, grad, scale };
                    n += usize::from(slot < end_slot && slot + block > first_slot);
                    grad += block;
                }
                if n >= HITS_AHEAD {
                    for hit in &found[..n] {
                        let slot = bags.hash.slot(hit.place, block);
                        prefetch(self.slots, slot.wrapping_sub(first_slot), block);
                    }
                    self.add(lanes, &prefetched[..n_prefetched]);
                    std::mem::swap(&mut found, &mut prefetched);
                    (n, n_prefetched) = (0, n);
                }
            }
        }
        self.add(lanes, &prefetched[..n_prefetched]);
        self.add(lanes, &found[..n]);
    }
}

impl<const BLOCK: usize, T: Element, H: Locate> Add<'_, BLOCK, T, H> {
    #[inline(always)]
    fn add<L: Lanes>(&mut self, lanes: L, hits: &[Hit<T::Acc>]) {
        let (bags, grad_output) = (self.source.bags, self.source.grad_output);
        let (block, embedding_dim) = (block_of::<BLOCK, H>(&bags.hash), bags.embedding_dim());
        let scaled = bags.per_sample_weights.is_some() || bags.lookup.table.mode == Mode::Mean;
        let whole_blocks = embedding_dim.is_multiple_of(block);
        for hit in hits {
            let (slot, signs) = (bags.hash.slot(hit.place, block), bags.hash.signs(hit.place));
            let scale = scaled.then_some(hit.scale);
            let start = slot.wrapping_sub(self.first_slot);
            if whole_blocks {
                let grad = &grad_output[hit.grad..hit.grad + block];
                // Not at the edge of the slice, which a block of an affine hash may straddle.
                if let Some(slots) = self.slots.get_mut(start..start.wrapping_add(block)) {
                    combine::<Sum, _, _>(lanes, slots, grad, signs, scale);
                    continue;
                }
            }
            let len = block.min(embedding_dim - hit.grad % embedding_dim);
            let grad = &grad_output[hit.grad..hit.grad + len];
            for (i, grad) in grad.iter().enumerate() {
                if let Some(sum) = self.slots.get_mut(start.wrapping_add(i)) {
                    let one = std::slice::from_mut(sum);
                    combine::<Sum, _, _>(
                        lanes,
                        one,
                        std::slice::from_ref(grad),
                        signs >> (i % 32),
                        scale,
                    );
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
        let positions = (0..bags.num_bags()).flat_map(|bag| bags.positions(bag));
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
            let grad = &self.grad_output[bag * embedding_dim..(bag + 1) * embedding_dim];
            for position in bags.positions(bag) {
                let mut dot = T::Acc::ZERO;
                for (grad, &place) in grad.chunks(block).zip(places.of(position)) {
                    let (slot, signs) = (bags.hash.slot(place, block), bags.hash.signs(place));
                    let values = &bags.hashed_weight[slot..slot + grad.len()];
                    for (i, (grad, value)) in grad.iter().zip(values).enumerate() {
                        dot += grad.widen() * value.widen().flip(signs, i);
                    }
                }
                let mut narrow = [T::from_f64(0.0)];
                T::narrow(&[dot], &mut narrow);
                dots.extend(narrow);
            }
        }
        dots
    }
}
