//! Importing state dicts from PyTorch. The numbers that come out are the business of golden.rs.
//!
//! | file | of what |
//! |---|---|
//! | `modules.rs` | the layers of each kind of module, and what they refuse, by key |
//! | `structures.rs` | finding the state dict in what training scripts save |
//! | `entries.rs` | the entries of a file: their dtypes, shapes and other names |
//! | `archives.rs` | archives and pickles made by hand, most of them broken: errors or tensors, but no panic |

mod archives;
mod entries;
mod modules;
mod structures;

use candle_core::{DType, Device, Result, Tensor};
use candle_hashed_embedding_bag::{HashedEmbeddingBagConfig, StateDict};

const CPU: Device = Device::Cpu;

fn config() -> HashedEmbeddingBagConfig {
    HashedEmbeddingBagConfig::default()
}

fn floats(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &CPU).unwrap()
}

fn structure(name: &str, key: Option<&str>) -> Result<StateDict> {
    let path = format!("tests/golden/structures/{name}.pth");
    match key {
        None => StateDict::open(path),
        Some(key) => StateDict::open_nested(path, key),
    }
}
