//! Quality against bytes: one model with embedding tables of several sizes, hashes, columns and bits, from several seeds.
//!
//! Every run is a line of `auc-vs-size.csv`, written as soon as it ends. Runs in the file are not repeated, so a sweep continues
//! where it was interrupted, and one more seed or hash only costs its own runs.
//!
//! Models that differ only in their bits are one training, whose tables are rounded afterwards.

mod jobs;
mod plan;
mod plot;
mod runs;

use std::fmt;

use anyhow::{Context, Result};
use candle_core::Device;
use candle_nn::VarMap;

use self::plan::{Plan, Training};
use self::runs::{Outcome, Runs};
use crate::data::{Data, Part};
use crate::evaluate::evaluate;
use crate::model::Dlrm;
use crate::options::{Sweep, TableBits};
use crate::{init, output, report, say, train};

/// The value of the column `hash` for tables that are not hashed.
const PLAIN: &str = "plain";

/// A size counts as kept if it is exceeded by no more than this factor.
const TOLERANCE: f64 = 1.001;

/// The measure by which models are compared: the AUC or, if all labels of the test part are equal so that there is none, the
/// logloss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Measure {
    /// More is better.
    Auc,
    /// Less is better.
    Logloss,
}

/// The runs of one model.
pub struct Point {
    /// As on the command line, or `plain`.
    pub hash: String,
    /// Columns of the large tables, if they have matrices.
    pub inner_dim: Option<usize>,
    /// Bits per value.
    pub bits: u32,
    /// Parameters of the embedding tables.
    pub parameters: usize,
    /// Bytes of the embedding tables: weights, scales, shifts and matrices.
    pub bytes: usize,
    /// Which of the wanted sizes they keep: a share of the bytes of plain tables in f32.
    pub size: f64,
    /// What each seed reached on the test part.
    pub scores: Vec<f64>,
    /// The mean of what rounding took from that.
    pub loss: f64,
}

/// Trains the models that `options` ask for and `auc-vs-size.csv` does not hold yet, and prints and draws all results.
pub fn sweep(options: &Sweep) -> Result<()> {
    let data = options.load()?;
    let plan = Plan::new(options, &data);
    if let Some(only) = options.only {
        return jobs::child(&plan, only, &data, &options.device()?);
    }
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("cannot make {}", options.out.display()))?;
    let csv = options.out.join("auc-vs-size.csv");
    let svg = options.out.join("auc-vs-size.svg");
    output::ensure_writable(&csv)?;
    output::ensure_writable(&svg)?;
    let mut runs = Runs::open(&csv)?;
    for model in &plan.left_out {
        say!("left out: {model}");
    }
    let is_missing = |&i: &usize| {
        let training = &plan.trainings[i];
        let settings = training.settings.iter();
        settings.map(|(s, _)| s).any(|s| runs.find(s).is_none())
    };
    let missing: Vec<usize> = (0..plan.trainings.len()).filter(is_missing).collect();
    if options.jobs.get() == 1 {
        let device = options.device()?;
        for i in missing {
            let training = &plan.trainings[i];
            say!("{training}");
            let outcomes = run(&data, training, &device);
            runs.extend(training, outcomes.with_context(|| training.to_string())?)?;
        }
    } else {
        jobs::run_side_by_side(options.jobs.get(), &missing, |i, outcomes| {
            let training = &plan.trainings[i];
            runs.extend(training, outcomes.with_context(|| training.to_string())?)
        })?;
    }

    let (measure, points) = plan.points(&runs)?;
    plot::draw(&svg, &points, measure).with_context(|| format!("cannot draw {}", svg.display()))?;
    report::sweep(&points, measure);
    say!("\n{}\n{}", csv.display(), svg.display());
    Ok(())
}

/// Trains one model and scores it on the test part, in each of its bits.
fn run(data: &Data, training: &Training, device: &Device) -> Result<Vec<Outcome>> {
    let (examples, vars) = (data.examples(), VarMap::new());
    let settings = training.fit;
    let vb = init::seeded(&vars, settings.seed, device);
    let model = Dlrm::for_examples(examples, &training.config.into(), vb)?;
    let best = train::train(&model, &vars, examples, settings)?;
    best.ensure_converged()?;
    let exact = evaluate(&model, examples, Part::Test)?;
    let outcome = |bits| {
        let (model, test) = match bits {
            TableBits::Exact => (model.clone(), exact),
            TableBits::Rounded(bits) => {
                let (model, _) = model.to_bits(bits)?;
                let test = evaluate(&model, examples, Part::Test)?;
                (model, test)
            }
        };
        Ok(Outcome {
            parameters: model.embeddings().parameters().0,
            bytes: model.embeddings().bytes(),
            valid_auc: best.valid.auc,
            exact_auc: exact.auc,
            exact_logloss: exact.logloss,
            test_auc: test.auc,
            test_logloss: test.logloss,
            seconds: best.seconds,
        })
    };
    training.settings.iter().map(|&(_, b)| outcome(b)).collect()
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

    /// How much worse the tables are for being rounded.
    fn loss(self, outcome: &Outcome) -> f64 {
        match (self, outcome.exact_auc, outcome.test_auc) {
            (Self::Auc, Some(exact), Some(test)) => exact - test,
            _ => outcome.test_logloss - outcome.exact_logloss,
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
