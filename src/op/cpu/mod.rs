//! The loops on the CPU: slices in, slices out.
//!
//! * forward: bags are divided among threads; each owns its output rows.
//! * grad_weight: bags are divided into parts whose number depends on the sizes alone, each adds into a buffer of its
//!   own, and the buffers are added in order: the result does not depend on the number of threads. Parts are few enough
//!   that the buffers together hold no more values than are gathered.
//! * f16 and bf16 accumulate in f32.

use super::{Backend, Lookup, Mode, Operands, View};
use crate::bags::{bad_offset, bad_row, first_bad_offset, first_bad_row, Index};
use crate::hash::{Locate, Slots};
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, DType, Result, Storage, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::{AddAssign, Mul, Neg, Range};

/// Fewer gathered values than this are not worth waking a second thread for.
const MIN_VALUES_PER_THREAD: usize = 1 << 15;

/// The most parts of [`grad_weight`].
const MAX_PARTS: usize = 8;

/// A dtype of `hashed_weight`, and the dtype its sums are kept in.
trait Element: WithDType {
    type Acc: Accumulator;
    fn widen(self) -> Self::Acc;
    fn narrow(acc: Self::Acc) -> Self;
}

trait Accumulator:
    WithDType + AddAssign + Mul<Output = Self> + Neg<Output = Self> + Send + Sync
{
    const ZERO: Self;
    const ONE: Self;
    fn from_count(count: usize) -> Self;
    fn is_nan(self) -> bool;
}

macro_rules! accumulator {
    ($t:ty) => {
        impl Accumulator for $t {
            const ZERO: $t = 0.0;
            const ONE: $t = 1.0;
            fn from_count(count: usize) -> Self {
                count as $t
            }
            fn is_nan(self) -> bool {
                <$t>::is_nan(self)
            }
        }
        impl Element for $t {
            type Acc = $t;
            fn widen(self) -> $t {
                self
            }
            fn narrow(acc: $t) -> $t {
                acc
            }
        }
    };
}
accumulator!(f32);
accumulator!(f64);

macro_rules! half_element {
    ($t:ty) => {
        impl Element for $t {
            type Acc = f32;
            fn widen(self) -> f32 {
                self.to_f32()
            }
            fn narrow(acc: f32) -> $t {
                <$t>::from_f32(acc)
            }
        }
    };
}
half_element!(f16);
half_element!(bf16);

pub(super) struct Cpu;

impl Backend for Cpu {
    type Storage = CpuStorage;

    fn storage(storage: &Storage) -> Result<&CpuStorage> {
        match storage {
            Storage::Cpu(storage) => Ok(storage),
            Storage::Cuda(_) | Storage::Metal(_) => {
                bail!("hashed-embedding-bag: expected a tensor on the CPU, got one elsewhere")
            }
        }
    }

    fn check_bounds(
        lookup: &Lookup,
        indices: View<CpuStorage>,
        offsets: Option<View<CpuStorage>>,
    ) -> Result<()> {
        if let Some(offsets) = offsets {
            let nnz = lookup.bags.nnz;
            match offsets.0.dtype() {
                DType::U32 => check_offsets::<u32>(nnz, offsets),
                DType::I32 => check_offsets::<i32>(nnz, offsets),
                _ => check_offsets::<i64>(nnz, offsets),
            }?;
        }
        match indices.0.dtype() {
            DType::U32 => check_rows::<u32>(lookup, indices),
            DType::I32 => check_rows::<i32>(lookup, indices),
            _ => check_rows::<i64>(lookup, indices),
        }
    }

    fn forward(lookup: &Lookup, operands: &Operands<CpuStorage>) -> Result<CpuStorage> {
        dispatch(Forward, lookup, operands)
    }

    fn grad_weight(
        lookup: &Lookup,
        grad_output: View<CpuStorage>,
        operands: &Operands<CpuStorage>,
    ) -> Result<CpuStorage> {
        dispatch(GradWeight { grad_output }, lookup, operands)
    }

    fn grad_per_sample_weights(
        lookup: &Lookup,
        grad_output: View<CpuStorage>,
        operands: &Operands<CpuStorage>,
    ) -> Result<CpuStorage> {
        dispatch(GradPerSampleWeights { grad_output }, lookup, operands)
    }
}

fn slice<'a, T: WithDType>((storage, layout): View<'a, CpuStorage>) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&T::cpu_storage_as_slice(storage)?[start..end]),
        None => Err(candle_core::Error::RequiresContiguous {
            op: "hashed-embedding-bag",
        }
        .bt()),
    }
}

