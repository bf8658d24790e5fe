//! The layers, in the style of candle-nn: a config with `Default`, a free constructor that takes a `VarBuilder`, `Module`.
//!
//! | | a table of rows | the same, hashed |
//! |---|---|---|
//! | one row per index | `candle_nn::Embedding` | [`HashedEmbedding`] |
//! | pooled bags of rows | `torch.nn.EmbeddingBag` | [`HashedEmbeddingBag`] |
//!
//! Many tables over one parameter are a [`HashedEmbeddingBagCollection`](crate::HashedEmbeddingBagCollection).

use crate::bags::JaggedLayout;
use crate::bounds::BoundsCheck;
use crate::config::{HashedEmbeddingBagConfig, HashedEmbeddingConfig, HashedWeightConfig};
use crate::error::bail;
use crate::hash::{Hash, Slots};
use crate::low_bit::{quantize, Bits, LowBit};
use crate::op::{
    self, check_dtype, Inputs, Offsets, OutDims, SparseGradient, Table, WEIGHT_DTYPES,
};
use crate::row_tensor::{self, RowTensor};
use crate::tables::Tables;
use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

/// Parameter name, here and in state dicts of the PyTorch package.
pub(crate) const HASHED_WEIGHT: &str = "hashed_weight";
/// The name of its shifts in a checkpoint in 4 bits.
pub(crate) const HASHED_WEIGHT_SHIFT: &str = "hashed_weight_shift";

/// An embedding bag whose table of `(num_embeddings, embedding_dim)` values is folded by a hash into one 1-D
/// parameter, `hashed_weight`:
///
/// `out[bag, column] = pool over the rows of the bag of sign(row, column) * hashed_weight[slot(row, column)]`
///
/// A drop-in for `torch.nn.EmbeddingBag` with 10x-1000x less memory. The idea is that of
/// [Compressing Neural Networks with the Hashing Trick](https://arxiv.org/abs/1504.04788), applied to embedding bags as
/// in the PyTorch package HashedEmbeddingBag.
///
/// * `hashed_weight`: `(len,)`; f32, f64, f16 or bf16. f16 and bf16 are summed in f32. For serving, in 8 or 4 bits:
///   [`to_bits`](Self::to_bits).
/// * `indices`: u32, i32 or i64 row numbers in `0..num_embeddings`, `(num_bags, bag_len)` or, with offsets, `(nnz,)`.
/// * `offsets`: u32, i32 or i64, the start of each bag, `(num_bags,)`; `(num_bags + 1,)` with `include_last_offset`.
/// * output: `(num_bags, embedding_dim)` in the dtype of `hashed_weight`. An empty bag, or one of padding only, is zeros.
///
/// It is differentiable in `hashed_weight` if that is a variable. Only its inputs are kept for the backward pass.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_hashed_embedding_bag::hashed_embedding_bag;
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layer = hashed_embedding_bag(1000, 16, 0.1, Default::default(), vb)?;
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
    stored: Stored,
    embedding_dim: usize,
    /// Its `hash` is always set: to the hash in use.
    config: HashedEmbeddingBagConfig,
    slots: Slots,
    tables: Arc<Tables>,
    /// See [`Table::table_rows`].
    table_rows: Option<Tensor>,
    sparse_gradient: Option<SparseGradient>,
}

/// The tensors of a layer.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    /// Values, or packed bytes that `low_bit` explains.
    pub hashed_weight: Tensor,
    pub low_bit: Option<LowBit>,
    /// What the hash reads of each row, if it does.
    pub row_tensor: Option<RowTensor>,
}

impl From<Tensor> for Stored {
    fn from(hashed_weight: Tensor) -> Self {
        Self {
            hashed_weight,
            low_bit: None,
            row_tensor: None,
        }
    }
}

impl Stored {
    /// Values, and a tensor of the rows for the hash of `config`.
    pub fn with_row_tensor(
        hashed_weight: Tensor,
        row_tensor: &Tensor,
        embedding_dim: usize,
        config: &HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        let hash = config.hash_for(embedding_dim);
        let Some(name) = hash.row_tensor() else {
            return Err(row_tensor::needless(&hash));
        };
        Ok(Self {
            row_tensor: Some(RowTensor::new(name, row_tensor)?),
            ..hashed_weight.into()
        })
    }

