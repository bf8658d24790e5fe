//! The sums of a sparse gradient on CUDA, and marks for those parts that may not be zero; see kernels/touched.cuh.

use super::abi::TOUCHED_CHUNK;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{CudaStorage, DType, Layout, Result};
use cudarc::driver::CudaSlice;

pub(crate) struct SparseSums {
    /// `(len,)`, f32 or f64
    pub values: CudaStorage,
    /// A mark for every [`TOUCHED_CHUNK`] of them.
    pub touched: CudaSlice<u8>,
    /// Whether there may be marks.
    has_marks: bool,
    /// Whether all are touched, whatever the marks say.
    all_touched: bool,
    /// The sums in fixed point, zero between backward passes; from the first deterministic one on.
    pub units: Option<CudaSlice<i64>>,
}

impl SparseSums {
    /// Zeros. `len` is not 0.
    pub fn new(len: usize, dtype: DType, device: &CudaDevice) -> Result<Self> {
        let values = match dtype {
            DType::F64 => {
                CudaStorage::wrap_cuda_slice(device.alloc_zeros::<f64>(len)?, device.clone())
            }
            _ => CudaStorage::wrap_cuda_slice(device.alloc_zeros::<f32>(len)?, device.clone()),
        };
        Ok(Self {
            values,
            touched: device.alloc_zeros(len.div_ceil(TOUCHED_CHUNK))?,
            has_marks: false,
            all_touched: false,
            units: None,
        })
    }

    /// Whether a backward pass that adds so many values is to mark what it touches. Half as many as there are slots leave hardly
    /// a chunk out, unless few rows are drawn most of the time. Then all are taken to be touched: marks would cost 55 us on an H100.
    pub fn marks_for(&mut self, added: usize) -> bool {
        let marks = added < self.touched.len() * TOUCHED_CHUNK / 2;
        self.has_marks |= marks;
        self.all_touched |= !marks;
        marks
    }

    /// For a step that uses the sums up: the values, and the marks, which the step takes off, unless all are touched.
    pub fn take(&mut self) -> Result<(&mut CudaStorage, Option<&mut CudaSlice<u8>>)> {
        if self.all_touched && self.has_marks {
            let stream = self.values.device().cuda_stream();
            stream.memset_zeros(&mut self.touched).w()?;
        }
        let all_touched = std::mem::take(&mut self.all_touched);
        self.has_marks = false;
        let touched = (!all_touched).then_some(&mut self.touched);
        Ok((&mut self.values, touched))
    }

    /// A copy of the sums.
    pub fn copy(&self) -> Result<CudaStorage> {
        let len = match self.values.dtype() {
            DType::F64 => self.values.as_cuda_slice::<f64>()?.len(),
            _ => self.values.as_cuda_slice::<f32>()?.len(),
        };
        self.values.try_clone(&Layout::contiguous(len))
    }

    /// Makes all of them zero.
    pub fn clear(&mut self) -> Result<()> {
        let stream = self.values.device().cuda_stream();
        match self.values.dtype() {
            DType::F64 => stream.memset_zeros(self.values.as_cuda_slice_mut::<f64>()?),
            _ => stream.memset_zeros(self.values.as_cuda_slice_mut::<f32>()?),
        }
        .w()?;
        stream.memset_zeros(&mut self.touched).w()?;
        (self.has_marks, self.all_touched) = (false, false);
        // What a failed backward pass may have left.
        if let Some(units) = &mut self.units {
            stream.memset_zeros(units).w()?;
        }
        Ok(())
    }
}
