//! Launches of the CUDA kernels: which instance, how many threads, which arguments. The only file with `unsafe` launches.
//!
//! Each pass, hash and dtype of `hashed_weight` has a module of its own, loaded at its first use; kernels/instances.cuh is
//! the table of its kernels. The dtypes of indices and offsets are arguments.

use super::{cpu, Backend, Gradient, Lookup, Mode, Operands, View};
use crate::bags::Division;
use crate::bounds::BoundsCheck;
use crate::error::{bail, NAME};
use crate::hash::{AffineSlots, BlockSlots, Divisor, Slots};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor,
};
use cudarc::driver::{
    CudaEvent, CudaFunction, CudaSlice, CudaStream, CudaView, DeviceRepr, LaunchArgs, LaunchConfig,
    PinnedHostSlice, PushKernelArg, ValidAsZeroBits,
};
use half::{bf16, f16};
use std::sync::{Arc, Mutex, PoisonError};

macro_rules! ptx {
    ($($file:literal),*) => {
        include_str!(concat!(env!("OUT_DIR"), "/", $($file,)* ".ptx"))
    };
}

/// Threads of a block, as in kernels/instances.cuh.
const FORWARD_THREADS: usize = 128;
const BACKWARD_THREADS: usize = 512;
const MAX_BACKWARD_THREADS: usize = 256;
/// As in kernels/instances.cuh and kernels/indices.cu.
const STRIDED_THREADS: usize = 512;
const WARP: usize = 32;
/// The widest access of a thread, in bytes.
const WIDE: usize = 16;
/// As in kernels/bags.cuh: a bag of more indices is worked on by a whole thread block.
const LONG_BAG: usize = 256;
/// The kernels count the indices of a bag in 32 bits, and share a longer one among 8 groups at least.
const MAX_INDICES: usize = 1 << 34;

/// The kernels of one pass and dtype: see build.rs.
struct Modules {
    pass: &'static str,
    /// Of each [`Family`], as PTX.
    ptx: [&'static str; 3],
}

macro_rules! modules {
    ($pass:literal, $dtype:literal) => {
        Modules {
            pass: $pass,
            ptx: [
                ptx!($pass, "_affine_", $dtype),
                ptx!($pass, "_mix_", $dtype),
                ptx!($pass, "_balanced_", $dtype),
            ],
        }
    };
}

/// The kind of hash that a kernel is compiled for.
#[derive(Clone, Copy)]
enum Family {
    Affine,
    Mix,
    Balanced,
}

impl Family {
    fn of(slots: &Slots) -> Self {
        match slots {
            Slots::Affine(_) => Self::Affine,
            Slots::Mix(_) => Self::Mix,
            Slots::Balanced(_) => Self::Balanced,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Affine => "affine",
            Self::Mix => "mix",
            Self::Balanced => "balanced",
        }
    }
}

/// A dtype of `hashed_weight`, and the dtype its gradient is summed in.
trait Element: CudaDType + DeviceRepr + ValidAsZeroBits {
    const NAME: &'static str;
    const FORWARD: Modules;
    const BACKWARD: Modules;
    const DETERMINISTIC: Modules;
    type Acc: CudaDType + DeviceRepr + ValidAsZeroBits + 'static;

    fn acc(x: f64) -> Self::Acc;
}

macro_rules! element {
    ($t:ty, $acc:ty, $name:literal) => {
        impl Element for $t {
            const NAME: &'static str = $name;
            const FORWARD: Modules = modules!("forward", $name);
            const BACKWARD: Modules = modules!("backward", $name);
            const DETERMINISTIC: Modules = modules!("deterministic", $name);
            type Acc = $acc;

            fn acc(x: f64) -> $acc {
                x as $acc
            }
        }
    };
}
element!(f16, f32, "f16");
element!(bf16, f32, "bf16");
element!(f32, f32, "f32");
element!(f64, f64, "f64");

/// `Bags` of kernels/bags.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
struct BagParams {
    nnz: i64,
    num_bags: i64,
    num_offsets: i64,
    bag_len: i64,
    padding_idx: i64,
    first_row: i64,
    num_embeddings: i64,
    feature_stride: i64,
    tables: Divisor,
    has_padding: u32,
    lanes: u32,
    bags_per_group: u32,
    index_type: u32,
    offset_type: u32,
}

// SAFETY: plain `#[repr(C)]` integers, the twins of the C structs named above and in src/hash.rs.
unsafe impl DeviceRepr for BagParams {}
// SAFETY: as above.
unsafe impl DeviceRepr for BlockSlots {}
// SAFETY: as above.
unsafe impl DeviceRepr for AffineSlots {}

/// The pointer argument of a tensor that is not there.
static NULL: u64 = 0;

/// The memory of a contiguous tensor.
fn view<'a, T: CudaDType>((storage, layout): View<'a, CudaStorage>) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => Err(candle_core::Error::RequiresContiguous { op: NAME }.bt()),
    }
}