    /// The number of slots.
    fn len(&self) -> usize {
        let len = self.hashed_weight.elem_count();
        match &self.low_bit {
            None => len,
            Some(low_bit) => low_bit.bits().len(len),
        }
    }
}

/// Creates a [`HashedEmbeddingBag`] on a variable named `hashed_weight`. The argument `hashed_weight` sets its length and initial
/// values: `1.0 / 64.0` is a 64th of `num_embeddings * embedding_dim` values, uniform in `±sqrt(1 / num_embeddings)`.
///
/// The length is `floor(num_embeddings * embedding_dim * compression)`, at least 1, rounded up to whole blocks for
/// [`Hash::Balanced`] and [`Hash::Mix`], and to at least one block for [`Hash::Affine`].
///
/// If the hash reads a [row tensor](Hash::row_tensor), so must the `VarBuilder` have it, as that of a file does, under that name;
/// [`hashed_embedding_bag_with_row_tensor()`] takes it as an argument.
///
/// # Errors
/// Zero `num_embeddings` or `embedding_dim`, a compression outside `(0, 1]`, a hash with constants out of range, a table too
/// large for the hash, a `VarBuilder` whose dtype is not a float, or an error of the `VarBuilder` itself.
pub fn hashed_embedding_bag(
    num_embeddings: usize,
    embedding_dim: usize,
    hashed_weight: impl Into<HashedWeightConfig>,
    config: HashedEmbeddingBagConfig,
    vb: VarBuilder,
) -> Result<HashedEmbeddingBag> {
    let tables = Tables::one(config.first_row, num_embeddings)?;
    create(
        tables,
        embedding_dim,
        hashed_weight.into(),
        None,
        config,
        vb,
    )
}

/// [`hashed_embedding_bag()`] with a hash that reads a tensor of the rows, its [row tensor](Hash::row_tensor): see
/// [`HashedEmbeddingBag::with_row_tensor`], which says what it must be. It is no variable.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_hashed_embedding_bag::{hashed_embedding_bag_with_row_tensor, Hash, HashedEmbeddingBagConfig};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// # let vars = VarMap::new();
/// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// // Rows 0 and 2 have one signature, so they have one vector.
/// let signatures = Tensor::new(&[0x1234_5678_9abc_def0i64, -1, 0x1234_5678_9abc_def0], &Device::Cpu)?;
/// let config = HashedEmbeddingBagConfig { hash: Some(Hash::semantic(4)), ..Default::default() };
/// let layer = hashed_embedding_bag_with_row_tensor(3, 16, 0.5, &signatures, config, vb)?;
/// let table = layer.to_table(..)?.to_vec2::<f32>()?;
/// assert_eq!(table[0], table[2]);
/// assert_ne!(table[0], table[1]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`hashed_embedding_bag()`] and of [`HashedEmbeddingBag::with_row_tensor`].
pub fn hashed_embedding_bag_with_row_tensor(
    num_embeddings: usize,
    embedding_dim: usize,
    hashed_weight: impl Into<HashedWeightConfig>,
    row_tensor: &Tensor,
    config: HashedEmbeddingBagConfig,
    vb: VarBuilder,
) -> Result<HashedEmbeddingBag> {
    let tables = Tables::one(config.first_row, num_embeddings)?;
    let (hashed_weight, row_tensor) = (hashed_weight.into(), Some(row_tensor));
    create(tables, embedding_dim, hashed_weight, row_tensor, config, vb)
}

