//! From a PyTorch state dict to a self-describing checkpoint, and a look into either.
//!
//! ```text
//! cargo run --release --example convert -- --help
//! ```

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_hashed_embedding_bag::checkpoint::{self, Layer};
use candle_hashed_embedding_bag::{
    Balanced, Checkpoint, Hash, HashedEmbeddingBag, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, HashedEmbeddingConfig, Mix, Mode, Overflow, StateDict,
};
use clap::Parser;
use comfy_table::{presets, Table};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Writes the hashed layers of a PyTorch state dict, and its other tensors, as a self-describing checkpoint.
///
/// A state dict does not say how large a virtual table is: name each layer, by its prefix in the state dict, with its rows
/// and columns. Without a CHECKPOINT to write, the entries of the state dict are listed.
#[derive(Parser)]
#[command(arg_required_else_help = true, after_help = EXAMPLES)]
struct Options {
    /// The state dict: .pth, .pt or .safetensors
    #[arg(required_unless_present = "inspect")]
    state_dict: Option<PathBuf>,
    /// The checkpoint to write
    checkpoint: Option<PathBuf>,
    /// The key of the state dict, where the file holds more: the training scripts of many models use state_dict
    #[arg(long)]
    key: Option<String>,
    /// HashedEmbeddingBag of the package HashedEmbeddingBag. Options: mode (sum, mean, max), padding_idx,
    /// include_last_offset
    #[arg(long, value_name = "NAME:ROWSxCOLUMNS[,OPTION=VALUE]", value_parser = parser(Kind::Bag))]
    bag: Vec<Request>,
    /// HashedEmbedding of the same package. Options: padding_idx
    #[arg(long, value_name = "NAME:ROWSxCOLUMNS[,OPTION=VALUE]", value_parser = parser(Kind::Embedding))]
    embedding: Vec<Request>,
    /// ROBE's HashedEmbeddingBag or HashedEmbeddingCPU. Options: uma_chunk_size, val_offset, and those of --bag
    #[arg(long, value_name = "NAME:ROWSxCOLUMNS[,OPTION=VALUE]", value_parser = parser(Kind::Robe))]
    robe: Vec<Request>,
    /// The tables of the DLRM of ROBE's authors, which become a collection; NAME is the prefix of the model, mostly empty.
    /// Options: uma_chunk_size, and those of --bag
    #[arg(long, value_name = "NAME:ROWS+ROWS+…xCOLUMNS[,OPTION=VALUE]", value_parser = parser(Kind::RobeDlrm))]
    robe_dlrm: Vec<Request>,
    /// A table that is not hashed, NAME.weight of torch.nn.EmbeddingBag or Embedding: a hashed layer is fitted to it.
    /// Options: compression (such as 1/64), and those of --bag
    #[arg(long, value_name = "NAME[,OPTION=VALUE]", value_parser = parser(Kind::Fit))]
    fit: Vec<Request>,
    /// Leave out the tensors of the state dict that belong to none of these layers
    #[arg(long)]
    layers_only: bool,
    /// List what a checkpoint holds, and check it
    #[arg(long, value_name = "CHECKPOINT", exclusive = true)]
    inspect: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  convert model.pth                                                    # lists its entries
  convert model.pth model.safetensors --bag user:6040x16,mode=mean     # its entry is user.hashed_weight
  convert emb.pth emb.safetensors --robe :100000x16,uma_chunk_size=8   # the state dict is the module's own
  convert dlrm.pth dlrm.safetensors --key state_dict --robe-dlrm :1460+583+10131227x16,uma_chunk_size=8
  convert full.pth small.safetensors --fit item,compression=1/32       # item.weight becomes item.hashed_weight
  convert --inspect model.safetensors";

/// What a layer was in PyTorch.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Bag,
    Embedding,
    Robe,
    RobeDlrm,
    Fit,
}

impl Kind {
    /// The options it understands.
    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Bag => &["mode", "padding_idx", "include_last_offset"],
            Self::Embedding => &["padding_idx"],
            Self::Robe => &[
                "mode",
                "padding_idx",
                "include_last_offset",
                "uma_chunk_size",
                "val_offset",
            ],
            Self::RobeDlrm => &[
                "mode",
                "padding_idx",
                "include_last_offset",
                "uma_chunk_size",
            ],
            Self::Fit => &["mode", "padding_idx", "include_last_offset", "compression"],
        }
    }
}