/// Whether the first element lies at a multiple of the widest access; allocations do.
fn is_aligned<T>((_, layout): View<CudaStorage>) -> bool {
    (layout.start_offset() * size_of::<T>()).is_multiple_of(WIDE)
}

/// A tensor of indices or offsets, of any of their dtypes; `IndexType` of kernels/bags.cuh.
enum IndexView<'a> {
    U32(CudaView<'a, u32>),
    I32(CudaView<'a, i32>),
    I64(CudaView<'a, i64>),
}

impl<'a> IndexView<'a> {
    fn new(tensor: View<'a, CudaStorage>) -> Result<Self> {
        Ok(match tensor.0.dtype() {
            DType::U32 => Self::U32(view(tensor)?),
            DType::I32 => Self::I32(view(tensor)?),
            _ => Self::I64(view(tensor)?),
        })
    }

    fn index_type(&self) -> u32 {
        match self {
            Self::U32(_) => 0,
            Self::I32(_) => 1,
            Self::I64(_) => 2,
        }
    }

    fn push<'b>(&'b self, args: &mut LaunchArgs<'b>) {
        match self {
            Self::U32(view) => args.arg(view),
            Self::I32(view) => args.arg(view),
            Self::I64(view) => args.arg(view),
        };
    }
}

fn push_or_null<'b, T>(args: &mut LaunchArgs<'b>, view: &'b Option<CudaView<'_, T>>) {
    match view {
        Some(view) => args.arg(view),
        None => args.arg(&NULL),
    };
}

