//! LMA: rows that are used alike share memory. A row has a *signature*, 64 bits that consist of keys, such as MinHashes of the
//! records that hold the row; the keys that a column block selects decide where it starts.

use super::divisor::Divisor;
use super::MAX_ROWS;
use std::fmt;

/// The most keys that enter a hash: those for which the 51 random numbers of the original suffice.
const MAX_KEYS: usize = 20;
/// The position of the first pair of random numbers that selects a key.
const FIRST_SELECTOR: usize = 11;
/// Keys have to fit so many bits together, so that their product with a random number fits 63.
const MAX_HASHED_BITS: usize = 32;

/// A member of the LMA family, as the ROBE package computes it with `hmode="lma_hash"`; docs/format.md has the formula. Made by
/// [`Hash::lma`](super::Hash::lma).
///
/// It reads a signature of each row, from a tensor beside `hashed_weight`: `signatures`, i64, `(rows,)`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Lma {
    /// The first `FIRST_SELECTOR + 2 * keys_to_use`; the others are zero.
    random_numbers: [u32; FIRST_SELECTOR + 2 * MAX_KEYS],
    key_bits: usize,
    keys_to_use: usize,
    block: usize,
}

impl Lma {
    pub(super) fn new(
        random_numbers: &[i64],
        key_bits: usize,
        keys_to_use: usize,
        block: usize,
    ) -> Result<Self, String> {
        if key_bits == 0 || keys_to_use == 0 {
            return Err(format!(
                "key_bits and keys_to_use of LMA must be at least 1, got {key_bits} and {keys_to_use}"
            ));
        }
        if key_bits.saturating_mul(keys_to_use) > MAX_HASHED_BITS {
            return Err(format!(
                "key_bits * keys_to_use of LMA must be at most {MAX_HASHED_BITS}, beyond which the original's signed arithmetic \
                 could overflow, got {key_bits} * {keys_to_use}"
            ));
        }
        if keys_to_use > MAX_KEYS {
            return Err(format!(
                "keys_to_use of LMA must be at most {MAX_KEYS}, got {keys_to_use}"
            ));
        }
        let used = FIRST_SELECTOR + 2 * keys_to_use;
        if random_numbers.len() < used {
            return Err(format!(
                "LMA with keys_to_use {keys_to_use} has at least {used} random_numbers, got {}",
                random_numbers.len()
            ));
        }
        let mut numbers = [0; FIRST_SELECTOR + 2 * MAX_KEYS];
        for (i, (to, &r)) in numbers.iter_mut().zip(&random_numbers[..used]).enumerate() {
            let lowest = i64::from(i == 0);
            if !(lowest..1 << 31).contains(&r) {
                return Err(format!(
                    "LMA's random_numbers must lie in {lowest}..2^31, got {r} at position {i}"
                ));
            }
            *to = r as u32;
        }
        Ok(Self {
            random_numbers: numbers,
            key_bits,
            keys_to_use,
            block,
        })
    }

    /// The random numbers, as far as they matter: `11 + 2 * keys_to_use`.
    pub fn random_numbers(&self) -> &[u32] {
        &self.random_numbers[..FIRST_SELECTOR + 2 * self.keys_to_use]
    }

    /// The bits of a key.
    pub const fn key_bits(&self) -> usize {
        self.key_bits
    }

    /// How many keys of a signature a column block depends on. It may select a key more than once.
    pub const fn keys_to_use(&self) -> usize {
        self.keys_to_use
    }

    /// How many consecutive columns share a hash and lie side by side: the original's `uma_chunk_size`.
    pub const fn block(&self) -> usize {
        self.block
    }

    /// Whether a sum would leave the signed 64-bit range somewhere in a table of so many columns.
    pub(super) fn overflows(&self, embedding_dim: usize) -> bool {
        let [_, c, b, a, ..] = self.random_numbers.map(u128::from);
        let keys = (1u128 << (self.key_bits * self.keys_to_use)) - 1;
        let last_block = (embedding_dim.saturating_sub(1) / self.block) as u128;
        keys * a + last_block * b + c > i64::MAX as u128
    }

    /// Binds the hash to a length that has passed [`Hash::check_len`](super::Hash::check_len).
    pub(super) fn bind(&self, len: usize) -> LmaSlots {
        let [modulus, c, b, a, ..] = self.random_numbers.map(u64::from);
        let mut selectors = [0; 2 * MAX_KEYS];
        selectors.copy_from_slice(&self.random_numbers[FIRST_SELECTOR..]);
        LmaSlots {
            a,
            b,
            c,
            modulus: Divisor::new(modulus),
            starts: Divisor::new((len - self.block + 1) as u64),
            // The original never selects the last key.
            positions: Divisor::new(64 / self.key_bits as u64 - 1),
            selectors,
            key_bits: self.key_bits as u32,
            keys_to_use: self.keys_to_use as u32,
            block: self.block as u32,
        }
    }
}

/// Without the random numbers that do not matter.
impl fmt::Debug for Lma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lma")
            .field("random_numbers", &self.random_numbers())
            .field("key_bits", &self.key_bits)
            .field("keys_to_use", &self.keys_to_use)
            .field("block", &self.block)
            .finish()
    }
}

/// An LMA hash bound to a length. CUDA kernels take it as it is: it is the twin of `LmaSlots` in `kernels/hash.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct LmaSlots {
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) c: u64,
    pub(crate) modulus: Divisor,
    /// The number of slots at which a block may start.
    pub(crate) starts: Divisor,
    /// The number of keys of a signature that can be selected.
    pub(crate) positions: Divisor,
    /// A factor and a constant for each key.
    pub(crate) selectors: [u32; 2 * MAX_KEYS],
    pub(crate) key_bits: u32,
    pub(crate) keys_to_use: u32,
    pub(crate) block: u32,
}

