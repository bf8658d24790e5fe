//! LMA modules of the ROBE package, and the DLRM of SCMA's authors.

use super::robe::{RANDOM_NUMBERS, SIGNATURE, WEIGHT};
use super::{named, with_hash, StateDict};
use crate::checkpoint::file::join;
use crate::collection::HashedEmbeddingBagCollection;
use crate::config::HashedEmbeddingBagConfig;
use crate::hash::Hash;
use crate::layer::{HashedEmbeddingBag, HASHED_WEIGHT};
use crate::op::check_dtype;
use candle_core::npy::NpzTensors;
use candle_core::{bail, DType, Device, Error, Result, Tensor};
use std::path::Path;

/// The name of SCMA's table in its file.
const BIG_MIN_HASH_TABLE: &str = "big_min_hash_table";

/// What an [LMA module](StateDict::lma) was made with, and its state dict does not hold.
#[derive(Debug, Clone)]
pub struct LmaModule {
    /// How many consecutive columns share a hash. Default 1.
    pub uma_chunk_size: usize,
    /// The bits of a key. Default 4.
    pub key_bits: usize,
    /// How many keys enter a hash. Default 8.
    pub keys_to_use: usize,
    /// The signatures of all rows, i64, `(rows,)`, in place of the entry `signature`. Default `None`: the entry.
    pub signature: Option<Tensor>,
}

impl Default for LmaModule {
    fn default() -> Self {
        Self {
            uma_chunk_size: 1,
            key_bits: 4,
            keys_to_use: 8,
            signature: None,
        }
    }
}

impl StateDict {
    /// Takes the module of the ROBE package at `prefix` that has `hmode="lma_hash"`: `hashed_weight` and its other name `weight`, 1-D;
    /// `random_numbers`, i64 `(51,)`; `signature`, i64 `(rows,)`, with the rows of the whole virtual table.
    ///
    /// Its `val_offset` is `config.first_row`. The hash is [`Hash::lma`]; leave `config.hash` at `None`.
    ///
    /// # Errors
    /// [What is refused](Self#what-is-refused), and the errors of [`Hash::lma`] and [`HashedEmbeddingBag::with_row_tensor`].
    pub fn lma(
        &mut self,
        prefix: &str,
        num_embeddings: usize,
        embedding_dim: usize,
        module: LmaModule,
        config: HashedEmbeddingBagConfig,
        device: &Device,
    ) -> Result<HashedEmbeddingBag> {
        let LmaModule {
            uma_chunk_size,
            key_bits,
            keys_to_use,
            signature,
        } = module;
        let known = [HASHED_WEIGHT, WEIGHT, RANDOM_NUMBERS, SIGNATURE];
        let module = self.module(prefix, &known)?;
        let numbers = module.key(RANDOM_NUMBERS);
        let hash = Hash::lma(
            &self.integers(&numbers, 51)?,
            key_bits,
            keys_to_use,
            uma_chunk_size,
        );
        let config = with_hash(config, hash.map_err(|e| named(&numbers, e))?)?;
        let signatures = match signature {
            Some(signatures) => signatures.to_device(device)?,
            None => self.load(&module.key(SIGNATURE), device)?,
        };
        let missing = module.key(HASHED_WEIGHT);
        let (key, weight) = self.parameter(module.parameters(), &missing, device)?;
        let layer = HashedEmbeddingBag::with_row_tensor(
            weight,
            &signatures,
            num_embeddings,
            embedding_dim,
            config,
        );
        let layer = layer.map_err(|e| named(&key, e))?;
        self.remove(module.keys());
        Ok(layer)
    }

    /// Takes the tables of the DLRM of SCMA's authors at `prefix`: `hashed_weight`, 1-D. `tables` gives their names here and their
    /// numbers of rows, in order. The rest of the model is left.
    ///
    /// `table` is what the model was trained with besides, which the state dict does not hold: `big_min_hash_table`, i64,
    /// `(rows, embedding_dim)`, with the rows of all tables; [`scma_table`] reads it. The hash is [`Hash::slot_table`] with block 1; the
    /// slot of an entry is that entry modulo the length of `hashed_weight`. Leave `config.hash` at `None`.
    ///
    /// # Errors
    /// [What is refused](Self#what-is-refused), a `table` of another dtype or shape, and the errors of
    /// [`HashedEmbeddingBagCollection::with_row_tensor`].
    pub fn scma<N: Into<String>>(
        &mut self,
        prefix: &str,
        tables: impl IntoIterator<Item = (N, usize)>,
        embedding_dim: usize,
        table: &Tensor,
        config: HashedEmbeddingBagConfig,
        device: &Device,
    ) -> Result<HashedEmbeddingBagCollection> {
        let key = join(prefix, HASHED_WEIGHT);
        let weight = self.load(&key, device)?;
        let config = with_hash(config, Hash::slot_table(1))?;
        check_dtype(BIG_MIN_HASH_TABLE, table, &[DType::I64])?;
        let Some(len) = i64::try_from(weight.elem_count()).ok().filter(|&n| n > 0) else {
            bail!("import: {key} has no values");
        };
        // Other lengths are refused below.
        let slot = |raw: i64| raw.rem_euclid(len) as u32;
        let raw = table.flatten_all()?.to_device(&Device::Cpu)?;
        let slots = raw.to_vec1::<i64>()?.into_iter().map(slot);
        let slots = Tensor::from_iter(slots, &Device::Cpu)?.reshape(table.dims())?;
        let collection = HashedEmbeddingBagCollection::with_row_tensor(
            weight,
            &slots.to_device(device)?,
            tables,
            embedding_dim,
            config,
        );
        let collection = collection.map_err(|e| named(&key, e))?;
        self.remove([key].into_iter());
        Ok(collection)
    }
}

/// Reads the table of SCMA's programs, which they write as an .npz file: its array `big_min_hash_table`, i64,
/// `(rows, embedding_dim)`, on the CPU.
///
/// # Errors
/// No such file or array, or another dtype or shape.
pub fn scma_table(path: impl AsRef<Path>, rows: usize, embedding_dim: usize) -> Result<Tensor> {
    let path = path.as_ref();
    let read = || {
        let arrays = NpzTensors::new(path)?;
        let names = arrays.names();
        if !names.iter().any(|name| *name == BIG_MIN_HASH_TABLE) {
            let names: Vec<_> = names.iter().map(|name| name.as_str()).collect();
            bail!("no {BIG_MIN_HASH_TABLE}, only {}", names.join(", "));
        }
        // Before it is read, so that no file asks for more memory than the caller expects.
        let (shape, dtype) = arrays.get_shape_and_dtype(BIG_MIN_HASH_TABLE)?;
        if (shape.dims(), dtype) != (&[rows, embedding_dim], DType::I64) {
            bail!(
                "{BIG_MIN_HASH_TABLE} must be i64 of shape [{rows}, {embedding_dim}], got {} of shape {:?}",
                dtype.as_str(),
                shape.dims()
            );
        }
        match arrays.get(BIG_MIN_HASH_TABLE)? {
            Some(table) => Ok(table),
            None => bail!("no {BIG_MIN_HASH_TABLE}"),
        }
    };
    read().map_err(|e: Error| Error::msg(format!("import: {e}")).with_path(path))
}
