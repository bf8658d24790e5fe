//! From a virtual element `(row, column)` to its slot in `hashed_weight`.
//!
//! Integers only: nothing here knows about tensors. All arithmetic is on `u64` and wraps; a row is an `i64` index
//! reinterpreted as `u64`. `block` consecutive columns share one hash and lie next to each other; `column / block` is called
//! the column block.
//!
//! | file | family | slot of `(row, column)` in a `hashed_weight` of `len` values |
//! |---|---|---|
//! | `balanced.rs` | [`Balanced`] | `((y * stride + turn) mod 2^32 * (len / block) >> 32) * block + column % block`, explained there |
//! | `mix.rs` | [`Mix`] | `(((h >> 32) * (len / block)) >> 32) * block + column % block`, `h` = output `column / block` of SplitMix64 started at `row` |
//! | `affine.rs` | [`Affine`] | `(row * a + (column / block) * b + c) mod modulus mod (len - block + 1) + column % block` |
//! | `lma.rs` | [`Lma`] | affine in some keys of the row's signature, instead of the row |
//! | `semantic.rs` | [`Semantic`] | mix of some keys of the row's signature, instead of the row |
//! | `slot_table.rs` | [`SlotTable`] | `slot_table[row][column / block] * block + column % block` |
//!
//! The last three read a *row tensor*: signatures or a slot table, which a layer keeps beside `hashed_weight`.
//!
//! A [`Hash`](enum@Hash) is bound once to the length of `hashed_weight`, which gives [`Slots`]. Its structs are `Copy` and
//! `#[repr(C)]`, because the CUDA kernels take them as they are. The CPU loops use them, with the values of the row tensor, through
//! [`Locate`]: there are two implementations, for families with aligned blocks (`block.rs`) and for the others (`start.rs`).
//! `kernels/hash.cuh` is the twin of this folder for the GPU.

mod affine;
mod balanced;
mod block;
mod divisor;
mod lma;
mod mix;
mod semantic;
mod slot_table;
mod spec;
mod start;

#[cfg_attr(not(feature = "cuda"), allow(unused_imports))]
pub(crate) use affine::AffineSlots;
pub use affine::{Affine, Overflow};
pub use balanced::Balanced;
use block::BlockFamily;
pub(crate) use block::{BlockRows, BlockSlots};
#[cfg_attr(not(feature = "cuda"), allow(unused_imports))]
pub(crate) use divisor::Divisor;
pub use lma::Lma;
use lma::LmaRows;
pub(crate) use lma::LmaSlots;
pub use mix::Mix;
pub(crate) use mix::{finalize, GOLDEN};
pub(crate) use semantic::Keys;
pub use semantic::Semantic;
pub use slot_table::SlotTable;
pub(crate) use start::StartRows;

use crate::error::{bail, error};
use candle_core::Result;
use serde::{Deserialize, Serialize};
use spec::HashSpec;

/// How a virtual element `(row, column)` finds its slot in `hashed_weight`.
///
/// | constructor | family | use it for |
/// |---|---|---|
/// | [`Hash::default_for`] | balanced | new models |
/// | [`Hash::balanced`] | balanced | new models with a block of your choice |
/// | [`Hash::mix`] | mix | rows at random places, for tables whose rows are drawn far apart |
/// | [`Hash::original`] | affine | weights trained with the PyTorch package HashedEmbeddingBag |
/// | [`Hash::robe`] | affine | weights trained with ROBE (arXiv 2108.02191) |
/// | [`Hash::affine`] | affine | any other member of the family |
/// | [`Hash::identity`] | affine | a plain table, to compare with |
/// | [`Hash::semantic`] | semantic | new models in which rows that are used alike share memory |
/// | [`Hash::lma`] | LMA | weights trained with LMA of the ROBE package |
/// | [`Hash::slot_table`] | slot table | SCMA (arXiv 2103.06124), or an allocation of your own |
///
/// The last three read a tensor of the rows, which a layer keeps beside `hashed_weight`: [`Hash::row_tensor`] has its name. See
/// [`HashedEmbeddingBag::with_row_tensor`](crate::HashedEmbeddingBag::with_row_tensor).
///
/// The structs of the families have all settings, such as the seed: `Balanced { seed: 7, ..Balanced::new(16) }.into()`.
///
/// A hash is checked when it is used: constants out of range are an error when a layer is built or a file is read.
///
/// ```
/// use candle_hashed_embedding_bag::{Balanced, Hash};
///
/// # fn main() -> candle_core::Result<()> {
/// let (slot, sign) = Hash::mix(16).slot(1, 0, 1_280_000)?;
/// assert_eq!(slot, 725_184);
/// assert!(sign == 1 || sign == -1);
///
/// // As many rows as there are blocks: each block gets one.
/// let hash = Hash::from(Balanced { seed: 7, block: 4, signed: false });
/// let mut slots = (0..100).map(|row| hash.slot(row, 0, 400)).collect::<Result<Vec<_>, _>>()?;
/// slots.sort();
/// assert!(slots.iter().map(|(slot, _)| *slot).eq((0..400).step_by(4)));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "HashSpec", into = "HashSpec")]
#[non_exhaustive]
pub enum Hash {
    /// The same number of rows in every block.
    Balanced(Balanced),
    /// Rows at random places.
    Mix(Mix),
    /// Linear in row and block, as in HashedEmbeddingBag and ROBE.
    Affine(Affine),
    /// By keys of the row's signature, as in the ROBE package.
    Lma(Lma),
    /// By keys of the row's signature.
    Semantic(Semantic),
    /// Wherever a table says.
    SlotTable(SlotTable),
}

