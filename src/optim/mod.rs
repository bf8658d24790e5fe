//! Optimisers that update a parameter and its state in place, in one pass over memory.
//!
//! [`AdamW`], [`Adagrad`], [`Sgd`] and [`SparseAdam`] are [`candle_nn::Optimizer`]s whose hyper-parameters mean what they mean in
//! `torch.optim`.
//! `candle_nn::AdamW` creates some fifteen tensors of the size of each parameter per step; these create none. On the CPU they use
//! all of candle's threads, on CUDA they launch one kernel per parameter.
//!
//! Here `g` is the gradient, `p` the value, and `t` counts the steps of this parameter from 1:
//!
//! | optimiser | step |
//! |---|---|
//! | [`AdamW`] | `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g²`, |
//! | | `p = (1 - lr weight_decay) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)` |
//! | [`Adagrad`] | `g = g + weight_decay p`, `s = s + g²`, |
//! | | `p = p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)` |
//! | [`Sgd`] | `g = g + weight_decay p`, `b = momentum b + (1 - dampening) g`, in the first step `b = g`, |
//! | | `p = p - lr b`, or with Nesterov's momentum `p = p - lr (g + momentum b)` |
//! | [`SparseAdam`] | where `g` is not 0: `m` and `v` as for AdamW, |
//! | | `p = p - lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)` |
//!
//! Parameters are f32, f64, f16 or bf16, of any shape, on CPU or CUDA. State and arithmetic are f64 for f64 and f32 for the
//! others, so f16 and bf16 are rounded once per step. Results depend neither on the number of threads nor on the instruction set,
//! and CPU and CUDA compute the same bits from the same gradients.
//!
//! As in torch, a parameter without a gradient is skipped in that step: its value, state and step count stay as they are. State
//! is created in the first step with a gradient.
//!
//! # Stopping and resuming
//!
//! [`state`](InPlace::state) returns the state as named tensors, to be saved beside the model, and
//! [`load_state`](InPlace::load_state) restores it; the run then continues bit for bit as if it had not stopped. The names are
//! those of the parameters if the optimiser knows them ([`from_varmap`](InPlace::from_varmap),
//! [`with_names`](InPlace::with_names)), otherwise their positions. The order of [`VarMap::all_vars`] differs from process to
//! process, so do not save state by positions in it.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_hashed_embedding_bag::hashed_embedding_bag;
//! use candle_hashed_embedding_bag::optim::{Adagrad, ParamsAdagrad};
//! use candle_nn::{Module, Optimizer, VarBuilder, VarMap};
//! use std::collections::HashMap;
//!
//! # fn main() -> candle_core::Result<()> {
//! let device = Device::Cpu;
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
//! let layer = hashed_embedding_bag(1_000_000, 16, 1.0 / 64.0, Default::default(), vb.pp("items"))?;
//! let indices = Tensor::new(&[[7u32, 999_999], [7, 7]], &device)?;
//!
//! let params = ParamsAdagrad { lr: 0.05, ..Default::default() };
//! let mut optimizer = Adagrad::from_varmap(&vars, params.clone())?;
//! optimizer.backward_step(&layer.forward(&indices)?.sqr()?.sum_all()?)?;
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("optimizer.safetensors");
//! let state: HashMap<_, _> = optimizer.state()?.into_iter().collect();
//! assert_eq!(state["items.hashed_weight.sum"].dims(), layer.hashed_weight().dims());
//! candle_core::safetensors::save(&state, &path)?;
//!
//! let mut resumed = Adagrad::from_varmap(&vars, params)?;
//! resumed.load_state(candle_core::safetensors::load(&path, &device)?)?;
//! resumed.backward_step(&layer.forward(&indices)?.sqr()?.sum_all()?)?;
//! # Ok(())
//! # }
//! ```

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod rules;

use crate::error::bail;
use crate::op::{SparseGradient, Sums, WEIGHT_DTYPES};
use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, DType, Device, Error, InplaceOp1, InplaceOp2, Layout, Result, Storage, Tensor, Var,
};
use candle_nn::{Optimizer, VarMap};
use half::{bf16, f16};
use rules::{Algorithm, Step};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;

pub use candle_nn::ParamsAdamW;
pub use rules::{ParamsAdagrad, ParamsSgd, ParamsSparseAdam};

/// Adam with decoupled weight decay ([Loshchilov and Hutter, 2019](https://arxiv.org/abs/1711.05101)), as `torch.optim.AdamW`.
///
/// Per value it keeps `exp_avg` (`m` in the [formulas](self)) and `exp_avg_sq` (`v`). The hyper-parameters are candle-nn's, so
/// changing the import is enough to replace [`candle_nn::AdamW`].
pub type AdamW = InPlace<ParamsAdamW>;

