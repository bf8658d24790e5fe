//! The command line.

use std::fmt;
use std::num::{NonZeroU16, NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use candle_core::Device;
use candle_hashed_embedding_bag::distributed::World;
use candle_hashed_embedding_bag::{Bits, Gradient, Hash};
use clap::{Args, Parser, Subcommand, ValueEnum};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{json, Value};

use crate::data::{Clicks, Data, Part, Rules, Source, Split};
use crate::embeddings::EmbeddingConfig;
use crate::model::{ModelConfig, Precision, HIDDEN};
use crate::ops::TopInput;
use crate::optimizers::{TableOptimizer, MLP_DECAY};
use crate::ranks::Ranks;
use crate::resume::Saving;
use crate::train::Settings;

const STEPS_PER_EPOCH: usize = 400;
const LARGEST_BATCH: usize = 4096;
/// Smaller ones take as long as this, and learn from noise.
const SMALLEST_BATCH: usize = 32;
/// Steps that a training needs at least, for which a short log is read several times.
const FEWEST_STEPS: usize = 150;
const MOST_AGAIN: usize = 4;

/// The modulus of LMA in its package, which bounds its random numbers.
const LMA_MODULUS: i64 = 2_038_074_743;

/// Weight decay of plain tables of ratings. It is high, and matters most of all settings: a user with twenty ratings has
/// sixteen values to remember them by. Hashed tables need less, as they have fewer values to remember with.
const TABLE_DECAY: f64 = 3.0;

/// The same of interactions, where a row is all that is known of a user or an item: with much more, rows never begin to grow.
const INTERACTIONS_DECAY: f64 = 0.9;

/// Of tables with matrices, this much of it: few columns remember less, and what a matrix makes of them is not free either.
const PROJECTED_DECAY: f64 = 0.5;

/// Trains a recommender whose embedding tables are hashed, evaluates it, and recommends movies with it.
///
/// Without a subcommand it trains; without --data it makes its own ratings.
#[derive(Parser)]
#[command(name = "recommender", version, args_conflicts_with_subcommands = true)]
pub struct Options {
    /// Threads that compute [default: the cores that affinity and the quota of a container allow].
    #[arg(long, global = true, value_name = "COUNT", env = "RECOMMENDER_THREADS")]
    pub threads: Option<NonZeroUsize>,
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: Train,
}

#[derive(Subcommand)]
pub enum Command {
    /// Train a model, evaluate it on the test part and write a checkpoint.
    Train(Train),
    /// Evaluate a checkpoint on the test part, or on other data.
    Evaluate(Evaluate),
    /// Write a probability per line of a file: a click log, or pairs of a user and a movie.
    Score(Score),
    /// Print the movies a user has not seen and will like best.
    Recommend(Recommend),
    /// Train at several compressions, with several hashes and seeds: quality against size as a table, a .csv and an .svg.
    Sweep(Sweep),
    /// Write a click log in Criteo's format, with a planted structure.
    Generate(Generate),
    /// Read a click log once and write what a model reads of it, to be given as --data instead: it needs no parsing.
    Prepare(Prepare),
}

/// What a model is made of, or asked with.
#[derive(Args, Clone)]
pub struct Common {
    /// A MovieLens folder, in the .csv or the .dat layout, or a file in another --format [default: generated ratings].
    #[arg(long, value_name = "PATH", env = "RECOMMENDER_DATA")]
    pub data: Option<PathBuf>,
    /// File of the trained model [default: recommender.safetensors in the folder of temporary files].
    #[arg(long, value_name = "FILE", env = "RECOMMENDER_CHECKPOINT")]
    checkpoint: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu, env = "RECOMMENDER_DEVICE")]
    device: DeviceKind,
}

