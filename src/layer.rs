//! The layers, as candle-nn has them: a config with `Default`, a free constructor over a `VarBuilder`, `Module`.
//!
//! | | a table of rows | the same, hashed |
//! |---|---|---|
//! | one row per index | `candle_nn::Embedding` | [`HashedEmbedding`] |
//! | pooled bags of rows | `torch.nn.EmbeddingBag` | [`HashedEmbeddingBag`] |
//!
//! Many tables over one parameter are a [`HashedEmbeddingBagCollection`](crate::HashedEmbeddingBagCollection).

use crate::bags::JaggedLayout;
use crate::bounds::BoundsCheck;
use crate::error::bail;
use crate::hash::Hash;
use crate::op::{self, check_dtype, Gradient, Mode, Offsets, Table, WEIGHT_DTYPES};
use crate::tables::Tables;
use candle_core::{Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};
use std::sync::Arc;

/// The name of the parameter, here and in the state dict of the PyTorch package.
pub(crate) const HASHED_WEIGHT: &str = "hashed_weight";

/// What [`hashed_embedding_bag`] and [`hashed_embedding`] build.
///
/// ```
/// use candle_hashed_embedding_bag::{HashedEmbeddingBagConfig, Mode};
///
/// let config = HashedEmbeddingBagConfig {
///     compression: 1.0 / 16.0,
///     mode: Mode::Mean,
///     ..Default::default()
/// };
/// assert_eq!(config.hash, None);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HashedEmbeddingBagConfig {
    /// The length of `hashed_weight` over `num_embeddings * embedding_dim`; any positive number. Default 1/64.
    pub compression: f64,
    /// How the rows of a bag become one. Default [`Mode::Sum`].
    pub mode: Mode,
    /// Where virtual elements find their slots. Default `None`: [`Hash::default_for`] the embedding dimension.
    pub hash: Option<Hash>,
    /// Indices equal to it are padding: they take no part in a bag and get no gradient. It may lie outside the table,
    /// such as -1. Default `None`.
    pub padding_idx: Option<i64>,
    /// Offsets hold one more value, the end of the last bag. Default `false`.
    pub include_last_offset: bool,
    /// What is added to each index before it is hashed: where this table starts in a larger virtual one, as ROBE's
    /// `val_offset` says. Tables that share a `hashed_weight` must not overlap. Default 0.
    pub first_row: usize,
    /// What happens with indices and offsets out of range. Default [`BoundsCheck::Error`].
    pub bounds_check: BoundsCheck,
    /// Whether the gradient is to be the same, bit for bit, in every run on CUDA. Default [`Gradient::Fastest`].
    pub gradient: Gradient,
}

impl Default for HashedEmbeddingBagConfig {
    fn default() -> Self {
        Self {
            compression: 1.0 / 64.0,
            mode: Mode::Sum,
            hash: None,
            padding_idx: None,
            include_last_offset: false,
            first_row: 0,
            bounds_check: BoundsCheck::Error,
            gradient: Gradient::Fastest,
        }
    }
}

/// An embedding bag whose table of `(num_embeddings, embedding_dim)` values is folded by a hash into one 1-D
/// parameter, `hashed_weight`:
///
/// `out[bag, column] = pool over the rows of the bag of sign(row, column) * hashed_weight[slot(row, column)]`
///
/// A drop-in for `torch.nn.EmbeddingBag` with 10x-1000x less memory. The idea is that of
/// [Compressing Neural Networks with the Hashing Trick](https://arxiv.org/abs/1504.04788), applied to embedding bags as
/// in the PyTorch package HashedEmbeddingBag.
///
/// * `hashed_weight`: `(len,)`; f32, f64, f16 or bf16. f16 and bf16 are summed in f32.
/// * `indices`: u32, i32 or i64 row numbers in `0..num_embeddings`, `(num_bags, bag_len)` or, with offsets, `(nnz,)`.
/// * `offsets`: u32, i32 or i64, the start of each bag, `(num_bags,)`; `(num_bags + 1,)` with `include_last_offset`.
/// * output: `(num_bags, embedding_dim)` in the dtype of `hashed_weight`. An empty bag, or one of padding only, is zeros.
///
/// It is differentiable in `hashed_weight` when that is a variable. The backward pass stores nothing but its inputs.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_hashed_embedding_bag::{hashed_embedding_bag, HashedEmbeddingBagConfig};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = HashedEmbeddingBagConfig { compression: 0.1, ..Default::default() };
/// let layer = hashed_embedding_bag(1000, 16, config, vb)?;
/// assert_eq!(layer.hashed_weight().dims(), [1600]);
///
/// // Two bags of three rows.
/// let indices = Tensor::new(&[[1u32, 2, 3], [500, 2, 999]], &Device::Cpu)?;
/// assert_eq!(layer.forward(&indices)?.dims(), [2, 16]);
///
/// // Bags of two, none and four rows.
/// let indices = Tensor::new(&[1u32, 2, 3, 500, 2, 999], &Device::Cpu)?;
/// let offsets = Tensor::new(&[0u32, 2, 2], &Device::Cpu)?;
/// assert_eq!(layer.forward_with_offsets(&indices, &offsets)?.dims(), [3, 16]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct HashedEmbeddingBag {
    hashed_weight: Tensor,
    hash: Hash,
    table: Table,
    include_last_offset: bool,
    bounds_check: BoundsCheck,
    gradient: Gradient,
}

