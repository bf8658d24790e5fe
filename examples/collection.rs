//! How do I look up many features at once? With a collection: one parameter for all tables, one op for all lookups.
//!
//! ```text
//! cargo run --release --example collection
//! ```

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_hashed_embedding_bag::optim::AdamW;
use candle_hashed_embedding_bag::{
    hashed_embedding_bag_collection, BoundsCheck, HashedEmbeddingBagConfig, JaggedTensor,
    KeyedJaggedTensor, Mode,
};
use candle_nn::{Optimizer, VarBuilder, VarMap};

const EMBEDDING_DIM: usize = 32;

fn main() -> Result<()> {
    let device = Device::cuda_if_available(0)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let tables = [("user", 1_000_000), ("movie", 60_000)];
    let config = HashedEmbeddingBagConfig {
        mode: Mode::Mean,
        ..Default::default()
    };
    // A 64th of the values of the two tables. What a user watched and what they may watch next are movies of the same table.
    let compression = 1.0 / 64.0;
    let collection =
        hashed_embedding_bag_collection(tables, EMBEDDING_DIM, compression, config, vb)?
            .with_features([("user", "user"), ("history", "movie"), ("next", "movie")])?;
    let rows: usize = collection.tables().map(|(_, rows)| rows).sum();
    println!(
        "{} tables of {rows} rows of {EMBEDDING_DIM} columns in {} values",
        tables.len(),
        collection.hashed_weight().elem_count()
    );

    // One row per feature and sample: (batch, features). Row 7 of `user` is not row 7 of `movie`: each table counts from 0.
    let ids = Tensor::new(&[[7u32, 59_999, 3], [999_999, 0, 7]], &device)?;
    let pooled = collection.forward(&ids)?;
    println!("single rows {:?} -> {:?}", ids.dims(), pooled.dims());

    // Bags of different lengths, feature by feature: the indices, one bag after the other, and the length of each bag. The first
    // user has watched two movies, the second none.
    let bags = |indices: &[u32], lengths: &[u32]| -> Result<JaggedTensor> {
        let (indices, lengths) = (
            Tensor::new(indices, &device)?,
            Tensor::new(lengths, &device)?,
        );
        Ok(JaggedTensor::from_lengths(indices, lengths))
    };
    let features = [
        ("user", bags(&[7, 999_999], &[1, 1])?),
        ("history", bags(&[59_999, 0], &[2, 0])?),
        ("next", bags(&[3, 7], &[1, 1])?),
    ];
    let batch = KeyedJaggedTensor::new(features, BoundsCheck::Error)?;
    let pooled = collection.forward_keyed(&batch)?;
    println!(
        "jagged bags {:?} -> {:?}",
        batch.indices().dims(),
        pooled.dims()
    );

    // A training step: there is one gradient, as small as the one parameter.
    let loss = |pooled: &Tensor| (pooled - 1.0)?.sqr()?.mean_all();
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 0.01)?;
    let before = loss(&pooled)?;
    optimizer.backward_step(&before)?;
    let pooled = collection.forward_keyed(&batch)?;
    let (before, after) = (
        before.to_scalar::<f32>()?,
        loss(&pooled)?.to_scalar::<f32>()?,
    );
    println!("loss {before:.4} -> {after:.4}");

    // Every row is checked against the table of its feature.
    let outside = Tensor::new(&[[7u32, 60_000, 3]], &device)?;
    let Err(error) = collection.forward(&outside) else {
        anyhow::bail!("movie 60,000 does not exist");
    };
    println!("{error}");

    // One tower of a model of two takes some of the features, over the same parameter.
    let tower = collection.select(["next"])?;
    let next = Tensor::new(&[[3u32], [7]], &device)?;
    let alone = tower.forward(&next)?.flatten_all()?;
    let together = pooled.narrow(1, 2, 1)?.flatten_all()?;
    ensure!(alone.to_vec1::<f32>()? == together.to_vec1::<f32>()?);
    println!("feature `next` alone gives the same vectors");
    Ok(())
}