#[derive(Args)]
pub struct Train {
    #[command(flatten)]
    pub common: Common,
    #[command(flatten)]
    reading: Reading,
    #[command(flatten)]
    fit: Fit,
    /// Parameters kept per value of the embedding tables, such as 1/16 or 0.0625; 1 is plain tables, not hashed.
    /// [default: 1/2 of MovieLens, else 1/16].
    #[arg(long, allow_negative_numbers = true, value_parser = parse_compression)]
    compression: Option<f64>,
    #[arg(long, default_value = "default", help = HASH_HELP)]
    hash: HashChoice,
    /// Columns of the large embedding tables, if a learned matrix per table is to make --embedding-dim of them.
    #[arg(long, value_name = "COLUMNS")]
    inner_dim: Option<NonZeroU16>,
    /// Bits per value of the embedding tables in the checkpoint: 8 or 4, to which they are rounded after the training, or 32. The test
    /// part is scored with both [default: 4 of MovieLens, 8 of clicks, 32 of interactions].
    #[arg(long, value_name = "32|8|4", value_parser = parse_bits)]
    bits: Option<TableBits>,
    /// Rows of an embedding table with fewer training examples share one row of it; 0 gives each its own [default: 10, of interactions 0].
    #[arg(long, value_name = "EXAMPLES")]
    min_count: Option<u32>,
    /// Decides the initial values, the order of the examples and the generated ratings.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// What updates the embedding tables. With all but AdamW, a step costs what it looks up, however large the tables are.
    #[arg(long, value_enum, default_value_t = TableOptimizer::Adamw)]
    pub table_optimizer: TableOptimizer,
    /// Learning rate of the embedding tables in the first step [default: 3 times --lr for AdamW, 10 for Adagrad, 1 for sparse Adam, 500
    /// for SGD].
    #[arg(long, allow_negative_numbers = true, value_parser = parse_lr)]
    table_lr: Option<f64>,
    #[command(flatten)]
    labels: Labels,
    #[command(flatten)]
    knobs: Knobs,
    #[command(flatten)]
    layers: Layers,
    /// Precision of matrix products on a GPU.
    #[arg(long, value_enum, default_value_t = PrecisionKind::F32)]
    precision: PrecisionKind,
    /// Keep the train part of a click log on the device. Examples are then shuffled all together and not in windows.
    #[arg(long, requires = "format")]
    resident: bool,
    /// Sum the gradients of the embedding tables on a GPU in one order, which takes longer: the same seed then writes the same checkpoint,
    /// as it does on the CPU.
    #[arg(long)]
    deterministic: bool,
    #[command(flatten)]
    stopping: Stopping,
    #[command(flatten)]
    ranks: RankOptions,
}

#[derive(Args)]
pub struct Evaluate {
    #[command(flatten)]
    pub common: Common,
    #[command(flatten)]
    pub reading: Reading,
    /// The part of the data [default: test of what the model was trained on, all of other data].
    #[arg(long, value_enum)]
    pub part: Option<PartKind>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum PartKind {
    Train,
    Valid,
    Test,
    All,
}

impl From<PartKind> for Part {
    fn from(part: PartKind) -> Self {
        match part {
            PartKind::Train => Self::Train,
            PartKind::Valid => Self::Valid,
            PartKind::Test => Self::Test,
            PartKind::All => Self::All,
        }
    }
}

#[derive(Args)]
pub struct Score {
    /// A click log, in which labels may be missing, as text or Parquet, or text with the ids of a user and a movie in each line;
    /// - reads the standard input.
    pub file: PathBuf,
    /// File of the trained model [default: recommender.safetensors in the folder of temporary files].
    #[arg(long, value_name = "FILE", env = "RECOMMENDER_CHECKPOINT")]
    checkpoint: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu, env = "RECOMMENDER_DEVICE")]
    device: DeviceKind,
    /// Write the probabilities there [default: the standard output].
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Write an empty line for a line that does not fit the format, instead of stopping at the first.
    #[arg(long)]
    pub skip_malformed: bool,
}

#[derive(Args)]
pub struct Recommend {
    #[command(flatten)]
    pub common: Common,
    /// Id of the user, as in the ratings.
    #[arg(long, value_name = "ID", allow_negative_numbers = true)]
    pub user: i64,
    /// How many movies.
    #[arg(short = 'k', long, default_value = "10")]
    pub count: NonZeroUsize,
}

#[derive(Args)]
pub struct Sweep {
    /// A MovieLens folder, or a file in another --format [default: generated ratings].
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    #[command(flatten)]
    reading: Reading,
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    #[command(flatten)]
    fit: Fit,
    /// Bytes that the embedding tables may take, per byte of plain tables in f32, which are trained too.
    #[arg(long, value_delimiter = ',', default_value = "1/4,1/16,1/64", value_parser = parse_compression)]
    pub sizes: Vec<f64>,
    #[arg(long, value_delimiter = ',', default_value = "default", help = HASH_HELP)]
    pub hashes: Vec<HashChoice>,
    /// Columns of the large tables, see --inner-dim of a training; `none` is without matrices [default: none, and half of
    /// --embedding-dim].
    #[arg(long, value_delimiter = ',', value_name = "COLUMNS", value_parser = parse_inner_dim)]
    inner_dims: Vec<InnerDim>,
    /// Bits per value of the embedding tables, to which they are rounded after the training.
    #[arg(long, value_delimiter = ',', default_value = "32,8,4", value_parser = parse_bits)]
    pub bits: Vec<TableBits>,
    /// How often to train each model: with the seeds 1, 2, …
    #[arg(long, default_value = "3")]
    pub seeds: NonZeroU64,
    /// Folder for auc-vs-size.csv and auc-vs-size.svg. Runs that the former already holds are not repeated.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub out: PathBuf,
    /// Trainings side by side, each by a process of its own with so many of the cores. They do not change the results.
    #[arg(long, default_value = "1")]
    pub jobs: NonZeroUsize,
    /// Of all trainings, only this one; its runs are printed and not written. This is how --jobs divides the work.
    #[arg(long, hide = true)]
    pub only: Option<usize>,
}

