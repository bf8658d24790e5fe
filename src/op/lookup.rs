//! One lookup: checks all of its arguments, and chooses the op that computes it.

use super::{FixedBags, Gradient, Mode, RaggedBags, SparseGradient, Ternary, WeightedBags};
use crate::bags::{BagShape, JaggedLayout};
use crate::bounds::BoundsCheck;
use crate::error::bail;
use crate::hash::Slots;
use crate::low_bit::LowBit;
use crate::row_tensor::RowTensor;
use crate::tables::Tables;
use candle_core::{DType, Result, Shape, Tensor};
use std::sync::Arc;

/// The virtual table of a lookup: the configuration of its layer, bound to the length of one `hashed_weight`.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    pub slots: Slots,
    pub tables: Arc<Tables>,
    /// [`Tables::table_rows`] on the device of `hashed_weight`, if there are several features: i64, `(2 * features,)`. Only CUDA
    /// kernels read it.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub table_rows: Option<Tensor>,
    pub embedding_dim: usize,
    pub mode: Mode,
    pub padding_idx: Option<i64>,
    /// What the gradient of `hashed_weight` is added to, if it is to be no tensor.
    pub sparse_gradient: Option<SparseGradient>,
    /// What the values of `hashed_weight` mean, if they are packed bytes.
    pub low_bit: Option<LowBit>,
    /// What the hash reads of each row, if it does.
    pub row_tensor: Option<RowTensor>,
}

impl Table {
    /// The tensor that the hash reads, if it does.
    pub(super) fn row_tensor(&self) -> Option<&Tensor> {
        self.row_tensor.as_ref().map(RowTensor::tensor)
    }

    /// Whether `row` counts in its bag; padding does not.
    pub(super) fn counts(&self, row: i64) -> bool {
        Some(row) != self.padding_idx
    }
}

/// One lookup: its table, and how its indices are divided into bags.
#[derive(Debug, Clone)]
pub(super) struct Lookup {
    pub(super) table: Table,
    pub(super) bags: BagShape,
    pub(super) out_shape: Shape,
    pub(super) bounds_check: BoundsCheck,
    /// Only CUDA kernels read it.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(super) gradient: Gradient,
}

/// The shape of the output before its columns. The op itself gives it: candle's backward pass through a reshape writes and adds a
/// whole gradient.
#[derive(Debug, Clone, Copy)]
pub(crate) enum OutDims<'a> {
    /// `(num_bags,)`
    Bags,
    /// `(num_bags / features, features)`
    ByFeature,
    /// Any, of `num_bags` elements.
    Of(&'a [usize]),
}

/// Offsets, and what they mean.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Offsets<'a> {
    pub offsets: &'a Tensor,
    pub include_last_offset: bool,
    /// Makes no difference if there is only one feature.
    pub layout: JaggedLayout,
}

/// What to look up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub indices: &'a Tensor,
    pub offsets: Option<Offsets<'a>>,
    pub per_sample_weights: Option<&'a Tensor>,
    pub out_dims: OutDims<'a>,
}

