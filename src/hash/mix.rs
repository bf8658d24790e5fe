//! The mix family: every block of every row at a random place, by SplitMix64.

use super::block::BlockSlots;
use super::{balanced, checked_block};
use serde::{Deserialize, Serialize};

/// A member of the native hash family; made by [`Hash::balanced`] or [`Hash::mix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "MixFields", into = "MixFields")]
pub struct Mix {
    pub(super) seed: u64,
    pub(super) block: u32,
    pub(super) signed: bool,
    pub(super) balanced: bool,
}

impl Mix {
    /// The seed; two layers with different seeds fold their tables differently.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Whether every block serves as many rows as any other.
    pub fn balanced(&self) -> bool {
        self.balanced
    }

    /// Binds the hash to a length that suits it.
    pub(super) fn bind(&self, len: usize) -> BlockSlots {
        let num_blocks = len / self.block as usize;
        BlockSlots {
            key: finalize(self.seed),
            reciprocal: balanced::reciprocal(num_blocks),
            num_blocks: num_blocks as u32,
            block: self.block,
            sign_mask: if self.signed { u32::MAX } else { 0 },
            stride: if self.balanced {
                balanced::stride(num_blocks)
            } else {
                0
            },
        }
    }

    pub(super) fn checked(fields: MixFields) -> std::result::Result<Self, String> {
        let block = checked_block(fields.block)?;
        if fields.signed && block > 32 {
            return Err(format!(
                "hash: a signed mix block must be at most 32, got {block}"
            ));
        }
        Ok(Self {
            seed: fields.seed,
            block,
            signed: fields.signed,
            balanced: fields.balanced,
        })
    }
}

/// How a [`Mix`] stands in a checkpoint; reading one goes through the same checks as [`Hash::mix`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MixFields {
    pub(super) seed: u64,
    pub(super) block: u64,
    pub(super) signed: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) balanced: bool,
}

impl TryFrom<MixFields> for Mix {
    type Error = String;
    fn try_from(fields: MixFields) -> std::result::Result<Self, String> {
        Self::checked(fields)
    }
}

impl From<Mix> for MixFields {
    fn from(mix: Mix) -> Self {
        Self {
            seed: mix.seed,
            block: mix.block.into(),
            signed: mix.signed,
            balanced: mix.balanced,
        }
    }
}

/// The increment of SplitMix64: `2^64` divided by the golden ratio, made odd.
pub(super) const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of SplitMix64, a bijection of `u64` in which every input bit affects every output bit.
pub(super) const fn finalize(mut h: u64) -> u64 {
    h = (h ^ (h >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    h ^ (h >> 31)
}

/// Where SplitMix64 starts for `column_block` of row 0.
#[inline(always)]
pub(super) fn start(key: u64, column_block: u64) -> u64 {
    key.wrapping_add(column_block.wrapping_add(1).wrapping_mul(GOLDEN))
}

/// [`Locate::locate`](super::Locate::locate) for this family.
#[inline(always)]
pub(super) fn locate(
    slots: &BlockSlots,
    rows: &[u64],
    column_blocks: &[u64],
    places: &mut [u32],
    signs: &mut [u32],
) {
    let n = rows.len();
    let outputs = places.chunks_exact_mut(n).zip(signs.chunks_exact_mut(n));
    for (start, (places, signs)) in column_blocks.iter().zip(outputs) {
        let outputs = places.iter_mut().zip(signs);
        for (row, (place, signs)) in rows.iter().zip(outputs) {
            let h = finalize(start.wrapping_add(*row));
            *place = slots.block_at((h >> 32) as u32);
            *signs = h as u32 & slots.sign_mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The hash before it is scaled to a block number: `(seed, row, column_block) -> h`.
    #[test]
    fn mix_is_splitmix64() {
        for (seed, row, column_block, want) in [
            (0, 0, 0, 0xe220_a839_7b1d_cdaf),
            (0, 0, 1, 0x6e78_9e6a_a1b9_65f4),
            (0, 1, 0, 0x910a_2dec_8902_5cc1),
            (42, 123_456_789, 7, 0x3502_a7e4_2ada_2c11),
            (0, 1 << 40, 3, 0xeee0_c8b0_e2b2_6a14),
            (0, -1i64 as u64, 0, 0xe4d9_7177_1b65_2c20),
        ] {
            let h = finalize(start(finalize(seed), column_block).wrapping_add(row));
            assert_eq!(h, want, "seed {seed} row {row} block {column_block}");
        }
    }
}
