//! The launch of each kernel of a lookup. This is the only file under op/ with `unsafe` launches.
//!
//! Every argument is followed by its declaration in kernels/. Whatever the indices and offsets are, the kernels stay within their
//! arguments: rows are hashed to slots below the length that the hash is bound to, and offsets are clamped, as are rows of a row tensor.

use super::abi::IndexType;
use super::bounds::Flag;
use super::fixed_point::FixedPoint;
use super::instances::{Dtype, Kernel, Pass, WARP, WIDEST_ACCESS};
use super::modules;
use super::params::{BagParams, RowTensor, Strides, WithRows};
use super::plan::{strided_blocks, Plan};
use crate::bags::Division;
use crate::error::{bail, NAME};
use crate::hash::{AffineSlots, BlockSlots, Divisor, Keys, LmaSlots, Slots};
use crate::low_bit::LowBit;
use crate::op::{Lookup, Mode, Operands, Table, View};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::{CudaStorage, DType, Result};
use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DeviceRepr, LaunchArgs,
    LaunchConfig, PushKernelArg, ValidAsZeroBits,
};
use half::{bf16, f16};
use std::sync::Arc;

/// The kernels count the indices of a bag in 32 bits, and share a longer bag among at least 4 groups.
const MAX_INDICES: usize = 1 << 34;

/// The pointer argument for an absent tensor.
static NULL: u64 = 0;

// SAFETY: `#[repr(C)]` integers, laid out as the CUDA struct of the same name: see params.rs.
unsafe impl DeviceRepr for BagParams {}
// SAFETY: as above.
unsafe impl DeviceRepr for Strides {}
// SAFETY: as above.
unsafe impl DeviceRepr for AffineSlots {}
// SAFETY: as above; the CUDA struct is BlockSlots.
unsafe impl DeviceRepr for BlockSlots {}
// SAFETY: as above, one struct behind the other; the CUDA structs are LmaRows and RowBlocks.
unsafe impl DeviceRepr for WithRows<LmaSlots> {}
// SAFETY: as above.
unsafe impl DeviceRepr for WithRows<BlockSlots> {}

/// A dtype of `hashed_weight`, and the dtype in which its gradient is summed.
pub trait Element: CudaDType + DeviceRepr + ValidAsZeroBits + 'static {
    const DTYPE: Dtype;
    type Acc: Element;

    fn from_f64(x: f64) -> Self;
}

macro_rules! element {
    ($t:ty, $acc:ty, $dtype:ident, $from_f64:expr) => {
        impl Element for $t {
            const DTYPE: Dtype = Dtype::$dtype;
            type Acc = $acc;

            fn from_f64(x: f64) -> Self {
                $from_f64(x)
            }
        }
    };
}
element!(f16, f32, F16, f16::from_f64);
element!(bf16, f32, Bf16, bf16::from_f64);
element!(f32, f32, F32, |x| x as f32);
element!(f64, f64, F64, |x| x);

/// The memory of a contiguous tensor.
pub fn view<'a, T: CudaDType>((storage, layout): View<'a, CudaStorage>) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => Err(candle_core::Error::RequiresContiguous { op: NAME }.bt()),
    }
}

/// Whether the first element is aligned to the widest access. Allocations themselves always are.
fn is_aligned<T>((_, layout): View<CudaStorage>) -> bool {
    (layout.start_offset() * size_of::<T>()).is_multiple_of(WIDEST_ACCESS)
}

