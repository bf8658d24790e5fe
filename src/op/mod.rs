//! The differentiable function under the layers: `out[bag, column] = pool over rows of the bag of
//! sign(row, column) * hashed_weight[slot(row, column)]`.
//!
//! `lookup.rs` checks every shape and dtype, once. Arguments that pass become a small struct, [`Lookup`], and a set of contiguous
//! [`Operands`]; the two backends, `cpu/` and `cuda/`, rely on both.
//!
//! | op | kind | arguments | result |
//! |---|---|---|---|
//! | [`FixedBags`] | `CustomOp2` | hashed_weight, indices | output |
//! | [`RaggedBags`] | `CustomOp3` | hashed_weight, indices, offsets | output |
//! | [`WeightedBags`] | `CustomOp3` | hashed_weight, indices, per_sample_weights | output |
//! | [`GradWeight`] | `CustomOp3` | grad_output, hashed_weight, indices | grad_weight |
//! | [`GradPerSampleWeights`] | `CustomOp3` | grad_output, hashed_weight, indices | gradient of per_sample_weights |
//!
//! With a sparse gradient ([`SparseGradient`]), the backward pass adds to a buffer instead of returning grad_weight.
//! Where the table says so (`Table::low_bit`), `hashed_weight` is packed bytes in 8 or 4 bits: then there is a forward only.
//!
//! candle has no op with four arguments, so the tensors that are left over are fields of the op's struct. The backward pass keeps
//! the arguments of the forward and nothing else; it hashes again.

pub(crate) mod cpu;
#[cfg(any(feature = "cuda", test))]
pub(crate) mod cuda;
mod lookup;
mod sparse;
// Needs ops that are not public.
#[cfg(test)]
#[path = "../../tests/in_crate/past_32_bits.rs"]
mod past_32_bits;

pub(crate) use lookup::{
    check_dtype, check_output, check_weights_shape, contiguous_indices, hashed_embedding_bag,
    Inputs, Offsets, OutDims, Table, INDEX_DTYPES, WEIGHT_DTYPES,
};

pub use sparse::SparseGradient;
pub(crate) use sparse::Sums;

use crate::error::{bail, NAME};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor};
use lookup::Lookup;
use serde::{Deserialize, Serialize};
use sparse::Tensors;

/// How the rows of a bag become one output row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The sum of the rows, each times its per-sample weight where one is given.
    #[default]
    Sum,
    /// The sum divided by the number of rows that are not padding.
    Mean,
    /// The largest value of each column. The first of equal values is taken and gets the gradient; NaN counts as larger than
    /// every number.
    Max,
}

/// How the gradient of `hashed_weight` is summed on CUDA. On the CPU it is always deterministic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Gradient {
    /// In the order in which threads happen to add: the last bits may differ from run to run.
    #[default]
    Fastest,
    /// The same bits in every run, at less than twice the time: terms are rounded to fixed point, more finely than additions in
    /// f32 round, and added as integers. Needs 8 more bytes of memory per slot (16 in f64).
    Deterministic,
}

/// A tensor as candle passes it to an op: a storage, and a layout that says which part of it. Ops of this crate only pass on
/// contiguous ones.
type View<'a, S> = (&'a S, &'a Layout);

/// The tensors of one lookup, all on one device.
struct Operands<'a, S> {
    hashed_weight: View<'a, S>,
    indices: View<'a, S>,
    offsets: Option<View<'a, S>>,
    per_sample_weights: Option<View<'a, S>>,
}

/// The device that computes a lookup: [`cpu`] or `cuda`. Both rely on the checks of `lookup.rs`.
trait Backend {
    type Storage;

    /// The storage as one of this backend.
    fn storage(storage: &Storage) -> Result<&Self::Storage>;

    /// `(num_bags, embedding_dim)` in the dtype of `hashed_weight`, or f32 if that is packed bytes; with
    /// [`BoundsCheck::Error`](crate::BoundsCheck::Error), an error for the first offset or row that breaks the contract.
    fn forward(lookup: &Lookup, operands: &Operands<Self::Storage>) -> Result<Self::Storage>;

    /// `(len,)` in the accumulator's dtype: f64 for f64, else f32.
    fn grad_weight(
        lookup: &Lookup,
        grad_output: View<Self::Storage>,
        operands: &Operands<Self::Storage>,
    ) -> Result<Self::Storage>;

    /// The sums of a sparse gradient.
    type SparseSums;

