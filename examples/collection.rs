//! How do I look up many tables at once? With a collection: one parameter for all tables, one op for all lookups.
//!
//! ```text
//! cargo run --release --example collection
//! ```

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_hashed_embedding_bag::optim::AdamW;
use candle_hashed_embedding_bag::{
    hashed_embedding_bag_collection, HashedEmbeddingBagConfig, JaggedLayout, Mode,
};
use candle_nn::{Optimizer, VarBuilder, VarMap};

const EMBEDDING_DIM: usize = 32;

fn main() -> Result<()> {
    let device = Device::cuda_if_available(0)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let tables = [("user", 1_000_000), ("movie", 60_000), ("genre", 20)];
    let config = HashedEmbeddingBagConfig {
        mode: Mode::Mean,
        ..Default::default()
    };
    // A 64th of the values of the three tables.
    let compression = 1.0 / 64.0;
    let collection =
        hashed_embedding_bag_collection(tables, EMBEDDING_DIM, compression, config, vb)?;
    let rows: usize = collection.tables().map(|(_, rows)| rows).sum();
    println!(
        "{} tables of {rows} rows of {EMBEDDING_DIM} columns in {} values",
        tables.len(),
        collection.hashed_weight().elem_count()
    );

    // One row of each table per sample: (batch, tables). Row 3 of `user` is not row 3 of `movie`: each table counts from 0.
    let ids = Tensor::new(&[[7u32, 59_999, 3], [999_999, 0, 19]], &device)?;
    let pooled = collection.forward(&ids)?;
    println!("single rows {:?} -> {:?}", ids.dims(), pooled.dims());

    // Bags of different lengths, laid out as in TorchRec's KeyedJaggedTensor: all values one after the other, and the start of
    // each bag, table by table. Here users 7 and 999,999; movies 59,999 and 0; genres 3 and 4 of the first sample, 19 of the
    // second.
    let values = Tensor::new(&[7u32, 999_999, 59_999, 0, 3, 4, 19], &device)?;
    let offsets = Tensor::new(&[0u32, 1, 2, 3, 4, 6], &device)?;
    let lookup = || collection.forward_jagged(&values, &offsets, JaggedLayout::FeatureMajor);
    let pooled = lookup()?;
    println!("jagged bags of {} rows -> {:?}", 7, pooled.dims());

    // A training step: there is one gradient, as small as the one parameter.
    let loss = |pooled: &Tensor| (pooled - 1.0)?.sqr()?.mean_all();
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 0.01)?;
    let before = loss(&pooled)?;
    optimizer.backward_step(&before)?;
    let (before, after) = (
        before.to_scalar::<f32>()?,
        loss(&lookup()?)?.to_scalar::<f32>()?,
    );
    println!("loss {before:.4} -> {after:.4}");

    // Every row is checked against its own table.
    let outside = Tensor::new(&[[7u32, 60_000, 3]], &device)?;
    let Err(error) = collection.forward(&outside) else {
        anyhow::bail!("movie 60,000 does not exist");
    };
    println!("{error}");

    // A table of a collection is a layer on the same parameter.
    let genre = collection.table("genre")?;
    let bag = Tensor::new(&[[3u32, 4]], &device)?;
    let alone = genre.forward(&bag)?.squeeze(0)?;
    let together = lookup()?.get(0)?.get(2)?;
    ensure!(alone.to_vec1::<f32>()? == together.to_vec1::<f32>()?);
    println!("table `genre` alone gives the same vector");
    Ok(())
}