/// Adagrad ([Duchi, Hazan and Singer, 2011](https://jmlr.org/papers/v12/duchi11a.html)), as `torch.optim.Adagrad`.
///
/// Per value it keeps `sum` (`s` in the [formulas](self)).
pub type Adagrad = InPlace<ParamsAdagrad>;

/// Stochastic gradient descent with optional momentum, as `torch.optim.SGD`.
///
/// Per value it keeps `momentum_buffer` (`b` in the [formulas](self)), and nothing if the momentum is 0.
pub type Sgd = InPlace<ParamsSgd>;

/// Adam that leaves values without a gradient as they are, as `torch.optim.SparseAdam`: neither they nor their averages decay.
///
/// A value has a gradient if that is not zero; so a dense gradient gives the same result as a sparse one. Per value it keeps
/// `exp_avg` (`m` in the [formulas](self)) and `exp_avg_sq` (`v`).
pub type SparseAdam = InPlace<ParamsSparseAdam>;

/// Hyper-parameters of an optimiser: [`ParamsAdamW`], [`ParamsAdagrad`], [`ParamsSgd`] or [`ParamsSparseAdam`].
pub trait Params: Algorithm {}

impl<P: Algorithm> Params for P {}

/// An optimiser that updates in place: see [`AdamW`], [`Adagrad`], [`Sgd`] and [`SparseAdam`].
pub struct InPlace<P> {
    parameters: Vec<Parameter>,
    params: P,
}

/// The variables of a map with their names, in the order of the names: the same in every process, unlike the map's own.
///
/// # Errors
/// If a thread panicked while it held the map.
pub fn named_variables(vars: &VarMap) -> Result<Vec<(String, Var)>> {
    let vars = match vars.data().lock() {
        Ok(vars) => vars.clone(),
        Err(e) => return Err(Error::msg(e.to_string())),
    };
    let mut vars: Vec<_> = vars.into_iter().collect();
    vars.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(vars)
}

/// The name of the step count in the state of a parameter.
const STEP: &str = "step";

/// A variable, and what the optimiser keeps for it.
struct Parameter {
    name: String,
    var: Var,
    /// The number of steps with a gradient.
    steps: u64,
    /// Contiguous and from offset 0; empty before the first step.
    state: Vec<Storage>,
}

impl<P: Params> InPlace<P> {
    /// An optimiser for these named variables. No name and no variable may occur twice.
    ///
    /// Integer variables are skipped, since they have no gradient.
    ///
    /// # Errors
    /// If a hyper-parameter is out of range, two names or two variables are the same, or the [module](self) does not support the
    /// float dtype or the device of a variable.
    pub fn with_names(
        vars: impl IntoIterator<Item = (impl Into<String>, Var)>,
        params: P,
    ) -> Result<Self> {
        params.check()?;
        let mut parameters: Vec<Parameter> = vec![];
        let mut names = HashSet::new();
        let mut ids = HashMap::new();
        for (name, var) in vars {
            let (name, dtype) = (name.into(), var.dtype());
            if dtype.is_int() {
                continue;
            }
            let fail = |problem: String| -> Result<()> {
                bail!("{}: parameter {name} {problem}", P::NAME)
            };
            if !WEIGHT_DTYPES.contains(&dtype) {
                fail(format!(
                    "must have one of the dtypes {WEIGHT_DTYPES:?}, got {dtype:?}"
                ))?;
            }
            if var.device().is_metal() {
                fail("must be on CPU or CUDA, got Metal".to_string())?;
            }
            if !var.is_contiguous() {
                fail("must be contiguous".to_string())?;
            }
            if let Some(other) = ids.insert(var.id(), name.clone()) {
                fail(format!("is the same variable as {other}"))?;
            }
            if !names.insert(name.clone()) {
                fail("appears twice".to_string())?;
            }
            parameters.push(Parameter {
                name,
                var,
                steps: 0,
                state: vec![],
            });
        }
        Ok(Self { parameters, params })
    }

    /// An optimiser for all variables of this map, under their names in the map.
    ///
    /// # Errors
    /// As [`with_names`](Self::with_names).
    pub fn from_varmap(vars: &VarMap, params: P) -> Result<Self> {
        Self::with_names(named_variables(vars)?, params)
    }

