//! What the layers are configured with.

use crate::bounds::BoundsCheck;
use crate::hash::Hash;
use crate::op::{Gradient, Mode};
use candle_nn::Init;
use serde::{Deserialize, Serialize};

/// What a [`HashedEmbeddingBag`](crate::HashedEmbeddingBag) or a
/// [`HashedEmbeddingBagCollection`](crate::HashedEmbeddingBagCollection) does.
///
/// The length of `hashed_weight` is not part of it: only the functions that create one take it, see [`HashedWeightConfig`]. With
/// serde, a missing field takes its default and an unknown one is an error.
///
/// ```
/// use candle_hashed_embedding_bag::{Hash, HashedEmbeddingBagConfig, Mode};
///
/// let config = HashedEmbeddingBagConfig {
///     mode: Mode::Mean,
///     hash: Some(Hash::balanced(32)),
///     ..Default::default()
/// };
/// assert_eq!(config.padding_idx, None);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HashedEmbeddingBagConfig {
    /// How the rows of a bag are pooled into one. Default [`Mode::Sum`].
    pub mode: Mode,
    /// Where virtual elements find their slots. Default `None`: [`Hash::default_for`] the embedding dimension.
    pub hash: Option<Hash>,
    /// Indices equal to it are padding: they do not count in their bag and get no gradient. It may lie outside the table,
    /// such as -1. Default `None`.
    pub padding_idx: Option<i64>,
    /// Whether offsets hold one more value, the end of the last bag. Default `false`.
    pub include_last_offset: bool,
    /// Added to each index before it is hashed: the row at which this table starts within a larger virtual one, like ROBE's
    /// `val_offset`. Tables that share a `hashed_weight` must not overlap. Default 0, the only value that a collection takes.
    pub first_row: usize,
    /// What to do about indices and offsets that are out of range. Default [`BoundsCheck::Error`].
    pub bounds_check: BoundsCheck,
    /// How the gradient of `hashed_weight` is summed on CUDA. Default [`Gradient::Fastest`].
    pub gradient: Gradient,
    /// Whether the gradient of `hashed_weight` is sparse, as with `sparse` of `torch.nn.EmbeddingBag`: a backward pass then takes
    /// time for the rows that were looked up, and hardly any for the length of `hashed_weight`, except for deterministic gradients
    /// on CUDA. Default `false`.
    ///
    /// candle has no sparse tensors, so the gradient is in no `GradStore`: it is a [`SparseGradient`](crate::SparseGradient) of the
    /// variable, which [`optim::Sgd`](crate::optim::Sgd), [`optim::Adagrad`](crate::optim::Adagrad) and
    /// [`optim::SparseAdam`](crate::optim::SparseAdam) find. **Optimisers of other crates do not, and leave `hashed_weight` as it
    /// is.** A layer on a weight that is not tracked, for inference, has no gradient of either kind.
    pub sparse: bool,
}

impl HashedEmbeddingBagConfig {
    /// The hash for this embedding dimension.
    pub(crate) fn hash_for(&self, embedding_dim: usize) -> Hash {
        self.hash.unwrap_or(Hash::default_for(embedding_dim))
    }
}

/// What a [`HashedEmbedding`](crate::HashedEmbedding) does: the fields of a [`HashedEmbeddingBagConfig`] that make sense
/// without bags.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HashedEmbeddingConfig {
    /// Where virtual elements find their slots. Default `None`: [`Hash::default_for`] the embedding dimension.
    pub hash: Option<Hash>,
    /// The index that is padding: it gives zeros and gets no gradient. It may lie outside the table, such as -1. Default `None`.
    pub padding_idx: Option<i64>,
    /// Added to each index before it is hashed; see [`HashedEmbeddingBagConfig::first_row`]. Default 0.
    pub first_row: usize,
    /// What to do about indices that are out of range. Default [`BoundsCheck::Error`].
    pub bounds_check: BoundsCheck,
    /// How the gradient of `hashed_weight` is summed on CUDA. Default [`Gradient::Fastest`].
    pub gradient: Gradient,
    /// Whether the gradient of `hashed_weight` is sparse; see [`HashedEmbeddingBagConfig::sparse`]. Default `false`.
    pub sparse: bool,
}

impl From<HashedEmbeddingConfig> for HashedEmbeddingBagConfig {
    fn from(config: HashedEmbeddingConfig) -> Self {
        Self {
            hash: config.hash,
            padding_idx: config.padding_idx,
            first_row: config.first_row,
            bounds_check: config.bounds_check,
            gradient: config.gradient,
            sparse: config.sparse,
            ..Self::default()
        }
    }
}

/// The length and the initial values of a new `hashed_weight`. An `f64` converts into one: it is the compression.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_hashed_embedding_bag::{hashed_embedding, HashedWeightConfig};
/// use candle_nn::{Init, VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// # let vars = VarMap::new();
/// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// hashed_embedding(50_000, 64, 1.0 / 64.0, Default::default(), vb.pp("a"))?;
///
/// let init = Init::Randn { mean: 0.0, stdev: 0.02 };
/// let weight = HashedWeightConfig { compression: 1.0 / 64.0, init: Some(init) };
/// hashed_embedding(50_000, 64, weight, Default::default(), vb.pp("b"))?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct HashedWeightConfig {
    /// The length of `hashed_weight` over `num_embeddings * embedding_dim`: above 0 and at most 1. `1.0 / 64.0` stores a 64th.
    ///
    /// How much accuracy it costs depends on the data and the task; retrieval loses more than click prediction. Compare with the
    /// plain table, [`Hash::identity`] at compression 1, before you choose.
    pub compression: f64,
    /// The initial values, if the `VarBuilder` creates new variables. `None`: uniform in `±sqrt(1 / num_embeddings)`.
    pub init: Option<Init>,
}

impl From<f64> for HashedWeightConfig {
    fn from(compression: f64) -> Self {
        Self {
            compression,
            init: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configs_in_json() {
        let read = |json| serde_json::from_str::<HashedEmbeddingBagConfig>(json);
        assert_eq!(read("{}").unwrap(), Default::default());
        let config = HashedEmbeddingBagConfig {
            mode: Mode::Max,
            hash: Some(Hash::balanced(8)),
            padding_idx: Some(-1),
            gradient: Gradient::Deterministic,
            ..Default::default()
        };
        let json = r#"{"mode":"max","hash":{"kind":"mix","seed":0,"block":8,"signed":true,"balanced":true},"padding_idx":-1,"include_last_offset":false,"first_row":0,"bounds_check":"error","gradient":"deterministic","sparse":false}"#;
        assert_eq!(serde_json::to_string(&config).unwrap(), json);
        assert_eq!(read(json).unwrap(), config);
        let message = |json| read(json).unwrap_err().to_string();
        assert!(message(r#"{"compression":0.1}"#).contains("unknown field `compression`"));
        assert!(message(r#"{"mode":"median"}"#).contains("unknown variant `median`"));

        let read = |json| serde_json::from_str::<HashedEmbeddingConfig>(json);
        let config = HashedEmbeddingConfig {
            bounds_check: BoundsCheck::Off,
            ..Default::default()
        };
        assert_eq!(read(r#"{"bounds_check":"off"}"#).unwrap(), config);
        let message = read(r#"{"mode":"sum"}"#).unwrap_err().to_string();
        assert!(message.contains("unknown field `mode`"), "{message}");
    }
}