#[derive(Args)]
pub struct Generate {
    /// The file to write, compressed if its name ends in .gz.
    pub file: PathBuf,
    #[arg(long, default_value = "100000")]
    pub lines: NonZeroU64,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

#[derive(Args)]
pub struct Prepare {
    /// The log: label, 13 integers, 26 categories; may be compressed by gzip.
    pub log: PathBuf,
    /// The file to write, a safetensors file.
    pub out: PathBuf,
    /// The rows of each category's table; categories are hashed into them.
    #[arg(long, value_name = "ROWS", default_value = "100000")]
    rows_per_field: NonZeroU32,
    /// Skip the lines that do not fit the format, and count them, instead of stopping at the first.
    #[arg(long)]
    skip_malformed: bool,
}

/// How to read the data.
#[derive(Args)]
pub struct Reading {
    #[arg(long, value_enum, default_value_t = Format::Movielens, requires = "data")]
    pub format: Format,
    /// Of a click log, skip the lines that do not fit the format, and count them, instead of stopping at the first.
    #[arg(long, requires = "format")]
    pub skip_malformed: bool,
}

/// How to train.
#[derive(Args)]
struct Fit {
    #[arg(long, default_value = "16")]
    embedding_dim: NonZeroU16,
    /// Of a click log, the rows of each category's table; categories are hashed into them [default: 100000, or as prepared].
    #[arg(long, value_name = "ROWS", requires = "format")]
    rows_per_field: Option<NonZeroU32>,
    /// Passes over the train part [default: 8 of ratings, 1 of clicks, and up to 4 of a short log].
    #[arg(long)]
    epochs: Option<NonZeroUsize>,
    /// Examples per step, of all ranks together [default: such that an epoch has about 400 steps, at least 32 and at most about 4096].
    #[arg(long)]
    batch_size: Option<NonZeroUsize>,
    /// Learning rate of the first step; it falls linearly to zero.
    #[arg(long, default_value = "0.002", allow_negative_numbers = true, value_parser = parse_lr)]
    lr: f64,
}

/// Trainings that are ended and go on.
#[derive(Args)]
struct Stopping {
    /// Save the whole state of the training every so many steps, in a file beside the checkpoint whose name ends in .resume.
    #[arg(long, value_name = "STEPS")]
    save_every: Option<NonZeroUsize>,
    /// Go on from what --save-every has saved, if that is there; the model will be the one of a training without a break. All other
    /// options and the data must be the same.
    #[arg(long)]
    resume: bool,
}

/// Several processes, started by torchrun or the like, that train together.
#[derive(Args)]
struct RankOptions {
    /// Shards of the train part, a multiple of the number of ranks: with the same number, any number of ranks sees the same
    /// batches [default: one per rank].
    #[arg(long)]
    shards: Option<NonZeroUsize>,
    /// How long a rank may keep the others waiting before it counts as lost.
    #[arg(long, value_name = "SECONDS", default_value = "120")]
    rank_timeout: NonZeroU32,
}

/// What is learnt of a MovieLens set.
#[derive(Args)]
struct Labels {
    /// The fewest stars that count as liked.
    #[arg(long, value_name = "STARS", default_value = "4", allow_negative_numbers = true, value_parser = parse_stars)]
    like_from: f32,
    /// How ratings are divided into the train, valid and test parts, 8 : 1 : 1.
    #[arg(long, value_enum, default_value_t = SplitKind::Hash)]
    split: SplitKind,
}

#[derive(Clone, Copy, ValueEnum)]
enum SplitKind {
    /// By a hash of the row number.
    Hash,
    /// By the time of the rating: the first eight tenths are the train part.
    Time,
}

/// How the training goes, beside the rate of learning.
#[derive(Args)]
struct Knobs {
    /// End the training after so many epochs without a better one. The learning rate falls as if it did not end.
    #[arg(long, value_name = "EPOCHS")]
    patience: Option<NonZeroUsize>,
    /// Weight decay of the MLPs.
    #[arg(long, default_value = "0.01", allow_negative_numbers = true, value_parser = parse_decay)]
    weight_decay: f64,
    /// Weight decay of the embedding tables [default: 3 times the root of --compression for ratings, 0 for clicks].
    #[arg(long, allow_negative_numbers = true, value_parser = parse_decay)]
    table_decay: Option<f64>,
    /// How often an example that is liked or clicked counts. Probabilities grow with it.
    #[arg(long, default_value = "1", value_name = "WEIGHT", allow_negative_numbers = true, value_parser = parse_lr)]
    positive_weight: f64,
    /// Begin with the values of this checkpoint and not with random ones. It must have the same tables, in f32 (--bits 32).
    #[arg(long, value_name = "FILE")]
    warm_start: Option<PathBuf>,
    /// Seconds between lines of progress, if the standard error is no terminal.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    progress_seconds: u32,
}

/// The layers that follow the embedding tables.
#[derive(Args)]
struct Layers {
    /// Widths of the hidden layers of the MLP of the numbers.
    #[arg(long, value_delimiter = ',', value_name = "WIDTHS", value_parser = parse_width, default_values_t = HIDDEN)]
    bottom_mlp: Vec<usize>,
    /// Widths of the hidden layers of the MLP of all vectors.
    #[arg(long, value_delimiter = ',', value_name = "WIDTHS", value_parser = parse_width, default_values_t = HIDDEN)]
    top_mlp: Vec<usize>,
    /// What the latter reads besides the dots of all pairs of vectors.
    #[arg(long, value_enum, default_value_t = TopInputKind::Vectors)]
    top_input: TopInputKind,
}

/// What the embedding tables are like, if nothing else is said. README.md has the figures by which it was chosen.
struct Tables {
    compression: f64,
    bits: TableBits,
    min_count: u32,
}

impl Format {
    fn tables(self) -> Tables {
        match self {
            Self::Movielens => Tables {
                compression: 1.0 / 2.0,
                bits: TableBits::Rounded(Bits::Four),
                min_count: 10,
            },
            // Few items have ten interactions.
            Self::Interactions => Tables {
                compression: 1.0 / 16.0,
                bits: TableBits::Exact,
                min_count: 0,
            },
            Self::Criteo => Tables {
                compression: 1.0 / 16.0,
                bits: TableBits::Rounded(Bits::Eight),
                min_count: 10,
            },
        }
    }
}

/// How a checkpoint holds the embedding tables.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TableBits {
    /// As they were trained, in f32.
    Exact,
    Rounded(Bits),
}

