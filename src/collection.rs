//! Many tables over one `hashed_weight`, looked up in one op.
//!
//! The tables of a collection are consecutive rows of one virtual table: row `r` of table `t` is row
//! `num_embeddings[0] + … + num_embeddings[t - 1] + r`, as with ROBE's `val_offset`. One hash spreads all of them over one
//! parameter, so a large table can use slots that a small one leaves free, and a lookup in all of them is one op: on CUDA one
//! launch, which shifts the rows and checks each against its own table.

use crate::bags::JaggedLayout;
use crate::bounds::BoundsCheck;
use crate::config::{HashedEmbeddingBagConfig, HashedWeightConfig};
use crate::error::bail;
use crate::hash::Hash;
use crate::layer::{create, HashedEmbeddingBag};
use crate::low_bit::{Bits, LowBit};
use crate::op::{check_weights_shape, contiguous_indices};
use crate::tables::Tables;
use candle_core::{DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use std::sync::Arc;

/// Named tables of one `embedding_dim` and one mode that share a 1-D parameter, `hashed_weight`.
///
/// * `hashed_weight`: `(len,)`; f32, f64, f16 or bf16. f16 and bf16 are summed in f32.
/// * indices: u32, i32 or i64, each in `0..num_embeddings` of its own table, in one of these forms:
///   * `(batch, tables)`: one row of each table per sample ([`Module::forward`]);
///   * `(batch, tables, bag_len)`: a bag of each, filled up with `padding_idx` ([`Module::forward`]);
///   * `(nnz,)` with `offsets` `(tables * batch,)`, or `(tables * batch + 1,)` with `include_last_offset`
///     ([`forward_jagged`](Self::forward_jagged)).
/// * output: `(batch, tables, embedding_dim)` in the dtype of `hashed_weight`. An empty bag, or one of padding only, is
///   zeros.
///
/// It is differentiable in `hashed_weight` if that is a variable. Only its inputs are kept for the backward pass.
///
/// The rows of a table follow those of the tables before it. So if you reorder the tables of a trained collection, or add rows to
/// one of them, the values of all later tables change.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_hashed_embedding_bag::{hashed_embedding_bag_collection, JaggedLayout};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let tables = [("user", 6000), ("movie", 4000)];
/// let collection = hashed_embedding_bag_collection(tables, 16, 0.1, Default::default(), vb)?;
/// assert_eq!(collection.hashed_weight().dims(), [16_000]);
///
/// // Three samples, each a user and a movie.
/// let indices = Tensor::new(&[[17u32, 3999], [17, 5], [5999, 0]], &Device::Cpu)?;
/// assert_eq!(collection.forward(&indices)?.dims(), [3, 2, 16]);
///
/// // Two samples with one user each, and two movies for the first sample, none for the second.
/// let indices = Tensor::new(&[17u32, 5999, 3999, 5], &Device::Cpu)?;
/// let offsets = Tensor::new(&[0u32, 1, 2, 4], &Device::Cpu)?;
/// let pooled = collection.forward_jagged(&indices, &offsets, JaggedLayout::FeatureMajor)?;
/// assert_eq!(pooled.dims(), [2, 2, 16]);
///
/// // Movie 4000 does not exist, though the shared parameter has room for more rows.
/// let indices = Tensor::new(&[[17u32, 4000]], &Device::Cpu)?;
/// let error = collection.forward(&indices).unwrap_err().to_string();
/// assert!(error.contains("table movie"));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct HashedEmbeddingBagCollection {
    /// All tables as one layer; the position of a bag tells which table it looks into.
    bag: HashedEmbeddingBag,
}

/// Creates a [`HashedEmbeddingBagCollection`] of tables, given by name and number of rows, on a variable named `hashed_weight`,
/// which is sized and initialised as for one [`hashed_embedding_bag`](crate::hashed_embedding_bag()) with all the rows.
///
/// # Errors
/// No tables, two with the same name, one without rows, a `config.first_row` other than 0, and the errors of
/// [`hashed_embedding_bag`](crate::hashed_embedding_bag()).
pub fn hashed_embedding_bag_collection<N: Into<String>>(
    tables: impl IntoIterator<Item = (N, usize)>,
    embedding_dim: usize,
    hashed_weight: impl Into<HashedWeightConfig>,
    config: HashedEmbeddingBagConfig,
    vb: VarBuilder,
) -> Result<HashedEmbeddingBagCollection> {
    let tables = named(tables, &config)?;
    let bag = create(tables, embedding_dim, hashed_weight.into(), config, vb)?;
    Ok(HashedEmbeddingBagCollection { bag })
}

