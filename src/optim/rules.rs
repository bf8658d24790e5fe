//! The arithmetic of each optimiser: its hyper-parameters, and what a step does to one value.
//!
//! A step has two parts. [`Algorithm::rule`] computes the constants of the step, in f64 and once per parameter: everything that
//! depends on the hyper-parameters and the step count. The [`Rule`] that it returns then updates one value at a time, given only
//! these constants, the value, its gradient and its state; the caller chooses the values. kernels/optimizer.cuh has the same
//! structs and functions for CUDA. Both round after every operation, so both devices compute the same bits.

use crate::error::bail;
use candle_core::Result;
use candle_nn::ParamsAdamW;
use std::fmt::Debug;
use std::ops::{Add, Div, Mul, Sub};

/// Hyper-parameters of [`Adagrad`](super::Adagrad); the defaults are those of `torch.optim.Adagrad`.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamsAdagrad {
    /// Learning rate; 0.01 by default.
    pub lr: f64,
    /// Decay of the learning rate: step `t` uses `lr / (1 + (t - 1) * lr_decay)`; 0 by default.
    pub lr_decay: f64,
    /// L2 penalty: `weight_decay * param` is added to the gradient; 0 by default.
    pub weight_decay: f64,
    /// The initial value of the sums of squared gradients; 0 by default.
    pub initial_accumulator_value: f64,
    /// Added to the root of the sum; 1e-10 by default.
    pub eps: f64,
}

impl Default for ParamsAdagrad {
    fn default() -> Self {
        Self {
            lr: 1e-2,
            lr_decay: 0.0,
            weight_decay: 0.0,
            initial_accumulator_value: 0.0,
            eps: 1e-10,
        }
    }
}

/// Hyper-parameters of [`Sgd`](super::Sgd); the defaults are those of `torch.optim.SGD`.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamsSgd {
    /// Learning rate; 0.001 by default.
    pub lr: f64,
    /// The factor by which the momentum buffer decays in each step; 0, the default, needs no buffer.
    pub momentum: f64,
    /// `1 - dampening` of each gradient is added to the momentum buffer, but all of the first one; 0 by default.
    pub dampening: f64,
    /// L2 penalty: `weight_decay * param` is added to the gradient; 0 by default.
    pub weight_decay: f64,
    /// Whether to use Nesterov momentum, which needs a momentum and no dampening; `false` by default.
    pub nesterov: bool,
}

impl Default for ParamsSgd {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            momentum: 0.0,
            dampening: 0.0,
            weight_decay: 0.0,
            nesterov: false,
        }
    }
}

/// Hyper-parameters of [`SparseAdam`](super::SparseAdam); the defaults are those of `torch.optim.SparseAdam`.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamsSparseAdam {
    /// Learning rate; 0.001 by default.
    pub lr: f64,
    /// The factor by which the average of gradients decays; 0.9 by default.
    pub beta1: f64,
    /// The factor by which the average of squared gradients decays; 0.999 by default.
    pub beta2: f64,
    /// Added to the root of the average of squares; 1e-8 by default.
    pub eps: f64,
}

impl Default for ParamsSparseAdam {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        }
    }
}

/// The dtypes of state and arithmetic: f32 and f64.
pub trait Real:
    Copy
    + PartialEq
    + Send
    + Sync
    + Add<Output = Self>
    + Div<Output = Self>
    + Mul<Output = Self>
    + Sub<Output = Self>
{
    fn from_f64(x: f64) -> Self;
    fn sqrt(self) -> Self;
}

macro_rules! real {
    ($t:ident) => {
        impl Real for $t {
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }

            #[inline(always)]
            fn sqrt(self) -> Self {
                $t::sqrt(self)
            }
        }
    };
}
real!(f32);
real!(f64);

/// One step for one value, which has `S` values of state.
///
/// Where [`Algorithm::check_sparse`] finds nothing, a gradient of zero changes nothing, so that values without a gradient need not
/// be visited.
pub trait Rule<A, const S: usize>: Copy + Sync {
    /// The new value and its new state.
    fn update(self, param: A, grad: A, state: [A; S]) -> (A, [A; S]);
}

