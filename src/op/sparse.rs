//! A gradient that is no tensor: what backward passes add to a buffer, and an optimiser reads where something was added.
//!
//! candle's own gradient of `hashed_weight` is as long as `hashed_weight`, however few of its slots were looked up, and candle
//! makes zeros and a sum of that length for it. So `bwd` gives candle none. The gradient is added to a buffer that belongs to the
//! variable, is zero between steps, and has flags that say which parts of it are not.

use super::cpu::{self, Cpu};
#[cfg(feature = "cuda")]
use super::cuda::{self, Cuda};
use super::lookup::Lookup;
use super::{lend, Backend, Operands};
use crate::error::bail;
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Result, Storage, Tensor, TensorId};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

/// The sparse gradient of a `hashed_weight`, with the option [`sparse`](crate::HashedEmbeddingBagConfig::sparse).
///
/// Backward passes add to it until a step of [`optim::Sgd`](crate::optim::Sgd), [`optim::Adagrad`](crate::optim::Adagrad) or
/// [`optim::SparseAdam`](crate::optim::SparseAdam) uses it up. What a backward pass that failed has added stays too: call
/// [`clear`](Self::clear) before you try again.
///
/// All layers on one variable share it; clones are the same gradient. It lives as long as one of them or of their graphs, so keep
/// the layer until the step. From the first backward pass on it takes as much memory as its `hashed_weight` in f32 (f64 for f64),
/// and with [`Gradient::Deterministic`](crate::Gradient::Deterministic) on CUDA three times as much.
#[derive(Clone)]
pub struct SparseGradient(Arc<Inner>);

struct Inner {
    variable: TensorId,
    len: usize,
    /// That of the sums.
    dtype: DType,
    device: Device,
    state: Mutex<State>,
}

struct State {
    /// From the first backward pass on.
    sums: Option<Sums>,
    /// Whether there was a backward pass since they were last used up.
    is_pending: bool,
}

/// The sums so far.
pub(crate) enum Sums {
    Cpu(cpu::SparseSums),
    #[cfg(feature = "cuda")]
    Cuda(cuda::SparseSums),
}

/// The sparse gradients of this process. They are found by the variable, as a tensor's gradient is in a `GradStore`: candle gives
/// an optimiser nothing else that leads to the layers.
fn all() -> MutexGuard<'static, HashMap<TensorId, Weak<Inner>>> {
    static ALL: OnceLock<Mutex<HashMap<TensorId, Weak<Inner>>>> = OnceLock::new();
    let all = ALL.get_or_init(Default::default).lock();
    all.unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Another may have been made for the variable meanwhile.
        all().retain(|_, weak| weak.strong_count() > 0);
    }
}

impl SparseGradient {
    /// The sparse gradient of a variable.
    pub(crate) fn of(hashed_weight: &Tensor) -> Self {
        let mut all = all();
        let existing = all.get(&hashed_weight.id()).and_then(Weak::upgrade);
        Self(existing.unwrap_or_else(|| {
            let inner = Arc::new(Inner {
                variable: hashed_weight.id(),
                len: hashed_weight.elem_count(),
                dtype: match hashed_weight.dtype() {
                    DType::F64 => DType::F64,
                    _ => DType::F32,
                },
                device: hashed_weight.device().clone(),
                state: Mutex::new(State {
                    sums: None,
                    is_pending: false,
                }),
            });
            all.insert(hashed_weight.id(), Arc::downgrade(&inner));
            inner
        }))
    }

    /// The sparse gradient of a variable, if a layer has made it.
    pub(crate) fn find(variable: &Tensor) -> Option<Self> {
        all().get(&variable.id()).and_then(Weak::upgrade).map(Self)
    }

    /// Whether there was a backward pass since the sums were last used up.
    pub(crate) fn is_pending(&self) -> bool {
        self.lock().is_pending
    }

