//! The balanced family: the same number of rows in every block.
//!
//! The rows are divided into *strata* of as many consecutive rows as there are blocks. Each row of a stratum goes to a block of
//! its own: consecutive rows are `stride` blocks apart around the circle of blocks, and the first starts at the stratum's *turn*,
//! a hash of the stratum and of `column / block`. So
//!
//! * every block serves the same number of rows, give or take one if the last stratum is not full; at random places, some blocks
//!   would serve twice as many rows as others;
//! * two rows of one stratum never share a block, and two rows that do share a block share others only by chance.
//!
//! With `x` the row, `n = len / block` and `r = floor((2^64 - 1) / n) + 1`: bits 64 to 95 of `x * r` number the stratum, and
//! `y`, bits 32 to 63, is the position of `x` in it, as a fraction of `2^32`.

use super::block::BlockSlots;
use super::mix::{self, finalize};
use super::MAX_ROWS;

/// A member of the balanced family: the same number of rows in every block, at places that depend on `(seed, column / block)`
/// and on the position of the row in the table. docs/format.md has the formula.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Balanced {
    /// Two layers with different seeds fold their tables differently.
    pub seed: u64,
    /// How many consecutive columns share a hash and lie side by side: `1..=2^24`, at most 32 if signed.
    pub block: usize,
    /// Whether every value is multiplied by +1 or -1, chosen by a bit of a hash of its row, so that rows that share a block are
    /// not copies of each other. Thanks to signs, long blocks and thus wide loads cost next to no quality.
    pub signed: bool,
}

impl Balanced {
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
        BlockSlots::new(self.seed, self.block, self.signed, len, stride)
    }
}

/// The distance of consecutive rows in blocks: the smallest number from 7 on that has no divisor in common with `num_blocks`.
///
/// Neighbouring rows are often the ones used most, so they should not crowd into one part of the memory.
fn stride(num_blocks: usize) -> u32 {
    let has_no_common_divisor = |stride: u64| {
        let (mut a, mut b) = (num_blocks as u64, stride);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a == 1
    };
    // The product of the primes from 7 to 37 exceeds 2^32, so at least one of them qualifies.
    (7..)
        .find(|&stride| has_no_common_divisor(stride))
        .unwrap_or(1) as u32
}

/// The hash of `column_block` that enters each turn, in 32 bits.
#[inline(always)]
pub(super) fn start(key: u64, column_block: u64) -> u64 {
    finalize(mix::start(key, column_block)) >> 32
}

/// The low half of a word. Vector units multiply two such halves in one instruction.
#[inline(always)]
const fn low(x: u64) -> u64 {
    x & 0xFFFF_FFFF
}

/// [`Locate::locate`](super::Locate::locate) for this family: the start of each column block, with its places and signs.
#[inline(always)]
pub(super) fn locate<'a>(
    slots: &BlockSlots,
    rows: &[u64],
    column_blocks: impl Iterator<Item = (u64, (&'a mut [u32], &'a mut [u32]))>,
) {
    let (factor_low, factor_high) = (low(slots.reciprocal), slots.reciprocal >> 32);
    let n = rows.len();
    // What depends on the row alone, in simple loops over separate arrays of 32-bit words, which the compiler vectorises.
    let mut shares = [[0; MAX_ROWS]; 3];
    let [lows, fractions, strata] = &mut shares;
    let (lows, fractions, strata) = (&mut lows[..n], &mut fractions[..n], &mut strata[..n]);
    for (i, &x) in rows.iter().enumerate() {
        // Bits 32 to 95 of x * reciprocal.
        let product = ((low(x) * factor_low) >> 32)
            .wrapping_add(low(x) * factor_high)
            .wrapping_add((x >> 32) * factor_low)
            .wrapping_add(((x >> 32) * factor_high) << 32);
        lows[i] = x as u32;
        fractions[i] = (low(product) * u64::from(slots.stride)) as u32;
        strata[i] = ((product >> 32) * 0x9E37_79B9) as u32;
    }
    for (start, (places, signs)) in column_blocks {
        for i in 0..n {
            // The multipliers and shifts of lowbias32, from Chris Wellons' hash-prospector.
            let turn = strata[i].wrapping_add(start as u32);
            let turn = (turn ^ (turn >> 15)).wrapping_mul(0x846C_A68B);
            places[i] = fractions[i].wrapping_add(turn);
            let bits = (lows[i] ^ turn).wrapping_mul(0x7FEB_352D);
            let bits = (bits ^ (bits >> 15)).wrapping_mul(0x846C_A68B);
            signs[i] = (bits ^ (bits >> 16)) & slots.sign_mask;
        }
        for place in places {
            *place = slots.block_at(*place);
        }
    }
}
