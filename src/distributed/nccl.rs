//! NCCL: its functions, found at run time, and one communicator.
//!
//! cudarc's bindings link to libnccl, and a program that does cannot even start where it is missing; so the few functions that
//! are needed are looked up here, and what is missing is an error.

use super::channel::{Channel, Engine};
use super::world::World;
use super::{AllReduceTimes, Collective};
use crate::error::{bail, error};
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{CpuStorage, CudaDevice, CudaStorage, InplaceOp1, Layout, Result, Tensor};
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtrMut};
use std::ffi::{c_char, c_int, c_void, CStr};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// What the dynamic linker is asked for.
const FILE: &str = "libnccl.so.2";
/// 2.10 brought bf16 and averages.
const OLDEST: c_int = 21000;
/// How long an operation of the main thread may keep the communicator from being aborted.
const PATIENCE: Duration = Duration::from_secs(5);

// From nccl.h, where these values have not changed since 2.10.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const FLOAT16: c_int = 6;
const FLOAT32: c_int = 7;
const FLOAT64: c_int = 8;
const BFLOAT16: c_int = 9;
const AVERAGE: c_int = 4;

/// `ncclComm_t`.
type Comm = *mut c_void;
/// `cudaStream_t`, the driver's `CUstream`.
type Stream = *mut c_void;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

/// The functions of libnccl that are used, as nccl.h declares them.
pub(super) struct Library {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Comm,
        Stream,
    ) -> c_int,
    broadcast: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Comm,
        Stream,
    ) -> c_int,
}

impl Library {
    /// Loads the library once for the process, and never unloads it.
    pub fn load() -> Result<&'static Self> {
        static LOADED: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        match LOADED.get_or_init(|| Self::open(FILE)) {
            Ok(library) => Ok(library),
            Err(why) => Err(error(why)),
        }
    }

    fn open(file: &str) -> std::result::Result<Self, String> {
        // SAFETY: what runs when the library is loaded is NCCL's own initialisation, as in every program that links to it.
        let library = unsafe { libloading::Library::new(file) }.map_err(|e| {
            format!("NCCL is missing: install {file}, or add its folder to LD_LIBRARY_PATH ({e})")
        })?;
        // Its functions are kept for the rest of the process.
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        /// A function by its name, with the type that is expected of it.
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the types in `Library` are those of nccl.h.
                *unsafe { library.get($name) }
                    .map_err(|e| format!("{file} is not NCCL, or too old: {e}"))?
            };
        }
        let get_version: unsafe extern "C" fn(*mut c_int) -> c_int = function!("ncclGetVersion");
        let mut version = 0;
        // SAFETY: it writes one integer.
        let result = unsafe { get_version(&mut version) };
        if result != SUCCESS || version < OLDEST {
            return Err(format!(
                "{file} must be NCCL 2.10 or newer, its version is {version}"
            ));
        }
        Ok(Self {
            get_unique_id: function!("ncclGetUniqueId"),
            comm_init_rank: function!("ncclCommInitRank"),
            comm_abort: function!("ncclCommAbort"),
            comm_get_async_error: function!("ncclCommGetAsyncError"),
            get_error_string: function!("ncclGetErrorString"),
            all_reduce: function!("ncclAllReduce"),
            broadcast: function!("ncclBroadcast"),
        })
    }

    fn message(&self, result: c_int) -> String {
        // SAFETY: NCCL returns a constant string for any number.
        let text = unsafe { CStr::from_ptr((self.get_error_string)(result)) };
        text.to_string_lossy().into_owned()
    }

    fn check(&self, function: &str, result: c_int) -> Result<()> {
        if result != SUCCESS {
            let message = self.message(result);
            bail!("{function}: {message}; with NCCL_DEBUG=WARN, NCCL says more");
        }
        Ok(())
    }
}

/// The communicator of this rank on its device.
pub(super) struct Nccl {
    shared: Arc<Shared>,
    stream: Arc<CudaStream>,
    timing: Mutex<Timing>,
}

/// What the watch needs too.
struct Shared {
    library: &'static Library,
    stream: Arc<CudaStream>,
    /// `None` before the start and after the end. Whoever calls NCCL holds the lock, so that it is not freed meanwhile.
    comm: Mutex<Option<Handle>>,
    waiting: Mutex<Waiting>,
}

struct Handle(Comm);

