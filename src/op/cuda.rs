//! Launches of the CUDA kernels: which instance, how many threads, which arguments. The only file with `unsafe` launches.
//!
//! Each pass and dtype of `hashed_weight` has a module of its own, loaded at its first use; kernels/instances.cuh is the
//! table of its kernels. The dtypes of indices and offsets are arguments.

use super::{Backend, Lookup, Mode, Operands, View};
use crate::bags::{bad_offset, bad_row, Division};
use crate::hash::{AffineSlots, MixSlots, Slots};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp1, DType, Layout, Result, Shape, Storage,
};
use cudarc::driver::{
    CudaView, DeviceRepr, LaunchArgs, LaunchConfig, PushKernelArg, ValidAsZeroBits,
};
use half::{bf16, f16};

macro_rules! ptx {
    ($($file:literal),*) => {
        include_str!(concat!(env!("OUT_DIR"), "/", $($file,)* ".ptx"))
    };
}

/// Threads per block, as in the kernels' launch bounds.
const THREADS: usize = 256;
const WARP: usize = 32;
/// The widest access of a thread, in bytes.
const WIDE: usize = 16;

/// A dtype of `hashed_weight`, and the dtype its gradient is summed in.
trait Element: CudaDType + DeviceRepr + ValidAsZeroBits {
    const NAME: &'static str;
    const FORWARD: &'static str;
    const BACKWARD: &'static str;
    type Acc: CudaDType + DeviceRepr + ValidAsZeroBits;
}

macro_rules! element {
    ($t:ty, $acc:ty, $name:literal) => {
        impl Element for $t {
            const NAME: &'static str = $name;
            const FORWARD: &'static str = ptx!("forward_", $name);
            const BACKWARD: &'static str = ptx!("backward_", $name);
            type Acc = $acc;
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
    has_padding: u32,
    lanes: u32,
    index_type: u32,
    offset_type: u32,
}

// SAFETY: plain `#[repr(C)]` integers, the twins of the C structs named above and in src/hash.rs.
unsafe impl DeviceRepr for BagParams {}
// SAFETY: as above.
unsafe impl DeviceRepr for MixSlots {}
// SAFETY: as above.
unsafe impl DeviceRepr for AffineSlots {}

/// The pointer argument of a tensor that is not there.
static NULL: u64 = 0;

/// The memory of a contiguous tensor.
fn view<'a, T: CudaDType>((storage, layout): View<'a, CudaStorage>) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => Err(candle_core::Error::RequiresContiguous {
            op: "hashed-embedding-bag",
        }
        .bt()),
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

    /// The element at `i`, copied to the host.
    fn get(&self, device: &CudaDevice, i: usize) -> Result<i64> {
        Ok(match self {
            Self::U32(view) => device.clone_dtoh(&view.slice(i..i + 1))?[0].into(),
            Self::I32(view) => device.clone_dtoh(&view.slice(i..i + 1))?[0].into(),
            Self::I64(view) => device.clone_dtoh(&view.slice(i..i + 1))?[0],
        })
    }
}

fn push_or_null<'b, T>(args: &mut LaunchArgs<'b>, view: &'b Option<CudaView<'_, T>>) {
    match view {
        Some(view) => args.arg(view),
        None => args.arg(&NULL),
    };
}

fn bag_params(
    lookup: &Lookup,
    lanes: usize,
    indices: &IndexView,
    offsets: Option<&IndexView>,
) -> BagParams {
    let bags = &lookup.bags;
    let (num_offsets, bag_len) = match bags.division {
        Division::Fixed(bag_len) => (0, bag_len),
        Division::Offsets {
            include_last_offset,
        } => (bags.num_bags + usize::from(include_last_offset), 0),
    };
    BagParams {
        nnz: bags.nnz as i64,
        num_bags: bags.num_bags as i64,
        num_offsets: num_offsets as i64,
        bag_len: bag_len as i64,
        padding_idx: lookup.table.padding_idx.unwrap_or_default(),
        has_padding: lookup.table.padding_idx.is_some().into(),
        lanes: lanes as u32,
        index_type: indices.index_type(),
        offset_type: offsets.map_or(0, IndexView::index_type),
    }
}