/// The memory of a tensor of indices or offsets.
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

    fn index_type(&self) -> IndexType {
        match self {
            Self::U32(_) => IndexType::U32,
            Self::I32(_) => IndexType::I32,
            Self::I64(_) => IndexType::I64,
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

fn push_or_null<'b, T>(args: &mut LaunchArgs<'b>, view: Option<&'b CudaView<'_, T>>) {
    match view {
        Some(view) => args.arg(view),
        None => args.arg(&NULL),
    };
}

/// The grid of a kernel whose threads stride over `n` values.
fn strided(kernel: Kernel, n: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (strided_blocks(kernel, n) as u32, 1, 1),
        block_dim: (kernel.threads() as u32, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// The hash of a lookup as kernels take it.
enum HashParams {
    Affine(AffineSlots),
    Blocks(BlockSlots),
    // Much larger than the others.
    Lma(Box<WithRows<LmaSlots>>),
    RowBlocks(WithRows<BlockSlots>),
}

impl HashParams {
    /// `row_tensor` is [`Table::row_tensor`] of the lookup.
    fn new(
        table: &Table,
        row_tensor: Option<View<CudaStorage>>,
        stream: &CudaStream,
    ) -> Result<Self> {
        let rows = |keys: Option<Keys>| {
            let Some(tensor) = row_tensor else {
                bail!("the hash needs a row tensor");
            };
            let column_blocks = table.embedding_dim.div_ceil(table.slots.block());
            // The kernels of this stream read it in order, as they read all memory of the device: no event need tell when.
            let (rows, last_row, row_len) = match tensor.0.dtype() {
                DType::U32 => {
                    let table = view::<u32>(tensor)?;
                    let (pointer, _) = table.device_ptr(stream);
                    (pointer, table.len() / column_blocks - 1, column_blocks)
                }
                _ => {
                    let signatures = view::<i64>(tensor)?;
                    let (pointer, _) = signatures.device_ptr(stream);
                    (pointer, signatures.len() - 1, 0)
                }
            };
            Ok(RowTensor {
                rows,
                last_row: last_row as u64,
                keys: keys.map_or(0, |keys| keys.first),
                key_bits: keys.map_or(0, |keys| keys.key_bits),
                row_len: row_len as u32,
            })
        };
        Ok(match table.slots {
            Slots::Affine(slots) => Self::Affine(slots),
            Slots::Mix(slots) | Slots::Balanced(slots) => Self::Blocks(slots),
            Slots::Lma(slots) => Self::Lma(Box::new(WithRows {
                slots,
                rows: rows(None)?,
            })),
            Slots::Semantic(slots, keys) => Self::RowBlocks(WithRows {
                slots,
                rows: rows(Some(keys))?,
            }),
            Slots::SlotTable(slots) => Self::RowBlocks(WithRows {
                slots,
                rows: rows(None)?,
            }),
        })
    }

    fn push<'b>(&'b self, args: &mut LaunchArgs<'b>) {
        match self {
            Self::Affine(slots) => args.arg(slots),
            Self::Blocks(slots) => args.arg(slots),
            Self::Lma(slots) => args.arg(&**slots),
            Self::RowBlocks(slots) => args.arg(slots),
        };
    }
}

/// The tensors of the table of a lookup.
#[derive(Clone, Copy)]
pub struct TableTensors<'a> {
    /// [`Table::table_rows`]
    pub table_rows: Option<View<'a, CudaStorage>>,
    /// [`Table::row_tensor`]
    pub row_tensor: Option<View<'a, CudaStorage>>,
}

/// Everything that the launch of one pass needs, for per-sample weights, sums and outputs of one dtype and a `hashed_weight` of
/// the same, or of packed bytes.
pub struct Launch<'a, T: Element, W = T> {
    pub lookup: &'a Lookup,
    pub device: &'a CudaDevice,
    pub stream: Arc<CudaStream>,
    pub hashed_weight: CudaView<'a, W>,
    pub per_sample_weights: Option<CudaView<'a, T>>,
    indices: IndexView<'a>,
    offsets: Option<IndexView<'a>>,
    table_rows: Option<CudaView<'a, i64>>,
    plan: Plan,
    params: BagParams,
    hash: HashParams,
    embedding_dim: u32,
    mean: u32,
}