impl From<Balanced> for Hash {
    fn from(hash: Balanced) -> Self {
        Self::Balanced(hash)
    }
}

impl From<Mix> for Hash {
    fn from(hash: Mix) -> Self {
        Self::Mix(hash)
    }
}

impl From<Affine> for Hash {
    fn from(hash: Affine) -> Self {
        Self::Affine(hash)
    }
}

impl From<Lma> for Hash {
    fn from(hash: Lma) -> Self {
        Self::Lma(hash)
    }
}

impl From<Semantic> for Hash {
    fn from(hash: Semantic) -> Self {
        Self::Semantic(hash)
    }
}

impl From<SlotTable> for Hash {
    fn from(hash: SlotTable) -> Self {
        Self::SlotTable(hash)
    }
}

impl Hash {
    /// The hash of a layer whose config leaves it to the default: [`Hash::balanced`], with the largest power of two up to half of
    /// `embedding_dim` as block, but at most 16 and, if there are that many columns, at least 4.
    ///
    /// A row then consists of several blocks, each shared with different rows: if one is shared with a row that is used far more
    /// often, the others usually are not.
    pub const fn default_for(embedding_dim: usize) -> Self {
        Self::balanced(match embedding_dim {
            0..2 => 1,
            2..4 => 2,
            4..16 => 4,
            16..32 => 8,
            _ => 16,
        })
    }

    /// The same number of rows in every block, at places that depend on `column / block` and on the position of the row in the
    /// table; signed, with seed 0. See [`Balanced`].
    pub const fn balanced(block: usize) -> Self {
        Self::Balanced(Balanced::new(block))
    }

    /// Rows at random places, signed, with seed 0. See [`Mix`].
    pub const fn mix(block: usize) -> Self {
        Self::Mix(Mix::new(block))
    }

    /// The hash of the PyTorch package HashedEmbeddingBag, bit for bit: affine, block 1, unsigned.
    pub const fn original() -> Self {
        Self::affine(
            9_824_516_537,
            57_857_966_300_227,
            104_729,
            117_130_198_221_199,
            1,
        )
    }

    /// The hash of a ROBE module with these `random_numbers` (its buffer, of which the first four matter) and `block` columns
    /// per hash (its `uma_chunk_size`).
    ///
    /// A layer whose rows could overflow ROBE's signed arithmetic is refused when it is built.
    ///
    /// # Errors
    /// Fewer than four numbers, a negative one, a modulus (`random_numbers[0]`) that is not positive, or a block outside
    /// `1..=2^24`.
    pub fn robe(random_numbers: &[i64], block: usize) -> Result<Self> {
        let &[modulus, c, b, a, ..] = random_numbers else {
            bail!(
                "ROBE has at least 4 random_numbers, got {}",
                random_numbers.len()
            );
        };
        for (i, r) in [modulus, c, b, a].into_iter().enumerate() {
            if r < 0 {
                bail!("ROBE's random_numbers must not be negative, got {r} at position {i}");
            }
        }
        let hash = Self::Affine(Affine {
            a: a as u64,
            b: b as u64,
            c: c as u64,
            modulus: modulus as u64,
            block,
            overflow: Overflow::Refuse,
        });
        hash.check().map_err(error)?;
        Ok(hash)
    }

    /// The hash `(row * a + (column / block) * b + c) mod modulus mod (len - block + 1) + column % block`, with a sum that wraps.
    /// See [`Affine`].
    pub const fn affine(a: u64, b: u64, c: u64, modulus: u64, block: usize) -> Self {
        Self::Affine(Affine {
            a,
            b,
            c,
            modulus,
            block,
            overflow: Overflow::Wrap,
        })
    }

