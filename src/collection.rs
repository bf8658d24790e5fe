//! Many tables over one `hashed_weight`, looked up in one op.
//!
//! The tables of a collection are consecutive rows of one virtual table: row `r` of table `t` is row
//! `num_embeddings[0] + … + num_embeddings[t - 1] + r`, as with ROBE's `val_offset`. One hash spreads all of them over one
//! parameter, so a large table can use slots that a small one leaves free, and a lookup in all of them is one op: on CUDA one
//! launch, which shifts the rows and checks each against its own table.
//!
//! What is looked up are features. Each has one bag per sample and looks into one table, at first the table of its own name.

use crate::bags::JaggedLayout;
use crate::bounds::BoundsCheck;
use crate::config::{HashedEmbeddingBagConfig, HashedWeightConfig};
use crate::error::bail;
use crate::hash::Hash;
use crate::jagged::KeyedJaggedTensor;
use crate::layer::{create, HashedEmbeddingBag, Stored};
use crate::low_bit::{Bits, LowBit};
use crate::op::{check_weights_shape, contiguous_indices, OutDims};
use crate::tables::Tables;
use candle_core::{DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use std::sync::Arc;

/// Named tables of one `embedding_dim` and one mode that share a 1-D parameter, `hashed_weight`.
///
/// * `hashed_weight`: `(len,)`; f32, f64, f16 or bf16. f16 and bf16 are summed in f32.
/// * indices: u32, i32 or i64, each in `0..num_embeddings` of its own table, in one of these forms:
///   * `(batch, features)`: one row per feature and sample ([`Module::forward`]);
///   * `(batch, features, bag_len)`: a bag of each, filled up with `padding_idx` ([`Module::forward`]);
///   * `(nnz,)` with `offsets` `(features * batch,)`, or `(features * batch + 1,)` with `include_last_offset`
///     ([`forward_jagged`](Self::forward_jagged));
///   * jagged bags of each feature, joined by name ([`forward_keyed`](Self::forward_keyed)).
/// * output: `(batch, features, embedding_dim)` in the dtype of `hashed_weight`. An empty bag, or one of padding only, is
///   zeros.
///
/// The features are the tables, in order, unless [`with_features`](Self::with_features) says otherwise.
///
/// It is differentiable in `hashed_weight` if that is a variable. Only its inputs are kept for the backward pass.
///
/// The rows of a table follow those of the tables before it. So if you reorder the tables of a trained collection, or add rows to
/// one of them, the values of all later tables change: put a table that will grow last.
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
///
/// # Mean for some features, sum for others
/// All bags of one lookup are pooled in one mode. The mean of a bag is its sum divided by its length, so look up with mode sum and
/// divide the output, which is differentiable too:
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_hashed_embedding_bag::{hashed_embedding_bag_collection, JaggedLayout};
/// # use candle_nn::{VarBuilder, VarMap};
/// # fn main() -> candle_core::Result<()> {
/// # let vars = VarMap::new();
/// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let tables = [("movie", 4000), ("genre", 20)];
/// let collection = hashed_embedding_bag_collection(tables, 16, 0.1, Default::default(), vb)?;
///
/// // The first sample has three movies and a genre, the second no movie and two genres.
/// let indices = Tensor::new(&[3999u32, 5, 17, 0, 19, 3], &Device::Cpu)?;
/// let offsets = Tensor::new(&[0u32, 3, 4, 4], &Device::Cpu)?;
/// let sums = collection.forward_jagged(&indices, &offsets, JaggedLayout::BatchMajor)?;
///
/// // The mean of the movies, the sum of the genres: (batch, features), 1 where nothing is to be divided.
/// let divisors = Tensor::new(&[[3f32, 1.], [1., 1.]], &Device::Cpu)?;
/// let pooled = sums.broadcast_div(&divisors.unsqueeze(2)?)?;
/// assert_eq!(pooled.dims(), [2, 2, 16]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct HashedEmbeddingBagCollection {
    /// All tables as one layer; the position of a bag tells its feature, and thereby its table.
    bag: HashedEmbeddingBag,
}

/// Creates a [`HashedEmbeddingBagCollection`] of tables, given by name and number of rows, on a variable named `hashed_weight`,
/// which is sized and initialised as for one [`hashed_embedding_bag`](crate::hashed_embedding_bag()) with all the rows. Each table
/// is a feature of the same name; [`with_features`](HashedEmbeddingBagCollection::with_features) changes that. A
/// [row tensor](Hash::row_tensor) is read from the `VarBuilder`.
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
    let bag = create(
        tables,
        embedding_dim,
        hashed_weight.into(),
        None,
        config,
        vb,
    )?;
    Ok(HashedEmbeddingBagCollection { bag })
}