/// What to compute; the gradients hold grad_output, `(num_bags, embedding_dim)`.
#[derive(Clone, Copy)]
enum Pass<'a> {
    Forward,
    GradWeight(View<'a, CudaStorage>),
    GradPerSampleWeights(View<'a, CudaStorage>),
}

/// How the threads of a group share the columns and hashes of a row: the choice of a kernel instance.
struct Sharing {
    family: Family,
    /// What follows the family in the name of a kernel.
    suffix: &'static str,
    /// Threads of a group, which share a bag.
    lanes: usize,
    /// `lanes` times the columns per thread.
    columns: usize,
    /// Whether the kernel is one for plain bags.
    is_plain: bool,
}

impl Sharing {
    /// The widest accesses and the fewest hashes that the block and the alignment allow.
    fn new<T: Element>(lookup: &Lookup, pass: Pass, aligned: bool, weighted: bool) -> Self {
        // As in kernels/instances.cuh: gradients are added in accesses of the accumulator's width.
        let wide = match pass {
            Pass::GradWeight(_) => WIDE / size_of::<T::Acc>(),
            Pass::Forward | Pass::GradPerSampleWeights(_) => WIDE / size_of::<T>(),
        };
        let is_fixed = matches!(pass, Pass::GradWeight(_))
            && lookup.gradient == Gradient::Deterministic
            && lookup.table.mode != Mode::Max;
        let family = Family::of(&lookup.table.slots);
        let is_plain = matches!((pass, family), (Pass::Forward, Family::Balanced))
            && matches!(lookup.bags.division, Division::Fixed(len) if len <= LONG_BAG)
            && lookup.bags.tables == 1
            && lookup.table.padding_idx.is_none()
            && !weighted;
        let (suffix, width, share) = match (lookup.table.slots, pass) {
            (Slots::Affine(_), _) => ("", 1, 1),
            (slots, _) if is_fixed && slots.block().is_multiple_of(4) => ("_scalar_share4", 1, 4),
            (slots, pass) => {
                let block = slots.block();
                if is_fixed || !aligned || !block.is_multiple_of(wide) {
                    ("_scalar", 1, 1)
                } else if matches!(pass, Pass::GradPerSampleWeights(_)) {
                    ("_wide", wide, 1)
                } else if block.is_multiple_of(4 * wide) {
                    (["_share4", "_share4_plain"][usize::from(is_plain)], wide, 4)
                } else if block.is_multiple_of(2 * wide) {
                    (["_share2", "_share2_plain"][usize::from(is_plain)], wide, 2)
                } else {
                    (["_share1", "_share1_plain"][usize::from(is_plain)], wide, 1)
                }
            }
        };
        let lanes = lookup.table.embedding_dim.div_ceil(width);
        let lanes = lanes.next_power_of_two().clamp(share, WARP);
        Self {
            family,
            suffix,
            lanes,
            columns: lanes * width,
            is_plain: suffix.ends_with("_plain"),
        }
    }
}

/// How groups are divided among bags and thread blocks.
struct Groups {
    /// Consecutive bags of a group.
    bags_per_group: usize,
    threads: usize,
    blocks: usize,
}

impl Groups {
    /// A group has several bags, so that what it sets up serves them all and the rows of one are fetched while the one before
    /// is summed; but only where all groups together still fill a large GPU more than twice. Measured on an H200.
    fn new(lookup: &Lookup, pass: Pass, sharing: &Sharing) -> Self {
        let lanes = sharing.lanes;
        let (threads, full) = match (pass, lookup.table.mode) {
            (Pass::Forward, _) if sharing.is_plain => (FORWARD_THREADS, 1 << 20),
            (Pass::Forward, _) => (FORWARD_THREADS, 1 << 19),
            (Pass::GradWeight(_), Mode::Max) => (MAX_BACKWARD_THREADS, 1 << 20),
            _ => (BACKWARD_THREADS, 1 << 20),
        };
        let num_bags = lookup.bags.num_bags;
        let bags_per_group = (num_bags.saturating_mul(lanes) / full).clamp(1, 8);
        Self {
            bags_per_group,
            threads,
            blocks: num_bags.div_ceil(threads / lanes * bags_per_group),
        }
    }

    /// Thread blocks of consecutive bags along x, chunks of columns along y, which the kernels stride past its limit.
    fn grid(&self, column_chunks: usize) -> LaunchConfig {
        LaunchConfig {
            grid_dim: (self.blocks as u32, column_chunks.clamp(1, 65_535) as u32, 1),
            block_dim: (self.threads as u32, 1, 1),
            shared_mem_bytes: 0,
        }
    }
}

/// One pass over the bags, for one dtype of `hashed_weight`: what its launch needs.
struct Launch<'a, T: Element> {
    lookup: &'a Lookup,
    operands: &'a Operands<'a, CudaStorage>,
    device: &'a CudaDevice,
    stream: Arc<CudaStream>,
    hashed_weight: CudaView<'a, T>,
    indices: IndexView<'a>,
    offsets: Option<IndexView<'a>>,
    first_rows: Option<CudaView<'a, i64>>,
    per_sample_weights: Option<CudaView<'a, T>>,
    sharing: Sharing,
    params: BagParams,
    embedding_dim: u32,
    mean: u32,
    config: LaunchConfig,
}