/// A layer as the command line asks for it.
#[derive(Debug, Clone)]
struct Request {
    kind: Kind,
    name: String,
    /// Of each table.
    rows: Vec<usize>,
    columns: usize,
    config: HashedEmbeddingBagConfig,
    compression: f64,
    uma_chunk_size: usize,
}

/// Parses `NAME:ROWSxCOLUMNS` and options; only the name where the table itself says its size.
fn parser(kind: Kind) -> impl Fn(&str) -> Result<Request> + Clone {
    move |text| {
        let (head, options) = text.split_once(',').unwrap_or((text, ""));
        let mut request = Request {
            kind,
            name: head.to_string(),
            rows: vec![],
            columns: 0,
            config: HashedEmbeddingBagConfig::default(),
            compression: 1.0 / 64.0,
            uma_chunk_size: 1,
        };
        if kind != Kind::Fit {
            let (name, size) = head.rsplit_once(':').context("no :ROWSxCOLUMNS")?;
            let (rows, columns) = size.split_once('x').context("no x in ROWSxCOLUMNS")?;
            let rows = rows.split('+').map(|rows| number("rows", rows));
            request.name = name.to_string();
            request.rows = rows.collect::<Result<_>>()?;
            request.columns = number("columns", columns)?;
            ensure!(
                request.rows.len() == 1 || kind == Kind::RobeDlrm,
                "one table has one number of rows"
            );
        }
        for option in options.split(',').filter(|option| !option.is_empty()) {
            request.set(option)?;
        }
        Ok(request)
    }
}

fn number<T: FromStr>(what: &str, text: &str) -> Result<T> {
    text.parse()
        .ok()
        .with_context(|| format!("{what} must be a number in range, got {text:?}"))
}

impl Request {
    fn set(&mut self, option: &str) -> Result<()> {
        let (key, value) = option.split_once('=').unwrap_or((option, "true"));
        let known = self.kind.options();
        ensure!(
            known.contains(&key),
            "unknown option {key:?}, only {}",
            known.join(", ")
        );
        let config = &mut self.config;
        match key {
            "mode" => {
                config.mode = match value {
                    "sum" => Mode::Sum,
                    "mean" => Mode::Mean,
                    "max" => Mode::Max,
                    _ => bail!("mode must be sum, mean or max, got {value:?}"),
                }
            }
            "padding_idx" => config.padding_idx = Some(number(key, value)?),
            "include_last_offset" => {
                config.include_last_offset = value
                    .parse()
                    .context("include_last_offset must be true or false")?;
            }
            "uma_chunk_size" => self.uma_chunk_size = number(key, value)?,
            "val_offset" => config.first_row = number(key, value)?,
            "compression" => {
                let (over, under) = value.split_once('/').unwrap_or((value, "1"));
                self.compression = number::<f64>(key, over)? / number::<f64>(key, under)?;
            }
            _ => bail!("option {key:?} is not implemented"),
        }
        Ok(())
    }

    /// Takes the layer out of the state dict: its name in the checkpoint, and how well it fits where it is fitted.
    fn take(&self, state: &mut StateDict) -> Result<(String, Converted, Option<f64>)> {
        let Self {
            kind,
            ref name,
            ref rows,
            columns,
            config,
            compression,
            uma_chunk_size,
        } = *self;
        let (mut name, mut error, device) = (name.clone(), None, &Device::Cpu);
        let converted = match kind {
            Kind::Bag => {
                let bag = state.hashed_embedding_bag(&name, rows[0], columns, config, device)?;
                Converted::Bag(bag)
            }
            Kind::Embedding => {
                let config = HashedEmbeddingConfig {
                    padding_idx: config.padding_idx,
                    ..Default::default()
                };
                let layer = state.hashed_embedding(&name, rows[0], columns, config, device)?;
                name = join(&name, "hashed_embedding_bag");
                Converted::Bag(layer.bag().clone())
            }
            Kind::Robe => {
                let bag = state.robe(&name, rows[0], columns, uma_chunk_size, config, device)?;
                Converted::Bag(bag)
            }
            Kind::RobeDlrm => {
                let tables = rows
                    .iter()
                    .enumerate()
                    .map(|(t, &rows)| (t.to_string(), rows));
                let collection =
                    state.robe_dlrm(&name, tables, columns, uma_chunk_size, config, device)?;
                Converted::Collection(collection)
            }
            Kind::Fit => {
                let key = join(&name, "weight");
                let table = state.take(&key, device)?;
                let (bag, relative) =
                    HashedEmbeddingBag::fit(&table, compression, config).context(key)?;
                error = Some(relative);
                Converted::Bag(bag)
            }
        };
        Ok((name, converted, error))
    }
}

