//! Sizes past 32 bits: outputs, indices and parameters of more than 2^32 elements, forward and backward.
//!
//! Those of 2^32 need a GPU of 141 GB: `cargo test --release --features cuda --lib -- --ignored past_32_bits --test-threads 1`.
//! The same code runs small on the CPU, which shows that the tests themselves are right.
//!
//! candle's own kernels count in 32 bits, so they only ever see parts here. What is large is made by lookups: rows that repeat
//! with a period give output that repeats, and every period must equal the first. candle's autograd adds each gradient to
//! zeros by such a kernel, so the backward ops are called directly; they are not public, which is why this file is compiled
//! as a module of `src/op`.

use crate::bags::{BagShape, JaggedLayout};
use crate::bounds::BoundsCheck;
use crate::hash::Hash;
use crate::op::lookup::Lookup;
use crate::op::{
    hashed_embedding_bag, GradPerSampleWeights, GradWeight, Gradient, Inputs, Mode, Offsets,
    OutDims, Table, Ternary,
};
use crate::tables::Tables;
use candle_core::{DType, Device, Result, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// So many periods of 2^(bits - 6) elements are more than 2^bits.
const REPEATS: usize = 65;
const ROWS: usize = 10_000_000;
const DIM: usize = 64;

fn table(hash: Hash, len: usize, embedding_dim: usize) -> Result<Table> {
    Ok(Table {
        slots: hash.slots(len)?,
        tables: Arc::new(Tables::one(0, ROWS)?),
        table_rows: None,
        embedding_dim,
        mode: Mode::Sum,
        padding_idx: None,
        sparse_gradient: None,
        low_bit: None,
        row_tensor: None,
    })
}

/// `values` of a small set, so that sums are exact.
fn halves(len: usize, device: &Device) -> Result<Tensor> {
    let value = |i: usize| (i.wrapping_mul(2_654_435_761) >> 7) % 5;
    let values = (0..len).map(|i| value(i) as f32 / 2.0 - 1.0);
    Tensor::from_iter(values, device)
}

/// `len` rows, repeated.
fn rows(len: usize, repeats: usize, device: &Device) -> Result<Tensor> {
    let row = |i: usize| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) % ROWS;
    let period: Vec<u32> = (0..len).map(|i| row(i) as u32).collect();
    Tensor::from_vec(period.repeat(repeats), len * repeats, device)
}

/// One call, in mode sum.
#[derive(Clone, Copy)]
struct Call<'a> {
    weight: &'a Tensor,
    indices: &'a Tensor,
    offsets: Option<&'a Tensor>,
    samples: Option<&'a Tensor>,
    table: &'a Table,
}

impl<'a> Call<'a> {
    /// Single rows.
    fn rows(weight: &'a Tensor, indices: &'a Tensor, table: &'a Table) -> Self {
        let (offsets, samples) = (None, None);
        Self {
            weight,
            indices,
            offsets,
            samples,
            table,
        }
    }

    fn forward(self) -> Result<Tensor> {
        let offsets = self.offsets.map(|offsets| Offsets {
            offsets,
            include_last_offset: false,
            layout: JaggedLayout::BatchMajor,
        });
        hashed_embedding_bag(
            self.weight,
            Inputs {
                indices: self.indices,
                offsets,
                per_sample_weights: self.samples,
                out_dims: OutDims::Bags,
            },
            self.table.clone(),
            BoundsCheck::Error,
            Gradient::Fastest,
        )
    }

    /// The gradients of weight and samples without candle's autograd, which adds them to zeros by a kernel that counts in
    /// 32 bits.
    fn backward(self, grad_output: &Tensor, gradient: Gradient) -> Result<(Tensor, Tensor)> {
        let layout = JaggedLayout::BatchMajor;
        let bags = match (self.offsets, self.indices.dims()) {
            (None, &[num_bags, bag_len]) => BagShape::fixed(num_bags, bag_len, 1)?,
            (Some(offsets), &[nnz]) => {
                BagShape::ragged(nnz, offsets.elem_count(), false, 1, layout)?
            }
            (_, dims) => panic!("indices of shape {dims:?}"),
        };
        let lookup = Lookup {
            table: self.table.clone(),
            bags,
            out_shape: grad_output.shape().clone(),
            bounds_check: BoundsCheck::Off,
            gradient,
        };
        let of_weight = Ternary(GradWeight {
            lookup: lookup.clone(),
            offsets: self.offsets.cloned(),
            per_sample_weights: self.samples.cloned(),
        });
        let of_samples = Ternary(GradPerSampleWeights {
            lookup,
            offsets: self.offsets.cloned(),
        });
        Ok((
            grad_output.apply_op3_no_bwd(self.weight, self.indices, &of_weight)?,
            grad_output.apply_op3_no_bwd(self.weight, self.indices, &of_samples)?,
        ))
    }
}

