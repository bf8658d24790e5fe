//! The differentiable function under the layers: `out[bag, column] = pool over rows of the bag of
//! sign(row, column) * hashed_weight[slot(row, column)]`.
//!
//! Every check of shapes and dtypes stands here, once. What passes becomes a small struct, [`Lookup`], and a set of
//! contiguous [`Operands`]; `cpu/` and `cuda/` trust both.
//!
//! | op | kind | arguments | result |
//! |---|---|---|---|
//! | [`FixedBags`] | `CustomOp2` | hashed_weight, indices | output |
//! | [`RaggedBags`] | `CustomOp3` | hashed_weight, indices, offsets | output |
//! | [`WeightedBags`] | `CustomOp3` | hashed_weight, indices, per_sample_weights | output |
//! | [`GradWeight`] | `CustomOp3` | grad_output, hashed_weight, indices | grad_weight |
//! | [`GradPerSampleWeights`] | `CustomOp3` | grad_output, hashed_weight, indices | gradient of per_sample_weights |
//!
//! candle has no op of four arguments: an integer tensor that does not fit lives in the op's struct. The backward
//! keeps the arguments of the forward and nothing else; it hashes again.

mod cpu;
#[cfg(any(feature = "cuda", test))]
mod cuda;
// Needs ops that are not public.
#[cfg(test)]
#[path = "../../tests/in_crate/past_32_bits.rs"]
mod past_32_bits;

use crate::bags::{BagShape, BoundsCheck, JaggedLayout, Tables};
use crate::hash::Slots;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    bail, CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor,
};
use std::sync::Arc;

const OP: &str = "hashed-embedding-bag";

/// How the rows of a bag become one output row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The sum of the rows, each times its per-sample weight where one is given.
    #[default]
    Sum,
    /// The sum divided by the number of rows that are not padding.
    Mean,
    /// The largest value of each column. Of equal values the first counts, and gets the gradient; NaN counts as larger
    /// than every number.
    Max,
}

/// How the gradient of `hashed_weight` is summed on CUDA. On the CPU it is deterministic in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Gradient {
    /// In the order in which threads arrive: the last bits may differ from run to run.
    #[default]
    Fastest,
    /// The same bits in every run, whatever the launch, at less than twice the time: terms are rounded to a grid of fixed
    /// point, finer than additions in f32 round, and added as integers. Needs memory for 8 bytes per slot (16 in f64).
    Deterministic,
}

/// The virtual table that a layer stands for: its configuration, bound to one length of `hashed_weight`.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    pub slots: Slots,
    pub tables: Arc<Tables>,
    /// `Tables::first_rows` beside `hashed_weight`, where there are several tables: i64, `(tables + 1,)`. For kernels.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub first_rows: Option<Tensor>,
    pub embedding_dim: usize,
    pub mode: Mode,
    pub padding_idx: Option<i64>,
}

impl Table {
    /// Whether `row` takes part in its bag.
    fn counts(&self, row: i64) -> bool {
        Some(row) != self.padding_idx
    }
}

/// One call: which table, and how its indices are divided.
#[derive(Debug, Clone)]
struct Lookup {
    table: Table,
    bags: BagShape,
    bounds_check: BoundsCheck,
    /// For kernels.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    gradient: Gradient,
}

/// A storage and where in it the tensor lies; always contiguous here.
type View<'a, S> = (&'a S, &'a Layout);

/// The tensors of one call on one device.
struct Operands<'a, S> {
    hashed_weight: View<'a, S>,
    indices: View<'a, S>,
    offsets: Option<View<'a, S>>,
    per_sample_weights: Option<View<'a, S>>,
}

/// Offsets, and how they are to be read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Offsets<'a> {
    pub offsets: &'a Tensor,
    pub include_last_offset: bool,
    /// Of no consequence where there is one table.
    pub layout: JaggedLayout,
}