    /// Adds to a sparse gradient what [`grad_weight`](Self::grad_weight) returns.
    fn add_grad_weight(
        lookup: &Lookup,
        grad_output: View<Self::Storage>,
        operands: &Operands<Self::Storage>,
        sums: &mut Self::SparseSums,
    ) -> Result<()>;

    /// `(nnz,)` in the dtype of `hashed_weight`; mode sum.
    fn grad_per_sample_weights(
        lookup: &Lookup,
        grad_output: View<Self::Storage>,
        operands: &Operands<Self::Storage>,
    ) -> Result<Self::Storage>;
}

impl Lookup {
    /// The gradients with respect to `hashed_weight` and `per_sample_weights`; `None` for what needs none.
    fn backward(
        &self,
        hashed_weight: &Tensor,
        indices: &Tensor,
        offsets: Option<&Tensor>,
        per_sample_weights: Option<&Tensor>,
        grad_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        if let Some(low_bit) = &self.table.low_bit {
            bail!(
                "a layer in {} bits does not train, and has no gradients: detach its inputs, or use the layer it was made of",
                u32::from(low_bit.bits())
            );
        }
        let grad_output = grad_output.contiguous()?;
        let grad_weight = if let Some(sparse) = &self.table.sparse_gradient {
            let tensors = Tensors {
                hashed_weight,
                indices,
                offsets,
                per_sample_weights,
            };
            sparse.add(self, tensors, &grad_output)?;
            None
        } else if hashed_weight.track_op() {
            let op = GradWeight {
                lookup: self.clone(),
                offsets: offsets.cloned(),
                per_sample_weights: per_sample_weights.cloned(),
            };
            let grad_weight = grad_output.apply_op3_no_bwd(hashed_weight, indices, &Ternary(op))?;
            Some(grad_weight.to_dtype(hashed_weight.dtype())?)
        } else {
            None
        };
        let grad_per_sample_weights = match per_sample_weights {
            Some(weights) if weights.track_op() => {
                let op = GradPerSampleWeights {
                    lookup: self.clone(),
                    offsets: offsets.cloned(),
                };
                Some(grad_output.apply_op3_no_bwd(hashed_weight, indices, &Ternary(op))?)
            }
            _ => None,
        };
        Ok((grad_weight, grad_per_sample_weights))
    }
}

/// Calls `f` with the storage of a tensor that is a field of an op, and keeps the storage locked meanwhile.
fn lend<B: Backend, R>(
    tensor: Option<&Tensor>,
    f: impl FnOnce(Option<View<B::Storage>>) -> Result<R>,
) -> Result<R> {
    match tensor {
        None => f(None),
        Some(tensor) => {
            let (storage, layout) = tensor.storage_and_layout();
            f(Some((B::storage(&storage)?, layout)))
        }
    }
}

/// Bags of equal length: (hashed_weight, indices) -> output.
struct FixedBags(Lookup);

impl FixedBags {
    fn run<B: Backend>(
        &self,
        hashed_weight: View<B::Storage>,
        indices: View<B::Storage>,
    ) -> Result<(B::Storage, Shape)> {
        let operands = Operands {
            hashed_weight,
            indices,
            offsets: None,
            per_sample_weights: None,
        };
        Ok((B::forward(&self.0, &operands)?, self.0.out_shape.clone()))
    }
}

impl CustomOp2 for FixedBags {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run::<cpu::Cpu>((s1, l1), (s2, l2))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.run::<cuda::Cuda>((s1, l1), (s2, l2))
    }

    fn bwd(
        &self,
        hashed_weight: &Tensor,
        indices: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (grad_weight, _) = self
            .0
            .backward(hashed_weight, indices, None, None, grad_res)?;
        Ok((grad_weight, None))
    }
}

/// An op of three arguments, written once for both backends; [`Ternary`] makes it a `CustomOp3`.
trait TernaryOp {
    const NAME: &'static str;

    fn run<B: Backend>(&self, args: [View<B::Storage>; 3]) -> Result<(B::Storage, Shape)>;

    fn backward(&self, _args: [&Tensor; 3], _grad_res: &Tensor) -> Result<[Option<Tensor>; 3]> {
        Err(candle_core::Error::BackwardNotSupported { op: Self::NAME })
    }
}

struct Ternary<T>(T);

