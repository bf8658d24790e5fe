//! Converts a PyTorch state dict to a self-describing checkpoint, rounds its layers to fewer bits, and lists the contents of
//! either.
//!
//! ```text
//! cargo install --path convert      # once; then, for example,
//! convert model.pth model.safetensors --bag user:6040x16,mode=mean
//! convert --help
//! ```
//!
//! | module | |
//! |---|---|
//! | [`arguments`] | the command line |
//! | [`conversion`] | writes the layers of a state dict as a checkpoint |
//! | [`inspection`] | lists what a state dict or a checkpoint holds |

mod arguments;
mod conversion;
mod inspection;

use std::io::{self, ErrorKind, Write};

use anyhow::{ensure, Context, Result};
use candle_hashed_embedding_bag::{checkpoint, Checkpoint, StateDict};
use clap::Parser;

use crate::arguments::Options;

fn main() -> Result<()> {
    let report = run(Options::parse())?;
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(report.as_bytes())
        .and_then(|()| stdout.flush())
    {
        // The reader has seen enough, as in `convert model.pth | head -1`.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("standard output"),
    }
}

/// Does what the options ask for, and returns the report to print.
fn run(options: Options) -> Result<String> {
    if let Some(checkpoint) = &options.inspect {
        return inspection::inspect(checkpoint);
    }
    let path = options.state_dict.as_ref().context("no state dict")?;
    if let Some(checkpoint) = &options.checkpoint {
        checkpoint::check_writable(checkpoint)
            .with_context(|| format!("cannot write {}", checkpoint.display()))?;
    }
    if let (Some(bits), Some(to), None) = (options.bits, &options.checkpoint, &options.key) {
        // A file that describes its layers needs nothing else to be said of them.
        if options.requests().next().is_none() {
            let from = Checkpoint::open(path).context(
                "--bits without --bag, --embedding, --robe, --robe-dlrm, --lma, --scma or --fit rounds the layers of a checkpoint",
            )?;
            let report = conversion::round_checkpoint(&from, !options.layers_only, bits, to)?;
            return Ok(report + &inspection::inspect(to)?);
        }
    }
    let state = match &options.key {
        None => StateDict::open(path)?,
        Some(key) => StateDict::open_nested(path, key)?,
    };
    let Some(checkpoint) = &options.checkpoint else {
        return inspection::list(state);
    };
    ensure!(
        options.requests().next().is_some(),
        "which entries are hashed layers? --bag, --embedding, --robe, --robe-dlrm, --lma, --scma and --fit say so; \
         `convert {}` lists the entries",
        path.display()
    );
    let report = conversion::convert(
        state,
        options.requests(),
        !options.layers_only,
        options.bits,
        checkpoint,
    )?;
    Ok(report + &inspection::inspect(checkpoint)?)
}