    /// An optimiser for these variables, with default hyper-parameters except for the learning rate.
    ///
    /// # Errors
    /// As [`with_names`](Self::with_names).
    pub fn new_lr(vars: Vec<Var>, learning_rate: f64) -> Result<Self>
    where
        P: Default,
    {
        let mut params = P::default();
        params.set_lr(learning_rate);
        Self::new(vars, params)
    }

    /// The hyper-parameters.
    pub fn params(&self) -> &P {
        &self.params
    }

    /// Changes the hyper-parameters for all further steps. If one is out of range, the next step fails.
    pub fn set_params(&mut self, params: P) {
        self.params = params;
    }

    /// Copies of the state, under names `{parameter}.{state}`.
    ///
    /// For each parameter that has had a gradient: `step`, an i64 scalar on the CPU; and what the optimiser keeps per value,
    /// under torch's name, in the shape and on the device of the parameter, in f64 for f64 and f32 for the others. The
    /// hyper-parameters are not included.
    ///
    /// # Errors
    /// If a copy fails for lack of memory.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = vec![];
        for parameter in self.parameters.iter().filter(|p| p.steps > 0) {
            let Parameter { name, var, .. } = parameter;
            let steps = Tensor::new(parameter.steps as i64, &Device::Cpu)?;
            tensors.push((format!("{name}.{STEP}"), steps));
            let layout = Layout::contiguous(var.shape());
            for (state, storage) in P::STATE.iter().zip(&parameter.state) {
                let storage = storage.try_clone(&layout)?;
                let copy = Tensor::from_storage(storage, var.shape(), BackpropOp::none(), false);
                tensors.push((format!("{name}.{state}"), copy));
            }
        }
        Ok(tensors)
    }

    /// Replaces the state by what [`state`](Self::state) returned, here or in another process.
    ///
    /// Tensors are copied to the devices of the parameters. A parameter without tensors starts from scratch.
    ///
    /// # Errors
    /// If a tensor belongs to no parameter or has the wrong dtype or shape, or if some tensors of a parameter are missing. The
    /// state is then unchanged.
    pub fn load_state(&mut self, state: impl IntoIterator<Item = (String, Tensor)>) -> Result<()> {
        let mut tensors: HashMap<String, Tensor> = state.into_iter().collect();
        let mut loaded = vec![];
        for parameter in &self.parameters {
            loaded.push(self.loaded(parameter, &mut tensors)?);
        }
        if let Some(name) = tensors.keys().min() {
            bail!("{}: state {name} belongs to no parameter", P::NAME);
        }
        for (parameter, (steps, state)) in self.parameters.iter_mut().zip(loaded) {
            (parameter.steps, parameter.state) = (steps, state);
        }
        Ok(())
    }

    /// Takes the step count and state of a parameter out of these tensors.
    fn loaded(
        &self,
        parameter: &Parameter,
        tensors: &mut HashMap<String, Tensor>,
    ) -> Result<(u64, Vec<Storage>)> {
        let Parameter { name, var, .. } = parameter;
        let mut take = |state: &str, dtype: DType, dims: &[usize]| {
            match tensors
            .remove(&format!("{name}.{state}"))
        {
            Some(tensor) if (tensor.dtype(), tensor.dims()) != (dtype, dims) => bail!(
                "{}: state {name}.{state} must have dtype {dtype:?} and shape {dims:?}, got {:?} and {:?}",
                P::NAME,
                tensor.dtype(),
                tensor.dims()
            ),
            tensor => Ok(tensor),
        }
        };
        let steps = match take(STEP, DType::I64, &[])? {
            None => 0,
            Some(steps) => match steps.to_scalar::<i64>()? {
                steps @ 1.. => steps as u64,
                steps => bail!(
                    "{}: state {name}.{STEP} must be positive, got {steps}",
                    P::NAME
                ),
            },
        };
        let needed = if steps > 0 {
            self.params.state_len()
        } else {
            0
        };
        let mut state = vec![];
        for (i, state_name) in P::STATE.iter().enumerate() {
            match take(state_name, state_dtype(var), var.dims())? {
                Some(_) if steps == 0 => {
                    bail!("{}: state {name}.{state_name} lacks {name}.{STEP}", P::NAME)
                }
                Some(tensor) => state.push(storage_of(&tensor.to_device(var.device())?)?),
                None if i < needed => {
                    bail!("{}: state {name}.{STEP} lacks {name}.{state_name}", P::NAME)
                }
                None => {}
            }
        }
        Ok((steps, state))
    }
}