/// Creates a layer over one or several tables, on a variable of the `VarBuilder`.
pub(crate) fn create(
    tables: Tables,
    embedding_dim: usize,
    hashed_weight: HashedWeightConfig,
    row_tensor: Option<&Tensor>,
    config: HashedEmbeddingBagConfig,
    vb: VarBuilder,
) -> Result<HashedEmbeddingBag> {
    let HashedWeightConfig { compression, init } = hashed_weight;
    let len = new_len(&tables, embedding_dim, compression, &config)?;
    let bound = (1.0 / tables.num_rows() as f64).sqrt();
    let init = init.unwrap_or(Init::Uniform {
        lo: -bound,
        up: bound,
    });
    let hash = config.hash_for(embedding_dim);
    let from_vb = match (hash.row_tensor(), row_tensor) {
        (Some(name), None) if vb.contains_tensor(name) => {
            let shape = row_tensor::shape(name, &hash, tables.end_row(), embedding_dim);
            let (zeros, dtype) = (Init::Const(0.), row_tensor::dtype(name));
            Some(vb.get_with_hints_dtype(shape, name, zeros, dtype)?)
        }
        (Some(name), None) => return Err(row_tensor::missing(name)),
        _ => None,
    };
    let hashed_weight = vb.get_with_hints(len, HASHED_WEIGHT, init)?;
    let stored = match row_tensor.or(from_vb.as_ref()) {
        Some(tensor) => Stored::with_row_tensor(hashed_weight, tensor, embedding_dim, &config)?,
        None => hashed_weight.into(),
    };
    HashedEmbeddingBag::over(stored, Arc::new(tables), embedding_dim, config)
}

/// The length of a new `hashed_weight`, checked against the tables and the hash.
pub(crate) fn new_len(
    tables: &Tables,
    embedding_dim: usize,
    compression: f64,
    config: &HashedEmbeddingBagConfig,
) -> Result<usize> {
    check_embedding_dim(embedding_dim)?;
    if compression > 1.0 && compression.is_finite() {
        bail!(
            "compression must lie in (0, 1], got {compression}: it is the length of hashed_weight over the size of the table; \
             for one that is {compression} times smaller, pass 1.0 / {compression:?}"
        );
    }
    if !(compression > 0.0 && compression <= 1.0) {
        bail!("compression must lie in (0, 1], got {compression}");
    }
    let hash = config.hash_for(embedding_dim);
    let len = tables.num_rows() as f64 * embedding_dim as f64 * compression;
    let len = hash.round_up_len(len as usize)?;
    // Checked before memory is allocated: even in f64, the largest dtype, it must be addressable.
    if len > isize::MAX as usize / 8 {
        bail!("compression {compression} makes hashed_weight too large, {len} values");
    }
    hash.check_table(tables.end_row(), embedding_dim)?;
    hash.check_len(len)?;
    Ok(len)
}

fn check_embedding_dim(embedding_dim: usize) -> Result<()> {
    // The kernels count columns in 32 bits, and go some way past the last one.
    if embedding_dim == 0 || i32::try_from(embedding_dim).is_err() {
        bail!("embedding_dim must lie in 1..2^31, got {embedding_dim}");
    }
    Ok(())
}

impl HashedEmbeddingBag {
    /// A layer on an existing `hashed_weight`, `(len,)`: the tensor of a `Var` to train it, any other tensor for inference.
    ///
    /// # Errors
    /// A `hashed_weight` that is not 1-D or not of a float dtype, a hash or a length that [`Hash::check_len`] refuses, zero
    /// `num_embeddings` or `embedding_dim`, a table too large for the hash, or a hash that reads a [row tensor](Hash::row_tensor).
    pub fn new(
        hashed_weight: Tensor,
        num_embeddings: usize,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        let tables = Tables::one(config.first_row, num_embeddings)?;
        Self::over(
            hashed_weight.into(),
            Arc::new(tables),
            embedding_dim,
            config,
        )
    }

    /// A layer on an existing `hashed_weight` with a hash that reads a tensor of the rows, its [row tensor](Hash::row_tensor), which
    /// must be on the same device:
    ///
    /// * for [`Hash::semantic`] and [`Hash::lma`] the signatures: i64, `(rows,)`;
    /// * for [`Hash::slot_table`] the slot table: u32, `(rows, column_blocks)`, with `column_blocks` of `embedding_dim / block`,
    ///   rounded up, and numbers of blocks: below `len / block`.
    ///
    /// There is a row for each row of the table, at least. If the table is a part of a larger one, these are the rows of the larger
    /// one, and `config.first_row` says where the table starts in it.
    ///
    /// The tensor is shared, not copied, and is not trained. It is saved with the layer.
    ///
    /// # Errors
    /// Those of [`new`](Self::new); a row tensor of another dtype or shape, on another device, or with a number that is none of a
    /// block; or a hash that reads none.
    pub fn with_row_tensor(
        hashed_weight: Tensor,
        row_tensor: &Tensor,
        num_embeddings: usize,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        let tables = Tables::one(config.first_row, num_embeddings)?;
        let stored = Stored::with_row_tensor(hashed_weight, row_tensor, embedding_dim, &config)?;
        Self::over(stored, Arc::new(tables), embedding_dim, config)
    }

