//! A recommender whose embedding tables are hashed.
//!
//! ```text
//! cargo run --release --example recommender                            train on generated ratings, evaluate
//! cargo run --release --example recommender -- recommend --user 42     ask the trained model
//! cargo run --release --example recommender -- --data ml-1m            the same on a MovieLens set
//! cargo run --release --example recommender -- recommend --user 42 --data ml-1m
//! cargo run --release --example recommender -- --data train.txt --format criteo     a click log
//! cargo run --release --example recommender -- sweep --data ml-1m      quality against size
//! ```
//!
//! | module | |
//! |---|---|
//! | [`options`] | the command line |
//! | [`data`] | examples: ratings of MovieLens or of a generator, or a log of clicks, as batches of bags of rows |
//! | [`model`] | the DLRM: embeddings, dots, MLPs |
//! | [`embeddings`] | the embedding tables in two collections, and how the parameters are shared out among them |
//! | [`init`] | initial values that depend on the seed alone |
//! | [`train`] | AdamW, best epoch |
//! | [`evaluate`] | AUC and logloss |
//! | [`saved`] | one checkpoint file with all that a trained model needs |
//! | [`recommend`] | the best unseen movies |
//! | [`sweep`] | many trainings: AUC against size, as a table, a .csv and an .svg |
//! | [`report`] | what is printed |

mod data;
mod embeddings;
mod evaluate;
mod init;
mod model;
mod options;
mod recommend;
mod report;
mod saved;
mod sweep;
mod train;

use std::time::Instant;

use anyhow::{Context, Result};
use candle_nn::VarMap;
use clap::Parser;

use crate::data::{write_generated, Data, Part};
use crate::evaluate::evaluate;
use crate::model::Dlrm;
use crate::options::{Command, Format, Options};
use crate::report::Summary;
use crate::saved::{ClickModel, Recommender};

fn main() -> Result<()> {
    match Options::parse().command() {
        Command::Train(options) => train(&options),
        Command::Evaluate(options) => evaluate_saved(&options),
        Command::Recommend(options) => recommend(&options),
        Command::Sweep(options) => sweep::sweep(&options),
        Command::Generate(options) => generate(&options),
    }
}

fn train(options: &options::Train) -> Result<()> {
    let start = Instant::now();
    let device = options.common.device()?;
    let data = options.load()?;
    let examples = data.examples();
    let vars = VarMap::new();
    let model = Dlrm::new(
        &examples.schema(),
        options.embedding_config()?,
        init::seeded(&vars, options.seed, &device),
    )?;
    report::introduction(&data, &model);

    let best = train::train(&model, &vars, examples, options.settings(&data))?;
    let test = evaluate(&model, examples, Part::Test)?;
    let path = options.common.checkpoint();
    saved::save(&path, &model, &vars, &data)?;
    Summary::new()
        .fact("best epoch", best.epoch.to_string())
        .metrics("valid", best.valid)
        .metrics("test", test)
        .best_reachable(data.truth())
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

fn evaluate_saved(options: &options::Evaluate) -> Result<()> {
    let (common, reading) = (&options.common, &options.reading);
    let (path, device) = (common.checkpoint(), common.device()?);
    let (model, data) = match reading.format {
        Format::Movielens => {
            let recommender = Recommender::open(&path, &device)?;
            let ratings = recommender.ratings(common.data.clone())?;
            (recommender.model, Data::Ratings(ratings))
        }
        Format::Criteo => {
            let clicks = ClickModel::open(&path, &device)?;
            let log = common.data.as_deref().context("--format needs --data")?;
            let log = clicks.clicks(log, reading.skip_malformed)?;
            (clicks.model, Data::Clicks(log))
        }
    };
    Summary::new()
        .metrics("test", evaluate(&model, data.examples(), Part::Test)?)
        .best_reachable(data.truth())
        .parameters(&model)
        .print();
    Ok(())
}

fn recommend(options: &options::Recommend) -> Result<()> {
    let recommender = Recommender::open(&options.common.checkpoint(), &options.common.device()?)?;
    let user = recommend::user_row(&recommender, options.user)?;
    let movies = recommend::recommend(&recommender, user, 10)?;
    let titles = recommender.source(options.common.data.clone())?.titles()?;
    report::recommendations(&recommender.catalog, user, &titles, &movies);
    Ok(())
}

fn generate(options: &options::Generate) -> Result<()> {
    let truth = write_generated(&options.file, options.lines, options.seed)?;
    Summary::new()
        .fact("written", options.file.display().to_string())
        .best_reachable(Some(truth))
        .print();
    Ok(())
}
