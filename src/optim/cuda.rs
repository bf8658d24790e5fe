//! Launches the kernels of kernels/optimizer.cuh: one per parameter, asynchronously, without allocating device memory.

use super::rules::{AdagradRule, AdamWRule, AnyRule, MomentumRule, Real, SgdRule};
use super::{contiguous, cpu};
use crate::error::bail;
use crate::op::cuda::{modules, Dtype, Kernel, Rule, WIDEST_ACCESS};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaStorage, Layout, Result, Storage};
use cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};
use half::{bf16, f16};

/// Enough thread blocks to fill a large GPU several times; beyond that, threads stride.
const MAX_BLOCKS: usize = 1 << 14;
/// The number of state arrays that every kernel takes, and the argument for those that its rule does not use.
const MAX_STATE: usize = 2;
static NULL: u64 = 0;

/// A dtype of parameters.
pub(super) trait ParamDType:
    cpu::ParamDType<State: CudaDType + DeviceRepr> + CudaDType + DeviceRepr
{
    /// The dtype in the table of kernels.
    const DTYPE: Dtype;
}

macro_rules! param_dtype {
    ($t:ty, $dtype:expr) => {
        impl ParamDType for $t {
            const DTYPE: Dtype = $dtype;
        }
    };
}
param_dtype!(f16, Dtype::F16);
param_dtype!(bf16, Dtype::Bf16);
param_dtype!(f32, Dtype::F32);
param_dtype!(f64, Dtype::F64);

macro_rules! device_repr {
    ($($rule:ident),*) => {$(
        // SAFETY: `#[repr(C)]`, nothing but values of A, which is f32 or f64; the twin of the struct in kernels/optimizer.cuh.
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
    // Allocations themselves are aligned to more than that.
    let is_aligned = |first: usize| (first * size_of::<T>()).is_multiple_of(WIDEST_ACCESS);
    let aligned = u32::from(is_aligned(param_at.start) && is_aligned(grad_at.start));
    let (name, arrays) = match rule {
        AnyRule::AdamW(_) => (Rule::AdamW, 2),
        AnyRule::Adagrad(_) => (Rule::Adagrad, 1),
        AnyRule::Sgd(_) => (Rule::Sgd, 0),
        AnyRule::Momentum(_) => (Rule::Momentum, 1),
    };
    let kernel = Kernel::OptimizerStep(name, <T as ParamDType>::DTYPE);
    let stream = param.device().cuda_stream();
    let function = modules::load(kernel, stream.context())?;
    let mut param = param.as_cuda_slice_mut::<T>()?.slice_mut(param_at);
    let grad = grad.as_cuda_slice::<T>()?.slice(grad_at);
    let count = n as u64;

    let mut args = stream.launch_builder(&function);
    args.arg(&mut param); // T *params
    args.arg(&grad); // const T *grads
    let mut state = state.iter_mut().take(arrays);
    for _ in 0..MAX_STATE {
        match state.next() {
            Some(Storage::Cuda(array)) => args.arg(array.as_cuda_slice_mut::<T::State>()?),
            None => args.arg(&NULL),
            Some(_) => bail!("state is not on CUDA"),
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
    let blocks = n.div_ceil(kernel.threads() * WIDEST_ACCESS / size_of::<T>());
    let config = LaunchConfig {
        grid_dim: (blocks.min(MAX_BLOCKS) as u32, 1, 1),
        block_dim: (kernel.threads() as u32, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the arguments are those of OPTIMIZER_STEP_KERNEL in kernels/optimizer.cuh, which reads and writes n values of each array.
    unsafe { args.launch(config) }.w()?;
    Ok(())
}
