//! The affine family, used by HashedEmbeddingBag and ROBE: linear in row and column block, modulo a constant and then modulo the
//! number of slots at which a block can start.

use super::divisor::Divisor;
use super::MAX_ROWS;
use serde::{Deserialize, Serialize};

/// A member of the affine family: `(row * a + (column / block) * b + c) mod modulus mod (len - block + 1) + column % block`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affine {
    /// The factor of the row.
    pub a: u64,
    /// The factor of `column / block`.
    pub b: u64,
    /// The constant.
    pub c: u64,
    /// The first modulus, before the length; at least 1.
    pub modulus: u64,
    /// How many consecutive columns share a hash and lie side by side, `1..=2^24`.
    pub block: usize,
    /// What happens past the signed 64-bit range.
    pub overflow: Overflow,
}

/// What an affine hash does where `row * a + (column / block) * b + c` leaves the signed 64-bit range.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overflow {
    /// Wraps modulo 2^64, as HashedEmbeddingBag does.
    #[default]
    Wrap,
    /// A layer large enough to get there is refused: ROBE computes in signed integers, where the result would differ.
    Refuse,
}

impl Affine {
    /// Whether this hash must not leave the signed 64-bit range, but would somewhere in this table.
    pub(super) fn overflows(&self, num_embeddings: usize, embedding_dim: usize) -> bool {
        let last_row = num_embeddings.saturating_sub(1) as u128;
        let last_block = (embedding_dim.saturating_sub(1) / self.block) as u128;
        let highest = last_row
            .saturating_mul(u128::from(self.a))
            .saturating_add(last_block.saturating_mul(u128::from(self.b)))
            .saturating_add(u128::from(self.c));
        self.overflow == Overflow::Refuse && highest > i64::MAX as u128
    }

    /// Binds the hash to a length that has passed [`Hash::check_len`](super::Hash::check_len).
    pub(super) fn bind(&self, len: usize) -> AffineSlots {
        AffineSlots {
            a: self.a,
            b: self.b,
            c: self.c,
            modulus: Divisor::new(self.modulus),
            starts: Divisor::new((len - self.block + 1) as u64),
            block: self.block as u32,
        }
    }
}

/// An affine hash bound to a length. CUDA kernels take it as it is: it is the twin of `AffineSlots` in `kernels/hash.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct AffineSlots {
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) c: u64,
    pub(crate) modulus: Divisor,
    /// The number of slots at which a block may start.
    pub(crate) starts: Divisor,
    pub(crate) block: u32,
}

impl AffineSlots {
    /// The slot for a wrapped sum, computed by the formula.
    fn plain(&self, sum: u64) -> u64 {
        self.starts.rem(self.modulus.rem(sum))
    }

    /// The first slot of `column_block` of `row`, computed by the formula.
    pub(super) fn plain_slot(&self, row: u64, column_block: u64) -> usize {
        let sum = row
            .wrapping_mul(self.a)
            .wrapping_add(column_block.wrapping_mul(self.b));
        self.plain(sum.wrapping_add(self.c)) as usize
    }

    /// The share whose remainder modulo `m` is `rest`.
    #[inline(always)]
    fn share(&self, rest: u64) -> AffineShare {
        AffineShare {
            rest: rest as i64,
            slot: self.starts.rem(rest) as i64,
        }
    }
}

/// [`AffineSlots`] for the CPU: locates the blocks of a row without a division for each.
///
/// Write `m` for the modulus, `s` for `starts`, and split the sum of the formula into the row's share, `row * a + c`, and the
/// block's, `column_block * b`, with `share mod m` known for each. The two remainders add up to a number below `2m` that is
/// congruent to the sum, so its remainder is at most one `m` away. Where the sum wraps, it lacks `2^64`: for this case the
/// block's remainder is known a second time, less `2^64 mod m`. The slot follows modulo `s` in the same way: the row's slot is
/// known a second time, less `m mod s`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AffineRows {
    slots: AffineSlots,
    /// `2^64 mod m`
    wrapped: u64,
    /// `m mod s`
    down: u64,
    /// Whether all of these numbers fit signed words; if not, every sum is divided.
    fits: bool,
}

/// The share of a column block in the sum, for sums that do not wrap and for sums that do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AffineBlock {
    /// `column_block * b mod 2^64`
    sum: u64,
    plain: AffineShare,
    wrapped: AffineShare,
}

/// A share modulo `m`, and the result modulo `s`.
#[derive(Debug, Clone, Copy)]
struct AffineShare {
    rest: i64,
    slot: i64,
}

impl From<AffineSlots> for AffineRows {
    fn from(slots: AffineSlots) -> Self {
        let (m, s) = (slots.modulus.value, slots.starts.value);
        Self {
            slots,
            wrapped: ((1u128 << 64) % u128::from(m)) as u64,
            down: m % s,
            fits: m <= 1 << 62 && s <= 1 << 62,
        }
    }
}

impl AffineRows {
    #[inline(always)]
    pub(super) fn block(&self) -> usize {
        self.slots.block as usize
    }

    #[inline(always)]
    pub(super) fn last_place(&self) -> u64 {
        self.slots.starts.value - 1
    }