    /// No hashing: `slot = row * embedding_dim + column`, for a `hashed_weight` with a slot for every value of the table. It
    /// turns a hashed layer into a plain table (compression 1), for example as the uncompressed baseline of a comparison.
    /// `embedding_dim` must lie in `1..=2^24`.
    pub const fn identity(embedding_dim: usize) -> Self {
        Self::affine(embedding_dim as u64, 0, 0, u64::MAX, embedding_dim)
    }

    /// Rows that are used alike share blocks, for example items that the same users have seen: those whose signatures agree in two
    /// keys of 16 bits; signed, with seed 0. See [`Semantic`], and [`semantic`](crate::semantic) for signatures.
    pub const fn semantic(block: usize) -> Self {
        Self::Semantic(Semantic::new(block))
    }

    /// The hash of a module of the ROBE package with `hmode="lma_hash"` and these `random_numbers` (its buffer, of which those up to
    /// position `10 + 2 * keys_to_use` matter), `key_bits` (4), `keys_to_use` (8) and `block` columns per hash (its
    /// `uma_chunk_size`).
    ///
    /// A layer whose columns could overflow the original's signed arithmetic is refused when it is built.
    ///
    /// # Errors
    /// Zero `key_bits` or `keys_to_use`; `key_bits * keys_to_use` above 32, for which that arithmetic could overflow; more than 20
    /// keys; fewer numbers than these need, or one outside `0..2^31`; or a block outside `1..=2^24`.
    pub fn lma(
        random_numbers: &[i64],
        key_bits: usize,
        keys_to_use: usize,
        block: usize,
    ) -> Result<Self> {
        let hash = Lma::new(random_numbers, key_bits, keys_to_use, block);
        let hash = hash.map(Self::Lma).and_then(|hash| {
            hash.check()?;
            Ok(hash)
        });
        hash.map_err(error)
    }

    /// Each block of `block` columns of a row wherever the table of a layer says. See [`SlotTable`].
    pub const fn slot_table(block: usize) -> Self {
        Self::SlotTable(SlotTable { block })
    }