    /// A layer over one or several tables, which already include `config.first_row`.
    pub(crate) fn over(
        stored: Stored,
        tables: Arc<Tables>,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        check_embedding_dim(embedding_dim)?;
        let Stored {
            hashed_weight,
            low_bit,
            row_tensor,
        } = &stored;
        if let (true, Some(low_bit)) = (config.sparse, low_bit) {
            let bits = u32::from(low_bit.bits());
            bail!("a layer in {bits} bits does not train, and has no gradients");
        }
        let dtypes = match low_bit {
            None => &WEIGHT_DTYPES[..],
            Some(_) => &[DType::U8],
        };
        check_dtype(HASHED_WEIGHT, hashed_weight, dtypes)?;
        if hashed_weight.rank() != 1 {
            let dims = hashed_weight.dims();
            bail!("hashed_weight must have rank 1, got {dims:?}");
        }
        let (hash, len) = (config.hash_for(embedding_dim), stored.len());
        hash.check_table(tables.end_row(), embedding_dim)?;
        let slots = hash.slots(len)?;
        let (rows, device) = (row_tensor.as_ref(), hashed_weight.device());
        row_tensor::check(rows, &hash, len, &tables, embedding_dim, device)?;
        let table_rows = if tables.num_features() > 1 {
            Some(Tensor::new(tables.table_rows(), device)?)
        } else {
            None
        };
        let sparse_gradient = match config.sparse {
            true if hashed_weight.is_variable() => Some(SparseGradient::of(hashed_weight)),
            true if hashed_weight.track_op() => {
                bail!("a sparse gradient needs a hashed_weight that is a variable itself, or detached for inference")
            }
            _ => None,
        };
        let config = HashedEmbeddingBagConfig {
            hash: Some(hash),
            ..config
        };
        Ok(Self {
            stored,
            embedding_dim,
            config,
            slots,
            tables,
            table_rows,
            sparse_gradient,
        })
    }

    /// The same layer with `hashed_weight` rounded to 8 or 4 bits, for serving: it takes a quarter or an eighth of the bytes of
    /// f32. Also returns the relative error of the rounding, `|hashed_weight - rounded| / |hashed_weight|` (Euclidean norms).
    ///
    /// It looks up what this layer looks up, in every mode and form of bags, and gives f32
    /// ([`with_output_dtype`](Self::with_output_dtype): f16 or bf16). Per-sample weights have the dtype of the output.
    ///
    /// * Sum, mean and max are exact until one last rounding: the values of a bag are added as integers. So the output is the
    ///   same, bit for bit, on CPU and CUDA, with any number of threads, and in any order of the rows of a bag. Only with
    ///   per-sample weights are sums taken in f32.
    /// * It does not train. An optimiser has no variable to change, and to ask for a gradient of per-sample weights is an error.
    ///
    /// A block of 32 is fastest. What this costs in quality, and what was measured: docs/performance.md.
    ///
    /// ```
    /// use candle_core::{DType, Device, Module, Tensor};
    /// use candle_hashed_embedding_bag::{hashed_embedding_bag, Bits};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// # let vars = VarMap::new();
    /// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let trained = hashed_embedding_bag(1000, 16, 0.1, Default::default(), vb)?;
    /// let (served, error) = trained.to_bits(Bits::Eight)?;
    /// assert!(error < 0.01);
    /// assert_eq!(served.hashed_weight().dtype(), DType::U8);
    ///
    /// let indices = Tensor::new(&[[1u32, 2, 3], [500, 2, 999]], &Device::Cpu)?;
    /// assert_eq!(served.forward(&indices)?.dims(), [2, 16]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A layer that is rounded already, a value that is not finite in f32; in 4 bits a `hashed_weight` of odd length.
    pub fn to_bits(&self, bits: Bits) -> Result<(Self, f64)> {
        if let Some(low_bit) = &self.stored.low_bit {
            bail!(
                "a layer is rounded once: this one has {} bits already",
                u32::from(low_bit.bits())
            );
        }
        let (packed, low_bit, error) = quantize(&self.stored.hashed_weight, bits)?;
        let layer = Self {
            stored: Stored {
                hashed_weight: packed,
                low_bit: Some(low_bit),
                row_tensor: self.stored.row_tensor.clone(),
            },
            config: HashedEmbeddingBagConfig {
                sparse: false,
                ..self.config
            },
            sparse_gradient: None,
            ..self.clone()
        };
        Ok((layer, error))
    }

