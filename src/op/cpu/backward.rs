//! The gradient of `hashed_weight`: `grad_weight[slot] += sign * scale * grad_output[bag, column]`.
//!
//! Rows of different bags meet in the slots of grad_weight. No result depends on the number of threads, because the work is
//! divided in one of two ways, chosen by the sizes alone:
//!
//! * *Shares*, where many values fall on each slot: the bags are divided into shares. The first is added into grad_weight, each
//!   other into a buffer of its own, and the buffers are added in order. There are so few shares that the buffers together
//!   hold at most a quarter as many values as are added.
//! * *Slices*, else: each thread owns a slice of grad_weight, goes over all rows and adds what falls into its slice. All go
//!   in the same order, so a slot gets its values in that order however the slices lie. Every row is hashed for every slice,
//!   and no memory is needed beside grad_weight.
//!
//! For max, the winners are found first; see `winners.rs`.

use super::call::{with_block, Call};
use super::combine::{combine, Load, Sum};
use super::lanes::{prefetch, Lanes, Loop};
use super::scalar::Accumulator;
use super::window::{Blocks, Rows, ADD_AHEAD};
use super::{slice, winners, Pass, MIN_VALUES_PER_THREAD};
use crate::hash::{Locate, MAX_ROWS};
use crate::op::{Mode, View};
use crate::parallel::Team;
use candle_core::{CpuStorage, Result, WithDType};
use std::ops::Range;

/// The most shares.
const MAX_SHARES: usize = 16;

/// grad_weight `(len,)`, in the accumulator's dtype
pub(super) struct GradWeight<'a> {
    pub grad_output: View<'a, CpuStorage>,
}

impl Pass for GradWeight<'_> {
    fn run<T: Load, H: Locate>(self, call: &Call<T, H>) -> Result<CpuStorage> {
        let grad_output = slice::<T>(self.grad_output)?;
        let grad_weight = match call.mode() {
            Mode::Max => winners::grad_weight(call, grad_output),
            Mode::Sum | Mode::Mean => grad_weight(call, grad_output),
        };
        Ok(T::Acc::to_cpu_storage_owned(grad_weight))
    }
}

/// In modes sum and mean.
fn grad_weight<T: Load, H: Locate>(call: &Call<T, H>, grad_output: &[T]) -> Vec<T::Acc> {
    let (len, num_bags) = (call.hashed_weight.len(), call.num_bags());
    let values = call.gathered_values();
    let team = Team::new(values / MIN_VALUES_PER_THREAD);
    let add = |bags: Range<usize>, first_slot: usize, slots: &mut [T::Acc]| {
        with_block!(call, <T, H>, BLOCK, lanes => lanes.run(Add::<BLOCK, _, _> {
            call,
            grad_output,
            bags,
            first_slot,
            slots,
        }))
    };
    let buffers = (values / (4 * len)).min(values / MIN_VALUES_PER_THREAD);
    if buffers == 0 {
        // Whole blocks, so that an aligned block lies in one slice.
        let block = call.hash.block();
        let owned = len.div_ceil(team.threads()).div_ceil(block) * block;
        let mut grad_weight = vec![T::Acc::ZERO; len];
        team.for_each(grad_weight.chunks_mut(owned).enumerate(), |(i, slots)| {
            add(0..num_bags, i * owned, slots)
        });
        return grad_weight;
    }
    let shares = (1 + buffers).min(MAX_SHARES);
    let bags_per_share = num_bags.div_ceil(shares);
    let mut sums = team.map(0..shares, |i| {
        let mut sums = vec![T::Acc::ZERO; len];
        let start = (i * bags_per_share).min(num_bags);
        let end = (start + bags_per_share).min(num_bags);
        add(start..end, 0, &mut sums);
        sums
    });
    let buffers = sums.split_off(1);
    let mut grad_weight = sums.swap_remove(0);
    let chunk = len.div_ceil(team.threads()).max(1 << 12);
    team.for_each(grad_weight.chunks_mut(chunk).enumerate(), |(i, sums)| {
        for buffer in &buffers {
            for (sum, &value) in sums.iter_mut().zip(&buffer[i * chunk..]) {
                *sum += value;
            }
        }
    });
    grad_weight
}

