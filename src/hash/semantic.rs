//! The semantic family: LMA's idea with this crate's mixing, blocks and signs.
//!
//! The mix family hashes the number of a row. This one hashes, in the same way, those keys of the row's signature that a column
//! block selects. So two rows share a block, with the same signs, if they agree in these keys, and else only by chance.

use super::block::BlockSlots;

/// A member of the semantic family: rows whose signatures agree in some keys share blocks. docs/format.md has the formula.
///
/// It reads a signature of each row, from a tensor beside `hashed_weight`: `signatures`, i64, `(rows,)`. A signature is
/// `64 / key_bits` keys, the first in the lowest bits; [`semantic`](crate::semantic) computes signatures from records. Column block
/// `i` selects `keys_to_use` consecutive keys from number `i` on, counted round.
///
/// With MinHashes as keys, two rows share a block with a probability of about `J^keys_to_use`, where `J` is the Jaccard similarity
/// of the sets of records that hold them. Blocks of a row are chosen by different keys, so similar rows share some of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Semantic {
    /// Two layers with different seeds fold their tables differently.
    pub seed: u64,
    /// The bits of a key: 1, 2, 4, 8, 16 or 32.
    pub key_bits: usize,
    /// How many keys of a signature a column block depends on: `1..=64 / key_bits`.
    pub keys_to_use: usize,
    /// How many consecutive columns share a hash and lie side by side: `1..=2^24`, at most 32 if signed.
    pub block: usize,
    /// Whether every value is multiplied by +1 or -1, so that rows that share a block by chance are not copies of each other.
    pub signed: bool,
}

impl Semantic {
    /// Signed, with seed 0 and two keys of 16 bits.
    pub const fn new(block: usize) -> Self {
        Self {
            seed: 0,
            key_bits: 16,
            keys_to_use: 2,
            block,
            signed: true,
        }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let Self {
            key_bits,
            keys_to_use,
            ..
        } = *self;
        if !key_bits.is_power_of_two() || key_bits > 32 {
            return Err(format!(
                "key_bits of a semantic hash must be 1, 2, 4, 8, 16 or 32, got {key_bits}"
            ));
        }
        let keys = 64 / key_bits;
        if !(1..=keys).contains(&keys_to_use) {
            return Err(format!(
                "keys_to_use of a semantic hash must lie in 1..={keys} where keys have {key_bits} bits, got {keys_to_use}"
            ));
        }
        Ok(())
    }

    /// Binds the hash to a length that has passed [`Hash::check_len`](super::Hash::check_len).
    pub(super) fn bind(&self, len: usize) -> (BlockSlots, Keys) {
        let slots = BlockSlots::new(self.seed, self.block, self.signed, len, |_| 0);
        let keys = Keys {
            first: u64::MAX >> (64 - self.key_bits * self.keys_to_use),
            key_bits: self.key_bits as u32,
        };
        (slots, keys)
    }
}

/// Which keys of a signature each column block selects.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Keys {
    /// The bits of those of column block 0.
    pub(crate) first: u64,
    pub(crate) key_bits: u32,
}

impl Keys {
    /// The bits of the keys that a column block selects.
    #[inline(always)]
    pub(super) fn of(&self, column_block: u64) -> u64 {
        // A rotation by a multiple of 64 is none.
        let bits = (column_block as u32).wrapping_mul(self.key_bits) % 64;
        self.first.rotate_left(bits)
    }
}
