//! Jagged bags per feature, joined into what one lookup in a collection takes.
//!
//! [`JaggedTensor`] and [`KeyedJaggedTensor`] are TorchRec's, in the words of this crate: `values` are `indices`, `weights` are
//! `per_sample_weights`, a key is the name of a feature. Everything is computed on the device of the indices.

use crate::bounds::BoundsCheck;
use crate::error::bail;
use crate::op::{check_dtype, INDEX_DTYPES, WEIGHT_DTYPES};
use candle_core::{DType, Device, Result, Tensor};
use std::collections::HashSet;

/// The bags of one feature: its indices, one bag after the other, and how they are divided into bags.
///
/// * `indices`: u32, i32 or i64, `(nnz,)`.
/// * lengths: u32, i32 or i64, `(num_bags,)`, which add up to `nnz`; or offsets: the start of each bag, from 0 on, `(num_bags,)`,
///   or `(num_bags + 1,)` with `include_last_offset`, of which the last is `nnz`.
/// * `per_sample_weights`, which are optional: `(nnz,)` in the dtype of the `hashed_weight` that is looked up.
///
/// Nothing is checked before the features are joined: [`KeyedJaggedTensor::new`].
#[derive(Debug, Clone)]
pub struct JaggedTensor {
    indices: Tensor,
    division: Division,
    per_sample_weights: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum Division {
    Lengths(Tensor),
    Offsets {
        offsets: Tensor,
        include_last_offset: bool,
    },
}

impl JaggedTensor {
    /// Bags of these lengths.
    pub fn from_lengths(indices: Tensor, lengths: Tensor) -> Self {
        Self {
            indices,
            division: Division::Lengths(lengths),
            per_sample_weights: None,
        }
    }

    /// Bags that start at these offsets; with `include_last_offset` the last offset is the end of the last bag.
    pub fn from_offsets(indices: Tensor, offsets: Tensor, include_last_offset: bool) -> Self {
        Self {
            indices,
            division: Division::Offsets {
                offsets,
                include_last_offset,
            },
            per_sample_weights: None,
        }
    }

    /// The same bags, each row multiplied by its own weight.
    pub fn with_per_sample_weights(self, per_sample_weights: Tensor) -> Self {
        Self {
            per_sample_weights: Some(per_sample_weights),
            ..self
        }
    }

    /// The length of each of `num_bags` bags: i64, `(num_bags,)`.
    fn lengths(&self, name: &str, num_bags: usize) -> Result<Tensor> {
        match &self.division {
            Division::Lengths(lengths) => lengths.to_dtype(DType::I64),
            Division::Offsets {
                offsets,
                include_last_offset,
            } => {
                let offsets = offsets.to_dtype(DType::I64)?;
                let starts = offsets.narrow(0, 0, num_bags)?;
                let ends = if *include_last_offset {
                    offsets.narrow(0, 1, num_bags)?
                } else {
                    let last = Tensor::new(&[self.nnz(name)? as i64], offsets.device())?;
                    join([&offsets.narrow(0, 1, num_bags - 1)?, &last])?
                };
                ends - starts
            }
        }
    }

    /// What divides the indices into bags, and the name of that argument.
    fn division(&self) -> (&'static str, &Tensor) {
        match &self.division {
            Division::Lengths(lengths) => ("lengths", lengths),
            Division::Offsets { offsets, .. } => ("offsets", offsets),
        }
    }

    /// The number of bags. `name` is the feature that an error names.
    fn num_bags(&self, name: &str) -> Result<usize> {
        let (argument, tensor) = self.division();
        let ends = match self.division {
            Division::Offsets {
                include_last_offset: true,
                ..
            } => 1,
            _ => 0,
        };
        match (tensor.dims(), ends) {
            ([0], 1) => bail!(
                "offsets of feature {name} must hold num_bags + 1 values when include_last_offset is set, got none"
            ),
            (&[len], _) => Ok(len - ends),
            (dims, _) => bail!("{argument} of feature {name} must have rank 1, got {dims:?}"),
        }
    }

    /// The number of indices. `name` is the feature that an error names.
    fn nnz(&self, name: &str) -> Result<usize> {
        match self.indices.dims() {
            &[nnz] => Ok(nnz),
            dims => bail!("indices of feature {name} must have rank 1, got {dims:?}"),
        }
    }