/// Adds what some bags have for the slots from `first_slot` on.
struct Add<'a, const BLOCK: usize, T: Load, H: Locate> {
    call: &'a Call<'a, T, H>,
    grad_output: &'a [T],
    bags: Range<usize>,
    first_slot: usize,
    slots: &'a mut [T::Acc],
}

impl<const BLOCK: usize, T: Load, H: Locate> Loop for Add<'_, BLOCK, T, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        let Self {
            call, grad_output, ..
        } = self;
        let (block, embedding_dim) = (call.block::<BLOCK>(), call.embedding_dim());
        let column_blocks = call.column_blocks.len();
        let mut founds = [Found::default(), Found::default()];
        let mut window = call.window(self.bags.clone());
        while let Some((bag, rows)) = window.take_next() {
            let grads = &grad_output[bag * embedding_dim..(bag + 1) * embedding_dim];
            let scale = call.mean_scale(bag);
            let terms = |column_block: usize| Terms {
                rows: &rows,
                blocks: rows.blocks(column_block),
                grad: &grads[column_block * block..embedding_dim.min((column_block + 1) * block)],
                scale,
            };
            if self.slots.len() == call.hashed_weight.len() {
                // Every row has its slots here.
                for column_block in 0..column_blocks {
                    self.add(lanes, &terms(column_block), None);
                }
                continue;
            }
            // The slots of a column block are asked for while the column block before is added.
            for column_block in 0..=column_blocks {
                let [even, odd] = &mut founds;
                let (next, found) = match column_block % 2 {
                    0 => (even, odd),
                    _ => (odd, even),
                };
                if column_block < column_blocks {
                    self.find(&rows, column_block, next);
                }
                if column_block > 0 {
                    self.add(lanes, &terms(column_block - 1), Some(found));
                }
            }
        }
    }
}

/// What one column block of some rows of a bag adds.
struct Terms<'a, T: Load, P> {
    rows: &'a Rows<'a, P>,
    blocks: Blocks<'a, P>,
    grad: &'a [T],
    /// In mode mean, what multiplies them.
    scale: Option<T::Acc>,
}

