//! The lookup on CUDA: which kernel, how many threads, which arguments. The kernels themselves are in kernels/.
//!
//! | file | |
//! |---|---|
//! | `instances.rs` | the table of kernels, from which build.rs writes the CUDA sources |
//! | `abi.rs`, `params.rs` | the constants and structs that both sides share |
//! | `plan.rs` | the choice of a kernel and its threads for one call |
//! | `modules.rs` | loading the kernels |
//! | `launch.rs` | the launches of a lookup, all `unsafe` ones |
//! | `bounds.rs` | waiting for the check of indices and offsets |
//! | `fixed_point.rs`, `sparse.rs` | the memory of deterministic and of sparse gradients |
//! | `contiguous.rs` | an op for the tensors that candle cannot copy |
//! | `backend.rs` | [`Backend`](super::Backend): runs the above in order |
//!
//! What needs no GPU is compiled and tested without one.
#![cfg_attr(not(feature = "cuda"), allow(dead_code))]

// Only build.rs uses some parts of these two.
#[allow(dead_code)]
mod abi;
#[allow(dead_code)]
mod instances;
mod params;
mod plan;

#[cfg(feature = "cuda")]
mod backend;
#[cfg(feature = "cuda")]
mod bounds;
#[cfg(feature = "cuda")]
mod contiguous;
#[cfg(feature = "cuda")]
mod fixed_point;
#[cfg(feature = "cuda")]
mod launch;
#[cfg(feature = "cuda")]
pub(crate) mod modules;
#[cfg(feature = "cuda")]
mod sparse;

#[cfg(feature = "cuda")]
pub(crate) use abi::TOUCHED_CHUNK;
#[cfg(feature = "cuda")]
pub(crate) use instances::{Dtype, Kernel, Rule, WARP, WIDEST_ACCESS};
#[cfg(feature = "cuda")]
pub(crate) use sparse::SparseSums;
#[cfg(feature = "cuda")]
pub(super) use {backend::Cuda, contiguous::ContiguousI32};
