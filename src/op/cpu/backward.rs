//! The gradients.
//!
//! Rows of different bags meet in the slots of grad_weight. No result depends on the number of threads, because the work
//! is divided in one of two ways, chosen by the sizes alone:
//!
//! * *Parts*, where many values fall on each slot: the bags are divided into parts. The first adds into grad_weight, each
//!   other into a buffer of its own, and the buffers are added in order. There are so few parts that the buffers together
//!   hold at most a quarter as many values as are added.
//! * *Slices*, else: each thread owns a slice of grad_weight, goes over all rows and adds what falls into its slice. All go
//!   in the same order, so a slot gets its values in that order however the slices lie. Every row is hashed for every slice,
//!   and no memory is needed beside grad_weight.
//!
//! For max, the winners are found first, bags divided among threads; there are as many of them as output values.

use super::lanes::{dispatch, raise_of, Lanes, Task};
use super::places::{Places, Rows, Run, ADD_AHEAD};
use super::{
    block_of, combine, slice, with_block, Accumulator, Bags, Element, Mode, Pass, Sum, View,
    MIN_VALUES_PER_THREAD,
};
use crate::hash::{Locate, MAX_ROWS};
use crate::parallel::Team;
use candle_core::{CpuStorage, Result, WithDType};
use std::ops::Range;

/// The most parts.
const MAX_PARTS: usize = 16;

/// grad_weight `(len,)`, in the accumulator's dtype
pub(super) struct GradWeight<'a> {
    pub grad_output: View<'a, CpuStorage>,
}

impl Pass for GradWeight<'_> {
    fn run<T: Element, H: Locate>(self, bags: &Bags<T, H>) -> Result<CpuStorage> {
        let grad_output = slice::<T>(self.grad_output)?;
        let winners = (bags.lookup.table.mode == Mode::Max).then(|| winners(bags));
        let source = Source {
            bags,
            grad_output,
            winners,
        };
        let (len, num_bags) = (bags.hashed_weight.len(), bags.num_bags());
        let values = match source.winners {
            Some(_) => num_bags * bags.embedding_dim(),
            None => bags.gathered_values(),
        };
        let buffers = (values / (4 * len)).min(values / MIN_VALUES_PER_THREAD);
        let team = Team::new(values / MIN_VALUES_PER_THREAD);
        let mut grad_weight;
        if buffers > 0 {
            let num_parts = (1 + buffers).min(MAX_PARTS);
            let bags_per_part = num_bags.div_ceil(num_parts);
            let mut parts = team.map(0..num_parts, |i| {
                let mut part = vec![T::Acc::ZERO; len];
                let start = (i * bags_per_part).min(num_bags);
                let end = (start + bags_per_part).min(num_bags);
                source.add(start..end, 0, &mut part);
                part
            });
            let buffers = parts.split_off(1);
            grad_weight = parts.swap_remove(0);
            let chunk = len.div_ceil(team.threads()).max(1 << 12);
            team.for_each(grad_weight.chunks_mut(chunk).enumerate(), |(i, sums)| {
                for part in &buffers {
                    for (sum, &value) in sums.iter_mut().zip(&part[i * chunk..]) {
                        *sum += value;
                    }
                }
            });
        } else {
            // Whole blocks, so that a block of a mix hash lies in one slice.
            let block = bags.hash.block();
            let owned = len.div_ceil(team.threads()).div_ceil(block) * block;
            grad_weight = vec![T::Acc::ZERO; len];
            team.for_each(grad_weight.chunks_mut(owned).enumerate(), |(i, slots)| {
                source.add(0..num_bags, i * owned, slots)
            });
        }
        Ok(T::Acc::to_cpu_storage_owned(grad_weight))
    }
}

/// What is added into grad_weight.
struct Source<'a, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    grad_output: &'a [T],
    /// For max, `(num_bags, embedding_dim)`.
    winners: Option<Vec<Winner>>,
}

impl<T: Element, H: Locate> Source<'_, T, H> {
    /// Adds to `slots`, the gradients of the slots from `first_slot` on, what some bags have for them.
    fn add(&self, bags: Range<usize>, first_slot: usize, slots: &mut [T::Acc]) {
        match &self.winners {
            Some(winners) => {
                let embedding_dim = self.bags.embedding_dim();
                let values = bags.start * embedding_dim..bags.end * embedding_dim;
                dispatch(AddWinners {
                    winners: &winners[values.clone()],
                    grads: &self.grad_output[values],
                    first_slot,
                    slots,
                })
            }
            None => with_block!(self.bags.hash, BLOCK => dispatch(Add::<BLOCK, _, _> {
                source: self,
                of: bags,
                first_slot,
                slots,
            })),
        }
    }
}