fn check_rows<I: Index + WithDType>(lookup: &Lookup, indices: View<CpuStorage>) -> Result<()> {
    let (indices, table) = (slice::<I>(indices)?, &lookup.table);
    match first_bad_row(indices, table.num_embeddings, table.padding_idx) {
        Some(at) => bad_row(at, indices[at].as_i64(), table.num_embeddings),
        None => Ok(()),
    }
}

fn check_offsets<O: Index + WithDType>(nnz: usize, offsets: View<CpuStorage>) -> Result<()> {
    let offsets = slice::<O>(offsets)?;
    match first_bad_offset(offsets, nnz) {
        Some(at) => {
            let previous = at.checked_sub(1).map(|before| offsets[before].as_i64());
            bad_offset(at, offsets[at].as_i64(), previous, nnz)
        }
        None => Ok(()),
    }
}

/// A loop over the bags, compiled for each dtype of weight and indices and each hash family.
trait Loop {
    fn run<T: Element, I: Index, H: Locate>(self, bags: &Bags<T, I, H>) -> Result<CpuStorage>;
}

/// Resolves the dtypes and the hash family, once, and runs the loop.
fn dispatch(
    run: impl Loop,
    lookup: &Lookup,
    operands: &Operands<CpuStorage>,
) -> Result<CpuStorage> {
    fn by_hash<T: Element, I: Index + WithDType>(
        run: impl Loop,
        lookup: &Lookup,
        operands: &Operands<CpuStorage>,
    ) -> Result<CpuStorage> {
        match lookup.table.slots {
            Slots::Mix(hash) => run.run(&Bags::<T, I, _>::new(lookup, hash, operands)?),
            Slots::Affine(hash) => run.run(&Bags::<T, I, _>::new(lookup, hash, operands)?),
        }
    }
    fn by_index<T: Element>(
        run: impl Loop,
        lookup: &Lookup,
        operands: &Operands<CpuStorage>,
    ) -> Result<CpuStorage> {
        match operands.indices.0.dtype() {
            DType::U32 => by_hash::<T, u32>(run, lookup, operands),
            DType::I32 => by_hash::<T, i32>(run, lookup, operands),
            _ => by_hash::<T, i64>(run, lookup, operands),
        }
    }
    match operands.hashed_weight.0.dtype() {
        DType::F16 => by_index::<f16>(run, lookup, operands),
        DType::BF16 => by_index::<bf16>(run, lookup, operands),
        DType::F32 => by_index::<f32>(run, lookup, operands),
        _ => by_index::<f64>(run, lookup, operands),
    }
}

/// One call as slices.
struct Bags<'a, T, I, H> {
    lookup: &'a Lookup,
    hash: H,
    hashed_weight: &'a [T],
    indices: &'a [I],
    /// The start of each bag and the end of the last, clamped; `None` for bags of one length.
    ranges: Option<Vec<Range<usize>>>,
    per_sample_weights: Option<&'a [T]>,
}

impl<'a, T: Element, I: Index + WithDType, H: Locate> Bags<'a, T, I, H> {
    fn new(lookup: &'a Lookup, hash: H, operands: &Operands<'a, CpuStorage>) -> Result<Self> {
        fn ranges<O: Index + WithDType>(
            lookup: &Lookup,
            offsets: View<CpuStorage>,
        ) -> Result<Vec<Range<usize>>> {
            let (bags, offsets) = (&lookup.bags, slice::<O>(offsets)?);
            Ok((0..bags.num_bags)
                .map(|bag| bags.range(bag, offsets))
                .collect())
        }
        let ranges = match operands.offsets {
            None => None,
            Some(offsets) => Some(match offsets.0.dtype() {
                DType::U32 => ranges::<u32>(lookup, offsets)?,
                DType::I32 => ranges::<i32>(lookup, offsets)?,
                _ => ranges::<i64>(lookup, offsets)?,
            }),
        };
        Ok(Self {
            lookup,
            hash,
            hashed_weight: slice(operands.hashed_weight)?,
            indices: slice(operands.indices)?,
            ranges,
            per_sample_weights: operands.per_sample_weights.map(slice).transpose()?,
        })
    }
}

