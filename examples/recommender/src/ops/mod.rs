//! Differentiable operations of the model, fused for the CPU.
//!
//! candle builds a layer from several operations, each of which reads and writes whole tensors and, in the backward pass, adds
//! its gradient to zeros. A DLRM has small layers, so on a CPU that costs more than the products. The operations here compute on
//! the thread that calls them: [`train`](crate::train) runs many small shards of a batch side by side instead.

mod backward;
mod interaction;
mod linear;
mod pool;
mod product;
mod projection;

pub use backward::backward;
pub use interaction::{Interaction, TopInput};
pub use linear::linear;
pub use pool::in_pool;
pub use projection::project;

use candle_core::{bail, CpuStorage, Layout, Result, Tensor};

/// The values of a contiguous f32 tensor.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice()?[start..end]),
        None => bail!("a fused operation takes contiguous tensors, got {layout:?}"),
    }
}

/// `tensor`, if gradients flow into it.
fn tracked<T>(tensor: &Tensor, gradient: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
    tensor.track_op().then(gradient).transpose()
}