/// `Launch` for `pass`, as `|launch| body`; `first_rows` lives in a tensor that has to be locked meanwhile.
fn launch<T: Element, R>(
    pass: Pass,
    lookup: &Lookup,
    operands: &Operands<CudaStorage>,
    body: impl FnOnce(Launch<T>) -> Result<R>,
) -> Result<R> {
    let Lookup { table, bags, .. } = lookup;
    if bags.nnz > MAX_INDICES {
        let nnz = bags.nnz;
        bail!("at most {MAX_INDICES} indices on CUDA, got {nnz}");
    }
    let indices = IndexView::new(operands.indices)?;
    let offsets = operands.offsets.map(IndexView::new).transpose()?;
    let first_rows = table.first_rows.as_ref().map(Tensor::storage_and_layout);
    let first_rows = match &first_rows {
        Some((storage, layout)) => Some(view::<i64>((Cuda::storage(storage)?, layout))?),
        None => None,
    };
    let aligned = is_aligned::<T>(operands.hashed_weight);
    let weighted = operands.per_sample_weights.is_some();
    let sharing = Sharing::new::<T>(lookup, pass, aligned, weighted);
    let groups = Groups::new(lookup, pass, &sharing);
    let chunks = match pass {
        Pass::GradPerSampleWeights(_) => 1,
        _ => table.embedding_dim.div_ceil(sharing.columns),
    };
    let (num_offsets, bag_len) = match bags.division {
        Division::Fixed(bag_len) => (0, bag_len),
        Division::Offsets {
            include_last_offset,
            ..
        } => (bags.num_bags + usize::from(include_last_offset), 0),
    };
    let params = BagParams {
        nnz: bags.nnz as i64,
        num_bags: bags.num_bags as i64,
        num_offsets: num_offsets as i64,
        bag_len: bag_len as i64,
        padding_idx: table.padding_idx.unwrap_or_default(),
        first_row: table.tables.first_row(0),
        num_embeddings: table.tables.num_embeddings(0) as i64,
        feature_stride: bags.feature_stride() as i64,
        tables: Divisor::new(bags.tables as u64),
        has_padding: table.padding_idx.is_some().into(),
        lanes: sharing.lanes as u32,
        bags_per_group: groups.bags_per_group as u32,
        index_type: indices.index_type(),
        offset_type: offsets.as_ref().map_or(0, IndexView::index_type),
    };
    let device = operands.hashed_weight.0.device();
    body(Launch {
        lookup,
        operands,
        device,
        stream: device.cuda_stream(),
        hashed_weight: view(operands.hashed_weight)?,
        indices,
        offsets,
        first_rows,
        per_sample_weights: operands.per_sample_weights.map(view::<T>).transpose()?,
        embedding_dim: table.embedding_dim as u32,
        mean: (table.mode == Mode::Mean).into(),
        config: groups.grid(chunks),
        sharing,
        params,
    })
}

