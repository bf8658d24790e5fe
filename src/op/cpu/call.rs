//! One lookup on the CPU as slices, with what is computed once per call.

use super::combine::Load;
use super::scalar::Accumulator;
use super::window::{Blocks, Rows, Window};
use super::{slice, MIN_DIVIDED_VALUES, MIN_VALUES_PER_THREAD};
use crate::bags::{Bag, BagShape, Index};
use crate::bounds::{BadRow, BoundsCheck};
use crate::error::bail;
use crate::hash::Locate;
use crate::op::{Lookup, Mode, Operands, View};
use crate::parallel::Team;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Error, Result};
use std::ops::{Deref, Range};

/// So that a thread which comes late, or has heavier bags, leaves its share to others.
const TASKS_PER_THREAD: usize = 8;

/// Evaluates `$body` with `$slice` the slice of some [`Indices`], whatever their dtype.
macro_rules! with_slice {
    ($indices:expr, $slice:ident => $body:expr) => {
        match $indices {
            Indices::U32($slice) => $body,
            Indices::I32($slice) => $body,
            Indices::I64($slice) => $body,
        }
    };
}
pub(super) use with_slice;

/// Indices or offsets.
#[derive(Clone, Copy)]
pub(super) enum Indices<'a> {
    U32(&'a [u32]),
    I32(&'a [i32]),
    I64(&'a [i64]),
}

impl<'a> Indices<'a> {
    pub fn new(indices: View<'a, CpuStorage>) -> Result<Self> {
        Ok(match indices.0.dtype() {
            DType::U32 => Self::U32(slice(indices)?),
            DType::I32 => Self::I32(slice(indices)?),
            _ => Self::I64(slice(indices)?),
        })
    }

    pub fn len(&self) -> usize {
        with_slice!(self, indices => indices.len())
    }

    #[inline(always)]
    pub fn at(&self, position: usize) -> i64 {
        with_slice!(self, indices => indices[position].as_i64())
    }
}

/// The indices of a bag, clamped whatever the offsets say.
#[inline(always)]
pub(super) fn range(bags: &BagShape, offsets: Option<Indices>, bag: Bag) -> Range<usize> {
    match offsets {
        None => bags.range::<i64>(bag, &[]),
        Some(offsets) => with_slice!(offsets, offsets => bags.range(bag, offsets)),
    }
}

/// Which rows each bag holds.
#[derive(Clone, Copy)]
pub(super) struct BagRows<'a> {
    pub lookup: &'a Lookup,
    indices: Indices<'a>,
    offsets: Option<Indices<'a>>,
}

impl BagRows<'_> {
    pub fn num_bags(&self) -> usize {
        self.lookup.bags.num_bags
    }

    /// The number of indices, whether in a bag or not.
    pub fn nnz(&self) -> usize {
        self.indices.len()
    }

    /// The positions of the indices of a bag.
    #[inline(always)]
    pub fn range(&self, bag: Bag) -> Range<usize> {
        range(&self.lookup.bags, self.offsets, bag)
    }

    /// The length of bags that all have one, where all are of one feature.
    pub fn plain_bag_len(&self) -> Option<usize> {
        let Lookup { table, bags, .. } = self.lookup;
        let is_plain = table.tables.num_features() == 1 && table.padding_idx.is_none();
        bags.bag_len().filter(|&bag_len| is_plain && bag_len > 0)
    }

    /// Whether the index at `position` is no padding.
    #[inline(always)]
    pub fn counts(&self, position: usize) -> bool {
        let table = &self.lookup.table;
        table.padding_idx.is_none() || table.counts(self.indices.at(position))
    }

    /// Reads some indices of a feature as rows of the virtual table.
    #[inline(always)]
    pub fn read(&self, feature: usize, positions: Range<usize>, rows: &mut [u64]) {
        #[inline(always)]
        fn widen(indices: &[impl Index], first_row: i64, rows: &mut [u64]) {
            for (row, index) in rows.iter_mut().zip(indices) {
                *row = index.as_i64().wrapping_add(first_row) as u64;
            }
        }
        let first_row = self.lookup.table.tables.first_row(feature);
        with_slice!(self.indices, indices => widen(&indices[positions], first_row, rows));
    }

    /// The first row of some bags that is out of range, where that is looked for.
    pub fn first_bad_row(&self, of: Range<usize>) -> Option<BadRow> {
        let Lookup { table, bags, .. } = self.lookup;
        if self.lookup.bounds_check == BoundsCheck::Off {
            return None;
        }
        let ranges = |bag| self.range(bag);
        with_slice!(self.indices, indices => {
            BadRow::find(indices, ranges, of, bags, &table.tables, table.padding_idx)
        })
    }

    pub fn error(&self, bad: &BadRow) -> Error {
        with_slice!(self.indices, indices => bad.error(indices, &self.lookup.table.tables))
    }
}