    pub(super) fn column_block(&self, number: u64) -> AffineBlock {
        let sum = number.wrapping_mul(self.slots.b);
        let modulus = self.slots.modulus;
        let rest = modulus.rem(sum);
        AffineBlock {
            sum,
            plain: self.slots.share(rest),
            wrapped: self.slots.share(sub_mod(rest, self.wrapped, modulus.value)),
        }
    }

    /// The first slots of column blocks of some rows, at most [`MAX_ROWS`]; see [`Locate::locate`](super::Locate::locate).
    #[inline(always)]
    pub(super) fn locate<'b>(
        &self,
        rows: &[u64],
        column_blocks: impl Iterator<Item = &'b AffineBlock>,
        places: &mut [u64],
    ) {
        let AffineSlots {
            a,
            c,
            modulus,
            starts,
            ..
        } = self.slots;
        // The rows' shares, in separate arrays of signed words, which the compiler vectorises: the largest share of a block with
        // which the sum does not wrap, the largest with which the remainders stay below `m`, the slot, and the slot less `m`.
        let n = rows.len();
        let mut shares = [[0; MAX_ROWS]; 4];
        let [sums, rests, slots, slots_down] = &mut shares;
        let (sums, rests) = (&mut sums[..n], &mut rests[..n]);
        let (slots, slots_down) = (&mut slots[..n], &mut slots_down[..n]);
        for i in 0..n {
            let sum = rows[i].wrapping_mul(a).wrapping_add(c);
            let rest = modulus.rem(sum);
            let slot = starts.rem(rest);
            sums[i] = ordered(!sum);
            rests[i] = (modulus.value - 1 - rest) as i64;
            slots[i] = slot as i64;
            slots_down[i] = sub_mod(slot, self.down, starts.value) as i64;
        }
        for (share, places) in column_blocks.zip(places.chunks_exact_mut(n)) {
            if !self.fits {
                for (place, row) in places.iter_mut().zip(rows) {
                    let sum = row.wrapping_mul(a).wrapping_add(c);
                    *place = self.slots.plain(sum.wrapping_add(share.sum));
                }
                continue;
            }
            let AffineBlock { plain, wrapped, .. } = *share;
            let (sum, end) = (ordered(share.sum), starts.value as i64);
            for i in 0..n {
                let wraps = sum > sums[i];
                let down = select(wraps, wrapped.rest, plain.rest) > rests[i];
                let slot = select(down, slots_down[i], slots[i]);
                let slot = slot + select(wraps, wrapped.slot, plain.slot) - end;
                places[i] = (slot + select(slot < 0, end, 0)) as u64;
            }
        }
    }
}

/// `(x - y) mod n` for `x, y < n`.
#[inline(always)]
fn sub_mod(x: u64, y: u64, n: u64) -> u64 {
    if x < y {
        x.wrapping_sub(y).wrapping_add(n)
    } else {
        x - y
    }
}

/// `if condition { x } else { y }`, in a form that the compiler vectorises.
#[inline(always)]
const fn select(condition: bool, x: i64, y: i64) -> i64 {
    y ^ ((x ^ y) & -(condition as i64))
}

/// Maps unsigned words to signed ones in the same order: many vector units compare signed words only.
#[inline(always)]
const fn ordered(x: u64) -> i64 {
    (x ^ (1 << 63)) as i64
}

#[cfg(test)]
mod tests {
    use super::super::mix::{finalize, GOLDEN};
    use super::super::{Hash, Slots};
    use super::*;

    /// Compares the incremental form with the formula, for constants that wrap, that do not wrap, and that do not fit.
    #[test]
    fn affine_rows_are_the_formula() {
        let mut state = 1u64;
        let mut draw = |bits: u32| {
            state = state.wrapping_add(GOLDEN);
            finalize(state) >> (64 - bits)
        };
        for round in 0..if cfg!(miri) { 20 } else { 2_000 } {
            let bits = |draw: &mut dyn FnMut(u32) -> u64| 1 + (draw(6) as u32) % 64;
            let (wide, narrow) = (bits(&mut draw), bits(&mut draw).min(40));
            let hash = match round {
                0 => Hash::original(),
                _ => Hash::affine(draw(64), draw(64), draw(64), draw(wide).max(1), 1),
            };
            let len = (draw(narrow) as usize).max(1);
            let Ok(Slots::Affine(slots)) = hash.slots(len) else {
                panic!("{hash:?} suits {len}");
            };
            let rows = AffineRows::from(slots);
            let column_blocks: Vec<_> = (0..40).map(|block| rows.column_block(block)).collect();
            let at: Vec<u64> = (0..20).map(|_| draw(64)).collect();
            let mut places = vec![0; column_blocks.len() * at.len()];
            rows.locate(&at, column_blocks.iter(), &mut places);
            for (block, places) in places.chunks(at.len()).enumerate() {
                for (&row, &place) in at.iter().zip(places) {
                    let want = slots.plain_slot(row, block as u64);
                    assert_eq!(
                        place as usize, want,
                        "{hash:?} len {len} row {row} block {block}"
                    );
                }
            }
        }
    }
}
