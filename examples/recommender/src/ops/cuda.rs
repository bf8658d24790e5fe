//! Launches of the kernels in kernels/ops.cu.

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaView, DeviceRepr, LaunchConfig, PushKernelArg, ValidAsZeroBits,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{bail, CudaDevice, CudaStorage, DType, Layout, Result, Shape};
use half::bf16;

use super::Interaction;

mod kernels {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// The memory of a tensor, and what it is of it.
type View<'a> = (&'a CudaStorage, &'a Layout);

/// Threads of a block.
const THREADS: u32 = 256;

/// The most thread blocks of a kernel whose threads stride over values: some for each multiprocessor.
const MAX_BLOCKS: usize = 4096;

/// The most bytes of shared memory that every GPU gives to a thread block.
const SHARED_MEMORY: usize = 48 * 1024;

/// A dtype that the kernels take.
trait Float: CudaDType + DeviceRepr + ValidAsZeroBits + 'static {
    /// The end of the names of its kernels.
    const NAME: &'static str;
}

impl Float for f32 {
    const NAME: &'static str = "f32";
}

impl Float for bf16 {
    const NAME: &'static str = "bf16";
}

/// Calls a function for the dtype of a storage.
macro_rules! for_dtype_of {
    ($storage:expr, $function:ident($($arg:expr),*)) => {
        match $storage.dtype() {
            DType::F32 => $function::<f32>($($arg),*),
            DType::BF16 => $function::<bf16>($($arg),*),
            dtype => bail!("a fused operation on CUDA takes f32 or bf16, got {dtype:?}"),
        }
    };
}

/// Launches a kernel of dtype `$t` with these arguments.
macro_rules! launch {
    ($device:expr, $name:literal, $t:ty, $config:expr, $($arg:expr),+) => {{
        let name = format!(concat!($name, "_{}"), <$t>::NAME);
        let kernel = $device.get_or_load_custom_func(&name, "recommender-ops", kernels::OPS)?;
        let mut args = kernel.builder();
        $(args.arg($arg);)+
        // SAFETY: the arguments are those of the kernel, in its order, and the memory behind them is as large as it assumes.
        unsafe { args.launch($config) }.w()?;
    }};
}

/// The sizes of an interaction, as the kernels take them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Sizes {
    tables: u32,
    vectors: u32,
    dim: u32,
    kept: u32,
    width: u32,
}

// SAFETY: `#[repr(C)]`, five integers of 32 bits, as the struct of this name in kernels/ops.cu.
unsafe impl DeviceRepr for Sizes {}

impl Sizes {
    fn new(sizes: &Interaction) -> Result<Self> {
        let most = 108;
        if sizes.vectors() > most {
            bail!(
                "interaction: at most {most} vectors on CUDA, got {}",
                sizes.vectors()
            );
        }
        Ok(Self {
            tables: size(sizes.tables)?,
            vectors: size(sizes.vectors())?,
            dim: size(sizes.dim)?,
            kept: size(sizes.kept())?,
            width: size(sizes.width().next_multiple_of(8))?,
        })
    }
}

fn size(n: usize) -> Result<u32> {
    match u32::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => bail!("a fused operation on CUDA takes sizes below 2^32, got {n}"),
    }
}

fn view<'a, T: CudaDType>((storage, layout): View<'a>) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => bail!("a fused operation takes contiguous tensors, got {layout:?}"),
    }
}

/// Memory for `len` values, which the next kernel writes.
fn alloc<T: Float>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: every value is written before it is read. At least one, since the driver refuses to allocate nothing.
    unsafe { device.alloc::<T>(len.max(1)) }
}

fn strided(len: usize) -> LaunchConfig {
    let blocks = len.div_ceil(THREADS as usize).clamp(1, MAX_BLOCKS);
    LaunchConfig {
        grid_dim: (blocks as u32, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// Adds `bias`, `(columns,)`, to each row of `y`, which has just been computed, and takes the larger of the sum and 0 if `relu`.
pub fn add_bias(
    y: &mut CudaStorage,
    bias: View,
    (rows, columns): (usize, usize),
    relu: bool,
) -> Result<()> {
    for_dtype_of!(y, add_bias_of(y, bias, rows, columns, relu))
}

fn add_bias_of<T: Float>(
    y: &mut CudaStorage,
    bias: View,
    rows: usize,
    columns: usize,
    relu: bool,
) -> Result<()> {
    let aligned = u32::from(bias.1.start_offset().is_multiple_of(4));
    let (device, bias) = (y.device.clone(), view::<T>(bias)?);
    let y = y.as_cuda_slice_mut::<T>()?;
    let (config, columns) = (strided(rows * columns / 4), size(columns)?);
    let relu = u32::from(relu);
    launch!(device, "add_bias", T, config, y, &bias, &rows, &columns, &relu, &aligned);
    Ok(())
}

/// Its first argument where the second is above 0, and 0 elsewhere.
pub fn where_positive(grad: View, y: View) -> Result<(CudaStorage, Shape)> {
    for_dtype_of!(grad.0, where_positive_of(grad, y))
}

fn where_positive_of<T: Float>(grad: View, y: View) -> Result<(CudaStorage, Shape)> {
    let (device, shape) = (&grad.0.device, grad.1.shape().clone());
    if y.1.shape() != &shape {
        bail!("where-positive: {shape:?} and {:?} differ", y.1.shape());
    }
    let (grad, y, len) = (view::<T>(grad)?, view::<T>(y)?, shape.elem_count());
    let mut out = alloc::<T>(device, len)?;
    launch!(
        device,
        "where_positive",
        T,
        strided(len),
        &grad,
        &y,
        &mut out,
        &len
    );
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), shape))
}