impl<const BLOCK: usize, T: Load, H: Locate> Add<'_, BLOCK, T, H> {
    /// The first slot of row `row` of a column block, and its signs.
    #[inline(always)]
    fn locate(&self, blocks: &Blocks<H::Place>, row: usize) -> (usize, u32) {
        self.call.locate(blocks, row, self.call.block::<BLOCK>())
    }

    /// What multiplies the terms of row `row`.
    #[inline(always)]
    fn scale(&self, terms: &Terms<T, H::Place>, row: usize) -> Option<T::Acc> {
        let weight = || self.call.sample_weight(terms.rows, row);
        terms.scale.or_else(weight)
    }

    /// Finds the rows of a column block that have slots in the slice, and asks for the memory of those.
    #[inline(always)]
    fn find(&self, rows: &Rows<H::Place>, column_block: usize, found: &mut Found) {
        let block = self.call.block::<BLOCK>();
        let blocks = rows.blocks(column_block);
        let end = self.slots.len() + block - 1;
        let start = |row| self.locate(&blocks, row).0.wrapping_sub(self.first_slot);
        found.note((0..rows.len()).map(|row| start(row).wrapping_add(block - 1) < end));
        for &row in found.rows() {
            prefetch(self.slots.as_ptr().wrapping_add(start(row.into())));
        }
    }

    /// Adds terms to the slots of those of their rows that were found; of all rows, where nothing was looked for.
    #[inline(always)]
    fn add<L: Lanes>(&mut self, lanes: L, terms: &Terms<T, H::Place>, found: Option<&Found>) {
        match (terms.grad.first_chunk::<BLOCK>(), found) {
            (Some(grad), None) if BLOCK > 0 && self.call.is_weighted() => {
                self.add_all::<true, _>(lanes, terms, grad)
            }
            (Some(grad), None) if BLOCK > 0 => self.add_all::<false, _>(lanes, terms, grad),
            (Some(grad), Some(found)) if BLOCK > 0 => self.add_found(lanes, terms, found, grad),
            _ => self.add_any(lanes, terms, found),
        }
    }

    /// The same where all rows count, for a whole block of constant length. With `WEIGHTED = false`, the weight path is compiled
    /// out.
    #[inline(always)]
    fn add_all<const WEIGHTED: bool, L: Lanes>(
        &mut self,
        lanes: L,
        terms: &Terms<T, H::Place>,
        grad: &[T; BLOCK],
    ) {
        // A copy, which stays in registers: what is added to might be the same memory for all the compiler knows.
        let grad = *grad;
        for row in 0..terms.rows.len() {
            let (slot, signs) = self.locate(&terms.blocks, row);
            if BLOCK > 1 {
                let ahead = self
                    .call
                    .hash
                    .slot(terms.blocks.place(row + ADD_AHEAD), BLOCK);
                prefetch(self.slots.as_ptr().wrapping_add(ahead));
            }
            let scale = if WEIGHTED {
                self.scale(terms, row)
            } else {
                terms.scale
            };
            let slots = &mut self.slots[slot..slot + BLOCK];
            combine::<Sum, T, _>(lanes, slots, &grad, signs, scale);
        }
    }

    /// The same for those rows that were found.
    #[inline(always)]
    fn add_found<L: Lanes>(
        &mut self,
        lanes: L,
        terms: &Terms<T, H::Place>,
        found: &Found,
        grad: &[T; BLOCK],
    ) {
        let last = self.slots.len().checked_sub(BLOCK);
        for &row in found.rows() {
            let row = usize::from(row);
            let (slot, signs) = self.locate(&terms.blocks, row);
            let start = slot.wrapping_sub(self.first_slot);
            if last.is_some_and(|last| start <= last) {
                let scale = self.scale(terms, row);
                let slots = &mut self.slots[start..start + BLOCK];
                combine::<Sum, T, _>(lanes, slots, grad, signs, scale);
            } else {
                self.add_edge(terms, row, start, signs);
            }
        }
    }

    /// The same for a block of any length: one that has no loop of its own, or the last of a row, which is cut off.
    #[inline(always)]
    fn add_any<L: Lanes>(&mut self, lanes: L, terms: &Terms<T, H::Place>, found: Option<&Found>) {
        let n = found.map_or(terms.rows.len(), |found| found.n);
        for i in 0..n {
            let row = found.map_or(i, |found| found.rows[i].into());
            let (slot, signs) = self.locate(&terms.blocks, row);
            let start = slot.wrapping_sub(self.first_slot);
            let scale = self.scale(terms, row);
            let end = start.wrapping_add(terms.grad.len());
            match self.slots.get_mut(start..end) {
                Some(slots) => {
                    combine::<Sum, _, _>(lanes, slots, terms.grad, signs, scale);
                }
                None => self.add_edge(terms, row, start, signs),
            }
        }
    }

    /// The same for a row at the edge of the slice, which a block of an affine hash may straddle: for what is inside.
    fn add_edge(&mut self, terms: &Terms<T, H::Place>, row: usize, start: usize, signs: u32) {
        let scale = self.scale(terms, row);
        for (i, grad) in terms.grad.iter().enumerate() {
            if let Some(sum) = self.slots.get_mut(start.wrapping_add(i)) {
                let grad = scale.unwrap_or(T::Acc::ONE) * grad.widen();
                *sum += grad.flip(signs, i);
            }
        }
    }
}

/// Window indices of the rows whose slots fall in this thread's slice.
struct Found {
    rows: [u8; MAX_ROWS],
    n: usize,
}

impl Default for Found {
    fn default() -> Self {
        Self {
            rows: [0; MAX_ROWS],
            n: 0,
        }
    }
}

impl Found {
    /// Notes those of the next `wanted.len()` rows that are wanted. Without a branch, which no processor could foretell.
    #[inline(always)]
    fn note(&mut self, wanted: impl Iterator<Item = bool>) {
        // Counted here and not in `self`, where each row would wait for the count of the row before.
        let mut n = 0;
        for (row, is_wanted) in wanted.take(MAX_ROWS).enumerate() {
            self.rows[n % MAX_ROWS] = row as u8;
            n += usize::from(is_wanted);
        }
        self.n = n;
    }

    fn rows(&self) -> &[u8] {
        &self.rows[..self.n]
    }
}
