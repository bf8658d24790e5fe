//! `out[bag, column] = pool over rows of the bag of sign * hashed_weight[slot]`
//!
//! Bags are divided among threads in tasks of consecutive bags, each of which looks for rows out of range before it pools;
//! each bag is pooled by one thread, in the order of its indices. The sums of four blocks stay in registers while all rows of a bag go by.

use super::lanes::{dispatch, Lanes, Task};
use super::places::{Places, Rows, READ_AHEAD};
use super::{
    block_of, combine, with_block, Accumulator, Bags, Combine, Element, Max, Mode, Pass, Sum,
};
use crate::hash::Locate;
use candle_core::{CpuStorage, Result};
use std::mem::MaybeUninit;

/// output `(num_bags, embedding_dim)`
pub(super) struct Forward;

impl Pass for Forward {
    fn run<T: Element, H: Locate>(self, bags: &Bags<T, H>) -> Result<CpuStorage> {
        let team = bags.team();
        let (embedding_dim, task) = (bags.embedding_dim(), bags.bags_per_task(&team));
        let len = bags.num_bags() * embedding_dim;
        let mut output = Vec::with_capacity(len);
        let values = &mut output.spare_capacity_mut()[..len];
        let tasks = values.chunks_mut(task * embedding_dim).enumerate();
        let bad_rows = team.map(tasks, |(i, output)| {
            let of = i * task..i * task + output.len() / embedding_dim;
            let first = of.start;
            let bad_row = bags.first_bad_row(of);
            if bad_row.is_none() {
                with_block!(bags.hash, BLOCK => dispatch(Pool::<BLOCK, _, _> { bags, first, output }));
            }
            bad_row
        });
        if let Some(bad_row) = bad_rows.into_iter().flatten().min() {
            return Err(bags.error(&bad_row));
        }
        // SAFETY: no row being bad, each bag wrote its row, and the rows are all `len` values.
        unsafe { output.set_len(len) };
        Ok(T::to_cpu_storage_owned(output))
    }
}

/// Pools the bags from `first` on into the rows of `output`, and writes all of it.
struct Pool<'a, const BLOCK: usize, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    first: usize,
    output: &'a mut [MaybeUninit<T>],
}

impl<const BLOCK: usize, T: Element, H: Locate> Task for Pool<'_, BLOCK, T, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.bags.lookup.table.mode {
            Mode::Max => self.pool::<Max, _>(lanes),
            Mode::Sum | Mode::Mean => self.pool::<Sum, _>(lanes),
        }
    }
}

impl<const BLOCK: usize, T: Element, H: Locate> Pool<'_, BLOCK, T, H> {
    #[inline(always)]
    fn pool<C: Combine, L: Lanes>(self, lanes: L) {
        let (bags, embedding_dim) = (self.bags, self.bags.embedding_dim());
        let last = self.first + self.output.len() / embedding_dim;
        let mut places = Places::new(bags, self.first..last);
        let mut pooled = vec![T::Acc::ZERO; embedding_dim];
        for (bag, output) in (self.first..last).zip(self.output.chunks_exact_mut(embedding_dim)) {
            let (mut positions, mut count) = (bags.range(bag), 0);
            while let Some(rows) = places.take(&mut positions) {
                pool_rows::<BLOCK, C, _, _, _>(lanes, bags, &rows, count == 0, &mut pooled);
                count += rows.len();
            }
            if count == 0 {
                pooled.fill(T::Acc::ZERO);
            } else if bags.lookup.table.mode == Mode::Mean {
                let count = T::Acc::from_count(count);
                for sum in &mut pooled {
                    *sum /= count;
                }
            }
            T::narrow(&pooled, output);
        }
    }
}

/// Combines `pooled[column]`, where the rows are not the first, with `scale * sign * hashed_weight[slot]` of each of them.
#[inline(always)]
fn pool_rows<const BLOCK: usize, C: Combine, T: Element, H: Locate, L: Lanes>(
    lanes: L,
    bags: &Bags<T, H>,
    rows: &Rows<T, H>,
    are_first: bool,
    pooled: &mut [T::Acc],
) {
    let block = block_of::<BLOCK, H>(&bags.hash);
    let full = pooled.len().checked_div(BLOCK).unwrap_or(0);
    let is_weighted = bags.per_sample_weights.is_some();
    let mut run = 0;
    while run + 4 <= full {
        let pooled = &mut pooled[run * BLOCK..(run + 4) * BLOCK];
        if is_weighted {
            pool_blocks::<BLOCK, 4, true, C, _, _, _>(lanes, bags, rows, run, are_first, pooled);
        } else {
            pool_blocks::<BLOCK, 4, false, C, _, _, _>(lanes, bags, rows, run, are_first, pooled);
        }
        run += 4;
    }
    while run < full {
        let pooled = &mut pooled[run * BLOCK..(run + 1) * BLOCK];
        pool_blocks::<BLOCK, 1, true, C, _, _, _>(lanes, bags, rows, run, are_first, pooled);
        run += 1;
    }
    // Blocks of no constant length, and a last one that is cut off.
    for (pooled, run) in pooled[run * block..].chunks_mut(block).zip(run..) {
        if are_first {
            pooled.fill(C::first());
        }
        let places = rows.run(run);
        for i in 0..rows.len() {
            let (slot, signs) = places.place(i, block);
            let values = &bags.hashed_weight[slot..slot + pooled.len()];
            combine::<C, _, _>(lanes, pooled, values, signs, bags.scale(rows, i));
        }
    }
}

/// The same for the blocks `run..run + N`, in registers. Not `WEIGHTED` says that rows have no weights.
#[inline(always)]
fn pool_blocks<
    const BLOCK: usize,
    const N: usize,
    const WEIGHTED: bool,
    C: Combine,
    T: Element,
    H: Locate,
    L: Lanes,
>(
    lanes: L,
    bags: &Bags<T, H>,
    rows: &Rows<T, H>,
    run: usize,
    are_first: bool,
    pooled: &mut [T::Acc],
) {
    let runs: [_; N] = std::array::from_fn(|n| rows.run(run + n));
    let mut blocks = [[C::first(); BLOCK]; N];
    if !are_first {
        blocks.as_flattened_mut().copy_from_slice(pooled);
    }
    for i in 0..rows.len() {
        let scale = if WEIGHTED { bags.scale(rows, i) } else { None };
        for (block, places) in blocks.iter_mut().zip(&runs) {
            let (values, signs) = places.values::<BLOCK>(i);
            if BLOCK > 1 {
                places.fetch_one(lanes, bags.hashed_weight.as_ptr(), i + READ_AHEAD, BLOCK);
            }
            combine::<C, _, _>(lanes, block, values, signs, scale);
        }
    }
    pooled.copy_from_slice(blocks.as_flattened());
}