impl TableBits {
    /// 32, 8 or 4.
    pub fn number(self) -> u32 {
        match self {
            Self::Exact => 32,
            Self::Rounded(bits) => bits.into(),
        }
    }
}

/// The columns of tables with matrices.
#[derive(Clone, Copy)]
struct InnerDim(Option<usize>);

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Format {
    /// Ratings of movies, as GroupLens publishes them.
    Movielens,
    /// What users visited, bought or read: a line is a user's number and those of their items; may be compressed by gzip.
    Interactions,
    /// Clicks on advertisements: label, 13 integers, 26 categories, separated by tabs; may be compressed by gzip.
    Criteo,
}

#[derive(Clone, Copy, ValueEnum)]
enum TopInputKind {
    /// All vectors.
    Vectors,
    /// The vector of the numbers alone, as in the DLRM of the paper.
    Bottom,
}

#[derive(Clone, Copy, ValueEnum)]
enum PrecisionKind {
    F32,
    /// f32 whose factors are rounded to 10 bits of mantissa.
    Tf32,
    /// Vectors, activations and a copy of the weights of the MLPs in bf16; parameters stay f32.
    Bf16,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum DeviceKind {
    Cpu,
    Cuda,
}

const HASH_HELP: &str = "`default`, the crate's; `balanced:8`, the same in blocks of 8 columns; `mix:8`, rows at random \
    places; `original`, that of the PyTorch package HashedEmbeddingBag; and three by which rows that the train part uses alike share \
    memory: `semantic`, the crate's, `lma` and `scma`";

/// A hash, before the embedding dimension is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HashChoice {
    Default,
    Balanced { block: usize },
    Mix { block: usize },
    Original,
    Semantic,
    Lma,
    Scma,
}

impl Options {
    pub fn command(self) -> Command {
        self.command.unwrap_or(Command::Train(self.train))
    }
}

impl Train {
    fn compression(&self) -> f64 {
        self.compression
            .unwrap_or(self.reading.format.tables().compression)
    }

    pub fn bits(&self) -> TableBits {
        self.bits.unwrap_or(self.reading.format.tables().bits)
    }