/// Looks up and pools bags of rows.
///
/// * `hashed_weight`: `(len,)`, f16, bf16, f32 or f64, of the length `table` was bound to; or the packed bytes of so many
/// * `indices`: u32, i32 or i64, `(num_bags, bag_len)`, or `(nnz,)` with `offsets`
/// * `offsets`: u32, i32 or i64, `(num_bags,)`, or `(num_bags + 1,)` with `include_last_offset`
/// * `per_sample_weights`: the shape of `indices`, the dtype of the output, mode sum only
///
/// Returns `(num_bags, embedding_dim)`, or the bags divided as `out_dims` says, in the dtype of `hashed_weight`, differentiable in `hashed_weight` and
/// `per_sample_weights`; for packed bytes in the dtype that the table asks for, without a gradient.
pub(crate) fn hashed_embedding_bag(
    hashed_weight: &Tensor,
    inputs: Inputs,
    table: Table,
    bounds_check: BoundsCheck,
    gradient: Gradient,
) -> Result<Tensor> {
    let Inputs {
        indices,
        offsets,
        per_sample_weights,
        out_dims,
    } = inputs;
    let features = table.tables.num_features();
    check_dtype("indices", indices, &INDEX_DTYPES)?;
    check_device("indices", indices, hashed_weight)?;
    let bags = match (offsets, indices.dims()) {
        (None, &[num_bags, bag_len]) => BagShape::fixed(num_bags, bag_len, features)?,
        (None, dims) => {
            bail!("indices must have rank 2 when there are no offsets, got {dims:?}")
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
                &[len] => BagShape::ragged(nnz, len, include_last_offset, features, layout)?,
                dims => bail!("offsets must have rank 1, got {dims:?}"),
            }
        }
        (Some(_), dims) => {
            bail!("indices must have rank 1 when offsets are given, got {dims:?}")
        }
    };
    check_output(bags.num_bags, table.embedding_dim)?;
    // The ops themselves sum packed bytes in f32 and give f32.
    let (output_dtype, sum_dtype) = match &table.low_bit {
        None => (hashed_weight.dtype(), hashed_weight.dtype()),
        Some(low_bit) => (low_bit.output_dtype(), DType::F32),
    };
    if let Some(weights) = per_sample_weights {
        if table.mode != Mode::Sum {
            bail!("per_sample_weights need mode sum, got {:?}", table.mode);
        }
        check_weights_shape(weights, indices)?;
        check_dtype("per_sample_weights", weights, &[output_dtype])?;
        check_device("per_sample_weights", weights, hashed_weight)?;
    }

    let hashed_weight = hashed_weight.contiguous()?;
    let indices = contiguous_indices(indices)?;
    let offsets = offsets
        .map(|offsets| contiguous_indices(offsets.offsets))
        .transpose()?;
    let out_shape = match out_dims {
        OutDims::Bags => Shape::from((bags.num_bags, table.embedding_dim)),
        OutDims::ByFeature => {
            let samples = bags.num_bags / bags.features;
            Shape::from((samples, bags.features, table.embedding_dim))
        }
        OutDims::Of(dims) => Shape::from([dims, &[table.embedding_dim]].concat()),
    };
    let lookup = Lookup {
        table,
        bags,
        out_shape,
        bounds_check,
        gradient,
    };
    let output = match (offsets, per_sample_weights) {
        (None, None) => hashed_weight.apply_op2(&indices, FixedBags(lookup)),
        (Some(offsets), None) => {
            hashed_weight.apply_op3(&indices, &offsets, Ternary(RaggedBags(lookup)))
        }
        (offsets, Some(weights)) => hashed_weight.apply_op3(
            &indices,
            &cast(weights, sum_dtype)?.contiguous()?,
            Ternary(WeightedBags { lookup, offsets }),
        ),
    }?;
    cast(&output, output_dtype)
}

/// `Tensor::to_dtype`, also of a tensor without values: on CUDA, candle itself cannot cast one.
fn cast(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    if tensor.dtype() == dtype || tensor.elem_count() > 0 {
        return tensor.to_dtype(dtype);
    }
    let one = Tensor::zeros(1, dtype, tensor.device())?;
    one.narrow(0, 0, 0)?.reshape(tensor.shape())
}

/// Refuses an output that is too large to be addressed in f64, the largest dtype. The indices do not bound its size, since empty
/// bags need none.
pub(crate) fn check_output(num_bags: usize, embedding_dim: usize) -> Result<()> {
    match num_bags.checked_mul(embedding_dim) {
        Some(values) if values <= isize::MAX as usize / 8 => Ok(()),
        _ => bail!("an output of {num_bags} bags of {embedding_dim} columns is too large"),
    }
}

/// `Tensor::contiguous` for indices of any dtype: on CUDA, candle itself cannot copy i32.
pub(crate) fn contiguous_indices(indices: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if indices.device().is_cuda() && indices.dtype() == DType::I32 && !indices.is_contiguous() {
        return indices.apply_op1_no_bwd(&super::cuda::ContiguousI32);
    }
    indices.contiguous()
}

pub(crate) const WEIGHT_DTYPES: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];
pub(crate) const INDEX_DTYPES: [DType; 3] = [DType::U32, DType::I32, DType::I64];

/// `argument` must have one of the dtypes.
pub(crate) fn check_dtype(argument: &str, tensor: &Tensor, dtypes: &[DType]) -> Result<()> {
    if dtypes.contains(&tensor.dtype()) {
        return Ok(());
    }
    let names: Vec<_> = dtypes.iter().map(DType::as_str).collect();
    bail!(
        "{argument} must have dtype {}, got {}",
        names.join(" or "),
        tensor.dtype().as_str()
    )
}

/// `per_sample_weights` must have the shape of `indices`.
pub(crate) fn check_weights_shape(per_sample_weights: &Tensor, indices: &Tensor) -> Result<()> {
    if per_sample_weights.dims() == indices.dims() {
        return Ok(());
    }
    bail!(
        "per_sample_weights must have the shape of indices {:?}, got {:?}",
        indices.dims(),
        per_sample_weights.dims()
    )
}

/// `argument` must be on the device of `hashed_weight`.
fn check_device(argument: &str, tensor: &Tensor, hashed_weight: &Tensor) -> Result<()> {
    if tensor.device().same_device(hashed_weight.device()) {
        return Ok(());
    }
    bail!(
        "{argument} must be on the device of hashed_weight ({:?}), got {:?}",
        hashed_weight.device().location(),
        tensor.device().location()
    )
}