/// A step of [`AdamW`](super::AdamW); state `[exp_avg, exp_avg_sq]`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AdamWRule<A> {
    /// `1 - lr * weight_decay`
    decay: A,
    beta1: A,
    /// `1 - beta1`, rounded once
    complement1: A,
    beta2: A,
    /// `1 - beta2`, rounded once
    complement2: A,
    /// `1 / sqrt(1 - beta2^t)`
    correction2: A,
    /// `lr / (1 - beta1^t)`
    step_size: A,
    eps: A,
}

impl<A: Real> Rule<A, 2> for AdamWRule<A> {
    #[inline(always)]
    fn update(self, param: A, grad: A, [exp_avg, exp_avg_sq]: [A; 2]) -> (A, [A; 2]) {
        let exp_avg = self.beta1 * exp_avg + self.complement1 * grad;
        let exp_avg_sq = self.beta2 * exp_avg_sq + self.complement2 * (grad * grad);
        let denominator = exp_avg_sq.sqrt() * self.correction2 + self.eps;
        let param = self.decay * param - self.step_size * (exp_avg / denominator);
        (param, [exp_avg, exp_avg_sq])
    }
}

/// A step of [`Adagrad`](super::Adagrad); state `[sum]`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AdagradRule<A> {
    weight_decay: A,
    /// `lr / (1 + (t - 1) * lr_decay)`
    step_size: A,
    eps: A,
}

impl<A: Real> Rule<A, 1> for AdagradRule<A> {
    #[inline(always)]
    fn update(self, param: A, grad: A, [sum]: [A; 1]) -> (A, [A; 1]) {
        let grad = grad + self.weight_decay * param;
        let sum = sum + grad * grad;
        let param = param - self.step_size * (grad / (sum.sqrt() + self.eps));
        (param, [sum])
    }
}

/// A step of [`Sgd`](super::Sgd) without momentum; no state.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct SgdRule<A> {
    weight_decay: A,
    lr: A,
}

impl<A: Real> Rule<A, 0> for SgdRule<A> {
    #[inline(always)]
    fn update(self, param: A, grad: A, []: [A; 0]) -> (A, [A; 0]) {
        let grad = grad + self.weight_decay * param;
        (param - self.lr * grad, [])
    }
}

/// A step of [`Sgd`](super::Sgd) with momentum; state `[momentum_buffer]`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MomentumRule<A> {
    weight_decay: A,
    momentum: A,
    /// The share of the gradient that is added to the buffer: `1 - dampening`, but all of the first gradient.
    intake: A,
    /// The step goes along `along_grad * gradient + along_buffer * momentum_buffer`: `(1, momentum)` with Nesterov's momentum,
    /// `(0, 1)` without.
    along_grad: A,
    along_buffer: A,
    lr: A,
}

impl<A: Real> Rule<A, 1> for MomentumRule<A> {
    #[inline(always)]
    fn update(self, param: A, grad: A, [momentum_buffer]: [A; 1]) -> (A, [A; 1]) {
        let grad = grad + self.weight_decay * param;
        let momentum_buffer = self.momentum * momentum_buffer + self.intake * grad;
        let direction = self.along_grad * grad + self.along_buffer * momentum_buffer;
        (param - self.lr * direction, [momentum_buffer])
    }
}

/// A step of [`SparseAdam`](super::SparseAdam); state `[exp_avg, exp_avg_sq]`. A value without a gradient stays as it is.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct SparseAdamRule<A> {
    zero: A,
    /// `1 - beta1`, rounded once
    complement1: A,
    /// `1 - beta2`, rounded once
    complement2: A,
    /// `lr * sqrt(1 - beta2^t) / (1 - beta1^t)`
    step_size: A,
    eps: A,
}

impl<A: Real> Rule<A, 2> for SparseAdamRule<A> {
    #[inline(always)]
    fn update(self, param: A, grad: A, [exp_avg, exp_avg_sq]: [A; 2]) -> (A, [A; 2]) {
        let new_avg = exp_avg + self.complement1 * (grad - exp_avg);
        let new_sq = exp_avg_sq + self.complement2 * (grad * grad - exp_avg_sq);
        let new_param = param - self.step_size * (new_avg / (new_sq.sqrt() + self.eps));
        if grad == self.zero {
            (param, [exp_avg, exp_avg_sq])
        } else {
            (new_param, [new_avg, new_sq])
        }
    }
}