/// Adds the gradients of the winners of some bags.
struct AddWinners<'a, T: Element> {
    winners: &'a [Winner],
    grads: &'a [T],
    first_slot: usize,
    slots: &'a mut [T::Acc],
}

impl<T: Element> Task for AddWinners<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self {
            first_slot, slots, ..
        } = self;
        let slot = |winner: &Winner| winner.slot().wrapping_sub(first_slot);
        let mut found = Found::default();
        let winners = self.winners.chunks(MAX_ROWS);
        for (winners, grads) in winners.zip(self.grads.chunks(MAX_ROWS)) {
            found.note(winners.iter().map(|winner| slot(winner) < slots.len()));
            for &i in found.rows() {
                lanes.prefetch(slots.as_ptr().wrapping_add(slot(&winners[usize::from(i)])));
            }
            for &i in found.rows() {
                let winner = winners[usize::from(i)];
                let grad = grads[usize::from(i)].widen().flip(winner.signs(), 0);
                slots[slot(&winner)] += grad;
            }
        }
    }
}

/// The numbers of those of some rows that a thread has to do with.
struct Found {
    rows: [u8; MAX_ROWS],
    n: usize,
}

impl Default for Found {
    fn default() -> Self {
        Self {
            rows: [0; MAX_ROWS],
            n: 0,
        }
    }
}

impl Found {
    /// Notes those of the next `wanted.len()` rows that are wanted. Without a branch, which no processor could foretell.
    #[inline(always)]
    fn note(&mut self, wanted: impl Iterator<Item = bool>) {
        // Counted here and not in `self`, where each row would wait for the count of the row before.
        let mut n = 0;
        for (row, is_wanted) in wanted.take(MAX_ROWS).enumerate() {
            self.rows[n % MAX_ROWS] = row as u8;
            n += usize::from(is_wanted);
        }
        self.n = n;
    }

    fn rows(&self) -> &[u8] {
        &self.rows[..self.n]
    }
}

/// The winners of each column of each bag.
fn winners<T: Element, H: Locate>(bags: &Bags<T, H>) -> Vec<Winner> {
    let team = bags.team();
    let (embedding_dim, task) = (bags.embedding_dim(), bags.bags_per_task(&team));
    let mut winners = vec![Winner::NONE; bags.num_bags() * embedding_dim];
    team.for_each(
        winners.chunks_mut(task * embedding_dim).enumerate(),
        |(i, winners)| {
            let first = i * task;
            with_block!(bags.hash, BLOCK => dispatch(Win::<BLOCK, _, _> { bags, first, winners }));
        },
    );
    winners
}

/// The slot that won a column of a bag, and its sign.
#[derive(Debug, Clone, Copy)]
struct Winner(u64);

impl Winner {
    const NONE: Self = Self(u64::MAX);

    #[inline(always)]
    fn new(slot: usize, signs: u32, i: usize) -> Self {
        let negative = (signs >> (i % 32)) & 1;
        Self((slot as u64) << 1 | u64::from(negative))
    }

    /// The slot; past all slots if there is none.
    #[inline(always)]
    fn slot(self) -> usize {
        (self.0 >> 1) as usize
    }

    /// 1 where its value is negated.
    #[inline(always)]
    fn signs(self) -> u32 {
        (self.0 & 1) as u32
    }
}

/// Finds the winners of the bags from `first` on.
struct Win<'a, const BLOCK: usize, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    first: usize,
    winners: &'a mut [Winner],
}

impl<const BLOCK: usize, T: Element, H: Locate> Task for Win<'_, BLOCK, T, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let (bags, embedding_dim) = (self.bags, self.bags.embedding_dim());
        let block = block_of::<BLOCK, H>(&bags.hash);
        let last = self.first + self.winners.len() / embedding_dim;
        let mut places = Places::new(bags, self.first..last);
        let mut best = vec![T::Acc::ZERO; embedding_dim];
        let bags_of_winners = self.winners.chunks_exact_mut(embedding_dim);
        for (bag, winners) in (self.first..last).zip(bags_of_winners) {
            let (mut positions, mut is_first) = (bags.range(bag), true);
            while let Some(rows) = places.take(&mut positions) {
                if rows.len() == 0 {
                    continue;
                }
                let columns = best.chunks_mut(block).zip(winners.chunks_mut(block));
                for (run, (best, winners)) in columns.enumerate() {
                    if block > 1 && run + 1 < bags.runs.len() {
                        let next = rows.run(run + 1);
                        next.fetch(lanes, bags.hashed_weight.as_ptr(), rows.len(), block);
                    }
                    let contest = Contest::<BLOCK, T, H> {
                        bags,
                        places: rows.run(run),
                        rows: rows.len(),
                        is_first,
                    };
                    let mut at = 0;
                    while at + 8 <= best.len() {
                        contest.hold::<8, _>(lanes, at, best, winners);
                        at += 8;
                    }
                    while at + 4 <= best.len() {
                        contest.hold::<4, _>(lanes, at, best, winners);
                        at += 4;
                    }
                    while at < best.len() {
                        contest.hold::<1, _>(lanes, at, best, winners);
                        at += 1;
                    }
                }
                is_first = false;
            }
        }
    }
}

