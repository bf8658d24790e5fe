//! Training on the binary cross-entropy, keeping the epoch that scores the validation part best.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Result};
use candle_core::Tensor;
use candle_hashed_embedding_bag::optim::named_variables;
use candle_nn::VarMap;

use crate::data::{Examples, Part};
use crate::evaluate::Metrics;
use crate::model::{Dlrm, Inputs};
use crate::optimizers::{Optimizers, TableOptimizer};
use crate::order::Order;
use crate::progress::Progress;
use crate::ranks::Ranks;
use crate::resident::Resident;
use crate::resume::{BestEpoch, Position, Saving, State, Tensors};
use crate::say;
use crate::step::Stepper;

/// Steps between two readings of the loss. A GPU computes behind the program, which waits for it only there.
const STEPS_PER_READING: usize = 64;

/// What training depends on besides the model and the examples.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Passes over the train part.
    pub epochs: usize,
    /// Examples per step, of all ranks together.
    pub batch_size: usize,
    /// What updates the embedding tables.
    pub table_optimizer: TableOptimizer,
    /// Learning rate of the MLPs in the first step; it falls linearly to zero.
    pub lr: f64,
    /// The same of the embedding tables.
    pub table_lr: f64,
    /// Weight decay of the embedding tables, for an optimiser that has any.
    pub table_decay: f64,
    /// Weight decay of the MLPs.
    pub mlp_decay: f64,
    /// How often a positive example counts.
    pub positive_weight: f64,
    /// Epochs without a better one that end the training.
    pub patience: Option<NonZeroUsize>,
    /// Between two lines of progress, where no bar is drawn.
    pub progress: Duration,
    /// Decides the order of the examples.
    pub seed: u64,
    /// Whether to keep the train part on the device of the model.
    pub resident: bool,
}

/// The result of training: its best epoch on the validation part.
pub struct Best {
    /// Its number, from 1.
    pub epoch: usize,
    /// How good its scores are.
    pub valid: Metrics,
    /// The duration of the whole training.
    pub seconds: f64,
    /// Examples trained on in a second, from the file to the updated model, in the fastest epoch: the first one also starts threads
    /// and loads kernels.
    pub rate: f64,
    /// The epoch in which the loss was no longer finite, which ended the training.
    pub diverged: Option<usize>,
}

impl Best {
    /// What is known at the end of an epoch.
    fn of(epoch: usize, valid: Metrics) -> Self {
        Self {
            epoch,
            valid,
            seconds: 0.0,
            rate: 0.0,
            diverged: None,
        }
    }

    /// # Errors
    /// If training diverged; the message says which epoch is kept.
    pub fn ensure_converged(&self) -> Result<()> {
        match self.diverged {
            None => Ok(()),
            Some(epoch) => bail!(
                "{}; the model is that of epoch {}",
                divergence(epoch),
                self.epoch
            ),
        }
    }
}

fn divergence(epoch: usize) -> String {
    format!("training diverged in epoch {epoch}: the loss is no finite number, and a lower --lr may help")
}

/// Trains `model`, whose variables are `vars`, and leaves it as it was after its best epoch.
///
/// # Errors
/// Too few examples, an error while reading them, or a divergence before the end of the first epoch.
pub fn train(
    model: &Dlrm,
    vars: &VarMap,
    examples: &dyn Examples,
    settings: Settings,
) -> Result<Best> {
    let (ranks, saving) = (Ranks::single()?, Saving::default());
    train_on(&ranks, &saving, model, vars, examples, settings)
}

