//! The gradient of `per_sample_weights`: of the weight at position `i` in bag `b`, `<row i, grad_output[b]>`.

use super::call::Call;
use super::combine::Load;
use super::scalar::Accumulator;
use super::{slice, Pass};
use crate::hash::{Locate, MAX_ROWS};
use crate::op::View;
use candle_core::{CpuStorage, Result, WithDType};
use std::ops::Range;

/// `(nnz,)`, in the dtype of hashed_weight
pub(super) struct GradPerSampleWeights<'a> {
    pub grad_output: View<'a, CpuStorage>,
}

impl Pass for GradPerSampleWeights<'_> {
    type Output = CpuStorage;

    fn run<T: Load, H: Locate>(self, call: &Call<T, H>) -> Result<CpuStorage> {
        let grad_output = slice::<T>(self.grad_output)?;
        let team = call.team();
        let task = call.bags_per_task(&team);
        let tasks = call.num_bags().div_ceil(task);
        // Each task has the gradients of its own bags, in order.
        let gradients = team.map(0..tasks, |i| {
            let bags = i * task..((i + 1) * task).min(call.num_bags());
            dots(call, grad_output, bags)
        });
        let mut grad_weights = vec![T::from_f64(0.0); call.rows.nnz()];
        for (position, gradient) in gradients.into_iter().flatten() {
            grad_weights[position] = gradient;
        }
        Ok(T::to_cpu_storage_owned(grad_weights))
    }
}

/// The dot products of the rows of some bags with their grad_output, by position.
fn dots<T: Load, H: Locate>(
    call: &Call<T, H>,
    grad_output: &[T],
    bags: Range<usize>,
) -> Vec<(usize, T)> {
    let (block, embedding_dim) = (call.hash.block(), call.embedding_dim());
    let mut window = call.window_noting(bags, true);
    let mut sums = [T::Acc::ZERO; MAX_ROWS];
    let mut dots = vec![];
    while let Some((bag, rows)) = window.take_next() {
        let grads = &grad_output[bag * embedding_dim..(bag + 1) * embedding_dim];
        let sums = &mut sums[..rows.len()];
        sums.fill(T::Acc::ZERO);
        for (column_block, grads) in grads.chunks(block).enumerate() {
            let blocks = rows.blocks(column_block);
            for (row, sum) in sums.iter_mut().enumerate() {
                let (slot, signs) = call.locate(&blocks, row, block);
                let values = &call.hashed_weight[slot..slot + grads.len()];
                for (i, (grad, value)) in grads.iter().zip(values).enumerate() {
                    *sum += grad.widen() * value.widen().flip(signs, i);
                }
            }
        }
        let sums = sums.iter().map(|sum| T::from_f64(sum.to_f64()));
        dots.extend((0..rows.len()).map(|i| rows.position(i)).zip(sums));
    }
    dots
}
