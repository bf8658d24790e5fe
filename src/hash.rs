//! From a virtual element `(row, column)` to its slot in `hashed_weight`.
//!
//! Pure integers: nothing here knows a tensor. All arithmetic is on `u64` and wraps; a row is an `i64` index
//! reinterpreted as `u64`. `block` consecutive columns share one hash and lie next to each other.
//!
//! | family | slot of `(row, column)` in a `hashed_weight` of `len` values |
//! |---|---|
//! | [`Mix`], balanced | `((y * stride + turn) mod 2^32 * (len / block) >> 32) * block + column % block`: see below |
//! | [`Mix`] | `(((h >> 32) * (len / block)) >> 32) * block + column % block`, `h` = output `column / block` of SplitMix64 started at `row` |
//! | [`Affine`] | `(row * a + (column / block) * b + c) mod modulus mod (len - block + 1) + column % block` |
//!
//! A balanced hash divides the rows into *strata* of as many consecutive rows as there are blocks. The rows of a stratum go
//! to one block each, `stride` blocks apart, around the circle of blocks; where on it they start is the stratum's *turn*, a hash
//! of the stratum and of `column / block`. So every block serves as many rows as any other, give or take one stratum that is not
//! full, where random places would serve some twice as often as others; two rows of one stratum never share; and two rows that
//! do share a block share no other but by chance. With `x` the row, `n = len / block` and `r = floor((2^64 - 1) / n) + 1`:
//! `y`, bits 32 to 63 of `x * r`, is how far `x` stands in its stratum, as a fraction of 2^32, and bits 64 to 95 number it.
//! The stride is the smallest number from 7 on that has no divisor in common with `n`: neighbours, which are often the rows
//! used most, do not crowd into one part of the memory.
//!
//! A [`Hash`] is bound to a length once, giving [`Slots`]: all that the kernels need, `Copy` and `#[repr(C)]`, because the
//! CUDA kernels take the very same struct. The CPU loops see it through [`Locate`]. `kernels/hash.cuh` is the twin of this
//! file; the shared vectors in `tests/hash.rs` tie the two.

use candle_core::{bail, Result};
use serde::{Deserialize, Serialize};