impl<'a, T: Element, W: CudaDType> Launch<'a, T, W> {
    /// `dtype` is that of `hashed_weight`.
    pub fn new(
        pass: Pass,
        dtype: Dtype,
        lookup: &'a Lookup,
        operands: &Operands<'a, CudaStorage>,
        tensors: TableTensors<'a>,
    ) -> Result<Self> {
        let Lookup { table, bags, .. } = lookup;
        if bags.nnz > MAX_INDICES {
            let nnz = bags.nnz;
            bail!("at most {MAX_INDICES} indices on CUDA, got {nnz}");
        }
        let weighted = operands.per_sample_weights.is_some();
        let aligned = is_aligned::<W>(operands.hashed_weight);
        let plan = Plan::new(pass, dtype, lookup, weighted, aligned);
        let indices = IndexView::new(operands.indices)?;
        let offsets = operands.offsets.map(IndexView::new).transpose()?;
        let (num_offsets, bag_len) = match bags.division {
            Division::Fixed(bag_len) => (0, bag_len),
            Division::Offsets {
                include_last_offset,
                ..
            } => (bags.num_bags + usize::from(include_last_offset), 0),
        };
        let index_type = indices.index_type();
        let params = BagParams {
            nnz: bags.nnz as i64,
            num_bags: bags.num_bags as i64,
            num_offsets: num_offsets as i64,
            bag_len: bag_len as i64,
            padding_idx: table.padding_idx.unwrap_or_default(),
            first_row: table.tables.first_row(0),
            num_embeddings: table.tables.num_embeddings(0) as i64,
            feature_stride: bags.feature_stride as i64,
            features: Divisor::new(bags.features as u64),
            has_padding: table.padding_idx.is_some().into(),
            lanes: plan.lanes as u32,
            bags_per_group: plan.bags_per_group as u32,
            index_type,
            offset_type: offsets.as_ref().map_or(index_type, IndexView::index_type),
        };
        let device = operands.hashed_weight.0.device();
        let stream = device.cuda_stream();
        Ok(Self {
            lookup,
            device,
            hash: HashParams::new(table, tensors.row_tensor, &stream)?,
            stream,
            hashed_weight: view(operands.hashed_weight)?,
            per_sample_weights: operands.per_sample_weights.map(view::<T>).transpose()?,
            indices,
            offsets,
            table_rows: tensors.table_rows.map(view::<i64>).transpose()?,
            plan,
            params,
            embedding_dim: table.embedding_dim as u32,
            mean: (table.mode == Mode::Mean).into(),
        })
    }

    /// Whether there is no bag, or no index.
    pub fn is_empty(&self) -> bool {
        self.lookup.bags.num_bags == 0 || self.lookup.bags.nnz == 0
    }

    fn function(&self) -> Result<CudaFunction> {
        load(Kernel::Bags(self.plan.kernel), &self.stream)
    }

    fn config(&self) -> LaunchConfig {
        let Plan {
            kernel,
            bag_blocks,
            column_blocks,
            ..
        } = self.plan;
        LaunchConfig {
            grid_dim: (bag_blocks as u32, column_blocks as u32, 1),
            block_dim: (Kernel::Bags(kernel).threads() as u32, 1, 1),
            shared_mem_bytes: 0,
        }
    }

    fn push_inputs<'b>(&'b self, args: &mut LaunchArgs<'b>) {
        self.indices.push(args); // const void *indices
        match &self.offsets {
            Some(offsets) => offsets.push(args), // const void *offsets
            None => {
                args.arg(&NULL);
            }
        }
        push_or_null(args, self.table_rows.as_ref()); // const TableRows *table_rows
    }

    fn push_bags<'b>(&'b self, args: &mut LaunchArgs<'b>) {
        args.arg(&self.params); // BagParams bags
        self.hash.push(args); // HASH slots
        args.arg(&self.embedding_dim); // uint32_t embedding_dim
    }

    /// Raises the flag where an index or an offset is out of range.
    pub fn check_bounds(&self, flag: &mut Flag) -> Result<()> {
        let kernel = Kernel::CheckBounds;
        let function = load(kernel, &self.stream)?;
        let out_of_range = flag.device_pointer()?;
        let mut args = self.stream.launch_builder(&function);
        self.push_inputs(&mut args);
        args.arg(&out_of_range); // uint32_t *out_of_range
        args.arg(&self.params); // BagParams bags
        let bags = &self.lookup.bags;
        let threads = match self.table_rows {
            // A thread per offset, and per four indices, which are loaded at once.
            None => bags.num_bags.max(bags.nnz.div_ceil(4)),
            // A warp per bag.
            Some(_) => bags.num_bags * WARP,
        };

        // SAFETY: the arguments are those of CHECK_BOUNDS_KERNEL in kernels/bounds.cuh, which reads within them. The flag
        // outlives the kernel, because its owner waits for the kernel.
        unsafe { args.launch(strided(kernel, threads)) }.w()?;
        flag.record(&self.stream)
    }
}

