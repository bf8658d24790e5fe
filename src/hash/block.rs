//! What the mix and the balanced family share: aligned blocks, so that a place is a block number, and sign bits.
//!
//! Both families are one type here, so that the CPU loops are compiled once for the two. Telling them apart costs one branch per
//! window of rows.

use super::{balanced, mix, Locate};

/// A mix or balanced hash bound to a length. CUDA kernels take it as it is: it is the twin of `BlockSlots` in `kernels/hash.cuh`.
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
    /// The distance between consecutive rows of the balanced family, in blocks; 0 for the mix family.
    pub(crate) stride: u32,
}

/// A place is a block number.
impl Locate for BlockSlots {
    /// The result of [`mix::start`] or [`balanced::start`].
    type ColumnBlock = u64;
    type Place = u32;
    const SIGNED: bool = true;

    #[inline(always)]
    fn block(&self) -> usize {
        self.block as usize
    }

    #[inline(always)]
    fn column_block(&self, number: u64) -> u64 {
        if self.is_balanced() {
            balanced::start(self.key, number)
        } else {
            mix::start(self.key, number)
        }
    }

    #[inline(always)]
    fn locate(&self, rows: &[u64], column_blocks: &[u64], places: &mut [u32], signs: &mut [u32]) {
        if self.is_balanced() {
            balanced::locate(self, rows, column_blocks, places, signs);
        } else {
            mix::locate(self, rows, column_blocks, places, signs);
        }
    }

    #[inline(always)]
    fn slot(&self, place: u32, block: usize) -> usize {
        place as usize * block
    }

    #[inline(always)]
    fn last_place(&self) -> u32 {
        self.num_blocks - 1
    }
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

    #[inline(always)]
    fn is_balanced(&self) -> bool {
        self.stride != 0
    }

    /// Scales `x`, a fraction of `2^32`, to a block number: `floor(x * num_blocks / 2^32)`.
    #[inline(always)]
    pub(super) fn block_at(&self, x: u32) -> u32 {
        ((u64::from(x) * u64::from(self.num_blocks)) >> 32) as u32
    }
}