impl<T: Element> Launch<'_, T> {
    /// A kernel of the modules of this dtype, compiled at their first use.
    fn kernel(&self, modules: Modules, name: &str) -> Result<CudaFunction> {
        let Modules { pass, ptx } = modules;
        let (family, dtype) = (self.sharing.family, T::NAME);
        let kernel = self.device.get_or_load_custom_func(
            &format!("hashed_embedding_bag_{name}"),
            &format!(
                "candle-hashed-embedding-bag-{pass}-{}-{dtype}",
                family.name()
            ),
            ptx[family as usize],
        )?;
        Ok(kernel.into_cuda_function())
    }

    /// The suffix of a kernel of this mode.
    fn mode(&self) -> String {
        let mode = match self.lookup.table.mode {
            _ if self.per_sample_weights.is_some() => "weighted",
            Mode::Sum | Mode::Mean => "sum",
            Mode::Max => "max",
        };
        format!("{mode}_{}", self.sharing_name())
    }

    fn sharing_name(&self) -> String {
        let Sharing { family, suffix, .. } = self.sharing;
        format!("{}_{}{suffix}", T::NAME, family.name())
    }

    /// Whether no bag holds anything.
    fn is_empty(&self) -> bool {
        self.lookup.bags.num_bags == 0 || self.lookup.bags.nnz == 0
    }

    fn push_inputs<'b>(&'b self, args: &mut LaunchArgs<'b>) {
        self.indices.push(args); // const void *indices
        match &self.offsets {
            Some(offsets) => offsets.push(args), // const void *offsets
            None => {
                args.arg(&NULL);
            }
        }
        push_or_null(args, &self.first_rows); // const int64_t *first_rows
    }

    fn push_bags<'b>(&'b self, args: &mut LaunchArgs<'b>) {
        args.arg(&self.params); // Bags bags
        match &self.lookup.table.slots {
            Slots::Mix(slots) | Slots::Balanced(slots) => args.arg(slots), // Hash slots
            Slots::Affine(slots) => args.arg(slots),
        };
        args.arg(&self.embedding_dim); // uint32_t embedding_dim
    }

    fn forward(&self) -> Result<CudaStorage> {
        let (device, bags) = (self.device, &self.lookup.bags);
        let is_checked = self.lookup.bounds_check == BoundsCheck::Error;
        let len = bags.num_bags * self.lookup.table.embedding_dim;
        if len == 0 {
            // No bag looks at the offsets then, of which there may be one.
            if is_checked {
                check_bounds(self.lookup, self.operands)?;
            }
            return zeros::<T>(device, len);
        }
        // SAFETY: the kernel writes every column of every bag.
        let mut out = unsafe { device.alloc::<T>(len)? };
        let function = self.kernel(T::FORWARD, &format!("fwd_{}", self.mode()))?;
        // The host waits for the check alone: the lookup behind it is safe whatever it is given, and may take its time.
        let check = match is_checked {
            true => Some(self.start_check()?),
            false => None,
        };
        let mut args = self.stream.launch_builder(&function);
        args.arg(&self.hashed_weight); // const T *hashed_weight
        self.push_inputs(&mut args);
        push_or_null(&mut args, &self.per_sample_weights); // const T *per_sample_weights
        args.arg(&mut out); // T *out
        self.push_bags(&mut args);
        args.arg(&self.mean); // uint32_t mean

        // SAFETY: the arguments are those of FORWARD in kernels/instances.cuh; the kernel reads hashed_weight below its
        // length, which the slots are bound to, and clamps offsets into indices.
        let launched = unsafe { args.launch(self.config) }.w();
        if let Some(check) = check {
            if check.wait()? {
                check_bounds(self.lookup, self.operands)?;
                bail!("indices or offsets changed during the lookup");
            }
        }
        launched?;
        Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
    }

    /// Starts to look for indices and offsets out of range.
    fn start_check(&self) -> Result<Check> {
        let name = "hashed_embedding_bag_check";
        let function = self
            .device
            .get_or_load_custom_func(name, INDICES_MODULE, INDICES_PTX)?;
        let mut check = Check::take(&self.stream)?;
        let raised = check.pointer()?;
        let mut args = function.builder();
        self.push_inputs(&mut args);
        args.arg(&raised); // uint32_t *out_of_range
        args.arg(&self.params); // Bags bags
        let bags = &self.lookup.bags;
        let threads = match self.first_rows {
            // An offset per thread, and four indices, which are on their way at once.
            None => bags.num_bags.max(bags.nnz.div_ceil(4)),
            // A warp per bag.
            Some(_) => bags.num_bags * WARP,
        };
        let config = strided(threads);
        // SAFETY: the arguments are those of hashed_embedding_bag_check in kernels/indices.cu, which strides over what there
        // is and clamps offsets into indices; the flag is waited for before it goes back.
        unsafe { args.launch(config) }.w()?;
        check.done.record(&self.stream).w()?;
        Ok(check)
    }

    fn grad_weight(&self, grad_output: View<CudaStorage>) -> Result<CudaStorage> {
        let device = self.device;
        let mut grad_weight = device.alloc_zeros::<T::Acc>(self.hashed_weight.len())?;
        if !self.is_empty() {
            let aligned = u32::from(is_aligned::<T>(grad_output));
            let grad_output = view::<T>(grad_output)?;
            let fixed = match self.lookup.gradient {
                Gradient::Fastest => None,
                Gradient::Deterministic => Some(self.fixed_point(&grad_output)?),
            };
            let mode = self.mode();
            let function = match fixed {
                None => self.kernel(T::BACKWARD, &format!("bwd_{mode}"))?,
                Some(_) => self.deterministic(&format!("bwd_fixed_{mode}"))?,
            };
            let mut args = self.stream.launch_builder(&function);
            args.arg(&grad_output); // const T *grad_output
            args.arg(&self.hashed_weight); // const T *hashed_weight
            self.push_inputs(&mut args);
            push_or_null(&mut args, &self.per_sample_weights); // const T *per_sample_weights
            args.arg(&mut grad_weight); // Acc<T> *grad_weight
            if let Some(fixed) = &fixed {
                fixed.push(&mut args);
            }
            self.push_bags(&mut args);
            args.arg(&self.mean); // uint32_t mean
            args.arg(&aligned); // uint32_t grad_output_aligned

            // SAFETY: the arguments are those of BACKWARD or BACKWARD_FIXED in kernels/instances.cuh; the kernel adds to
            // grad_weight, and to as many units per slot as FixedPoint has, below their length, which the slots are bound
            // to, and clamps offsets into indices.
            unsafe { args.launch(self.config) }.w()?;
            if let Some(fixed) = &fixed {
                let function = self.deterministic(&format!("from_fixed_{}", T::NAME))?;
                let mut args = self.stream.launch_builder(&function);
                args.arg(&mut grad_weight); // Acc<T> *grad_weight
                fixed.push(&mut args);
                let config = strided(fixed.len as usize);
                // SAFETY: the arguments are those of hashed_embedding_bag_from_fixed, which goes over `len` slots.
                unsafe { args.launch(config) }.w()?;
            }
        }
        Ok(CudaStorage::wrap_cuda_slice(grad_weight, device.clone()))
    }

    fn grad_per_sample_weights(&self, grad_output: View<CudaStorage>) -> Result<CudaStorage> {
        let (device, nnz) = (self.device, self.lookup.bags.nnz);
        if self.is_empty() {
            return zeros::<T>(device, nnz);
        }
        // Zeros, not fresh memory: padding, and indices in no bag, have no gradient.
        let mut grad_weights = device.alloc_zeros::<T>(nnz)?;
        let aligned = u32::from(is_aligned::<T>(grad_output));
        let grad_output = view::<T>(grad_output)?;
        let name = format!("bwd_per_sample_weights_{}", self.sharing_name());
        let function = self.kernel(T::BACKWARD, &name)?;
        let mut args = self.stream.launch_builder(&function);
        args.arg(&grad_output); // const T *grad_output
        args.arg(&self.hashed_weight); // const T *hashed_weight
        self.push_inputs(&mut args);
        args.arg(&mut grad_weights); // T *grad_weights
        self.push_bags(&mut args);
        args.arg(&aligned); // uint32_t grad_output_aligned

        // SAFETY: the arguments are those of BACKWARD_PER_SAMPLE_WEIGHTS in kernels/instances.cuh; the kernel writes
        // grad_weights at positions that it clamps into indices, whose length is the same.
        unsafe { args.launch(self.config) }.w()?;
        Ok(CudaStorage::wrap_cuda_slice(grad_weights, device.clone()))
    }

    fn deterministic(&self, name: &str) -> Result<CudaFunction> {
        self.kernel(T::DETERMINISTIC, name)
    }

    /// The grid on which the gradients of this call are summed.
    fn fixed_point(&self, grad_output: &CudaView<T>) -> Result<FixedPoint<T::Acc>> {
        let (device, Lookup { table, bags, .. }) = (self.device, self.lookup);
        let len = self.hashed_weight.len();
        // A block of columns puts one term at most into a slot.
        let terms = bags.nnz as u128 * table.embedding_dim.div_ceil(table.slots.block()) as u128;
        let log2_terms = terms.next_power_of_two().trailing_zeros();
        if log2_terms > 60 {
            bail!("{terms} terms are too many for a deterministic gradient");
        }
        let grids = size_of::<T::Acc>() / 4;
        let units = device.alloc_zeros::<i64>(grids * len)?;
        let weights = self.per_sample_weights.as_ref();
        let none = if weights.is_none() { 1.0 } else { 0.0 };
        let mut largest = device.clone_htod(&[T::acc(0.0), T::acc(none)])?;
        let function = self.deterministic(&format!("largest_{}", T::NAME))?;
        for (i, values) in [Some(grad_output), weights]
            .into_iter()
            .flatten()
            .enumerate()
        {
            let mut largest = largest.slice_mut(i..i + 1);
            let n = values.len() as u64;
            let mut args = self.stream.launch_builder(&function);
            args.arg(values); // const T *values
            args.arg(&n); // uint64_t n
            args.arg(&mut largest); // Acc<T> *largest
            let config = strided(values.len());
            // SAFETY: the arguments are those of hashed_embedding_bag_largest, which goes over n values.
            unsafe { args.launch(config) }.w()?;
        }
        Ok(FixedPoint {
            units,
            len: len as u64,
            largest,
            log2_terms,
        })
    }
}

