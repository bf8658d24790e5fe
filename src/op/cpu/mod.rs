//! The CPU: slices in, slices out. This file takes the tensors apart and chooses the loop; the loops are in
//!
//! | | |
//! |---|---|
//! | `forward.rs` | the pooled rows, bags divided among threads |
//! | `backward.rs` | the gradients; how the work is divided so that no result depends on the number of threads |
//! | `places.rs` | rows hashed a window at a time, padding left out |
//! | `lanes.rs` | instruction sets |
//! | `element.rs` | dtypes |

mod backward;
mod element;
mod forward;
mod lanes;
mod places;

use super::{Backend, Lookup, Mode, Operands, View};
use crate::bags::{BagShape, Index};
use crate::bounds::{check_offsets, BadRow, BoundsCheck};
use crate::error::{bail, NAME};
use crate::hash::{AffineRows, Locate, Slots};
use crate::parallel::Team;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Result, Storage, WithDType};
use element::{Accumulator, Element};
use half::{bf16, f16};
use lanes::Lanes;
use places::Rows;
use std::ops::Range;

/// Fewer gathered values than this are not worth a second thread: some ten microseconds of work where blocks are of 16, and a
/// hundred where every value has a hash.
const MIN_VALUES_PER_THREAD: usize = 1 << 16;

/// So that a thread which comes late, or has heavier bags, leaves its share to others.
const TASKS_PER_THREAD: usize = 8;

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
        dispatch(forward::Forward, lookup, operands)
    }

    fn grad_weight(
        lookup: &Lookup,
        grad_output: View<CpuStorage>,
        operands: &Operands<CpuStorage>,
    ) -> Result<CpuStorage> {
        dispatch(backward::GradWeight { grad_output }, lookup, operands)
    }

    fn grad_per_sample_weights(
        lookup: &Lookup,
        grad_output: View<CpuStorage>,
        operands: &Operands<CpuStorage>,
    ) -> Result<CpuStorage> {
        let pass = backward::GradPerSampleWeights { grad_output };
        dispatch(pass, lookup, operands)
    }
}

