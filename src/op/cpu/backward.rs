//! The gradient of `hashed_weight`: `grad_weight[slot] += sign * scale * grad_output[bag, column]`.
//!
//! This file writes what each block of a row adds, and where, as terms; `winners.rs` does so for mode max, where a term is a
//! column of a bag. `terms.rs` adds them.

use super::call::{with_block, Call};
use super::combine::{combine, Load, Sum};
use super::lanes::{prefetch, Lanes, Loop};
use super::scalar::{Accumulator, ValuesMut};
use super::sparse::SparseSums;
use super::terms::{Scale, Scatter, Slots, Terms};
use super::window::{Blocks, ADD_AHEAD};
use super::{slice, winners, Pass};
use crate::hash::Locate;
use crate::op::{Mode, View};
use candle_core::{CpuStorage, Result, WithDType};
use std::ops::Range;

/// grad_weight `(len,)`, in the accumulator's dtype
pub(super) struct GradWeight<'a> {
    pub grad_output: View<'a, CpuStorage>,
}

impl Pass for GradWeight<'_> {
    type Output = CpuStorage;

    fn run<T: Load, H: Locate>(self, call: &Call<T, H>) -> Result<CpuStorage> {
        let mut grad_weight = vec![T::Acc::ZERO; call.hashed_weight.len()];
        add(call, self.grad_output, Slots::new(&mut grad_weight, None))?;
        Ok(T::Acc::to_cpu_storage_owned(grad_weight))
    }
}

/// Adds grad_weight to a sparse gradient.
pub(super) struct AddGradWeight<'a> {
    pub grad_output: View<'a, CpuStorage>,
    pub sums: &'a mut SparseSums,
}

impl Pass for AddGradWeight<'_> {
    type Output = ();

    fn run<T: Load, H: Locate>(self, call: &Call<T, H>) -> Result<()> {
        let SparseSums { values, touched } = self.sums;
        let values = T::Acc::values_mut(values)?;
        add(call, self.grad_output, Slots::new(values, Some(touched)))
    }
}

/// Adds grad_weight to `slots`.
fn add<T: Load, H: Locate>(
    call: &Call<T, H>,
    grad_output: View<CpuStorage>,
    slots: Slots<T::Acc>,
) -> Result<()> {
    let grad_output = slice::<T>(grad_output)?;
    match call.mode() {
        Mode::Max => winners::add(call, grad_output, slots),
        Mode::Mean => add_rows::<T, H, T::Acc>(call, grad_output, slots),
        Mode::Sum if call.is_weighted() => add_rows::<T, H, T::Acc>(call, grad_output, slots),
        Mode::Sum => add_rows::<T, H, ()>(call, grad_output, slots),
    }
    Ok(())
}

/// In modes sum and mean. `S` is `()` where terms have no scale.
fn add_rows<T: Load, H: Locate, S: Scale<T::Acc>>(
    call: &Call<T, H>,
    grad_output: &[T],
    slots: Slots<T::Acc>,
) {
    let gradient = Scatter {
        team: call.team(),
        grad_output,
        embedding_dim: call.embedding_dim(),
        num_terms: call.rows.nnz().saturating_mul(call.column_blocks.len()),
        block: call.hash.block(),
    };
    let add = |bags: Range<usize>, slots: Slots<T::Acc>| {
        with_block!(call.hash.block(), Call::<T, H>::CONSTANT_BLOCKS, BLOCK, lanes => lanes.run(AddRows::<BLOCK, _, _> {
            call,
            grad_output,
            bags,
            slots,
        }));
    };
    gradient.sum::<S>(slots, &add, &|bags, terms| write(call, bags, terms));
}

/// Writes the terms of the rows of some bags.
fn write<T: Load, H: Locate, S: Scale<T::Acc>>(
    call: &Call<T, H>,
    bags: Range<usize>,
    terms: &mut Terms<S>,
) {
    let (block, embedding_dim) = (call.hash.block(), call.embedding_dim());
    let column_blocks = call.column_blocks.len();
    let mut window = call.window(bags);
    loop {
        let is_new = window.is_taken();
        let capacity = window.capacity();
        let Some((bag, rows)) = window.take_next() else {
            return;
        };
        if is_new {
            terms.reserve(capacity * column_blocks);
        }
        let mean_scale = call.mean_scale(bag);
        for column_block in 0..column_blocks {
            let blocks = rows.blocks(column_block);
            let grad = bag * embedding_dim + column_block * block;
            for row in 0..rows.len() {
                let (slot, signs) = call.locate(&blocks, row, block);
                let weight = || call.sample_weight(&rows, row);
                let scale = S::new(|| mean_scale.or_else(weight));
                terms.push(slot, block, signs, grad, scale);
            }
        }
    }
}

/// Adds the rows of some bags to their slots.
struct AddRows<'a, const BLOCK: usize, T: Load, H: Locate> {
    call: &'a Call<'a, T, H>,
    grad_output: &'a [T],
    bags: Range<usize>,
    slots: Slots<'a, T::Acc>,
}

impl<const BLOCK: usize, T: Load, H: Locate> Loop for AddRows<'_, BLOCK, T, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self {
            call,
            grad_output,
            bags,
            mut slots,
        } = self;
        let (block, embedding_dim) = (call.block::<BLOCK>(), call.embedding_dim());
        let mut window = call.window(bags);
        while let Some((bag, rows)) = window.take_next() {
            let grads = &grad_output[bag * embedding_dim..(bag + 1) * embedding_dim];
            let mean_scale = call.mean_scale(bag);
            for (column_block, grads) in grads.chunks(block).enumerate() {
                let blocks = rows.blocks(column_block);
                let n = rows.len();
                let weighted = |row| mean_scale.or_else(|| call.sample_weight(&rows, row));
                match grads.first_chunk::<BLOCK>() {
                    // Copies, which stay in registers: what is added to might be the same memory for all the compiler knows.
                    Some(&grads) if BLOCK > 0 && call.is_weighted() => add_block::<BLOCK, _, _, _>(
                        lanes, call, &blocks, n, &grads, weighted, &mut slots,
                    ),
                    Some(&grads) if BLOCK > 0 => add_block::<BLOCK, _, _, _>(
                        lanes,
                        call,
                        &blocks,
                        n,
                        &grads,
                        |_| mean_scale,
                        &mut slots,
                    ),
                    _ => add_block::<BLOCK, _, _, _>(
                        lanes, call, &blocks, n, grads, weighted, &mut slots,
                    ),
                }
            }
        }
    }
}

/// Adds one block of columns of each of `n` rows, times its scale.
#[inline(always)]
fn add_block<const BLOCK: usize, T: Load, H: Locate, L: Lanes>(
    lanes: L,
    call: &Call<T, H>,
    blocks: &Blocks<H::Place>,
    n: usize,
    grads: &[T],
    scale: impl Fn(usize) -> Option<T::Acc>,
    slots: &mut Slots<T::Acc>,
) {
    let block = call.block::<BLOCK>();
    for row in 0..n {
        if BLOCK > 1 {
            let ahead = call.hash.slot(blocks.place(row + ADD_AHEAD), block);
            prefetch(slots.values.as_ptr().wrapping_add(ahead));
        }
        let (slot, signs) = call.locate(blocks, row, block);
        let sums = &mut slots.values[slot..slot + grads.len()];
        combine::<Sum, T, _>(lanes, sums, grads, signs, scale(row));
        slots.mark(slot, grads.len());
    }
}