    /// Checks that these bags, of feature `name`, can be joined to those of the first feature, as far as that can be known without
    /// reading values.
    fn check_like(&self, name: &str, first: &Self, first_name: &str) -> Result<()> {
        self.nnz(name)?;
        for (argument, tensor) in [("indices", &self.indices), self.division()] {
            let argument = format!("{argument} of feature {name}");
            check_dtype(&argument, tensor, &INDEX_DTYPES)?;
            if tensor.device().is_cuda() && tensor.dtype() == DType::I32 {
                bail!(
                    "{argument} must have dtype u32 or i64 on CUDA, where candle cannot copy i32"
                );
            }
            first.check_device(&argument, tensor, first_name)?;
        }
        let (want, got) = (first.indices.dtype(), self.indices.dtype());
        if want != got {
            bail!(
                "indices of feature {name} must have the dtype of those of feature {first_name}, {}, got {}",
                want.as_str(),
                got.as_str()
            );
        }
        match (&self.per_sample_weights, &first.per_sample_weights) {
            (None, None) => {}
            (Some(weights), Some(of_first)) => {
                let argument = format!("per_sample_weights of feature {name}");
                check_dtype(&argument, weights, &WEIGHT_DTYPES)?;
                check_dtype(&argument, weights, &[of_first.dtype()])?;
                first.check_device(&argument, weights, first_name)?;
                if weights.dims() != self.indices.dims() {
                    let (want, got) = (self.indices.dims(), weights.dims());
                    bail!("{argument} must have the shape of its indices, {want:?}, got {got:?}");
                }
            }
            (Some(_), None) => {
                bail!("feature {name} has per_sample_weights, feature {first_name} has none")
            }
            (None, Some(_)) => {
                bail!("feature {first_name} has per_sample_weights, feature {name} has none")
            }
        }
        let (want, got) = (first.num_bags(first_name)?, self.num_bags(name)?);
        if want != got {
            bail!(
                "feature {name} must have as many bags as feature {first_name}, {want}, got {got}"
            );
        }
        Ok(())
    }

    /// Checks that a tensor of another feature is on the device of these indices, those of feature `name`.
    fn check_device(&self, argument: &str, tensor: &Tensor, name: &str) -> Result<()> {
        let device = self.indices.device();
        if tensor.device().same_device(device) {
            return Ok(());
        }
        bail!(
            "{argument} must be on the device of the indices of feature {name} ({:?}), got {:?}",
            device.location(),
            tensor.device().location()
        )
    }
}

/// The jagged bags of several features, joined in feature-major order for
/// [`HashedEmbeddingBagCollection::forward_keyed`](crate::HashedEmbeddingBagCollection::forward_keyed).
///
/// A thread that loads data can join a batch on the CPU and move it to a GPU as a whole, or join what is on the GPU already.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_hashed_embedding_bag::{hashed_embedding_bag_collection, BoundsCheck, JaggedTensor, KeyedJaggedTensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// # let device = Device::Cpu;
/// # let vars = VarMap::new();
/// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
/// let tables = [("user", 6000), ("movie", 4000)];
/// let collection = hashed_embedding_bag_collection(tables, 16, 0.1, Default::default(), vb)?
///     .with_features([("user", "user"), ("history", "movie")])?;
///
/// // Three samples: a user each, and histories of two movies, of none, and of one.
/// let user = JaggedTensor::from_lengths(
///     Tensor::new(&[17u32, 5999, 4], &device)?,
///     Tensor::new(&[1u32, 1, 1], &device)?,
/// );
/// let history = JaggedTensor::from_offsets(
///     Tensor::new(&[3999u32, 5, 12], &device)?,
///     Tensor::new(&[0u32, 2, 2], &device)?,
///     false,
/// );
/// let batch = KeyedJaggedTensor::new([("user", user), ("history", history)], BoundsCheck::Error)?;
/// assert_eq!(collection.forward_keyed(&batch)?.dims(), [3, 2, 16]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct KeyedJaggedTensor {
    keys: Vec<String>,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Option<Tensor>,
}

