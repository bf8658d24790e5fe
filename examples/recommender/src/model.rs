//! The model: a DLRM (Naumov et al. 2019, <https://arxiv.org/abs/1906.00091>) over pooled hashed embeddings.
//!
//! ```text
//!    numbers          table  table  …  table     bags of rows, in collections of hashed tables
//!       │               │      │         │
//!   bottom MLP          │      │         │       only where examples have numbers
//!       └───────────────┴──────┴─┬───────┘
//!                    vectors (batch, n, embedding_dim)
//!               ┌────────────────┴────────────────┐
//!          as they are              dots of all n (n - 1) / 2 pairs
//!               └────────────────┬────────────────┘
//!                         top MLP ──> logit
//! ```

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_hashed_embedding_bag::{Bits, Checkpoint};
use candle_nn::{linear, Linear, Module, VarBuilder};

use crate::data::{Batch, Schema};
use crate::embeddings::{EmbeddingConfig, Embeddings};

/// The widths of the hidden layers of both MLPs.
const HIDDEN: [usize; 2] = [64, 32];

/// Scores examples.
#[derive(Clone)]
pub struct Dlrm {
    embeddings: Embeddings,
    /// How many numbers an example has, and the MLP that turns them into a vector.
    bottom: Option<(usize, Mlp)>,
    /// The position of each unordered pair of vectors in the flattened matrix of dot products.
    pairs: Tensor,
    top: Mlp,
    device: Device,
}

/// Linear layers with ReLU between them. (`candle_nn::Sequential` cannot be shared between threads.)
#[derive(Clone)]
struct Mlp(Vec<Linear>);

impl Dlrm {
    /// A new model for examples of this schema, with variables from `vb`.
    pub fn new(schema: &Schema, config: EmbeddingConfig, vb: VarBuilder) -> Result<Self> {
        let embeddings = Embeddings::new(schema, config, vb.clone())?;
        Self::over(embeddings, schema, vb)
    }

    /// The model in a checkpoint.
    pub fn open(schema: &Schema, checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        let embeddings = Embeddings::open(schema, checkpoint, device)?;
        Self::over(
            embeddings,
            schema,
            checkpoint.var_builder(DType::F32, device),
        )
    }

    /// The same model with its tables in 8 or 4 bits, for serving, and the relative error of each collection.
    ///
    /// # Errors
    /// Those of [`Embeddings::to_bits`].
    pub fn to_bits(&self, bits: Bits) -> Result<(Self, Vec<(&'static str, f64)>)> {
        let (embeddings, errors) = self.embeddings.to_bits(bits)?;
        let model = Self {
            embeddings,
            ..self.clone()
        };
        Ok((model, errors))
    }

    fn over(embeddings: Embeddings, schema: &Schema, vb: VarBuilder) -> Result<Self> {
        let dim = embeddings.embedding_dim();
        let bottom = match schema.numbers {
            0 => None,
            numbers => {
                let widths = [numbers, HIDDEN[0], HIDDEN[1], dim];
                Some((numbers, Mlp::new(&widths, vb.pp("bottom"))?))
            }
        };
        let n = embeddings.num_tables() + usize::from(bottom.is_some());
        let pairs: Vec<u32> = (0..n)
            .flat_map(|i| (0..i).map(move |j| (i * n + j) as u32))
            .collect();
        let inputs = n * dim + pairs.len();
        Ok(Self {
            embeddings,
            bottom,
            pairs: Tensor::new(pairs, vb.device())?,
            top: Mlp::new(&[inputs, HIDDEN[0], HIDDEN[1], 1], vb.pp("top"))?,
            device: vb.device().clone(),
        })
    }

    /// One logit per example of the batch.
    pub fn forward(&self, batch: &Batch) -> candle_core::Result<Tensor> {
        let mut vectors = self.embeddings.forward(&batch.bags, &self.device)?;
        if let Some((numbers, mlp)) = &self.bottom {
            let numbers = Tensor::new(&batch.numbers[..], &self.device)?.reshape(((), *numbers))?;
            vectors = Tensor::cat(&[vectors, mlp.forward(&numbers)?.relu()?.unsqueeze(1)?], 1)?;
        }
        let dots = vectors
            .matmul(&vectors.transpose(1, 2)?)?
            .flatten_from(1)?
            .index_select(&self.pairs, 1)?;
        self.top
            .forward(&Tensor::cat(&[vectors.flatten_from(1)?, dots], 1)?)?
            .squeeze(1)
    }

    /// The device of its parameters, to which its inputs belong.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its embedding tables.
    pub fn embeddings(&self) -> &Embeddings {
        &self.embeddings
    }
}

impl Mlp {
    /// Linear layers `0`, `1`, … of the given widths.
    fn new(widths: &[usize], vb: VarBuilder) -> candle_core::Result<Self> {
        let layer = |(i, width): (usize, &[usize])| linear(width[0], width[1], vb.pp(i));
        let layers = widths.windows(2).enumerate().map(layer);
        Ok(Self(layers.collect::<candle_core::Result<_>>()?))
    }
}

impl Module for Mlp {
    fn forward(&self, inputs: &Tensor) -> candle_core::Result<Tensor> {
        let mut layers = self.0.iter();
        let first = layers
            .next()
            .map_or(Ok(inputs.clone()), |l| l.forward(inputs));
        layers.try_fold(first?, |x, layer| layer.forward(&x.relu()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Catalog, Source};
    use crate::init::seeded;
    use candle_hashed_embedding_bag::Hash;
    use candle_nn::VarMap;

    fn model(config: EmbeddingConfig) -> Result<(Catalog, Dlrm)> {
        let catalog = Source::Generated { seed: 0 }.load()?.catalog;
        let vb = seeded(&VarMap::new(), 1, &Device::Cpu);
        let model = Dlrm::new(&catalog.schema(), config, vb)?;
        Ok((catalog, model))
    }

    #[test]
    fn an_example_does_not_depend_on_its_batch() -> Result<()> {
        let (catalog, model) = model(EmbeddingConfig {
            embedding_dim: 8,
            compression: 0.25,
            hash: Hash::default_for(8),
        })?;
        let logits = |pairs: &[(u32, u32)]| -> Result<Vec<f32>> {
            Ok(model.forward(&catalog.batch(pairs))?.to_vec1()?)
        };
        let (together, alone) = (logits(&[(1, 2), (3, 4), (1, 4)])?, logits(&[(3, 4)])?);
        assert!((together[1] - alone[0]).abs() < 1e-5);
        Ok(())
    }
}