/// The values from `start` on of a 1-D tensor. As a tensor of their own, because candle copies all memory of a tensor to the
/// host, whatever part of it is asked for.
fn part(tensor: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    tensor.narrow(0, start, len)?.affine(1.0, 0.0)
}

/// The sums of the magnitudes of parts of a 1-D tensor.
///
/// The device is waited for once: at every wait it would give the memory between back to the driver, and get it again.
fn magnitudes(parts: impl Iterator<Item = Result<Tensor>>) -> Result<Vec<f64>> {
    let sums: Vec<Tensor> = parts
        .map(|part| part?.abs()?.sum_all())
        .collect::<Result<_>>()?;
    Tensor::stack(&sums, 0)?.to_dtype(DType::F64)?.to_vec1()
}

/// Each period of `tensor` equals `period`.
fn assert_periodic(tensor: &Tensor, period: &Tensor) -> Result<()> {
    let (tensor, period) = (tensor.flatten_all()?, period.flatten_all()?);
    let (len, n) = (tensor.elem_count(), period.elem_count());
    let starts = (0..len).step_by(n);
    let differences = starts.map(|start| tensor.narrow(0, start, n)?.sub(&period));
    let sums = magnitudes(std::iter::once(Ok(period.clone())).chain(differences))?;
    assert!(sums[0] > 0.0);
    for (i, &difference) in sums[1..].iter().enumerate() {
        assert_eq!(difference, 0.0, "period {i} of {len} values");
    }
    Ok(())
}

/// More than 2^bits values of output.
fn outputs(bits: u32, device: &Device) -> Result<()> {
    let period = 1 << (bits - 12);
    for (hash, gradient) in [
        (Hash::default_for(DIM), Gradient::Fastest),
        (Hash::original(), Gradient::Deterministic),
    ] {
        let weight = halves(1 << 16, device)?;
        let table = table(hash, 1 << 16, DIM)?;
        let lookup = |repeats: usize| -> Result<(Tensor, Tensor)> {
            let indices = rows(period, repeats, device)?.unsqueeze(1)?;
            let call = Call::rows(&weight, &indices, &table);
            let out = call.forward()?;
            let (grad, _) = call.backward(&out, gradient)?;
            Ok((out, grad))
        };
        let (small, small_grad) = lookup(1)?;
        let (out, grad) = lookup(REPEATS)?;
        assert!(out.elem_count() > 1 << bits);
        assert_periodic(&out, &small)?;
        assert_periodic(&grad, &(small_grad * REPEATS as f64)?)?;
    }
    Ok(())
}

/// More than 2^bits indices, divided by a length or by offsets, each with a weight of its own.
fn indices(bits: u32, device: &Device) -> Result<()> {
    const BAG_LEN: usize = 16;
    let (period, len) = (1 << (bits - 12), 1 << 20);
    let weight = halves(len, device)?;
    let table = table(Hash::mix(4), len, 4)?;
    let lookup = |repeats: usize, ragged: bool, gradient: Gradient| -> Result<[Tensor; 3]> {
        let nnz = period * repeats;
        let indices = rows(period, repeats, device)?;
        let shape = (nnz / BAG_LEN, BAG_LEN);
        // The weights are rows of another lookup, one value after the other.
        let samples = {
            let table = self::table(Hash::mix(16), len, BAG_LEN)?;
            let indices = rows(period / BAG_LEN, repeats, device)?.unsqueeze(1)?;
            Call::rows(&weight, &indices, &table).forward()?
        };
        let (indices, samples, offsets) = if ragged {
            let offsets = (0..nnz as i64).step_by(BAG_LEN);
            let offsets = Tensor::from_iter(offsets, device)?;
            (indices, samples.flatten_all()?, Some(offsets))
        } else {
            (indices.reshape(shape)?, samples, None)
        };
        let call = Call {
            offsets: offsets.as_ref(),
            samples: Some(&samples),
            ..Call::rows(&weight, &indices, &table)
        };
        let out = call.forward()?;
        let (grad_weight, grad_samples) = call.backward(&out, gradient)?;
        Ok([out, grad_samples, grad_weight])
    };
    let repeats = REPEATS << 6;
    for (ragged, gradient) in [(false, Gradient::Fastest), (true, Gradient::Deterministic)] {
        let small = lookup(1, ragged, gradient)?;
        let large = lookup(repeats, ragged, gradient)?;
        assert!(large[1].elem_count() > 1 << bits);
        assert_periodic(&large[0], &small[0])?;
        assert_periodic(&large[1], &small[1])?;
        assert_periodic(&large[2], &(&small[2] * repeats as f64)?)?;
    }
    Ok(())
}