/// The increment of SplitMix64: 2^64 divided by the golden ratio, made odd.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of SplitMix64, a bijection of `u64` in which every input bit moves every output bit.
const fn finalize(mut h: u64) -> u64 {
    h = (h ^ (h >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    h ^ (h >> 31)
}

/// How a virtual element `(row, column)` finds its slot in `hashed_weight`.
///
/// | constructor | family | use it for |
/// |---|---|---|
/// | [`Hash::default_for`] | mix, balanced, signed | new models |
/// | [`Hash::balanced`] | mix, balanced | new models with a block or seed of your choice |
/// | [`Hash::mix`] | mix | rows at random places, for tables whose rows are drawn far apart |
/// | [`Hash::original`] | affine | weights trained with the PyTorch package HashedEmbeddingBag |
/// | [`Hash::robe`] | affine | weights trained with ROBE (arXiv 2108.02191) |
/// | [`Hash::affine`] | affine | any other member of the family |
/// | [`Hash::identity`] | affine | a plain table, to compare with |
///
/// ```
/// use candle_hashed_embedding_bag::Hash;
///
/// # fn main() -> candle_core::Result<()> {
/// let (slot, sign) = Hash::mix(0, 16, true)?.slot(1, 0, 1_280_000)?;
/// assert_eq!(slot, 725_184);
/// assert!(sign == 1 || sign == -1);
///
/// // As many rows as there are blocks: one in each.
/// let hash = Hash::balanced(0, 4, true)?;
/// let mut slots = (0..100).map(|row| hash.slot(row, 0, 400)).collect::<Result<Vec<_>, _>>()?;
/// slots.sort();
/// assert!(slots.iter().map(|(slot, _)| *slot).eq((0..400).step_by(4)));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Hash {
    /// The native family: mixes every bit, aligned blocks, optional signs.
    Mix(Mix),
    /// The family of HashedEmbeddingBag and ROBE: linear in row and block.
    Affine(Affine),
}

/// A member of the native hash family; made by [`Hash::balanced`] or [`Hash::mix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "MixFields", into = "MixFields")]
pub struct Mix {
    seed: u64,
    block: u32,
    signed: bool,
    balanced: bool,
}

/// A member of the compatibility hash family; made by [`Hash::affine`], [`Hash::original`] or [`Hash::robe`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "AffineFields", into = "AffineFields")]
pub struct Affine {
    a: u64,
    b: u64,
    c: u64,
    modulus: u64,
    block: u32,
    overflow: Overflow,
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

impl Hash {
    /// The hash of the PyTorch package HashedEmbeddingBag, bit for bit: affine, block 1, unsigned.
    pub const fn original() -> Self {
        Self::Affine(Affine {
            a: 9_824_516_537,
            b: 57_857_966_300_227,
            c: 104_729,
            modulus: 117_130_198_221_199,
            block: 1,
            overflow: Overflow::Wrap,
        })
    }

    /// The hash of a ROBE module with these `random_numbers` (its buffer; the first four count) and `block` columns per
    /// hash (its `uma_chunk_size`).
    ///
    /// # Errors
    /// Fewer than four numbers, a negative one, a modulus (`random_numbers[0]`) that is not positive, or a block outside
    /// `1..=2^24`. A layer whose rows could overflow ROBE's signed arithmetic is refused when it is built.
    pub fn robe(random_numbers: &[i64], block: usize) -> Result<Self> {
        let [modulus, c, b, a] = match random_numbers {
            [r0, r1, r2, r3, ..] => [*r0, *r1, *r2, *r3],
            short => bail!(
                "hash: robe needs at least 4 random_numbers, got {}",
                short.len()
            ),
        };
        for (i, r) in [modulus, c, b, a].into_iter().enumerate() {
            if r < 0 {
                bail!("hash: robe random_numbers must not be negative, got {r} at position {i}");
            }
        }
        Affine::checked(AffineFields {
            a: a as u64,
            b: b as u64,
            c: c as u64,
            modulus: modulus as u64,
            block: block as u64,
            overflow: Overflow::Refuse,
        })
        .map(Self::Affine)
        .map_err(candle_core::Error::msg)
    }

    /// The affine hash `(row * a + (column / block) * b + c) mod modulus mod (len - block + 1) + column % block`.
    ///
    /// # Errors
    /// A modulus of zero, or a block outside `1..=2^24`.
    pub fn affine(a: u64, b: u64, c: u64, modulus: u64, block: usize) -> Result<Self> {
        Affine::checked(AffineFields {
            a,
            b,
            c,
            modulus,
            block: block as u64,
            overflow: Overflow::Wrap,
        })
        .map(Self::Affine)
        .map_err(candle_core::Error::msg)
    }

    /// No hashing: `slot = row * embedding_dim + column`, for a `hashed_weight` with a slot for every value of the table. It
    /// makes a plain table out of a hashed layer, such as the uncompressed line of a comparison (compression 1).
    ///
    /// # Errors
    /// An `embedding_dim` outside `1..=2^24`.
    pub fn identity(embedding_dim: usize) -> Result<Self> {
        Self::affine(embedding_dim as u64, 0, 0, u64::MAX, embedding_dim)
    }

    /// The native hash: as many rows in every block as in any other, at places that depend on `(seed, column / block)` and
    /// on where the rows stand in the table; see the formula in the README.
    ///
    /// `signed` multiplies every value by +1 or -1, by a bit of a hash of the row: rows that share a block are then no
    /// copies of each other. Signs are what makes long blocks, and so wide loads, cost next to no quality.
    ///
    /// # Errors
    /// A block outside `1..=2^24`, or above 32 when signed (one hash carries 32 sign bits).
    pub fn balanced(seed: u64, block: usize, signed: bool) -> Result<Self> {
        Self::checked_mix(seed, block, signed, true)
    }

    /// The native hash with rows at random places: SplitMix64 of `(seed, row, column / block)`. By chance some blocks serve
    /// many more rows than others, which costs quality unless every block serves dozens.
    ///
    /// # Errors
    /// Those of [`Hash::balanced`].
    pub fn mix(seed: u64, block: usize, signed: bool) -> Result<Self> {
        Self::checked_mix(seed, block, signed, false)
    }

    fn checked_mix(seed: u64, block: usize, signed: bool, balanced: bool) -> Result<Self> {
        Mix::checked(MixFields {
            seed,
            block: block as u64,
            signed,
            balanced,
        })
        .map(Self::Mix)
        .map_err(candle_core::Error::msg)
    }

    /// What a layer uses when its config names no hash: balanced, with seed 0, signed, and as block the largest power of two
    /// that is at most half of `embedding_dim`, but no more than 16 and, if there are as many columns, no less than 4.
    ///
    /// A row then consists of several blocks, each of which it shares with other rows: where one meets a row that is used far
    /// more often, the others need not.
    pub fn default_for(embedding_dim: usize) -> Self {
        let widest = (embedding_dim / 2).clamp(4, 16).min(embedding_dim.max(1));
        Self::Mix(Mix {
            seed: 0,
            block: 1 << widest.ilog2(),
            signed: true,
            balanced: true,
        })
    }

    /// How many consecutive columns share one hash.
    pub fn block(&self) -> usize {
        match self {
            Self::Mix(mix) => mix.block as usize,
            Self::Affine(affine) => affine.block as usize,
        }
    }

    /// Whether values carry a sign.
    pub fn signed(&self) -> bool {
        matches!(self, Self::Mix(mix) if mix.signed)
    }

    /// The slot of virtual element `(row, column)` in a `hashed_weight` of `len` values, and its sign (`1` or `-1`).
    ///
    /// `row` may be any `i64`, as it may be with [`BoundsCheck::Off`](crate::BoundsCheck::Off).
    ///
    /// # Errors
    /// A `len` this hash cannot fill; see [`Hash::check_len`].
    pub fn slot(&self, row: i64, column: usize, len: usize) -> Result<(usize, i8)> {
        let block = self.block();
        let (run, within) = (column / block, column % block);
        let (start, signs) = match self.slots(len)? {
            Slots::Mix(mix) => {
                let (mut place, mut signs) = ([0], [0]);
                let run = mix.run(run as u64);
                mix.locate(&[row as u64], &[run], &mut place, &mut signs);
                (mix.slot(place[0], block), signs[0])
            }
            Slots::Affine(affine) => (affine.plain_slot(row as u64, run as u64), 0),
        };
        let negative = within < 32 && (signs >> within) & 1 == 1;
        Ok((start + within, if negative { -1 } else { 1 }))
    }

    /// Whether a `hashed_weight` of `len` values suits this hash.
    ///
    /// # Errors
    /// * mix: `len` is zero, is no multiple of the block, or holds 2^32 blocks or more;
    /// * affine: `len` is smaller than the block.
    pub fn check_len(&self, len: usize) -> Result<()> {
        let block = self.block();
        match self {
            _ if len < block => bail!(
                "hash: hashed_weight must hold at least one block of {block} values, got {len}"
            ),
            Self::Mix(_) if !len.is_multiple_of(block) => bail!(
                "hash: the length of hashed_weight must be a multiple of the block, got {len} and block {block}"
            ),
            Self::Mix(_) if (len / block) as u64 > u64::from(u32::MAX) => bail!(
                "hash: hashed_weight must hold fewer than 2^32 blocks, got {} of {block} values",
                len / block
            ),
            _ => Ok(()),
        }
    }

    /// The smallest length of at least `len` that suits this hash: at least one block, whole blocks for mix.
    pub(crate) fn round_up_len(&self, len: usize) -> usize {
        let block = self.block();
        match self {
            Self::Mix(_) => len.max(1).div_ceil(block).saturating_mul(block),
            Self::Affine(_) => len.max(block),
        }
    }

    /// Refuses a table whose rows would leave the signed 64-bit range of [`Overflow::Refuse`].
    pub(crate) fn check_table(&self, num_embeddings: usize, embedding_dim: usize) -> Result<()> {
        if let Self::Affine(affine) = self {
            let last_row = num_embeddings.saturating_sub(1) as u128;
            let last_run = (embedding_dim.saturating_sub(1) / affine.block as usize) as u128;
            let highest = last_row
                .saturating_mul(u128::from(affine.a))
                .saturating_add(last_run.saturating_mul(u128::from(affine.b)))
                .saturating_add(u128::from(affine.c));
            if affine.overflow == Overflow::Refuse && highest > i64::MAX as u128 {
                bail!(
                    "hash: {num_embeddings} rows of {embedding_dim} columns overflow the signed 64-bit arithmetic of this hash"
                );
            }
        }
        Ok(())
    }

    /// Binds the hash to a length.
    pub(crate) fn slots(&self, len: usize) -> Result<Slots> {
        self.check_len(len)?;
        Ok(match self {
            Self::Mix(mix) => {
                let num_blocks = len / mix.block as usize;
                Slots::Mix(MixSlots {
                    key: finalize(mix.seed),
                    // One more than what rounds down, so that row `num_blocks` begins a stratum; 0 stands for 2^64.
                    reciprocal: (u64::MAX / num_blocks as u64).wrapping_add(1),
                    num_blocks: num_blocks as u32,
                    block: mix.block,
                    sign_mask: if mix.signed { u32::MAX } else { 0 },
                    stride: if mix.balanced { stride(num_blocks) } else { 0 },
                })
            }
            Self::Affine(affine) => Slots::Affine(AffineSlots {
                a: affine.a,
                b: affine.b,
                c: affine.c,
                modulus: Divisor::new(affine.modulus),
                starts: Divisor::new((len - affine.block as usize + 1) as u64),
                block: affine.block,
            }),
        })
    }
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

    fn checked(fields: MixFields) -> std::result::Result<Self, String> {
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

impl Affine {
    /// The factor of the row.
    pub fn a(&self) -> u64 {
        self.a
    }

    /// The factor of `column / block`.
    pub fn b(&self) -> u64 {
        self.b
    }

    /// The constant.
    pub fn c(&self) -> u64 {
        self.c
    }

    /// The first modulus, before the length.
    pub fn modulus(&self) -> u64 {
        self.modulus
    }

    /// What happens past the signed 64-bit range.
    pub fn overflow(&self) -> Overflow {
        self.overflow
    }

    fn checked(fields: AffineFields) -> std::result::Result<Self, String> {
        let block = checked_block(fields.block)?;
        if fields.modulus == 0 {
            return Err("hash: an affine modulus must be at least 1, got 0".into());
        }
        Ok(Self {
            a: fields.a,
            b: fields.b,
            c: fields.c,
            modulus: fields.modulus,
            block,
            overflow: fields.overflow,
        })
    }
}

/// The longest block: its bytes fit a 32-bit word, which the kernels rely on.
const MAX_BLOCK: u64 = 1 << 24;

fn checked_block(block: u64) -> std::result::Result<u32, String> {
    if block == 0 || block > MAX_BLOCK {
        return Err(format!(
            "hash: block must lie in 1..={MAX_BLOCK}, got {block}"
        ));
    }
    Ok(block as u32)
}

/// How a [`Mix`] stands in a checkpoint; reading one goes through the same checks as [`Hash::mix`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MixFields {
    seed: u64,
    block: u64,
    signed: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    balanced: bool,
}

/// How an [`Affine`] stands in a checkpoint; reading one goes through the same checks as [`Hash::affine`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AffineFields {
    a: u64,
    b: u64,
    c: u64,
    modulus: u64,
    block: u64,
    #[serde(default, skip_serializing_if = "Overflow::is_wrap")]
    overflow: Overflow,
}

impl Overflow {
    fn is_wrap(&self) -> bool {
        *self == Self::Wrap
    }
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

impl TryFrom<AffineFields> for Affine {
    type Error = String;
    fn try_from(fields: AffineFields) -> std::result::Result<Self, String> {
        Self::checked(fields)
    }
}

impl From<Affine> for AffineFields {
    fn from(affine: Affine) -> Self {
        Self {
            a: affine.a,
            b: affine.b,
            c: affine.c,
            modulus: affine.modulus,
            block: affine.block.into(),
            overflow: affine.overflow,
        }
    }
}

/// A hash bound to the length of one `hashed_weight`: what the loops and kernels run on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Slots {
    Mix(MixSlots),
    Affine(AffineSlots),
}

/// The most rows that are located in one call.
pub(crate) const MAX_ROWS: usize = 256;

/// What the CPU loops ask of a bound hash; a trait, so that the loops are compiled once per family.
///
/// Where a block of columns of a row lies is said by a place and by signs, which are kept apart: that makes vectors of either.
pub(crate) trait Locate: Copy + Send + Sync {
    /// What is the same for block `run` of every row, computed once per call.
    type Run: Copy + Send + Sync;
    /// See [`slot`](Self::slot).
    type Place: Copy + Default + Ord + Send + Sync;
    /// Whether values are signed. If not, `signs` are not to be looked at.
    const SIGNED: bool;

    /// Columns per hash.
    fn block(&self) -> usize;
    /// The constants of block `run`.
    fn run(&self, run: u64) -> Self::Run;
    /// The places of the blocks `runs` of some rows, at most [`MAX_ROWS`], and a sign bit for each of their (then at most
    /// 32) columns: block `i` of row `j` at `i * rows.len() + j`, so that many rows are hashed at once, in vectors, however
    /// few blocks they have.
    fn locate(
        &self,
        rows: &[u64],
        runs: &[Self::Run],
        places: &mut [Self::Place],
        signs: &mut [u32],
    );
    /// The first slot of a place; `block` is that of this hash, where the caller has it as a constant. Larger places have
    /// larger slots.
    fn slot(&self, place: Self::Place, block: usize) -> usize;
    /// The last place there is.
    fn last_place(&self) -> Self::Place;
}

impl Slots {
    /// Consecutive columns that share a hash.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn block(&self) -> usize {
        match self {
            Self::Mix(mix) => mix.block as usize,
            Self::Affine(affine) => affine.block as usize,
        }
    }
}

/// [`Mix`] bound to a length; twin of `MixSlots` in `kernels/hash.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct MixSlots {
    pub(crate) key: u64,
    /// `2^64 / num_blocks`, rounded up
    pub(crate) reciprocal: u64,
    pub(crate) num_blocks: u32,
    pub(crate) block: u32,
    pub(crate) sign_mask: u32,
    /// Of a balanced hash; 0 for random places.
    pub(crate) stride: u32,
}