/// [`LmaSlots`] with the signatures of the rows, on the CPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LmaRows<'a> {
    slots: LmaSlots,
    signatures: &'a [i64],
}

/// What the sum of a column block adds to that of the keys, and by how many bits each key is shifted down.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LmaBlock {
    sum: u64,
    shifts: [u8; MAX_KEYS],
}

impl<'a> LmaRows<'a> {
    /// `signatures` must not be empty.
    pub(super) fn new(slots: LmaSlots, signatures: &'a [i64]) -> Self {
        Self { slots, signatures }
    }
}

impl LmaRows<'_> {
    #[inline(always)]
    pub(super) fn block(&self) -> usize {
        self.slots.block as usize
    }

    #[inline(always)]
    pub(super) fn last_place(&self) -> u64 {
        self.slots.starts.value - 1
    }

    pub(super) fn column_block(&self, number: u64) -> LmaBlock {
        let LmaSlots {
            b,
            c,
            modulus,
            positions,
            selectors,
            key_bits,
            keys_to_use,
            ..
        } = self.slots;
        let mut shifts = [0; MAX_KEYS];
        let selectors = selectors.as_chunks().0.iter();
        let shifts_in_use = shifts.iter_mut().take(keys_to_use as usize);
        for (shift, &[factor, constant]) in shifts_in_use.zip(selectors) {
            let sum = number.wrapping_mul(u64::from(factor));
            let sum = sum.wrapping_add(u64::from(constant));
            *shift = (u64::from(key_bits) * positions.rem(modulus.rem(sum))) as u8;
        }
        LmaBlock {
            sum: number.wrapping_mul(b).wrapping_add(c),
            shifts,
        }
    }

    /// The first slots of column blocks of some rows, at most [`MAX_ROWS`]; see [`Locate::locate`](super::Locate::locate).
    #[inline(always)]
    pub(super) fn locate<'b>(
        &self,
        rows: &[u64],
        column_blocks: impl Iterator<Item = &'b LmaBlock>,
        places: &mut [u64],
    ) {
        let LmaSlots {
            a,
            modulus,
            starts,
            key_bits,
            keys_to_use,
            ..
        } = self.slots;
        let n = rows.len();
        let mut of_rows = [0; MAX_ROWS];
        let signatures = &mut of_rows[..n];
        read_signatures(self.signatures, rows, signatures);
        let mask = (1u64 << key_bits) - 1;
        for (block, places) in column_blocks.zip(places.chunks_exact_mut(n)) {
            let mut of_rows = [0; MAX_ROWS];
            let keys = &mut of_rows[..n];
            for (t, &shift) in (0..keys_to_use).zip(&block.shifts) {
                for (keys, signature) in keys.iter_mut().zip(&*signatures) {
                    *keys |= ((signature >> shift) & mask) << (t * key_bits);
                }
            }
            for (place, keys) in places.iter_mut().zip(&*keys) {
                let sum = keys.wrapping_mul(a).wrapping_add(block.sum);
                *place = starts.rem(modulus.rem(sum));
            }
        }
    }
}

/// Reads the signatures of some rows. Rows past the last, which only a lookup without bounds checks has, read the last.
#[inline(always)]
pub(super) fn read_signatures(signatures: &[i64], rows: &[u64], to: &mut [u64]) {
    let last = signatures.len() as u64 - 1;
    for (to, &row) in to.iter_mut().zip(rows) {
        *to = signatures[row.min(last) as usize] as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::super::Hash;
    use super::*;

    /// The random numbers of the original by default: NumPy's RandomState(1024) below the first.
    const NUMBERS: [i64; 35] = [
        2038074743, 634329019, 1825252241, 871205356, 80759397, 1857946201, 679088993, 343857360,
        425474381, 538847776, 1086915907, 369480626, 585176928, 1830667799, 17682904, 42749099, 1,
        2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
    ];

    #[test]
    fn parameters_that_could_overflow_are_refused() {
        let refused = |numbers: &[i64], bits, keys| Lma::new(numbers, bits, keys, 1).unwrap_err();
        assert!(refused(&NUMBERS, 4, 9).contains("at most 32"));
        assert!(refused(&NUMBERS, usize::MAX, 2).contains("at most 32"));
        assert!(refused(&NUMBERS, 1, 21).contains("keys_to_use of LMA must be at most 20, got 21"));
        assert!(refused(&NUMBERS, 0, 8).contains("at least 1, got 0 and 8"));
        assert!(refused(&NUMBERS, 2, 13).contains("at least 37 random_numbers, got 35"));
        let mut numbers = NUMBERS;
        numbers[3] = 1 << 31;
        assert!(refused(&numbers, 4, 8).contains("in 0..2^31, got 2147483648 at position 3"));
        numbers[3] = 5;
        numbers[0] = 0;
        assert!(refused(&numbers, 4, 8).contains("in 1..2^31, got 0 at position 0"));

        // The sum of the last column block is what may still overflow.
        numbers[..4].copy_from_slice(&[7, 0, (1 << 31) - 1, (1 << 31) - 1]);
        let hash = Hash::lma(&numbers, 4, 8, 1).unwrap();
        assert!(hash.check_table(1, 4).is_ok());
        assert!(hash.check_table(1, 5).is_err());
    }

    #[test]
    fn random_numbers_beyond_those_in_use_do_not_matter() {
        let mut numbers = NUMBERS;
        let hash = Lma::new(&numbers, 4, 8, 2).unwrap();
        assert_eq!(hash.random_numbers().len(), 27);
        numbers[27] = -1;
        assert_eq!(Lma::new(&numbers, 4, 8, 2).unwrap(), hash);
    }
}
