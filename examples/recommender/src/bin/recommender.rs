//! Trains a recommender whose embedding tables are hashed, evaluates it, and recommends movies with it.
//!
//! ```text
//! cargo run --release -p recommender                            train on generated ratings, evaluate
//! cargo run --release -p recommender -- recommend --user 42     ask the trained model
//! cargo run --release -p recommender -- --data ml-1m            the same on a MovieLens set
//! cargo run --release -p recommender -- recommend --user 42 --data ml-1m
//! cargo run --release -p recommender -- --data train.txt --format criteo     a click log
//! cargo run --release -p recommender -- --data pairs.txt --format interactions
//! cargo run --release -p recommender -- sweep --data ml-1m      quality against size
//! ```

use std::time::Instant;

use anyhow::{Context, Result};
use candle_nn::VarMap;
use clap::Parser;

use recommender::allocator::{keep_memory, Allocator};
use recommender::data::{write_generated, Data, Part};
use recommender::evaluate::evaluate;
use recommender::model::Dlrm;
use recommender::options::{self, Command, Format, Options};
use recommender::output;
use recommender::recommend::{recommend, user_row};
use recommender::report::{self, Summary};
use recommender::saved::{self, ClickModel, Recommender};
use recommender::sweep::sweep;
use recommender::{init, train};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator {};

fn main() -> Result<()> {
    keep_memory();
    match Options::parse().command() {
        Command::Train(options) => train_and_save(&options),
        Command::Evaluate(options) => evaluate_saved(&options),
        Command::Recommend(options) => print_recommendations(&options),
        Command::Sweep(options) => sweep(&options),
        Command::Generate(options) => generate(&options),
        Command::Prepare(options) => prepare(&options),
    }?;
    output::finish()
}

fn train_and_save(options: &options::Train) -> Result<()> {
    let start = Instant::now();
    let (path, device) = (options.common.checkpoint(), options.common.device()?);
    output::ensure_replaceable(&path)?;
    let data = options.load()?;
    let examples = data.examples();
    let vars = VarMap::new();
    let model = Dlrm::new(
        &examples.schema(),
        &options.model_config(),
        init::seeded(&vars, options.seed, &device),
    )?;
    let model = model.with_precision(options.precision())?;
    report::introduction(&data, &model);

    let best = train::train(&model, &vars, examples, options.settings(&data))?;
    let test = evaluate(&model, examples, Part::Test)?;
    let mut summary = Summary::default()
        .fact("best epoch", best.epoch.to_string())
        .metrics("valid", best.valid)
        .metrics("test", test);
    if let Some(bits) = options.bits {
        let (rounded, errors) = model.to_bits(bits)?;
        let rounded_test = evaluate(&rounded, examples, Part::Test)?;
        saved::save(&path, &rounded, &vars, &data)?;
        let errors: Vec<_> = errors
            .iter()
            .map(|(name, error)| format!("{name} {error:.4}"))
            .collect();
        summary = summary
            .metrics(&format!("test, {} bits", u32::from(bits)), rounded_test)
            .fact("relative error of rounding", errors.join(", "));
    } else {
        saved::save(&path, &model, &vars, &data)?;
    }
    summary
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
        .fact("speed", report::rate(best.rate))
        .print();
    best.ensure_converged()
}

fn evaluate_saved(options: &options::Evaluate) -> Result<()> {
    let (common, reading) = (&options.common, &options.reading);
    let (path, device) = (common.checkpoint(), common.device()?);
    let (model, data) = match reading.format {
        Format::Movielens | Format::Interactions => {
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
    let test = evaluate(&model, data.examples(), Part::Test)?.ensure_finite()?;
    Summary::default()
        .metrics("test", test)
        .best_reachable(data.truth())
        .parameters(&model)
        .print();
    Ok(())
}

fn print_recommendations(options: &options::Recommend) -> Result<()> {
    let recommender = Recommender::open(&options.common.checkpoint(), &options.common.device()?)?;
    let user = user_row(&recommender, options.user)?;
    let movies = recommend(&recommender, user, 10)?;
    let titles = recommender.titles(options.common.data.clone())?;
    report::recommendations(&recommender.catalog, user, &titles, &movies);
    Ok(())
}

fn prepare(options: &options::Prepare) -> Result<()> {
    output::ensure_replaceable(&options.out)?;
    let start = Instant::now();
    let clicks = options.open()?;
    let read = start.elapsed().as_secs_f64();
    clicks.prepare(&options.out)?;
    let counts = clicks.counts();
    Summary::default()
        .fact("written", options.out.display().to_string())
        .fact("examples", counts.examples.to_string())
        .fact("malformed lines", counts.malformed.to_string())
        .fact(
            "seconds",
            format!(
                "{read:.1} to read, {:.1} in all",
                start.elapsed().as_secs_f64()
            ),
        )
        .print();
    Ok(())
}

fn generate(options: &options::Generate) -> Result<()> {
    let truth = write_generated(&options.file, options.lines.get(), options.seed)?;
    Summary::default()
        .fact("written", options.file.display().to_string())
        .best_reachable(Some(truth))
        .print();
    Ok(())
}