/// The rule of some algorithm.
#[derive(Clone, Copy)]
pub enum AnyRule<A> {
    AdamW(AdamWRule<A>),
    Adagrad(AdagradRule<A>),
    Sgd(SgdRule<A>),
    Momentum(MomentumRule<A>),
    SparseAdam(SparseAdamRule<A>),
}

/// The count of a step of one parameter, from 1.
#[derive(Clone, Copy)]
pub struct Step {
    pub count: u64,
    /// Whether the state was created for this step.
    pub is_first: bool,
}

/// Implemented by the hyper-parameters of each optimiser.
pub trait Algorithm: Clone + Debug {
    /// The name in error messages.
    const NAME: &'static str;

    /// The names of the state of a value, as in torch.
    const STATE: &'static [&'static str];

    fn lr(&self) -> f64;

    fn set_lr(&mut self, lr: f64);

    /// Returns an error if a hyper-parameter is out of range.
    fn check(&self) -> Result<()>;

    /// Returns an error if a step would change values without a gradient, and so cannot use a sparse gradient.
    fn check_sparse(&self) -> Result<()>;

    /// How many values of state each value needs with these hyper-parameters.
    fn state_len(&self) -> usize {
        Self::STATE.len()
    }

    /// The initial value of all state.
    fn initial_state(&self) -> f64 {
        0.0
    }

    /// The arithmetic of this step.
    fn rule<A: Real>(&self, step: Step) -> AnyRule<A>;
}

fn no_sparse<T>(optimizer: &str, because: &str) -> Result<T> {
    bail!("{optimizer}: a sparse gradient cannot be used with {because}, which changes values without a gradient")
}

fn betas_below_one(optimizer: &str, betas: [f64; 2]) -> Result<()> {
    for (name, beta) in ["beta1", "beta2"].into_iter().zip(betas) {
        if !(0.0..1.0).contains(&beta) {
            bail!("{optimizer}: {name} must lie in [0, 1), got {beta}");
        }
    }
    Ok(())
}

fn at_least_zero(optimizer: &str, params: &[(&str, f64)]) -> Result<()> {
    for &(name, value) in params {
        if !(value >= 0.0 && value.is_finite()) {
            bail!("{optimizer}: {name} must be finite and at least 0, got {value}");
        }
    }
    Ok(())
}

impl Algorithm for ParamsAdamW {
    const NAME: &'static str = "adamw";
    const STATE: &'static [&'static str] = &["exp_avg", "exp_avg_sq"];

    fn lr(&self) -> f64 {
        self.lr
    }

    fn set_lr(&mut self, lr: f64) {
        self.lr = lr;
    }

    fn check(&self) -> Result<()> {
        let Self { lr, eps, .. } = *self;
        let weight_decay = self.weight_decay;
        at_least_zero(
            Self::NAME,
            &[("lr", lr), ("eps", eps), ("weight_decay", weight_decay)],
        )?;
        betas_below_one(Self::NAME, [self.beta1, self.beta2])
    }

    fn check_sparse(&self) -> Result<()> {
        bail!(
            "{}: a sparse gradient cannot be used, because every step changes all values; use SparseAdam",
            Self::NAME
        )
    }

    fn rule<A: Real>(&self, step: Step) -> AnyRule<A> {
        let t = step.count as f64;
        AnyRule::AdamW(AdamWRule {
            decay: A::from_f64(1.0 - self.lr * self.weight_decay),
            beta1: A::from_f64(self.beta1),
            complement1: A::from_f64(1.0 - self.beta1),
            beta2: A::from_f64(self.beta2),
            complement2: A::from_f64(1.0 - self.beta2),
            correction2: A::from_f64(1.0 / (1.0 - self.beta2.powf(t)).sqrt()),
            step_size: A::from_f64(self.lr / (1.0 - self.beta1.powf(t))),
            eps: A::from_f64(self.eps),
        })
    }
}

