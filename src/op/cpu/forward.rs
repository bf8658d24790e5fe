//! `out[bag, column] = pool over rows of the bag of sign * hashed_weight[slot]`
//!
//! Bags are divided among threads in tasks of consecutive bags, each of which looks for rows out of range before it pools;
//! each bag is pooled by one thread, in the order of its indices. The sums of four column groups stay in registers while
//! the rows of a bag go by.

use super::call::{with_block, Call};
use super::combine::{combine, Combine, Load, Max, Sum};
use super::lanes::{prefetch, Lanes, Loop};
use super::scalar::Accumulator;
use super::window::{Rows, READ_AHEAD};
use super::Pass;
use crate::hash::Locate;
use crate::op::Mode;
use candle_core::{CpuStorage, Result};
use std::mem::MaybeUninit;

/// output `(num_bags, embedding_dim)`
pub(super) struct Forward;

impl Pass for Forward {
    type Output = CpuStorage;

    fn run<T: Load, H: Locate>(self, call: &Call<T, H>) -> Result<CpuStorage> {
        let team = call.team();
        let (embedding_dim, task) = (call.embedding_dim(), call.bags_per_task(&team));
        let len = call.num_bags() * embedding_dim;
        let mut output = Vec::with_capacity(len);
        let values = &mut output.spare_capacity_mut()[..len];
        let tasks = values.chunks_mut(task * embedding_dim).enumerate();
        let bad_rows = team.map(tasks, |(i, output)| {
            let first = i * task;
            let bags = first..first + output.len() / embedding_dim;
            let bad_row = call.rows.first_bad_row(bags);
            if bad_row.is_none() {
                with_block!(call.hash.block(), Call::<T, H>::CONSTANT_BLOCKS, BLOCK, lanes => lanes.run(Pool::<BLOCK, _, _> { call, first, output }));
            }
            bad_row
        });
        if let Some(bad_row) = bad_rows.into_iter().flatten().min() {
            return Err(call.rows.error(&bad_row));
        }
        // SAFETY: no row being bad, each bag wrote its row, and the rows are all `len` values.
        unsafe { output.set_len(len) };
        Ok(T::to_cpu_storage_owned(output))
    }
}

/// Pools the bags from `first` on into the rows of `output`, and writes all of it.
struct Pool<'a, const BLOCK: usize, T, H: Locate> {
    call: &'a Call<'a, T, H>,
    first: usize,
    output: &'a mut [MaybeUninit<T>],
}

impl<const BLOCK: usize, T: Load, H: Locate> Loop for Pool<'_, BLOCK, T, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.call.mode() {
            Mode::Max => self.pool::<Max, _>(lanes),
            Mode::Sum | Mode::Mean => self.pool::<Sum, _>(lanes),
        }
    }
}

impl<const BLOCK: usize, T: Load, H: Locate> Pool<'_, BLOCK, T, H> {
    #[inline(always)]
    fn pool<C: Combine, L: Lanes>(self, lanes: L) {
        let (call, embedding_dim) = (self.call, self.call.embedding_dim());
        let last = self.first + self.output.len() / embedding_dim;
        let mut window = call.window(self.first..last);
        let mut pooled = vec![T::Acc::ZERO; embedding_dim];
        for (bag, output) in (self.first..last).zip(self.output.chunks_exact_mut(embedding_dim)) {
            let mut count = 0;
            while let Some(rows) = window.take(bag) {
                pool_rows::<BLOCK, C, _, _, _>(lanes, call, &rows, count == 0, &mut pooled);
                count += rows.len();
            }
            if count == 0 {
                pooled.fill(T::Acc::ZERO);
            } else if call.mode() == Mode::Mean {
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
fn pool_rows<const BLOCK: usize, C: Combine, T: Load, H: Locate, L: Lanes>(
    lanes: L,
    call: &Call<T, H>,
    rows: &Rows<H::Place>,
    are_first: bool,
    pooled: &mut [T::Acc],
) {
    let block = call.block::<BLOCK>();
    let full = pooled.len().checked_div(BLOCK).unwrap_or(0);
    let mut first = 0;
    while first + 4 <= full {
        let pooled = &mut pooled[first * BLOCK..(first + 4) * BLOCK];
        if call.is_weighted() {
            pool_blocks::<BLOCK, 4, true, C, _, _, _>(lanes, call, rows, first, are_first, pooled);
        } else {
            pool_blocks::<BLOCK, 4, false, C, _, _, _>(lanes, call, rows, first, are_first, pooled);
        }
        first += 4;
    }
    while first < full {
        let pooled = &mut pooled[first * BLOCK..(first + 1) * BLOCK];
        pool_blocks::<BLOCK, 1, true, C, _, _, _>(lanes, call, rows, first, are_first, pooled);
        first += 1;
    }
    // Blocks of no constant length, and a last one that is cut off.
    for (pooled, column_block) in pooled[first * block..].chunks_mut(block).zip(first..) {
        if are_first {
            pooled.fill(C::first());
        }
        let blocks = rows.blocks(column_block);
        for i in 0..rows.len() {
            let (slot, signs) = call.locate(&blocks, i, block);
            let values = &call.hashed_weight[slot..slot + pooled.len()];
            let scale = call.sample_weight(rows, i);
            combine::<C, _, _>(lanes, pooled, values, signs, scale);
        }
    }
}

/// The same for N column blocks from `first` on, in registers. With `WEIGHTED = false`, the weight path is compiled out.
#[inline(always)]
fn pool_blocks<
    const BLOCK: usize,
    const N: usize,
    const WEIGHTED: bool,
    C: Combine,
    T: Load,
    H: Locate,
    L: Lanes,
>(
    lanes: L,
    call: &Call<T, H>,
    rows: &Rows<H::Place>,
    first: usize,
    are_first: bool,
    pooled: &mut [T::Acc],
) {
    let blocks: [_; N] = std::array::from_fn(|n| rows.blocks(first + n));
    let mut sums = [[C::first(); BLOCK]; N];
    if !are_first {
        sums.as_flattened_mut().copy_from_slice(pooled);
    }
    for i in 0..rows.len() {
        let scale = if WEIGHTED {
            call.sample_weight(rows, i)
        } else {
            None
        };
        for (sums, blocks) in sums.iter_mut().zip(&blocks) {
            let (values, signs) = call.values::<BLOCK>(blocks, i);
            if BLOCK > 1 {
                let ahead = call.hash.slot(blocks.place(i + READ_AHEAD), BLOCK);
                prefetch(call.hashed_weight.as_ptr().wrapping_add(ahead));
            }
            combine::<C, _, _>(lanes, sums, values, signs, scale);
        }
    }
    pooled.copy_from_slice(sums.as_flattened());
}
