//! How the parameters are shared out among the embedding tables.
//!
//! `compression` is a promise about all tables together. Small tables (a dozen genres, two genders) stay plain: they
//! carry much and cost next to nothing. The large ones are hashed and share what is left.

use anyhow::{ensure, Result};
use candle_hashed_embedding_bag::{Hash, HashedEmbeddingBagConfig, Mode};

/// A table of fewer rows is small.
const SMALL: usize = 64;

pub struct Tables {
    pub embedding_dim: usize,
    /// The most parameters per value of all tables together; 1 is the reference, where every table is plain.
    pub compression: f64,
    /// The hash of the large tables.
    pub hash: Hash,
}

impl Tables {
    /// The configuration of each table, by their numbers of rows.
    ///
    /// # Errors
    /// A compression that leaves a large table less than one block of the hash.
    pub fn configs(&self, rows: &[usize]) -> Result<Vec<HashedEmbeddingBagConfig>> {
        let values = |rows: usize| (rows * self.embedding_dim) as f64;
        let all: f64 = rows.iter().copied().map(values).sum();
        let small: f64 = rows
            .iter()
            .copied()
            .filter(|&rows| rows < SMALL)
            .map(values)
            .sum();
        let budget = all * self.compression;
        // Very few parameters are better spent on the ids than on plain small tables.
        let small_fits = small <= budget / 2.0;
        let is_plain = |rows: usize| self.compression == 1.0 || (small_fits && rows < SMALL);

        let plain: f64 = rows
            .iter()
            .copied()
            .filter(|&rows| is_plain(rows))
            .map(values)
            .sum();
        let hashed = rows.iter().filter(|&&rows| !is_plain(rows)).count();
        // A hashed table holds whole blocks, so each may come out up to a block larger than its share.
        let rounding = (hashed * self.hash.block()) as f64;
        let share = (budget - plain - rounding) / (all - plain);
        ensure!(
            hashed == 0 || share > 0.0,
            "a compression of {} leaves {budget:.0} parameters, too few for {hashed} hashed tables",
            self.compression
        );
        rows.iter()
            .map(|&rows| {
                if is_plain(rows) {
                    self.plain()
                } else {
                    Ok(self.hashed(share))
                }
            })
            .collect()
    }

    fn hashed(&self, compression: f64) -> HashedEmbeddingBagConfig {
        HashedEmbeddingBagConfig {
            compression,
            // The mean, so that a film of six genres does not count for more than one of two.
            mode: Mode::Mean,
            hash: Some(self.hash),
            include_last_offset: true,
            ..Default::default()
        }
    }

    /// A table of which no two values share a parameter. Even with a parameter per value, a hash that mixes would leave a
    /// third of them unused.
    fn plain(&self) -> Result<HashedEmbeddingBagConfig> {
        Ok(HashedEmbeddingBagConfig {
            hash: Some(Hash::identity(self.embedding_dim)?),
            ..self.hashed(1.0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Module, Tensor};
    use candle_hashed_embedding_bag::{hashed_embedding_bag, HashedEmbeddingBag};
    use candle_nn::VarBuilder;

    fn tables(compression: f64) -> Tables {
        Tables {
            embedding_dim: 16,
            compression,
            hash: Hash::default_for(16),
        }
    }

    /// How many parameters the tables get, in all.
    fn parameters(compression: f64, rows: &[usize]) -> Result<usize> {
        let configs = tables(compression).configs(rows)?;
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        let sizes = rows.iter().zip(configs).map(|(&rows, config)| {
            Ok(hashed_embedding_bag(rows, 16, config, vb.clone())?
                .hashed_weight()
                .elem_count())
        });
        sizes.sum()
    }

    #[test]
    fn the_promise_is_kept_and_used() -> Result<()> {
        let rows = [6040, 2, 7, 21, 678, 3883, 18, 1461];
        let all = 16 * rows.iter().sum::<usize>();
        assert_eq!(parameters(1.0, &rows)?, all);
        for share in [2, 4, 16, 64, 256, 1024] {
            let kept = parameters(1.0 / share as f64, &rows)?;
            assert!(kept * share <= all, "1/{share}: {kept} of {all}");
            assert!(kept + 8 * 16 >= all / share, "1/{share}: {kept} of {all}");
        }
        assert!(parameters(1e-5, &rows).is_err());
        Ok(())
    }

    #[test]
    fn a_plain_table_is_plain() -> Result<()> {
        let config = tables(1.0).configs(&[100])?[0];
        let weight = Tensor::arange(0f32, 1600.0, &Device::Cpu)?;
        let table = HashedEmbeddingBag::new(weight.clone(), 100, 16, config)?;
        let rows = Tensor::arange(0u32, 100, &Device::Cpu)?.unsqueeze(1)?;
        assert_eq!(
            table.forward(&rows)?.flatten_all()?.to_vec1::<f32>()?,
            weight.to_vec1::<f32>()?
        );
        Ok(())
    }
}
