//! The model: a DLRM (Naumov et al. 2019, <https://arxiv.org/abs/1906.00091>) over pooled hashed embeddings.
//!
//! ```text
//!  user  gender  age  occupation  zip   movie  genres  words     one hashed embedding bag each
//!    └──────┴─────┴───────┴────────┴──┬───┴──────┴───────┘
//!                     vectors (batch, n, embedding_dim)
//!                    ┌────────────────┴────────────────┐
//!               as they are              dots of all n (n - 1) / 2 pairs
//!                    └────────────────┬────────────────┘
//!                         top MLP ──> logit of "likes it"
//! ```

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_hashed_embedding_bag::{hashed_embedding_bag, Checkpoint, HashedEmbeddingBag};
use candle_nn::{linear, seq, Activation, Module, Sequential, VarBuilder};

use crate::data::Catalog;
use crate::tables::Tables;

/// The widths of the hidden layers of the top MLP.
const HIDDEN: [usize; 2] = [64, 32];

pub struct Dlrm {
    tables: Vec<(&'static str, HashedEmbeddingBag)>,
    /// Where in the flattened matrix of dots each unordered pair of tables lies once.
    pairs: Tensor,
    top: Sequential,
}

/// Which rows of which table each example of a batch pools: `(indices, offsets)` per table.
pub struct Batch(Vec<(Tensor, Tensor)>);

impl Dlrm {
    /// A new model of `catalog`, its variables made by `vb`.
    pub fn new(catalog: &Catalog, tables: &Tables, vb: VarBuilder) -> Result<Self> {
        let (names, rows): (Vec<_>, Vec<_>) = catalog.tables().into_iter().unzip();
        let dim = tables.embedding_dim;
        let configs = tables.configs(&rows)?;
        let table = |((name, rows), config)| {
            Ok((name, hashed_embedding_bag(rows, dim, config, vb.pp(name))?))
        };
        let tables = names
            .into_iter()
            .zip(rows)
            .zip(configs)
            .map(table)
            .collect::<Result<_>>()?;
        Self::with_tables(tables, vb)
    }

    /// The model in a checkpoint. The tables know their sizes and their hash from the file.
    pub fn open(catalog: &Catalog, checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        let table = |(name, _)| {
            Ok((
                name,
                checkpoint.hashed_embedding_bag(name, DType::F32, device)?,
            ))
        };
        let tables = catalog
            .tables()
            .into_iter()
            .map(table)
            .collect::<Result<_>>()?;
        Self::with_tables(tables, checkpoint.var_builder(DType::F32, device))
    }

    fn with_tables(
        tables: Vec<(&'static str, HashedEmbeddingBag)>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let n = tables.len();
        let pairs: Vec<u32> = (0..n)
            .flat_map(|i| (0..i).map(move |j| (i * n + j) as u32))
            .collect();
        let inputs: usize = tables
            .iter()
            .map(|(_, table)| table.embedding_dim())
            .sum::<usize>()
            + pairs.len();

        let mut top = seq();
        let mut width = inputs;
        for (i, hidden) in HIDDEN.into_iter().enumerate() {
            top = top
                .add(linear(width, hidden, vb.pp(format!("top.{i}")))?)
                .add(Activation::Relu);
            width = hidden;
        }
        let top = top.add(linear(width, 1, vb.pp(format!("top.{}", HIDDEN.len())))?);
        Ok(Self {
            tables,
            pairs: Tensor::new(pairs, vb.device())?,
            top,
        })
    }

    /// One logit per example of the batch.
    pub fn forward(&self, batch: &Batch) -> candle_core::Result<Tensor> {
        let vectors = self
            .tables
            .iter()
            .zip(&batch.0)
            .map(|((_, table), (indices, offsets))| table.forward_with_offsets(indices, offsets))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let vectors = Tensor::stack(&vectors, 1)?;
        let dots = vectors
            .matmul(&vectors.transpose(1, 2)?)?
            .flatten_from(1)?
            .index_select(&self.pairs, 1)?;
        self.top
            .forward(&Tensor::cat(&[vectors.flatten_from(1)?, dots], 1)?)?
            .squeeze(1)
    }

    /// The hashed layers by name, as a checkpoint wants them.
    pub fn tables(&self) -> impl Iterator<Item = (&'static str, &HashedEmbeddingBag)> {
        self.tables.iter().map(|(name, table)| (*name, table))
    }

    /// How many values the embedding tables hold: what they store, and what they would store without hashing.
    pub fn embedding_parameters(&self) -> (usize, usize) {
        let stored = self
            .tables()
            .map(|(_, table)| table.hashed_weight().elem_count())
            .sum();
        let virtual_ = self
            .tables()
            .map(|(_, table)| table.num_embeddings() * table.embedding_dim())
            .sum();
        (stored, virtual_)
    }
}

impl Batch {
    /// The bags of (user row, movie row) pairs.
    pub fn new(
        catalog: &Catalog,
        pairs: &[(u32, u32)],
        device: &Device,
    ) -> candle_core::Result<Self> {
        let bags = catalog.bags(pairs);
        let tensors = bags.iter().map(|bags| {
            Ok((
                Tensor::new(bags.indices(), device)?,
                Tensor::new(bags.offsets(), device)?,
            ))
        });
        tensors.collect::<candle_core::Result<_>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Source;
    use crate::init::seeded;
    use candle_hashed_embedding_bag::Hash;
    use candle_nn::VarMap;

    fn model(tables: Tables) -> Result<(Catalog, Dlrm)> {
        let catalog = Source::Generated { seed: 0 }.load()?.catalog;
        let model = Dlrm::new(&catalog, &tables, seeded(&VarMap::new(), 1, &Device::Cpu))?;
        Ok((catalog, model))
    }

    #[test]
    fn an_example_does_not_depend_on_its_batch() -> Result<()> {
        let (catalog, model) = model(Tables {
            embedding_dim: 8,
            compression: 0.25,
            hash: Hash::default_for(8),
        })?;
        let logits = |pairs: &[(u32, u32)]| -> Result<Vec<f32>> {
            Ok(model
                .forward(&Batch::new(&catalog, pairs, &Device::Cpu)?)?
                .to_vec1()?)
        };
        let (together, alone) = (logits(&[(1, 2), (3, 4), (1, 4)])?, logits(&[(3, 4)])?);
        assert!((together[1] - alone[0]).abs() < 1e-5);
        Ok(())
    }
}