/// [`train`] on several ranks, which may be ended and resumed.
///
/// # Errors
/// Those of [`train`]; a batch size that cannot be divided among the ranks; a rank that was lost; a state that cannot be saved, or be
/// resumed from.
pub fn train_on(
    ranks: &Ranks,
    saving: &Saving,
    model: &Dlrm,
    vars: &VarMap,
    examples: &dyn Examples,
    settings: Settings,
) -> Result<Best> {
    let parts = [Part::Train, Part::Valid, Part::Test].map(|part| examples.len(part));
    ensure!(
        parts.iter().all(|&len| len > 0),
        "{} examples are too few to split",
        parts.iter().sum::<usize>()
    );
    let mut order = Order::new(ranks, parts[0], settings.batch_size, settings.seed)?;
    let steps_per_epoch = order.steps_per_epoch();
    let steps = settings.epochs.saturating_mul(steps_per_epoch);
    let mut optimizer = Optimizers::new(vars, settings, steps)?;
    let stepper = Stepper::new(model, vars)?.weighing_positives(settings.positive_weight);
    let parameters = named_variables(vars)?;
    ranks.broadcast(&parameters)?;
    let start = Instant::now();
    let resident = settings.resident;
    let resident = resident.then(|| Resident::load(model, examples, &order));
    let resident = resident.transpose()?;
    let mut best: Option<(Best, Tensors)> = None;
    let mut diverged = None;
    let mut position = Position {
        epoch: 1,
        ..Position::default()
    };
    if let Some(state) = saving.load(ranks, model.device())? {
        for (name, _) in &parameters {
            ensure!(
                state.model.contains_key(name),
                "the saved state has no variable {name}"
            );
        }
        position = state.position;
        vars.clone().set(state.model.into_iter())?;
        let done = (position.epoch - 1) * steps_per_epoch + position.step;
        optimizer.restore(state.optimizer, done)?;
        best = position
            .best
            .map(|best| (Best::of(best.epoch, best.valid()), state.best));
        // Each epoch draws from the generators of the order.
        for _ in 1..position.epoch {
            drop(batches(model, examples, resident.as_ref(), &mut order, 0)?);
        }
        say!(
            "  resumed at step {} of epoch {}\n",
            position.step,
            position.epoch
        );
    } else if saving.resume {
        say!("  nothing has been saved that this could resume: it starts anew\n");
    }
    let (mut rate, seconds_before) = (position.rate, position.seconds);

    'epochs: for epoch in position.epoch..=settings.epochs {
        let mut progress = Progress::new(epoch, order.examples(), settings.progress)?;
        let (done, mut losses) = match epoch == position.epoch {
            true => (position.step, Losses::restored(position.losses)),
            false => (0, Losses::default()),
        };
        let (epoch_start, examples_before) = (Instant::now(), losses.examples);
        let batches = batches(model, examples, resident.as_ref(), &mut order, done)?;
        for (step, batch) in (done + 1..).zip(batches) {
            let (inputs, labels) = batch?;
            let (loss, mut gradients) = stepper.step(&inputs, &labels)?;
            ranks.average(&parameters, &mut gradients)?;
            optimizer.step(&gradients)?;
            losses.add(&loss, labels.dim(0)? * ranks.count())?;
            let is_saved = saving.is_due(optimizer.steps_done());
            if step % STEPS_PER_READING == 0 || step == steps_per_epoch || is_saved {
                let loss = losses.read(ranks)?;
                if !loss.is_finite() {
                    progress.end();
                    diverged = Some(epoch);
                    break 'epochs;
                }
                progress.show(losses.examples, loss);
            }
            if is_saved && ranks.is_first() {
                let position = Position {
                    epoch,
                    step,
                    losses: losses.saved(),
                    seconds: seconds_before + start.elapsed().as_secs_f64(),
                    rate,
                    best: best
                        .as_ref()
                        .map(|(best, _)| BestEpoch::new(best.epoch, best.valid)),
                };
                saving.save(State {
                    position,
                    model: snapshot(vars)?,
                    optimizer: optimizer.state()?,
                    best: best
                        .as_ref()
                        .map_or_else(Tensors::new, |best| best.1.clone()),
                })?;
            }
        }
        let train_loss = losses.read(ranks)?;
        let trained = losses.examples - examples_before;
        rate = rate.max(trained as f64 / epoch_start.elapsed().as_secs_f64());
        progress.end();

        let valid = ranks.evaluate(model, examples, Part::Valid)?;
        if valid.ensure_finite().is_err() {
            diverged = Some(epoch);
            break;
        }
        say!(
            "  epoch {epoch:>2}   train loss {:.4}   valid logloss {:.4}   {}{:>5.1} s",
            train_loss,
            valid.logloss,
            valid
                .auc
                .map_or(String::new(), |auc| format!("valid AUC {auc:.4}   ")),
            epoch_start.elapsed().as_secs_f64()
        );
        if epoch == 1 && valid.auc.is_none() {
            say!("  all labels of the valid part are equal, so there is no AUC: the epoch is chosen by logloss");
        }
        if best
            .as_ref()
            .is_none_or(|(best, _)| valid.is_better(&best.valid))
        {
            best = Some((Best::of(epoch, valid), snapshot(vars)?));
        }
        let kept = best.as_ref().map_or(0, |(best, _)| best.epoch);
        if settings
            .patience
            .is_some_and(|most| epoch - kept >= most.get())
            && epoch < settings.epochs
        {
            say!("  no better epoch for {}: the training ends", epoch - kept);
            break;
        }
    }
    if diverged.is_none() {
        ranks.ensure_replicas_are_equal(&parameters)?;
    }
    let Some((best, values)) = best else {
        bail!(diverged.map_or("there is no epoch".to_owned(), divergence));
    };
    vars.clone().set(values.into_iter())?;
    Ok(Best {
        seconds: seconds_before + start.elapsed().as_secs_f64(),
        rate,
        diverged,
        ..best
    })
}