/// A block of columns of some rows of a bag.
struct Contest<'a, const BLOCK: usize, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    places: Run<'a, T, H>,
    rows: usize,
    /// Whether the first of them is the first of the bag, which there is nothing to compare with.
    is_first: bool,
}

impl<const BLOCK: usize, T: Element, H: Locate> Contest<'_, BLOCK, T, H> {
    /// The N columns from `at` on of a row, and their signs.
    #[inline(always)]
    fn values<const N: usize>(&self, row: usize, at: usize) -> ([T::Acc; N], u32) {
        let Bags {
            hash,
            hashed_weight,
            ..
        } = self.bags;
        let block = block_of::<BLOCK, H>(hash);
        let (slot, signs) = self.places.place(row, block);
        let mut values = [T::Acc::ZERO; N];
        for (value, from) in values.iter_mut().zip(&hashed_weight[slot + at..][..N]) {
            *value = from.widen();
        }
        (values, signs.wrapping_shr(at as u32))
    }

    /// Finds the winners of the N columns from `at` on; in registers, where N is 8.
    #[inline(always)]
    fn hold<const N: usize, L: Lanes>(
        &self,
        lanes: L,
        at: usize,
        best: &mut [T::Acc],
        winners: &mut [Winner],
    ) {
        const NO_ROW: u32 = u32::MAX;
        let block = block_of::<BLOCK, H>(&self.bags.hash);
        let (mut sums, mut of, mut start) = ([T::Acc::ZERO; N], [NO_ROW; N], 0);
        sums.copy_from_slice(&best[at..at + N]);
        if self.is_first {
            let (values, signs) = self.values::<N>(0, at);
            sums = std::array::from_fn(|i| values[i].flip(signs, i));
            (of, start) = ([0; N], 1);
        }
        for row in start..self.rows {
            let (values, signs) = self.values::<N>(row, at);
            let eight = sums.first_chunk_mut().zip(of.first_chunk_mut());
            match eight.zip(values.first_chunk()) {
                Some(((sums, of), values)) => {
                    T::Acc::max_half_of(lanes, sums, of, values, signs, row as u32)
                }
                None => raise_of(&mut sums, &mut of, &values, signs, row as u32),
            }
        }
        best[at..at + N].copy_from_slice(&sums);
        for (i, (winner, row)) in (at..).zip(winners[at..at + N].iter_mut().zip(of)) {
            if row != NO_ROW {
                let (slot, signs) = self.places.place(row as usize, block);
                *winner = Winner::new(slot + i, signs, i);
            }
        }
    }
}

/// Adds the rows of some bags, in modes sum and mean.
struct Add<'a, const BLOCK: usize, T: Element, H: Locate> {
    source: &'a Source<'a, T, H>,
    of: Range<usize>,
    first_slot: usize,
    slots: &'a mut [T::Acc],
}

impl<const BLOCK: usize, T: Element, H: Locate> Task for Add<'_, BLOCK, T, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        let Source {
            bags, grad_output, ..
        } = *self.source;
        let (block, embedding_dim) = (block_of::<BLOCK, H>(&bags.hash), bags.embedding_dim());
        let mut founds = [Found::default(), Found::default()];
        let mut places = Places::new(bags, self.of.clone());
        for bag in self.of.clone() {
            let grads = &grad_output[bag * embedding_dim..(bag + 1) * embedding_dim];
            let scale = bags.mean_scale(bag);
            let mut positions = bags.range(bag);
            while let Some(rows) = places.take(&mut positions) {
                let part = |run: usize| Part {
                    rows: &rows,
                    places: rows.run(run),
                    grad: &grads[run * block..embedding_dim.min((run + 1) * block)],
                    scale,
                };
                if self.slots.len() == bags.hashed_weight.len() {
                    // Every row has its slots here.
                    for run in 0..bags.runs.len() {
                        self.add(lanes, &part(run), None);
                    }
                    continue;
                }
                // The slots of a block of columns are on their way while the block before is added.
                for run in 0..=bags.runs.len() {
                    let [even, odd] = &mut founds;
                    let (next, found) = if run % 2 == 0 {
                        (even, odd)
                    } else {
                        (odd, even)
                    };
                    if run < bags.runs.len() {
                        self.find(lanes, &rows, run, next);
                    }
                    if run > 0 {
                        self.add(lanes, &part(run - 1), Some(found));
                    }
                }
            }
        }
    }
}

