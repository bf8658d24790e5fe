//! The command line. It describes the layers of a state dict, which does not do so itself.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{bail, ensure, Context, Result};
use candle_hashed_embedding_bag::{Bits, HashedEmbeddingBagConfig, Mode};
use clap::Parser;

/// Writes the hashed layers of a PyTorch state dict, and its other tensors, as a self-describing checkpoint.
///
/// A checkpoint of this crate can be given in its place, to round its layers to fewer bits.
///
/// A state dict does not say how large a virtual table is: name each layer, by its prefix in the state dict, with its rows
/// and columns. What DistributedDataParallel (module.) or torch.compile (_orig_mod.) put before the keys is part of the
/// prefix. Without a CHECKPOINT to write, the entries of the state dict are listed.
#[derive(Parser)]
#[command(arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Options {
    /// The state dict: .pth, .pt or .safetensors; with --bits also a checkpoint
    #[arg(required_unless_present = "inspect")]
    pub state_dict: Option<PathBuf>,
    /// The checkpoint to write
    pub checkpoint: Option<PathBuf>,
    /// The key of the state dict, where the file holds more: the training scripts of many models use state_dict. Dots lead
    /// further down: state_dict.generator, models.0
    #[arg(long)]
    pub key: Option<String>,
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
    /// HashedEmbeddingBag of the ROBE package with hmode="lma_hash". Options: key_bits (4), keys_to_use (8), and those of --robe
    #[arg(long, value_name = "NAME:ROWSxCOLUMNS[,OPTION=VALUE]", value_parser = parser(Kind::Lma))]
    lma: Vec<Request>,
    /// The tables of the DLRM of SCMA's authors, which become a collection; NAME is the prefix of the model, mostly empty. Options:
    /// table (the .npz file with its big_min_hash_table, required), and those of --bag
    #[arg(long, value_name = "NAME:ROWS+ROWS+…xCOLUMNS,table=FILE[,OPTION=VALUE]", value_parser = parser(Kind::Scma))]
    scma: Vec<Request>,
    /// A table that is not hashed, NAME.weight of torch.nn.EmbeddingBag or Embedding: a hashed layer is fitted to it.
    /// Options: compression (such as 1/64), and those of --bag
    #[arg(long, value_name = "NAME[,OPTION=VALUE]", value_parser = parser(Kind::Fit))]
    fit: Vec<Request>,
    /// Leave out the tensors of the state dict that belong to none of these layers
    #[arg(long)]
    pub layers_only: bool,
    /// Round the hashed layers to 8 or 4 bits per value, for serving: a quarter or an eighth of the bytes of f32. Such layers do
    /// not train
    #[arg(long, value_name = "8|4", value_parser = bits, requires = "checkpoint")]
    pub bits: Option<Bits>,
    /// List what a checkpoint holds, and check it
    #[arg(long, value_name = "CHECKPOINT", exclusive = true)]
    pub inspect: Option<PathBuf>,
}

impl Options {
    /// All layers to convert.
    pub fn requests(&self) -> impl Iterator<Item = &Request> {
        [
            &self.bag,
            &self.embedding,
            &self.robe,
            &self.robe_dlrm,
            &self.lma,
            &self.scma,
            &self.fit,
        ]
        .into_iter()
        .flatten()
    }
}

const EXAMPLES: &str = "\
Examples:
  convert model.pth                                                    # lists its entries
  convert model.pth model.safetensors --bag user:6040x16,mode=mean     # its entry is user.hashed_weight
  convert emb.pth emb.safetensors --robe :100000x16,uma_chunk_size=8   # the state dict is the module's own
  convert dlrm.pth dlrm.safetensors --key state_dict --robe-dlrm :1460+583+10131227x16,uma_chunk_size=8
  convert emb.pth emb.safetensors --lma :100000x16,key_bits=4,keys_to_use=8
  convert dlrm.pth dlrm.safetensors --key state_dict --scma :1460+583+10131227x16,table=min_hash.npz
  convert gan.pth gan.safetensors --key state_dict.generator --bag module.user:6040x16   # of two models, wrapped in DDP
  convert full.pth small.safetensors --fit item,compression=1/32       # item.weight becomes item.hashed_weight
  convert model.safetensors small.safetensors --bits 8                 # rounds the layers of a checkpoint
  convert --inspect model.safetensors";

/// The PyTorch module that a layer was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Bag,
    Embedding,
    Robe,
    RobeDlrm,
    Lma,
    Scma,
    Fit,
}

impl Kind {
    /// The options that may follow `NAME:ROWSxCOLUMNS`.
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
            Self::Lma => &[
                "mode",
                "padding_idx",
                "include_last_offset",
                "uma_chunk_size",
                "val_offset",
                "key_bits",
                "keys_to_use",
            ],
            Self::Scma => &["mode", "padding_idx", "include_last_offset", "table"],
            Self::Fit => &["mode", "padding_idx", "include_last_offset", "compression"],
        }
    }
}

/// A layer to convert, as the command line describes it.
#[derive(Debug, Clone)]
pub struct Request {
    pub kind: Kind,
    pub name: String,
    /// Rows of each table; empty for [`Kind::Fit`], whose table has a known size.
    pub rows: Vec<usize>,
    pub columns: usize,
    pub config: HashedEmbeddingBagConfig,
    /// Only for [`Kind::Fit`].
    pub compression: f64,
    pub uma_chunk_size: usize,
    /// Only for [`Kind::Lma`].
    pub key_bits: usize,
    pub keys_to_use: usize,
    /// Only for [`Kind::Scma`].
    pub table: Option<PathBuf>,
}

/// Parses `NAME:ROWSxCOLUMNS[,OPTION=VALUE]`, or `NAME[,OPTION=VALUE]` for [`Kind::Fit`].
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
            key_bits: 4,
            keys_to_use: 8,
            table: None,
        };
        if kind != Kind::Fit {
            let (name, size) = head.rsplit_once(':').context("no :ROWSxCOLUMNS")?;
            let (rows, columns) = size.split_once('x').context("no x in ROWSxCOLUMNS")?;
            let rows = rows.split('+').map(|rows| number("rows", rows));
            request.name = name.to_string();
            request.rows = rows.collect::<Result<_>>()?;
            request.columns = number("columns", columns)?;
            ensure!(
                request.rows.len() == 1 || matches!(kind, Kind::RobeDlrm | Kind::Scma),
                "one table has one number of rows"
            );
        }
        for option in options.split(',').filter(|option| !option.is_empty()) {
            request.set(option)?;
        }
        Ok(request)
    }
}

fn bits(text: &str) -> Result<Bits> {
    Bits::try_from(number::<u32>("bits", text)?).map_err(anyhow::Error::msg)
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
            "key_bits" => self.key_bits = number(key, value)?,
            "keys_to_use" => self.keys_to_use = number(key, value)?,
            "table" => self.table = Some(value.into()),
            "val_offset" => config.first_row = number(key, value)?,
            "compression" => {
                let (over, under) = value.split_once('/').unwrap_or((value, "1"));
                self.compression = number::<f64>(key, over)? / number::<f64>(key, under)?;
            }
            _ => bail!("option {key:?} is not implemented"),
        }
        Ok(())
    }
}