    pub fn min_count(&self) -> u32 {
        self.min_count
            .unwrap_or(self.reading.format.tables().min_count)
    }

    pub fn load(&self) -> Result<Data> {
        let data = self.common.data.as_deref();
        self.reading
            .load(data, self.fit.rows_per_field, self.seed, self.rules())
    }

    pub fn model_config(&self) -> ModelConfig {
        ModelConfig {
            embeddings: self.fit.embedding_config(
                self.compression(),
                self.hash,
                self.inner_dim.map(|columns| columns.get().into()),
            ),
            bottom: self.layers.bottom_mlp.clone(),
            top: self.layers.top_mlp.clone(),
            input: match self.layers.top_input {
                TopInputKind::Vectors => TopInput::Vectors,
                TopInputKind::Bottom => TopInput::Bottom,
            },
            gradient: match self.deterministic {
                true => Gradient::Deterministic,
                false => Gradient::Fastest,
            },
        }
    }

    /// The device of this rank.
    pub fn device(&self, world: &World) -> Result<Device> {
        match self.common.device {
            DeviceKind::Cuda if world.size > 1 => Ok(world.cuda_device()?),
            device => device.open(),
        }
    }

    pub fn connect(&self, world: &World, device: &Device) -> Result<Ranks> {
        let limit = Duration::from_secs(self.ranks.rank_timeout.get().into());
        Ranks::connect(
            world,
            device,
            limit,
            self.ranks.shards.map(NonZeroUsize::get),
        )
    }

    /// How the training is saved, whose checkpoint will be at `checkpoint`, and what it depends on.
    pub fn saving(
        &self,
        checkpoint: &Path,
        data: &Data,
        settings: &Settings,
        ranks: &Ranks,
    ) -> Saving {
        let mut facts = vec![
            ("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            ("data".to_owned(), format!("{:016x}", data.fingerprint())),
            ("--shards".to_owned(), ranks.shards().to_string()),
            ("--resident".to_owned(), self.resident.to_string()),
            ("--deterministic".to_owned(), self.deterministic.to_string()),
        ];
        for part in [Part::Train, Part::Valid, Part::Test] {
            let examples = data.examples().len(part);
            facts.push((format!("{part:?} examples"), examples.to_string()));
        }
        if let Value::Object(parameters) = self.hyper_parameters(settings) {
            let parameters = parameters.into_iter();
            facts.extend(parameters.map(|(name, value)| (format!("--{name}"), value.to_string())));
        }
        let mut path = checkpoint.as_os_str().to_owned();
        path.push(".resume");
        Saving {
            path: path.into(),
            every: self.stopping.save_every,
            resume: self.stopping.resume,
            facts,
        }
    }

    fn rules(&self) -> Rules {
        Rules {
            like_from: self.labels.like_from,
            split: match self.labels.split {
                SplitKind::Hash => Split::Hash,
                SplitKind::Time => Split::Time,
            },
        }
    }

    /// The checkpoint to begin with.
    pub fn warm_start(&self) -> Option<&Path> {
        self.knobs.warm_start.as_deref()
    }

    /// What decides the model besides the data, by the names of the command line.
    pub fn hyper_parameters(&self, settings: &Settings) -> Value {
        json!({
            "compression": self.compression(),
            "hash": self.hash.to_string(),
            "inner-dim": self.inner_dim,
            "bits": self.bits().number(),
            "min-count": self.min_count(),
            "embedding-dim": self.fit.embedding_dim,
            "bottom-mlp": self.layers.bottom_mlp,
            "top-mlp": self.layers.top_mlp,
            "top-input": name(&self.layers.top_input),
            "epochs": settings.epochs,
            "batch-size": settings.batch_size,
            "lr": settings.lr,
            "table-optimizer": name(&settings.table_optimizer),
            "table-lr": settings.table_lr,
            "table-decay": settings.table_decay,
            "weight-decay": settings.mlp_decay,
            "positive-weight": settings.positive_weight,
            "patience": settings.patience,
            "warm-start": self.knobs.warm_start.is_some(),
            "like-from": self.labels.like_from,
            "split": name(&self.labels.split),
            "precision": name(&self.precision),
            "seed": self.seed,
        })
    }

    pub fn precision(&self) -> Precision {
        match self.precision {
            PrecisionKind::F32 => Precision::F32,
            PrecisionKind::Tf32 => Precision::Tf32,
            PrecisionKind::Bf16 => Precision::Bf16,
        }
    }

    /// [`settings`](Self::settings) on several ranks, among whose shards a batch must be divisible.
    pub fn settings_on(&self, ranks: &Ranks, data: &Data) -> Settings {
        let mut settings = self.settings(data);
        if self.fit.batch_size.is_none() {
            settings.batch_size = settings.batch_size.next_multiple_of(ranks.shards());
        }
        settings
    }

    pub fn settings(&self, data: &Data) -> Settings {
        let projected = self.inner_dim.is_some();
        let of_fit = self
            .fit
            .settings(data, self.compression(), projected, self.seed);
        let knobs = &self.knobs;
        Settings {
            table_optimizer: self.table_optimizer,
            table_lr: self
                .table_lr
                .unwrap_or(self.table_optimizer.default_lr(self.fit.lr)),
            table_decay: knobs.table_decay.unwrap_or(of_fit.table_decay),
            mlp_decay: knobs.weight_decay,
            positive_weight: knobs.positive_weight,
            patience: knobs.patience,
            progress: Duration::from_secs(knobs.progress_seconds.into()),
            resident: self.resident,
            ..of_fit
        }
    }
}

impl Sweep {
    /// The examples, which no seed of the sweep changes.
    pub fn load(&self) -> Result<Data> {
        let data = self.data.as_deref();
        self.reading
            .load(data, self.fit.rows_per_field, 1, Rules::default())
    }

