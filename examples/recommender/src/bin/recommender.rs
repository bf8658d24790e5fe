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
//! torchrun --no-python --nproc-per-node 2 recommender train --data train.txt --format criteo --device cuda     on two GPUs
//! ```

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_hashed_embedding_bag::distributed::World;
use candle_hashed_embedding_bag::optim::named_variables;
use candle_nn::VarMap;
use clap::Parser;

use recommender::about::{About, Reached};
use recommender::allocator::{keep_memory, keep_memory_of, Allocator};
use recommender::baselines::compare;
use recommender::data::{write_generated, Data, Part};
use recommender::model::Dlrm;
use recommender::options::{self, Command, Format, Options, TableBits};
use recommender::output;
use recommender::ranking::Lists;
use recommender::rare::TrainCounts;
use recommender::recommend::recommend;
use recommender::report::{self, Summary};
use recommender::saved::{self, ClickModel, Recommender};
use recommender::score::{score, Scored};
use recommender::sweep::sweep;
use recommender::{init, say, threads, train};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator {};

fn main() -> Result<()> {
    keep_memory();
    let options = Options::parse();
    threads::limit(options.threads);
    let command = options.command();
    let world = World::from_env()?.unwrap_or_else(World::single);
    ensure!(
        world.size <= 1 || matches!(command, Command::Train(_)),
        "only `train` runs on several ranks, and WORLD_SIZE is {}",
        world.size
    );
    match command {
        Command::Train(options) => train_and_save(&options, &world),
        Command::Evaluate(options) => evaluate_saved(&options),
        Command::Score(options) => score_file(&options),
        Command::Recommend(options) => print_recommendations(&options),
        Command::Sweep(options) => sweep(&options),
        Command::Generate(options) => generate(&options),
        Command::Prepare(options) => prepare(&options),
    }?;
    output::finish()
}

fn train_and_save(options: &options::Train, world: &World) -> Result<()> {
    let start = Instant::now();
    let (path, device) = (options.common.checkpoint(), options.device(world)?);
    keep_memory_of(&device)?;
    let ranks = options.connect(world, &device)?;
    if ranks.is_first() {
        output::ensure_replaceable(&path)?;
    } else {
        output::silence();
    }
    let data = options.load()?;
    let examples = data.examples();
    let counts = TrainCounts::of(examples)?;
    let vars = VarMap::new();
    let model = Dlrm::for_examples(
        examples,
        &options.model_config(),
        init::seeded(&vars, options.seed, &device),
    )?;
    if let Some(path) = options.warm_start() {
        saved::warm_start(path, &model, &vars)?;
    }
    let model = model
        .sharing_rare_rows(&counts.rows, options.min_count())
        .with_precision(options.precision())?;
    // Ranks average tensors.
    let model = match options.table_optimizer.is_sparse() && ranks.count() == 1 {
        true => model.with_sparse_gradients()?,
        false => model,
    };
    report::introduction(&data, &model);

    let settings = options.settings_on(&ranks, &data);
    let saving = options.saving(&path, &data, &settings, &ranks);
    if saving.every.is_some() && ranks.is_first() {
        output::ensure_replaceable(&saving.path)?;
    }
    ranks.ensure_same(&saving.facts_of_ranks(), &named_variables(&vars)?)?;
    let best = train::train_on(&ranks, &saving, &model, &vars, examples, settings)?;
    let test = ranks.evaluate(&model, examples, Part::Test)?;
    let mut summary = Summary::default()
        .fact("best epoch", best.epoch.to_string())
        .metrics("valid", best.valid)
        .metrics("test", test);
    let (mut kept, mut kept_test) = (model.clone(), test);
    if let TableBits::Rounded(bits) = options.bits() {
        let (rounded, errors) = model.to_bits(bits)?;
        kept_test = ranks.evaluate(&rounded, examples, Part::Test)?;
        kept = rounded;
        let errors: Vec<_> = errors
            .iter()
            .map(|(name, error)| format!("{name} {error:.4}"))
            .collect();
        summary = summary
            .metrics(&format!("test, {} bits", u32::from(bits)), kept_test)
            .fact("relative error of rounding", errors.join(", "));
    }
    let ranking = match &data {
        Data::Ratings(ratings) => {
            let lists = Lists::new(ratings, Part::Test);
            lists.of_model(&kept, ratings)?
        }
        Data::Clicks(_) => None,
    };
    let reached = Reached {
        best_epoch: best.epoch,
        valid: best.valid,
        test: kept_test,
        test_ranking: ranking,
    };
    let hyper_parameters = options.hyper_parameters(&settings);
    let about = About::new(&data, &counts, hyper_parameters, reached)?;
    if ranks.is_first() {
        saved::save(&path, &kept, &vars, &data, &about)?;
        saving.remove()?;
        let summary = summary
            .ranking(ranking)
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
            .fact("speed", report::rate(best.rate));
        report::all_reduce(summary, &ranks).print();
    }
    ranks.leave()?;
    best.ensure_converged()
}