/// A [`HashedEmbeddingBag`] with a variable named `hashed_weight`, which is initialised uniformly in
/// `±sqrt(1 / num_embeddings)` where the `VarBuilder` makes new variables.
///
/// Its length is `floor(num_embeddings * embedding_dim * compression)`, at least 1, rounded up to a whole block for
/// [`Hash::Mix`] and to at least one block for [`Hash::Affine`].
///
/// # Errors
/// Zero `num_embeddings` or `embedding_dim`, a compression that is not positive and finite, a table too large for the
/// hash, a `VarBuilder` whose dtype is no float, or what the `VarBuilder` itself refuses.
pub fn hashed_embedding_bag(
    num_embeddings: usize,
    embedding_dim: usize,
    config: HashedEmbeddingBagConfig,
    vb: VarBuilder,
) -> Result<HashedEmbeddingBag> {
    let tables = Tables::one(config.first_row, num_embeddings)?;
    create(tables, embedding_dim, config, vb)
}

/// A layer over one or several tables, on a variable of the `VarBuilder`.
pub(crate) fn create(
    tables: Tables,
    embedding_dim: usize,
    config: HashedEmbeddingBagConfig,
    vb: VarBuilder,
) -> Result<HashedEmbeddingBag> {
    let (_, len) = new_len(&tables, embedding_dim, &config)?;
    let bound = (1.0 / tables.num_rows() as f64).sqrt();
    let init = Init::Uniform {
        lo: -bound,
        up: bound,
    };
    let hashed_weight = vb.get_with_hints(len, HASHED_WEIGHT, init)?;
    HashedEmbeddingBag::over(hashed_weight, Arc::new(tables), embedding_dim, config)
}

/// The hash of a new layer and the length of its parameter, once they suit the tables and each other.
pub(crate) fn new_len(
    tables: &Tables,
    embedding_dim: usize,
    config: &HashedEmbeddingBagConfig,
) -> Result<(Hash, usize)> {
    check_embedding_dim(embedding_dim)?;
    let compression = config.compression;
    if !(compression > 0.0 && compression.is_finite()) {
        bail!("compression must be positive and finite, got {compression}");
    }
    let hash = config.hash.unwrap_or(Hash::default_for(embedding_dim));
    let len = tables.num_rows() as f64 * embedding_dim as f64 * compression;
    let len = hash.round_up_len(len as usize);
    // Before any memory is asked for: in f64, the largest dtype, it would have to be addressable.
    if len > isize::MAX as usize / 8 {
        bail!("compression {compression} makes hashed_weight too large, {len} values");
    }
    hash.check_table(tables.end_row(), embedding_dim)?;
    hash.check_len(len)?;
    Ok((hash, len))
}

fn check_embedding_dim(embedding_dim: usize) -> Result<()> {
    // The kernels count columns in 32 bits, some past the last.
    if embedding_dim == 0 || i32::try_from(embedding_dim).is_err() {
        bail!("embedding_dim must lie in 1..2^31, got {embedding_dim}");
    }
    Ok(())
}