/// The rows of a lookup and their hash: its inputs but for the weights.
pub(super) struct HashedRows<'a, H: Locate> {
    pub rows: BagRows<'a>,
    pub hash: H,
    /// What the hash knows of each block of columns.
    pub column_blocks: Vec<H::ColumnBlock>,
}

impl<'a, H: Locate> HashedRows<'a, H> {
    /// For a `hashed_weight` of `len` values.
    pub fn new(
        lookup: &'a Lookup,
        hash: H,
        operands: &Operands<'a, CpuStorage>,
        len: usize,
    ) -> Result<Self> {
        let column_blocks = lookup.table.embedding_dim.div_ceil(hash.block());
        // The loops rely on this; see `Window::fill`.
        let end = hash.slot(hash.last_place(), hash.block()) + hash.block();
        if end > len {
            bail!("hashed_weight must hold {end} values, got {len}");
        }
        Ok(Self {
            rows: BagRows {
                lookup,
                indices: Indices::new(operands.indices)?,
                offsets: operands.offsets.map(Indices::new).transpose()?,
            },
            column_blocks: (0..column_blocks as u64)
                .map(|i| hash.column_block(i))
                .collect(),
            hash,
        })
    }

    pub fn num_bags(&self) -> usize {
        self.rows.num_bags()
    }

    pub fn embedding_dim(&self) -> usize {
        self.rows.lookup.table.embedding_dim
    }

    pub fn mode(&self) -> Mode {
        self.rows.lookup.table.mode
    }

    /// How many values all bags gather.
    pub fn gathered_values(&self) -> usize {
        self.rows.nnz().saturating_mul(self.embedding_dim())
    }

    /// The threads to gather all values with.
    pub fn team(&self) -> Team {
        let values = self.gathered_values();
        Team::new(match values < MIN_DIVIDED_VALUES {
            true => 1,
            false => values / MIN_VALUES_PER_THREAD,
        })
    }

    /// How many bags make a task: a few tasks for each thread, of at least [`MIN_VALUES_PER_THREAD`].
    pub fn bags_per_task(&self, team: &Team) -> usize {
        let tasks = match team.threads() {
            1 => 1,
            threads => {
                let most = self.gathered_values() / MIN_VALUES_PER_THREAD;
                most.min(TASKS_PER_THREAD * threads)
            }
        };
        self.num_bags().div_ceil(tasks).max(1)
    }

    /// The rows of some bags, hashed; with the positions of rows if `positions`.
    pub fn window_noting(&self, bags: Range<usize>, positions: bool) -> Window<'_, H> {
        Window::new(self.rows, self.hash, &self.column_blocks, bags, positions)
    }

    /// The length of a block: BLOCK, which is that of the hash or 0 for a block that has no loop of its own.
    #[inline(always)]
    pub fn block<const BLOCK: usize>(&self) -> usize {
        if BLOCK > 0 {
            BLOCK
        } else {
            self.hash.block()
        }
    }

    /// The first slot of row `i`, and a sign bit for each column; zero where there are no signs. `block` is that of the hash,
    /// which the caller may have as a constant.
    #[inline(always)]
    pub fn locate(&self, blocks: &Blocks<H::Place>, i: usize, block: usize) -> (usize, u32) {
        let signs = if H::SIGNED { blocks.signs(i) } else { 0 };
        (self.hash.slot(blocks.place(i), block), signs)
    }
}

/// Inputs of one lookup as CPU slices, with what is computed once per call.
pub(super) struct Call<'a, T, H: Locate> {
    hashed: HashedRows<'a, H>,
    pub hashed_weight: &'a [T],
    per_sample_weights: Option<&'a [T]>,
}

impl<'a, T, H: Locate> Deref for Call<'a, T, H> {
    type Target = HashedRows<'a, H>;

    #[inline(always)]
    fn deref(&self) -> &Self::Target {
        &self.hashed
    }
}

impl<'a, T: Load, H: Locate> Call<'a, T, H> {
    /// Bit `i` is set where blocks of `i` columns have loops of their own; see [`with_block`]. Blocks of affine hashes are seldom
    /// longer than 1.
    pub const CONSTANT_BLOCKS: u64 = if H::SIGNED {
        T::CONSTANT_BLOCKS
    } else {
        T::CONSTANT_BLOCKS & 1 << 1
    };