impl KeyedJaggedTensor {
    /// Joins the bags of features, given by name, in the order in which the collection has them.
    ///
    /// With [`BoundsCheck::Error`], lengths must add up to the number of indices, and offsets start at 0 and, with
    /// `include_last_offset`, end at the number of indices: otherwise indices would be looked up for another feature. On CUDA
    /// this check waits for the device; [`BoundsCheck::Off`] does not check. That the values in between do not decrease is checked
    /// by the lookup.
    ///
    /// # Errors
    /// By feature: numbers of bags that differ, wrong ranks, dtypes, devices or shapes, what the check finds, weights for some of
    /// the features only. No features, or two with the same name. On CUDA also i32, which candle cannot copy there.
    pub fn new<N: Into<String>>(
        features: impl IntoIterator<Item = (N, JaggedTensor)>,
        bounds_check: BoundsCheck,
    ) -> Result<Self> {
        let features = features.into_iter();
        let features: Vec<_> = features.map(|(name, bags)| (name.into(), bags)).collect();
        let Some((first_name, first)) = features.first() else {
            bail!("at least one feature is needed");
        };
        let mut names = HashSet::new();
        for (name, bags) in &features {
            bags.check_like(name, first, first_name)?;
            if !names.insert(name) {
                bail!("two features are named {name}");
            }
        }

        let offsets = joined_offsets(&features, bounds_check)?;
        let indices = join(features.iter().map(|(_, bags)| &bags.indices))?;
        let weights = features
            .iter()
            .map(|(_, bags)| bags.per_sample_weights.as_ref());
        let weights: Option<Vec<_>> = weights.collect();
        Ok(Self {
            per_sample_weights: weights.map(join).transpose()?,
            keys: features.into_iter().map(|(name, _)| name).collect(),
            indices,
            offsets,
        })
    }

    /// The names of the features, in order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.keys.iter().map(String::as_str)
    }

    /// The indices of all features, `(nnz,)`.
    pub fn indices(&self) -> &Tensor {
        &self.indices
    }

    /// The start of each bag among the [`indices`](Self::indices), and the end of the last: i64, `(features * batch + 1,)`, in
    /// [`JaggedLayout::FeatureMajor`](crate::JaggedLayout::FeatureMajor).
    pub fn offsets(&self) -> &Tensor {
        &self.offsets
    }

    /// The weight of each row, `(nnz,)`, if the features have weights.
    pub fn per_sample_weights(&self) -> Option<&Tensor> {
        self.per_sample_weights.as_ref()
    }

    /// The number of bags of each feature.
    pub fn batch_size(&self) -> usize {
        (self.offsets.elem_count() - 1) / self.keys.len()
    }

    /// The length of every bag: i64, `(batch, features)`. With it a sum can be made a
    /// [mean](crate::HashedEmbeddingBagCollection#mean-for-some-features-sum-for-others).
    pub fn lengths(&self) -> Result<Tensor> {
        let (batch, features) = (self.batch_size(), self.keys.len());
        let starts = self.offsets.narrow(0, 0, batch * features)?;
        let ends = self.offsets.narrow(0, 1, batch * features)?;
        (ends - starts)?.reshape((features, batch))?.t()
    }

    /// The same bags on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let weights = self.per_sample_weights.as_ref();
        Ok(Self {
            keys: self.keys.clone(),
            indices: to_device(&self.indices, device)?,
            offsets: to_device(&self.offsets, device)?,
            per_sample_weights: weights
                .map(|weights| to_device(weights, device))
                .transpose()?,
        })
    }
}

/// The start of each bag among the indices of all features, and the end of the last one: i64, `(features * num_bags + 1,)`.
fn joined_offsets(
    features: &[(String, JaggedTensor)],
    bounds_check: BoundsCheck,
) -> Result<Tensor> {
    let (name, first) = &features[0];
    let num_bags = first.num_bags(name)?;
    let zero = Tensor::zeros(1, DType::I64, first.indices.device())?;
    if num_bags == 0 {
        for (name, bags) in features {
            let nnz = bags.nnz(name)?;
            if nnz > 0 {
                bail!("feature {name} has {nnz} indices, but no bag");
            }
        }
        return Ok(zero);
    }
    let lengths = features
        .iter()
        .map(|(name, bags)| bags.lengths(name, num_bags));
    let lengths: Vec<_> = lengths.collect::<Result<_>>()?;
    let ends = running_sums(&join(&lengths)?)?;
    if bounds_check == BoundsCheck::Error {
        check_sums(features, &ends.reshape((features.len(), num_bags))?)?;
    }
    Tensor::cat(&[zero, ends], 0)
}

