//! The mix family: every block of every row at a random place, by SplitMix64.

use super::block::BlockSlots;

/// A member of the mix family: rows at random places, by SplitMix64 of `(seed, row, column / block)`.
///
/// By chance, some blocks serve many more rows than others. This costs quality unless every block serves dozens of rows;
/// [`Balanced`](super::Balanced) spreads rows evenly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mix {
    /// Two layers with different seeds fold their tables differently.
    pub seed: u64,
    /// How many consecutive columns share a hash and lie side by side: `1..=2^24`, at most 32 if signed.
    pub block: usize,
    /// Whether every value is multiplied by +1 or -1; see [`Balanced::signed`](super::Balanced::signed).
    pub signed: bool,
}

impl Mix {
    /// Signed, with seed 0.
    pub const fn new(block: usize) -> Self {
        Self {
            seed: 0,
            block,
            signed: true,
        }
    }

    /// Binds the hash to a length that has passed [`Hash::check_len`](super::Hash::check_len).
    pub(super) fn bind(&self, len: usize) -> BlockSlots {
        BlockSlots::new(self.seed, self.block, self.signed, len, |_| 0)
    }
}

/// The increment of SplitMix64: `2^64` divided by the golden ratio, made odd.
pub(crate) const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of SplitMix64, a bijection of `u64` in which every input bit affects every output bit.
pub(crate) const fn finalize(mut h: u64) -> u64 {
    h = (h ^ (h >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    h ^ (h >> 31)
}

/// The state from which SplitMix64 computes `column_block` of row 0.
#[inline(always)]
pub(super) fn start(key: u64, column_block: u64) -> u64 {
    key.wrapping_add(column_block.wrapping_add(1).wrapping_mul(GOLDEN))
}

/// [`Locate::locate`](super::Locate::locate) for this family and the semantic one: the start of each column block and the bits that
/// it hashes, with its places and signs. `rows` are rows, or their signatures.
#[inline(always)]
pub(super) fn locate<'a>(
    slots: &BlockSlots,
    rows: &[u64],
    column_blocks: impl Iterator<Item = ((u64, u64), (&'a mut [u32], &'a mut [u32]))>,
) {
    for ((start, mask), (places, signs)) in column_blocks {
        let outputs = places.iter_mut().zip(signs);
        for (row, (place, signs)) in rows.iter().zip(outputs) {
            let h = finalize(start.wrapping_add(row & mask));
            *place = slots.block_at((h >> 32) as u32);
            *signs = h as u32 & slots.sign_mask;
        }
    }
}
