//! `out[bag, column] = pool over rows of the bag of sign * hashed_weight[slot]`
//!
//! Bags are divided among threads in tasks of consecutive bags; each bag is pooled by one thread, in the order of its
//! indices.

use super::lanes::{dispatch, Lanes, Task};
use super::places::Places;
use super::{
    block_of, combine, with_block, Accumulator, Bags, Combine, Element, Max, Mode, Pass, Sum,
};
use crate::hash::{Locate, Place};
use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

/// output `(num_bags, embedding_dim)`
pub(super) struct Forward;

impl Pass for Forward {
    fn run<T: Element, H: Locate>(self, bags: &Bags<T, H>) -> Result<CpuStorage> {
        let embedding_dim = bags.embedding_dim();
        let mut output = vec![T::from_f64(0.0); bags.num_bags() * embedding_dim];
        let task = bags.bags_per_task();
        let pool = |first: usize, output: &mut [T]| {
            with_block!(bags.hash, BLOCK => dispatch(Pool::<BLOCK, _, _> { bags, first, output }));
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

impl<const BLOCK: usize, T: Element, H: Locate> Task for Pool<'_, BLOCK, T, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let bags = self.bags;
        let embedding_dim = bags.embedding_dim();
        let last = self.first + self.output.len() / embedding_dim;
        let mut places = Places::new(bags, self.first..last);
        let mut sums = vec![T::Acc::ZERO; embedding_dim];
        for (bag, output) in (self.first..last).zip(self.output.chunks_exact_mut(embedding_dim)) {
            if bags.lookup.table.mode == Mode::Max {
                sums.fill(T::Acc::NEG_INFINITY);
                let mut any = false;
                for position in bags.positions(bag) {
                    combine_row::<BLOCK, Max, _, _, _>(
                        lanes,
                        bags,
                        places.of(position),
                        None,
                        &mut sums,
                    );
                    any = true;
                }
                if !any {
                    sums.fill(T::Acc::ZERO);
                }
            } else {
                sums.fill(T::Acc::ZERO);
                for position in bags.positions(bag) {
                    let scale = bags
                        .per_sample_weights
                        .map(|weights| weights[position].widen());
                    combine_row::<BLOCK, Sum, _, _, _>(
                        lanes,
                        bags,
                        places.of(position),
                        scale,
                        &mut sums,
                    );
                }
                if bags.lookup.table.mode == Mode::Mean {
                    let divisor = bags.divisor(bag);
                    for sum in &mut sums {
                        *sum /= divisor;
                    }
                }
            }
            T::narrow(&sums, output);
        }
    }
}

/// Combines `sums[column]` with `scale * sign * hashed_weight[slot]`, for a row.
#[inline(always)]
fn combine_row<const BLOCK: usize, C: Combine, T: Element, H: Locate, L: Lanes>(
    lanes: L,
    bags: &Bags<T, H>,
    places: &[Place],
    scale: Option<T::Acc>,
    sums: &mut [T::Acc],
) {
    let block = block_of::<BLOCK, H>(&bags.hash);
    // The full blocks first, whose length is a constant where BLOCK is.
    let full = sums.len() / block * block;
    let (sums, rest) = sums.split_at_mut(full);
    for (sums, &place) in sums.chunks_exact_mut(block).zip(places) {
        let (slot, signs) = (bags.hash.slot(place, block), bags.hash.signs(place));
        let values = &bags.hashed_weight[slot..slot + block];
        combine::<C, _, _>(lanes, sums, values, signs, scale);
    }
    if let (false, Some(&place)) = (rest.is_empty(), places.last()) {
        let (slot, signs) = (bags.hash.slot(place, block), bags.hash.signs(place));
        let values = &bags.hashed_weight[slot..slot + rest.len()];
        combine::<C, _, _>(lanes, rest, values, signs, scale);
    }
}