/// Checks that the bags of each feature take all of its indices and no others, given where they end, `(features, num_bags)`. The
/// values are copied from the device at once.
fn check_sums(features: &[(String, JaggedTensor)], ends: &Tensor) -> Result<()> {
    let mut values = vec![ends.narrow(1, ends.dim(1)? - 1, 1)?.flatten_all()?];
    for (_, bags) in features {
        if let Division::Offsets { offsets, .. } = &bags.division {
            values.push(offsets.narrow(0, 0, 1)?.to_dtype(DType::I64)?);
        }
    }
    let values = Tensor::cat(&values, 0)?.to_vec1::<i64>()?;
    let (ends, firsts) = values.split_at(features.len());
    let (mut start, mut firsts) = (0, firsts.iter());
    for ((name, bags), end) in features.iter().zip(ends) {
        let (nnz, sum) = (bags.nnz(name)? as i64, end.wrapping_sub(start));
        start = *end;
        let must = match bags.division {
            Division::Lengths(_) => "add up to",
            Division::Offsets { .. } => {
                if let Some(first) = firsts.next().filter(|first| **first != 0) {
                    bail!("offsets of feature {name} must start at 0, got {first}");
                }
                "end at"
            }
        };
        if sum != nnz {
            let (argument, _) = bags.division();
            bail!(
                "{argument} of feature {name} must {must} its number of indices ({nnz}), got {sum}"
            );
        }
    }
    Ok(())
}

/// The sums of the first, the first two, …, of all values: i64, `(n,)`.
fn running_sums(values: &Tensor) -> Result<Tensor> {
    if values.device().is_cpu() {
        let mut sum = 0i64;
        let add = |value| {
            sum = sum.wrapping_add(value);
            sum
        };
        let sums: Vec<_> = values.to_vec1::<i64>()?.into_iter().map(add).collect();
        return Tensor::new(sums, values.device());
    }
    // In f64, which candle can multiply; it holds integers up to 2^53 exactly.
    running_sums_by_products(&values.to_dtype(DType::F64)?)?.to_dtype(DType::I64)
}

/// [`running_sums`] of f64 by operations that candle has on CUDA too. Its `cumsum` multiplies by a square matrix as wide as there
/// are values, so many values are summed in pieces.
fn running_sums_by_products(values: &Tensor) -> Result<Tensor> {
    const PIECE: usize = 256;
    let n = values.dim(0)?;
    if n <= PIECE {
        return values.cumsum(0);
    }
    let pieces = n.div_ceil(PIECE);
    let padded = values.pad_with_zeros(0, 0, pieces * PIECE - n)?;
    let within = padded.reshape((pieces, PIECE))?.cumsum(1)?;
    let of_piece = within.narrow(1, PIECE - 1, 1)?.flatten_all()?;
    let before = (running_sums_by_products(&of_piece)? - of_piece)?;
    let sums = within.broadcast_add(&before.unsqueeze(1)?)?;
    sums.flatten_all()?.narrow(0, 0, n)
}

/// The values of all tensors, one after the other.
fn join<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Tensor> {
    let tensors: Vec<_> = tensors.into_iter().collect();
    // On CUDA candle cannot copy a tensor without values.
    let filled: Vec<_> = tensors
        .iter()
        .filter(|tensor| tensor.elem_count() > 0)
        .collect();
    if filled.is_empty() {
        return Ok(tensors[0].clone());
    }
    Tensor::cat(&filled, 0)
}

/// `Tensor::to_device`, also of a tensor without values, which candle cannot create on CUDA.
fn to_device(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    if tensor.elem_count() == 0 && device.is_cuda() {
        return Tensor::zeros(1, tensor.dtype(), device)?.narrow(0, 0, 0);
    }
    tensor.to_device(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sums that CUDA computes by products of matrices, on the CPU.
    #[test]
    fn running_sums_of_any_length() -> Result<()> {
        for n in [1, 2, 255, 256, 257, 1000, 65_536, 70_001] {
            // Some of them large, so that f32 would round.
            let values: Vec<i64> = (0..n).map(|i| (i * 7919 % 1_000_003) << (i % 16)).collect();
            let values = Tensor::new(values, &Device::Cpu)?;
            let got = running_sums_by_products(&values.to_dtype(DType::F64)?)?;
            let want = running_sums(&values)?.to_vec1::<i64>()?;
            assert_eq!(got.to_dtype(DType::I64)?.to_vec1::<i64>()?, want, "{n}");
        }
        Ok(())
    }
}