/// A check that is under way: a flag in host memory that the kernel raises, so that nothing has to be cleared or copied on
/// the device for it, and an event that says when the kernel has ended.
///
/// One is in use per call that is checked; they are kept, because making one takes longer than most lookups.
struct Check {
    raised: PinnedHostSlice<u32>,
    done: CudaEvent,
}

static CHECKS: Mutex<Vec<Check>> = Mutex::new(vec![]);

impl Check {
    /// A flag that is down, for a kernel on this stream.
    fn take(stream: &CudaStream) -> Result<Self> {
        let mut checks = CHECKS.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |check: &Self| Arc::ptr_eq(check.done.context(), stream.context());
        if let Some(at) = checks.iter().position(fits) {
            return Ok(checks.swap_remove(at));
        }
        // SAFETY: the memory is written right away.
        let mut raised = unsafe { stream.context().alloc_pinned::<u32>(1) }.w()?;
        raised.as_mut_slice().w()?[0] = 0;
        let done = stream.context().new_event(None).w()?;
        Ok(Self { raised, done })
    }

    /// Where the flag lies; host memory has the same address on the device.
    fn pointer(&mut self) -> Result<u64> {
        Ok(self.raised.as_mut_ptr().w()? as u64)
    }

    /// Waits for the kernel; whether it raised the flag.
    fn wait(mut self) -> Result<bool> {
        self.done.synchronize().w()?;
        let raised = std::mem::take(&mut self.raised.as_mut_slice().w()?[0]) != 0;
        let mut checks = CHECKS.lock().unwrap_or_else(PoisonError::into_inner);
        checks.push(self);
        Ok(raised)
    }
}

