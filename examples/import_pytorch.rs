//! How do I use weights trained in PyTorch? Take the layers and tensors out of the state dict by name, and save them as a
//! checkpoint.
//!
//! ```text
//! cargo run --release --example import_pytorch
//! ```
//!
//! This state dict comes from a small model, saved by `torch.save({"state_dict": model.state_dict()}, path)`:
//!
//! ```python
//! class Model(torch.nn.Module):
//!     def __init__(self):
//!         self.words = HashedEmbedding(3000, 10)      # of the package HashedEmbeddingBag
//!         self.head = torch.nn.Linear(10, 2)
//! ```
//!
//! The tool in convert/ does this on the command line.

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_hashed_embedding_bag::{checkpoint, Checkpoint, HashedEmbeddingConfig, StateDict};
use candle_nn::Linear;

const STATE_DICT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/golden/original_embedding.pth"
);

fn main() -> Result<()> {
    let device = Device::cuda_if_available(0)?;
    let mut state = StateDict::open_nested(STATE_DICT, "state_dict")?;
    println!("entries: {}", state.keys().collect::<Vec<_>>().join(", "));

    // A state dict does not say how large a virtual table is: you do. The hash is that of the PyTorch module.
    let config = HashedEmbeddingConfig::default();
    let words = state.hashed_embedding("words", 3000, 10, config, &device)?;
    let head = ["head.weight", "head.bias"]
        .into_iter()
        .map(|key| Ok((key.to_string(), state.take(key, &device)?)))
        .collect::<Result<Vec<_>>>()?;
    ensure!(state.keys().next().is_none(), "all entries are used");

    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    checkpoint::save(&path, head, [("words", words.bag())])?;
    println!("{} bytes written", std::fs::metadata(&path)?.len());

    // From here on only the file is needed, and nothing in it is specific to PyTorch.
    let opened = Checkpoint::open(&path)?;
    let words = opened.hashed_embedding_bag("words", DType::F32, &device)?;
    let head = Linear::new(
        opened.tensor("head.weight", &device)?,
        Some(opened.tensor("head.bias", &device)?),
    );
    let sentence = Tensor::new(&[[17u32, 2999, 0]], &device)?;
    let scores = head.forward(&words.forward(&sentence)?)?;
    println!("scores of a sentence: {:?}", scores.to_vec2::<f32>()?);
    Ok(())
}