impl<T: Element, I: Index, H: Locate> Bags<'_, T, I, H> {
    fn embedding_dim(&self) -> usize {
        self.lookup.table.embedding_dim
    }

    /// How many values all bags gather.
    fn gathered_values(&self) -> usize {
        self.indices.len().saturating_mul(self.embedding_dim())
    }

    fn range(&self, bag: usize) -> Range<usize> {
        match &self.ranges {
            Some(ranges) => ranges[bag].clone(),
            None => self.lookup.bags.range::<I>(bag, &[]),
        }
    }

    /// Positions and rows of a bag, without padding.
    fn rows(&self, bag: usize) -> impl Iterator<Item = (usize, i64)> + '_ {
        self.range(bag)
            .map(|position| (position, self.indices[position].as_i64()))
            .filter(|&(_, row)| self.lookup.table.counts(row))
    }

    /// What multiplies the row at `position` before it is added.
    fn weight(&self, position: usize) -> T::Acc {
        self.per_sample_weights
            .map_or(T::Acc::ONE, |weights| weights[position].widen())
    }

    /// What divides the sum of a bag: the number of its rows in mode mean, else nothing.
    fn divisor(&self, bag: usize) -> Option<T::Acc> {
        (self.lookup.table.mode == Mode::Mean)
            .then(|| T::Acc::from_count(self.rows(bag).count().max(1)))
    }

    /// Calls `f(columns, slots, signs)` for each block of a row: as many slots as columns, bit `i` of `signs` set where
    /// column `i` of the block is negative.
    #[inline]
    fn for_each_run(&self, row: i64, mut f: impl FnMut(Range<usize>, Range<usize>, u32)) {
        let (block, embedding_dim) = (self.hash.block(), self.embedding_dim());
        for (run, column) in (0..embedding_dim).step_by(block).enumerate() {
            let len = block.min(embedding_dim - column);
            let (slot, signs) = self.hash.locate(row as u64, run as u64);
            f(column..column + len, slot..slot + len, signs);
        }
    }

    /// The largest value of each column of a bag, in `best`; `won(column, slot, negative)` is told of each new best.
    /// Returns whether the bag holds a row at all.
    fn max(
        &self,
        bag: usize,
        best: &mut [T::Acc],
        mut won: impl FnMut(usize, usize, bool),
    ) -> bool {
        let mut first = true;
        for (_, row) in self.rows(bag) {
            self.for_each_run(row, |columns, slots, signs| {
                for (i, (column, slot)) in columns.zip(slots).enumerate() {
                    let negative = is_negative(signs, i);
                    let value = self.hashed_weight[slot].widen();
                    let value = if negative { -value } else { value };
                    let best = &mut best[column];
                    if first || value > *best || (value.is_nan() && !best.is_nan()) {
                        *best = value;
                        won(column, slot, negative);
                    }
                }
            });
            first = false;
        }
        !first
    }
}

/// Bit `i` of `signs`; blocks longer than 32 carry no signs.
fn is_negative(signs: u32, i: usize) -> bool {
    signs != 0 && (signs >> i) & 1 == 1
}

/// `into[i] += scale * (-1)^(bit i of signs) * from(i)`
#[inline]
fn add_signed<A: Accumulator>(into: &mut [A], signs: u32, scale: A, from: impl Fn(usize) -> A) {
    if signs == 0 {
        for (i, into) in into.iter_mut().enumerate() {
            *into += scale * from(i);
        }
    } else {
        for (i, into) in into.iter_mut().enumerate() {
            let scale = if (signs >> i) & 1 == 1 { -scale } else { scale };
            *into += scale * from(i);
        }
    }
}

/// output `(num_bags, embedding_dim)`
struct Forward;

impl Loop for Forward {
    fn run<T: Element, I: Index, H: Locate>(self, bags: &Bags<T, I, H>) -> Result<CpuStorage> {
        let (num_bags, embedding_dim) = (bags.lookup.bags.num_bags, bags.embedding_dim());
        let mut output = vec![T::narrow(T::Acc::ZERO); num_bags * embedding_dim];
        let pool = |sums: &mut Vec<T::Acc>, bag: usize, out: &mut [T]| {
            sums.clear();
            sums.resize(embedding_dim, T::Acc::ZERO);
            if bags.lookup.table.mode == Mode::Max {
                bags.max(bag, sums, |_, _, _| ());
            } else {
                for (position, row) in bags.rows(bag) {
                    let scale = bags.weight(position);
                    bags.for_each_run(row, |columns, slots, signs| {
                        let values = &bags.hashed_weight[slots];
                        add_signed(&mut sums[columns], signs, scale, |i| values[i].widen());
                    });
                }
            }
            let divisor = bags.divisor(bag).unwrap_or(T::Acc::ONE);
            for (out, &sum) in out.iter_mut().zip(sums.iter()) {
                *out = T::narrow(sum / divisor);
            }
        };
        if bags.gathered_values() < 2 * MIN_VALUES_PER_THREAD {
            let mut sums = vec![];
            for (bag, out) in output.chunks_mut(embedding_dim).enumerate() {
                pool(&mut sums, bag, out);
            }
        } else {
            output
                .par_chunks_mut(embedding_dim)
                .enumerate()
                .for_each_init(Vec::new, |sums, (bag, out)| pool(sums, bag, out));
        }
        Ok(T::to_cpu_storage_owned(output))
    }
}

