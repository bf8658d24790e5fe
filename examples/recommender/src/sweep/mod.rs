//! Quality against size: one model trained at several compressions, with several hashes and seeds.
//!
//! Every run is a line of `auc-vs-size.csv`, written as soon as it ends. Runs that are there are not repeated, so a sweep
//! goes on where it was interrupted, and one more seed or hash costs its own runs only.

mod plot;
mod runs;

use anyhow::{Context, Result};
use candle_core::Device;
use candle_nn::VarMap;

use self::runs::{Outcome, Runs, Setting};
use crate::data::{Data, Part};
use crate::embeddings::EmbeddingConfig;
use crate::evaluate::evaluate;
use crate::model::Dlrm;
use crate::options::{HashChoice, Sweep};
use crate::train::Settings;
use crate::{init, report, train};

/// What the column `hash` says of tables that are not hashed.
const PLAIN: &str = "plain";

/// The hash that others are compared with, if it takes part.
const BASELINE: HashChoice = HashChoice::Original;

/// The runs of one compression and hash.
pub struct Point {
    /// As on the command line.
    pub hash: String,
    /// Parameters per value of the tables.
    pub compression: f64,
    /// Parameters of the embedding tables.
    pub parameters: usize,
    /// One test AUC per seed.
    pub aucs: Vec<f64>,
}

/// Trains what `options` ask for and `auc-vs-size.csv` does not hold yet, and prints and draws all of it.
pub fn sweep(options: &Sweep) -> Result<()> {
    let (plan, device) = (plan(options)?, options.device()?);
    let data = options.load()?;
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("cannot make {}", options.out.display()))?;
    let csv = options.out.join("auc-vs-size.csv");
    let mut runs = Runs::open(&csv)?;
    let rows = data.examples().schema().tables.iter().map(|t| t.1).sum();
    let mut points = Vec::new();
    for (hash, config) in plan {
        let compression = config.compression;
        let mut outcomes = Vec::new();
        for seed in 1..=options.seeds.get() {
            let settings = options.settings(&data, compression, seed);
            let setting = Setting {
                data: options.data(),
                rows,
                hash: hash.clone(),
                compression,
                seed,
                embedding_dim: config.embedding_dim,
                epochs: settings.epochs,
                batch_size: settings.batch_size,
                lr: settings.lr,
            };
            outcomes.push(match runs.find(&setting) {
                Some(outcome) => outcome,
                None => {
                    println!("{setting}");
                    let outcome = run(&data, config, settings, &device)?;
                    runs.push(setting, outcome)?;
                    outcome
                }
            });
        }
        points.push(Point {
            hash,
            compression,
            parameters: outcomes[0].parameters,
            aucs: outcomes.iter().map(|outcome| outcome.test_auc).collect(),
        });
    }
    let svg = options.out.join("auc-vs-size.svg");
    plot::draw(&svg, &points).with_context(|| format!("cannot draw {}", svg.display()))?;
    report::sweep(&points, &BASELINE.to_string());
    println!("\n{}\n{}", csv.display(), svg.display());
    Ok(())
}

/// Which models to train: what their hash is called, and their embeddings.
fn plan(options: &Sweep) -> Result<Vec<(String, EmbeddingConfig)>> {
    // Where nothing is hashed, no hash matters.
    let plain = options.embedding_config(1.0, BASELINE)?;
    let mut plan = vec![(PLAIN.to_owned(), plain)];
    for &compression in options.compressions.iter().filter(|&&c| c < 1.0) {
        for &hash in &options.hashes {
            let config = options.embedding_config(compression, hash)?;
            plan.push((hash.to_string(), config));
        }
    }
    Ok(plan)
}

/// Trains one model and scores it on the test part.
fn run(
    data: &Data,
    config: EmbeddingConfig,
    settings: Settings,
    device: &Device,
) -> Result<Outcome> {
    let (examples, vars) = (data.examples(), VarMap::new());
    let vb = init::seeded(&vars, settings.seed, device);
    let model = Dlrm::new(&examples.schema(), config, vb)?;
    let best = train::train(&model, &vars, examples, settings)?;
    let test = evaluate(&model, examples, Part::Test)?;
    let (parameters, _) = model.embeddings().parameters();
    Ok(Outcome {
        parameters,
        valid_auc: best.valid.auc,
        test_auc: test.auc,
        test_logloss: test.logloss,
        seconds: best.seconds,
    })
}

impl Point {
    /// The mean over the seeds.
    pub fn mean(&self) -> f64 {
        self.aucs.iter().sum::<f64>() / self.aucs.len() as f64
    }

    /// Whether the tables are hashed at all.
    pub fn is_hashed(&self) -> bool {
        self.hash != PLAIN
    }
}