    /// The name of the tensor of the rows that a layer with this hash keeps beside `hashed_weight`, if it needs one:
    ///
    /// * `signatures`, i64, `(rows,)`, for [`Semantic`] and [`Lma`];
    /// * `slot_table`, u32, `(rows, column_blocks)`, for [`SlotTable`].
    pub const fn row_tensor(&self) -> Option<&'static str> {
        match self {
            Self::Lma(_) | Self::Semantic(_) => Some("signatures"),
            Self::SlotTable(_) => Some("slot_table"),
            Self::Balanced(_) | Self::Mix(_) | Self::Affine(_) => None,
        }
    }

    /// How many consecutive columns share one hash.
    pub const fn block(&self) -> usize {
        match self {
            Self::Balanced(Balanced { block, .. })
            | Self::Mix(Mix { block, .. })
            | Self::Affine(Affine { block, .. })
            | Self::Semantic(Semantic { block, .. })
            | Self::SlotTable(SlotTable { block }) => *block,
            Self::Lma(lma) => lma.block(),
        }
    }

    /// Whether values carry a sign.
    pub const fn signed(&self) -> bool {
        match self {
            Self::Balanced(Balanced { signed, .. })
            | Self::Mix(Mix { signed, .. })
            | Self::Semantic(Semantic { signed, .. }) => *signed,
            Self::Affine(_) | Self::Lma(_) | Self::SlotTable(_) => false,
        }
    }

    /// The slot of virtual element `(row, column)` in a `hashed_weight` of `len` values, and its sign (`1` or `-1`). For
    /// [`Semantic`] and [`Lma`], `row` is the signature of the row.
    ///
    /// `row` may be any `i64`, as it may be with [`BoundsCheck::Off`](crate::BoundsCheck::Off).
    ///
    /// # Errors
    /// Those of [`Hash::check_len`], and a [`SlotTable`], whose slots are in its tensor.
    pub fn slot(&self, row: i64, column: usize, len: usize) -> Result<(usize, i8)> {
        let slots = self.slots(len)?;
        let block = self.block();
        let (column_block, within) = ((column / block) as u64, column % block);
        let signature_of_row_0 = [row];
        let (rows, row) = match slots {
            Slots::Lma(_) | Slots::Semantic(..) => (RowValues::Signatures(&signature_of_row_0), 0),
            Slots::SlotTable(_) => bail!("the slots of a slot table are known to a layer only"),
            Slots::Affine(slots) => {
                let start = slots.plain_slot(row as u64, column_block);
                return Ok((start + within, 1));
            }
            Slots::Mix(_) | Slots::Balanced(_) => (RowValues::None, row as u64),
        };
        let (start, signs) = match slots.with_rows(rows)? {
            Located::Blocks(hash) => locate_one(hash, row, column_block),
            Located::Starts(hash) => locate_one(hash, row, column_block),
        };
        let negative = within < 32 && (signs >> within) & 1 == 1;
        Ok((start + within, if negative { -1 } else { 1 }))
    }

    /// Whether a `hashed_weight` of `len` values suits this hash.
    ///
    /// # Errors
    /// * any hash: a block outside `1..=2^24`, or a `len` smaller than one block;
    /// * balanced, mix, semantic and slot table: a signed block above 32, a `len` that is not a multiple of the block or holds 2^32
    ///   blocks or more;
    /// * semantic: `key_bits` or `keys_to_use` out of range;
    /// * affine: a modulus of 0.
    pub fn check_len(&self, len: usize) -> Result<()> {
        self.check().map_err(error)?;
        let block = self.block();
        if len < block {
            bail!("hashed_weight must hold at least one block of {block} values, got {len}");
        }
        if !self.is_aligned() {
            return Ok(());
        }
        if !len.is_multiple_of(block) {
            bail!("the length of hashed_weight must be a multiple of the block, got {len} and block {block}");
        }
        if u32::try_from(len / block).is_err() {
            bail!(
                "hashed_weight must hold fewer than 2^32 blocks, got {} of {block} values",
                len / block
            );
        }
        Ok(())
    }

    /// The smallest length of at least `len` that suits this hash.
    pub(crate) fn round_up_len(&self, len: usize) -> Result<usize> {
        self.check().map_err(error)?;
        let block = self.block();
        Ok(if self.is_aligned() {
            len.max(1).div_ceil(block).saturating_mul(block)
        } else {
            len.max(block)
        })
    }

    /// Refuses a table whose rows would leave the signed 64-bit range of [`Overflow::Refuse`].
    pub(crate) fn check_table(&self, num_embeddings: usize, embedding_dim: usize) -> Result<()> {
        self.check().map_err(error)?;
        match self {
            Self::Affine(affine) if affine.overflows(num_embeddings, embedding_dim) => bail!(
                "{num_embeddings} rows of {embedding_dim} columns overflow the signed 64-bit arithmetic of this hash"
            ),
            Self::Lma(lma) if lma.overflows(embedding_dim) => {
                bail!("{embedding_dim} columns overflow the signed 64-bit arithmetic of this hash")
            }
            _ => Ok(()),
        }
    }

    /// Binds the hash to a length.
    pub(crate) fn slots(&self, len: usize) -> Result<Slots> {
        self.check_len(len)?;
        Ok(match self {
            Self::Balanced(hash) => Slots::Balanced(hash.bind(len)),
            Self::Mix(hash) => Slots::Mix(hash.bind(len)),
            Self::Affine(hash) => Slots::Affine(hash.bind(len)),
            Self::Lma(hash) => Slots::Lma(hash.bind(len)),
            Self::Semantic(hash) => {
                let (slots, keys) = hash.bind(len);
                Slots::Semantic(slots, keys)
            }
            Self::SlotTable(hash) => Slots::SlotTable(hash.bind(len)),
        })
    }

    /// Whether every block starts at a multiple of its length.
    fn is_aligned(&self) -> bool {
        match self {
            Self::Balanced(_) | Self::Mix(_) | Self::Semantic(_) | Self::SlotTable(_) => true,
            Self::Affine(_) | Self::Lma(_) => false,
        }
    }

    /// An error message if a constant of this hash is out of range.
    fn check(&self) -> std::result::Result<(), String> {
        let block = self.block();
        if block == 0 || block > MAX_BLOCK {
            return Err(format!("block must lie in 1..={MAX_BLOCK}, got {block}"));
        }
        // One hash carries 32 sign bits.
        if self.signed() && block > 32 {
            return Err(format!("a signed block must be at most 32, got {block}"));
        }
        match self {
            Self::Semantic(hash) => hash.check(),
            Self::Affine(Affine { modulus: 0, .. }) => {
                Err("the modulus of an affine hash must be at least 1, got 0".into())
            }
            _ => Ok(()),
        }
    }
}

/// The longest block. The kernels rely on its size in bytes fitting a 32-bit word.
const MAX_BLOCK: usize = 1 << 24;