impl Parameter {
    /// Checks `grad` against the parameter, and returns it contiguous.
    fn gradient(&self, optimizer: &str, grad: &Tensor) -> Result<Tensor> {
        let Self { name, var, .. } = self;
        let fail = |what: &str, want: String, got: String| {
            bail!("{optimizer}: gradient of parameter {name} must have {what} {want}, got {got}")
        };
        if grad.dtype() != var.dtype() {
            let (want, got) = (var.dtype(), grad.dtype());
            return fail("dtype", format!("{want:?}"), format!("{got:?}"));
        }
        if grad.dims() != var.dims() {
            let (want, got) = (var.dims(), grad.dims());
            return fail("shape", format!("{want:?}"), format!("{got:?}"));
        }
        if !grad.device().same_device(var.device()) {
            let (want, got) = (var.device().location(), grad.device().location());
            return fail("device", format!("{want:?}"), format!("{got:?}"));
        }
        grad.contiguous()
    }

    /// New arrays for the state that these hyper-parameters need and that does not exist yet.
    fn missing_state<P: Algorithm>(&self, params: &P) -> Result<Vec<Storage>> {
        let (shape, device) = (self.var.shape(), self.var.device());
        let initial = params.initial_state();
        let missing = self.state.len()..params.state_len();
        let storages = missing.map(|_| {
            storage_of(&match state_dtype(&self.var) {
                DType::F64 => Tensor::full(initial, shape, device)?,
                _ => Tensor::full(initial as f32, shape, device)?,
            })
        });
        storages.collect()
    }
}

/// The dtype of the state of a parameter.
fn state_dtype(var: &Var) -> DType {
    match var.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// A copy of the values of a tensor, contiguous and from offset 0.
fn storage_of(tensor: &Tensor) -> Result<Storage> {
    let tensor = tensor.force_contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    storage.try_clone(layout)
}

impl<P: Params> Optimizer for InPlace<P> {
    type Config = P;

    /// [`with_names`](Self::with_names) with the positions as names: `0`, `1` and so on.
    fn new(vars: Vec<Var>, params: P) -> Result<Self> {
        let names = (0..).map(|i: usize| i.to_string());
        Self::with_names(names.zip(vars), params)
    }

    /// Updates the parameters that have a gradient.
    ///
    /// # Errors
    /// If a gradient differs from its parameter in dtype, shape or device, a hyper-parameter is out of range, or there is not
    /// enough memory for state. Nothing is updated then.
    fn step(&mut self, grads: &GradStore) -> Result<()> {
        self.params.check()?;
        // Whatever can fail comes first, so that a step that fails changes nothing.
        let mut ready = vec![];
        for parameter in &mut self.parameters {
            let sparse = SparseGradient::find(&parameter.var);
            let sparse = sparse.filter(SparseGradient::is_pending);
            if sparse.is_some() {
                self.params.check_sparse()?;
            }
            let grad = grads.get(&parameter.var);
            let grad = grad
                .map(|grad| parameter.gradient(P::NAME, grad))
                .transpose()?;
            let gradient = match (grad, sparse) {
                (None, None) => continue,
                (Some(grad), None) => Pending::Dense(grad),
                (None, Some(sparse)) => Pending::Sparse(sparse),
                (Some(grad), Some(sparse)) => Pending::Both(
                    (&grad + sparse.to_tensor()?.to_dtype(grad.dtype())?)?,
                    sparse,
                ),
            };
            let new_state = parameter.missing_state(&self.params)?;
            ready.push((parameter, gradient, new_state));
        }
        for (parameter, gradient, new_state) in ready {
            let step = Step {
                count: parameter.steps + 1,
                is_first: !new_state.is_empty(),
            };
            parameter.state.extend(new_state);
            let update = Update {
                params: &self.params,
                step,
                state: RefCell::new(&mut parameter.state),
            };
            match gradient {
                Pending::Dense(grad) => parameter.var.inplace_op2(&grad, &update)?,
                Pending::Both(sum, sparse) => {
                    parameter.var.inplace_op2(&sum, &update)?;
                    sparse.clear()?;
                }
                Pending::Sparse(sparse) => {
                    sparse.take(|sums| {
                        let sums = RefCell::new(sums);
                        parameter.var.inplace_op1(&SparseUpdate { update, sums })
                    })?;
                }
            }
            parameter.steps = step.count;
        }
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.params.lr()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.params.set_lr(lr);
    }
}

impl<P: Params> fmt::Debug for InPlace<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.parameters.iter().map(|p| &p.name).collect();
        f.debug_struct("InPlace")
            .field("parameters", &names)
            .field("params", &self.params)
            .finish_non_exhaustive()
    }
}

