//! Test data that every dtype represents exactly, and the hashes to test.

use candle_core::{DType, Device, Result, Tensor};
use candle_hashed_embedding_bag::{
    Balanced, BoundsCheck, Gradient, Hash, HashedEmbeddingBag, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, Mix, Mode, Semantic,
};

pub const DTYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];
pub const INDEX_DTYPES: [DType; 3] = [DType::U32, DType::I64, DType::I32];
pub const MODES: [Mode; 3] = [Mode::Sum, Mode::Mean, Mode::Max];

/// Every mode, and whether rows have weights of their own.
pub const POOLINGS: [(Mode, bool); 4] = [
    (Mode::Sum, false),
    (Mode::Sum, true),
    (Mode::Mean, false),
    (Mode::Max, false),
];

/// A small deterministic generator. It is a linear congruential one, unlike any hash under test.
pub struct Draws(u64);

impl Draws {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2) + 1)
    }

    /// A number in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    /// `n` row numbers in `0..num_embeddings`.
    pub fn rows(&mut self, n: usize, num_embeddings: usize) -> Vec<i64> {
        (0..n).map(|_| self.below(num_embeddings) as i64).collect()
    }

    /// Values among -1, -0.5, 0, 0.5 and 1. Sums of a few dozen are exact in every float dtype and in every order, and equal
    /// values are frequent.
    pub fn halves(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.below(5) as f64 / 2.0 - 1.0).collect()
    }

    /// Multiples of 2^-19 in -1..1: f32 holds them exactly, but not their sums.
    pub fn reals(&mut self, n: usize) -> Vec<f64> {
        (0..n)
            .map(|_| self.below(1 << 20) as f64 / f64::from(1 << 19) - 1.0)
            .collect()
    }
}