/// Sums over parts of the rows, `(parts, columns)`, f32.
pub fn column_sums(x: View) -> Result<(CudaStorage, Shape)> {
    for_dtype_of!(x.0, column_sums_of(x))
}

fn column_sums_of<T: Float>(x: View) -> Result<(CudaStorage, Shape)> {
    let (rows, columns) = x.1.shape().dims2()?;
    let device = &x.0.device;
    // Enough parts to occupy a GPU whose thread blocks have 32 columns each, of enough rows to outweigh their own sums.
    let rows_per_part = rows
        .div_ceil(MAX_BLOCKS / columns.div_ceil(32).clamp(1, MAX_BLOCKS))
        .max(64);
    let parts = rows.div_ceil(rows_per_part).max(1);
    let config = LaunchConfig {
        grid_dim: (size(columns.div_ceil(32).max(1))?, size(parts)?, 1),
        block_dim: (32, 8, 1),
        shared_mem_bytes: 0,
    };
    let x = view::<T>(x)?;
    let mut sums = alloc::<f32>(device, parts * columns)?;
    let (width, rows_per_part) = (size(columns)?, size(rows_per_part)?);
    launch!(
        device,
        "column_sums",
        T,
        config,
        &x,
        &mut sums,
        &rows,
        &width,
        &rows_per_part
    );
    let sums = CudaStorage::wrap_cuda_slice(sums, device.clone());
    Ok((sums, Shape::from((parts, columns))))
}

/// [`Interaction::apply`].
pub fn interaction(
    sizes: &Interaction,
    vectors: View,
    bottom: View,
) -> Result<(CudaStorage, Shape)> {
    for_dtype_of!(vectors.0, interaction_of(sizes, vectors, bottom))
}

fn interaction_of<T: Float>(
    sizes: &Interaction,
    vectors: View,
    bottom: View,
) -> Result<(CudaStorage, Shape)> {
    let (device, batch) = (&vectors.0.device, vectors.1.dims()[0]);
    let sizes = Sizes::new(sizes)?;
    let shape = Shape::from((batch, sizes.width as usize));
    let mut out = alloc::<T>(device, shape.elem_count())?;
    if batch > 0 {
        let row = size_of::<f32>() * sizes.vectors.max(1) as usize;
        // Each row has 4 values more than are used.
        let most = (SHARED_MEMORY / row - 4) / 4 * 4;
        let columns = (sizes.dim as usize).next_multiple_of(4).min(most);
        let config = LaunchConfig {
            grid_dim: (size(batch)?, 1, 1),
            block_dim: (128, 1, 1),
            shared_mem_bytes: size(row * (columns + 4))?,
        };
        let columns = size(columns)?;
        let (vectors, bottom) = (view::<T>(vectors)?, bottom_view::<T>(vectors, bottom)?);
        launch!(
            device,
            "interaction",
            T,
            config,
            &vectors,
            &bottom,
            &mut out,
            &sizes,
            &columns
        );
    }
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), shape))
}

/// The memory of the outputs of the bottom MLP. Without one, kernels get some other memory, which they do not read.
fn bottom_view<'a, T: CudaDType>(vectors: View<'a>, bottom: View<'a>) -> Result<CudaView<'a, T>> {
    view(if bottom.1.shape().elem_count() > 0 {
        bottom
    } else {
        vectors
    })
}

/// The gradients of some of the vectors, `(batch, rows, dim)`.
pub fn interaction_backward(
    sizes: &Interaction,
    rows: Range<usize>,
    vectors: View,
    bottom: View,
    grad: View,
) -> Result<(CudaStorage, Shape)> {
    for_dtype_of!(
        vectors.0,
        interaction_backward_of(sizes, rows, vectors, bottom, grad)
    )
}

fn interaction_backward_of<T: Float>(
    sizes: &Interaction,
    rows: Range<usize>,
    vectors: View,
    bottom: View,
    grad: View,
) -> Result<(CudaStorage, Shape)> {
    let (device, batch) = (&vectors.0.device, vectors.1.dims()[0]);
    let (sizes, shape) = (
        Sizes::new(sizes)?,
        Shape::from((batch, rows.len(), sizes.dim)),
    );
    if grad.1.dims() != [batch, sizes.width as usize] {
        bail!("interaction: a gradient of {:?}", grad.1);
    }
    let mut out = alloc::<T>(device, shape.elem_count())?;
    if shape.elem_count() > 0 {
        let config = LaunchConfig {
            grid_dim: (size(batch)?, 1, 1),
            block_dim: (sizes.dim.next_multiple_of(32).min(THREADS), 1, 1),
            shared_mem_bytes: sizes.vectors * sizes.vectors.next_multiple_of(8) * 4,
        };
        let bottom = bottom_view::<T>(vectors, bottom)?;
        let (vectors, grad) = (view::<T>(vectors)?, view::<T>(grad)?);
        let (first, count) = (size(rows.start)?, size(rows.len())?);
        launch!(
            device,
            "interaction_backward",
            T,
            config,
            &vectors,
            &bottom,
            &grad,
            &mut out,
            &sizes,
            &first,
            &count
        );
    }
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), shape))
}
