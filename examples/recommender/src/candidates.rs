//! All movies, ready to be scored for any user.
//!
//! For a given user, what the first layer of the top MLP yields before its activation is linear in the vectors of the movie, but for
//! the dots among those. So it is a sum of three parts, of which two are vectors of the layer's outputs:
//!
//! ```text
//! first layer (user, movie) = of the user alone  + of the movie alone + matrix of the user · vectors of the movie
//!                             once per request     kept                 one product for all movies
//! ```
//!
//! That is exact: dots and values of the missing side are zeros in the first two, and the third has the dots between both sides.

use std::ops::Range;

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::data::Catalog;
use crate::model::Dlrm;
use crate::ops;
use crate::profiles::{batch, Profile};
use crate::step::{shards, side_by_side};

/// Movies of which vectors are made at once.
const CHUNK: usize = 4096;

/// What scoring all movies takes besides the model.
pub struct Candidates {
    users: Side,
    /// The vectors of each movie, `(movies, vectors of a movie * dim)`.
    vectors: Tensor,
    /// What the movie alone adds to the outputs of the first layer, `(movies, outputs)`.
    outputs: Tensor,
    /// The weights of the dots between both sides, `(vectors of a movie * outputs, vectors of a user)`.
    weights: Tensor,
}

/// The vectors of users, or of movies, among those of a pair.
struct Side {
    /// Their positions, u32.
    positions: Tensor,
    /// 1 for them and 0 for others, `(1, vectors, 1)`.
    mask: Tensor,
}

impl Candidates {
    /// All movies of a catalog.
    ///
    /// # Errors
    /// What the device says.
    pub fn new(model: &Dlrm, catalog: &Catalog) -> Result<Self> {
        let tables_of_users = 1 + catalog.users.features.len();
        let is_of_user = |&table: &usize| table < tables_of_users;
        let order: Vec<usize> = model.embeddings().order().collect();
        let side = |of_user: bool| {
            let is_own: Vec<bool> = order.iter().map(|t| is_of_user(t) == of_user).collect();
            Side::new(&is_own, model.device())
        };
        let (users, movies) = (side(true)?, side(false)?);

        let (mut vectors, mut outputs) = (Vec::new(), Vec::new());
        let all: Vec<(u32, u32)> = (0..catalog.movies.ids.len() as u32)
            .map(|movie| (0, movie))
            .collect();
        for chunk in all.chunks(CHUNK) {
            let pooled = model
                .embeddings()
                .forward(&model.inputs(&catalog.batch(chunk))?.lookups)?
                .detach();
            vectors.push(movies.pick(&pooled)?.flatten_from(1)?);
            let alone = model.first_outputs(&movies.only(&pooled)?)?;
            outputs.push(alone.broadcast_sub(model.first_bias())?);
        }
        let weights = model.weights_of_dots(&positions(&movies)?, &positions(&users)?)?;
        Ok(Self {
            users,
            vectors: Tensor::cat(&vectors, 0)?,
            outputs: Tensor::cat(&outputs, 0)?,
            weights,
        })
    }

    /// The logits of a user with the movies of these rows, by the model and the catalog that the candidates were made of.
    ///
    /// # Errors
    /// What the device says.
    pub fn logits(
        &self,
        model: &Dlrm,
        catalog: &Catalog,
        user: &Profile,
        movies: Range<usize>,
    ) -> Result<Vec<f32>> {
        let inputs = model.inputs(&batch(catalog, [(user, &Profile::Row(0))]))?;
        let pooled = model.embeddings().forward(&inputs.lookups)?.detach();
        let alone = model
            .first_outputs(&self.users.only(&pooled)?)?
            .squeeze(0)?;
        // (vectors of a movie * outputs, dim), to (outputs, vectors of a movie * dim).
        let matrix = self
            .weights
            .matmul(&self.users.pick(&pooled)?.squeeze(0)?)?;
        let (outputs, width) = (alone.dim(0)?, self.vectors.dim(1)?);
        let matrix = matrix
            .reshape(((), outputs, pooled.dim(2)?))?
            .transpose(0, 1)?
            .reshape((outputs, width))?;
        let score = |rows: &Range<usize>| {
            let part = |tensor: &Tensor| tensor.narrow(0, movies.start + rows.start, rows.len());
            let both = ops::linear(&part(&self.vectors)?, &matrix, &alone, false)?;
            let logits = model.after_first((both + part(&self.outputs)?)?)?;
            logits.to_vec1::<f32>()
        };
        Ok(if model.device().is_cpu() {
            let shards = shards(model, movies.len());
            side_by_side(model, &shards, score)?.concat()
        } else {
            score(&(0..movies.len()))?
        })
    }
}

/// The positions as numbers.
fn positions(side: &Side) -> Result<Vec<usize>> {
    let positions = side.positions.to_vec1::<u32>()?;
    Ok(positions.into_iter().map(|p| p as usize).collect())
}

impl Side {
    fn new(is_own: &[bool], device: &Device) -> candle_core::Result<Self> {
        let own = (0u32..).zip(is_own).filter(|(_, own)| **own);
        let positions: Vec<u32> = own.map(|(position, _)| position).collect();
        let mask: Vec<f32> = is_own.iter().map(|&own| f32::from(u8::from(own))).collect();
        Ok(Self {
            positions: Tensor::new(positions, device)?,
            mask: Tensor::from_vec(mask, (1, is_own.len(), 1), device)?,
        })
    }

    /// The vectors of this side, of `(batch, vectors, dim)`.
    fn pick(&self, vectors: &Tensor) -> candle_core::Result<Tensor> {
        vectors.index_select(&self.positions, 1)
    }

    /// All vectors, those of the other side being zeros.
    fn only(&self, vectors: &Tensor) -> candle_core::Result<Tensor> {
        vectors.broadcast_mul(&self.mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Source;
    use crate::embeddings::EmbeddingConfig;
    use crate::evaluate::logits;
    use crate::init::seeded;
    use crate::model::ModelConfig;
    use crate::ops::TopInput;
    use candle_hashed_embedding_bag::Hash;
    use candle_nn::VarMap;

    #[test]
    fn they_score_as_pairs_do() -> Result<()> {
        let catalog = Source::Generated { seed: 0 }.load()?.catalog;
        for (input, top) in [
            (TopInput::Vectors, vec![64, 32]),
            (TopInput::Bottom, vec![8]),
            (TopInput::Vectors, vec![]),
        ] {
            let embeddings = EmbeddingConfig {
                embedding_dim: 16,
                inner_dim: None,
                compression: 0.25,
                hash: Hash::default_for(16),
            };
            let config = ModelConfig {
                input,
                top,
                ..embeddings.into()
            };
            let vb = seeded(&VarMap::new(), 1, &Device::Cpu);
            let model = Dlrm::new(&catalog.schema(), &config, vb)?;
            let candidates = Candidates::new(&model, &catalog)?;
            for (user, movies) in [(3, 0..catalog.movies.ids.len()), (0, 7..20), (1, 5..5)] {
                let pairs: Vec<_> = movies.clone().map(|movie| (user, movie as u32)).collect();
                let expected = logits(&model, &catalog, &pairs)?;
                let found = candidates.logits(&model, &catalog, &Profile::Row(user), movies)?;
                assert_eq!(found.len(), expected.len());
                let near =
                    |(found, expected): (&f32, &f64)| (f64::from(*found) - expected).abs() < 1e-4;
                assert!(found.iter().zip(&expected).all(near));
            }
        }
        Ok(())
    }
}
