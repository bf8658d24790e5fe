//! Writes the hashed layers of a state dict or a checkpoint, and its other tensors, as a checkpoint.

use std::fmt::Write;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_hashed_embedding_bag::checkpoint::{self, Layer};
use candle_hashed_embedding_bag::import::{self, LmaModule};
use candle_hashed_embedding_bag::{
    Bits, Checkpoint, HashedEmbeddingBag, HashedEmbeddingBagCollection, HashedEmbeddingConfig,
    LowBit, StateDict,
};

use crate::arguments::{Kind, Request};

/// Writes the layers that `requests` describe to `checkpoint`, and with `others` all other tensors of `state` that candle has
/// a dtype for. With `bits`, the layers are rounded. Returns a report on layers that were fitted or rounded and tensors that were
/// left out.
pub fn convert<'a>(
    mut state: StateDict,
    requests: impl Iterator<Item = &'a Request>,
    others: bool,
    bits: Option<Bits>,
    checkpoint: &Path,
) -> Result<String> {
    let (mut layers, mut report) = (vec![], String::new());
    for request in requests {
        let mut layer = request.take(&mut state)?;
        if let Some(error) = layer.fit_error {
            let name = &layer.name;
            writeln!(
                report,
                "{name:?} is fitted with a relative error of {error:.4}"
            )?;
        }
        if let Some(bits) = bits {
            layer.layer = round(&layer.name, &layer.layer, bits, &mut report)?;
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

/// Rounds the layers of a checkpoint to `bits` and writes them to `to` with the model's own metadata, and with `others` all other
/// tensors that candle has a dtype for. Returns a report like that of [`convert`].
pub fn round_checkpoint(from: &Checkpoint, others: bool, bits: Bits, to: &Path) -> Result<String> {
    let (device, mut report) = (&Device::Cpu, String::new());
    let dtype = |parameter: &str| -> Result<DType> {
        let dtype = from.tensor_info(parameter)?.candle_dtype;
        // That of outputs, for a layer that is rounded already; it is refused below.
        Ok(dtype.filter(DType::is_float).unwrap_or(DType::F32))
    };
    let (mut layers, mut parameters) = (vec![], vec![]);
    let names = from.layers().map(|(name, spec)| (name, spec.hash, false));
    let collections = from.collections();
    let names = names.chain(collections.map(|(name, spec)| (name, spec.hash, true)));
    for (name, hash, is_collection) in names {
        let parameter = join(name, "hashed_weight");
        let dtype = dtype(&parameter)?;
        let layer = if is_collection {
            BagOrCollection::Collection(from.hashed_embedding_bag_collection(name, dtype, device)?)
        } else {
            BagOrCollection::Bag(from.hashed_embedding_bag(name, dtype, device)?)
        };
        layers.push((name, round(name, &layer, bits, &mut report)?));
        parameters.push(parameter);
        parameters.extend(hash.row_tensor().map(|tensor| join(name, tensor)));
    }
    ensure!(!layers.is_empty(), "the checkpoint has no hashed layers");
    let is_other = |name: &String| others && !parameters.contains(name);
    let mut tensors = vec![];
    for name in from.tensor_names().filter(is_other) {
        let info = from.tensor_info(&name)?;
        if info.candle_dtype.is_none() {
            left_out(&name, &info.dtype, &mut report)?;
            continue;
        }
        let tensor = from.tensor(&name, device)?;
        tensors.push((name, tensor));
    }
    checkpoint::save_with_metadata(
        to,
        tensors,
        layers.iter().map(|(name, layer)| (*name, layer)),
        from.own_metadata(),
    )?;
    Ok(report)
}

/// Rounds a layer, and reports its sizes and the relative error.
fn round(
    name: &str,
    layer: &BagOrCollection,
    bits: Bits,
    report: &mut String,
) -> Result<BagOrCollection> {
    let size = |layer: &BagOrCollection| {
        let (weight, low_bit) = layer.parameter();
        let shifts = low_bit.and_then(LowBit::shifts);
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        bytes(weight) + shifts.map_or(0, bytes)
    };
    let (rounded, error) = match layer {
        BagOrCollection::Bag(bag) => {
            let (bag, error) = bag
                .to_bits(bits)
                .with_context(|| format!("layer {name:?}"))?;
            (BagOrCollection::Bag(bag), error)
        }
        BagOrCollection::Collection(collection) => {
            let rounded = collection.to_bits(bits);
            let (collection, error) = rounded.with_context(|| format!("layer {name:?}"))?;
            (BagOrCollection::Collection(collection), error)
        }
    };
    writeln!(
        report,
        "{name:?} is rounded to {} bits with a relative error of {error:.4}: {} bytes instead of {}",
        u32::from(bits),
        size(&rounded),
        size(layer)
    )?;
    Ok(rounded)
}

fn left_out(name: &str, dtype: &str, report: &mut String) -> Result<()> {
    writeln!(
        report,
        "{name:?} is left out: candle has no dtype for {dtype}"
    )?;
    Ok(())
}

/// Takes everything that is left in a state dict, except tensors with dtypes that candle lacks, which the report names.
fn rest(state: &mut StateDict, report: &mut String) -> Result<Vec<(String, Tensor)>> {
    let keys: Vec<_> = state.keys().map(str::to_string).collect();
    let mut tensors = vec![];
    for key in keys {
        let info = state.tensor_info(&key)?;
        if info.candle_dtype.is_none() {
            left_out(&key, &info.dtype, report)?;
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

impl BagOrCollection {
    fn parameter(&self) -> (&Tensor, Option<&LowBit>) {
        match self {
            Self::Bag(bag) => (bag.hashed_weight(), bag.low_bit()),
            Self::Collection(collection) => (collection.hashed_weight(), collection.low_bit()),
        }
    }
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
            Kind::Lma => {
                let module = LmaModule {
                    uma_chunk_size: chunk,
                    key_bits: self.key_bits,
                    keys_to_use: self.keys_to_use,
                    signature: None,
                };
                BagOrCollection::Bag(state.lma(&name, first()?, columns, module, config, device)?)
            }
            Kind::Scma => {
                let path = self.table.as_ref().context("--scma needs table=FILE.npz")?;
                let table = import::scma_table(path, rows.clone().sum(), columns)?;
                let tables = rows.enumerate().map(|(t, rows)| (t.to_string(), rows));
                BagOrCollection::Collection(
                    state.scma(&name, tables, columns, &table, config, device)?,
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