/// Looks up and pools bags of rows.
///
/// * `hashed_weight`: `(len,)`, f16, bf16, f32 or f64, of the length `table` was bound to
/// * `indices`: u32, i32 or i64, `(num_bags, bag_len)`, or `(nnz,)` with `offsets`
/// * `offsets`: u32, i32 or i64, `(num_bags,)`, or `(num_bags + 1,)` with `include_last_offset`
/// * `per_sample_weights`: the shape of `indices`, the dtype of `hashed_weight`, mode sum only
///
/// Returns `(num_bags, embedding_dim)` in the dtype of `hashed_weight`, differentiable in `hashed_weight` and
/// `per_sample_weights`.
pub(crate) fn hashed_embedding_bag(
    hashed_weight: &Tensor,
    indices: &Tensor,
    offsets: Option<Offsets>,
    per_sample_weights: Option<&Tensor>,
    table: &Table,
    bounds_check: BoundsCheck,
    gradient: Gradient,
) -> Result<Tensor> {
    let tables = table.tables.len();
    check_dtype("indices", indices, &INDEX_DTYPES)?;
    check_device("indices", indices, hashed_weight)?;
    let bags = match (offsets, indices.dims()) {
        (None, &[num_bags, bag_len]) => BagShape::fixed(num_bags, bag_len, tables)?,
        (None, dims) => {
            bail!("{OP}: indices must have rank 2 when there are no offsets, got {dims:?}")
        }
        (
            Some(Offsets {
                offsets,
                include_last_offset,
                layout,
            }),
            &[nnz],
        ) => {
            check_dtype("offsets", offsets, &INDEX_DTYPES)?;
            check_device("offsets", offsets, hashed_weight)?;
            match offsets.dims() {
                &[len] => BagShape::ragged(nnz, len, include_last_offset, tables, layout)?,
                dims => bail!("{OP}: offsets must have rank 1, got {dims:?}"),
            }
        }
        (Some(_), dims) => {
            bail!("{OP}: indices must have rank 1 when offsets are given, got {dims:?}")
        }
    };
    // In f64, the largest dtype, the output would have to be addressable; bags of no indices cost nothing to ask for.
    let values = bags.num_bags.checked_mul(table.embedding_dim);
    if values.is_none_or(|values| values > isize::MAX as usize / 8) {
        bail!(
            "{OP}: an output of {} bags of {} columns is too large",
            bags.num_bags,
            table.embedding_dim
        );
    }
    if let Some(weights) = per_sample_weights {
        if table.mode != Mode::Sum {
            bail!(
                "{OP}: per_sample_weights need mode sum, got {:?}",
                table.mode
            );
        }
        if weights.dims() != indices.dims() {
            bail!(
                "{OP}: per_sample_weights must have the shape of indices {:?}, got {:?}",
                indices.dims(),
                weights.dims()
            );
        }
        check_dtype("per_sample_weights", weights, &[hashed_weight.dtype()])?;
        check_device("per_sample_weights", weights, hashed_weight)?;
    }

    let hashed_weight = hashed_weight.contiguous()?;
    let indices = contiguous_indices(indices)?;
    let offsets = offsets
        .map(|offsets| contiguous_indices(offsets.offsets))
        .transpose()?;
    let lookup = Lookup {
        table: table.clone(),
        bags,
        bounds_check,
        gradient,
    };
    match (offsets, per_sample_weights) {
        (None, None) => hashed_weight.apply_op2(&indices, FixedBags(lookup)),
        (Some(offsets), None) => {
            hashed_weight.apply_op3(&indices, &offsets, Ternary(RaggedBags(lookup)))
        }
        (offsets, Some(weights)) => hashed_weight.apply_op3(
            &indices,
            &weights.contiguous()?,
            Ternary(WeightedBags { lookup, offsets }),
        ),
    }
}

/// `Tensor::contiguous` for indices of any dtype: on CUDA, candle itself cannot copy i32.
pub(crate) fn contiguous_indices(indices: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if indices.device().is_cuda() && indices.dtype() == DType::I32 && !indices.is_contiguous() {
        return indices.apply_op1_no_bwd(&cuda::ContiguousI32);
    }
    indices.contiguous()
}

pub(crate) const WEIGHT_DTYPES: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];
const INDEX_DTYPES: [DType; 3] = [DType::U32, DType::I32, DType::I64];

/// `argument` must have one of the dtypes.
pub(crate) fn check_dtype(argument: &str, tensor: &Tensor, dtypes: &[DType]) -> Result<()> {
    if dtypes.contains(&tensor.dtype()) {
        return Ok(());
    }
    let names: Vec<_> = dtypes.iter().map(DType::as_str).collect();
    bail!(
        "{OP}: {argument} must have dtype {}, got {}",
        names.join(" or "),
        tensor.dtype().as_str()
    )
}

/// `argument` must lie beside `hashed_weight`.
fn check_device(argument: &str, tensor: &Tensor, hashed_weight: &Tensor) -> Result<()> {
    if tensor.device().same_device(hashed_weight.device()) {
        return Ok(());
    }
    bail!(
        "{OP}: {argument} must be on the device of hashed_weight ({:?}), got {:?}",
        hashed_weight.device().location(),
        tensor.device().location()
    )
}

/// What runs the loops: [`cpu`] or [`cuda`]. Both trust what this file checked.
trait Backend {
    type Storage;

    /// The storage, when it lies on this backend.
    fn storage(storage: &Storage) -> Result<&Self::Storage>;

    /// `(num_bags, embedding_dim)` in the dtype of `hashed_weight`; with [`BoundsCheck::Error`], an error for the first
    /// offset or row that breaks the contract.
    fn forward(lookup: &Lookup, operands: &Operands<Self::Storage>) -> Result<Self::Storage>;

    /// `(len,)` in the accumulator's dtype: f64 for f64, else f32.
    fn grad_weight(
        lookup: &Lookup,
        grad_output: View<Self::Storage>,
        operands: &Operands<Self::Storage>,
    ) -> Result<Self::Storage>;

    /// `(nnz,)` in the dtype of `hashed_weight`; mode sum.
    fn grad_per_sample_weights(
        lookup: &Lookup,
        grad_output: View<Self::Storage>,
        operands: &Operands<Self::Storage>,
    ) -> Result<Self::Storage>;
}

impl Lookup {
    fn out_shape(&self) -> Shape {
        (self.bags.num_bags, self.table.embedding_dim).into()
    }

    /// The gradients with respect to `hashed_weight` and `per_sample_weights`; `None` for what needs none.
    fn backward(
        &self,
        hashed_weight: &Tensor,
        indices: &Tensor,
        offsets: Option<&Tensor>,
        per_sample_weights: Option<&Tensor>,
        grad_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad_output = grad_output.contiguous()?;
        let grad_weight = if hashed_weight.track_op() {
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

/// Lends the storage of a tensor that an op holds in its struct.
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

/// Bags of one length.
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
        Ok((B::forward(&self.0, &operands)?, self.0.out_shape()))
    }
}

impl CustomOp2 for FixedBags {
    fn name(&self) -> &'static str {
        OP
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
    const NAME: &'static str = OP;

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
        Ok((B::forward(&self.0, &operands)?, self.0.out_shape()))
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
    const NAME: &'static str = OP;

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
                self.lookup.out_shape(),
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