impl HashedEmbeddingBag {
    /// A layer on a `hashed_weight` of your own, `(len,)`; its length rules, `config.compression` is ignored. A tensor
    /// serves inference; the tensor of a `Var` trains.
    ///
    /// # Errors
    /// A `hashed_weight` that is not 1-D or no float, a length that does not suit the hash ([`Hash::check_len`]), zero
    /// `num_embeddings` or `embedding_dim`, or a table too large for the hash.
    pub fn new(
        hashed_weight: Tensor,
        num_embeddings: usize,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        let tables = Tables::one(config.first_row, num_embeddings)?;
        Self::over(hashed_weight, Arc::new(tables), embedding_dim, config)
    }

    /// A layer over one or several tables; `config.first_row` is in `tables`.
    pub(crate) fn over(
        hashed_weight: Tensor,
        tables: Arc<Tables>,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        check_embedding_dim(embedding_dim)?;
        check_dtype(HASHED_WEIGHT, &hashed_weight, &WEIGHT_DTYPES)?;
        let len = match hashed_weight.dims() {
            &[len] => len,
            dims => bail!("hashed_weight must have rank 1, got {dims:?}"),
        };
        let hash = config.hash.unwrap_or(Hash::default_for(embedding_dim));
        hash.check_table(tables.end_row(), embedding_dim)?;
        let first_rows = if tables.len() > 1 {
            Some(Tensor::new(tables.first_rows(), hashed_weight.device())?)
        } else {
            None
        };
        let table = Table {
            slots: hash.slots(len)?,
            tables,
            first_rows,
            embedding_dim,
            mode: config.mode,
            padding_idx: config.padding_idx,
        };
        Ok(Self {
            hashed_weight,
            hash,
            table,
            include_last_offset: config.include_last_offset,
            bounds_check: config.bounds_check,
            gradient: config.gradient,
        })
    }

    /// Pools `indices` by `offsets`: `(nnz,)` and `(num_bags,)`, or `(num_bags + 1,)` with `include_last_offset`, to
    /// `(num_bags, embedding_dim)`.
    ///
    /// # Errors
    /// Wrong ranks, dtypes or devices; with [`BoundsCheck::Error`] also a row outside `0..num_embeddings` that is not
    /// padding, and offsets that do not start at 0, decrease or pass `nnz`, each by position and value.
    pub fn forward_with_offsets(&self, indices: &Tensor, offsets: &Tensor) -> Result<Tensor> {
        self.lookup(indices, Some(offsets), JaggedLayout::BatchMajor, None)
    }

    /// Pools rows that are each multiplied by their own weight; mode sum only. `per_sample_weights` has the shape of
    /// `indices` and the dtype of `hashed_weight`, and gets a gradient when it is tracked. Without `offsets`, `indices`
    /// are `(num_bags, bag_len)`.
    ///
    /// # Errors
    /// A mode other than sum, a shape or dtype that differs, and those of
    /// [`forward_with_offsets`](Self::forward_with_offsets).
    pub fn forward_weighted(
        &self,
        indices: &Tensor,
        offsets: Option<&Tensor>,
        per_sample_weights: &Tensor,
    ) -> Result<Tensor> {
        let layout = JaggedLayout::BatchMajor;
        self.lookup(indices, offsets, layout, Some(per_sample_weights))
    }

    pub(crate) fn lookup(
        &self,
        indices: &Tensor,
        offsets: Option<&Tensor>,
        layout: JaggedLayout,
        per_sample_weights: Option<&Tensor>,
    ) -> Result<Tensor> {
        let offsets = offsets.map(|offsets| Offsets {
            offsets,
            include_last_offset: self.include_last_offset,
            layout,
        });
        op::hashed_embedding_bag(
            &self.hashed_weight,
            indices,
            offsets,
            per_sample_weights,
            &self.table,
            self.bounds_check,
            self.gradient,
        )
    }

    /// The configuration of this layer, as [`HashedEmbeddingBag::new`] takes it.
    pub fn config(&self) -> HashedEmbeddingBagConfig {
        HashedEmbeddingBagConfig {
            compression: self.compression(),
            mode: self.mode(),
            hash: Some(self.hash),
            padding_idx: self.padding_idx(),
            include_last_offset: self.include_last_offset,
            first_row: self.first_row(),
            bounds_check: self.bounds_check,
            gradient: self.gradient,
        }
    }

    /// The table or tables this layer looks into.
    pub(crate) fn tables(&self) -> &Arc<Tables> {
        &self.table.tables
    }

    /// The parameter, `(len,)`.
    pub fn hashed_weight(&self) -> &Tensor {
        &self.hashed_weight
    }

