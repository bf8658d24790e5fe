//! Launches of the kernels of kernels/optimizer.cu: one per parameter, asynchronous, without allocations on the device.

use super::rules::{AdagradRule, AdamWRule, AnyRule, MomentumRule, Real, SgdRule};
use super::{contiguous, cpu};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{bail, CudaStorage, Layout, Result, Storage};
use cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};
use half::{bf16, f16};

const MODULE: &str = "candle-hashed-embedding-bag-optimizer";
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/optimizer.ptx"));

/// Threads of a block, as in kernels/optimizer.cu.
const THREADS: usize = 256;
/// The widest access of a thread, in bytes.
const WIDE: usize = 16;
/// Several waves of a large GPU; beyond that, threads stride.
const MAX_BLOCKS: usize = 1 << 14;
/// The arrays of state that every kernel takes, and the argument for one that its rule does not have.
const MAX_STATE: usize = 2;
static NULL: u64 = 0;

/// A dtype of parameters.
pub(super) trait ParamDType:
    cpu::ParamDType<State: CudaDType + DeviceRepr> + CudaDType + DeviceRepr
{
    /// As in the names of the kernels.
    const NAME: &'static str;
}

macro_rules! param_dtype {
    ($t:ty, $name:literal) => {
        impl ParamDType for $t {
            const NAME: &'static str = $name;
        }
    };
}
param_dtype!(f16, "f16");
param_dtype!(bf16, "bf16");
param_dtype!(f32, "f32");
param_dtype!(f64, "f64");

macro_rules! device_repr {
    ($($rule:ident),*) => {$(
        // SAFETY: `#[repr(C)]`, nothing but values of A, which is f32 or f64; the twin of the struct in kernels/optimizer.cu.
        unsafe impl<A: Real> DeviceRepr for $rule<A> {}
    )*};
}
device_repr!(AdamWRule, AdagradRule, SgdRule, MomentumRule);

/// Updates all values of a parameter.
pub(super) fn step<T: ParamDType>(
    rule: AnyRule<T::State>,
    (param, param_layout): (&mut CudaStorage, &Layout),
    (grad, grad_layout): (&CudaStorage, &Layout),
    state: &mut [Storage],
) -> Result<()> {
    let (param_at, grad_at) = (contiguous(param_layout)?, contiguous(grad_layout)?);
    let n = param_at.len();
    if n == 0 {
        return Ok(());
    }
    // Allocations are aligned to more than that.
    let is_aligned = |first: usize| (first * size_of::<T>()).is_multiple_of(WIDE);
    let aligned = u32::from(is_aligned(param_at.start) && is_aligned(grad_at.start));
    let (name, arrays) = match rule {
        AnyRule::AdamW(_) => ("adamw", 2),
        AnyRule::Adagrad(_) => ("adagrad", 1),
        AnyRule::Sgd(_) => ("sgd", 0),
        AnyRule::Momentum(_) => ("momentum", 1),
    };
    let function = param.device().get_or_load_custom_func(
        &format!("hashed_embedding_bag_{name}_{}", T::NAME),
        MODULE,
        PTX,
    )?;
    let mut param = param.as_cuda_slice_mut::<T>()?.slice_mut(param_at);
    let grad = grad.as_cuda_slice::<T>()?.slice(grad_at);
    let count = n as u64;

    let mut args = function.builder();
    args.arg(&mut param); // T *params
    args.arg(&grad); // const T *grads
    let mut state = state.iter_mut().take(arrays);
    for _ in 0..MAX_STATE {
        match state.next() {
            Some(Storage::Cuda(array)) => args.arg(array.as_cuda_slice_mut::<T::State>()?),
            None => args.arg(&NULL),
            Some(_) => bail!("optimizer: state is not on CUDA"),
        }; // Acc<T> *state0, *state1
    }
    match &rule {
        AnyRule::AdamW(rule) => args.arg(rule),
        AnyRule::Adagrad(rule) => args.arg(rule),
        AnyRule::Sgd(rule) => args.arg(rule),
        AnyRule::Momentum(rule) => args.arg(rule),
    }; // the rule's struct
    args.arg(&count); // uint64_t n
    args.arg(&aligned); // uint32_t aligned
    let blocks = n.div_ceil(THREADS * WIDE / size_of::<T>());
    let config = LaunchConfig {
        grid_dim: (blocks.min(MAX_BLOCKS) as u32, 1, 1),
        block_dim: (THREADS as u32, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the arguments are those of STEP in kernels/optimizer.cu, which reads and writes n values of each array.
    unsafe { args.launch(config) }.w()?;
    Ok(())
}
