//! Lists the entries of a state dict, or the layers of a checkpoint, which it also checks.

use std::fmt::Write;
use std::path::Path;

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_hashed_embedding_bag::checkpoint::{CollectionSpec, LowBitSpec, TableSpec};
use candle_hashed_embedding_bag::{
    Balanced, Bits, Checkpoint, Hash, Mix, Mode, Overflow, Semantic, StateDict, TensorInfo,
};
use comfy_table::{presets, Table};

use crate::conversion::join;

/// Lists the entries of a state dict, without reading their values.
pub fn list(state: StateDict) -> Result<String> {
    let mut table = new_table(&["entry", "dtype", "shape"]);
    let mut notes = String::new();
    if state.keys().next().is_none() {
        writeln!(notes, "no tensors; --key says where else the state dict is")?;
    }
    for key in state.keys() {
        match state.tensor_info(key) {
            Ok(info) => {
                if info.candle_dtype.is_none() {
                    writeln!(notes, "{key:?}: candle has no dtype for {}", info.dtype)?;
                }
                table.add_row(tensor_row(key, &info));
            }
            // A tensor that is not an array with a dtype and a shape, such as a sparse one.
            Err(error) => {
                writeln!(notes, "{error}")?;
                table.add_row([key, "-", "-"]);
            }
        }
    }
    Ok(format!("{table}\n{notes}"))
}

/// Lists what a checkpoint holds.
///
/// # Errors
/// If its description is wrong, or a hashed value is not finite.
pub fn inspect(path: &Path) -> Result<String> {
    let checkpoint = Checkpoint::open(path)?;
    let (mut layers, mut parameters) = (new_table(&HashedLayer::COLUMNS), vec![]);
    for layer in hashed_layers(&checkpoint) {
        let parameter = join(layer.name, "hashed_weight");
        let weight = checkpoint.tensor(&parameter, &Device::Cpu)?;
        if layer.low_bit.is_none() {
            ensure_finite(&parameter, &weight)?;
        }
        let shifts = join(layer.name, "hashed_weight_shift");
        let shifts_len = match layer.low_bit {
            Some(LowBitSpec {
                bits: Bits::Four, ..
            }) => {
                let info = checkpoint.tensor_info(&shifts)?;
                parameters.push(shifts);
                info.shape.iter().product()
            }
            _ => 0,
        };
        let mut row_tensor_len = 0;
        if let Some(tensor) = layer.hash.row_tensor() {
            let tensor = join(layer.name, tensor);
            let info = checkpoint.tensor_info(&tensor)?;
            let size = info.candle_dtype.map_or(0, |dtype| dtype.size_in_bytes());
            row_tensor_len = info.shape.iter().product::<usize>() * size;
            parameters.push(tensor);
        }
        layers.add_row(layer.row(&parameter, &weight, shifts_len + row_tensor_len));
        parameters.push(parameter);
    }
    let mut report = format!("{layers}\n");

    let mut features = new_table(&["collection", "feature", "table", "rows"]);
    for (collection, spec) in checkpoint.collections() {
        for (feature, table) in features_of(spec) {
            let rows = table.num_embeddings.to_string();
            features.add_row([collection, feature, &table.name, &rows]);
        }
    }
    if !features.is_empty() {
        writeln!(report, "{features}")?;
    }

    let mut others = new_table(&["other tensor", "dtype", "shape"]);
    let names = checkpoint.tensor_names();
    for name in names.filter(|name| !parameters.contains(name)) {
        others.add_row(tensor_row(&name, &checkpoint.tensor_info(&name)?));
    }
    if !others.is_empty() {
        writeln!(report, "{others}")?;
    }
    let bytes = std::fs::metadata(path)?.len();
    writeln!(report, "{}: {bytes} bytes, checked", path.display())?;
    Ok(report)
}

/// A layer or a collection of a checkpoint.
struct HashedLayer<'a> {
    name: &'a str,
    /// Rows of each table.
    rows: Vec<usize>,
    embedding_dim: usize,
    mode: Mode,
    padding_idx: Option<i64>,
    hash: Hash,
    low_bit: Option<LowBitSpec>,
}

