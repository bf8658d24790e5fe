//! From a virtual element `(row, column)` to its slot in `hashed_weight`.
//!
//! Pure integers: nothing here knows a tensor. All arithmetic is on `u64` and wraps; a row is an `i64` index
//! reinterpreted as `u64`. `block` consecutive columns share one hash and lie next to each other; `column / block` is called
//! the column block.
//!
//! | file | family | slot of `(row, column)` in a `hashed_weight` of `len` values |
//! |---|---|---|
//! | `balanced.rs` | balanced | `((y * stride + turn) mod 2^32 * (len / block) >> 32) * block + column % block`, explained there |
//! | `mix.rs` | mix | `(((h >> 32) * (len / block)) >> 32) * block + column % block`, `h` = output `column / block` of SplitMix64 started at `row` |
//! | `affine.rs` | affine | `(row * a + (column / block) * b + c) mod modulus mod (len - block + 1) + column % block` |
//!
//! A [`Hash`] is bound to the length of `hashed_weight` once, giving [`Slots`]: `Copy` and `#[repr(C)]`, because the CUDA
//! kernels take the same structs. The CPU loops see them through [`Locate`]. `kernels/hash.cuh` holds the same formulas for
//! the GPU.

mod affine;
mod balanced;
mod block;
mod divisor;
mod mix;

pub use affine::{Affine, Overflow};
pub(crate) use affine::{AffineRows, AffineSlots};
pub(crate) use block::BlockSlots;
#[cfg(feature = "cuda")]
pub(crate) use divisor::Divisor;
pub use mix::Mix;

use affine::AffineFields;
use candle_core::{bail, Error, Result};
use mix::MixFields;
use serde::{Deserialize, Serialize};

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
        .map_err(Error::msg)
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
        .map_err(Error::msg)
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
        .map_err(Error::msg)
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
        let (column_block, within) = ((column / block) as u64, column % block);
        let (start, signs) = match self.slots(len)? {
            Slots::Balanced(slots) | Slots::Mix(slots) => {
                let (mut place, mut signs) = ([0], [0]);
                let column_block = slots.run(column_block);
                slots.locate(&[row as u64], &[column_block], &mut place, &mut signs);
                (slots.slot(place[0], block), signs[0])
            }
            Slots::Affine(slots) => (slots.plain_slot(row as u64, column_block), 0),
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
        match self {
            Self::Affine(affine) if affine.overflows(num_embeddings, embedding_dim) => bail!(
                "hash: {num_embeddings} rows of {embedding_dim} columns overflow the signed 64-bit arithmetic of this hash"
            ),
            _ => Ok(()),
        }
    }

    /// Binds the hash to a length.
    pub(crate) fn slots(&self, len: usize) -> Result<Slots> {
        self.check_len(len)?;
        Ok(match self {
            Self::Mix(mix) if mix.balanced() => Slots::Balanced(mix.bind(len)),
            Self::Mix(mix) => Slots::Mix(mix.bind(len)),
            Self::Affine(affine) => Slots::Affine(affine.bind(len)),
        })
    }
}

/// The longest block: its bytes must fit a 32-bit word, which the kernels rely on.
const MAX_BLOCK: u64 = 1 << 24;

fn checked_block(block: u64) -> std::result::Result<u32, String> {
    if block == 0 || block > MAX_BLOCK {
        return Err(format!(
            "hash: block must lie in 1..={MAX_BLOCK}, got {block}"
        ));
    }
    Ok(block as u32)
}

/// A hash bound to the length of one `hashed_weight`: what the loops and kernels run on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Slots {
    Affine(AffineSlots),
    Mix(BlockSlots),
    Balanced(BlockSlots),
}

impl Slots {
    /// Consecutive columns that share a hash.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn block(&self) -> usize {
        match self {
            Self::Affine(slots) => slots.block as usize,
            Self::Mix(slots) | Self::Balanced(slots) => slots.block(),
        }
    }
}

/// The most rows that [`Locate::locate`] takes at once.
pub(crate) const MAX_ROWS: usize = 256;

/// What the CPU loops ask of a bound hash; a trait, so that the loops are compiled for each type of it.
///
/// The location of a column block of a row consists of a place and of sign bits. They are kept in separate slices, so that
/// loops over either can be vectorised.
pub(crate) trait Locate: Copy + Send + Sync {
    /// What is the same for one column block of every row, computed once per lookup.
    type Run: Copy + Send + Sync;
    /// Where a column block starts; [`slot`](Self::slot) translates it. Larger places have larger slots.
    type Place: Copy + Default + Ord + Send + Sync;
    /// Whether values may have signs; otherwise [`locate`](Self::locate) writes none.
    const SIGNED: bool;

    /// Consecutive columns that share a hash.
    fn block(&self) -> usize;
    /// The constants of a column block.
    fn run(&self, column_block: u64) -> Self::Run;
    /// Locates some column blocks of some rows, at most [`MAX_ROWS`]: the place, and a sign bit for each column, of column
    /// block `i` of row `j` are written at `i * rows.len() + j`.
    ///
    /// The inner loop goes over the rows, so that it is long enough to vectorise even where a row has few column blocks.
    fn locate(
        &self,
        rows: &[u64],
        column_blocks: &[Self::Run],
        places: &mut [Self::Place],
        signs: &mut [u32],
    );
    /// The first slot of a place. `block` must equal [`Self::block`]; the caller may have it as a constant.
    fn slot(&self, place: Self::Place, block: usize) -> usize;
    /// The largest place there is.
    fn last_place(&self) -> Self::Place;
}
