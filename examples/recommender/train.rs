//! Training: AdamW on the binary cross-entropy, keeping the epoch that scores the validation part best.

use std::collections::HashMap;
use std::fmt::Write;
use std::time::Instant;

use anyhow::{anyhow, ensure, Result};
use candle_core::{backprop::GradStore, Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use indicatif::{HumanCount, ProgressBar, ProgressState, ProgressStyle};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::SeedableRng;

use crate::data::{Dataset, Part, Rating};
use crate::evaluate::{evaluate, Metrics};
use crate::model::{Batch, Dlrm};
use crate::options::Train;

/// The embedding tables learn this much faster than the MLP: a row is updated by few of the examples.
const TABLE_SPEED: f64 = 3.0;

/// Weight decay of plain tables. It is high, and matters most of all settings: a user with twenty ratings has sixteen
/// values to remember them by. Hashed tables need less, as they have fewer values to remember with.
const TABLE_DECAY: f64 = 3.0;

/// Weight decay of the MLP.
const TOP_DECAY: f64 = 0.01;

/// What the best epoch reached on the validation part.
pub struct Best {
    pub epoch: usize,
    pub valid: Metrics,
    pub seconds: f64,
}

/// Trains `model`, whose variables are `vars`, and leaves it as it was after its best epoch.
pub fn train(
    model: &Dlrm,
    vars: &VarMap,
    data: &Dataset,
    options: &Train,
    device: &Device,
) -> Result<Best> {
    let (mut ratings, valid) = (data.part(Part::Train), data.part(Part::Valid));
    ensure!(
        !ratings.is_empty() && !valid.is_empty(),
        "{} ratings are too few to split",
        data.ratings.len()
    );
    let batch_size = options.batch_size(ratings.len());
    let steps = options.epochs() * ratings.len().div_ceil(batch_size);
    let mut optimizer = Optimizers::new(vars, options, steps)?;
    let mut rng = StdRng::seed_from_u64(options.seed);
    let start = Instant::now();
    let mut best: Option<(Best, HashMap<String, Tensor>)> = None;

    for epoch in 1..=options.epochs() {
        ratings.shuffle(&mut rng);
        let progress = progress_bar(ratings.len())?;
        let mut losses = 0.0;
        let epoch_start = Instant::now();
        for chunk in ratings.chunks(batch_size) {
            let (batch, labels) = examples(data, chunk, device)?;
            let loss = cross_entropy(&model.forward(&batch)?, &labels)?;
            optimizer.step(&loss.backward()?)?;
            losses += f64::from(loss.to_scalar::<f32>()?) * chunk.len() as f64;
            progress.inc(chunk.len() as u64);
            progress.set_message(format!("{:.4}", losses / progress.position() as f64));
        }
        progress.finish_and_clear();

        let valid = evaluate(model, &data.catalog, &valid, device)?;
        println!(
            "  epoch {epoch:>2}   train loss {:.4}   valid logloss {:.4}   valid AUC {:.4}   {:>5.1} s",
            losses / ratings.len() as f64,
            valid.logloss,
            valid.auc,
            epoch_start.elapsed().as_secs_f64()
        );
        if best
            .as_ref()
            .is_none_or(|(best, _)| valid.auc > best.valid.auc)
        {
            best = Some((
                Best {
                    epoch,
                    valid,
                    seconds: 0.0,
                },
                snapshot(vars)?,
            ));
        }
    }
    let (best, values) = best.ok_or_else(|| anyhow!("no epoch"))?;
    vars.clone().set(values.into_iter())?;
    Ok(Best {
        seconds: start.elapsed().as_secs_f64(),
        ..best
    })
}

/// One AdamW for the tables and one for the MLP, with a learning rate that falls linearly to zero.
struct Optimizers {
    tables: AdamW,
    top: AdamW,
    lr: f64,
    step: usize,
    steps: usize,
}

impl Optimizers {
    fn new(vars: &VarMap, options: &Train, steps: usize) -> Result<Self> {
        let vars = vars
            .data()
            .lock()
            .map_err(|_| anyhow!("a thread panicked while it held the variables"))?;
        let (mut tables, mut top) = (Vec::new(), Vec::new());
        for (name, var) in vars.iter() {
            let group = if name.ends_with(".hashed_weight") {
                &mut tables
            } else {
                &mut top
            };
            group.push(var.clone());
        }
        let adamw = |vars, weight_decay| {
            AdamW::new(
                vars,
                ParamsAdamW {
                    weight_decay,
                    ..Default::default()
                },
            )
        };
        Ok(Self {
            tables: adamw(tables, TABLE_DECAY * options.compression.sqrt())?,
            top: adamw(top, TOP_DECAY)?,
            lr: options.lr,
            step: 0,
            steps,
        })
    }

    fn step(&mut self, gradients: &GradStore) -> Result<()> {
        let lr = self.lr * (1.0 - self.step as f64 / self.steps as f64);
        self.step += 1;
        self.tables.set_learning_rate(lr * TABLE_SPEED);
        self.top.set_learning_rate(lr);
        self.tables.step(gradients)?;
        self.top.step(gradients)?;
        Ok(())
    }
}

fn examples(data: &Dataset, ratings: &[Rating], device: &Device) -> Result<(Batch, Tensor)> {
    let pairs: Vec<_> = ratings.iter().map(Rating::pair).collect();
    let labels: Vec<_> = ratings
        .iter()
        .map(|rating| f32::from(u8::from(rating.liked)))
        .collect();
    Ok((
        Batch::new(&data.catalog, &pairs, device)?,
        Tensor::new(labels, device)?,
    ))
}

/// The mean of `ln(1 + e^logit) - label * logit`, written so that no logit overflows; `candle_nn`'s takes the logarithm
/// of a sigmoid, which is infinite for a logit that is confidently wrong.
fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let softplus = (logits.relu()? + (logits.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    Ok((softplus - (logits * labels)?)?.mean_all()?)
}

/// The present values of all variables; a plain clone would change with the next step.
fn snapshot(vars: &VarMap) -> Result<HashMap<String, Tensor>> {
    let vars = vars
        .data()
        .lock()
        .map_err(|_| anyhow!("a thread panicked while it held the variables"))?;
    vars.iter()
        .map(|(name, var)| Ok((name.clone(), var.as_tensor().copy()?)))
        .collect()
}

/// Drawn only if the standard error is a terminal.
fn progress_bar(rows: usize) -> Result<ProgressBar> {
    let template = "  {bar:32} {human_pos} of {human_len} rows   {rate} rows/s   loss {msg}";
    let style = ProgressStyle::with_template(template)?.with_key(
        "rate",
        |state: &ProgressState, out: &mut dyn Write| {
            let _ = write!(out, "{}", HumanCount(state.per_sec() as u64));
        },
    );
    Ok(ProgressBar::new(rows as u64).with_style(style))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropy_of_extreme_logits_is_finite() -> Result<()> {
        let logits = Tensor::new(&[0f32, 1000.0, -1000.0, 1000.0], &Device::Cpu)?;
        let labels = Tensor::new(&[1f32, 1.0, 1.0, 0.0], &Device::Cpu)?;
        let loss = cross_entropy(&logits, &labels)?.to_scalar::<f32>()?;
        assert!((loss - (2f32.ln() + 2000.0) / 4.0).abs() < 1e-2);
        Ok(())
    }
}