/// The smallest number from 7 on that has no divisor in common with `num_blocks`.
fn stride(num_blocks: usize) -> u32 {
    let shares_no_divisor = |stride: u64| {
        let (mut a, mut b) = (num_blocks as u64, stride);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a == 1
    };
    // The primes from 7 to 37 together are more than 2^32, so that one of them is found.
    (7..).find(|&stride| shares_no_divisor(stride)).unwrap_or(1) as u32
}

/// The low half of a word. Products of two such are what vector units multiply at once.
#[inline(always)]
const fn low(x: u64) -> u64 {
    x & 0xFFFF_FFFF
}

/// `x * num_blocks / 2^32`: a block for each fraction of 2^32, without a division.
#[inline(always)]
fn block_at(x: u32, num_blocks: u32) -> u32 {
    ((u64::from(x) * u64::from(num_blocks)) >> 32) as u32
}

/// A place is the number of the block.
impl Locate for MixSlots {
    /// The start of SplitMix64 for this block of row 0; of a balanced hash, what it starts with, in 32 bits.
    type Run = u64;
    type Place = u32;
    const SIGNED: bool = true;

    #[inline(always)]
    fn block(&self) -> usize {
        self.block as usize
    }

    #[inline(always)]
    fn run(&self, run: u64) -> u64 {
        let steps = run.wrapping_add(1).wrapping_mul(GOLDEN);
        let start = self.key.wrapping_add(steps);
        if self.is_balanced() {
            finalize(start) >> 32
        } else {
            start
        }
    }

