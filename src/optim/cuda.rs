//! Launches the kernels of kernels/optimizer.cuh: one per parameter, asynchronously, without allocating device memory.

use super::rules::{AdagradRule, AdamWRule, AnyRule, MomentumRule, Real, SgdRule, SparseAdamRule};
use super::{contiguous, cpu};
use crate::error::bail;
use crate::op::cuda::{
    modules, Dtype, Kernel, Rule, SparseSums, TOUCHED_CHUNK, WARP, WIDEST_ACCESS,
};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaStorage, Layout, Result, Storage};
use cudarc::driver::{DeviceRepr, LaunchArgs, LaunchConfig, PushKernelArg};
use half::{bf16, f16};

/// Enough thread blocks to fill a large GPU several times; beyond that, threads stride.
const MAX_BLOCKS: usize = 1 << 14;
/// So few values lie in the L2 cache, where waiting to see whether a gradient is zero costs more than
/// reading values that stay as they are.
const EAGER_VALUES: usize = 1 << 22;
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
device_repr!(
    AdamWRule,
    AdagradRule,
    SgdRule,
    MomentumRule,
    SparseAdamRule
);

/// Allocations themselves are aligned to more than that.
fn is_aligned<T>(first: usize) -> bool {
    (first * size_of::<T>()).is_multiple_of(WIDEST_ACCESS)
}

/// The name of a rule, and how many arrays of state it uses.
fn rule_name<A>(rule: &AnyRule<A>) -> (Rule, usize) {
    match rule {
        AnyRule::AdamW(_) => (Rule::AdamW, 2),
        AnyRule::Adagrad(_) => (Rule::Adagrad, 1),
        AnyRule::Sgd(_) => (Rule::Sgd, 0),
        AnyRule::Momentum(_) => (Rule::Momentum, 1),
        AnyRule::SparseAdam(_) => (Rule::SparseAdam, 2),
    }
}

/// The arguments of either kernel that come last but for `n` and `aligned`.
fn push_state_and_rule<'a, T: ParamDType>(
    args: &mut LaunchArgs<'a>,
    state: &'a mut [Storage],
    rule: &'a AnyRule<T::State>,
) -> Result<()> {
    let mut state = state.iter_mut().take(rule_name(rule).1);
    for _ in 0..MAX_STATE {
        match state.next() {
            Some(Storage::Cuda(array)) => args.arg(array.as_cuda_slice_mut::<T::State>()?),
            None => args.arg(&NULL),
            Some(_) => bail!("state is not on CUDA"),
        }; // Acc<T> *state0, *state1
    }
    match rule {
        AnyRule::AdamW(rule) => args.arg(rule),
        AnyRule::Adagrad(rule) => args.arg(rule),
        AnyRule::Sgd(rule) => args.arg(rule),
        AnyRule::Momentum(rule) => args.arg(rule),
        AnyRule::SparseAdam(rule) => args.arg(rule),
    }; // the rule's struct
    Ok(())
}

/// The grid for so many threads.
fn config(kernel: Kernel, threads: usize) -> LaunchConfig {
    let blocks = threads.div_ceil(kernel.threads()).min(MAX_BLOCKS);
    LaunchConfig {
        grid_dim: (blocks as u32, 1, 1),
        block_dim: (kernel.threads() as u32, 1, 1),
        shared_mem_bytes: 0,
    }
}

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
    let aligned = u32::from(is_aligned::<T>(param_at.start) && is_aligned::<T>(grad_at.start));
    let kernel = Kernel::OptimizerStep(rule_name(&rule).0, <T as ParamDType>::DTYPE);
    let stream = param.device().cuda_stream();
    let function = modules::load(kernel, stream.context())?;
    let mut param = param.as_cuda_slice_mut::<T>()?.slice_mut(param_at);
    let grad = grad.as_cuda_slice::<T>()?.slice(grad_at);
    let count = n as u64;

    let mut args = stream.launch_builder(&function);
    args.arg(&mut param); // T *params
    args.arg(&grad); // const T *grads
    push_state_and_rule::<T>(&mut args, state, &rule)?;
    args.arg(&count); // uint64_t n
    args.arg(&aligned); // uint32_t aligned
    let config = config(kernel, n.div_ceil(WIDEST_ACCESS / size_of::<T>()));
    // SAFETY: the arguments are those of OPTIMIZER_STEP_KERNEL in kernels/optimizer.cuh, which reads and writes n values of each array.
    unsafe { args.launch(config) }.w()?;
    Ok(())
}

/// Updates the values that a sparse gradient has touched, and leaves zeros in it.
pub(super) fn sparse_step<T: ParamDType>(
    rule: AnyRule<T::State>,
    (param, param_layout): (&mut CudaStorage, &Layout),
    sums: &mut SparseSums,
    state: &mut [Storage],
) -> Result<()> {
    let param_at = contiguous(param_layout)?;
    let n = param_at.len();
    let aligned = u32::from(is_aligned::<T>(param_at.start));
    let name = rule_name(&rule).0;
    if !Rule::SPARSE.contains(&name) {
        bail!("this step has no form for sparse gradients");
    }
    let kernel = Kernel::SparseOptimizerStep(name, <T as ParamDType>::DTYPE);
    let stream = param.device().cuda_stream();
    let function = modules::load(kernel, stream.context())?;
    let mut param = param.as_cuda_slice_mut::<T>()?.slice_mut(param_at);
    let (sums, touched) = sums.take()?;
    let sums = sums.as_cuda_slice_mut::<T::State>()?;
    let eager = u32::from(touched.is_none() && n <= EAGER_VALUES);
    let count = n as u64;

    let mut args = stream.launch_builder(&function);
    args.arg(&mut param); // T *params
    args.arg(sums); // Acc<T> *grads
    match touched {
        Some(touched) => args.arg(touched),
        None => args.arg(&NULL),
    }; // uint8_t *touched
    push_state_and_rule::<T>(&mut args, state, &rule)?;
    args.arg(&count); // uint64_t n
    args.arg(&aligned); // uint32_t aligned
    args.arg(&eager); // uint32_t eager
    let config = config(kernel, n.div_ceil(TOUCHED_CHUNK) * WARP);
    // SAFETY: the arguments are those of SPARSE_OPTIMIZER_STEP_KERNEL in kernels/optimizer.cuh, which reads and writes n values of
    // each array and the marks of their chunks.
    unsafe { args.launch(config) }.w()?;
    Ok(())
}