/// What a block of columns of some rows adds.
struct Part<'a, T: Element, H: Locate> {
    rows: &'a Rows<'a, T, H>,
    places: Run<'a, T, H>,
    grad: &'a [T],
    /// In mode mean, what multiplies them.
    scale: Option<T::Acc>,
}

impl<T: Element, H: Locate> Part<'_, T, H> {
    #[inline(always)]
    fn scaled<const BLOCK: usize>(&self, grad: &[T; BLOCK]) -> [T::Acc; BLOCK] {
        let mut values = [T::Acc::ZERO; BLOCK];
        for (value, grad) in values.iter_mut().zip(grad) {
            *value = self.scale.unwrap_or(T::Acc::ONE) * grad.widen();
        }
        values
    }
}

impl<const BLOCK: usize, T: Element, H: Locate> Add<'_, BLOCK, T, H> {
    /// Finds the rows with slots in the slice for block `run` of columns, and has those slots fetched.
    #[inline(always)]
    fn find<L: Lanes>(&self, lanes: L, rows: &Rows<T, H>, run: usize, found: &mut Found) {
        let (hash, slots) = (&self.source.bags.hash, self.slots.as_ptr());
        let (block, run) = (block_of::<BLOCK, H>(hash), rows.run(run));
        let end = self.slots.len() + block - 1;
        let start = |row| run.place(row, block).0.wrapping_sub(self.first_slot);
        found.note((0..rows.len()).map(|row| start(row).wrapping_add(block - 1) < end));
        for &row in found.rows() {
            lanes.prefetch(slots.wrapping_add(start(row.into())));
        }
    }

    /// Adds a part to the slots of those of its rows that were found; of all, where nothing was looked for.
    #[inline(always)]
    fn add<L: Lanes>(&mut self, lanes: L, part: &Part<T, H>, found: Option<&Found>) {
        let bags = self.source.bags;
        match (part.grad.first_chunk::<BLOCK>(), found) {
            (Some(grad), None) if BLOCK > 0 && bags.per_sample_weights.is_none() => {
                self.add_all::<false, _>(lanes, part, grad)
            }
            (Some(grad), None) if BLOCK > 0 => self.add_all::<true, _>(lanes, part, grad),
            (Some(grad), Some(found)) if BLOCK > 0 => self.add_found(lanes, part, found, grad),
            _ => self.add_any(lanes, part, found),
        }
    }

    /// The same where all rows count, for a whole block of a length known beforehand. Not `WEIGHTED` says that rows have no
    /// weights.
    #[inline(always)]
    fn add_all<const WEIGHTED: bool, L: Lanes>(
        &mut self,
        lanes: L,
        part: &Part<T, H>,
        grad: &[T; BLOCK],
    ) {
        let values = part.scaled(grad);
        for row in 0..part.rows.len() {
            let (slot, signs) = part.places.place(row, BLOCK);
            if BLOCK > 1 {
                let slots = self.slots.as_ptr();
                part.places.fetch_one(lanes, slots, row + ADD_AHEAD, BLOCK);
            }
            let scale = if WEIGHTED {
                self.source.bags.scale(part.rows, row)
            } else {
                None
            };
            let slots = &mut self.slots[slot..slot + BLOCK];
            combine::<Sum, _, _>(lanes, slots, &values, signs, scale);
        }
    }

    /// The same for those rows that were found.
    #[inline(always)]
    fn add_found<L: Lanes>(
        &mut self,
        lanes: L,
        part: &Part<T, H>,
        found: &Found,
        grad: &[T; BLOCK],
    ) {
        let values = part.scaled(grad);
        let last = self.slots.len().checked_sub(BLOCK);
        for &row in found.rows() {
            let row = usize::from(row);
            let (slot, signs) = part.places.place(row, BLOCK);
            let start = slot.wrapping_sub(self.first_slot);
            if last.is_some_and(|last| start <= last) {
                let scale = self.source.bags.scale(part.rows, row);
                let slots = &mut self.slots[start..start + BLOCK];
                combine::<Sum, _, _>(lanes, slots, &values, signs, scale);
            } else {
                self.add_edge(part, row, start, signs);
            }
        }
    }

    /// The same for a block of any length: one that has no loop of its own, or the last of a row, which is cut off.
    #[inline(always)]
    fn add_any<L: Lanes>(&mut self, lanes: L, part: &Part<T, H>, found: Option<&Found>) {
        let bags = self.source.bags;
        let n = found.map_or(part.rows.len(), |found| found.n);
        for i in 0..n {
            let row = found.map_or(i, |found| found.rows[i].into());
            let (slot, signs) = part.places.place(row, bags.hash.block());
            let start = slot.wrapping_sub(self.first_slot);
            match self
                .slots
                .get_mut(start..start.wrapping_add(part.grad.len()))
            {
                Some(slots) => {
                    let scale = part.scale.or_else(|| bags.scale(part.rows, row));
                    combine::<Sum, _, _>(lanes, slots, part.grad, signs, scale);
                }
                None => self.add_edge(part, row, start, signs),
            }
        }
    }

    /// The same for a row at the edge of the slice, which a block of an affine hash may straddle: for what is inside.
    fn add_edge(&mut self, part: &Part<T, H>, row: usize, start: usize, signs: u32) {
        let scale = part
            .scale
            .or_else(|| self.source.bags.scale(part.rows, row));
        for (i, grad) in part.grad.iter().enumerate() {
            if let Some(sum) = self.slots.get_mut(start.wrapping_add(i)) {
                let grad = scale.unwrap_or(T::Acc::ONE) * grad.widen();
                *sum += grad.flip(signs, i);
            }
        }
    }
}