    pub fn device(&self) -> Result<Device> {
        self.device.open()
    }

    /// The columns that large tables are to have, if they are to have matrices.
    pub fn inner_dims(&self) -> Vec<Option<usize>> {
        if self.inner_dims.is_empty() {
            let half = usize::from(self.fit.embedding_dim.get()).div_ceil(2);
            return vec![None, Some(half)];
        }
        self.inner_dims.iter().map(|columns| columns.0).collect()
    }

    /// Tables at compression 1.
    pub fn embedding_config(&self, hash: HashChoice, inner_dim: Option<usize>) -> EmbeddingConfig {
        self.fit.embedding_config(1.0, hash, inner_dim)
    }

    pub fn settings(&self, data: &Data, config: &EmbeddingConfig, seed: u64) -> Settings {
        let projected = config.inner_dim.is_some();
        self.fit.settings(data, config.compression, projected, seed)
    }

    /// What the examples are called in the results.
    pub fn data(&self) -> String {
        self.data
            .as_ref()
            .map_or_else(|| "generated".to_owned(), |path| path.display().to_string())
    }
}

impl Prepare {
    pub fn open(&self) -> Result<Clicks> {
        Clicks::open(
            &self.log,
            Some(self.rows_per_field.get()),
            self.skip_malformed,
        )
    }
}

impl Reading {
    fn load(
        &self,
        path: Option<&Path>,
        rows: Option<NonZeroU32>,
        seed: u64,
        rules: Rules,
    ) -> Result<Data> {
        ensure!(
            self.format == Format::Movielens || rules == Rules::default(),
            "--like-from and --split are for ratings with stars and times: leave out --format"
        );
        Ok(match self.format {
            Format::Movielens => {
                let source = match path {
                    Some(dir) => Source::Files {
                        dir: dir.to_owned(),
                        rules,
                    },
                    None => {
                        ensure!(
                            rules == Rules::default(),
                            "--like-from and --split need --data: generated ratings have neither stars nor times"
                        );
                        Source::Generated { seed }
                    }
                };
                Data::Ratings(source.load()?)
            }
            Format::Interactions => {
                let path = path.context("--format interactions needs --data")?;
                Data::Ratings(Source::Interactions(path.to_owned()).load()?)
            }
            Format::Criteo => {
                let path = path.context("--format criteo needs --data")?;
                let rows = rows.map(NonZeroU32::get);
                Data::Clicks(Clicks::open(path, rows, self.skip_malformed)?)
            }
        })
    }
}

fn checkpoint(given: &Option<PathBuf>) -> PathBuf {
    given
        .clone()
        .unwrap_or_else(|| std::env::temp_dir().join("recommender.safetensors"))
}

impl Score {
    pub fn checkpoint(&self) -> PathBuf {
        checkpoint(&self.checkpoint)
    }

    pub fn device(&self) -> Result<Device> {
        self.device.open()
    }
}

impl Common {
    pub fn checkpoint(&self) -> PathBuf {
        checkpoint(&self.checkpoint)
    }

    pub fn device(&self) -> Result<Device> {
        self.device.open()
    }

    pub fn is_on_cpu(&self) -> bool {
        self.device == DeviceKind::Cpu
    }
}

impl DeviceKind {
    fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => {
                ensure!(
                    candle_core::utils::cuda_is_available(),
                    "built without CUDA: rebuild with --features cuda"
                );
                Device::new_cuda(0).context("no CUDA device")
            }
        }
    }
}