// SAFETY: NCCL lets any thread use a communicator, one at a time.
unsafe impl Send for Handle {}

/// What the stream may be waiting for.
enum Waiting {
    Nothing,
    /// Since then, the other ranks.
    Start(Instant),
    /// Since then, a collective, at whose end there is the event.
    Collective(Instant, CudaEvent),
}

#[derive(Default)]
struct Timing {
    times: AllReduceTimes,
    /// Bytes, start and end of a call that may not be done yet.
    running: Option<(usize, CudaEvent, CudaEvent)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn cuda(e: cudarc::driver::DriverError) -> candle_core::Error {
    error(format_args!("CUDA: {e}"))
}

impl Nccl {
    pub fn new(
        library: &'static Library,
        world: &World,
        device: &CudaDevice,
        channel: &Channel,
    ) -> Result<Self> {
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().map_err(cuda)?;
        let shared = Arc::new(Shared {
            library,
            stream: stream.clone(),
            comm: Mutex::new(None),
            waiting: Mutex::new(Waiting::Nothing),
        });
        let mut id = UniqueId([0; 128]);
        let of_rank_0 = match world.rank {
            0 => {
                // SAFETY: it writes one id.
                let result = unsafe { (library.get_unique_id)(&mut id) };
                library.check("ncclGetUniqueId", result)?;
                Some(id.0.to_vec())
            }
            _ => None,
        };
        match channel.broadcast(of_rank_0)?.try_into() {
            Ok(bytes) => id = UniqueId(bytes),
            Err(_) => bail!("rank 0 has sent no id of NCCL"),
        }
        *lock(&shared.waiting) = Waiting::Start(Instant::now());
        channel.watch(Watched(shared.clone()));
        let mut comm = null_mut();
        let (ranks, rank) = (world.size as c_int, world.rank as c_int);
        // SAFETY: the context of the device is bound to this thread; it writes one handle.
        let result = unsafe { (library.comm_init_rank)(&mut comm, ranks, id, rank) };
        *lock(&shared.waiting) = Waiting::Nothing;
        library.check("ncclCommInitRank", result)?;
        *lock(&shared.comm) = Some(Handle(comm));
        Ok(Self {
            shared,
            stream,
            timing: Mutex::default(),
        })
    }

    /// Replaces the values of a flat tensor by the result.
    pub fn run(&self, flat: &Tensor, collective: Collective) -> Result<()> {
        flat.inplace_op1(&InPlace {
            nccl: self,
            collective,
        })?;
        let done = self.stream.record_event(None).map_err(cuda)?;
        *lock(&self.shared.waiting) = Waiting::Collective(Instant::now(), done);
        Ok(())
    }

    /// Does `work`, which is an all-reduce of so many bytes, and measures it unless the one before is still running.
    pub fn timed<T>(&self, bytes: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut timing = lock(&self.timing);
        timing.read()?;
        let event = || {
            let flags = CUevent_flags::CU_EVENT_DEFAULT;
            self.stream.record_event(Some(flags)).map_err(cuda)
        };
        let start = match timing.running {
            None => Some(event()?),
            Some(_) => None,
        };
        let result = work()?;
        if let Some(start) = start {
            timing.running = Some((bytes, start, event()?));
        }
        Ok(result)
    }

    pub fn times(&self) -> AllReduceTimes {
        let mut timing = lock(&self.timing);
        // An error of the device shows again in whatever needs the device.
        let _ = timing.read();
        timing.times
    }
}

impl Timing {
    /// Adds the running call if it is done.
    fn read(&mut self) -> Result<()> {
        if let Some((bytes, start, end)) = &self.running {
            if end.is_complete() {
                let ms = start.elapsed_ms(end).map_err(cuda)?;
                let time = Duration::from_secs_f32(ms.max(0.0) / 1e3);
                self.times.add(*bytes, time);
                self.running = None;
            }
        }
        Ok(())
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // Nothing waits for it any more, or nobody will answer.
        Watched(self.shared.clone()).abort();
    }
}

/// The part of NCCL that the watch of the channel looks after.
struct Watched(Arc<Shared>);

impl Engine for Watched {
    fn failure(&mut self, limit: Duration) -> Option<String> {
        let Shared { library, comm, .. } = &*self.0;
        // While the main thread calls NCCL, it has errors of its own.
        if let Ok(comm) = comm.try_lock() {
            if let Some(Handle(comm)) = *comm {
                let mut status = SUCCESS;
                // SAFETY: the communicator is alive while it is locked; it writes one integer.
                let result = unsafe { (library.comm_get_async_error)(comm, &mut status) };
                let problem = [result, status].into_iter();
                let mut problem = problem.filter(|&r| r != SUCCESS && r != IN_PROGRESS);
                if let Some(result) = problem.next_back() {
                    let message = library.message(result);
                    return Some(format!("NCCL: {message}, while ranks exchanged values"));
                }
            }
        }
        match &*lock(&self.0.waiting) {
            Waiting::Start(since) if since.elapsed() > limit => {
                Some(format!("NCCL has not connected the ranks within {limit:?}"))
            }
            Waiting::Collective(since, done) if since.elapsed() > limit => {
                match self.0.stream.context().bind_to_thread().and_then(|()| done.try_is_complete()) {
                    Ok(true) => None,
                    Ok(false) => Some(format!(
                        "a collective of NCCL is not done after {limit:?}, though no rank is late to start it"
                    )),
                    Err(e) => Some(format!("CUDA: {e}")),
                }
            }
            _ => None,
        }
    }