/// gradient of per_sample_weights `(nnz,)`: of the weight at position `i` in bag `b`, `<row i, grad_output[b]>`
pub(super) struct GradPerSampleWeights<'a> {
    pub grad_output: View<'a, CpuStorage>,
}

impl Pass for GradPerSampleWeights<'_> {
    fn run<T: Element, H: Locate>(self, bags: &Bags<T, H>) -> Result<CpuStorage> {
        let grad_output = slice::<T>(self.grad_output)?;
        let team = bags.team();
        let task = bags.bags_per_task(&team);
        let tasks = bags.num_bags().div_ceil(task);
        // Each task has the gradients of its own bags, in order.
        let gradients = team.map(0..tasks, |i| {
            let of = i * task..((i + 1) * task).min(bags.num_bags());
            with_block!(bags.hash, BLOCK => dispatch(Dot::<BLOCK, _, _> { bags, grad_output, of }))
        });
        let mut grad_weights = vec![T::from_f64(0.0); bags.indices.len()];
        let positions = (0..bags.num_bags())
            .flat_map(|bag| bags.range(bag))
            .filter(|&position| bags.counts(position));
        for (position, gradient) in positions.zip(gradients.into_iter().flatten()) {
            grad_weights[position] = gradient;
        }
        Ok(T::to_cpu_storage_owned(grad_weights))
    }
}

/// The dot products of the rows of some bags with their grad_output.
struct Dot<'a, const BLOCK: usize, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    grad_output: &'a [T],
    of: Range<usize>,
}

impl<const BLOCK: usize, T: Element, H: Locate> Task for Dot<'_, BLOCK, T, H> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) -> Vec<T> {
        let (bags, embedding_dim) = (self.bags, self.bags.embedding_dim());
        let block = block_of::<BLOCK, H>(&bags.hash);
        let mut places = Places::new(bags, self.of.clone());
        let mut sums = [T::Acc::ZERO; MAX_ROWS];
        let mut dots = vec![];
        for bag in self.of {
            let grads = &self.grad_output[bag * embedding_dim..(bag + 1) * embedding_dim];
            let mut positions = bags.range(bag);
            while let Some(rows) = places.take(&mut positions) {
                let sums = &mut sums[..rows.len()];
                sums.fill(T::Acc::ZERO);
                for (run, grads) in grads.chunks(block).enumerate() {
                    let places = rows.run(run);
                    for (row, sum) in sums.iter_mut().enumerate() {
                        let (slot, signs) = places.place(row, block);
                        let values = &bags.hashed_weight[slot..slot + grads.len()];
                        for (i, (grad, value)) in grads.iter().zip(values).enumerate() {
                            *sum += grad.widen() * value.widen().flip(signs, i);
                        }
                    }
                }
                dots.extend(sums.iter().map(|sum| T::from_f64(sum.to_f64())));
            }
        }
        dots
    }
}