    /// Uses the sums up: `f` leaves zeros.
    pub(crate) fn take(&self, f: impl FnOnce(&mut Sums) -> Result<()>) -> Result<()> {
        let State { sums, is_pending } = &mut *self.lock();
        sums.as_mut().map_or(Ok(()), f)?;
        *is_pending = false;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        let state = self.0.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of the gradient as a tensor, `(len,)`, in f32 (f64 for f64): zero where nothing was looked up. For tests, or to see
    /// its norm.
    ///
    /// # Errors
    /// What the device says, for lack of memory.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let Inner {
            len, dtype, device, ..
        } = &*self.0;
        let values = match &self.lock().sums {
            Some(Sums::Cpu(sums)) => Storage::Cpu(sums.values.clone()),
            #[cfg(feature = "cuda")]
            Some(Sums::Cuda(sums)) => Storage::Cuda(sums.copy()?),
            None => return Tensor::zeros(*len, *dtype, device),
        };
        Ok(Tensor::from_storage(
            values,
            *len,
            BackpropOp::none(),
            false,
        ))
    }

    /// Discards the gradient, such as that of a loss that was not finite. It is zero again.
    ///
    /// # Errors
    /// What the device says.
    pub fn clear(&self) -> Result<()> {
        self.take(|sums| {
            match sums {
                Sums::Cpu(sums) => sums.clear(),
                #[cfg(feature = "cuda")]
                Sums::Cuda(sums) => sums.clear()?,
            }
            Ok(())
        })
    }

    /// Adds the gradient of one lookup.
    pub(super) fn add(
        &self,
        lookup: &Lookup,
        tensors: Tensors,
        grad_output: &Tensor,
    ) -> Result<()> {
        let Inner {
            len, dtype, device, ..
        } = &*self.0;
        let State { sums, is_pending } = &mut *self.lock();
        // Even if it fails: what it leaves behind is for `clear` to discard.
        *is_pending = true;
        let sums = match sums {
            Some(sums) => sums,
            None => sums.insert(match device {
                Device::Cpu => Sums::Cpu(cpu::SparseSums::new(*len, *dtype)),
                #[cfg(feature = "cuda")]
                Device::Cuda(device) => Sums::Cuda(cuda::SparseSums::new(*len, *dtype, device)?),
                _ => bail!(
                    "a sparse gradient must be on CPU or CUDA, got {:?}",
                    device.location()
                ),
            }),
        };
        match sums {
            Sums::Cpu(sums) => tensors.add::<Cpu>(lookup, grad_output, sums),
            #[cfg(feature = "cuda")]
            Sums::Cuda(sums) => tensors.add::<Cuda>(lookup, grad_output, sums),
        }
    }
}

impl fmt::Debug for SparseGradient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SparseGradient")
            .field(&self.0.variable)
            .finish()
    }
}

/// The tensors of a lookup.
pub(super) struct Tensors<'a> {
    pub hashed_weight: &'a Tensor,
    pub indices: &'a Tensor,
    pub offsets: Option<&'a Tensor>,
    pub per_sample_weights: Option<&'a Tensor>,
}

impl Tensors<'_> {
    fn add<B: Backend>(
        &self,
        lookup: &Lookup,
        grad_output: &Tensor,
        sums: &mut B::SparseSums,
    ) -> Result<()> {
        let (grad_output, grad_layout) = grad_output.storage_and_layout();
        let (weight, weight_layout) = self.hashed_weight.storage_and_layout();
        let (indices, indices_layout) = self.indices.storage_and_layout();
        lend::<B, _>(self.offsets, |offsets| {
            lend::<B, _>(self.per_sample_weights, |per_sample_weights| {
                let operands = Operands {
                    hashed_weight: (B::storage(&weight)?, weight_layout),
                    indices: (B::storage(&indices)?, indices_layout),
                    offsets,
                    per_sample_weights,
                };
                let grad_output = (B::storage(&grad_output)?, grad_layout);
                B::add_grad_weight(lookup, grad_output, &operands, sums)
            })
        })
    }
}