    #[inline(always)]
    fn locate(&self, rows: &[u64], runs: &[u64], places: &mut [u32], signs: &mut [u32]) {
        if self.is_balanced() {
            return self.locate_balanced(rows, runs, places, signs);
        }
        let n = rows.len();
        let places = places.chunks_exact_mut(n).zip(signs.chunks_exact_mut(n));
        for (run, (places, signs)) in runs.iter().zip(places) {
            let places = places.iter_mut().zip(signs);
            for (row, (place, signs)) in rows.iter().zip(places) {
                let h = finalize(run.wrapping_add(*row));
                *place = block_at((h >> 32) as u32, self.num_blocks);
                *signs = h as u32 & self.sign_mask;
            }
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

impl MixSlots {
    /// Whether every block serves as many rows as any other.
    #[inline(always)]
    pub fn is_balanced(&self) -> bool {
        self.stride != 0
    }

    #[inline(always)]
    fn locate_balanced(&self, rows: &[u64], runs: &[u64], places: &mut [u32], signs: &mut [u32]) {
        let (factor_low, factor_high) = (low(self.reciprocal), self.reciprocal >> 32);
        let n = rows.len();
        // What does not depend on the block of columns. Words of 32 bits in slices of their own, and loops that do little: so
        // the compiler makes vectors of them, as wide as there are.
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
            fractions[i] = (low(product) * u64::from(self.stride)) as u32;
            strata[i] = ((product >> 32) * 0x9E37_79B9) as u32;
        }
        let places = places.chunks_exact_mut(n).zip(signs.chunks_exact_mut(n));
        for (&run, (places, signs)) in runs.iter().zip(places) {
            for i in 0..n {
                // Mixed as in lowbias32 of Chris Wellons' hash-prospector.
                let turn = strata[i].wrapping_add(run as u32);
                let turn = (turn ^ (turn >> 15)).wrapping_mul(0x846C_A68B);
                places[i] = fractions[i].wrapping_add(turn);
                let bits = (lows[i] ^ turn).wrapping_mul(0x7FEB_352D);
                let bits = (bits ^ (bits >> 15)).wrapping_mul(0x846C_A68B);
                signs[i] = (bits ^ (bits >> 16)) & self.sign_mask;
            }
            for place in places {
                *place = block_at(*place, self.num_blocks);
            }
        }
    }
}

/// [`Affine`] bound to a length; twin of `AffineSlots` in `kernels/hash.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct AffineSlots {
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) c: u64,
    pub(crate) modulus: Divisor,
    pub(crate) starts: Divisor,
    pub(crate) block: u32,
}