/// What goes into the checkpoint.
enum Converted {
    Bag(HashedEmbeddingBag),
    Collection(HashedEmbeddingBagCollection),
}

impl<'a> From<&'a Converted> for Layer<'a> {
    fn from(converted: &'a Converted) -> Self {
        match converted {
            Converted::Bag(bag) => bag.into(),
            Converted::Collection(collection) => collection.into(),
        }
    }
}

fn main() -> Result<()> {
    print!("{}", run(Options::parse())?);
    Ok(())
}

/// Does what is asked, and says what came of it.
fn run(options: Options) -> Result<String> {
    if let Some(checkpoint) = &options.inspect {
        return inspect(checkpoint);
    }
    let state_dict = options.state_dict.context("no state dict")?;
    let mut state = match &options.key {
        None => StateDict::open(&state_dict)?,
        Some(key) => StateDict::open_nested(&state_dict, key)?,
    };
    let Some(checkpoint) = options.checkpoint else {
        return list(state);
    };
    let requests = [
        options.bag,
        options.embedding,
        options.robe,
        options.robe_dlrm,
        options.fit,
    ]
    .concat();
    ensure!(
        !requests.is_empty(),
        "which entries are hashed layers? --bag, --embedding, --robe, --robe-dlrm and --fit say so; `convert {}` lists the entries",
        state_dict.display()
    );
    let (mut layers, mut report) = (vec![], String::new());
    for request in &requests {
        let (name, converted, error) = request.take(&mut state)?;
        if let Some(error) = error {
            writeln!(
                report,
                "{name:?} is fitted with a relative error of {error:.4}"
            )?;
        }
        layers.push((name, converted));
    }
    let rest = match options.layers_only {
        true => vec![],
        false => rest(&mut state).context("--layers-only leaves out what is no hashed layer")?,
    };
    checkpoint::save(
        &checkpoint,
        rest,
        layers.iter().map(|(name, layer)| (name, layer)),
    )?;
    report += &inspect(&checkpoint)?;
    Ok(report)
}

/// All that is left in a state dict.
fn rest(state: &mut StateDict) -> Result<Vec<(String, Tensor)>> {
    let keys: Vec<_> = state.keys().map(str::to_string).collect();
    keys.into_iter()
        .map(|key| {
            let tensor = state.take(&key, &Device::Cpu)?;
            Ok((key, tensor))
        })
        .collect()
}

fn list(mut state: StateDict) -> Result<String> {
    let mut table = new_table(&["entry", "dtype", "shape"]);
    for (key, tensor) in rest(&mut state)? {
        table.add_row(tensor_row(&key, &tensor));
    }
    Ok(format!("{table}\n"))
}

