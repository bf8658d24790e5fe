//! The gradient of mode max: the row that won each column of each bag, and then the sum of what the winners get.

use super::call::Call;
use super::combine::{Load, Vector};
use super::lanes::{prefetch, raise_noting, up_to_avx2, widest, Lanes, Loop};
use super::scalar::Accumulator;
use super::terms::{Scatter, Slots, Terms};
use super::window::Blocks;
use crate::hash::Locate;
use std::ops::Range;

/// Adds what the winners get to `slots`: a term for each column of each bag.
pub(super) fn add<T: Load, H: Locate>(call: &Call<T, H>, grad_output: &[T], slots: Slots<T::Acc>) {
    let gradient = Scatter {
        team: call.team(),
        grad_output,
        embedding_dim: call.embedding_dim(),
        num_terms: grad_output.len(),
        block: 1,
    };
    let add = |bags: Range<usize>, slots: Slots<T::Acc>| {
        find(call, bags, &mut |first, winners| {
            let grads = &grad_output[first..];
            for (winner, grad) in winners.iter().zip(grads) {
                slots.values[winner.slot()] += grad.widen().flip(winner.signs(), 0);
                slots.mark(winner.slot(), 1);
            }
        });
    };
    let write = |bags: Range<usize>, terms: &mut Terms<()>| {
        find(call, bags, &mut |first, winners| {
            terms.reserve(winners.len());
            for (grad, winner) in (first..).zip(winners) {
                terms.push(winner.slot(), 1, winner.signs(), grad, ());
            }
        });
    };
    gradient.sum(slots, &add, &write);
}

/// What is done with the winners of a bag, `(embedding_dim,)`, and the position of its first column in grad_output.
type Award<'a> = &'a mut dyn FnMut(usize, &[Winner]);

/// Finds the winners of some bags. A bag without rows has none.
fn find<T: Load, H: Locate>(call: &Call<T, H>, bags: Range<usize>, award: Award) {
    if call.hash.block() == 1 && Call::<T, H>::CONSTANT_BLOCKS >> 1 & 1 == 1 {
        widest(Contests::<1, _, _> { call, bags, award });
    } else {
        up_to_avx2(Contests::<0, _, _> { call, bags, award });
    }
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

    #[inline(always)]
    fn slot(self) -> usize {
        (self.0 >> 1) as usize
    }

    /// 1 where its value is negated.
    #[inline(always)]
    fn signs(self) -> u32 {
        (self.0 & 1) as u32
    }
}

/// Finds the winners of some bags. BLOCK is 1, or 0 for any other block.
struct Contests<'a, const BLOCK: usize, T, H: Locate> {
    call: &'a Call<'a, T, H>,
    bags: Range<usize>,
    award: Award<'a>,
}

impl<const BLOCK: usize, T: Load, H: Locate> Loop for Contests<'_, BLOCK, T, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let (call, embedding_dim) = (self.call, self.call.embedding_dim());
        let block = call.block::<BLOCK>();
        let mut window = call.window(self.bags.clone());
        let mut best = vec![T::Acc::ZERO; embedding_dim];
        let mut winners = vec![Winner::NONE; embedding_dim];
        for bag in self.bags {
            let mut is_first = true;
            while let Some(rows) = window.take(bag) {
                let columns = best.chunks_mut(block).zip(winners.chunks_mut(block));
                for (column_block, (best, winners)) in columns.enumerate() {
                    if block > 1 && column_block + 1 < call.column_blocks.len() {
                        let next = rows.blocks(column_block + 1);
                        for i in 0..rows.len() {
                            let slot = call.hash.slot(next.place(i), block);
                            prefetch(call.hashed_weight.as_ptr().wrapping_add(slot));
                        }
                    }
                    let contest = Contest::<BLOCK, T, H> {
                        call,
                        blocks: rows.blocks(column_block),
                        rows: rows.len(),
                        is_first,
                    };
                    let mut at = 0;
                    while at + 8 <= best.len() {
                        contest.hold::<8, _>(lanes, at, best, winners);
                        at += 8;
                    }
                    while at < best.len() {
                        contest.hold::<1, _>(lanes, at, best, winners);
                        at += 1;
                    }
                }
                is_first = false;
            }
            if !is_first {
                (self.award)(bag * embedding_dim, &winners);
            }
        }
    }
}

/// A block of columns of some rows of a bag.
struct Contest<'a, const BLOCK: usize, T, H: Locate> {
    call: &'a Call<'a, T, H>,
    blocks: Blocks<'a, H::Place>,
    rows: usize,
    /// Whether the first of them is the first of the bag, which there is nothing to compare with.
    is_first: bool,
}

impl<const BLOCK: usize, T: Load, H: Locate> Contest<'_, BLOCK, T, H> {
    /// The N columns from `at` on of a row, and their signs.
    #[inline(always)]
    fn values<const N: usize>(&self, row: usize, at: usize) -> ([T::Acc; N], u32) {
        let (values, signs) = self.call.values_at::<BLOCK, N>(&self.blocks, row, at);
        (T::widen_all(values), signs)
    }

    /// Finds the winners of the N columns from `at` on; in registers, where N is 8.
    #[inline(always)]
    fn hold<const N: usize, L: Lanes>(
        &self,
        lanes: L,
        at: usize,
        best: &mut [T::Acc],
        winners: &mut [Winner],
    ) {
        const NO_ROW: u32 = u32::MAX;
        let block = self.call.block::<BLOCK>();
        let (mut sums, mut of, mut start) = ([T::Acc::ZERO; N], [NO_ROW; N], 0);
        sums.copy_from_slice(&best[at..at + N]);
        if self.is_first {
            let (values, signs) = self.values::<N>(0, at);
            for (i, (sum, value)) in sums.iter_mut().zip(values).enumerate() {
                *sum = value.flip(signs, i);
            }
            (of, start) = ([0; N], 1);
        }
        for row in start..self.rows {
            let (values, signs) = self.values::<N>(row, at);
            let eight = sums.first_chunk_mut().zip(of.first_chunk_mut());
            match eight.zip(values.first_chunk()) {
                Some(((sums, of), values)) => {
                    T::Acc::arg_max8(lanes, sums, of, values, signs, row as u32)
                }
                None => raise_noting(&mut sums, &mut of, &values, signs, row as u32),
            }
        }
        best[at..at + N].copy_from_slice(&sums);
        for (i, (winner, row)) in (at..).zip(winners[at..at + N].iter_mut().zip(of)) {
            if row != NO_ROW {
                let row = row as usize;
                let (slot, signs) = self.call.locate(&self.blocks, row, block);
                *winner = Winner::new(slot + i, signs, i);
            }
        }
    }
}
