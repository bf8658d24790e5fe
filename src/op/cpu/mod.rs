//! The CPU: slices in, slices out. This file takes the tensors apart and chooses the pass. Each file uses those below it:
//!
//! | | |
//! |---|---|
//! | `forward.rs` | the pooled rows, bags divided among threads |
//! | `low_bit.rs` | the same over a hashed_weight in 8 or 4 bits, exact |
//! | `backward.rs`, `winners.rs` | the gradient of hashed_weight: its terms |
//! | `terms.rs`, `sparse.rs` | how they are added, with the same result for any number of threads |
//! | `per_sample_weights.rs` | the gradient of per_sample_weights |
//! | `call.rs`, `window.rs` | the inputs as slices; their rows, hashed a window at a time |
//! | `combine.rs` | how values enter a pooled row |
//! | `lanes.rs` | instruction sets |
//! | `scalar.rs` | dtypes |

mod backward;
mod call;
mod combine;
mod forward;
mod lanes;
mod low_bit;
mod per_sample_weights;
mod scalar;
mod sparse;
mod terms;
mod window;
mod winners;

use super::{lend, Backend, Lookup, Operands, View};
#[cfg(feature = "cuda")]
use crate::bounds::BadRow;
use crate::bounds::{check_offsets, BoundsCheck};
use crate::error::{bail, NAME};
use crate::hash::{Locate, Located, RowValues};
use call::{with_slice, Call, Indices};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Result, Storage, WithDType};
use combine::Load;
use half::{bf16, f16};
pub(crate) use lanes::prefetch;
pub(crate) use scalar::ValuesMut;
pub(crate) use sparse::{SparseSums, REGION};

/// Fewer gathered values than this are not worth a second thread: some ten microseconds of work where blocks are of 16, and a
/// hundred where every value has a hash.
const MIN_VALUES_PER_THREAD: usize = 1 << 16;

/// Fewer gathered values than this are not divided at all: a tenth of a millisecond of work, which would take longer if it waited
/// for a sleeping thread, or for one whose processor is busy with something else.
const MIN_DIVIDED_VALUES: usize = 1 << 19;

pub(super) struct Cpu;

impl Backend for Cpu {
    type Storage = CpuStorage;

    fn storage(storage: &Storage) -> Result<&CpuStorage> {
        match storage {
            Storage::Cpu(storage) => Ok(storage),
            Storage::Cuda(_) | Storage::Metal(_) => {
                bail!("expected a tensor on the CPU, got one elsewhere")
            }
        }
    }

    fn forward(lookup: &Lookup, operands: &Operands<CpuStorage>) -> Result<CpuStorage> {
        // The indices are checked by the threads that look them up.
        if lookup.bounds_check == BoundsCheck::Error {
            check_division(lookup, operands.offsets)?;
        }
        match &lookup.table.low_bit {
            None => run(forward::Forward, lookup, operands),
            Some(low_bit) => lend::<Self, _>(low_bit.shifts(), |shifts| {
                low_bit::forward(lookup, low_bit, shifts, operands)
            }),
        }
    }

    fn grad_weight(
        lookup: &Lookup,
        grad_output: View<CpuStorage>,
        operands: &Operands<CpuStorage>,
    ) -> Result<CpuStorage> {
        run(backward::GradWeight { grad_output }, lookup, operands)
    }

    type SparseSums = SparseSums;

    fn add_grad_weight(
        lookup: &Lookup,
        grad_output: View<CpuStorage>,
        operands: &Operands<CpuStorage>,
        sums: &mut SparseSums,
    ) -> Result<()> {
        let pass = backward::AddGradWeight { grad_output, sums };
        run(pass, lookup, operands)
    }

    fn grad_per_sample_weights(
        lookup: &Lookup,
        grad_output: View<CpuStorage>,
        operands: &Operands<CpuStorage>,
    ) -> Result<CpuStorage> {
        let pass = per_sample_weights::GradPerSampleWeights { grad_output };
        run(pass, lookup, operands)
    }
}

fn slice<'a, T: WithDType>((storage, layout): View<'a, CpuStorage>) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&T::cpu_storage_as_slice(storage)?[start..end]),
        None => Err(candle_core::Error::RequiresContiguous { op: NAME }.bt()),
    }
}

/// An error for the first offset or row that breaks the contract; for CUDA, where a kernel only tells that there is one.
#[cfg(feature = "cuda")]
pub(super) fn check_bounds(
    lookup: &Lookup,
    indices: View<CpuStorage>,
    offsets: Option<View<CpuStorage>>,
) -> Result<()> {
    check_division(lookup, offsets)?;
    let Lookup { table, bags, .. } = lookup;
    let offsets = offsets.map(Indices::new).transpose()?;
    let ranges = |bag| call::range(bags, offsets, bag);
    let (tables, padding_idx) = (&table.tables, table.padding_idx);
    with_slice!(Indices::new(indices)?, rows => {
        match BadRow::find(rows, ranges, 0..bags.num_bags, bags, tables, padding_idx) {
            Some(bad) => Err(bad.error(rows, tables)),
            None => Ok(()),
        }
    })
}

/// An error for the first offset that breaks the contract.
fn check_division(lookup: &Lookup, offsets: Option<View<CpuStorage>>) -> Result<()> {
    match offsets {
        Some(offsets) => {
            with_slice!(Indices::new(offsets)?, offsets => check_offsets(offsets, lookup.bags.nnz))
        }
        None => Ok(()),
    }
}

/// A pass over the bags, compiled for each dtype of weight and each hash family.
trait Pass {
    type Output;
    fn run<T: Load, H: Locate>(self, call: &Call<T, H>) -> Result<Self::Output>;
}

/// Resolves the dtype and the hash family, once, and runs the pass.
fn run<P: Pass>(pass: P, lookup: &Lookup, operands: &Operands<CpuStorage>) -> Result<P::Output> {
    fn by_hash<T: Load, P: Pass>(
        pass: P,
        lookup: &Lookup,
        operands: &Operands<CpuStorage>,
    ) -> Result<P::Output> {
        with_rows(lookup, |hash| match hash {
            Located::Blocks(hash) => pass.run(&Call::<T, _>::new(lookup, hash, operands)?),
            Located::Starts(hash) => pass.run(&Call::<T, _>::new(lookup, hash, operands)?),
        })
    }
    match operands.hashed_weight.0.dtype() {
        DType::F16 => by_hash::<f16, P>(pass, lookup, operands),
        DType::BF16 => by_hash::<bf16, P>(pass, lookup, operands),
        DType::F32 => by_hash::<f32, P>(pass, lookup, operands),
        _ => by_hash::<f64, P>(pass, lookup, operands),
    }
}

/// Calls `f` with the hash of a lookup and what it reads of each row.
fn with_rows<R>(lookup: &Lookup, f: impl FnOnce(Located) -> Result<R>) -> Result<R> {
    let table = &lookup.table;
    lend::<Cpu, _>(table.row_tensor(), |rows| {
        let rows = match rows {
            None => RowValues::None,
            Some(rows) if rows.0.dtype() == DType::U32 => RowValues::SlotTable {
                blocks: slice(rows)?,
                row_len: table.embedding_dim.div_ceil(table.slots.block()),
            },
            Some(rows) => RowValues::Signatures(slice(rows)?),
        };
        f(table.slots.with_rows(rows)?)
    })
}
