//! The memory of the programs.

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