    /// What the bytes of [`hashed_weight`](Self::hashed_weight) mean, if this layer was rounded by [`to_bits`](Self::to_bits).
    pub fn low_bit(&self) -> Option<&LowBit> {
        self.stored.low_bit.as_ref()
    }

    /// What the hash reads of each row, its [row tensor](Hash::row_tensor), if it does: signatures, i64, `(rows,)`, or a slot table,
    /// u32, `(rows, column_blocks)`, on the device of `hashed_weight`.
    pub fn row_tensor(&self) -> Option<&Tensor> {
        self.stored.row_tensor.as_ref().map(RowTensor::tensor)
    }

    /// The tensors of this layer.
    pub(crate) fn stored(&self) -> &Stored {
        &self.stored
    }

    /// The values of `hashed_weight`, `(len,)`: the tensor itself, or, of a layer in 8 or 4 bits, its bytes as f32.
    ///
    /// # Errors
    /// What the device says.
    pub fn hashed_weight_values(&self) -> Result<Tensor> {
        let Stored {
            hashed_weight,
            low_bit,
            ..
        } = &self.stored;
        match low_bit {
            None => Ok(hashed_weight.clone()),
            Some(low_bit) => low_bit.unpack(hashed_weight),
        }
    }

    /// The same layer in 8 or 4 bits with outputs, and per-sample weights, of another dtype: f32, f16 or bf16. Sums are not
    /// affected: they are rounded to it at the end.
    ///
    /// # Errors
    /// Another dtype, or a layer of floats, whose outputs have the dtype of its `hashed_weight`.
    pub fn with_output_dtype(mut self, dtype: DType) -> Result<Self> {
        let Some(low_bit) = self.stored.low_bit else {
            bail!("the outputs of a layer of floats have the dtype of its hashed_weight; see with_hashed_weight");
        };
        self.stored.low_bit = Some(low_bit.with_output_dtype(dtype)?);
        Ok(self)
    }

    /// Pools `indices` by `offsets`: `(nnz,)` and `(num_bags,)`, or `(num_bags + 1,)` with `include_last_offset`, to
    /// `(num_bags, embedding_dim)`. Bags of equal length need no offsets: see [`Module::forward`].
    ///
    /// Without `include_last_offset` every offset starts a bag: a last offset of `nnz` is an empty bag, not an end marker.
    ///
    /// # Errors
    /// Wrong ranks, dtypes or devices; with [`BoundsCheck::Error`] also a row outside `0..num_embeddings` that is not
    /// padding, and offsets that do not start at 0, decrease or exceed `nnz`. The message gives position and value.
    pub fn forward_with_offsets(&self, indices: &Tensor, offsets: &Tensor) -> Result<Tensor> {
        self.lookup(
            indices,
            Some(offsets),
            JaggedLayout::BatchMajor,
            None,
            OutDims::Bags,
        )
    }

    /// Pools `indices` of shape `(num_bags, bag_len)`, each row multiplied by its own weight, to `(num_bags, embedding_dim)`;
    /// mode sum only. `per_sample_weights` has the shape of `indices` and the dtype of `hashed_weight`, and gets a gradient
    /// if it is tracked.
    ///
    /// # Errors
    /// A mode other than sum, weights of another shape or dtype, and those of [`Module::forward`].
    pub fn forward_weighted(
        &self,
        indices: &Tensor,
        per_sample_weights: &Tensor,
    ) -> Result<Tensor> {
        let layout = JaggedLayout::BatchMajor;
        self.lookup(
            indices,
            None,
            layout,
            Some(per_sample_weights),
            OutDims::Bags,
        )
    }