impl Fit {
    fn embedding_config(
        &self,
        compression: f64,
        hash: HashChoice,
        inner_dim: Option<usize>,
    ) -> EmbeddingConfig {
        let embedding_dim = usize::from(self.embedding_dim.get());
        let default = Hash::default_for(inner_dim.unwrap_or(embedding_dim));
        EmbeddingConfig {
            embedding_dim,
            inner_dim,
            compression,
            hash: match hash {
                HashChoice::Default => default,
                HashChoice::Balanced { block } => Hash::balanced(block),
                HashChoice::Mix { block } => Hash::mix(block),
                HashChoice::Original => Hash::original(),
                HashChoice::Semantic => Hash::semantic(default.block()),
                HashChoice::Lma => lma(default.block()),
                HashChoice::Scma => Hash::slot_table(default.block()),
            },
        }
    }

    fn settings(&self, data: &Data, compression: f64, projected: bool, seed: u64) -> Settings {
        // A user's taste is learnt by going over their ratings again; a log is long, and its categories come again.
        let (epochs, table_decay) = match data {
            Data::Ratings(ratings) => {
                let decay = match ratings.source {
                    Source::Interactions(_) => INTERACTIONS_DECAY,
                    Source::Generated { .. } | Source::Files { .. } => TABLE_DECAY,
                };
                let decay = match projected {
                    true => PROJECTED_DECAY * decay,
                    false => decay,
                };
                (8, decay * compression.sqrt())
            }
            Data::Clicks(_) => (1, 0.0),
        };
        // Weight decay acts once per step, so it is the number of steps that must not depend on the size of the data for
        // one setting to suit all of it.
        let examples = data.examples().len(Part::Train);
        let batch_size = examples.div_ceil(STEPS_PER_EPOCH);
        let batch_size = batch_size.clamp(SMALLEST_BATCH, LARGEST_BATCH);
        let batch_size = self.batch_size.map_or(batch_size, NonZeroUsize::get);
        // A short log is read again, as its one epoch would have too few steps.
        let again = match data {
            Data::Clicks(_) => FEWEST_STEPS.div_ceil(examples.div_ceil(batch_size).max(1)),
            Data::Ratings(_) => 1,
        };
        let epochs = epochs * again.clamp(1, MOST_AGAIN);
        Settings {
            epochs: self.epochs.map_or(epochs, NonZeroUsize::get),
            batch_size,
            lr: self.lr,
            table_optimizer: TableOptimizer::Adamw,
            table_lr: TableOptimizer::Adamw.default_lr(self.lr),
            table_decay,
            mlp_decay: MLP_DECAY,
            positive_weight: 1.0,
            patience: None,
            progress: Duration::from_secs(30),
            seed,
            resident: false,
        }
    }
}

impl FromStr for HashChoice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |block: &str| -> Result<usize> {
            let block = block.parse().context("its block is no number")?;
            // A hash is checked where it is bound to a length; any one block would do.
            Hash::balanced(block).check_len(block)?;
            Ok(block)
        };
        Ok(match text.split_once(':') {
            None if text == "default" => Self::Default,
            None if text == "original" => Self::Original,
            None if text == "semantic" => Self::Semantic,
            None if text == "lma" => Self::Lma,
            None if text == "scma" => Self::Scma,
            Some(("balanced", block)) => Self::Balanced {
                block: number(block)?,
            },
            Some(("mix", block)) => Self::Mix {
                block: number(block)?,
            },
            _ => bail!(
                "it must be default, balanced:BLOCK, mix:BLOCK, original, semantic, lma or scma"
            ),
        })
    }
}

impl fmt::Display for HashChoice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Default => write!(f, "default"),
            Self::Balanced { block } => write!(f, "balanced:{block}"),
            Self::Mix { block } => write!(f, "mix:{block}"),
            Self::Original => write!(f, "original"),
            Self::Semantic => write!(f, "semantic"),
            Self::Lma => write!(f, "lma"),
            Self::Scma => write!(f, "scma"),
        }
    }
}

/// What a value is called on the command line.
fn name(value: &impl ValueEnum) -> Option<String> {
    Some(value.to_possible_value()?.get_name().to_owned())
}

/// LMA as its package has it by default: eight keys of four bits.
fn lma(block: usize) -> Hash {
    let mut rng = StdRng::seed_from_u64(0);
    let mut numbers = vec![LMA_MODULUS];
    numbers.extend((0..26).map(|_| rng.random_range(0..LMA_MODULUS)));
    Hash::lma(&numbers, 4, 8, block).expect("the numbers are in range")
}

