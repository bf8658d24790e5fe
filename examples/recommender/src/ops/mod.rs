//! Differentiable operations of the model, fused.
//!
//! candle builds a layer from several operations, each of which reads and writes whole tensors and, in the backward pass, adds
//! its gradient to zeros. A DLRM has small layers and many examples, so that costs more than the products. On the CPU, the
//! operations here compute on the thread that calls them: [`train`](crate::train) runs many small shards of a batch side by side
//! instead.

mod backward;
#[cfg(feature = "cuda")]
mod cuda;
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    /// The CPU, and a GPU if there is one.
    pub fn devices() -> Vec<Device> {
        let gpu = Device::new_cuda(0);
        if gpu.is_err() {
            println!("skipped: no CUDA device");
        }
        [Device::Cpu].into_iter().chain(gpu).collect()
    }
}