fn evaluate_saved(options: &options::Evaluate) -> Result<()> {
    let (common, reading) = (&options.common, &options.reading);
    let (path, device) = (common.checkpoint(), common.device()?);
    let chosen = options.part.map(Part::from);
    // Of other data, there is no part that the model has seen.
    let part = |is_trained_on| match (chosen, is_trained_on) {
        (Some(part), _) => part,
        (None, true) => Part::Test,
        (None, false) => Part::All,
    };
    let (model, about, data, part, lists) = match reading.format {
        Format::Movielens | Format::Interactions => {
            let recommender = Recommender::open(&path, &device)?;
            let tried = recommender.ratings(common.data.clone())?;
            let part = part(tried.is_trained_on);
            if tried.left_out > 0 {
                let left_out = tried.left_out;
                say!("{left_out} ratings are left out: the model does not know their users or movies");
            }
            let lists = if tried.is_trained_on {
                Lists::new(&tried.data, part)
            } else {
                Lists::of_others(&tried.data, part, &recommender)?
            };
            let data = Data::Ratings(tried.data);
            (
                recommender.model,
                recommender.about,
                data,
                part,
                Some(lists),
            )
        }
        Format::Criteo => {
            let clicks = ClickModel::open(&path, &device)?;
            let log = common.data.as_deref().context("--format needs --data")?;
            let tried = clicks.clicks(log, reading.skip_malformed)?;
            let part = part(tried.is_trained_on);
            (
                clicks.model,
                clicks.about,
                Data::Clicks(tried.data),
                part,
                None,
            )
        }
    };
    let train_rate = about.map(|about| about.data.train_rate);
    let lines = compare(&model, &data, part, train_rate, lists.as_ref())?;
    report::comparison(part.name(), &lines);
    Summary::default()
        .best_reachable(data.truth().filter(|_| part == Part::Test))
        .parameters(&model)
        .print();
    Ok(())
}

fn score_file(options: &options::Score) -> Result<()> {
    let start = Instant::now();
    let path = match options.file.to_str() {
        Some("-") => Path::new("/dev/stdin"),
        _ => &options.file,
    };
    let (checkpoint, device) = (options.checkpoint(), options.device()?);
    let write = |out: &mut dyn Write| -> Result<Scored> {
        let mut out = BufWriter::with_capacity(1 << 16, out);
        let scored = score(&checkpoint, &device, path, options.skip_malformed, &mut out)?;
        out.flush().context("cannot write the probabilities")?;
        Ok(scored)
    };
    let scored = match &options.out {
        Some(out) => {
            let file = File::create(out);
            write(&mut file.with_context(|| format!("cannot write {}", out.display()))?)
        }
        None => write(&mut io::stdout().lock()),
    };
    let scored = match scored {
        Err(error) if output::is_closed(&error) => return Ok(()),
        scored => scored?,
    };
    // Not where the probabilities go.
    let rate = scored.lines as f64 / start.elapsed().as_secs_f64();
    eprintln!(
        "{} lines, {}; {} malformed, {} by popularity alone",
        scored.lines,
        report::rate(rate),
        scored.malformed,
        scored.unknown
    );
    Ok(())
}

fn print_recommendations(options: &options::Recommend) -> Result<()> {
    let recommender = Recommender::open(&options.common.checkpoint(), &options.common.device()?)?;
    let users = &recommender.catalog.users;
    let user = users.row(options.user);
    if user.is_none() {
        let unknown = users.unknown("user", options.user);
        say!("{unknown}; this is what most people like.");
    }
    let movies = recommend(&recommender, user, options.count.get())?;
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