impl Launch<'_, f32, u8> {
    /// Writes every column of every bag, from packed bytes that `low_bit` explains. `out`: `(num_bags, embedding_dim)`.
    pub fn forward(
        &self,
        low_bit: &LowBit,
        shifts: &Option<CudaView<u8>>,
        out: &mut CudaSlice<f32>,
    ) -> Result<()> {
        debug_assert!(self.plan.kernel.dtype.is_low_bit());
        let (function, unit) = (self.function()?, low_bit.unit());
        let mut args = self.stream.launch_builder(&function);
        args.arg(&self.hashed_weight); // const uint8_t *packed
        push_or_null(&mut args, shifts.as_ref()); // const uint8_t *shifts
        self.push_inputs(&mut args);
        push_or_null(&mut args, self.per_sample_weights.as_ref()); // const float *per_sample_weights
        args.arg(out); // float *out
        self.push_bags(&mut args);
        args.arg(&self.mean); // uint32_t mean
        args.arg(&unit); // float unit

        // SAFETY: the arguments are those of FORWARD_LOW_BIT_KERNEL in kernels/low_bit.cuh, which reads and writes within them:
        // `LowBit` has a shift for each group of slots.
        unsafe { args.launch(self.config()) }.w()?;
        Ok(())
    }
}

impl<T: Element> Launch<'_, T> {
    /// Writes every column of every bag. `out`: `(num_bags, embedding_dim)`.
    pub fn forward(&self, out: &mut CudaSlice<T>) -> Result<()> {
        debug_assert_eq!(self.plan.kernel.pass, Pass::Forward);
        let function = self.function()?;
        let mut args = self.stream.launch_builder(&function);
        args.arg(&self.hashed_weight); // const T *hashed_weight
        self.push_inputs(&mut args);
        push_or_null(&mut args, self.per_sample_weights.as_ref()); // const T *per_sample_weights
        args.arg(out); // T *out
        self.push_bags(&mut args);
        args.arg(&self.mean); // uint32_t mean

        // SAFETY: the arguments are those of FORWARD_KERNEL in kernels/forward.cuh, which reads and writes within them.
        unsafe { args.launch(self.config()) }.w()?;
        Ok(())
    }

    /// Adds to `grad_weight` in floats, or in fixed point, which [`from_fixed_point`] then converts. `touched`: the marks of a
    /// sparse gradient.
    pub fn backward(
        &self,
        grad_output: View<CudaStorage>,
        grad_weight: &mut CudaSlice<T::Acc>,
        touched: Option<&CudaView<u8>>,
        fixed_point: Option<&FixedPoint<T::Acc>>,
    ) -> Result<()> {
        let want = match fixed_point {
            None => Pass::Backward,
            Some(_) => Pass::BackwardFixedPoint,
        };
        debug_assert_eq!(self.plan.kernel.pass, want);
        let aligned = u32::from(is_aligned::<T>(grad_output));
        let grad_output = view::<T>(grad_output)?;
        let function = self.function()?;
        let mut args = self.stream.launch_builder(&function);
        args.arg(&grad_output); // const T *grad_output
        args.arg(&self.hashed_weight); // const T *hashed_weight
        self.push_inputs(&mut args);
        push_or_null(&mut args, self.per_sample_weights.as_ref()); // const T *per_sample_weights
        args.arg(grad_weight); // Acc<T> *grad_weight
        push_or_null(&mut args, touched); // uint8_t *touched
        if let Some(fixed_point) = fixed_point {
            push_fixed_point(&mut args, fixed_point);
        }
        self.push_bags(&mut args);
        args.arg(&self.mean); // uint32_t mean
        args.arg(&aligned); // uint32_t grad_output_aligned

        // SAFETY: the arguments are those of BACKWARD_KERNEL in kernels/backward.cuh or of BACKWARD_FIXED_POINT_KERNEL in
        // kernels/fixed_point.cuh, which read and write within them.
        unsafe { args.launch(self.config()) }.w()?;
        Ok(())
    }

    /// Writes the gradient of every index of a bag that is not padding. `grad_weights`: `(nnz,)`.
    pub fn backward_per_sample_weights(
        &self,
        grad_output: View<CudaStorage>,
        grad_weights: &mut CudaSlice<T>,
    ) -> Result<()> {
        debug_assert_eq!(self.plan.kernel.pass, Pass::BackwardPerSampleWeights);
        let aligned = u32::from(is_aligned::<T>(grad_output));
        let grad_output = view::<T>(grad_output)?;
        let function = self.function()?;
        let mut args = self.stream.launch_builder(&function);
        args.arg(&grad_output); // const T *grad_output
        args.arg(&self.hashed_weight); // const T *hashed_weight
        self.push_inputs(&mut args);
        args.arg(grad_weights); // T *grad_weights
        self.push_bags(&mut args);
        args.arg(&aligned); // uint32_t grad_output_aligned

        // SAFETY: the arguments are those of BACKWARD_PER_SAMPLE_WEIGHTS_KERNEL in kernels/backward.cuh, which reads and
        // writes within them: grad_weights has the length of indices.
        unsafe { args.launch(self.config()) }.w()?;
        Ok(())
    }
}

