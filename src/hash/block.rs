//! What the families with aligned blocks share: a place is a block number, and there are sign bits.
//!
//! Mix, balanced, semantic and slot tables are one type here, so that the CPU loops are compiled once for all of them. Telling them
//! apart costs one branch per window of rows.

use super::lma::read_signatures;
use super::semantic::Keys;
use super::{balanced, mix, Locate, MAX_ROWS};

/// A hash with aligned blocks, bound to a length. CUDA kernels take it as it is: it is the twin of `BlockSlots` in
/// `kernels/hash.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct BlockSlots {
    /// The seed, passed through [`mix::finalize`].
    pub(crate) key: u64,
    /// `2^64 / num_blocks`, rounded up, so that row `num_blocks` begins a stratum; 0 stands for `2^64`.
    pub(crate) reciprocal: u64,
    pub(crate) num_blocks: u32,
    pub(crate) block: u32,
    /// All ones where values are signed, else zero.
    pub(crate) sign_mask: u32,
    /// The distance between consecutive rows of the balanced family, in blocks; 0 for the other families.
    pub(crate) stride: u32,
}

impl BlockSlots {
    /// Binds a hash to a `len` that has passed the checks. `stride` computes the stride for a number of blocks.
    pub(super) fn new(
        seed: u64,
        block: usize,
        signed: bool,
        len: usize,
        stride: impl Fn(usize) -> u32,
    ) -> Self {
        let num_blocks = len / block;
        Self {
            key: mix::finalize(seed),
            reciprocal: (u64::MAX / num_blocks as u64).wrapping_add(1),
            num_blocks: num_blocks as u32,
            block: block as u32,
            sign_mask: if signed { u32::MAX } else { 0 },
            stride: stride(num_blocks),
        }
    }

    /// Scales `x`, a fraction of `2^32`, to a block number: `floor(x * num_blocks / 2^32)`.
    #[inline(always)]
    pub(super) fn block_at(&self, x: u32) -> u32 {
        ((u64::from(x) * u64::from(self.num_blocks)) >> 32) as u32
    }
}

/// [`BlockSlots`] for the CPU, with what is hashed of each row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockRows<'a> {
    pub(super) slots: BlockSlots,
    pub(super) family: BlockFamily<'a>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum BlockFamily<'a> {
    Mix,
    Balanced,
    /// Some keys of the row's signature. There is at least one row.
    Semantic(&'a [i64], Keys),
    /// None of it: the blocks of each row, of which there are so many, are given. There is at least one row.
    SlotTable(&'a [u32], usize),
}

/// The constants of a column block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockColumns {
    /// The result of [`mix::start`] or [`balanced::start`]; for slot tables, the number of the column block.
    start: u64,
    /// For the semantic family, the bits of the keys that it selects.
    keys: u64,
}

/// A place is a block number.
impl Locate for BlockRows<'_> {
    type ColumnBlock = BlockColumns;
    type Place = u32;
    const SIGNED: bool = true;

    #[inline(always)]
    fn block(&self) -> usize {
        self.slots.block as usize
    }

    #[inline(always)]
    fn column_block(&self, number: u64) -> BlockColumns {
        let key = self.slots.key;
        let (start, keys) = match self.family {
            BlockFamily::Mix => (mix::start(key, number), u64::MAX),
            BlockFamily::Balanced => (balanced::start(key, number), u64::MAX),
            BlockFamily::Semantic(_, keys) => (mix::start(key, number), keys.of(number)),
            BlockFamily::SlotTable(..) => (number, u64::MAX),
        };
        BlockColumns { start, keys }
    }

    #[inline(always)]
    fn locate(
        &self,
        rows: &[u64],
        column_blocks: &[BlockColumns],
        places: &mut [u32],
        signs: &mut [u32],
    ) {
        let (slots, n) = (&self.slots, rows.len());
        let blocks = places.chunks_exact_mut(n).zip(signs.chunks_exact_mut(n));
        let columns = column_blocks.iter();
        match self.family {
            BlockFamily::Balanced => {
                let starts = columns.map(|columns| columns.start);
                balanced::locate(slots, rows, starts.zip(blocks));
            }
            BlockFamily::Mix => {
                let starts = columns.map(|columns| (columns.start, u64::MAX));
                mix::locate(slots, rows, starts.zip(blocks));
            }
            BlockFamily::Semantic(signatures, _) => {
                let mut of_rows = [0; MAX_ROWS];
                let of_rows = &mut of_rows[..n];
                read_signatures(signatures, rows, of_rows);
                let starts = columns.map(|columns| (columns.start, columns.keys));
                mix::locate(slots, of_rows, starts.zip(blocks));
            }
            BlockFamily::SlotTable(table, row_len) => {
                // Rows past the last, which only a lookup without bounds checks has, read the last; and a table that was changed
                // after it was checked still leads to blocks that exist.
                let (last_row, last) = ((table.len() / row_len) as u64 - 1, self.last_place());
                for (columns, (places, signs)) in columns.zip(blocks) {
                    for (place, &row) in places.iter_mut().zip(rows) {
                        let row = row.min(last_row) as usize;
                        *place = table[row * row_len + columns.start as usize].min(last);
                    }
                    signs.fill(0);
                }
            }
        }
    }

    #[inline(always)]
    fn slot(&self, place: u32, block: usize) -> usize {
        place as usize * block
    }

    #[inline(always)]
    fn last_place(&self) -> u32 {
        self.slots.num_blocks - 1
    }
}
