//! The command line.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{bail, ensure, Context, Result};
use candle_core::Device;
use candle_hashed_embedding_bag::Hash;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::data::Source;
use crate::tables::Tables;

const STEPS_PER_EPOCH: usize = 400;
const LARGEST_BATCH: usize = 4096;

/// Trains a recommender whose embedding tables are hashed, evaluates it, and recommends movies with it.
///
/// Without a subcommand it trains; without --data it makes its own ratings.
#[derive(Parser)]
#[command(name = "recommender", args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: Train,
}

#[derive(Subcommand)]
pub enum Command {
    /// Train a model, evaluate it on the test part and write a checkpoint.
    Train(Train),
    /// Evaluate a checkpoint on the test part.
    Evaluate(Common),
    /// Print the movies a user has not seen and will like best.
    Recommend(Recommend),
}

#[derive(Args)]
pub struct Common {
    /// Folder of a MovieLens set, in the .csv or the .dat layout [default: generated ratings].
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// File of the trained model [default: recommender.safetensors in the folder of temporary files].
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
}

#[derive(Args)]
pub struct Train {
    #[command(flatten)]
    pub common: Common,
    /// Parameters kept per value of the embedding tables, such as 1/16 or 0.0625; 1 is a plain table, not hashed.
    #[arg(long, default_value = "1/16", value_parser = parse_compression)]
    pub compression: f64,
    #[arg(long, value_enum, default_value_t = HashKind::Mix)]
    hash: HashKind,
    /// Consecutive columns that share one hash of --hash mix [default: the crate's].
    #[arg(long, value_name = "COLUMNS")]
    block: Option<usize>,
    #[arg(long, default_value = "16")]
    embedding_dim: NonZeroUsize,
    #[arg(long, default_value = "8")]
    epochs: NonZeroUsize,
    /// Examples per step [default: such that an epoch has about 400 steps, at most 4096].
    #[arg(long)]
    batch_size: Option<NonZeroUsize>,
    /// Learning rate of the first step; it falls linearly to zero.
    #[arg(long, default_value = "0.002", value_parser = parse_lr)]
    pub lr: f64,
    /// Decides the initial values, the order of the examples and the generated ratings.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

#[derive(Args)]
pub struct Recommend {
    #[command(flatten)]
    pub common: Common,
    /// Id of the user, as in the ratings.
    #[arg(long, value_name = "ID")]
    pub user: i64,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceKind {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum HashKind {
    /// The crate's own: signed blocks.
    Mix,
    /// The one of the PyTorch package HashedEmbeddingBag.
    Original,
}

impl Options {
    pub fn command(self) -> Command {
        self.command.unwrap_or(Command::Train(self.train))
    }
}

impl Common {
    pub fn checkpoint(&self) -> PathBuf {
        self.checkpoint
            .clone()
            .unwrap_or_else(|| std::env::temp_dir().join("recommender.safetensors"))
    }

    pub fn device(&self) -> Result<Device> {
        match self.device {
            DeviceKind::Cpu => Ok(Device::Cpu),
            DeviceKind::Cuda => {
                ensure!(
                    candle_core::utils::cuda_is_available(),
                    "built without CUDA: rebuild with --features cuda"
                );
                Device::new_cuda(0).context("no CUDA device")
            }
        }
    }
}

impl Train {
    pub fn epochs(&self) -> usize {
        self.epochs.get()
    }

    /// The examples per step, of `ratings` in an epoch. Weight decay acts once per step, so it is the number of steps
    /// that must not depend on the size of the data for one setting to suit all of it.
    pub fn batch_size(&self, ratings: usize) -> usize {
        self.batch_size.map_or(
            ratings.div_ceil(STEPS_PER_EPOCH).clamp(1, LARGEST_BATCH),
            NonZeroUsize::get,
        )
    }

    pub fn source(&self) -> Source {
        match &self.common.data {
            Some(dir) => Source::Files(dir.clone()),
            None => Source::Generated { seed: self.seed },
        }
    }

    pub fn tables(&self) -> Result<Tables> {
        let embedding_dim = self.embedding_dim.get();
        let hash = match (self.hash, self.block) {
            (HashKind::Mix, None) => Hash::default_for(embedding_dim),
            (HashKind::Mix, Some(block)) => Hash::mix(0, block, true).context("--block")?,
            (HashKind::Original, None) => Hash::original(),
            (HashKind::Original, Some(_)) => {
                bail!("--block goes with --hash mix: the original hash has no blocks")
            }
        };
        Ok(Tables {
            embedding_dim,
            compression: self.compression,
            hash,
        })
    }
}

fn parse_compression(text: &str) -> Result<f64> {
    let value = match text.split_once('/') {
        Some((numerator, denominator)) => {
            numerator.trim().parse::<f64>()? / denominator.trim().parse::<f64>()?
        }
        None => text.parse()?,
    };
    ensure!(
        value > 0.0 && value <= 1.0,
        "it must be above 0 and at most 1"
    );
    Ok(value)
}

fn parse_lr(text: &str) -> Result<f64> {
    let value: f64 = text.parse()?;
    ensure!(
        value > 0.0 && value.is_finite(),
        "it must be a positive number"
    );
    Ok(value)
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
            &["recommender", "--epochs", "3"][..],
            &["recommender", "train", "--epochs", "3"],
        ] {
            let Command::Train(train) = Options::try_parse_from(args)?.command() else {
                bail!("not train")
            };
            assert_eq!(train.epochs(), 3);
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
}