fn named<N: Into<String>>(
    tables: impl IntoIterator<Item = (N, usize)>,
    config: &HashedEmbeddingBagConfig,
) -> Result<Tables> {
    if config.first_row != 0 {
        bail!(
            "the tables of a collection start at row 0, got first_row {}",
            config.first_row
        );
    }
    Tables::named(tables.into_iter().map(|(name, rows)| (name.into(), rows)))
}

impl HashedEmbeddingBagCollection {
    /// A collection on an existing `hashed_weight`, `(len,)`.
    ///
    /// # Errors
    /// Those of [`hashed_embedding_bag_collection`] except for the compression; a `hashed_weight` that is not 1-D or not of a
    /// float dtype; a length that does not suit the hash ([`Hash::check_len`]).
    pub fn new<N: Into<String>>(
        hashed_weight: Tensor,
        tables: impl IntoIterator<Item = (N, usize)>,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        Self::over_stored(hashed_weight, None, tables, embedding_dim, config)
    }

    /// The same on values, or on packed bytes.
    pub(crate) fn over_stored<N: Into<String>>(
        hashed_weight: Tensor,
        low_bit: Option<LowBit>,
        tables: impl IntoIterator<Item = (N, usize)>,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        let tables = Arc::new(named(tables, &config)?);
        let bag =
            HashedEmbeddingBag::over_stored(hashed_weight, low_bit, tables, embedding_dim, config)?;
        Ok(Self { bag })
    }

    /// The same collection in 8 or 4 bits, and the relative error of the rounding; see [`HashedEmbeddingBag::to_bits`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::to_bits`].
    pub fn to_bits(&self, bits: Bits) -> Result<(Self, f64)> {
        let (bag, error) = self.bag.to_bits(bits)?;
        Ok((Self { bag }, error))
    }

    /// What the bytes of [`hashed_weight`](Self::hashed_weight) mean, if this collection was rounded by
    /// [`to_bits`](Self::to_bits).
    pub fn low_bit(&self) -> Option<&LowBit> {
        self.bag.low_bit()
    }

    /// The values of `hashed_weight`; see [`HashedEmbeddingBag::hashed_weight_values`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::hashed_weight_values`].
    pub fn hashed_weight_values(&self) -> Result<Tensor> {
        self.bag.hashed_weight_values()
    }

    /// The same collection with outputs of another dtype; see [`HashedEmbeddingBag::with_output_dtype`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::with_output_dtype`].
    pub fn with_output_dtype(self, dtype: DType) -> Result<Self> {
        let bag = self.bag.with_output_dtype(dtype)?;
        Ok(Self { bag })
    }

    /// Pools jagged `indices` `(nnz,)` by `offsets` `(tables * batch,)`, or `(tables * batch + 1,)` with
    /// `include_last_offset`, to `(batch, tables, embedding_dim)`. `layout` is the order of the bags. Both are the `values` and
    /// `offsets` of TorchRec's `KeyedJaggedTensor`, in [`JaggedLayout::FeatureMajor`] and with `include_last_offset`.
    ///
    /// # Errors
    /// Wrong ranks, dtypes or devices, a number of bags that is not a multiple of the number of tables; with
    /// [`BoundsCheck::Error`] also a row outside its table that is not padding (the message gives table, position and value),
    /// and offsets that do not start at 0, decrease or exceed `nnz`.
    pub fn forward_jagged(
        &self,
        indices: &Tensor,
        offsets: &Tensor,
        layout: JaggedLayout,
    ) -> Result<Tensor> {
        self.by_table(self.bag.lookup(indices, Some(offsets), layout, None)?)
    }

    /// Pools bags of each table as [`Module::forward`] does, with each row multiplied by its own weight; mode sum only.
    /// `per_sample_weights` has the shape of `indices` and the dtype of `hashed_weight`, and gets a gradient if it is
    /// tracked.
    ///
    /// # Errors
    /// A mode other than sum, weights of another shape or dtype, and those of [`Module::forward`].
    pub fn forward_weighted(
        &self,
        indices: &Tensor,
        per_sample_weights: &Tensor,
    ) -> Result<Tensor> {
        self.lookup(indices, Some(per_sample_weights))
    }

    /// [`forward_jagged`](Self::forward_jagged) with each row multiplied by its own weight, as in
    /// [`forward_weighted`](Self::forward_weighted).
    ///
    /// # Errors
    /// A mode other than sum, weights of another shape or dtype, and those of [`forward_jagged`](Self::forward_jagged).
    pub fn forward_weighted_jagged(
        &self,
        indices: &Tensor,
        offsets: &Tensor,
        layout: JaggedLayout,
        per_sample_weights: &Tensor,
    ) -> Result<Tensor> {
        let weights = Some(per_sample_weights);
        self.by_table(self.bag.lookup(indices, Some(offsets), layout, weights)?)
    }

