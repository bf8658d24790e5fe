//! Should rows that are used alike share memory? Signatures from records, a layer that hashes them, beside one that does not.
//!
//! ```text
//! cargo run --release --example semantic
//! ```
//!
//! 20,000 films belong to 2,000 series of ten, which nobody told the model. Users watch most of one series. What the model has to
//! learn of a film is mostly what there is to learn of its series, so it helps if films of a series share their slots; at random
//! places they share them with films that have nothing to do with them.

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor};
use candle_hashed_embedding_bag::optim::Adagrad;
use candle_hashed_embedding_bag::semantic::Records;
use candle_hashed_embedding_bag::{
    checkpoint, hashed_embedding_bag, hashed_embedding_bag_with_row_tensor, Checkpoint, Hash,
    HashedEmbeddingBag, HashedEmbeddingBagConfig,
};
use candle_nn::{Optimizer, VarBuilder, VarMap};

const SERIES: usize = 2_000;
const FILMS: usize = 10 * SERIES;
const DIM: usize = 16;
/// The bytes of both layers, over those of a full table. Signatures take 8 more bytes per film: an eighth of its row in f32.
const COMPRESSION: f64 = 1.0 / 16.0;

/// A generator of numbers below `n`, good enough for an example.
fn draws() -> impl FnMut(usize) -> usize {
    let mut state = 1u64;
    move |n| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % n
    }
}

/// Trains `films` to give what is wanted of each film, and returns the mean squared error; 1 is that of a layer of zeros.
fn train(films: &HashedEmbeddingBag, vars: &VarMap, want: &Tensor) -> Result<f32> {
    let mut optimizer = Adagrad::new_lr(vars.all_vars(), 0.3)?;
    let all = Tensor::arange(0u32, FILMS as u32, &Device::Cpu)?.unsqueeze(1)?;
    let error = || Ok::<_, anyhow::Error>((films.forward(&all)? - want)?.sqr()?.mean_all()?);
    for _ in 0..60 {
        optimizer.backward_step(&error()?)?;
    }
    Ok(error()?.to_scalar()?)
}

fn main() -> Result<()> {
    let device = Device::Cpu;
    // What each user has watched: eight films of a series, or fewer, since some are watched twice. Rows are of one field, number 0.
    let mut draw = draws();
    let watched: Vec<Vec<(usize, usize)>> = (0..12 * SERIES)
        .map(|user| {
            let first = user % SERIES * 10;
            let skipped = [draw(10), draw(10)];
            let seen = (0..10).filter(|film| !skipped.contains(film));
            seen.map(|film| (0, first + film)).collect()
        })
        .collect();
    let records = Records::sample([FILMS], watched, 125_000, 0)?;
    println!(
        "films of a series: similarity {:.2}, of two series: {:.2}",
        records.similarity(0, 1)?,
        records.similarity(0, 10)?
    );
    let signatures = records.signatures(16)?;

    // A vector for each series, and a little of its own for each film.
    let of_series = Tensor::randn(0f32, 1., (SERIES, 1, DIM), &device)?;
    let of_film = Tensor::randn(0f32, 0.2, (SERIES, 10, DIM), &device)?;
    let want = of_series.broadcast_add(&of_film)?.reshape((FILMS, DIM))?;

    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let balanced = hashed_embedding_bag(FILMS, DIM, COMPRESSION, Default::default(), vb)?;
    println!("balanced: error {:.3}", train(&balanced, &vars, &want)?);

    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let config = HashedEmbeddingBagConfig {
        hash: Some(Hash::semantic(8)),
        ..Default::default()
    };
    let semantic = hashed_embedding_bag_with_row_tensor(
        FILMS,
        DIM,
        COMPRESSION,
        &signatures,
        config,
        vb.pp("films"),
    )?;
    println!("semantic: error {:.3}", train(&semantic, &vars, &want)?);

    // The checkpoint has the signatures too.
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("semantic.safetensors");
    checkpoint::save(&path, checkpoint::variables(&vars), [("films", &semantic)])?;
    let opened = Checkpoint::open(&path)?.hashed_embedding_bag("films", DType::F32, &device)?;
    let rows = |layer: &HashedEmbeddingBag| layer.to_table(..)?.to_vec2::<f32>();
    assert_eq!(rows(&opened)?, rows(&semantic)?);
    Ok(())
}