    /// [`forward_with_offsets`](Self::forward_with_offsets) with each row multiplied by its own weight, as in
    /// [`forward_weighted`](Self::forward_weighted).
    ///
    /// # Errors
    /// A mode other than sum, weights of another shape or dtype, and those of
    /// [`forward_with_offsets`](Self::forward_with_offsets).
    pub fn forward_weighted_with_offsets(
        &self,
        indices: &Tensor,
        offsets: &Tensor,
        per_sample_weights: &Tensor,
    ) -> Result<Tensor> {
        let (layout, weights) = (JaggedLayout::BatchMajor, Some(per_sample_weights));
        self.lookup(indices, Some(offsets), layout, weights, OutDims::Bags)
    }

    pub(crate) fn lookup(
        &self,
        indices: &Tensor,
        offsets: Option<&Tensor>,
        layout: JaggedLayout,
        per_sample_weights: Option<&Tensor>,
        out_dims: OutDims,
    ) -> Result<Tensor> {
        let config = &self.config;
        let offsets = offsets.map(|offsets| Offsets {
            offsets,
            include_last_offset: config.include_last_offset,
            layout,
        });
        let table = Table {
            slots: self.slots,
            tables: self.tables.clone(),
            table_rows: self.table_rows.clone(),
            embedding_dim: self.embedding_dim,
            mode: config.mode,
            padding_idx: config.padding_idx,
            low_bit: self.stored.low_bit.clone(),
            row_tensor: self.stored.row_tensor.clone(),
            sparse_gradient: self.sparse_gradient.clone(),
        };
        op::hashed_embedding_bag(
            &self.stored.hashed_weight,
            Inputs {
                indices,
                offsets,
                per_sample_weights,
                out_dims,
            },
            table,
            config.bounds_check,
            config.gradient,
        )
    }

    /// Rows of the virtual table as a tensor, `(rows.len(), embedding_dim)`: `..` for the whole table, a range for a part of it.
    /// For example to build a nearest-neighbour index, or to go on without hashing; [`fit`](Self::fit) is the inverse.
    ///
    /// The row at `padding_idx` is zeros, as it is in a lookup. Differentiable in `hashed_weight`.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_hashed_embedding_bag::hashed_embedding_bag;
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// # let vars = VarMap::new();
    /// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let movies = hashed_embedding_bag(4000, 16, 0.1, Default::default(), vb)?;
    /// let table = movies.to_table(..)?;
    /// assert_eq!(table.dims(), [4000, 16]);
    ///
    /// // The ten movies nearest to movie 7, itself among them.
    /// let scores = movies.to_table(7..8)?.matmul(&table.t()?)?.squeeze(0)?;
    /// let (_, nearest) = scores.sort_last_dim(false)?;
    /// let nearest = nearest.narrow(0, 0, 10)?.to_vec1::<u32>()?;
    /// # assert_eq!(nearest.len(), 10);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A range that ends before it starts or past the table, or a table too large for one tensor.
    pub fn to_table(&self, rows: impl RangeBounds<usize>) -> Result<Tensor> {
        let num_embeddings = self.num_embeddings();
        let start = match rows.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match rows.end_bound() {
            Bound::Included(&end) => end.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => num_embeddings,
        };
        if start > end || end > num_embeddings {
            bail!("rows must lie in 0..{num_embeddings}, got {start}..{end}");
        }
        op::check_output(end - start, self.embedding_dim)?;
        let indices = Tensor::arange(start as i64, end as i64, self.hashed_weight().device())?;
        self.forward(&indices.unsqueeze(1)?)
    }

    /// The configuration of this layer, as [`HashedEmbeddingBag::new`] takes it. Its hash is the one in use, even if it was left
    /// to the default.
    pub fn config(&self) -> HashedEmbeddingBagConfig {
        self.config
    }

    /// The table or tables of this layer.
    pub(crate) fn tables(&self) -> &Arc<Tables> {
        &self.tables
    }

    /// The parameter, `(len,)`. Of a layer in 8 or 4 bits, its bytes: u8, `(len,)` or `(len / 2,)`, see
    /// [`low_bit`](Self::low_bit).
    pub fn hashed_weight(&self) -> &Tensor {
        &self.stored.hashed_weight
    }