/// The grid: a group of `lanes` threads per bag along x, chunks of columns along y. The kernels stride past its limits.
fn grid(num_bags: usize, lanes: usize, column_chunks: usize) -> LaunchConfig {
    let blocks = num_bags
        .saturating_mul(lanes)
        .div_ceil(THREADS)
        .clamp(1, i32::MAX as usize);
    LaunchConfig {
        grid_dim: (blocks as u32, column_chunks.clamp(1, 65_535) as u32, 1),
        block_dim: (THREADS as u32, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// What to compute; the gradients hold grad_output, `(num_bags, embedding_dim)`.
#[derive(Clone, Copy)]
enum Pass<'a> {
    Forward,
    GradWeight(View<'a, CudaStorage>),
    GradPerSampleWeights(View<'a, CudaStorage>),
}

/// How the threads of a bag share its columns and hashes: the choice of a kernel instance.
struct Sharing {
    name: &'static str,
    /// Threads per bag.
    lanes: usize,
    /// `lanes` times the columns per thread.
    columns: usize,
}

impl Sharing {
    /// The widest accesses and the fewest hashes that the block and the alignment allow.
    fn new<T: Element>(lookup: &Lookup, pass: Pass, aligned: bool) -> Self {
        // As in kernels/instances.cuh: gradients are added in accesses of the accumulator's width.
        let wide = match pass {
            Pass::GradWeight(_) => WIDE / size_of::<T::Acc>(),
            Pass::Forward | Pass::GradPerSampleWeights(_) => WIDE / size_of::<T>(),
        };
        let (name, width, share) = match (lookup.table.slots, pass) {
            (Slots::Affine(_), _) => ("affine", 1, 1),
            (Slots::Mix(mix), pass) => {
                let block = mix.block as usize;
                if !aligned || !block.is_multiple_of(wide) {
                    ("mix_scalar", 1, 1)
                } else if matches!(pass, Pass::GradPerSampleWeights(_)) {
                    ("mix_wide", wide, 1)
                } else if block.is_multiple_of(4 * wide) {
                    ("mix_share4", wide, 4)
                } else if block.is_multiple_of(2 * wide) {
                    ("mix_share2", wide, 2)
                } else {
                    ("mix_share1", wide, 1)
                }
            }
        };
        let lanes = lookup.table.embedding_dim.div_ceil(width);
        let lanes = lanes.next_power_of_two().clamp(share, WARP);
        Self {
            name,
            lanes,
            columns: lanes * width,
        }
    }
}

/// One pass over the bags, for one dtype of `hashed_weight`.
fn run<T: Element>(
    pass: Pass,
    lookup: &Lookup,
    operands: &Operands<CudaStorage>,
) -> Result<CudaStorage> {
    let device = operands.hashed_weight.0.device();
    let (bags, table) = (&lookup.bags, &lookup.table);
    let is_empty = bags.num_bags == 0 || bags.nnz == 0;

    let hashed_weight = view::<T>(operands.hashed_weight)?;
    let indices = IndexView::new(operands.indices)?;
    let offsets = operands.offsets.map(IndexView::new).transpose()?;
    let per_sample_weights = operands.per_sample_weights.map(view::<T>).transpose()?;
    let sharing = Sharing::new::<T>(lookup, pass, is_aligned::<T>(operands.hashed_weight));
    let params = bag_params(lookup, sharing.lanes, &indices, offsets.as_ref());
    let embedding_dim = table.embedding_dim as u32;
    let mean = u32::from(table.mode == Mode::Mean);
    let mode = match table.mode {
        _ if per_sample_weights.is_some() => "weighted",
        Mode::Sum | Mode::Mean => "sum",
        Mode::Max => "max",
    };
    let kernel = |name: &str| {
        let (dtype, sharing) = (T::NAME, sharing.name);
        let (module, ptx) = match pass {
            Pass::Forward => ("forward", T::FORWARD),
            Pass::GradWeight(_) | Pass::GradPerSampleWeights(_) => ("backward", T::BACKWARD),
        };
        device.get_or_load_custom_func(
            &format!("hashed_embedding_bag_{name}_{dtype}_{sharing}"),
            &format!("candle-hashed-embedding-bag-{module}-{dtype}"),
            ptx,
        )
    };
    fn push_indices<'b>(
        args: &mut LaunchArgs<'b>,
        indices: &'b IndexView,
        offsets: &'b Option<IndexView>,
    ) {
        indices.push(args);
        match offsets {
            Some(offsets) => offsets.push(args),
            None => {
                args.arg(&NULL);
            }
        }
    }
    fn push_slots<'b>(args: &mut LaunchArgs<'b>, slots: &'b Slots) {
        match slots {
            Slots::Mix(mix) => args.arg(mix),
            Slots::Affine(affine) => args.arg(affine),
        };
    }

    match pass {
        Pass::Forward => {
            let len = bags.num_bags * table.embedding_dim;
            if is_empty {
                return zeros::<T>(device, len);
            }
            // SAFETY: the kernel writes every column of every bag.
            let mut out = unsafe { device.alloc::<T>(len)? };
            let function = kernel(&format!("fwd_{mode}"))?;
            let mut args = function.builder();
            args.arg(&hashed_weight); // const T *hashed_weight
            push_indices(&mut args, &indices, &offsets); // const void *indices, const void *offsets
            push_or_null(&mut args, &per_sample_weights); // const T *per_sample_weights
            args.arg(&mut out); // T *out
            args.arg(&params); // Bags bags
            push_slots(&mut args, &table.slots); // Hash slots
            args.arg(&embedding_dim); // uint32_t embedding_dim
            args.arg(&mean); // uint32_t mean
            let chunks = table.embedding_dim.div_ceil(sharing.columns);
            // SAFETY: the arguments are those of FORWARD in kernels/instances.cuh; the kernel reads hashed_weight below
            // its length, which the slots are bound to, and clamps offsets into indices.
            unsafe { args.launch(grid(bags.num_bags, sharing.lanes, chunks)) }.w()?;
            Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
        }
        Pass::GradWeight(grad_output) => {
            let len = operands.hashed_weight.1.shape().elem_count();
            let mut grad_weight = device.alloc_zeros::<T::Acc>(len)?;
            if !is_empty {
                let aligned = u32::from(is_aligned::<T>(grad_output));
                let grad_output = view::<T>(grad_output)?;
                let function = kernel(&format!("bwd_{mode}"))?;
                let mut args = function.builder();
                args.arg(&grad_output); // const T *grad_output
                args.arg(&hashed_weight); // const T *hashed_weight
                push_indices(&mut args, &indices, &offsets); // const void *indices, const void *offsets
                push_or_null(&mut args, &per_sample_weights); // const T *per_sample_weights
                args.arg(&mut grad_weight); // Acc<T> *grad_weight
                args.arg(&params); // Bags bags
                push_slots(&mut args, &table.slots); // Hash slots
                args.arg(&embedding_dim); // uint32_t embedding_dim
                args.arg(&mean); // uint32_t mean
                args.arg(&aligned); // uint32_t grad_output_aligned
                let chunks = table.embedding_dim.div_ceil(sharing.columns);
                // SAFETY: the arguments are those of BACKWARD in kernels/instances.cuh; the kernel adds to grad_weight
                // below its length, which the slots are bound to, and clamps offsets into indices.
                unsafe { args.launch(grid(bags.num_bags, sharing.lanes, chunks)) }.w()?;
            }
            Ok(CudaStorage::wrap_cuda_slice(grad_weight, device.clone()))
        }
        Pass::GradPerSampleWeights(grad_output) => {
            if is_empty {
                return zeros::<T>(device, bags.nnz);
            }
            // Zeros, not fresh memory: padding, and indices in no bag, have no gradient.
            let mut grad_weights = device.alloc_zeros::<T>(bags.nnz)?;
            let aligned = u32::from(is_aligned::<T>(grad_output));
            let grad_output = view::<T>(grad_output)?;
            let function = kernel("bwd_per_sample_weights")?;
            let mut args = function.builder();
            args.arg(&grad_output); // const T *grad_output
            args.arg(&hashed_weight); // const T *hashed_weight
            push_indices(&mut args, &indices, &offsets); // const void *indices, const void *offsets
            args.arg(&mut grad_weights); // T *grad_weights
            args.arg(&params); // Bags bags
            push_slots(&mut args, &table.slots); // Hash slots
            args.arg(&embedding_dim); // uint32_t embedding_dim
            args.arg(&aligned); // uint32_t grad_output_aligned
            let config = grid(bags.num_bags, sharing.lanes, 1);
            // SAFETY: the arguments are those of BACKWARD_PER_SAMPLE_WEIGHTS in kernels/instances.cuh; the kernel writes
            // grad_weights at positions that it clamps into indices, whose length is the same.
            unsafe { args.launch(config) }.w()?;
            Ok(CudaStorage::wrap_cuda_slice(grad_weights, device.clone()))
        }
    }
}

/// `len` zeros; an allocation of nothing is an error of the driver, so there is always at least one.
fn zeros<T: CudaDType + DeviceRepr + ValidAsZeroBits>(
    device: &CudaDevice,
    len: usize,
) -> Result<CudaStorage> {
    let zeros = device.alloc_zeros::<T>(len.max(1))?;
    Ok(CudaStorage::wrap_cuda_slice(zeros, device.clone()))
}

fn dispatch(pass: Pass, lookup: &Lookup, operands: &Operands<CudaStorage>) -> Result<CudaStorage> {
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
        bail!("{}: no cpu implementation, candle has its own", self.name())
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (device, rank) = (storage.device(), layout.dims().len());
        let mut shape = Strides {
            dims: [1; 8],
            strides: [0; 8],
            rank: rank as u32,
        };
        if rank > shape.dims.len() {
            bail!("hashed-embedding-bag: indices must have rank 8 at most, got {rank}");
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
            unsafe { args.launch(grid(n, 1, 1)) }.w()?;
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
                bail!("hashed-embedding-bag: expected a tensor on CUDA, got one elsewhere")
            }
        }
    }

    fn check_bounds(
        lookup: &Lookup,
        indices: View<CudaStorage>,
        offsets: Option<View<CudaStorage>>,
    ) -> Result<()> {
        let device = indices.0.device();
        let (bags, table) = (&lookup.bags, &lookup.table);
        let indices = IndexView::new(indices)?;
        let offsets = offsets.map(IndexView::new).transpose()?;
        let params = bag_params(lookup, 1, &indices, offsets.as_ref());
        let num_embeddings = table.num_embeddings as i64;
        let kernel = |name: &str| {
            device.get_or_load_custom_func(
                &format!("hashed_embedding_bag_check_{name}"),
                INDICES_MODULE,
                INDICES_PTX,
            )
        };

        // For offsets and rows: how many positions there are from the first bad one to the end, zero for none.
        let mut bad = device.alloc_zeros::<u64>(2)?;
        if let Some(offsets) = offsets.as_ref().filter(|_| params.num_offsets > 0) {
            let function = kernel("offsets")?;
            let mut first_bad = bad.slice_mut(0..1);
            let mut args = function.builder();
            offsets.push(&mut args); // const void *offsets
            args.arg(&params); // Bags bags
            args.arg(&mut first_bad); // unsigned long long *first_bad
                                      // SAFETY: the arguments are those of hashed_embedding_bag_check_offsets, which reads num_offsets offsets.
            unsafe { args.launch(grid(params.num_offsets as usize, 1, 1)) }.w()?;
        }
        if bags.nnz > 0 {
            let function = kernel("rows")?;
            let mut first_bad = bad.slice_mut(1..2);
            let mut args = function.builder();
            indices.push(&mut args); // const void *indices
            args.arg(&params); // Bags bags
            args.arg(&num_embeddings); // int64_t num_embeddings
            args.arg(&mut first_bad); // unsigned long long *first_bad
                                      // SAFETY: the arguments are those of hashed_embedding_bag_check_rows, which reads nnz indices.
            unsafe { args.launch(grid(bags.nnz, 1, 1)) }.w()?;
        }
        let bad = device.clone_dtoh(&bad)?;
        if let (Some(offsets), bad @ 1..) = (&offsets, bad[0]) {
            let at = (params.num_offsets as u64 - bad) as usize;
            let previous = match at.checked_sub(1) {
                Some(before) => Some(offsets.get(device, before)?),
                None => None,
            };
            return bad_offset(at, offsets.get(device, at)?, previous, bags.nnz);
        }
        if bad[1] > 0 {
            let at = bags.nnz - bad[1] as usize;
            return bad_row(at, indices.get(device, at)?, table.num_embeddings);
        }
        Ok(())
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