impl AffineSlots {
    /// The slot of a wrapped sum, by the formula.
    fn plain(&self, sum: u64) -> u64 {
        self.starts.rem(self.modulus.rem(sum))
    }

    /// The first slot of block `run` of row `row`, by the formula.
    fn plain_slot(&self, row: u64, run: u64) -> usize {
        let sum = row
            .wrapping_mul(self.a)
            .wrapping_add(run.wrapping_mul(self.b));
        self.plain(sum.wrapping_add(self.c)) as usize
    }
}

/// [`AffineSlots`] for the CPU: the rows of a table without a division per value.
///
/// Write `m` for the modulus, `s` for `starts`, and split the sum of a row and a block into the row's share and the block's,
/// each with its remainders known. Where the sum wraps, `2^64` is missing from it: the block's share is known a second time,
/// less `2^64 mod m`. So `row mod m + block mod m` is congruent to the sum modulo `m` and below `2m`, and its remainder is at
/// most one `m` away. The slot follows modulo `s` in the same way: the row's share is known a second time, less `m mod s`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AffineRows {
    slots: AffineSlots,
    /// `2^64 mod m`
    wrapped: u64,
    /// `m mod s`
    down: u64,
    /// Whether all of this fits signed words; else every value is divided.
    fits: bool,
}