    /// The number of rows of the virtual table.
    pub fn num_embeddings(&self) -> usize {
        self.tables.num_rows()
    }

    /// The number of columns of the virtual table, and of the output.
    pub fn embedding_dim(&self) -> usize {
        self.embedding_dim
    }

    /// The actual compression: the length of `hashed_weight` over the size of the virtual table.
    pub fn compression(&self) -> f64 {
        let table = self.num_embeddings() as f64 * self.embedding_dim() as f64;
        self.stored.len() as f64 / table
    }

    /// The hash in use.
    pub fn hash(&self) -> Hash {
        self.config.hash_for(self.embedding_dim)
    }

    /// The same layer with another bounds check, for example after loading it from a checkpoint.
    pub fn with_bounds_check(mut self, bounds_check: BoundsCheck) -> Self {
        self.config.bounds_check = bounds_check;
        self
    }

    /// The same layer with another kind of gradient, for example after loading it from a checkpoint; see
    /// [`HashedEmbeddingBagConfig::sparse`].
    ///
    /// # Errors
    /// A `hashed_weight` that is tracked and no variable, or a layer in 8 or 4 bits, which does not train.
    pub fn with_sparse(&self, sparse: bool) -> Result<Self> {
        let config = HashedEmbeddingBagConfig {
            sparse,
            ..self.config
        };
        let tables = self.tables.clone();
        Self::over(self.stored.clone(), tables, self.embedding_dim, config)
    }

    /// The gradient of a layer on a variable with [`sparse`](HashedEmbeddingBagConfig::sparse).
    pub fn sparse_gradient(&self) -> Option<&SparseGradient> {
        self.sparse_gradient.as_ref()
    }

    /// The same layer on another weight of the same length, such as its own in another dtype, on another device, detached from
    /// the graph, or averaged over training steps.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_hashed_embedding_bag::hashed_embedding_bag;
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// # let vars = VarMap::new();
    /// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let layer = hashed_embedding_bag(1000, 16, 0.1, Default::default(), vb)?;
    /// let frozen = layer.with_hashed_weight(layer.hashed_weight().detach())?;
    /// let half = layer.with_hashed_weight(layer.hashed_weight().to_dtype(DType::F16)?)?;
    /// # assert_eq!(frozen.config(), half.config());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Of a layer in 8 or 4 bits, the other weight is of bytes with the same meaning, such as its own on another device. A row tensor
    /// goes along to another device.
    ///
    /// # Errors
    /// Another shape, or a dtype that is not a float; of a layer in 8 or 4 bits, a dtype other than u8.
    pub fn with_hashed_weight(&self, hashed_weight: Tensor) -> Result<Self> {
        let now = self.hashed_weight();
        if hashed_weight.dims() != now.dims() {
            bail!(
                "hashed_weight must have the shape of the one it replaces, {:?}, got {:?}",
                now.dims(),
                hashed_weight.dims()
            );
        }
        let device = hashed_weight.device();
        let low_bit = self.stored.low_bit.as_ref();
        let row_tensor = self.stored.row_tensor.as_ref();
        let stored = Stored {
            low_bit: low_bit.map(|low| low.to_device(device)).transpose()?,
            row_tensor: row_tensor.map(|rows| rows.to_device(device)).transpose()?,
            hashed_weight,
        };
        let tables = self.tables.clone();
        Self::over(stored, tables, self.embedding_dim, self.config)
    }
}

impl Module for HashedEmbeddingBag {
    /// Pools `indices` of shape `(num_bags, bag_len)` to `(num_bags, embedding_dim)`.
    fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        self.lookup(indices, None, JaggedLayout::BatchMajor, None, OutDims::Bags)
    }
}

/// A [`HashedEmbeddingBag`] without the bags: one row per index, for indices of any rank.
///
/// Its parameter is named `hashed_embedding_bag.hashed_weight`, as in the state dict of the PyTorch package. A padding index
/// gives zeros.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_hashed_embedding_bag::hashed_embedding;
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layer = hashed_embedding(50_000, 64, 1.0 / 64.0, Default::default(), vb)?;
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