/// grad_weight `(len,)`, in the accumulator's dtype
struct GradWeight<'a> {
    grad_output: View<'a, CpuStorage>,
}

impl Loop for GradWeight<'_> {
    fn run<T: Element, I: Index, H: Locate>(self, bags: &Bags<T, I, H>) -> Result<CpuStorage> {
        let (num_bags, embedding_dim) = (bags.lookup.bags.num_bags, bags.embedding_dim());
        let grad_output = slice::<T>(self.grad_output)?;
        let len = bags.hashed_weight.len();

        // The gradient of the bags of one part.
        let part = |part: Range<usize>| {
            let mut grad_weight = vec![T::Acc::ZERO; len];
            let mut best = vec![T::Acc::ZERO; embedding_dim];
            let mut winners = vec![(0, false); embedding_dim];
            for bag in part {
                let grad = &grad_output[bag * embedding_dim..(bag + 1) * embedding_dim];
                if bags.lookup.table.mode == Mode::Max {
                    let any = bags.max(bag, &mut best, |column, slot, negative| {
                        winners[column] = (slot, negative);
                    });
                    if any {
                        for (&(slot, negative), grad) in winners.iter().zip(grad) {
                            let grad = grad.widen();
                            grad_weight[slot] += if negative { -grad } else { grad };
                        }
                    }
                    continue;
                }
                let divisor = bags.divisor(bag).unwrap_or(T::Acc::ONE);
                for (position, row) in bags.rows(bag) {
                    let scale = bags.weight(position) / divisor;
                    bags.for_each_run(row, |columns, slots, signs| {
                        let grad = &grad[columns];
                        add_signed(&mut grad_weight[slots], signs, scale, |i| grad[i].widen());
                    });
                }
            }
            grad_weight
        };

        let values = bags.gathered_values();
        let parts = (values / len)
            .min(values / MIN_VALUES_PER_THREAD)
            .clamp(1, MAX_PARTS);
        let bags_per_part = num_bags.div_ceil(parts).max(1);
        let mut parts = (0..parts)
            .into_par_iter()
            .with_max_len(1)
            .map(|i| {
                part((i * bags_per_part).min(num_bags)..((i + 1) * bags_per_part).min(num_bags))
            })
            .collect::<Vec<_>>()
            .into_iter();
        let mut grad_weight = parts.next().unwrap_or_else(|| vec![T::Acc::ZERO; len]);
        for part in parts {
            for (sum, value) in grad_weight.iter_mut().zip(part) {
                *sum += value;
            }
        }
        Ok(T::Acc::to_cpu_storage_owned(grad_weight))
    }
}

/// gradient of per_sample_weights `(nnz,)`: of the weight at position `i` in bag `b`, `<row i, grad_output[b]>`
struct GradPerSampleWeights<'a> {
    grad_output: View<'a, CpuStorage>,
}

impl Loop for GradPerSampleWeights<'_> {
    fn run<T: Element, I: Index, H: Locate>(self, bags: &Bags<T, I, H>) -> Result<CpuStorage> {
        let embedding_dim = bags.embedding_dim();
        let grad_output = slice::<T>(self.grad_output)?;
        let mut grad_weights = vec![T::narrow(T::Acc::ZERO); bags.indices.len()];
        for bag in 0..bags.lookup.bags.num_bags {
            let grad = &grad_output[bag * embedding_dim..(bag + 1) * embedding_dim];
            for (position, row) in bags.rows(bag) {
                let mut dot = T::Acc::ZERO;
                bags.for_each_run(row, |columns, slots, signs| {
                    let values = grad[columns].iter().zip(&bags.hashed_weight[slots]);
                    for (i, (grad, value)) in values.enumerate() {
                        let product = grad.widen() * value.widen();
                        dot += if is_negative(signs, i) {
                            -product
                        } else {
                            product
                        };
                    }
                });
                grad_weights[position] = T::narrow(dot);
            }
        }
        Ok(T::to_cpu_storage_owned(grad_weights))
    }
}