/// A `hashed_weight` of more than 2^bits values.
fn parameters(bits: u32, device: &Device) -> Result<()> {
    let period = 1 << (bits - 12);
    // Made of the rows of a lookup, one after the other.
    let (weight, first) = {
        let weight = halves(1 << 16, device)?;
        let table = table(Hash::default_for(DIM), 1 << 16, DIM)?;
        let indices = rows(period, REPEATS, device)?.unsqueeze(1)?;
        let out = Call::rows(&weight, &indices, &table).forward()?;
        let out = out.flatten_all()?;
        let first = part(&out, 0, period * DIM)?.to_vec1::<f32>()?;
        (out, first)
    };
    let len = weight.elem_count();
    assert!(len > 1 << bits);
    for (hash, gradient) in [
        (Hash::default_for(DIM), Gradient::Fastest),
        (Hash::default_for(DIM), Gradient::Deterministic),
        (Hash::mix(1), Gradient::Fastest),
        (Hash::original(), Gradient::Fastest),
    ] {
        if hash.check_len(len).is_err() {
            // One value per hash: a mix hash places fewer than 2^32.
            continue;
        }
        let table = table(hash, len, DIM)?;
        let indices = rows(4096, 1, device)?;
        let bags = indices.unsqueeze(1)?;
        let call = Call::rows(&weight, &bags, &table);
        let out = call.forward()?;
        let (grad, _) = call.backward(&out, gradient)?;
        let out = out.flatten_all()?.to_vec1::<f32>()?;
        let mut sums: HashMap<usize, f64> = HashMap::new();
        let mut past = 0;
        for (i, row) in indices.to_vec1::<u32>()?.into_iter().enumerate() {
            for column in 0..DIM {
                let (slot, sign) = hash.slot(row.into(), column, len)?;
                let value = out[i * DIM + column];
                assert_eq!(
                    value,
                    first[slot % first.len()] * f32::from(sign),
                    "slot {slot}"
                );
                *sums.entry(slot).or_default() += f64::from(value) * f64::from(sign);
                past += usize::from(slot >= 1 << bits);
            }
        }
        assert!(past > 0, "no slot past 2^{bits}");
        let last = sums.iter().max_by_key(|(slot, _)| **slot);
        let some: Vec<_> = sums.iter().take(4096).chain(last).collect();
        let grads = some.iter().map(|(&slot, _)| part(&grad, slot, 1));
        let grads = Tensor::cat(&grads.collect::<Result<Vec<_>>>()?, 0)?;
        for ((slot, sum), got) in some.into_iter().zip(grads.to_vec1::<f32>()?) {
            assert_eq!(f64::from(got), *sum, "gradient of slot {slot}");
        }
        // And nothing anywhere else.
        let parts = (0..len).step_by(first.len());
        let parts = parts.map(|start| grad.narrow(0, start, first.len()));
        let total: f64 = magnitudes(parts)?.into_iter().sum();
        let want: f64 = sums.values().map(|sum| sum.abs()).sum();
        assert!((total - want).abs() <= 1e-4 * want, "{total} {want}");
    }
    Ok(())
}

#[test]
#[cfg_attr(miri, ignore = "takes hours there")]
fn the_same_small() -> Result<()> {
    outputs(16, &Device::Cpu)?;
    indices(16, &Device::Cpu)?;
    parameters(18, &Device::Cpu)
}

#[test]
#[ignore = "needs 24 GB of GPU memory"]
fn outputs_past_32_bits() -> Result<()> {
    [31, 32]
        .into_iter()
        .try_for_each(|bits| outputs(bits, &Device::new_cuda(0)?))
}

#[test]
#[ignore = "needs 72 GB of GPU memory and 48 GB beside it"]
fn indices_past_32_bits() -> Result<()> {
    [31, 32]
        .into_iter()
        .try_for_each(|bits| indices(bits, &Device::new_cuda(0)?))
}

#[test]
#[ignore = "needs 96 GB of GPU memory"]
fn parameters_past_32_bits() -> Result<()> {
    [31, 32]
        .into_iter()
        .try_for_each(|bits| parameters(bits, &Device::new_cuda(0)?))
}