    /// The number of rows of the virtual table.
    pub fn num_embeddings(&self) -> usize {
        self.table.tables.num_rows()
    }

    /// What is added to each index before it is hashed.
    pub fn first_row(&self) -> usize {
        self.table.tables.first_row(0) as usize
    }

    /// The number of columns of the virtual table, and of the output.
    pub fn embedding_dim(&self) -> usize {
        self.table.embedding_dim
    }

    /// The length of `hashed_weight` over the size of the virtual table, as it came out.
    pub fn compression(&self) -> f64 {
        let table = self.num_embeddings() as f64 * self.embedding_dim() as f64;
        self.hashed_weight.elem_count() as f64 / table
    }

    /// How the rows of a bag become one.
    pub fn mode(&self) -> Mode {
        self.table.mode
    }

    /// The hash in use.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// The index that is padding.
    pub fn padding_idx(&self) -> Option<i64> {
        self.table.padding_idx
    }

    /// Whether offsets hold the end of the last bag.
    pub fn include_last_offset(&self) -> bool {
        self.include_last_offset
    }

    /// What happens with indices and offsets out of range.
    pub fn bounds_check(&self) -> BoundsCheck {
        self.bounds_check
    }

    /// How the gradient is summed on CUDA.
    pub fn gradient(&self) -> Gradient {
        self.gradient
    }

    /// The same layer with other bounds checks, say for a layer that came from a checkpoint.
    pub fn with_bounds_check(self, bounds_check: BoundsCheck) -> Self {
        Self {
            bounds_check,
            ..self
        }
    }
}

impl Module for HashedEmbeddingBag {
    /// Pools `indices` of shape `(num_bags, bag_len)` to `(num_bags, embedding_dim)`.
    fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        self.lookup(indices, None, JaggedLayout::BatchMajor, None)
    }
}

/// A [`HashedEmbeddingBag`] without the bags: one row per index, for indices of any rank.
///
/// Its parameter is named `hashed_embedding_bag.hashed_weight`, as in the state dict of the PyTorch package. The `mode`
/// and `include_last_offset` of the config make no difference to a bag of one. A padding index gives zeros.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_hashed_embedding_bag::hashed_embedding;
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layer = hashed_embedding(50_000, 64, Default::default(), vb)?;
/// let tokens = Tensor::zeros((2, 7), DType::U32, &Device::Cpu)?;
/// assert_eq!(layer.forward(&tokens)?.dims(), [2, 7, 64]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct HashedEmbedding {
    bag: HashedEmbeddingBag,
}

/// The prefix of the parameter of a [`HashedEmbedding`].
pub(crate) const INNER_BAG: &str = "hashed_embedding_bag";

/// A [`HashedEmbedding`] with a variable named `hashed_embedding_bag.hashed_weight`; length, initial values and errors
/// are those of [`hashed_embedding_bag()`].
///
/// # Errors
/// Those of [`hashed_embedding_bag()`].
pub fn hashed_embedding(
    num_embeddings: usize,
    embedding_dim: usize,
    config: HashedEmbeddingBagConfig,
    vb: VarBuilder,
) -> Result<HashedEmbedding> {
    hashed_embedding_bag(num_embeddings, embedding_dim, config, vb.pp(INNER_BAG))
        .map(HashedEmbedding::from)
}

impl HashedEmbedding {
    /// A layer on a `hashed_weight` of your own; see [`HashedEmbeddingBag::new`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::new`].
    pub fn new(
        hashed_weight: Tensor,
        num_embeddings: usize,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        HashedEmbeddingBag::new(hashed_weight, num_embeddings, embedding_dim, config)
            .map(Self::from)
    }

    /// The bag this layer looks up with: its parameter and configuration.
    pub fn bag(&self) -> &HashedEmbeddingBag {
        &self.bag
    }
}

impl From<HashedEmbeddingBag> for HashedEmbedding {
    fn from(bag: HashedEmbeddingBag) -> Self {
        Self { bag }
    }
}

impl Module for HashedEmbedding {
    /// Looks up `indices` of any shape `(...)` to `(..., embedding_dim)`.
    fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        let mut dims = indices.dims().to_vec();
        dims.push(self.bag.embedding_dim());
        let bags_of_one = op::contiguous_indices(indices)?
            .flatten_all()?
            .unsqueeze(1)?;
        self.bag.forward(&bags_of_one)?.reshape(dims)
    }
}