/// Evaluates `$body` with `$slice` the slice of some [`Indices`], whatever their dtype.
macro_rules! with_slice {
    ($indices:expr, $slice:ident => $body:expr) => {
        match $indices {
            Indices::U32($slice) => $body,
            Indices::I32($slice) => $body,
            Indices::I64($slice) => $body,
        }
    };
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
    let ranges = |bag| range(bags, offsets, bag);
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

/// The indices of a bag, clamped whatever the offsets say.
fn range(bags: &BagShape, offsets: Option<Indices>, bag: usize) -> Range<usize> {
    match offsets {
        None => bags.range::<i64>(bag, &[]),
        Some(offsets) => with_slice!(offsets, offsets => bags.range(bag, offsets)),
    }
}

/// A loop over the bags, compiled for each dtype of weight and each hash family.
trait Pass {
    fn run<T: Element, H: Locate>(self, bags: &Bags<T, H>) -> Result<CpuStorage>;
}

/// Resolves the dtype and the hash family, once, and runs the loop.
fn dispatch(
    pass: impl Pass,
    lookup: &Lookup,
    operands: &Operands<CpuStorage>,
) -> Result<CpuStorage> {
    fn by_hash<T: Element>(
        pass: impl Pass,
        lookup: &Lookup,
        operands: &Operands<CpuStorage>,
    ) -> Result<CpuStorage> {
        match lookup.table.slots {
            Slots::Mix(hash) | Slots::Balanced(hash) => {
                pass.run(&Bags::<T, _>::new(lookup, hash, operands)?)
            }
            Slots::Affine(hash) => pass.run(&Bags::<T, _>::new(
                lookup,
                AffineRows::from(hash),
                operands,
            )?),
        }
    }
    match operands.hashed_weight.0.dtype() {
        DType::F16 => by_hash::<f16>(pass, lookup, operands),
        DType::BF16 => by_hash::<bf16>(pass, lookup, operands),
        DType::F32 => by_hash::<f32>(pass, lookup, operands),
        _ => by_hash::<f64>(pass, lookup, operands),
    }
}

/// Indices or offsets.
#[derive(Clone, Copy)]
enum Indices<'a> {
    U32(&'a [u32]),
    I32(&'a [i32]),
    I64(&'a [i64]),
}

impl<'a> Indices<'a> {
    fn new(indices: View<'a, CpuStorage>) -> Result<Self> {
        Ok(match indices.0.dtype() {
            DType::U32 => Self::U32(slice(indices)?),
            DType::I32 => Self::I32(slice(indices)?),
            _ => Self::I64(slice(indices)?),
        })
    }

    fn len(&self) -> usize {
        with_slice!(self, indices => indices.len())
    }

    #[inline(always)]
    fn row(&self, position: usize) -> i64 {
        with_slice!(self, indices => indices[position].as_i64())
    }
}

/// One call as slices.
struct Bags<'a, T, H: Locate> {
    lookup: &'a Lookup,
    hash: H,
    /// The constants of each block of columns.
    runs: Vec<H::Run>,
    hashed_weight: &'a [T],
    indices: Indices<'a>,
    /// Rows of the virtual table, where its tables do not all start at its row 0.
    shifted: Option<Vec<i64>>,
    /// The indices of each bag, clamped; `None` for bags of one length.
    ranges: Option<Vec<Range<usize>>>,
    per_sample_weights: Option<&'a [T]>,
}

impl<'a, T: Element, H: Locate> Bags<'a, T, H> {
    fn new(lookup: &'a Lookup, hash: H, operands: &Operands<'a, CpuStorage>) -> Result<Self> {
        let Lookup { table, bags, .. } = lookup;
        let indices = Indices::new(operands.indices)?;
        let offsets = operands.offsets.map(Indices::new).transpose()?;
        let ranges = offsets.is_some().then(|| {
            (0..bags.num_bags)
                .map(|bag| range(bags, offsets, bag))
                .collect::<Vec<_>>()
        });
        // Eight bytes per index beside a row of values for each: little.
        let shifted = (table.tables.end_row() != table.tables.num_embeddings(0)).then(|| {
            let mut shifted = vec![0; indices.len()];
            for bag in 0..bags.num_bags {
                let first_row = table.tables.first_row(bag % bags.tables);
                for position in range(bags, offsets, bag) {
                    shifted[position] = indices.row(position).wrapping_add(first_row);
                }
            }
            shifted
        });
        let runs = lookup.table.embedding_dim.div_ceil(hash.block());
        let hashed_weight: &[T] = slice(operands.hashed_weight)?;
        let end = hash.slot(hash.last_place(), hash.block()) + hash.block();
        if end > hashed_weight.len() {
            let len = hashed_weight.len();
            bail!("hashed_weight must hold {end} values, got {len}");
        }
        Ok(Self {
            lookup,
            hash,
            runs: (0..runs as u64).map(|run| hash.run(run)).collect(),
            hashed_weight,
            indices,
            shifted,
            ranges,
            per_sample_weights: operands.per_sample_weights.map(slice).transpose()?,
        })
    }

    fn num_bags(&self) -> usize {
        self.lookup.bags.num_bags
    }

    fn embedding_dim(&self) -> usize {
        self.lookup.table.embedding_dim
    }

    /// How many values all bags gather.
    fn gathered_values(&self) -> usize {
        self.indices.len().saturating_mul(self.embedding_dim())
    }

    /// The threads to gather all values with.
    fn team(&self) -> Team {
        Team::new(self.gathered_values() / MIN_VALUES_PER_THREAD)
    }

    /// How many bags make a task: a few tasks for each thread, of at least [`MIN_VALUES_PER_THREAD`].
    fn bags_per_task(&self, team: &Team) -> usize {
        let tasks = match team.threads() {
            1 => 1,
            threads => {
                let most = self.gathered_values() / MIN_VALUES_PER_THREAD;
                most.min(TASKS_PER_THREAD * threads)
            }
        };
        self.num_bags().div_ceil(tasks).max(1)
    }

    #[inline(always)]
    fn range(&self, bag: usize) -> Range<usize> {
        match &self.ranges {
            Some(ranges) => ranges[bag].clone(),
            None => self.lookup.bags.range::<i64>(bag, &[]),
        }
    }

    /// The first row of some bags that is out of range, where that is looked for.
    fn first_bad_row(&self, of: Range<usize>) -> Option<BadRow> {
        let Lookup { table, bags, .. } = self.lookup;
        if self.lookup.bounds_check == BoundsCheck::Off {
            return None;
        }
        let ranges = |bag| self.range(bag);
        with_slice!(self.indices, indices => {
            BadRow::find(indices, ranges, of, bags, &table.tables, table.padding_idx)
        })
    }

    fn error(&self, bad: &BadRow) -> candle_core::Error {
        with_slice!(self.indices, indices => bad.error(indices, &self.lookup.table.tables))
    }

    /// The rows of the virtual table at some positions, as they are hashed.
    #[inline(always)]
    fn rows(&self, positions: Range<usize>, rows: &mut [u64]) {
        #[inline(always)]
        fn widen(indices: &[impl Index], rows: &mut [u64]) {
            for (row, index) in rows.iter_mut().zip(indices) {
                *row = index.as_i64() as u64;
            }
        }
        match &self.shifted {
            Some(shifted) => widen(&shifted[positions], rows),
            None => with_slice!(self.indices, indices => widen(&indices[positions], rows)),
        }
    }

    /// Whether the index at `position` is no padding.
    #[inline(always)]
    fn counts(&self, position: usize) -> bool {
        let table = &self.lookup.table;
        table.padding_idx.is_none() || table.counts(self.indices.row(position))
    }

    /// What multiplies row `i` of `rows`, where rows are weighted.
    #[inline(always)]
    fn scale(&self, rows: &Rows<T, H>, i: usize) -> Option<T::Acc> {
        let weights = self.per_sample_weights?;
        Some(weights[rows.positions[i]].widen())
    }

    /// In mode mean, what multiplies each row of a bag.
    #[inline(always)]
    fn mean_scale(&self, bag: usize) -> Option<T::Acc> {
        if self.lookup.table.mode != Mode::Mean {
            return None;
        }
        let count = self.range(bag).filter(|&at| self.counts(at)).count();
        Some(T::Acc::ONE / T::Acc::from_count(count.max(1)))
    }
}

/// Evaluates `$body` with `$block` the block of `$hash` as a constant, where it is one that is worth a loop of its own;
/// the constant is 0 for any other block.
macro_rules! with_block {
    ($hash:expr, $block:ident => $body:expr) => {{
        macro_rules! case {
            ($value:literal) => {{
                const $block: usize = $value;
                $body
            }};
        }
        match $hash.block() {
            1 => case!(1),
            4 => case!(4),
            8 => case!(8),
            16 => case!(16),
            32 => case!(32),
            _ => case!(0),
        }
    }};
}
use with_block;

/// The block of `hash`, which `BLOCK` is unless it is 0.
#[inline(always)]
fn block_of<const BLOCK: usize, H: Locate>(hash: &H) -> usize {
    if BLOCK > 0 {
        BLOCK
    } else {
        hash.block()
    }
}

/// How a value enters the row it is pooled into. A trait and not a closure, whose inlining could not be asked for.
trait Combine {
    /// What the first value is combined with.
    fn first<A: Accumulator>() -> A;
    /// Combines `into[i]` with `(-1)^(bit i of signs) * values[i]`.
    fn group<A: Accumulator, L: Lanes>(lanes: L, into: &mut [A; 16], values: &[A; 16], signs: u32);
    /// The same for half a group.
    fn half<A: Accumulator, L: Lanes>(lanes: L, into: &mut [A; 8], values: &[A; 8], signs: u32);
    fn one<A: Accumulator>(into: &mut A, value: A);
}

struct Sum;

impl Combine for Sum {
    #[inline(always)]
    fn first<A: Accumulator>() -> A {
        A::ZERO
    }

    #[inline(always)]
    fn group<A: Accumulator, L: Lanes>(lanes: L, into: &mut [A; 16], values: &[A; 16], signs: u32) {
        A::add_group(lanes, into, values, signs);
    }

    #[inline(always)]
    fn half<A: Accumulator, L: Lanes>(lanes: L, into: &mut [A; 8], values: &[A; 8], signs: u32) {
        A::add_half(lanes, into, values, signs);
    }

    #[inline(always)]
    fn one<A: Accumulator>(into: &mut A, value: A) {
        *into += value;
    }
}

struct Max;

impl Combine for Max {
    #[inline(always)]
    fn first<A: Accumulator>() -> A {
        A::NEG_INFINITY
    }

    #[inline(always)]
    fn group<A: Accumulator, L: Lanes>(lanes: L, into: &mut [A; 16], values: &[A; 16], signs: u32) {
        A::max_group(lanes, into, values, signs);
    }

    #[inline(always)]
    fn half<A: Accumulator, L: Lanes>(lanes: L, into: &mut [A; 8], values: &[A; 8], signs: u32) {
        A::max_half(lanes, into, values, signs);
    }

    #[inline(always)]
    fn one<A: Accumulator>(into: &mut A, value: A) {
        into.raise(value);
    }
}

/// Combines `into[i]` with `scale * (-1)^(bit i of signs) * from[i]`, for a block.
#[inline(always)]
fn combine<C: Combine, T: Element, L: Lanes>(
    lanes: L,
    into: &mut [T::Acc],
    from: &[T],
    signs: u32,
    scale: Option<T::Acc>,
) {
    #[inline(always)]
    fn scaled<A: Accumulator, const N: usize>(mut values: [A; N], scale: Option<A>) -> [A; N] {
        if let Some(scale) = scale {
            for value in &mut values {
                *value = scale * *value;
            }
        }
        values
    }
    let (into_groups, into) = into.as_chunks_mut::<16>();
    let (from_groups, from) = from.as_chunks::<16>();
    let mut signs = signs;
    for (into, from) in into_groups.iter_mut().zip(from_groups) {
        C::group(
            lanes,
            into,
            &scaled(T::widen_group(lanes, from), scale),
            signs,
        );
        signs >>= 16;
    }
    let (into_halves, into) = into.as_chunks_mut::<8>();
    let (from_halves, from) = from.as_chunks::<8>();
    for (into, from) in into_halves.iter_mut().zip(from_halves) {
        C::half(lanes, into, &scaled(from.map(T::widen), scale), signs);
        signs >>= 8;
    }
    for (i, (into, &from)) in into.iter_mut().zip(from).enumerate() {
        let [value] = scaled([from.widen().flip(signs, i)], scale);
        C::one(into, value);
    }
}