fn hashed_layers(checkpoint: &Checkpoint) -> impl Iterator<Item = HashedLayer<'_>> {
    let layers = checkpoint.layers().map(|(name, spec)| HashedLayer {
        name,
        rows: vec![spec.num_embeddings],
        embedding_dim: spec.embedding_dim,
        mode: spec.mode,
        padding_idx: spec.padding_idx,
        hash: spec.hash,
        low_bit: spec.low_bit,
    });
    let collections = checkpoint.collections().map(|(name, spec)| HashedLayer {
        name,
        rows: spec.tables.iter().map(|t| t.num_embeddings).collect(),
        embedding_dim: spec.embedding_dim,
        mode: spec.mode,
        padding_idx: spec.padding_idx,
        hash: spec.hash,
        low_bit: spec.low_bit,
    });
    layers.chain(collections)
}

/// The features of a collection by name, each with the table that it looks into.
fn features_of(spec: &CollectionSpec) -> Vec<(&str, &TableSpec)> {
    let tables = || spec.tables.iter();
    match &spec.features {
        None => tables().map(|table| (&*table.name, table)).collect(),
        Some(features) => features
            .iter()
            .filter_map(|feature| {
                let table = tables().find(|table| table.name == feature.table)?;
                Some((&*feature.name, table))
            })
            .collect(),
    }
}

impl HashedLayer<'_> {
    const COLUMNS: [&'static str; 10] = [
        "parameter",
        "rows",
        "columns",
        "mode",
        "padding_idx",
        "hash",
        "dtype",
        "values",
        "compression",
        "bytes",
    ];

    /// `more`: the bytes of the tensors beside `weight`, of shifts in 4 bits and of the rows.
    fn row(&self, parameter: &str, weight: &Tensor, more: usize) -> [String; 10] {
        let rows: Vec<_> = self.rows.iter().map(usize::to_string).collect();
        let total: f64 = self.rows.iter().map(|&rows| rows as f64).sum();
        let bytes = weight.elem_count() * weight.dtype().size_in_bytes() + more;
        let (values, dtype) = match self.low_bit.map(|low_bit| low_bit.bits) {
            None => (weight.elem_count(), weight.dtype().as_str().to_string()),
            Some(bits) => {
                let bits = u32::from(bits);
                (
                    weight.elem_count() * 8 / bits as usize,
                    format!("{bits} bits"),
                )
            }
        };
        let compression = total * self.embedding_dim as f64 / values as f64;
        [
            parameter.to_string(),
            rows.join(" + "),
            self.embedding_dim.to_string(),
            format!("{:?}", self.mode).to_lowercase(),
            self.padding_idx
                .map_or("-".to_string(), |row| row.to_string()),
            describe(self.hash),
            dtype,
            values.to_string(),
            format!("1/{compression:.1}"),
            bytes.to_string(),
        ]
    }
}

fn ensure_finite(parameter: &str, weight: &Tensor) -> Result<()> {
    let values: Vec<f64> = weight.to_dtype(DType::F64)?.to_vec1()?;
    let broken = values.iter().filter(|value| !value.is_finite()).count();
    ensure!(
        broken == 0,
        "{parameter}: {broken} of {} values are not finite",
        values.len()
    );
    Ok(())
}

fn describe(hash: Hash) -> String {
    let blocks = |family: &str, seed| {
        let signed = if hash.signed() { "signed" } else { "unsigned" };
        format!("{family}, seed {seed}, block {}, {signed}", hash.block())
    };
    match hash {
        hash if hash == Hash::original() => "HashedEmbeddingBag's".to_string(),
        Hash::Affine(affine) if affine.overflow == Overflow::Refuse => {
            format!("ROBE's, block {}", hash.block())
        }
        Hash::Affine(_) => format!("affine, block {}", hash.block()),
        Hash::Balanced(Balanced { seed, .. }) => blocks("balanced", seed),
        Hash::Mix(Mix { seed, .. }) => blocks("mix", seed),
        Hash::Semantic(Semantic {
            seed,
            key_bits,
            keys_to_use,
            ..
        }) => {
            let family = format!("semantic, {keys_to_use} keys of {key_bits} bits");
            blocks(&family, seed)
        }
        Hash::Lma(lma) => format!(
            "LMA, {} keys of {} bits, block {}",
            lma.keys_to_use(),
            lma.key_bits(),
            lma.block()
        ),
        Hash::SlotTable(_) => format!("slot table, block {}", hash.block()),
        other => format!("{other:?}"),
    }
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED.with_rounded_corners())
        .set_header(header);
    table
}

fn tensor_row(key: &str, info: &TensorInfo) -> [String; 3] {
    let dims = format!("{:?}", info.shape);
    [key.to_string(), info.dtype.clone(), dims]
}
