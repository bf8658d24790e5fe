//! Hashed embedding bags for [candle](https://github.com/huggingface/candle).
//!
//! An embedding bag whose table is never stored: its `num_embeddings * embedding_dim` values are folded by a hash into one
//! short 1-D parameter, `hashed_weight`, and virtual element `(row, column)` is `sign * hashed_weight[slot(row, column)]`.
//! 10x to 1000x less memory at nearly the same accuracy, on CPU and CUDA, forward and backward.
//!
//! | you want to | use |
//! |---|---|
//! | pool bags of rows in a model | [`hashed_embedding_bag()`], [`HashedEmbeddingBag`] |
//! | look up many tables at once, over one parameter | [`hashed_embedding_bag_collection()`], [`HashedEmbeddingBagCollection`] |
//! | join jagged bags of several features for it | [`JaggedTensor`], [`KeyedJaggedTensor`] |
//! | look up single rows | [`hashed_embedding()`], [`HashedEmbedding`] |
//! | choose where values go, or match weights trained in PyTorch | [`Hash`](enum@Hash) |
//! | train with one pass over memory per step, and resume | [`optim::AdamW`], [`optim::Adagrad`], [`optim::Sgd`] |
//! | train on several GPUs | [`distributed::Communicator`] |
//! | save a model, and rebuild it from the file alone | [`checkpoint::save`], [`Checkpoint`] |
//! | open what PyTorch saved | [`StateDict`] |
//! | let rows that are used alike share memory | [`Hash::semantic`], with signatures by [`semantic`] |
//! | compress a table that was not hashed | [`HashedEmbeddingBag::fit`] |
//! | serve a trained layer from 8 or 4 bits per value | [`HashedEmbeddingBag::to_bits`] |
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_hashed_embedding_bag::hashed_embedding_bag;
//! use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
//!
//! # fn main() -> candle_core::Result<()> {
//! let device = Device::Cpu;
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
//! // A million rows of 32 columns in a 64th of the memory: 500,000 values.
//! let layer = hashed_embedding_bag(1_000_000, 32, 1.0 / 64.0, Default::default(), vb)?;
//! assert_eq!(layer.hashed_weight().dims(), [500_000]);
//!
//! // Three bags: rows 7 and 999,999; no row; row 7 twice.
//! let indices = Tensor::new(&[7u32, 999_999, 7, 7], &device)?;
//! let offsets = Tensor::new(&[0u32, 2, 2], &device)?;
//! let out = layer.forward_with_offsets(&indices, &offsets)?;
//! assert_eq!(out.dims(), [3, 32]);
//!
//! // It trains like any other layer.
//! let mut optimizer = AdamW::new_lr(vars.all_vars(), 1e-3)?;
//! optimizer.backward_step(&out.sqr()?.sum_all()?)?;
//! # Ok(())
//! # }
//! ```
//!
//! On a CPU, set `CANDLE_NUM_THREADS` in a container that may use fewer cores than the machine has, and use an allocator that reuses
//! and aligns memory, such as mimalloc.
//!
//! The feature `cuda` adds the CUDA kernels; it needs `nvcc`, and a driver at least as new as the toolkit. The feature `nccl` adds training on
//! several GPUs; NCCL itself is needed only to run that.

#![warn(missing_docs)]

mod bags;
mod bounds;
pub mod checkpoint;
mod collection;
mod config;
pub mod distributed;
mod error;
mod fit;
mod hash;
pub mod import;
mod jagged;
mod layer;
mod low_bit;
mod op;
pub mod optim;
mod parallel;
mod row_tensor;
pub mod semantic;
mod tables;

pub use bags::JaggedLayout;
pub use bounds::BoundsCheck;
pub use checkpoint::file::TensorInfo;
pub use checkpoint::Checkpoint;
pub use collection::{
    hashed_embedding_bag_collection, hashed_embedding_bag_collection_with_row_tensor,
    HashedEmbeddingBagCollection,
};
pub use config::{HashedEmbeddingBagConfig, HashedEmbeddingConfig, HashedWeightConfig};
pub use hash::{Affine, Balanced, Hash, Lma, Mix, Overflow, Semantic, SlotTable};
pub use import::StateDict;
pub use jagged::{JaggedTensor, KeyedJaggedTensor};
pub use layer::{
    hashed_embedding, hashed_embedding_bag, hashed_embedding_bag_with_row_tensor, HashedEmbedding,
    HashedEmbeddingBag,
};
pub use low_bit::{Bits, LowBit};
pub use op::{Gradient, Mode, SparseGradient};

/// Compiles and runs the Rust in the documents.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/distributed.md")]
    struct Distributed;
    #[doc = include_str!("../docs/format.md")]
    struct Format;
    #[doc = include_str!("../docs/performance.md")]
    struct Performance;
    #[doc = include_str!("../docs/pytorch.md")]
    struct PyTorch;
}