/// What a checkpoint holds, once it is checked: its description, and that every hashed value is finite.
fn inspect(path: &Path) -> Result<String> {
    let checkpoint = Checkpoint::open(path)?;
    let columns = [
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
    let mut table = new_table(&columns);
    let mut hashed = vec![];
    let mut add = |name: &str,
                   rows: &[usize],
                   dim: usize,
                   mode,
                   padding_idx: Option<i64>,
                   hash|
     -> Result<()> {
        let key = join(name, "hashed_weight");
        let weight = checkpoint.tensor(&key, &Device::Cpu)?;
        let values: Vec<f64> = weight.to_dtype(DType::F64)?.to_vec1()?;
        let broken = values.iter().filter(|value| !value.is_finite()).count();
        ensure!(
            broken == 0,
            "{key}: {broken} of {} values are not finite",
            values.len()
        );
        let total = rows.iter().map(|&rows| rows as f64).sum::<f64>() * dim as f64;
        let rows: Vec<_> = rows.iter().map(usize::to_string).collect();
        table.add_row([
            key.clone(),
            rows.join(" + "),
            dim.to_string(),
            format!("{mode:?}").to_lowercase(),
            padding_idx.map_or("-".to_string(), |row| row.to_string()),
            describe(hash),
            weight.dtype().as_str().to_string(),
            values.len().to_string(),
            format!("1/{:.1}", total / values.len() as f64),
            (values.len() * weight.dtype().size_in_bytes()).to_string(),
        ]);
        hashed.push(key);
        Ok(())
    };
    for (name, spec) in checkpoint.layers() {
        let rows = [spec.num_embeddings];
        add(
            name,
            &rows,
            spec.embedding_dim,
            spec.mode,
            spec.padding_idx,
            spec.hash,
        )?;
    }
    for (name, spec) in checkpoint.collections() {
        let rows: Vec<_> = spec
            .tables
            .iter()
            .map(|table| table.num_embeddings)
            .collect();
        add(
            name,
            &rows,
            spec.embedding_dim,
            spec.mode,
            spec.padding_idx,
            spec.hash,
        )?;
    }
    let mut report = format!("{table}\n");
    let mut others = new_table(&["other tensor", "dtype", "shape"]);
    for name in checkpoint
        .tensor_names()
        .filter(|name| !hashed.contains(name))
    {
        others.add_row(tensor_row(&name, &checkpoint.tensor(&name, &Device::Cpu)?));
    }
    if !others.is_empty() {
        writeln!(report, "{others}")?;
    }
    let bytes = std::fs::metadata(path)?.len();
    writeln!(report, "{}: {bytes} bytes, checked", path.display())?;
    Ok(report)
}

fn describe(hash: Hash) -> String {
    let blocks = |family, seed| {
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

fn tensor_row(key: &str, tensor: &Tensor) -> [String; 3] {
    let dims = format!("{:?}", tensor.dims());
    [key.to_string(), tensor.dtype().as_str().to_string(), dims]
}

/// The name of what is called `name` under `prefix`.
fn join(prefix: &str, name: &str) -> String {
    match prefix {
        "" => name.to_string(),
        prefix => format!("{prefix}.{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Module;
    use tempfile::TempDir;

    /// What `convert` prints or says of these arguments; `{}` is a folder of their own.
    fn convert(folder: &TempDir, arguments: &str) -> Result<String> {
        let arguments = arguments.replace("{}", &folder.path().display().to_string());
        let arguments = ["convert"].into_iter().chain(arguments.split_whitespace());
        run(Options::try_parse_from(arguments)?)
    }

    #[track_caller]
    fn assert_says(said: &str, lines: &[&str]) {
        let said: Vec<String> = said
            .lines()
            .map(|line| line.replace(['│', '┆'], " "))
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        for line in lines {
            assert!(
                said.iter().any(|said| said.contains(line)),
                "{said:#?}\nlacks {line}"
            );
        }
    }

    #[test]
    fn every_kind() -> Result<()> {
        let folder = tempfile::tempdir()?;
        for (arguments, lines) in [
            (
                "tests/golden/original.pth {}/out --bag :1000x16,mode=mean,padding_idx=-1,include_last_offset",
                &["1000 16 mean -1 HashedEmbeddingBag's f32 1600 1/10.0 6400", "bytes, checked"][..],
            ),
            (
                "tests/golden/original_embedding.pth {}/out --key state_dict --embedding words:3000x10",
                &["words.hashed_embedding_bag.hashed_weight 3000 10 sum - HashedEmbeddingBag's f32 900", "head.weight f32 [2, 10]"],
            ),
            (
                "tests/golden/robe.pth {}/out --robe :1000x20,uma_chunk_size=8,val_offset=1234",
                &["1000 20 sum - ROBE's, block 8 f32 500 1/40.0 2000"],
            ),
            (
                "tests/golden/robe_cpu.pth {}/out --robe :1000x10,uma_chunk_size=4,val_offset=77",
                &["1000 10 sum - ROBE's, block 4 f32 300"],
            ),
            (
                "tests/golden/robe_dlrm.pth {}/out --key state_dict --robe-dlrm :100+7+1000x16,uma_chunk_size=8",
                &["100 + 7 + 1000 16 sum - ROBE's, block 8 f32 640 1/27.7 2560", "bot_l.0.weight f32 [16, 13]"],
            ),
            (
                "tests/golden/original_embedding.pth {}/out --key state_dict --fit head,compression=1/2",
                &["\"head\" is fitted with a relative error of", "head.hashed_weight 2 10 sum - balanced, seed 0, block 4, signed f32 12"],
            ),
            (
                "tests/golden/robe_dlrm.safetensors {}/out --robe-dlrm :100+7+1000x16,uma_chunk_size=8 --layers-only",
                &["100 + 7 + 1000 16"],
            ),
        ] {
            let said = convert(&folder, arguments)?;
            assert_says(&said, lines);
            assert!(said.ends_with(&convert(&folder, "--inspect {}/out")?));
        }
        assert!(!convert(&folder, "--inspect {}/out")?.contains("bot_l"));
        Ok(())
    }

    #[test]
    fn the_layer_is_the_one_imported() -> Result<()> {
        let folder = tempfile::tempdir()?;
        convert(
            &folder,
            "tests/golden/robe.pth {}/out --robe :1000x20,uma_chunk_size=8,val_offset=1234",
        )?;
        let opened = Checkpoint::open(folder.path().join("out"))?;
        let opened = opened.hashed_embedding_bag("", DType::F32, &Device::Cpu)?;
        let mut state = StateDict::open("tests/golden/robe.pth")?;
        let config = HashedEmbeddingBagConfig {
            first_row: 1234,
            ..Default::default()
        };
        let imported = state.robe("", 1000, 20, 8, config, &Device::Cpu)?;
        let indices = Tensor::new(&[[0u32, 1, 999], [7, 7, 500]], &Device::Cpu)?;
        assert_eq!(
            opened.forward(&indices)?.to_vec2::<f32>()?,
            imported.forward(&indices)?.to_vec2::<f32>()?
        );
        Ok(())
    }

    #[test]
    fn what_it_says_of_mistakes() -> Result<()> {
        let folder = tempfile::tempdir()?;
        for (arguments, said) in [
            (
                "tests/golden/robe.pth {}/out",
                "which entries are hashed layers?",
            ),
            (
                "tests/golden/robe.pth {}/out --bag 1000x16",
                "no :ROWSxCOLUMNS",
            ),
            (
                "tests/golden/robe.pth {}/out --bag :1000",
                "no x in ROWSxCOLUMNS",
            ),
            (
                "tests/golden/robe.pth {}/out --bag :1e3x16",
                "rows must be a number in range, got \"1e3\"",
            ),
            (
                "tests/golden/robe.pth {}/out --bag :5+5x16",
                "one table has one number of rows",
            ),
            (
                "tests/golden/robe.pth {}/out --bag :5x16,mode=median",
                "mode must be sum, mean or max",
            ),
            (
                "tests/golden/robe.pth {}/out --bag :5x16,val_offset=3",
                "unknown option \"val_offset\", only mode, padding_idx, include_last_offset",
            ),
            (
                "tests/golden/robe.pth {}/out --bag :1000x16",
                "random_numbers is no entry of this module",
            ),
            (
                "tests/golden/robe_dlrm.pth {}/out --bag :1000x16",
                "the state dict may be under state_dict",
            ),
            (
                "--inspect tests/golden/robe_dlrm.safetensors",
                "no hashed_embedding_bag in __metadata__",
            ),
            ("--inspect {}/out --layers-only", "cannot be used with"),
            ("{}/none.pth", "No such file"),
        ] {
            let got = format!("{:#}", convert(&folder, arguments).unwrap_err());
            assert!(got.contains(said), "{got}\nlacks {said}");
        }
        assert!(
            !folder.path().join("out").exists(),
            "nothing is written on an error"
        );

        let nan = HashedEmbeddingBag::new(
            Tensor::new(&[1f32, f32::NAN], &Device::Cpu)?,
            10,
            2,
            HashedEmbeddingBagConfig::default(),
        )?;
        checkpoint::save(folder.path().join("nan"), [], [("a", &nan)])?;
        let got = convert(&folder, "--inspect {}/nan")
            .unwrap_err()
            .to_string();
        assert_eq!(got, "a.hashed_weight: 1 of 2 values are not finite");
        Ok(())
    }

    #[test]
    fn listing() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let said = convert(&folder, "tests/golden/robe.pth")?;
        assert_says(
            &said,
            &[
                "hashed_weight f32 [500]",
                "random_numbers i64 [51]",
                "signature i64 [2]",
            ],
        );
        Ok(())
    }
}