fn parse_bits(text: &str) -> Result<TableBits> {
    Ok(match text {
        "32" => TableBits::Exact,
        "8" => TableBits::Rounded(Bits::Eight),
        "4" => TableBits::Rounded(Bits::Four),
        _ => bail!("it must be 32, 8 or 4"),
    })
}

fn parse_inner_dim(text: &str) -> Result<InnerDim> {
    Ok(InnerDim(match text {
        "none" => None,
        columns => Some(columns.parse::<NonZeroU16>()?.get().into()),
    }))
}

fn parse_compression(text: &str) -> Result<f64> {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let value = match text.split_once('/') {
        Some((numerator, denominator)) => number(numerator)
            .zip(number(denominator))
            .map(|(numerator, denominator)| numerator / denominator),
        None => number(text),
    };
    let value = value.filter(|&value| value > 0.0 && value <= 1.0);
    value.context("it must be above 0 and at most 1, such as 1/16 or 0.0625")
}

fn parse_width(text: &str) -> Result<usize> {
    let width: u16 = text.parse()?;
    ensure!(width > 0, "it must be above 0");
    Ok(width.into())
}

fn parse_lr(text: &str) -> Result<f64> {
    let value = text
        .parse()
        .ok()
        .filter(|&v: &f64| v > 0.0 && v.is_finite());
    value.context("it must be a number above 0")
}

fn parse_decay(text: &str) -> Result<f64> {
    let value = text
        .parse()
        .ok()
        .filter(|&v: &f64| v >= 0.0 && v.is_finite());
    value.context("it must be a number of at least 0")
}

fn parse_stars(text: &str) -> Result<f32> {
    let value = text
        .parse()
        .ok()
        .filter(|&v: &f32| (0.5..=5.0).contains(&v));
    value.context("it must lie in 0.5..=5")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        <Options as CommandFactory>::command().debug_assert();
    }

    #[test]
    fn train_is_the_default() -> Result<()> {
        for args in [
            &["recommender", "--seed", "3"][..],
            &["recommender", "train", "--seed", "3"],
        ] {
            let Command::Train(train) = Options::try_parse_from(args)?.command() else {
                bail!("not train")
            };
            assert_eq!(train.seed, 3);
        }
        Ok(())
    }

    #[test]
    fn compressions() {
        assert_eq!(parse_compression("1/16").ok(), Some(0.0625));
        assert_eq!(parse_compression("0.0625").ok(), Some(0.0625));
        assert_eq!(parse_compression("1").ok(), Some(1.0));
        for wrong in ["", "0", "2", "-1", "1/0", "1/", "NaN", "a/b"] {
            assert!(parse_compression(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn refusals_say_what_is_allowed() {
        for (arguments, said) in [
            ("--lr -1", "it must be a number above 0"),
            ("--lr abc", "it must be a number above 0"),
            ("--table-lr 0", "it must be a number above 0"),
            (
                "--compression abc",
                "it must be above 0 and at most 1, such as 1/16 or 0.0625",
            ),
            ("--compression -1", "it must be above 0 and at most 1"),
            ("--weight-decay -0.5", "it must be a number of at least 0"),
            ("--like-from 6", "it must lie in 0.5..=5"),
            ("--bits 5", "it must be 32, 8 or 4"),
        ] {
            let arguments = ["recommender"].into_iter().chain(arguments.split(' '));
            let refused = Options::try_parse_from(arguments)
                .err()
                .unwrap()
                .to_string();
            assert!(refused.contains(said), "{refused}");
        }
    }

    #[test]
    fn hashes() -> Result<()> {
        for text in [
            "default",
            "balanced:4",
            "mix:8",
            "original",
            "semantic",
            "lma",
            "scma",
        ] {
            assert_eq!(text.parse::<HashChoice>()?.to_string(), text);
        }
        for wrong in [
            "",
            "mix",
            "mix:",
            "mix:0",
            "balanced:33",
            "balanced:-1",
            "original:8",
        ] {
            assert!(wrong.parse::<HashChoice>().is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn options_of_a_format_need_it() {
        let parses = |args: &str| Options::try_parse_from(args.split(' ')).is_ok();
        assert!(!parses("recommender --format criteo"));
        assert!(!parses("recommender --data log --skip-malformed"));
        assert!(!parses("recommender --data log --rows-per-field 10"));
        assert!(parses(
            "recommender --data log --format criteo --skip-malformed --rows-per-field 10"
        ));
        assert!(parses("recommender sweep --data log --format criteo"));
    }
}