/// The inputs and labels of one step after the other.
type Steps<'a> = Box<dyn Iterator<Item = Result<(Inputs, Tensor)>> + 'a>;

/// The batches of the next epoch that this rank trains on, without the first `done`: inputs and labels.
fn batches<'a>(
    model: &'a Dlrm,
    examples: &'a dyn Examples,
    resident: Option<&'a Resident>,
    order: &'a mut Order,
    done: usize,
) -> Result<Steps<'a>> {
    if let Some(resident) = resident {
        return Ok(Box::new(resident.batches(order, done)?));
    }
    let batches = order.batches(examples)?.skip(done);
    Ok(Box::new(batches.map(|batch| {
        let (batch, labels) = batch?;
        let labels: Vec<_> = labels.iter().map(|&l| f32::from(u8::from(l))).collect();
        Ok((model.inputs(&batch)?, Tensor::new(labels, model.device())?))
    })))
}

/// The losses of an epoch so far.
#[derive(Default)]
struct Losses {
    examples: usize,
    /// The sum of those that were read, of all ranks.
    read: f64,
    /// The sum of the others of this rank, on the device.
    unread: Option<Tensor>,
}

impl Losses {
    /// Adds the sum of the losses of a batch, which has so many examples at all ranks together.
    fn add(&mut self, loss: &Tensor, examples: usize) -> Result<()> {
        self.examples += examples;
        self.unread = Some(match self.unread.take() {
            Some(sum) => (sum + loss)?,
            None => loss.clone(),
        });
        Ok(())
    }

    /// The mean loss of all examples of all ranks so far; waits for the device, and for the other ranks.
    fn read(&mut self, ranks: &Ranks) -> Result<f64> {
        if let Some(sum) = self.unread.take() {
            self.read += ranks.sum(f64::from(sum.to_scalar::<f32>()?))?;
        }
        Ok(self.read / self.examples as f64)
    }

    /// What was read, for [`restored`](Self::restored).
    fn saved(&self) -> (usize, u64) {
        (self.examples, self.read.to_bits())
    }

    fn restored((examples, read): (usize, u64)) -> Self {
        Self {
            examples,
            read: f64::from_bits(read),
            unread: None,
        }
    }
}