impl Algorithm for ParamsAdagrad {
    const NAME: &'static str = "adagrad";
    const STATE: &'static [&'static str] = &["sum"];

    fn lr(&self) -> f64 {
        self.lr
    }

    fn set_lr(&mut self, lr: f64) {
        self.lr = lr;
    }

    fn check(&self) -> Result<()> {
        at_least_zero(
            Self::NAME,
            &[
                ("lr", self.lr),
                ("lr_decay", self.lr_decay),
                ("weight_decay", self.weight_decay),
                ("initial_accumulator_value", self.initial_accumulator_value),
                ("eps", self.eps),
            ],
        )
    }

    fn check_sparse(&self) -> Result<()> {
        if self.weight_decay != 0.0 {
            return no_sparse(Self::NAME, "weight decay");
        }
        if self.eps as f32 == 0.0 && self.initial_accumulator_value as f32 == 0.0 {
            // Zero over zero.
            return no_sparse(Self::NAME, "an eps of 0");
        }
        Ok(())
    }

    fn initial_state(&self) -> f64 {
        self.initial_accumulator_value
    }

    fn rule<A: Real>(&self, step: Step) -> AnyRule<A> {
        let before = (step.count - 1) as f64;
        AnyRule::Adagrad(AdagradRule {
            weight_decay: A::from_f64(self.weight_decay),
            step_size: A::from_f64(self.lr / (1.0 + before * self.lr_decay)),
            eps: A::from_f64(self.eps),
        })
    }
}

impl Algorithm for ParamsSgd {
    const NAME: &'static str = "sgd";
    const STATE: &'static [&'static str] = &["momentum_buffer"];

    fn lr(&self) -> f64 {
        self.lr
    }

    fn set_lr(&mut self, lr: f64) {
        self.lr = lr;
    }

    fn check(&self) -> Result<()> {
        at_least_zero(
            Self::NAME,
            &[
                ("lr", self.lr),
                ("momentum", self.momentum),
                ("weight_decay", self.weight_decay),
            ],
        )?;
        if !self.dampening.is_finite() {
            let dampening = self.dampening;
            bail!("{}: dampening must be finite, got {dampening}", Self::NAME);
        }
        if self.nesterov && (self.momentum == 0.0 || self.dampening != 0.0) {
            bail!(
                "{}: nesterov needs a momentum and no dampening, got momentum {} and dampening {}",
                Self::NAME,
                self.momentum,
                self.dampening
            );
        }
        Ok(())
    }

    fn check_sparse(&self) -> Result<()> {
        match (self.weight_decay, self.momentum) {
            (0.0, 0.0) => Ok(()),
            (0.0, _) => no_sparse(Self::NAME, "momentum"),
            _ => no_sparse(Self::NAME, "weight decay"),
        }
    }

    fn state_len(&self) -> usize {
        usize::from(self.momentum != 0.0)
    }

    fn rule<A: Real>(&self, step: Step) -> AnyRule<A> {
        let (lr, weight_decay) = (A::from_f64(self.lr), A::from_f64(self.weight_decay));
        if self.momentum == 0.0 {
            return AnyRule::Sgd(SgdRule { weight_decay, lr });
        }
        let (along_grad, along_buffer) = match self.nesterov {
            true => (1.0, self.momentum),
            false => (0.0, 1.0),
        };
        let dampening = if step.is_first { 0.0 } else { self.dampening };
        AnyRule::Momentum(MomentumRule {
            weight_decay,
            momentum: A::from_f64(self.momentum),
            intake: A::from_f64(1.0 - dampening),
            along_grad: A::from_f64(along_grad),
            along_buffer: A::from_f64(along_buffer),
            lr,
        })
    }
}

impl Algorithm for ParamsSparseAdam {
    const NAME: &'static str = "sparse_adam";
    const STATE: &'static [&'static str] = &["exp_avg", "exp_avg_sq"];

    fn lr(&self) -> f64 {
        self.lr
    }

    fn set_lr(&mut self, lr: f64) {
        self.lr = lr;
    }

    fn check(&self) -> Result<()> {
        at_least_zero(Self::NAME, &[("lr", self.lr), ("eps", self.eps)])?;
        betas_below_one(Self::NAME, [self.beta1, self.beta2])
    }

    fn check_sparse(&self) -> Result<()> {
        Ok(())
    }

    fn rule<A: Real>(&self, step: Step) -> AnyRule<A> {
        let t = step.count as f64;
        let correction1 = 1.0 - self.beta1.powf(t);
        let correction2 = 1.0 - self.beta2.powf(t);
        AnyRule::SparseAdam(SparseAdamRule {
            zero: A::from_f64(0.0),
            complement1: A::from_f64(1.0 - self.beta1),
            complement2: A::from_f64(1.0 - self.beta2),
            step_size: A::from_f64(self.lr * correction2.sqrt() / correction1),
            eps: A::from_f64(self.eps),
        })
    }
}
