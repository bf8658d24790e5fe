//! A recommender whose embedding tables are hashed.
//!
//! ```text
//! cargo run --release --example recommender                            train on generated ratings, evaluate
//! cargo run --release --example recommender -- recommend --user 42     ask the trained model
//! cargo run --release --example recommender -- --data ml-1m            the same on a MovieLens set
//! cargo run --release --example recommender -- recommend --user 42 --data ml-1m
//! ```
//!
//! | module | |
//! |---|---|
//! | [`options`] | the command line |
//! | [`data`] | ratings, from MovieLens files or from a generator, as dense rows and bags of features |
//! | [`model`] | the DLRM: hashed embedding bags, dots, MLP |
//! | [`tables`] | how the parameters are shared out among the embedding tables |
//! | [`init`] | initial values that depend on the seed alone |
//! | [`train`] | AdamW, best epoch |
//! | [`evaluate`] | AUC and logloss |
//! | [`saved`] | one checkpoint file with all that a trained recommender needs |
//! | [`recommend`] | the best unseen movies |
//! | [`report`] | what is printed |

mod data;
mod evaluate;
mod init;
mod model;
mod options;
mod recommend;
mod report;
mod saved;
mod tables;
mod train;

use std::time::Instant;

use anyhow::{ensure, Result};
use candle_nn::VarMap;
use clap::Parser;

use crate::data::Part;
use crate::evaluate::evaluate;
use crate::model::Dlrm;
use crate::options::{Command, Options};
use crate::report::Summary;
use crate::saved::Recommender;

fn main() -> Result<()> {
    match Options::parse().command() {
        Command::Train(options) => train(&options),
        Command::Evaluate(options) => evaluate_saved(&options),
        Command::Recommend(options) => recommend(&options),
    }
}

fn train(options: &options::Train) -> Result<()> {
    let start = Instant::now();
    let device = options.common.device()?;
    let source = options.source();
    let data = source.load()?;
    let vars = VarMap::new();
    let model = Dlrm::new(
        &data.catalog,
        &options.tables()?,
        init::seeded(&vars, options.seed, &device),
    )?;
    report::introduction(&source, &data, &model);

    let best = train::train(&model, &vars, &data, options, &device)?;
    let test = evaluate(&model, &data.catalog, &data.part(Part::Test), &device)?;
    let path = options.common.checkpoint();
    saved::save(&path, &model, &vars, &data.catalog, &source)?;
    Summary::new()
        .fact("best epoch", best.epoch.to_string())
        .metrics("valid", best.valid)
        .metrics("test", test)
        .best_reachable(&data)
        .parameters(&model)
        .checkpoint(&path)?
        .fact(
            "seconds",
            format!(
                "{:.1} training, {:.1} in all",
                best.seconds,
                start.elapsed().as_secs_f64()
            ),
        )
        .print();
    Ok(())
}

fn evaluate_saved(options: &options::Common) -> Result<()> {
    let device = options.device()?;
    let recommender = Recommender::open(&options.checkpoint(), &device)?;
    let data = recommender.source(options.data.clone())?.load()?;
    // The split goes by position: in other ratings, the test part would hold examples of the training.
    ensure!(
        data.catalog == recommender.catalog,
        "these are not the ratings that the checkpoint was trained on"
    );
    let test = evaluate(
        &recommender.model,
        &data.catalog,
        &data.part(Part::Test),
        &device,
    )?;
    Summary::new()
        .metrics("test", test)
        .best_reachable(&data)
        .parameters(&recommender.model)
        .print();
    Ok(())
}

fn recommend(options: &options::Recommend) -> Result<()> {
    let device = options.common.device()?;
    let recommender = Recommender::open(&options.common.checkpoint(), &device)?;
    let user = recommend::user_row(&recommender, options.user)?;
    let movies = recommend::recommend(&recommender, user, 10, &device)?;
    let titles = recommender.source(options.common.data.clone())?.titles()?;
    report::recommendations(&recommender.catalog, user, &titles, &movies);
    Ok(())
}