/// [`hashed_embedding_bag_collection()`] with a hash that reads a tensor of the rows; see
/// [`HashedEmbeddingBagCollection::with_row_tensor`].
///
/// # Errors
/// Those of [`hashed_embedding_bag_collection()`] and of [`HashedEmbeddingBagCollection::with_row_tensor`].
pub fn hashed_embedding_bag_collection_with_row_tensor<N: Into<String>>(
    tables: impl IntoIterator<Item = (N, usize)>,
    embedding_dim: usize,
    hashed_weight: impl Into<HashedWeightConfig>,
    row_tensor: &Tensor,
    config: HashedEmbeddingBagConfig,
    vb: VarBuilder,
) -> Result<HashedEmbeddingBagCollection> {
    let tables = named(tables, &config)?;
    let (hashed_weight, row_tensor) = (hashed_weight.into(), Some(row_tensor));
    let bag = create(tables, embedding_dim, hashed_weight, row_tensor, config, vb)?;
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
        Self::over(hashed_weight.into(), tables, embedding_dim, config)
    }

    /// A collection on an existing `hashed_weight`, with a hash that reads a tensor of the rows, its
    /// [row tensor](Hash::row_tensor): as for [`HashedEmbeddingBag::with_row_tensor`], with the rows of all tables, in their order.
    ///
    /// # Errors
    /// Those of [`new`](Self::new); a row tensor of another dtype or shape, on another device, or with a number that is none of a
    /// block; or a hash that reads none.
    pub fn with_row_tensor<N: Into<String>>(
        hashed_weight: Tensor,
        row_tensor: &Tensor,
        tables: impl IntoIterator<Item = (N, usize)>,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        let stored = Stored::with_row_tensor(hashed_weight, row_tensor, embedding_dim, &config)?;
        Self::over(stored, tables, embedding_dim, config)
    }

    pub(crate) fn over<N: Into<String>>(
        stored: Stored,
        tables: impl IntoIterator<Item = (N, usize)>,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        let tables = Arc::new(named(tables, &config)?);
        let bag = HashedEmbeddingBag::over(stored, tables, embedding_dim, config)?;
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

    /// The same tables and `hashed_weight`, looked up by other features: pairs of the name of a feature and that of the table it
    /// looks into. Several features may look into one table, as the history of a user and the candidates for the next click do.
    ///
    /// Features do not change where a row finds its values, so they can be chosen anew at any time.
    ///
    /// ```
    /// use candle_core::{DType, Device, Module, Tensor};
    /// use candle_hashed_embedding_bag::hashed_embedding_bag_collection;
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// # let vars = VarMap::new();
    /// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let tables = [("user", 6000), ("movie", 4000)];
    /// let features = [("user", "user"), ("last", "movie"), ("candidate", "movie")];
    /// let collection = hashed_embedding_bag_collection(tables, 16, 0.1, Default::default(), vb)?
    ///     .with_features(features)?;
    ///
    /// // Three samples, each a user, the movie watched last, and a candidate for the next one.
    /// let indices = Tensor::new(&[[17u32, 3999, 5], [17, 5, 5], [5999, 0, 12]], &Device::Cpu)?;
    /// assert_eq!(collection.forward(&indices)?.dims(), [3, 3, 16]);
    ///
    /// // Two towers over one parameter.
    /// let (user_tower, movie_tower) = (collection.select(["user", "last"])?, collection.select(["candidate"])?);
    /// assert_eq!(user_tower.forward(&indices.narrow(1, 0, 2)?)?.dims(), [3, 2, 16]);
    /// assert_eq!(movie_tower.forward(&indices.narrow(1, 2, 1)?)?.dims(), [3, 1, 16]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// No features, two with the same name, or one of a table that does not exist.
    pub fn with_features<N: Into<String>, T: AsRef<str>>(
        &self,
        features: impl IntoIterator<Item = (N, T)>,
    ) -> Result<Self> {
        let features = features
            .into_iter()
            .map(|(name, table)| (name.into(), table));
        self.looked_up_by(self.bag.tables().with_features(features)?)
    }

    /// Some of the features, in the given order, over the same tables and `hashed_weight`: the input of one tower of a model.
    ///
    /// # Errors
    /// No features, one given twice, or one that does not exist.
    pub fn select<N: AsRef<str>>(&self, features: impl IntoIterator<Item = N>) -> Result<Self> {
        let all: Vec<_> = self.features().collect();
        let find = |name: N| {
            let name = name.as_ref();
            match all.iter().find(|(feature, _)| *feature == name) {
                Some(&(feature, table)) => Ok((feature.to_string(), table)),
                None => {
                    let names: Vec<_> = all.iter().map(|(feature, _)| *feature).collect();
                    bail!("no feature {name}, only {}", names.join(", "))
                }
            }
        };
        let features: Vec<_> = features.into_iter().map(find).collect::<Result<_>>()?;
        self.looked_up_by(self.bag.tables().with_features(features)?)
    }

    /// The same parameter under the same tables with other features.
    fn looked_up_by(&self, tables: Tables) -> Result<Self> {
        let (stored, tables) = (self.bag.stored().clone(), Arc::new(tables));
        let (dim, config) = (self.embedding_dim(), self.config());
        let bag = HashedEmbeddingBag::over(stored, tables, dim, config)?;
        Ok(Self { bag })
    }

    /// Pools jagged `indices` `(nnz,)` by `offsets` `(features * batch,)`, or `(features * batch + 1,)` with
    /// `include_last_offset`, to `(batch, features, embedding_dim)`. `layout` is the order of the bags. Without
    /// `include_last_offset` every offset starts a bag, the last one too.
    ///
    /// # Errors
    /// Wrong ranks, dtypes or devices, a number of bags that is not a multiple of the number of features; with
    /// [`BoundsCheck::Error`] also a row outside its table that is not padding (the message gives feature, table, position and value),
    /// and offsets that do not start at 0, decrease or exceed `nnz`.
    pub fn forward_jagged(
        &self,
        indices: &Tensor,
        offsets: &Tensor,
        layout: JaggedLayout,
    ) -> Result<Tensor> {
        self.bag
            .lookup(indices, Some(offsets), layout, None, OutDims::ByFeature)
    }

    /// Pools jagged bags that were joined by the names of their features, `(batch, features, embedding_dim)`. If they have
    /// per-sample weights, each row is multiplied by its own, as in [`forward_weighted`](Self::forward_weighted).
    ///
    /// # Errors
    /// Features other than those of the collection, or in another order, and those of [`forward_jagged`](Self::forward_jagged), or
    /// with weights of [`forward_weighted_jagged`](Self::forward_weighted_jagged). The positions in them count the indices or
    /// offsets of all features.
    pub fn forward_keyed(&self, bags: &KeyedJaggedTensor) -> Result<Tensor> {
        let want: Vec<_> = self.features().map(|(name, _)| name).collect();
        let got: Vec<_> = bags.keys().collect();
        if want != got {
            let (want, got) = (want.join(", "), got.join(", "));
            bail!("features must be {want}, in this order, got {got}");
        }
        let (offsets, num_bags) = (bags.offsets(), bags.offsets().elem_count() - 1);
        let offsets = if self.config().include_last_offset {
            offsets.clone()
        } else {
            offsets.narrow(0, 0, num_bags)?
        };
        let (indices, layout) = (bags.indices(), JaggedLayout::FeatureMajor);
        match bags.per_sample_weights() {
            Some(weights) => self.forward_weighted_jagged(indices, &offsets, layout, weights),
            None => self.forward_jagged(indices, &offsets, layout),
        }
    }

    /// Pools bags of each feature as [`Module::forward`] does, with each row multiplied by its own weight; mode sum only.
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
        self.bag
            .lookup(indices, Some(offsets), layout, weights, OutDims::ByFeature)
    }

    /// Looks up bags of equal length, with or without per-sample weights.
    fn lookup(&self, indices: &Tensor, per_sample_weights: Option<&Tensor>) -> Result<Tensor> {
        let features = self.bag.tables().num_features();
        let (batch, bag_len) = match *indices.dims() {
            [batch, n] if n == features => (batch, 1),
            [batch, n, bag_len] if n == features => (batch, bag_len),
            ref dims => bail!(
                "indices must have shape [batch, {features}] or [batch, {features}, bag_len], got {dims:?}"
            ),
        };
        let Some(bags) = batch.checked_mul(features) else {
            bail!("{batch} samples of {features} bags are too many");
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
        let weights = per_sample_weights.as_ref();
        self.bag
            .lookup(&indices, None, layout, weights, OutDims::ByFeature)
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
                return HashedEmbeddingBag::over(
                    self.bag.stored().clone(),
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
        self.bag.tables().tables()
    }

    /// The features, by name and that of their table, in order.
    pub fn features(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.bag.tables().features()
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

    /// What the hash reads of each row, if it does; see [`HashedEmbeddingBag::row_tensor`]. The rows are those of all tables.
    pub fn row_tensor(&self) -> Option<&Tensor> {
        self.bag.row_tensor()
    }

    /// The tensors of this collection.
    pub(crate) fn stored(&self) -> &Stored {
        self.bag.stored()
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

    /// The same collection with another kind of gradient; see [`HashedEmbeddingBag::with_sparse`].
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBag::with_sparse`].
    pub fn with_sparse(&self, sparse: bool) -> Result<Self> {
        let bag = self.bag.with_sparse(sparse)?;
        Ok(Self { bag })
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
    /// Looks up `indices` `(batch, features)` or pools `(batch, features, bag_len)`, to `(batch, features, embedding_dim)`.
    fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        self.lookup(indices, None)
    }
}