    /// Looks up bags of equal length, with or without per-sample weights.
    fn lookup(&self, indices: &Tensor, per_sample_weights: Option<&Tensor>) -> Result<Tensor> {
        let tables = self.bag.tables().len();
        let (batch, bag_len) = match *indices.dims() {
            [batch, n] if n == tables => (batch, 1),
            [batch, n, bag_len] if n == tables => (batch, bag_len),
            ref dims => bail!(
                "indices must have shape [batch, {tables}] or [batch, {tables}, bag_len], got {dims:?}"
            ),
        };
        let Some(bags) = batch.checked_mul(tables) else {
            bail!("{batch} samples of {tables} bags are too many");
        };
        let per_sample_weights = match per_sample_weights {
            Some(weights) => {
                check_weights_shape(weights, indices)?;
                Some(weights.reshape((bags, bag_len))?)
            }
            None => None,
        };
        let indices = contiguous_indices(indices)?.reshape((bags, bag_len))?;
        let layout = JaggedLayout::BatchMajor;
        let pooled = self
            .bag
            .lookup(&indices, None, layout, per_sample_weights.as_ref())?;
        self.by_table(pooled)
    }

    /// `(batch * tables, embedding_dim)` to `(batch, tables, embedding_dim)`.
    fn by_table(&self, pooled: Tensor) -> Result<Tensor> {
        let (bags, embedding_dim) = pooled.dims2()?;
        let tables = self.bag.tables().len();
        pooled.reshape((bags / tables, tables, embedding_dim))
    }

    /// Table `name` as a layer of its own on the same `hashed_weight`: it looks up the same rows, and trains them.
    ///
    /// # Errors
    /// No such table.
    pub fn table(&self, name: &str) -> Result<HashedEmbeddingBag> {
        let mut first_row = 0;
        for (table, num_embeddings) in self.tables() {
            if table == name {
                let config = HashedEmbeddingBagConfig {
                    first_row,
                    ..self.bag.config()
                };
                return HashedEmbeddingBag::over_stored(
                    self.hashed_weight().clone(),
                    self.low_bit().cloned(),
                    Arc::new(Tables::one(first_row, num_embeddings)?),
                    self.embedding_dim(),
                    config,
                );
            }
            first_row += num_embeddings;
        }
        let names: Vec<_> = self.tables().map(|(name, _)| name).collect();
        bail!("no table {name}, only {}", names.join(", "))
    }

    /// The tables, by name and number of rows, in order.
    pub fn tables(&self) -> impl ExactSizeIterator<Item = (&str, usize)> {
        self.bag.tables().iter()
    }

    /// The configuration of this collection, as [`HashedEmbeddingBagCollection::new`] takes it. Its hash is the one in use, even
    /// if it was left to the default.
    pub fn config(&self) -> HashedEmbeddingBagConfig {
        self.bag.config()
    }

    /// The parameter, `(len,)`; of a collection in 8 or 4 bits, its bytes, see [`HashedEmbeddingBag::hashed_weight`].
    pub fn hashed_weight(&self) -> &Tensor {
        self.bag.hashed_weight()
    }

    /// The number of columns of every table, and of the output.
    pub fn embedding_dim(&self) -> usize {
        self.bag.embedding_dim()
    }

    /// The actual compression: the length of `hashed_weight` over the size of all tables.
    pub fn compression(&self) -> f64 {
        self.bag.compression()
    }

    /// The hash in use.
    pub fn hash(&self) -> Hash {
        self.bag.hash()
    }

    /// The same collection with another bounds check, for example after loading it from a checkpoint.
    pub fn with_bounds_check(self, bounds_check: BoundsCheck) -> Self {
        let bag = self.bag.with_bounds_check(bounds_check);
        Self { bag }
    }

    /// The same collection on another weight of the same length; see [`HashedEmbeddingBag::with_hashed_weight`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::with_hashed_weight`].
    pub fn with_hashed_weight(&self, hashed_weight: Tensor) -> Result<Self> {
        let bag = self.bag.with_hashed_weight(hashed_weight)?;
        Ok(Self { bag })
    }
}

impl Module for HashedEmbeddingBagCollection {
    /// Looks up `indices` `(batch, tables)` or pools `(batch, tables, bag_len)`, to `(batch, tables, embedding_dim)`.
    fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        self.lookup(indices, None)
    }
}