/// A hash bound to the length of one `hashed_weight`, in the form that loops and kernels use.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Slots {
    Affine(AffineSlots),
    Lma(LmaSlots),
    Mix(BlockSlots),
    Balanced(BlockSlots),
    Semantic(BlockSlots, Keys),
    SlotTable(BlockSlots),
}

/// What a hash reads of each row, on the CPU.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RowValues<'a> {
    None,
    Signatures(&'a [i64]),
    SlotTable { blocks: &'a [u32], row_len: usize },
}

/// A bound hash with what it reads of each row, in the form of the CPU loops.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Located<'a> {
    Blocks(BlockRows<'a>),
    Starts(StartRows<'a>),
}

impl Slots {
    /// Consecutive columns that share a hash.
    pub fn block(&self) -> usize {
        let block = match self {
            Self::Affine(slots) => slots.block,
            Self::Lma(slots) => slots.block,
            Self::Mix(slots)
            | Self::Balanced(slots)
            | Self::Semantic(slots, _)
            | Self::SlotTable(slots) => slots.block,
        };
        block as usize
    }

    /// Adds what the hash reads of each row.
    pub fn with_rows<'a>(&self, rows: RowValues<'a>) -> Result<Located<'a>> {
        let blocks = |slots, family| Located::Blocks(BlockRows { slots, family });
        Ok(match (*self, rows) {
            (Self::Affine(slots), RowValues::None) => {
                Located::Starts(StartRows::Affine(slots.into()))
            }
            (Self::Lma(slots), RowValues::Signatures(of @ [_, ..])) => {
                Located::Starts(StartRows::Lma(LmaRows::new(slots, of)))
            }
            (Self::Mix(slots), RowValues::None) => blocks(slots, BlockFamily::Mix),
            (Self::Balanced(slots), RowValues::None) => blocks(slots, BlockFamily::Balanced),
            (Self::Semantic(slots, keys), RowValues::Signatures(of @ [_, ..])) => {
                blocks(slots, BlockFamily::Semantic(of, keys))
            }
            (
                Self::SlotTable(slots),
                RowValues::SlotTable {
                    blocks: table,
                    row_len,
                },
            ) if (1..=table.len()).contains(&row_len) => {
                blocks(slots, BlockFamily::SlotTable(table, row_len))
            }
            _ => bail!("the hash and its row tensor do not go together"),
        })
    }
}

/// The first slot of one column block of one row, and its signs.
fn locate_one<H: Locate>(hash: H, row: u64, column_block: u64) -> (usize, u32) {
    let (mut place, mut signs) = ([H::Place::default()], [0]);
    let columns = hash.column_block(column_block);
    hash.locate(&[row], &[columns], &mut place, &mut signs);
    (hash.slot(place[0], hash.block()), signs[0])
}

/// The most rows that [`Locate::locate`] takes at once.
pub(crate) const MAX_ROWS: usize = 256;

/// The interface of a bound hash to the CPU loops; a trait, so that the loops are compiled for each implementation.
///
/// The location of a column block of a row consists of a place and sign bits. They are kept in separate slices, so that loops
/// over either can be vectorised.
pub(crate) trait Locate: Copy + Send + Sync {
    /// The constants of one column block, the same for every row and computed once per lookup.
    type ColumnBlock: Copy + Send + Sync;
    /// The position at which a column block starts, in a compact form; [`slot`](Self::slot) translates it. Larger places have
    /// larger slots.
    type Place: Copy + Default + Ord + Send + Sync;
    /// Whether values may have signs; otherwise [`locate`](Self::locate) writes none.
    const SIGNED: bool;

    /// Consecutive columns that share a hash.
    fn block(&self) -> usize;
    /// The constants of column block `number`.
    fn column_block(&self, number: u64) -> Self::ColumnBlock;
    /// Locates `column_blocks` of at most [`MAX_ROWS`] `rows`. The place of column block `i` of row `j`, and its sign bits, one per
    /// column, are written at `i * rows.len() + j`.
    ///
    /// The inner loop goes over the rows, so that it is long enough to vectorise even where a row has few column blocks.
    fn locate(
        &self,
        rows: &[u64],
        column_blocks: &[Self::ColumnBlock],
        places: &mut [Self::Place],
        signs: &mut [u32],
    );
    /// The first slot of a place. `block` must equal [`Self::block`]; callers that know it as a constant can pass that.
    fn slot(&self, place: Self::Place, block: usize) -> usize;
    /// The largest place there is.
    fn last_place(&self) -> Self::Place;
}