/// Evaluates `$body` with `$t` as the type of a parameter's dtype.
macro_rules! with_dtype {
    ($dtype:expr, $t:ident => $body:expr) => {{
        macro_rules! case {
            ($type:ty) => {{
                type $t = $type;
                $body
            }};
        }
        match $dtype {
            DType::F16 => case!(f16),
            DType::BF16 => case!(bf16),
            DType::F32 => case!(f32),
            _ => case!(f64),
        }
    }};
}

/// What a parameter is updated with.
enum Pending {
    Dense(Tensor),
    Sparse(SparseGradient),
    /// The sum of a gradient of either kind, and the sparse one, which is in it.
    Both(Tensor, SparseGradient),
}

/// One step of one parameter, as candle's in-place op on its storage and that of its gradient.
struct Update<'a, P> {
    params: &'a P,
    step: Step,
    /// In a cell because candle takes the op by shared reference. It is called once.
    state: RefCell<&'a mut [Storage]>,
}

impl<P: Algorithm> InplaceOp2 for Update<'_, P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn cpu_fwd(
        &self,
        param: &mut CpuStorage,
        param_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<()> {
        with_dtype!(param.dtype(), T => self.on_cpu::<T>(param, param_layout, grad, grad_layout))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        param: &mut candle_core::CudaStorage,
        param_layout: &Layout,
        grad: &candle_core::CudaStorage,
        grad_layout: &Layout,
    ) -> Result<()> {
        with_dtype!(param.dtype(), T => self.on_cuda::<T>(param, param_layout, grad, grad_layout))
    }
}

/// One step of one parameter on the values that a sparse gradient has touched.
struct SparseUpdate<'a, 's, P> {
    update: Update<'a, P>,
    sums: RefCell<&'s mut Sums>,
}

impl<P: Algorithm> InplaceOp1 for SparseUpdate<'_, '_, P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn cpu_fwd(&self, param: &mut CpuStorage, layout: &Layout) -> Result<()> {
        with_dtype!(param.dtype(), T => self.on_cpu::<T>(param, layout))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, param: &mut candle_core::CudaStorage, layout: &Layout) -> Result<()> {
        with_dtype!(param.dtype(), T => self.on_cuda::<T>(param, layout))
    }
}

impl<P: Algorithm> SparseUpdate<'_, '_, P> {
    fn on_cpu<T>(&self, param: &mut CpuStorage, layout: &Layout) -> Result<()>
    where
        T: cpu::ParamDType<State: cpu::GradValue<T::State>>,
    {
        let param = &mut T::values_mut(param)?[contiguous(layout)?];
        let rule = self.update.params.rule::<T::State>(self.update.step);
        match &mut **self.sums.borrow_mut() {
            Sums::Cpu(sums) => {
                cpu::sparse_step(rule, param, sums, &mut self.update.state.borrow_mut())
            }
            #[cfg(feature = "cuda")]
            Sums::Cuda(_) => bail!("the sparse gradient is not on the CPU"),
        }
    }

    #[cfg(feature = "cuda")]
    fn on_cuda<T: cuda::ParamDType>(
        &self,
        param: &mut candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<()> {
        let Update {
            params,
            step,
            state,
        } = &self.update;
        let rule = params.rule::<T::State>(*step);
        match &mut **self.sums.borrow_mut() {
            Sums::Cuda(sums) => {
                cuda::sparse_step::<T>(rule, (param, layout), sums, &mut state.borrow_mut())
            }
            Sums::Cpu(_) => bail!("the sparse gradient is not on CUDA"),
        }
    }
}

impl<P: Algorithm> Update<'_, P> {
    fn on_cpu<T: cpu::ParamDType + cpu::GradValue<T::State>>(
        &self,
        param: &mut CpuStorage,
        param_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<()> {
        let param = &mut T::values_mut(param)?[contiguous(param_layout)?];
        let grad = &T::cpu_storage_as_slice(grad)?[contiguous(grad_layout)?];
        let rule = self.params.rule::<T::State>(self.step);
        cpu::step(rule, param, grad, &mut self.state.borrow_mut())
    }

    #[cfg(feature = "cuda")]
    fn on_cuda<T: cuda::ParamDType>(
        &self,
        param: &mut candle_core::CudaStorage,
        param_layout: &Layout,
        grad: &candle_core::CudaStorage,
        grad_layout: &Layout,
    ) -> Result<()> {
        let rule = self.params.rule::<T::State>(self.step);
        let (param, grad) = ((param, param_layout), (grad, grad_layout));
        cuda::step::<T>(rule, param, grad, &mut self.state.borrow_mut())
    }
}

/// The range of a contiguous tensor's values in its storage.
fn contiguous(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("expected contiguous values"),
    }
}
