//! Deterministic gradients: the memory of sums in fixed point, see kernels/fixed_point.cuh.

use super::launch::{self, Element, Launch};
use crate::error::bail;
use crate::op::Lookup;
use candle_core::cuda_backend::CudaDevice;
use candle_core::Result;
use cudarc::driver::{CudaSlice, CudaView};

/// The gradient sums of one call, and the values that determine their unit.
pub struct FixedPoint<'a, A> {
    /// The sums as multiples of the unit, `(size of A / 4, len)`.
    pub units: &'a CudaSlice<i64>,
    /// The length of `hashed_weight`.
    pub len: u64,
    /// The largest finite magnitudes of `grad_output` and of `per_sample_weights`.
    pub largest: CudaSlice<A>,
    /// At most `2^log2_terms` terms can meet in one slot.
    pub log2_terms: u32,
}

/// Zeros for the sums of `len` slots.
pub fn zero_units<A>(device: &CudaDevice, len: usize) -> Result<CudaSlice<i64>> {
    device.alloc_zeros::<i64>(size_of::<A>() / 4 * len)
}

impl<'a, A: Element> FixedPoint<'a, A> {
    /// The unit for this call, and sums that are zero so far.
    pub fn new<T: Element<Acc = A>>(
        launch: &Launch<T>,
        grad_output: &CudaView<T>,
        units: &'a CudaSlice<i64>,
    ) -> Result<Self> {
        let Lookup { table, bags, .. } = launch.lookup;
        let len = launch.hashed_weight.len();
        // Each column block of a row adds at most one term to a slot.
        let terms = bags.nnz as u128 * table.embedding_dim.div_ceil(table.slots.block()) as u128;
        let log2_terms = terms.next_power_of_two().trailing_zeros();
        if log2_terms > 60 {
            bail!("{terms} terms are too many for a deterministic gradient");
        }
        let weights = launch.per_sample_weights.as_ref();
        // Without per-sample weights every term has weight 1.
        let no_weights = if weights.is_none() { 1.0 } else { 0.0 };
        let largest = [A::from_f64(0.0), A::from_f64(no_weights)];
        let mut largest = launch.device.clone_htod(&largest)?;
        let values = [Some(grad_output), weights];
        for (i, values) in values.into_iter().flatten().enumerate() {
            let mut largest = largest.slice_mut(i..i + 1);
            launch::largest_magnitude(values, &mut largest, &launch.stream)?;
        }
        Ok(Self {
            units,
            len: len as u64,
            largest,
            log2_terms,
        })
    }
}
