//! A contiguous copy of a strided i32 tensor, for which candle has no kernel.

use super::abi::MAX_RANK;
use super::launch;
use super::params::Strides;
use crate::error::bail;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape};

/// Strided i32 -> contiguous i32, on CUDA.
pub struct ContiguousI32;

impl CustomOp1 for ContiguousI32 {
    fn name(&self) -> &'static str {
        "hashed-embedding-bag-contiguous-i32"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("contiguous-i32 has no CPU implementation; candle has its own")
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (device, rank) = (storage.device(), layout.dims().len());
        if rank > MAX_RANK {
            bail!("indices must have rank {MAX_RANK} at most, got {rank}");
        }
        let mut shape = Strides {
            dims: [1; MAX_RANK],
            strides: [0; MAX_RANK],
            rank: rank as u32,
        };
        for d in 0..rank {
            shape.dims[d] = layout.dims()[d] as i64;
            shape.strides[d] = layout.stride()[d] as i64;
        }
        let n = layout.shape().elem_count();
        // At least one value, because the driver refuses to allocate nothing.
        let mut to = device.alloc_zeros::<i32>(n.max(1))?;
        if n > 0 {
            let from = storage.as_cuda_slice::<i32>()?;
            let from = from.slice(layout.start_offset()..);
            launch::copy_i32(&from, &mut to, n, &shape, &device.cuda_stream())?;
        }
        let to = CudaStorage::wrap_cuda_slice(to, device.clone());
        Ok((to, layout.shape().clone()))
    }
}