/// Sums in fixed point, see kernels/fixed.cuh.
struct FixedPoint<A> {
    units: CudaSlice<i64>,
    len: u64,
    largest: CudaSlice<A>,
    log2_terms: u32,
}

impl<A: DeviceRepr> FixedPoint<A> {
    fn push<'b>(&'b self, args: &mut LaunchArgs<'b>) {
        args.arg(&self.units); // int64_t *units, changed by atomic additions alone
        args.arg(&self.len); // uint64_t len
        args.arg(&self.largest); // const Acc<T> *largest
        args.arg(&self.log2_terms); // uint32_t log2_terms
    }
}

/// The grid of a kernel that strides over `n` values.
fn strided(n: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (n.div_ceil(STRIDED_THREADS).clamp(1, 2048) as u32, 1, 1),
        block_dim: (STRIDED_THREADS as u32, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// The error for what a kernel found out of range, from a copy on the host.
fn check_bounds(lookup: &Lookup, operands: &Operands<CudaStorage>) -> Result<()> {
    let (indices, layout) = operands.indices;
    let indices = indices.to_cpu_storage()?;
    let offsets = match operands.offsets {
        Some((offsets, layout)) => Some((offsets.to_cpu_storage()?, layout)),
        None => None,
    };
    let offsets = offsets.as_ref().map(|(offsets, layout)| (offsets, *layout));
    cpu::check_bounds(lookup, (&indices, layout), offsets)
}

/// `len` zeros; an allocation of nothing is an error of the driver, so there is always at least one.
fn zeros<T: CudaDType + DeviceRepr + ValidAsZeroBits>(
    device: &CudaDevice,
    len: usize,
) -> Result<CudaStorage> {
    let zeros = device.alloc_zeros::<T>(len.max(1))?;
    Ok(CudaStorage::wrap_cuda_slice(zeros, device.clone()))
}

/// Resolves the dtype.
fn dispatch(pass: Pass, lookup: &Lookup, operands: &Operands<CudaStorage>) -> Result<CudaStorage> {
    fn run<T: Element>(
        pass: Pass,
        lookup: &Lookup,
        operands: &Operands<CudaStorage>,
    ) -> Result<CudaStorage> {
        launch::<T, _>(pass, lookup, operands, |launch| match pass {
            Pass::Forward => launch.forward(),
            Pass::GradWeight(grad_output) => launch.grad_weight(grad_output),
            Pass::GradPerSampleWeights(grad_output) => launch.grad_per_sample_weights(grad_output),
        })
    }
    match operands.hashed_weight.0.dtype() {
        DType::F16 => run::<f16>(pass, lookup, operands),
        DType::BF16 => run::<bf16>(pass, lookup, operands),
        DType::F32 => run::<f32>(pass, lookup, operands),
        _ => run::<f64>(pass, lookup, operands),
    }
}

const INDICES_MODULE: &str = "candle-hashed-embedding-bag-indices";
const INDICES_PTX: &str = ptx!("indices");

/// `Strides` of kernels/indices.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Strides {
    dims: [i64; 8],
    strides: [i64; 8],
    rank: u32,
}

// SAFETY: plain `#[repr(C)]` integers, the twin of the C struct.
unsafe impl DeviceRepr for Strides {}

/// The contiguous copy of a strided i32 tensor, which candle has no kernel for.
pub(super) struct ContiguousI32;

impl CustomOp1 for ContiguousI32 {
    fn name(&self) -> &'static str {
        "hashed-embedding-bag-contiguous-i32"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("contiguous-i32 has no CPU implementation; candle has its own")
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (device, rank) = (storage.device(), layout.dims().len());
        let mut shape = Strides {
            dims: [1; 8],
            strides: [0; 8],
            rank: rank as u32,
        };
        if rank > shape.dims.len() {
            bail!("indices must have rank 8 at most, got {rank}");
        }
        for d in 0..rank {
            shape.dims[d] = layout.dims()[d] as i64;
            shape.strides[d] = layout.stride()[d] as i64;
        }
        let n = layout.shape().elem_count();
        let mut to = device.alloc_zeros::<i32>(n.max(1))?;
        if n > 0 {
            let from = storage
                .as_cuda_slice::<i32>()?
                .slice(layout.start_offset()..);
            let count = n as i64;
            let function = device.get_or_load_custom_func(
                "hashed_embedding_bag_copy_i32",
                INDICES_MODULE,
                INDICES_PTX,
            )?;
            let mut args = function.builder();
            args.arg(&from); // const int32_t *from
            args.arg(&mut to); // int32_t *to
            args.arg(&count); // int64_t n
            args.arg(&shape); // Strides shape
                              // SAFETY: the arguments are those of hashed_embedding_bag_copy_i32, which writes n elements and reads them
                              // where the layout says they lie.
            unsafe { args.launch(strided(n)) }.w()?;
        }
        let to = CudaStorage::wrap_cuda_slice(to, device.clone());
        Ok((to, layout.shape().clone()))
    }
}

pub(super) struct Cuda;

impl Backend for Cuda {
    type Storage = CudaStorage;

    fn storage(storage: &Storage) -> Result<&CudaStorage> {
        match storage {
            Storage::Cuda(storage) => Ok(storage),
            Storage::Cpu(_) | Storage::Metal(_) => {
                bail!("expected a tensor on CUDA, got one elsewhere")
            }
        }
    }

    fn forward(lookup: &Lookup, operands: &Operands<CudaStorage>) -> Result<CudaStorage> {
        dispatch(Pass::Forward, lookup, operands)
    }

    fn grad_weight(
        lookup: &Lookup,
        grad_output: View<CudaStorage>,
        operands: &Operands<CudaStorage>,
    ) -> Result<CudaStorage> {
        dispatch(Pass::GradWeight(grad_output), lookup, operands)
    }

    fn grad_per_sample_weights(
        lookup: &Lookup,
        grad_output: View<CudaStorage>,
        operands: &Operands<CudaStorage>,
    ) -> Result<CudaStorage> {
        dispatch(Pass::GradPerSampleWeights(grad_output), lookup, operands)
    }
}
