//! The memory of the programs.

use candle_core::{Device, Result};

/// Keeps memory between batches and requests, which glibc's allocator returns to the kernel, and starts large tensors at a cache
/// line.
pub type Allocator = mimalloc::MiMalloc;

/// Of mimalloc: after how many milliseconds memory that is not used goes back to the kernel; never if negative.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Keeps all memory from now on. By default, what has not been used for some milliseconds goes back, and a step takes longer than
/// that: the kernel would clear every page of its tensors again, a tenth of the time of a training.
pub fn keep_memory() {
    // SAFETY: the options of mimalloc may be set at any time.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// Lets the driver keep the memory of a GPU that tensors no longer use. By default it takes that back whenever the program waits for
/// the GPU, and the next step waits until gigabytes are mapped again.
///
/// # Errors
/// What the driver says.
pub fn keep_memory_of(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            use candle_core::cuda_backend::cudarc::driver::sys;
            use candle_core::cuda_backend::WrapErr;
            let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let (mut pool, mut all) = (std::ptr::null_mut(), u64::MAX);
            let stream = device.cuda_stream();
            // SAFETY: the device exists, the driver writes its pool to `pool`, and the attribute is a u64.
            unsafe {
                sys::cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device())
                    .result()
                    .w()?;
                sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut all).cast())
                    .result()
                    .w()
            }
        }
        _ => Ok(()),
    }
}