    pub fn new(lookup: &'a Lookup, hash: H, operands: &Operands<'a, CpuStorage>) -> Result<Self> {
        let hashed_weight: &[T] = slice(operands.hashed_weight)?;
        Ok(Self {
            hashed: HashedRows::new(lookup, hash, operands, hashed_weight.len())?,
            hashed_weight,
            per_sample_weights: operands.per_sample_weights.map(slice).transpose()?,
        })
    }

    pub fn is_weighted(&self) -> bool {
        self.per_sample_weights.is_some()
    }

    /// The per-sample weight of row `i`.
    #[inline(always)]
    pub fn sample_weight(&self, rows: &Rows<H::Place>, i: usize) -> Option<T::Acc> {
        let weights = self.per_sample_weights?;
        Some(weights[rows.position(i)].widen())
    }

    /// The rows of some bags, hashed; with their positions where there are per-sample weights.
    pub fn window(&self, bags: Range<usize>) -> Window<'_, H> {
        self.window_noting(bags, self.is_weighted())
    }

    /// The values of row `i`, as they are kept, and their signs.
    #[inline(always)]
    pub fn values<const BLOCK: usize>(
        &self,
        blocks: &Blocks<H::Place>,
        i: usize,
    ) -> (&[T; BLOCK], u32) {
        debug_assert_eq!(BLOCK, self.hash.block());
        let (slot, signs) = self.locate(blocks, i, BLOCK);
        // SAFETY: `Window::fill` found every place to be one of the hash of this call, or it is the first place, and
        // `Call::new` found the blocks of all places, which are BLOCK long, to lie in `hashed_weight`.
        let values = unsafe { self.hashed_weight.get_unchecked(slot..slot + BLOCK) };
        match values.first_chunk() {
            Some(values) => (values, signs),
            None => unreachable!("so many were just taken"),
        }
    }

    /// The N values of row `i` from column `at` of its block on, and their signs.
    #[inline(always)]
    pub fn values_at<const BLOCK: usize, const N: usize>(
        &self,
        blocks: &Blocks<H::Place>,
        i: usize,
        at: usize,
    ) -> (&[T; N], u32) {
        let (slot, signs) = self.locate(blocks, i, self.block::<BLOCK>());
        match self.hashed_weight[slot + at..].first_chunk() {
            Some(values) => (values, signs.wrapping_shr(at as u32)),
            None => unreachable!("the columns of a block lie in hashed_weight"),
        }
    }

    /// In mode mean, what multiplies each row of a bag.
    #[inline(always)]
    pub fn mean_scale(&self, bag: usize) -> Option<T::Acc> {
        if self.mode() != Mode::Mean {
            return None;
        }
        let positions = self.rows.range(self.rows.lookup.bags.bag(bag));
        let count = match self.rows.lookup.table.padding_idx {
            None => positions.len(),
            Some(_) => positions.filter(|&at| self.rows.counts(at)).count(),
        };
        Some(T::Acc::ONE / T::Acc::from_count(count.max(1)))
    }
}

/// Evaluates `$body` with `$block` as a constant and `$lanes` as chosen by [`Blocked::of`] a length and what lengths are
/// constants. The constant is 0 for a block that has no loop of its own.
macro_rules! with_block {
    ($len:expr, $constants:expr, $block:ident, $lanes:ident => $body:expr) => {{
        use $crate::op::cpu::lanes::Blocked;
        macro_rules! case {
            ($value:literal, $chosen:ident) => {{
                const $block: usize = $value;
                // Constant, so that what is not asked for is not compiled.
                if $block > 0 && $constants >> $block & 1 == 0 {
                    unreachable!("Blocked::of chooses constant blocks")
                }
                let $lanes = $chosen;
                $body
            }};
        }
        match Blocked::of($len, $constants) {
            Blocked::One(lanes) => case!(1, lanes),
            Blocked::Four(lanes) => case!(4, lanes),
            Blocked::Eight(lanes) => case!(8, lanes),
            Blocked::Sixteen(lanes) => case!(16, lanes),
            #[cfg(target_arch = "x86_64")]
            Blocked::SixteenAvx512(lanes) => case!(16, lanes),
            Blocked::ThirtyTwo(lanes) => case!(32, lanes),
            #[cfg(target_arch = "x86_64")]
            Blocked::ThirtyTwoAvx512(lanes) => case!(32, lanes),
            Blocked::Any(lanes) => case!(0, lanes),
            Blocked::AnyPortable(lanes) => case!(0, lanes),
        }
    }};
}
pub(super) use with_block;
