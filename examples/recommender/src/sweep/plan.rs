//! What a sweep trains.

use std::fmt;

use anyhow::{ensure, Context, Result};

use super::runs::{Fingerprint, Outcome, Runs, Setting};
use super::{Measure, Point, PLAIN, TOLERANCE};
use crate::data::Data;
use crate::embeddings::EmbeddingConfig;
use crate::options::{HashChoice, Sweep, TableBits};
use crate::report::{columns_of, fraction};
use crate::train::Settings;

/// All trainings of a sweep.
pub struct Plan {
    pub trainings: Vec<Training>,
    pub embedding_dim: usize,
    /// Models for which there are too few bytes, and why.
    pub left_out: Vec<String>,
    /// The models, each trained from several seeds: its settings.
    models: Vec<Vec<Setting>>,
    /// Of plain tables in f32.
    plain_bytes: f64,
    /// Shares of that, the greatest first.
    sizes: Vec<f64>,
}

/// A training, and the runs that it yields: one for each number of bits.
pub struct Training {
    pub config: EmbeddingConfig,
    pub fit: Settings,
    pub settings: Vec<(Setting, TableBits)>,
}

impl Plan {
    /// What the options ask for.
    ///
    pub fn new(options: &Sweep, data: &Data) -> Self {
        let tables = data.examples().schema().tables;
        let rows: Vec<usize> = tables.iter().map(|&(_, rows)| rows).collect();
        let fingerprint = Fingerprint(data.fingerprint());
        let mut plan = Self {
            trainings: Vec::new(),
            embedding_dim: 0,
            left_out: Vec::new(),
            models: Vec::new(),
            plain_bytes: 0.0,
            sizes: options.sizes.clone(),
        };
        plan.sizes.push(1.0);
        plan.sizes.sort_by(|a, b| b.total_cmp(a));
        plan.sizes.dedup();
        let plain = options.embedding_config(HashChoice::Default, None);
        plan.embedding_dim = plain.embedding_dim;
        plan.plain_bytes = 4.0 * (plan.embedding_dim * rows.iter().sum::<usize>()) as f64;
        let mut wanted = vec![(1.0, HashChoice::Default, None, TableBits::Exact)];
        for &size in options.sizes.iter().filter(|&&size| size < 1.0) {
            for &hash in &options.hashes {
                for columns in options.inner_dims() {
                    let bits = options.bits.iter();
                    wanted.extend(bits.map(|&bits| (size, hash, columns, bits)));
                }
            }
        }
        for (size, hash, columns, bits) in wanted {
            let config = options.embedding_config(hash, columns);
            let fitting = config.within(size, bits, &rows).and_then(|config| {
                let is_hashed = config.is_hashed(&rows)?;
                Ok((config, is_hashed))
            });
            let (config, is_hashed) = match fitting {
                Ok(fitting) => fitting,
                Err(error) => {
                    let (size, bits) = (fraction(size), bits.number());
                    let columns = columns_of(columns);
                    let model = format!("size {size}, {hash}, {columns}, {bits} bits");
                    plan.left_out.push(format!("{model}: {error:#}"));
                    continue;
                }
            };
            let mut model = Vec::new();
            for seed in 1..=options.seeds.get() {
                let fit = options.settings(data, &config, seed);
                let setting = Setting {
                    data: options.data(),
                    fingerprint,
                    rows: rows.iter().sum(),
                    // If nothing is hashed, the hash does not matter.
                    hash: match is_hashed {
                        true => hash.to_string(),
                        false => PLAIN.to_owned(),
                    },
                    inner_dim: columns,
                    bits: bits.number(),
                    compression: config.compression,
                    seed,
                    embedding_dim: config.embedding_dim,
                    epochs: fit.epochs,
                    batch_size: fit.batch_size,
                    lr: fit.lr,
                };
                plan.add(config, fit, &setting, bits);
                model.push(setting);
            }
            if !plan.models.contains(&model) {
                plan.models.push(model);
            }
        }
        plan
    }

    /// Adds a run to the training of the same tables in other bits, or to a new one.
    fn add(&mut self, config: EmbeddingConfig, fit: Settings, setting: &Setting, bits: TableBits) {
        let same = self.trainings.iter_mut().find(|training| {
            let (other, _) = &training.settings[0];
            *setting
                == Setting {
                    bits: setting.bits,
                    ..other.clone()
                }
        });
        let training = match same {
            Some(training) => training,
            None => {
                self.trainings.push(Training {
                    config,
                    fit,
                    settings: Vec::new(),
                });
                let last = self.trainings.len() - 1;
                &mut self.trainings[last]
            }
        };
        if training.settings.iter().all(|(_, known)| *known != bits) {
            training.settings.push((setting.clone(), bits));
        }
    }

    /// What the runs of all models are together.
    ///
    /// # Errors
    /// A run that is missing.
    pub fn points(&self, runs: &Runs) -> Result<(Measure, Vec<Point>)> {
        let mut all = Vec::new();
        for model in &self.models {
            let outcomes = model.iter().map(|setting| {
                let outcome = runs.find(setting);
                outcome.with_context(|| format!("no run of {setting}"))
            });
            all.push(outcomes.collect::<Result<Vec<Outcome>>>()?);
        }
        let measure = Measure::of(all.iter().flatten());
        let mut points = Vec::new();
        for (model, outcomes) in self.models.iter().zip(&all) {
            let (setting, bytes) = (&model[0], outcomes[0].bytes);
            let share = bytes as f64 / self.plain_bytes;
            let size = self.sizes.iter().rfind(|&&size| share <= TOLERANCE * size);
            let losses: f64 = outcomes.iter().map(|outcome| measure.loss(outcome)).sum();
            points.push(Point {
                hash: setting.hash.clone(),
                inner_dim: setting.inner_dim,
                bits: setting.bits,
                parameters: outcomes[0].parameters,
                bytes,
                size: size.copied().unwrap_or(share),
                scores: outcomes.iter().map(|run| measure.score(run)).collect(),
                loss: losses / outcomes.len() as f64,
            });
        }
        let best_first = |a: &Point, b: &Point| {
            let by_score = a.mean().total_cmp(&b.mean());
            match measure {
                Measure::Auc => by_score.reverse(),
                Measure::Logloss => by_score,
            }
        };
        points.sort_by(|a, b| b.size.total_cmp(&a.size).then(best_first(a, b)));
        ensure!(!points.is_empty(), "nothing was trained");
        Ok((measure, points))
    }
}

impl fmt::Display for Training {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (setting, _) = &self.settings[0];
        write!(f, "{}, {}, ", setting.hash, columns_of(setting.inner_dim))?;
        let (compression, seed) = (setting.compression, setting.seed);
        write!(f, "compression {}, seed {seed}", fraction(compression))
    }
}
