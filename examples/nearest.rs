//! How do I find the rows nearest to a vector? Train two towers over one hashed table, write the table out with `to_table`, and
//! answer all queries by one product of matrices.
//!
//! ```text
//! cargo run --release --example nearest
//! ```

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_hashed_embedding_bag::optim::AdamW;
use candle_hashed_embedding_bag::{
    hashed_embedding_bag_collection, HashedEmbeddingBagConfig, Mode,
};
use candle_nn::{Optimizer, VarBuilder, VarMap};

/// Movie `m` is of genre `m % GENRES`, which the model is not told.
const GENRES: usize = 20;
const MOVIES: usize = 4000;
const EMBEDDING_DIM: usize = 32;
const HISTORY: usize = 10;
const BATCH: usize = 256;
const STEPS: usize = 200;

fn main() -> Result<()> {
    let device = Device::cuda_if_available(0)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let config = HashedEmbeddingBagConfig {
        mode: Mode::Mean,
        ..Default::default()
    };
    // A quarter of the values of the table. What a user watched and what they may watch next are movies of the same table.
    let collection =
        hashed_embedding_bag_collection([("movie", MOVIES)], EMBEDDING_DIM, 0.25, config, vb)?
            .with_features([("history", "movie"), ("next", "movie")])?;
    let user_tower = collection.select(["history"])?;
    let movie_tower = collection.select(["next"])?;

    // Each user is to be nearer to the movie that they watched next than to those of the other users of the batch.
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 0.01)?;
    let labels = Tensor::arange(0, BATCH as u32, &device)?;
    for step in 0..=STEPS {
        let (history, next) = watched(BATCH, &device)?;
        let users = user_tower.forward(&history.unsqueeze(1)?)?.squeeze(1)?;
        let movies = movie_tower.forward(&next.unsqueeze(1)?)?.squeeze(1)?;
        let scores = users.matmul(&movies.t()?)?;
        let loss = candle_nn::loss::cross_entropy(&scores, &labels)?;
        optimizer.backward_step(&loss)?;
        if step % 50 == 0 {
            println!("step {step}: loss {:.3}", loss.to_scalar::<f32>()?);
        }
    }

    // The index of a search engine would take these rows. A few thousand are compared at once.
    let table = collection.table("movie")?.to_table(..)?;
    let (history, _) = watched(100, &device)?;
    let users = user_tower.forward(&history.unsqueeze(1)?)?.squeeze(1)?;
    let scores = users.matmul(&table.t()?)?;
    let nearest = scores
        .to_device(&Device::Cpu)?
        .arg_sort_last_dim(false)?
        .narrow(1, 0, 10)?
        .to_vec2::<u32>()?;
    println!("{:?} scores of {:?} rows", scores.dims(), table.dims());

    let history = history.to_vec2::<u32>()?;
    println!("watched {:?}", history[0]);
    println!("nearest {:?}", nearest[0]);
    let genre = |movie: &u32| *movie as usize % GENRES;
    let of_genre = |(history, nearest): (&Vec<u32>, &Vec<u32>)| {
        let same = |movie: &&u32| genre(movie) == genre(&history[0]);
        nearest.iter().filter(same).count()
    };
    let found: usize = history.iter().zip(&nearest).map(of_genre).sum();
    println!("{found} of {} are of the genre that was watched", 100 * 10);
    ensure!(found > 900, "the towers learned too little");
    Ok(())
}

/// Ten movies that each user watched, `(users, HISTORY)`, and the next one, `(users,)`: all of one genre.
fn watched(users: usize, device: &Device) -> Result<(Tensor, Tensor)> {
    let below = |n: usize, len| Tensor::rand(0f32, n as f32, (users, len), &Device::Cpu)?.floor();
    let movies = (below(MOVIES / GENRES, HISTORY + 1)? * GENRES as f64)?
        .broadcast_add(&below(GENRES, 1)?)?
        .to_dtype(DType::U32)?
        .to_device(device)?;
    let next = movies.narrow(1, HISTORY, 1)?.flatten_all()?;
    Ok((movies.narrow(1, 0, HISTORY)?.contiguous()?, next))
}