impl<T: TernaryOp> CustomOp3 for Ternary<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.run::<cpu::Cpu>([(s1, l1), (s2, l2), (s3, l3)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.run::<cuda::Cuda>([(s1, l1), (s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        arg1: &Tensor,
        arg2: &Tensor,
        arg3: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [grad1, grad2, grad3] = self.0.backward([arg1, arg2, arg3], grad_res)?;
        Ok((grad1, grad2, grad3))
    }
}

/// Bags divided by offsets: (hashed_weight, indices, offsets) -> output.
struct RaggedBags(Lookup);

impl TernaryOp for RaggedBags {
    const NAME: &'static str = NAME;

    fn run<B: Backend>(
        &self,
        [hashed_weight, indices, offsets]: [View<B::Storage>; 3],
    ) -> Result<(B::Storage, Shape)> {
        let operands = Operands {
            hashed_weight,
            indices,
            offsets: Some(offsets),
            per_sample_weights: None,
        };
        Ok((B::forward(&self.0, &operands)?, self.0.out_shape.clone()))
    }

    fn backward(
        &self,
        [hashed_weight, indices, offsets]: [&Tensor; 3],
        grad_res: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (grad_weight, _) =
            self.0
                .backward(hashed_weight, indices, Some(offsets), None, grad_res)?;
        Ok([grad_weight, None, None])
    }
}

/// Weighted bags of either kind: (hashed_weight, indices, per_sample_weights) -> output.
struct WeightedBags {
    lookup: Lookup,
    offsets: Option<Tensor>,
}

impl TernaryOp for WeightedBags {
    const NAME: &'static str = NAME;

    fn run<B: Backend>(
        &self,
        [hashed_weight, indices, per_sample_weights]: [View<B::Storage>; 3],
    ) -> Result<(B::Storage, Shape)> {
        lend::<B, _>(self.offsets.as_ref(), |offsets| {
            let operands = Operands {
                hashed_weight,
                indices,
                offsets,
                per_sample_weights: Some(per_sample_weights),
            };
            Ok((
                B::forward(&self.lookup, &operands)?,
                self.lookup.out_shape.clone(),
            ))
        })
    }

    fn backward(
        &self,
        [hashed_weight, indices, per_sample_weights]: [&Tensor; 3],
        grad_res: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (grad_weight, grad_per_sample_weights) = self.lookup.backward(
            hashed_weight,
            indices,
            self.offsets.as_ref(),
            Some(per_sample_weights),
            grad_res,
        )?;
        Ok([grad_weight, None, grad_per_sample_weights])
    }
}

/// (grad_output, hashed_weight, indices) -> grad_weight, `(len,)`, in the accumulator's dtype.
struct GradWeight {
    lookup: Lookup,
    offsets: Option<Tensor>,
    per_sample_weights: Option<Tensor>,
}

impl TernaryOp for GradWeight {
    const NAME: &'static str = "hashed-embedding-bag-grad-weight";

    fn run<B: Backend>(
        &self,
        [grad_output, hashed_weight, indices]: [View<B::Storage>; 3],
    ) -> Result<(B::Storage, Shape)> {
        lend::<B, _>(self.offsets.as_ref(), |offsets| {
            lend::<B, _>(self.per_sample_weights.as_ref(), |per_sample_weights| {
                let operands = Operands {
                    hashed_weight,
                    indices,
                    offsets,
                    per_sample_weights,
                };
                let grad_weight = B::grad_weight(&self.lookup, grad_output, &operands)?;
                Ok((grad_weight, hashed_weight.1.shape().clone()))
            })
        })
    }
}

/// (grad_output, hashed_weight, indices) -> gradient of per_sample_weights, the shape of indices, in their dtype.
struct GradPerSampleWeights {
    lookup: Lookup,
    offsets: Option<Tensor>,
}

impl TernaryOp for GradPerSampleWeights {
    const NAME: &'static str = "hashed-embedding-bag-grad-per-sample-weights";

    fn run<B: Backend>(
        &self,
        [grad_output, hashed_weight, indices]: [View<B::Storage>; 3],
    ) -> Result<(B::Storage, Shape)> {
        lend::<B, _>(self.offsets.as_ref(), |offsets| {
            let operands = Operands {
                hashed_weight,
                indices,
                offsets,
                per_sample_weights: None,
            };
            let grad = B::grad_per_sample_weights(&self.lookup, grad_output, &operands)?;
            Ok((grad, indices.1.shape().clone()))
        })
    }
}