fn load(kernel: Kernel, stream: &CudaStream) -> Result<CudaFunction> {
    modules::load(kernel, stream.context())
}

fn push_fixed_point<'b, A: DeviceRepr>(
    args: &mut LaunchArgs<'b>,
    fixed_point: &'b FixedPoint<'_, A>,
) {
    args.arg(fixed_point.units); // int64_t *units, changed by the kernels of this stream alone
    args.arg(&fixed_point.len); // uint64_t len
    args.arg(&fixed_point.largest); // const A *largest
    args.arg(&fixed_point.log2_terms); // uint32_t log2_terms
}

/// Raises `largest`, one value, to the largest finite magnitude of `values`.
pub fn largest_magnitude<T: Element>(
    values: &CudaView<T>,
    largest: &mut CudaViewMut<T::Acc>,
    stream: &CudaStream,
) -> Result<()> {
    let kernel = Kernel::LargestMagnitude(T::DTYPE);
    let function = load(kernel, stream)?;
    let n = values.len() as u64;
    let mut args = stream.launch_builder(&function);
    args.arg(values); // const T *values
    args.arg(&n); // uint64_t n
    args.arg(largest); // Acc<T> *largest

    // SAFETY: the arguments are those of LARGEST_MAGNITUDE_KERNEL in kernels/fixed_point.cuh, which reads n values.
    unsafe { args.launch(strided(kernel, values.len())) }.w()?;
    Ok(())
}

/// Adds the sums in fixed point to `grad_weight`, which has their length; with marks only those that are marked. With `reset`
/// these sums are then zero again.
pub fn from_fixed_point<A: Element>(
    fixed_point: &FixedPoint<A>,
    grad_weight: &mut CudaSlice<A>,
    touched: Option<&CudaView<u8>>,
    reset: bool,
    stream: &CudaStream,
) -> Result<()> {
    let kernel = Kernel::FromFixedPoint(A::DTYPE);
    let function = load(kernel, stream)?;
    let config = strided(kernel, grad_weight.len());
    let reset = u32::from(reset);
    let mut args = stream.launch_builder(&function);
    args.arg(grad_weight); // A *grad_weight
    push_or_null(&mut args, touched); // uint8_t *touched
    push_fixed_point(&mut args, fixed_point);
    args.arg(&reset); // uint32_t reset

    // SAFETY: the arguments are those of FROM_FIXED_POINT_KERNEL in kernels/fixed_point.cuh, which goes over `len` slots.
    unsafe { args.launch(config) }.w()?;
    Ok(())
}

/// Copies the strided tensor that starts at `from` to the `n` values of `to`.
pub fn copy_i32(
    from: &CudaView<i32>,
    to: &mut CudaSlice<i32>,
    n: usize,
    shape: &Strides,
    stream: &CudaStream,
) -> Result<()> {
    let kernel = Kernel::CopyI32;
    let function = load(kernel, stream)?;
    let count = n as i64;
    let mut args = stream.launch_builder(&function);
    args.arg(from); // const int32_t *from
    args.arg(to); // int32_t *to
    args.arg(&count); // int64_t n
    args.arg(shape); // Strides shape

    // SAFETY: the arguments are those of COPY_I32_KERNEL in kernels/contiguous.cuh, which writes n values and reads them
    // where the layout of the tensor says they lie.
    unsafe { args.launch(strided(kernel, n)) }.w()?;
    Ok(())
}