/// The present values of all variables; a plain clone would change with the next step.
fn snapshot(vars: &VarMap) -> Result<Tensors> {
    let vars = vars
        .data()
        .lock()
        .map_err(|_| anyhow!("a thread panicked while it held the variables"))?;
    vars.iter()
        .map(|(name, var)| Ok((name.clone(), var.as_tensor().copy()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{write_generated, Batch, Batches, Clicks, Records, Rows, Schema};
    use crate::embeddings::EmbeddingConfig;
    use crate::evaluate::evaluate;
    use crate::init::seeded;
    use crate::model::ModelConfig;
    use crate::optimizers::MLP_DECAY;
    use candle_core::Device;
    use candle_hashed_embedding_bag::Hash;
    use clap::ValueEnum;
    use rand::rngs::StdRng;
    use std::cell::Cell;
    use std::ops::Range;
    use std::path::Path;

    fn model_config(embedding_dim: usize, compression: f64) -> ModelConfig {
        let embeddings = EmbeddingConfig {
            embedding_dim,
            inner_dim: None,
            compression,
            hash: Hash::default_for(embedding_dim),
        };
        embeddings.into()
    }

    /// Examples of one row each, which break the model in epoch `broken_in`.
    struct Breaking {
        vars: VarMap,
        broken_in: usize,
        epoch: Cell<usize>,
    }

    impl Examples for Breaking {
        fn schema(&self) -> Schema {
            Schema {
                numbers: 0,
                tables: vec![("row", 4)],
            }
        }

        fn records(&self) -> Result<Records<'_>> {
            Ok(Box::new(std::iter::empty()))
        }

        fn len(&self, _: Part) -> usize {
            8
        }

        fn batches_at<'a>(
            &'a self,
            part: Part,
            _: Range<usize>,
            _: usize,
            _: Option<&'a mut StdRng>,
        ) -> Result<Batches<'a>> {
            if part == Part::Train {
                self.epoch.set(self.epoch.get() + 1);
                if self.epoch.get() == self.broken_in {
                    // What a far too large step leaves behind.
                    let nan = Tensor::new(&[f32::NAN], &Device::Cpu)?;
                    self.vars.clone().set_one("top.2.bias", nan)?;
                }
            }
            let batch = Batch {
                numbers: Vec::new(),
                rows: Rows::OnePerTable(vec![0, 1, 2, 3, 0, 1, 2, 3]),
            };
            let labels = [true, false].repeat(4);
            Ok(Box::new(std::iter::once(Ok((batch, labels)))))
        }
    }

    #[test]
    fn a_divergence_is_an_error_and_the_best_epoch_before_it_stays() -> Result<()> {
        let config = model_config(4, 1.0);
        let settings = Settings {
            epochs: 5,
            batch_size: 8,
            lr: 0.01,
            table_lr: 0.03,
            ..SMALL
        };
        let train_until = |broken_in| -> Result<(Best, Metrics)> {
            let examples = Breaking {
                vars: VarMap::new(),
                broken_in,
                epoch: Cell::new(0),
            };
            let vb = seeded(&examples.vars, 1, &Device::Cpu);
            let model = Dlrm::new(&examples.schema(), &config, vb)?;
            let best = train(&model, &examples.vars, &examples, settings)?;
            Ok((best, evaluate(&model, &examples, Part::Valid)?))
        };
        let (best, _) = train_until(usize::MAX)?;
        best.ensure_converged()?;

        let (best, left) = train_until(3)?;
        assert_eq!(best.diverged, Some(3));
        assert!(best.epoch < 3);
        assert_eq!(left, best.valid);
        let said = best.ensure_converged().unwrap_err().to_string();
        assert!(said.starts_with("training diverged in epoch 3"), "{said}");

        let said = train_until(1).err().expect("no epoch ends").to_string();
        assert!(said.starts_with("training diverged in epoch 1"), "{said}");
        Ok(())
    }

    /// What a log of 10,000 lines is learnt by.
    const SMALL: Settings = Settings {
        epochs: 1,
        batch_size: 50,
        table_optimizer: TableOptimizer::Adamw,
        lr: 0.002,
        table_lr: 0.006,
        table_decay: 0.0,
        mlp_decay: MLP_DECAY,
        positive_weight: 1.0,
        patience: None,
        progress: Duration::MAX,
        seed: 1,
        resident: false,
    };

    /// Such a log, and the best AUC that it allows.
    fn small_log(path: &Path) -> Result<(Clicks, Option<f64>)> {
        let truth = write_generated(path, 10_000, 1)?;
        let log = Clicks::open(path, Some(5_000), false)?;
        Ok((log, Metrics::of_truth(&truth).auc))
    }

    fn trained(log: &Clicks, settings: Settings, sparse: bool) -> Result<(VarMap, Dlrm)> {
        let vars = VarMap::new();
        let vb = seeded(&vars, 1, &Device::Cpu);
        let mut model = Dlrm::new(&log.schema(), &model_config(8, 1.0 / 16.0), vb)?;
        if sparse {
            model = model.with_sparse_gradients()?;
        }
        train(&model, &vars, log, settings)?;
        Ok((vars, model))
    }

    #[test]
    fn clicks_are_learnt() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (log, best) = small_log(&dir.path().join("log.gz"))?;
        for resident in [false, true] {
            let settings = Settings { resident, ..SMALL };
            let (_, model) = trained(&log, settings, false)?;
            let reached = evaluate(&model, &log, Part::Test)?.auc;
            // From 8,000 examples; more bring it nearer to the best.
            assert!(
                reached > Some(0.66) && reached < best,
                "{reached:?} of {best:?}"
            );
        }
        Ok(())
    }

    /// Every optimiser of tables learns with its default rate, and those that leave other rows alone learn the same from sparse
    /// gradients as from dense ones.
    #[test]
    fn tables_learn_with_every_optimizer() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (log, best) = small_log(&dir.path().join("log.gz"))?;
        for &table_optimizer in TableOptimizer::value_variants() {
            let settings = Settings {
                table_optimizer,
                table_lr: table_optimizer.default_lr(SMALL.lr),
                ..SMALL
            };
            let (dense, model) = trained(&log, settings, false)?;
            let reached = evaluate(&model, &log, Part::Test)?.auc;
            assert!(
                reached > Some(0.64) && reached < best,
                "{table_optimizer:?}: {reached:?} of {best:?}"
            );
            if table_optimizer.is_sparse() {
                let (sparse, _) = trained(&log, settings, true)?;
                let values = |vars: &VarMap| -> Result<Vec<(String, Vec<f32>)>> {
                    let values = named_variables(vars)?.into_iter();
                    let values =
                        values.map(|(name, var)| Ok((name, var.flatten_all()?.to_vec1()?)));
                    values.collect()
                };
                assert!(values(&dense)? == values(&sparse)?, "{table_optimizer:?}");
            }
        }
        Ok(())
    }
}
