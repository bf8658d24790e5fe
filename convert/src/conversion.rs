//! Writes the hashed layers of a state dict, and its other tensors, as a checkpoint.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use candle_hashed_embedding_bag::checkpoint::{self, Layer};
use candle_hashed_embedding_bag::{
    HashedEmbeddingBag, HashedEmbeddingBagCollection, HashedEmbeddingConfig, StateDict,
};

use crate::arguments::{Kind, Request};

/// Writes the layers that `requests` describe to `checkpoint`, and with `others` all other tensors of `state` that candle has
/// a dtype for. Returns a report on layers that were fitted and tensors that were left out.
pub fn convert<'a>(
    mut state: StateDict,
    requests: impl Iterator<Item = &'a Request>,
    others: bool,
    checkpoint: &Path,
) -> Result<String> {
    let (mut layers, mut report) = (vec![], String::new());
    for request in requests {
        let layer = request.take(&mut state)?;
        if let Some(error) = layer.fit_error {
            let name = &layer.name;
            writeln!(
                report,
                "{name:?} is fitted with a relative error of {error:.4}"
            )?;
        }
        layers.push(layer);
    }
    let others = match others {
        true => rest(&mut state, &mut report)
            .context("--layers-only leaves out what is no hashed layer")?,
        false => vec![],
    };
    let layers = layers.iter().map(|layer| (&layer.name, &layer.layer));
    checkpoint::save(checkpoint, others, layers)?;
    Ok(report)
}

/// Takes everything that is left in a state dict, except tensors with dtypes that candle lacks, which the report names.
fn rest(state: &mut StateDict, report: &mut String) -> Result<Vec<(String, Tensor)>> {
    let keys: Vec<_> = state.keys().map(str::to_string).collect();
    let mut tensors = vec![];
    for key in keys {
        let info = state.tensor_info(&key)?;
        if info.candle_dtype.is_none() {
            writeln!(
                report,
                "{key:?} is left out: candle has no dtype for {}",
                info.dtype
            )?;
            continue;
        }
        let tensor = state.take(&key, &Device::Cpu)?;
        tensors.push((key, tensor));
    }
    Ok(tensors)
}

/// A layer of the checkpoint to be written.
struct Converted {
    name: String,
    layer: BagOrCollection,
    /// The relative error, if the layer was fitted to a table.
    fit_error: Option<f64>,
}

enum BagOrCollection {
    Bag(HashedEmbeddingBag),
    Collection(HashedEmbeddingBagCollection),
}

impl<'a> From<&'a BagOrCollection> for Layer<'a> {
    fn from(layer: &'a BagOrCollection) -> Self {
        match layer {
            BagOrCollection::Bag(bag) => bag.into(),
            BagOrCollection::Collection(collection) => collection.into(),
        }
    }
}

impl Request {
    /// Takes the layer out of the state dict.
    fn take(&self, state: &mut StateDict) -> Result<Converted> {
        let (columns, chunk, config, device) =
            (self.columns, self.uma_chunk_size, self.config, &Device::Cpu);
        let (mut name, mut fit_error) = (self.name.clone(), None);
        let rows = self.rows.iter().copied();
        let first = || self.rows.first().copied().context("no number of rows");
        let layer = match self.kind {
            Kind::Bag => BagOrCollection::Bag(state.hashed_embedding_bag(
                &name,
                first()?,
                columns,
                config,
                device,
            )?),
            Kind::Embedding => {
                let config = HashedEmbeddingConfig {
                    padding_idx: config.padding_idx,
                    ..Default::default()
                };
                let layer = state.hashed_embedding(&name, first()?, columns, config, device)?;
                name = join(&name, "hashed_embedding_bag");
                BagOrCollection::Bag(layer.bag().clone())
            }
            Kind::Robe => {
                BagOrCollection::Bag(state.robe(&name, first()?, columns, chunk, config, device)?)
            }
            Kind::RobeDlrm => {
                let tables = rows.enumerate().map(|(t, rows)| (t.to_string(), rows));
                BagOrCollection::Collection(
                    state.robe_dlrm(&name, tables, columns, chunk, config, device)?,
                )
            }
            Kind::Fit => {
                let key = join(&name, "weight");
                let table = state.take(&key, device)?;
                let (bag, error) =
                    HashedEmbeddingBag::fit(&table, self.compression, config).context(key)?;
                fit_error = Some(error);
                BagOrCollection::Bag(bag)
            }
        };
        Ok(Converted {
            name,
            layer,
            fit_error,
        })
    }
}

/// `prefix.name`, or just `name` if the prefix is empty.
pub fn join(prefix: &str, name: &str) -> String {
    match prefix {
        "" => name.to_string(),
        prefix => format!("{prefix}.{name}"),
    }
}
