//! Bounds checks: a kernel raises a flag if anything is out of range; only then does the host find out what.

use crate::op::{cpu, Lookup, Operands};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaStorage, Result};
use cudarc::driver::{CudaEvent, CudaStream, PinnedHostSlice};
use std::sync::{Arc, Mutex, PoisonError};

/// A flag that a kernel raises, and an event that tells when the kernel is done. The flag is in host memory, so nothing has to be
/// cleared on the device or copied from it.
///
/// Each checked call uses one. They are kept for reuse, because making one takes longer than most lookups.
pub struct Flag {
    raised: PinnedHostSlice<u32>,
    done: CudaEvent,
}

static FLAGS: Mutex<Vec<Flag>> = Mutex::new(vec![]);

impl Flag {
    /// A flag that is not raised, for a kernel on this stream.
    pub fn take(stream: &CudaStream) -> Result<Self> {
        let mut flags = FLAGS.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |flag: &Self| Arc::ptr_eq(flag.done.context(), stream.context());
        if let Some(at) = flags.iter().position(fits) {
            return Ok(flags.swap_remove(at));
        }
        // SAFETY: the memory is initialised in the next line.
        let mut raised = unsafe { stream.context().alloc_pinned::<u32>(1) }.w()?;
        raised.as_mut_slice().w()?[0] = 0;
        let done = stream.context().new_event(None).w()?;
        Ok(Self { raised, done })
    }

    /// The address of the flag; pinned host memory has the same address on the device.
    pub fn device_pointer(&mut self) -> Result<u64> {
        Ok(self.raised.as_mut_ptr().w()? as u64)
    }

    /// Makes [`wait`](Self::wait) wait for everything that is now queued on the stream.
    pub fn record(&self, stream: &CudaStream) -> Result<()> {
        self.done.record(stream).w()
    }

    /// Waits for the kernel, and returns whether it raised the flag.
    pub fn wait(mut self) -> Result<bool> {
        self.done.synchronize().w()?;
        let raised = std::mem::take(&mut self.raised.as_mut_slice().w()?[0]) != 0;
        let mut flags = FLAGS.lock().unwrap_or_else(PoisonError::into_inner);
        flags.push(self);
        Ok(raised)
    }
}

/// Checks again on the host, on a copy, to return an error that says what is out of range.
pub fn check_on_host(lookup: &Lookup, operands: &Operands<CudaStorage>) -> Result<()> {
    let (indices, layout) = operands.indices;
    let indices = indices.to_cpu_storage()?;
    let offsets = match operands.offsets {
        Some((offsets, layout)) => Some((offsets.to_cpu_storage()?, layout)),
        None => None,
    };
    let offsets = offsets.as_ref().map(|(offsets, layout)| (offsets, *layout));
    cpu::check_bounds(lookup, (&indices, layout), offsets)
}