/// The share of one block of columns in an affine hash, where the sum does not wrap and where it does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AffineRun {
    /// `run * b mod 2^64`
    sum: u64,
    plain: AffineShare,
    wrapped: AffineShare,
}

/// A share modulo `m`, and that modulo `s`.
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

/// `x - y` modulo `n`, of two numbers below it.
#[inline(always)]
fn less(x: u64, y: u64, n: u64) -> u64 {
    if x < y {
        x.wrapping_sub(y).wrapping_add(n)
    } else {
        x - y
    }
}

impl AffineSlots {
    /// The share of a number below the modulus.
    #[inline(always)]
    fn share(&self, rest: u64) -> AffineShare {
        AffineShare {
            rest: rest as i64,
            slot: self.starts.rem(rest) as i64,
        }
    }
}

/// A place is its first slot.
impl Locate for AffineRows {
    type Run = AffineRun;
    type Place = u64;
    const SIGNED: bool = false;

    #[inline(always)]
    fn block(&self) -> usize {
        self.slots.block as usize
    }

    fn run(&self, run: u64) -> AffineRun {
        let sum = run.wrapping_mul(self.slots.b);
        let modulus = self.slots.modulus;
        let rest = modulus.rem(sum);
        AffineRun {
            sum,
            plain: self.slots.share(rest),
            wrapped: self.slots.share(less(rest, self.wrapped, modulus.value)),
        }
    }