/// Creates a [`HashedEmbedding`] on a variable named `hashed_embedding_bag.hashed_weight`, with length and initial values as in
/// [`hashed_embedding_bag()`].
///
/// # Errors
/// Those of [`hashed_embedding_bag()`].
pub fn hashed_embedding(
    num_embeddings: usize,
    embedding_dim: usize,
    hashed_weight: impl Into<HashedWeightConfig>,
    config: HashedEmbeddingConfig,
    vb: VarBuilder,
) -> Result<HashedEmbedding> {
    let (config, vb) = (config.into(), vb.pp(INNER_BAG));
    let bag = hashed_embedding_bag(num_embeddings, embedding_dim, hashed_weight, config, vb)?;
    Ok(HashedEmbedding { bag })
}

impl HashedEmbedding {
    /// A layer on an existing `hashed_weight`; see [`HashedEmbeddingBag::new`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::new`].
    pub fn new(
        hashed_weight: Tensor,
        num_embeddings: usize,
        embedding_dim: usize,
        config: HashedEmbeddingConfig,
    ) -> Result<Self> {
        let config = config.into();
        let bag = HashedEmbeddingBag::new(hashed_weight, num_embeddings, embedding_dim, config)?;
        Ok(Self { bag })
    }

    /// The bag this layer looks up with, and its parameter.
    pub fn bag(&self) -> &HashedEmbeddingBag {
        &self.bag
    }

    /// Rows of the virtual table; see [`HashedEmbeddingBag::to_table`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::to_table`].
    pub fn to_table(&self, rows: impl RangeBounds<usize>) -> Result<Tensor> {
        self.bag.to_table(rows)
    }

    /// The same layer in 8 or 4 bits, and the relative error; see [`HashedEmbeddingBag::to_bits`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::to_bits`].
    pub fn to_bits(&self, bits: Bits) -> Result<(Self, f64)> {
        let (bag, error) = self.bag.to_bits(bits)?;
        Ok((Self { bag }, error))
    }

    /// The same layer with outputs of another dtype; see [`HashedEmbeddingBag::with_output_dtype`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::with_output_dtype`].
    pub fn with_output_dtype(self, dtype: DType) -> Result<Self> {
        let bag = self.bag.with_output_dtype(dtype)?;
        Ok(Self { bag })
    }

    /// The configuration of this layer, as [`HashedEmbedding::new`] takes it.
    pub fn config(&self) -> HashedEmbeddingConfig {
        let config = self.bag.config();
        HashedEmbeddingConfig {
            hash: config.hash,
            padding_idx: config.padding_idx,
            first_row: config.first_row,
            bounds_check: config.bounds_check,
            gradient: config.gradient,
            sparse: config.sparse,
        }
    }

    /// The same layer with another bounds check; see [`HashedEmbeddingBag::with_bounds_check`].
    pub fn with_bounds_check(self, bounds_check: BoundsCheck) -> Self {
        let bag = self.bag.with_bounds_check(bounds_check);
        Self { bag }
    }

    /// The same layer with another kind of gradient; see [`HashedEmbeddingBag::with_sparse`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::with_sparse`].
    pub fn with_sparse(&self, sparse: bool) -> Result<Self> {
        let bag = self.bag.with_sparse(sparse)?;
        Ok(Self { bag })
    }

    /// The same layer on another weight of the same length; see [`HashedEmbeddingBag::with_hashed_weight`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::with_hashed_weight`].
    pub fn with_hashed_weight(&self, hashed_weight: Tensor) -> Result<Self> {
        let bag = self.bag.with_hashed_weight(hashed_weight)?;
        Ok(Self { bag })
    }
}

/// Single rows of the same table, in any mode: sum, mean and max of one row are the same.
impl From<HashedEmbeddingBag> for HashedEmbedding {
    fn from(bag: HashedEmbeddingBag) -> Self {
        Self { bag }
    }
}

impl Module for HashedEmbedding {
    /// Looks up `indices` of any shape `(...)` to `(..., embedding_dim)`.
    fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        let dims = indices.dims();
        let bags_of_one = op::contiguous_indices(indices)?
            .flatten_all()?
            .unsqueeze(1)?;
        let layout = JaggedLayout::BatchMajor;
        self.bag
            .lookup(&bags_of_one, None, layout, None, OutDims::Of(dims))
    }
}
