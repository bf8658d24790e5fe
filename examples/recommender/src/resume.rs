//! The whole state of a training in one file, so that one that was ended can go on as if it had not been.
//!
//! | tensor | |
//! |---|---|
//! | `model.<name>` | the variables |
//! | `optimizer.<name>` | the state of the optimisers |
//! | `best.<name>` | the variables after the best epoch so far |
//!
//! The metadata's `training` is JSON: where the training is, and the options and data that it must be continued with. The order
//! of the examples follows from the seed and from how far the training is. The file is replaced whole, by rank 0.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};
use candle_hashed_embedding_bag::{checkpoint, HashedEmbeddingBag};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use crate::evaluate::Metrics;
use crate::ranks::Ranks;

/// The key of the metadata.
const TRAINING: &str = "training";

/// Whether, where and how often the state of a training is saved.
#[derive(Default)]
pub struct Saving {
    /// The file.
    pub path: PathBuf,
    /// Steps between two times.
    pub every: Option<NonZeroUsize>,
    /// Whether to go on from the file, if it is there.
    pub resume: bool,
    /// The options and data of the training, by name.
    pub facts: Vec<(String, String)>,
}

/// How far a training is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// The epoch, from 1.
    pub epoch: usize,
    /// The steps of this epoch that are done.
    pub step: usize,
    /// The losses of these steps: how many examples, and the bits of their sum.
    pub losses: (usize, u64),
    /// The best epoch so far.
    pub best: Option<BestEpoch>,
    /// The seconds that the training has taken.
    pub seconds: f64,
    /// The most examples in a second so far.
    pub rate: f64,
}

/// An epoch and its metrics, as bits: as text, a number may come back as another.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestEpoch {
    /// Its number, from 1.
    pub epoch: usize,
    auc: Option<u64>,
    logloss: u64,
}

/// Tensors by name.
pub type Tensors = HashMap<String, Tensor>;

/// All that a training needs to go on.
pub struct State {
    /// How far it is.
    pub position: Position,
    /// The variables.
    pub model: Tensors,
    /// The state of the optimisers.
    pub optimizer: Tensors,
    /// The variables after the best epoch so far; empty before the first has ended.
    pub best: Tensors,
}

#[derive(Serialize, Deserialize)]
struct Training {
    position: Position,
    facts: Vec<(String, String)>,
}

impl BestEpoch {
    /// An epoch with the metrics of the valid part after it.
    pub fn new(epoch: usize, valid: Metrics) -> Self {
        Self {
            epoch,
            auc: valid.auc.map(f64::to_bits),
            logloss: valid.logloss.to_bits(),
        }
    }

    /// The metrics of the valid part.
    pub fn valid(&self) -> Metrics {
        Metrics {
            auc: self.auc.map(f64::from_bits),
            logloss: f64::from_bits(self.logloss),
        }
    }
}

impl Saving {
    /// What must be the same on all ranks: the [`facts`](Self::facts), and when a state is saved or read, in which all of them take part.
    pub fn facts_of_ranks(&self) -> Vec<(String, String)> {
        let every = self
            .every
            .map_or("none".to_owned(), |steps| steps.to_string());
        let options = [
            ("--save-every", every),
            ("--resume", self.resume.to_string()),
        ];
        let options = options.map(|(name, value)| (name.to_owned(), value));
        self.facts.iter().cloned().chain(options).collect()
    }

    /// Whether the state is to be saved after so many steps.
    pub fn is_due(&self, steps: usize) -> bool {
        self.every
            .is_some_and(|every| steps.is_multiple_of(every.get()))
    }

    /// Writes the file, which is for rank 0 to do.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, state: State) -> Result<()> {
        let State {
            position,
            model,
            optimizer,
            best,
        } = state;
        let facts = self.facts.clone();
        let training = serde_json::to_string(&Training { position, facts })?;
        let named = |prefix, tensors: Tensors| {
            let named = tensors.into_iter();
            named.map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor))
        };
        let tensors = named("model", model)
            .chain(named("optimizer", optimizer))
            .chain(named("best", best));
        let no_layers: [(&str, &HashedEmbeddingBag); 0] = [];
        checkpoint::save_with_metadata(&self.path, tensors, no_layers, [(TRAINING, training)])
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// What rank 0 reads of the file, on all ranks; `None` if it is not to go on, or there is no file.
    ///
    /// # Errors
    /// A file that cannot be read, or is of a training with other options or data, which are named.
    pub fn load(&self, ranks: &Ranks, device: &Device) -> Result<Option<State>> {
        if !self.resume {
            return Ok(None);
        }
        let name = || format!("cannot resume from {}", self.path.display());
        let bytes = ranks.is_first().then(|| match fs::read(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            read => read.with_context(name),
        });
        let bytes = ranks.from_first(bytes.transpose()?)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        self.parse(&bytes, device).with_context(name).map(Some)
    }

    fn parse(&self, bytes: &[u8], device: &Device) -> Result<State> {
        let (_, metadata) = SafeTensors::read_metadata(bytes)?;
        let training = metadata
            .metadata()
            .as_ref()
            .and_then(|all| all.get(TRAINING));
        let training = training.context("it is not the state of a training")?;
        let Training { position, facts } = serde_json::from_str(training).context(TRAINING)?;
        for (name, now) in &self.facts {
            let then = facts.iter().find(|(other, _)| other == name);
            let then = then.map_or("unknown", |(_, then)| then);
            ensure!(then == now, "{name} was {then} and is now {now}");
        }
        let mut state = State {
            position,
            model: Tensors::new(),
            optimizer: Tensors::new(),
            best: Tensors::new(),
        };
        for (name, tensor) in candle_core::safetensors::load_buffer(bytes, device)? {
            let (kind, name) = name.split_once('.').unwrap_or_default();
            let tensors = match kind {
                "model" => &mut state.model,
                "optimizer" => &mut state.optimizer,
                "best" => &mut state.best,
                _ => continue,
            };
            tensors.insert(name.to_owned(), tensor);
        }
        Ok(state)
    }

    /// Removes the file, which a training that has ended needs no more.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self) -> Result<()> {
        if self.every.is_none() && !self.resume {
            return Ok(());
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }
}