    #[inline(always)]
    fn locate(&self, rows: &[u64], runs: &[AffineRun], places: &mut [u64], _: &mut [u32]) {
        let AffineSlots {
            a,
            c,
            modulus,
            starts,
            ..
        } = self.slots;
        // The rows' shares, each in a slice of its own and as signed words, so that the loops below become vectors: the largest
        // shares of a block with which a row does not wrap and stays below `m`, and its slot, and that slot less `m`.
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
            slots_down[i] = less(slot, self.down, starts.value) as i64;
        }
        for (run, places) in runs.iter().zip(places.chunks_exact_mut(n)) {
            if !self.fits {
                for (place, row) in places.iter_mut().zip(rows) {
                    let sum = row.wrapping_mul(a).wrapping_add(c);
                    *place = self.slots.plain(sum.wrapping_add(run.sum));
                }
                continue;
            }
            let AffineRun { plain, wrapped, .. } = *run;
            let (run_sum, end) = (ordered(run.sum), starts.value as i64);
            for i in 0..n {
                let wraps = run_sum > sums[i];
                let down = pick(wraps, wrapped.rest, plain.rest) > rests[i];
                let slot = pick(down, slots_down[i], slots[i]);
                let slot = slot + pick(wraps, wrapped.slot, plain.slot) - end;
                places[i] = (slot + pick(slot < 0, end, 0)) as u64;
            }
        }
    }

    #[inline(always)]
    fn slot(&self, place: u64, _: usize) -> usize {
        place as usize
    }

    #[inline(always)]
    fn last_place(&self) -> u64 {
        self.slots.starts.value - 1
    }
}

/// `if which { x } else { y }`, in a form that becomes vectors.
#[inline(always)]
const fn pick(which: bool, x: i64, y: i64) -> i64 {
    y ^ ((x ^ y) & -(which as i64))
}

