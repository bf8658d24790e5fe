//! `out[bag, column] = pool over rows of the bag of sign * hashed_weight[slot]`
//!
//! Bags are divided among threads in tasks of consecutive bags; each bag is pooled by one thread, in the order of its
//! indices.

use super::places::Places;
use super::{add_block, block_of, with_block, Accumulator, Bags, Element, Mode, Pass};
use crate::hash::{Locate, Place};
use candle_core::{CpuStorage, Result};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// output `(num_bags, embedding_dim)`
pub(super) struct Forward;

impl Pass for Forward {
    fn run<T: Element, H: Locate>(self, bags: &Bags<T, H>) -> Result<CpuStorage> {
        let embedding_dim = bags.embedding_dim();
        let mut output = vec![T::from_f64(0.0); bags.num_bags() * embedding_dim];
        let task = bags.bags_per_task();
        let pool = |first: usize, output: &mut [T]| {
            with_block!(bags.hash, BLOCK => Arch::new().dispatch(Pool::<BLOCK, _, _> { bags, first, output }));
        };
        if task >= bags.num_bags() {
            pool(0, &mut output);
        } else {
            output
                .par_chunks_mut(task * embedding_dim)
                .enumerate()
                .for_each(|(i, output)| pool(i * task, output));
        }
        Ok(T::to_cpu_storage_owned(output))
    }
}

/// Pools the bags from `first` on into the rows of `output`.
struct Pool<'a, const BLOCK: usize, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    first: usize,
    output: &'a mut [T],
}

impl<const BLOCK: usize, T: Element, H: Locate> WithSimd for Pool<'_, BLOCK, T, H> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let bags = self.bags;
        let embedding_dim = bags.embedding_dim();
        let last = self.first + self.output.len() / embedding_dim;
        let mut places = Places::new(bags, self.first..last);
        let mut sums = vec![T::Acc::ZERO; embedding_dim];
        for (bag, output) in (self.first..last).zip(self.output.chunks_exact_mut(embedding_dim)) {
            sums.fill(T::Acc::ZERO);
            if bags.lookup.table.mode == Mode::Max {
                max::<BLOCK, _, _>(bags, bag, &mut places, &mut sums, |_, _| ());
            } else {
                for position in bags.positions(bag) {
                    let scale = bags
                        .per_sample_weights
                        .map(|weights| weights[position].widen());
                    add_row::<BLOCK, _, _>(bags, places.of(position), scale, &mut sums);
                }
                if bags.lookup.table.mode == Mode::Mean {
                    let divisor = bags.divisor(bag);
                    for sum in &mut sums {
                        *sum = *sum / divisor;
                    }
                }
            }
            T::narrow(&sums, output);
        }
    }
}

/// `sums[column] += scale * sign * hashed_weight[slot]`
#[inline(always)]
fn add_row<const BLOCK: usize, T: Element, H: Locate>(
    bags: &Bags<T, H>,
    places: &[Place],
    scale: Option<T::Acc>,
    sums: &mut [T::Acc],
) {
    let block = block_of::<BLOCK, H>(&bags.hash);
    let mut blocks = sums.chunks_exact_mut(block);
    for (sums, &place) in (&mut blocks).zip(places) {
        let slot = bags.hash.slot(place);
        let values = &bags.hashed_weight[slot..slot + block];
        add_block(sums, values, bags.hash.signs(place), scale);
    }
    // The last block, where the table ends within it.
    if let (sums @ [_, ..], Some(&place)) = (blocks.into_remainder(), places.last()) {
        let slot = bags.hash.slot(place);
        let values = &bags.hashed_weight[slot..slot + sums.len()];
        add_block(sums, values, bags.hash.signs(place), scale);
    }
}

/// The largest value of each column of a bag, in `best`; `won(column, winner)` is told of each new best. Returns whether
/// the bag holds a row at all.
#[inline(always)]
pub(super) fn max<const BLOCK: usize, T: Element, H: Locate>(
    bags: &Bags<T, H>,
    bag: usize,
    places: &mut Places<T, H>,
    best: &mut [T::Acc],
    mut won: impl FnMut(usize, Winner),
) -> bool {
    let block = block_of::<BLOCK, H>(&bags.hash);
    let mut first = true;
    for position in bags.positions(bag) {
        let places = places.of(position);
        for (run, (best, &place)) in best.chunks_mut(block).zip(places).enumerate() {
            let (slot, signs) = (bags.hash.slot(place), bags.hash.signs(place));
            let values = &bags.hashed_weight[slot..slot + best.len()];
            for (i, (best, &value)) in best.iter_mut().zip(values).enumerate() {
                let value = value.widen().flip(signs, i);
                let wins = first || value > *best || (value.is_nan() && !best.is_nan());
                if wins {
                    *best = value;
                    won(run * block + i, Winner::new(slot + i, signs, i));
                }
            }
        }
        first = false;
    }
    !first
}

/// The slot that won a column of a bag, and its sign.
#[derive(Debug, Clone, Copy)]
pub(super) struct Winner(u64);

impl Winner {
    pub const NONE: Self = Self(u64::MAX);

    #[inline(always)]
    fn new(slot: usize, signs: u32, i: usize) -> Self {
        let negative = (signs >> (i % 32)) & 1;
        Self((slot as u64) << 1 | u64::from(negative))
    }

    /// The slot, and 1 where its value is negated.
    pub fn get(self) -> Option<(usize, u32)> {
        (self.0 != Self::NONE.0).then_some(((self.0 >> 1) as usize, (self.0 & 1) as u32))
    }
}