    fn abort(&mut self) {
        let Shared {
            library,
            stream,
            comm,
            ..
        } = &*self.0;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            // Taken, so that nobody uses it any more, and the lock is free while it ends.
            let taken = comm.try_lock().map(|mut comm| comm.take());
            match taken {
                Ok(Some(Handle(comm))) => {
                    let _ = stream.context().bind_to_thread();
                    // SAFETY: it was taken, so it is not in use, and it is freed once.
                    unsafe { (library.comm_abort)(comm) };
                    return;
                }
                Ok(None) => return,
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

/// A collective, as candle's in-place op on the buffer.
struct InPlace<'a> {
    nccl: &'a Nccl,
    collective: Collective,
}

impl InplaceOp1 for InPlace<'_> {
    fn name(&self) -> &'static str {
        "all-reduce"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("NCCL exchanges values of CUDA devices only")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("expected contiguous values");
        };
        match &mut storage.slice {
            CudaStorageSlice::F16(slice) => self.launch(slice, start..end, FLOAT16),
            CudaStorageSlice::BF16(slice) => self.launch(slice, start..end, BFLOAT16),
            CudaStorageSlice::F32(slice) => self.launch(slice, start..end, FLOAT32),
            CudaStorageSlice::F64(slice) => self.launch(slice, start..end, FLOAT64),
            _ => bail!("ranks exchange f16, bf16, f32 and f64 only"),
        }
    }
}

impl InPlace<'_> {
    fn launch<T>(
        &self,
        slice: &mut CudaSlice<T>,
        range: std::ops::Range<usize>,
        dtype: c_int,
    ) -> Result<()> {
        let Nccl { shared, stream, .. } = self.nccl;
        let library = shared.library;
        stream.context().bind_to_thread().map_err(cuda)?;
        let len = range.len();
        let mut view = slice.slice_mut(range);
        let (pointer, _written) = view.device_ptr_mut(stream);
        let buffer = pointer as *mut c_void;
        let queue: Stream = stream.cu_stream().cast();
        let comm = lock(&shared.comm);
        let Some(Handle(comm)) = *comm else {
            bail!("the ranks' connection was ended by a failure");
        };
        match self.collective {
            Collective::Average => {
                // SAFETY: `len` values of this dtype lie at `buffer`, which the stream orders before and after; the communicator is
                // alive while it is locked.
                let result = unsafe {
                    (library.all_reduce)(buffer, buffer, len, dtype, AVERAGE, comm, queue)
                };
                library.check("ncclAllReduce", result)
            }
            Collective::Broadcast => {
                // SAFETY: as above; 0 is the rank that sends.
                let result =
                    unsafe { (library.broadcast)(buffer, buffer, len, dtype, 0, comm, queue) };
                library.check("ncclBroadcast", result)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_is_an_error_that_says_so() {
        let error = Library::open("libnccl-that-is-missing.so").err();
        let error = error.unwrap_or_default();
        assert!(error.starts_with("NCCL is missing"), "{error}");
        assert!(error.contains("LD_LIBRARY_PATH"), "{error}");
        let error = Library::open("libc.so.6").err().unwrap_or_default();
        assert!(error.contains("libc.so.6 is not NCCL"), "{error}");
    }
}