/// A 1-D float tensor.
pub fn floats(values: &[f64], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::from_slice(values, values.len(), &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(device)
}

/// A 1-D integer tensor.
pub fn integers(values: &[i64], dtype: DType, device: &Device) -> Result<Tensor> {
    let n = values.len();
    let tensor = match dtype {
        DType::U32 => Tensor::from_iter(values.iter().map(|&v| v as u32), &Device::Cpu),
        DType::I32 => Tensor::from_iter(values.iter().map(|&v| v as i32), &Device::Cpu),
        _ => Tensor::from_slice(values, n, &Device::Cpu),
    }?;
    if n == 0 && device.is_cuda() {
        // The driver refuses allocations of zero bytes; an empty view of something works.
        return integers(&[0], dtype, device)?.narrow(0, 0, 0);
    }
    tensor.to_device(device)
}

/// Where each bag starts, and where the last one ends: one more value than there are bags.
pub fn offsets_of<T>(bags: &[Vec<T>]) -> Vec<i64> {
    let ends = bags.iter().scan(0, |end, bag| {
        *end += bag.len() as i64;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

/// A contiguous copy made on the CPU, because candle cannot copy i32 on CUDA.
pub fn contiguous(indices: &Tensor) -> Result<Tensor> {
    let device = indices.device();
    indices
        .to_device(&Device::Cpu)?
        .contiguous()?
        .to_device(device)
}

/// A configuration with this mode and hash, and defaults for the rest.
pub fn config(mode: Mode, hash: Hash) -> HashedEmbeddingBagConfig {
    HashedEmbeddingBagConfig {
        mode,
        hash: Some(hash),
        ..Default::default()
    }
}

/// A configuration of which nothing is the default.
pub fn unlike_the_default() -> HashedEmbeddingBagConfig {
    HashedEmbeddingBagConfig {
        mode: Mode::Mean,
        hash: Some(Hash::mix(4)),
        padding_idx: Some(7),
        include_last_offset: true,
        first_row: 5,
        bounds_check: BoundsCheck::Off,
        gradient: Gradient::Deterministic,
        sparse: true,
    }
}

/// A layer on this `hashed_weight`, with a [`row_tensor`] if its hash needs one; it trains where `hashed_weight` is the tensor of a
/// variable.
pub fn layer(
    hashed_weight: &Tensor,
    num_embeddings: usize,
    embedding_dim: usize,
    config: HashedEmbeddingBagConfig,
) -> Result<HashedEmbeddingBag> {
    let (weight, rows) = (hashed_weight.clone(), config.first_row + num_embeddings);
    match row_tensor(&config, rows, embedding_dim, hashed_weight)? {
        None => HashedEmbeddingBag::new(weight, num_embeddings, embedding_dim, config),
        Some(tensor) => HashedEmbeddingBag::with_row_tensor(
            weight,
            &tensor,
            num_embeddings,
            embedding_dim,
            config,
        ),
    }
}

/// A collection on this `hashed_weight`, with a [`row_tensor`] if its hash needs one.
pub fn collection<const N: usize>(
    hashed_weight: &Tensor,
    tables: [(&str, usize); N],
    embedding_dim: usize,
    config: HashedEmbeddingBagConfig,
) -> Result<HashedEmbeddingBagCollection> {
    let (weight, rows) = (
        hashed_weight.clone(),
        tables.iter().map(|(_, rows)| rows).sum(),
    );
    match row_tensor(&config, rows, embedding_dim, hashed_weight)? {
        None => HashedEmbeddingBagCollection::new(weight, tables, embedding_dim, config),
        Some(tensor) => HashedEmbeddingBagCollection::with_row_tensor(
            weight,
            &tensor,
            tables,
            embedding_dim,
            config,
        ),
    }
}

/// What a hash that reads a row tensor finds in it for a row: any bits, among which all parts of a word vary.
pub fn signature(row: i64) -> i64 {
    let x = (row as u64 + 1).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    (x ^ (x >> 32)).wrapping_mul(0xA076_1D64_78BD_642F) as i64
}

/// What a slot table has for a column block of a row.
pub fn table_entry(row: i64, column_block: usize, num_blocks: usize) -> usize {
    let x = signature(row) as u64 ^ (column_block as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((x ^ (x >> 29)) % num_blocks as u64) as usize
}

/// The row tensor of so many rows for the hash of a configuration, if it needs one: of [`signature`] or [`table_entry`], on the
/// device of `hashed_weight`.
pub fn row_tensor(
    config: &HashedEmbeddingBagConfig,
    rows: usize,
    embedding_dim: usize,
    hashed_weight: &Tensor,
) -> Result<Option<Tensor>> {
    let Some((hash, name)) = config
        .hash
        .and_then(|hash| Some((hash, hash.row_tensor()?)))
    else {
        return Ok(None);
    };
    let (rows, num_blocks) = (0..rows as i64, hashed_weight.elem_count() / hash.block());
    let tensor = match name {
        "signatures" => Tensor::from_iter(rows.map(signature), &Device::Cpu)?,
        _ => {
            let column_blocks = embedding_dim.div_ceil(hash.block());
            let shape = (rows.end as usize, column_blocks);
            let entries = rows.flat_map(|row| {
                (0..column_blocks).map(move |i| table_entry(row, i, num_blocks.max(1)) as u32)
            });
            Tensor::from_iter(entries, &Device::Cpu)?.reshape(shape)?
        }
    };
    tensor.to_device(hashed_weight.device()).map(Some)
}

pub const SIGNED: bool = true;
pub const UNSIGNED: bool = false;

/// A hash that puts rows at random places.
pub fn mix(seed: u64, block: usize, signed: bool) -> Hash {
    Hash::from(Mix {
        seed,
        block,
        signed,
    })
}

/// A hash that gives every block as many rows.
pub fn balanced(seed: u64, block: usize, signed: bool) -> Hash {
    Hash::from(Balanced {
        seed,
        block,
        signed,
    })
}

pub fn affine(a: u64, b: u64, c: u64, modulus: u64, block: usize) -> Hash {
    Hash::affine(a, b, c, modulus, block)
}

/// The first random numbers of a ROBE module with the default seed.
pub const ROBE_NUMBERS: [i64; 4] = [2_038_074_743, 634_329_019, 1_825_252_241, 871_205_356];

/// The hash of a ROBE module with the default seed.
pub fn robe(chunk_size: usize) -> Hash {
    Hash::robe(&ROBE_NUMBERS, chunk_size).expect("a valid hash")
}

/// The random numbers of the ROBE package with the default seed, as far as LMA with 12 keys uses them.
pub const LMA_NUMBERS: [i64; 35] = [
    2038074743, 634329019, 1825252241, 871205356, 80759397, 1857946201, 679088993, 343857360,
    425474381, 538847776, 1086915907, 369480626, 585176928, 1830667799, 17682904, 42749099,
    642135753, 666118921, 852289015, 1807511361, 400946194, 961960675, 1717623355, 348735301,
    1908929968, 1392981797, 1360581189, 1828438555, 1817122323, 2000861453, 1801692958, 1281466102,
    667742013, 855380150, 891042863,
];

/// The hash of an LMA module with the default seed.
pub fn lma(key_bits: usize, keys_to_use: usize, chunk_size: usize) -> Hash {
    Hash::lma(&LMA_NUMBERS, key_bits, keys_to_use, chunk_size).expect("a valid hash")
}

pub fn semantic(key_bits: usize, keys_to_use: usize, block: usize, signed: bool) -> Hash {
    Hash::from(Semantic {
        seed: 3,
        key_bits,
        keys_to_use,
        block,
        signed,
    })
}

/// A plain table: no two values share a slot.
pub fn identity(embedding_dim: usize) -> Hash {
    Hash::identity(embedding_dim)
}

/// Every hash family, with blocks that a 16-byte memory access fills once, several times, in part or not at all.
pub fn every_hash() -> Vec<Hash> {
    vec![
        Hash::original(),
        robe(1),
        robe(8),
        affine(u64::MAX - 58, u64::MAX / 3, 7, u64::MAX - 4, 3),
        mix(0, 1, SIGNED),
        balanced(7, 3, SIGNED),
        mix(u64::MAX, 4, UNSIGNED),
        balanced(0, 1, SIGNED),
        balanced(1, 4, SIGNED),
        mix(1, 8, SIGNED),
        balanced(9, 8, UNSIGNED),
        mix(2, 16, SIGNED),
        balanced(2, 16, SIGNED),
        balanced(3, 32, SIGNED),
        mix(4, 64, UNSIGNED),
        lma(4, 8, 1),
        lma(2, 12, 8),
        semantic(16, 2, 1, SIGNED),
        semantic(4, 3, 4, UNSIGNED),
        semantic(8, 8, 16, SIGNED),
        Hash::slot_table(1),
        Hash::slot_table(8),
        Hash::slot_table(16),
    ]
}

/// The smallest length of at least `len` that is a multiple of the block, which suits every hash.
pub fn whole_blocks(hash: &Hash, len: usize) -> usize {
    len.next_multiple_of(hash.block())
}
