//! Quality against size: one model trained at several compressions, with several hashes and seeds.
//!
//! Every run is a line of `auc-vs-size.csv`, written as soon as it ends. Runs in the file are not repeated, so a sweep continues
//! where it was interrupted, and one more seed or hash only costs its own runs.

mod plot;
mod runs;

use std::fmt;

use anyhow::{Context, Result};
use candle_core::Device;
use candle_nn::VarMap;

use self::runs::{Fingerprint, Outcome, Runs, Setting};
use crate::data::{Data, Part};
use crate::embeddings::EmbeddingConfig;
use crate::evaluate::evaluate;
use crate::model::Dlrm;
use crate::options::{HashChoice, Sweep};
use crate::train::Settings;
use crate::{init, output, report, say, train};

/// The value of the column `hash` for tables that are not hashed.
const PLAIN: &str = "plain";

/// The hash that others are compared with, if it takes part.
const BASELINE: HashChoice = HashChoice::Original;

/// The measure by which models are compared: the AUC or, if all labels of the test part are equal so that there is none, the
/// logloss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Measure {
    /// More is better.
    Auc,
    /// Less is better.
    Logloss,
}

/// The runs of one compression and hash.
pub struct Point {
    /// As on the command line.
    pub hash: String,
    /// Parameters per value of the tables.
    pub compression: f64,
    /// Parameters of the embedding tables.
    pub parameters: usize,
    /// What each seed reached on the test part.
    pub scores: Vec<f64>,
}

/// Trains the models that `options` ask for and `auc-vs-size.csv` does not hold yet, and prints and draws all results.
pub fn sweep(options: &Sweep) -> Result<()> {
    let (plan, device) = (plan(options), options.device()?);
    let data = options.load()?;
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("cannot make {}", options.out.display()))?;
    let csv = options.out.join("auc-vs-size.csv");
    let svg = options.out.join("auc-vs-size.svg");
    output::ensure_writable(&csv)?;
    output::ensure_writable(&svg)?;
    let mut runs = Runs::open(&csv)?;
    let fingerprint = data.fingerprint();
    let rows = data.examples().schema().tables.iter().map(|t| t.1).sum();
    let mut outcomes = Vec::new();
    for (hash, config) in plan {
        let compression = config.compression;
        let mut of_point = Vec::new();
        for seed in 1..=options.seeds.get() {
            let settings = options.settings(&data, compression, seed);
            let setting = Setting {
                data: options.data(),
                fingerprint: Fingerprint(fingerprint),
                rows,
                hash: hash.clone(),
                compression,
                seed,
                embedding_dim: config.embedding_dim,
                epochs: settings.epochs,
                batch_size: settings.batch_size,
                lr: settings.lr,
            };
            of_point.push(match runs.find(&setting) {
                Some(outcome) => outcome,
                None => {
                    say!("{setting}");
                    let outcome = run(&data, config, settings, &device);
                    let outcome = outcome.with_context(|| setting.to_string())?;
                    runs.push(setting, outcome)?;
                    outcome
                }
            });
        }
        outcomes.push((hash, compression, of_point));
    }
    let measure = Measure::of(outcomes.iter().flat_map(|(_, _, outcomes)| outcomes));
    let points: Vec<_> = outcomes
        .into_iter()
        .map(|(hash, compression, outcomes)| Point {
            hash,
            compression,
            parameters: outcomes[0].parameters,
            scores: outcomes.iter().map(|run| measure.score(run)).collect(),
        })
        .collect();
    plot::draw(&svg, &points, measure).with_context(|| format!("cannot draw {}", svg.display()))?;
    report::sweep(&points, measure, &BASELINE.to_string());
    say!("\n{}\n{}", csv.display(), svg.display());
    Ok(())
}

/// The models to train: the names of their hashes, and their embeddings.
fn plan(options: &Sweep) -> Vec<(String, EmbeddingConfig)> {
    // If nothing is hashed, the hash does not matter.
    let plain = options.embedding_config(1.0, BASELINE);
    let mut plan = vec![(PLAIN.to_owned(), plain)];
    for &compression in options.compressions.iter().filter(|&&c| c < 1.0) {
        for &hash in &options.hashes {
            let config = options.embedding_config(compression, hash);
            plan.push((hash.to_string(), config));
        }
    }
    plan
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
    let model = Dlrm::new(&examples.schema(), &config.into(), vb)?;
    let best = train::train(&model, &vars, examples, settings)?;
    best.ensure_converged()?;
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

impl Measure {
    fn of<'a>(mut outcomes: impl Iterator<Item = &'a Outcome>) -> Self {
        match outcomes.all(|outcome| outcome.test_auc.is_some()) {
            true => Self::Auc,
            false => Self::Logloss,
        }
    }

    fn score(self, outcome: &Outcome) -> f64 {
        match (self, outcome.test_auc) {
            (Self::Auc, Some(auc)) => auc,
            _ => outcome.test_logloss,
        }
    }

    /// Whether a score is better than one that is lower by `difference`.
    pub fn is_better(self, difference: f64) -> bool {
        match self {
            Self::Auc => difference > 0.0,
            Self::Logloss => difference < 0.0,
        }
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Auc => "test AUC",
            Self::Logloss => "test logloss",
        })
    }
}

impl Point {
    /// The mean over the seeds.
    pub fn mean(&self) -> f64 {
        self.scores.iter().sum::<f64>() / self.scores.len() as f64
    }

    /// The lowest score of a seed, and the highest.
    pub fn range(&self) -> (f64, f64) {
        range(self.scores.iter().copied())
    }

    /// Whether the tables are hashed at all.
    pub fn is_hashed(&self) -> bool {
        self.hash != PLAIN
    }
}

/// The least and the greatest of some values.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    })
}