/// A signed word in the order of unsigned ones, which vector units of many machines do not compare.
#[inline(always)]
const fn ordered(x: u64) -> i64 {
    (x ^ (1 << 63)) as i64
}

/// Division by a number that is known once and used often: one multiplication instead of a division.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Divisor {
    pub(crate) value: u64,
    /// `floor((2^64 - 1) / value)`
    pub(crate) reciprocal: u64,
}

impl Divisor {
    /// `value` is not zero.
    pub fn new(value: u64) -> Self {
        Self {
            value,
            reciprocal: u64::MAX / value,
        }
    }

    /// `x mod value`, exactly.
    ///
    /// The reciprocal is at most one below `2^64 / value` and `x < 2^64`, so `x * reciprocal / 2^64` is less than one below
    /// `x / value`: its floor is the quotient or one less, and one correction suffices.
    #[inline]
    fn rem(self, x: u64) -> u64 {
        let quotient = ((u128::from(x) * u128::from(self.reciprocal)) >> 64) as u64;
        let remainder = x - quotient * self.value;
        if remainder >= self.value {
            remainder - self.value
        } else {
            remainder
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The raw mix hash, before it is placed: `(seed, row, block) -> h`.
    #[test]
    fn mix_is_splitmix64() {
        for (seed, row, run, want) in [
            (0, 0, 0, 0xe220_a839_7b1d_cdaf),
            (0, 0, 1, 0x6e78_9e6a_a1b9_65f4),
            (0, 1, 0, 0x910a_2dec_8902_5cc1),
            (42, 123_456_789, 7, 0x3502_a7e4_2ada_2c11),
            (0, 1 << 40, 3, 0xeee0_c8b0_e2b2_6a14),
            (0, -1i64 as u64, 0, 0xe4d9_7177_1b65_2c20),
        ] {
            let hash = Hash::mix(seed, 1, false).unwrap();
            let Ok(Slots::Mix(slots)) = hash.slots(1) else {
                panic!("a mix hash suits one slot");
            };
            let h = finalize(slots.run(run).wrapping_add(row));
            assert_eq!(h, want, "seed {seed} row {row} block {run}");
        }
    }

    /// The incremental form against the formula, over parameters that wrap, that do not, and that do not fit.
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
                _ => Hash::affine(draw(64), draw(64), draw(64), draw(wide).max(1), 1).unwrap(),
            };
            let len = (draw(narrow) as usize).max(1);
            let Ok(Slots::Affine(slots)) = hash.slots(len) else {
                panic!("{hash:?} suits {len}");
            };
            let rows = AffineRows::from(slots);
            let runs: Vec<_> = (0..40).map(|run| rows.run(run)).collect();
            let at: Vec<u64> = (0..20).map(|_| draw(64)).collect();
            let mut places = vec![0; runs.len() * at.len()];
            rows.locate(&at, &runs, &mut places, &mut []);
            for (run, places) in places.chunks(at.len()).enumerate() {
                for (&row, &place) in at.iter().zip(places) {
                    let want = slots.plain_slot(row, run as u64);
                    assert_eq!(
                        place as usize, want,
                        "{hash:?} len {len} row {row} block {run}"
                    );
                }
            }
        }
    }

    #[test]
    fn divisor_is_exact_at_the_edges() {
        let edges = |around: u64| [around.wrapping_sub(1), around, around.wrapping_add(1)];
        for value in [
            1,
            2,
            3,
            5,
            7,
            117_130_198_221_199,
            (1 << 32) - 5,
            1 << 32,
            1 << 63,
            u64::MAX,
        ] {
            let divisor = Divisor::new(value);
            for x in [
                0,
                value,
                value.wrapping_mul(2),
                u64::MAX / value * value,
                u64::MAX,
                1 << 63,
            ]
            .into_iter()
            .flat_map(edges)
            {
                assert_eq!(divisor.rem(x), x % value, "{x} mod {value}");
            }
        }
    }
}
