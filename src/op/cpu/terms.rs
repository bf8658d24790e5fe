//! How the gradient of `hashed_weight` is summed: terms, each for a few consecutive slots, of many bags that meet in a slot.
//!
//! A large gradient of a small weight is divided into *shares* of consecutive bags. The sum of each is a partial sum of every slot,
//! and partial sums are added in their order. The number of shares depends on the sizes alone. What the threads do depends on
//! their number too, but gives the same bits:
//!
//! * *Directly*, where there is a share for more than half of the threads, as always for a single thread: each share is added by
//!   one thread, into grad_weight or into a buffer of its length.
//! * *By ranges of slots*, else, in two steps. First, the bags are divided among the threads, and their terms are written into
//!   lists, one for each range of slots. Then the ranges are divided among the threads, and the terms of each are added in the
//!   order of the bags. So no two threads add to one slot, and no thread needs a copy of all slots. Many bags are taken in
//!   several rounds, so that the lists stay in the caches.
//!
//! docs/performance.md has the measurements behind this choice.

use super::call::with_block;
use super::combine::{combine, Load, Sum};
use super::lanes::{prefetch, Lanes, Loop};
use super::scalar::Accumulator;
use super::sparse::Touched;
use super::window::ADD_AHEAD;
use super::MIN_VALUES_PER_THREAD;
use crate::parallel::Team;
use std::ops::Range;

/// The most shares.
const MAX_SHARES: usize = 16;

/// The most terms of a round, for each thread: a megabyte of lists.
const TERMS_PER_THREAD: usize = 1 << 16;

/// Ranges of slots for each thread: one that comes late leaves some to others. More would be more lists to allocate.
const RANGES_PER_THREAD: usize = 2;

/// Ranges are of whole granules, so that threads share at most the cache lines at either end, of sums or of marks.
const LOG2_GRANULE: u32 = 10;

/// What is added to consecutive slots: `scale * (-1)^(bit i of signs) * grad[i]`.
#[derive(Clone, Copy)]
pub(super) struct Term<S> {
    /// The first slot, counted from the start of a range. A block that starts before the range has a negative one.
    start: i32,
    signs: u32,
    /// The first gradient, counted from the first of the round.
    grad: u32,
    scale: S,
}

/// What multiplies a term: nothing, or a value.
pub(super) trait Scale<A>: Copy + Send + Sync {
    fn new(scale: impl FnOnce() -> Option<A>) -> Self;
    fn get(self) -> Option<A>;
}

impl<A> Scale<A> for () {
    #[inline(always)]
    fn new(_: impl FnOnce() -> Option<A>) {}

    #[inline(always)]
    fn get(self) -> Option<A> {
        None
    }
}

impl<A: Accumulator> Scale<A> for A {
    #[inline(always)]
    fn new(scale: impl FnOnce() -> Option<A>) -> A {
        scale().unwrap_or(A::ONE)
    }

    #[inline(always)]
    fn get(self) -> Option<A> {
        Some(self)
    }
}

/// How slots are divided into ranges of almost equal length.
#[derive(Debug, Clone, Copy)]
struct Ranges {
    /// Of ranges per granule, in units of 2^-48.
    per_granule: u64,
    len: usize,
}

impl Ranges {
    /// At most `ranges` of `len` slots, of at most 2^30 slots each.
    fn new(len: usize, ranges: usize) -> Self {
        let granules = len.div_ceil(1 << LOG2_GRANULE).max(1);
        let ranges = ranges.max(len.div_ceil(1 << 30) + 1).min(granules);
        Self {
            per_granule: ((ranges as u64) << 48).div_ceil(granules as u64),
            len,
        }
    }

    /// The range of a slot.
    #[inline(always)]
    fn of(&self, slot: usize) -> usize {
        (((slot >> LOG2_GRANULE) as u64 * self.per_granule) >> 48) as usize
    }

    /// The first slot of a range; past the last one, the number of slots.
    fn start(&self, range: usize) -> usize {
        let granule = ((range as u64) << 48).div_ceil(self.per_granule);
        self.len.min((granule as usize) << LOG2_GRANULE)
    }

    fn count(&self) -> usize {
        self.of(self.len.saturating_sub(1)) + 1
    }

    /// Divides as many values as there are slots.
    fn divide<'a, A>(&self, mut values: &'a mut [A]) -> impl Iterator<Item = &'a mut [A]> {
        let ranges = *self;
        (0..ranges.count()).map(move |range| {
            let len = ranges.start(range + 1) - ranges.start(range);
            let (first, rest) = std::mem::take(&mut values).split_at_mut(len);
            values = rest;
            first
        })
    }
}

/// The terms of some bags, in their order, for each range of slots.
pub(super) struct Terms<S> {
    /// The first of the round, in grad_output.
    first_grad: usize,
    ranges: Ranges,
    /// The list of each range, and its first slot.
    lists: Vec<(Vec<Term<S>>, usize)>,
    /// How many more terms there is room for in every list.
    room: usize,
}

impl<S: Copy> Terms<S> {
    fn new(ranges: Ranges, first_grad: usize) -> Self {
        Self {
            first_grad,
            ranges,
            lists: (0..ranges.count())
                .map(|range| (vec![], ranges.start(range)))
                .collect(),
            room: 0,
        }
    }

    /// Makes room for so many terms.
    pub fn reserve(&mut self, terms: usize) {
        for (list, _) in &mut self.lists {
            list.reserve(terms);
        }
        self.room = terms;
    }

    /// A term for the `len` slots from `slot` on, of the values of grad_output from `grad` on. There must be room for it.
    #[inline(always)]
    pub fn push(&mut self, slot: usize, len: usize, signs: u32, grad: usize, scale: S) {
        assert!(self.room > 0);
        self.room -= 1;
        let (mut range, last) = (self.ranges.of(slot), self.ranges.of(slot + len - 1));
        loop {
            let (list, first_slot) = &mut self.lists[range];
            let n = list.len();
            // SAFETY: `reserve` made room for as many terms in each list as `room` allows, and each list gets at most one of
            // them here. `Vec::push` would take a sixth longer in all.
            unsafe {
                list.as_mut_ptr().add(n).write(Term {
                    start: slot.wrapping_sub(*first_slot) as i32,
                    signs,
                    grad: (grad - self.first_grad) as u32,
                    scale,
                });
                list.set_len(n + 1);
            }
            // A block that straddles ranges is a term of each.
            if range >= last {
                return;
            }
            range += 1;
        }
    }
}

/// Terms to be added to the slots of a weight: a gradient in the making.
pub(super) struct Scatter<'a, T: Load> {
    /// The threads for the whole of it, which finds the terms as well.
    pub team: Team,
    /// `(num_bags, embedding_dim)`
    pub grad_output: &'a [T],
    pub embedding_dim: usize,
    /// About how many terms there are, of `block` columns each; the last of a row may have fewer.
    pub num_terms: usize,
    pub block: usize,
}

/// Adds the terms of some bags to all slots.
pub(super) type AddBags<'a, A> = &'a (dyn Fn(Range<usize>, Slots<A>) + Sync);

/// Writes the terms of some bags.
pub(super) type WriteBags<'a, S> = &'a (dyn Fn(Range<usize>, &mut Terms<S>) + Sync);

impl<T: Load> Scatter<'_, T> {
    /// Adds all terms to `slots`.
    pub fn sum<S: Scale<T::Acc>>(
        &self,
        mut slots: Slots<T::Acc>,
        add: AddBags<T::Acc>,
        write: WriteBags<S>,
    ) {
        let (len, num_bags) = (
            slots.values.len(),
            self.grad_output.len() / self.embedding_dim,
        );
        let values = self.num_terms.saturating_mul(self.block);
        // So few that the buffers hold at most a quarter as many values as are added.
        let buffers = (values / (4 * len)).min(values / MIN_VALUES_PER_THREAD);
        let shares = (1 + buffers).min(MAX_SHARES);
        let bags_per_share = num_bags.div_ceil(shares).max(1);
        let shares = (0..num_bags).step_by(bags_per_share);
        let shares = shares.map(|start| start..num_bags.min(start + bags_per_share));
        if shares.len() > 1 {
            // So many terms that hardly a slot is left out, unless few rows are drawn most of the time.
            slots.mark_all();
        }
        // A small weight has few ranges.
        let most_ranges = len.div_ceil(1 << LOG2_GRANULE);
        if shares.len() > self.team.threads().min(most_ranges) / 2 {
            sum_directly(&self.team, shares, slots, add);
        } else {
            self.sum_by_ranges(shares, slots, write);
        }
    }

    fn sum_by_ranges<S: Scale<T::Acc>>(
        &self,
        shares: impl ExactSizeIterator<Item = Range<usize>>,
        mut slots: Slots<T::Acc>,
        write: WriteBags<S>,
    ) {
        let (len, threads, embedding_dim) =
            (slots.values.len(), self.team.threads(), self.embedding_dim);
        let num_bags = self.grad_output.len() / embedding_dim;
        let ranges = Ranges::new(len, RANGES_PER_THREAD * threads);
        // Bags are taken to be of about one length; gradients are counted in 32 bits.
        let rounds = self.num_terms.div_ceil(TERMS_PER_THREAD * threads).max(1);
        let most_bags = (u32::MAX as usize / embedding_dim / threads).max(1);
        let bags_per_task = num_bags.div_ceil(rounds * threads).clamp(1, most_bags);
        // The sums of a share other than the first, by range; empty while there is none.
        let mut buffers: Vec<Vec<T::Acc>> = vec![vec![]; ranges.count()];
        let tasks: Vec<_> = shares
            .enumerate()
            .flat_map(|(share, bags)| {
                let end = bags.end;
                bags.step_by(bags_per_task).map(move |start| Task {
                    bags: start..end.min(start + bags_per_task),
                    is_first_share: share == 0,
                    ends_share: start + bags_per_task >= end,
                })
            })
            .collect();
        let tasks_per_round =
            (u32::MAX as usize / (bags_per_task * embedding_dim)).clamp(1, threads);
        for tasks in tasks.chunks(tasks_per_round) {
            let first_grad = tasks[0].bags.start * embedding_dim;
            let terms = self.team.map(tasks.iter(), |task| {
                let mut terms = Terms::new(ranges, first_grad);
                write(task.bags.clone(), &mut terms);
                terms
            });
            let grads = &self.grad_output[first_grad..];
            let targets = slots.reborrow().divide(ranges).zip(&mut buffers);
            self.team.for_each(targets.enumerate(), |(range, (mut slots, buffer))| {
                for (task, terms) in tasks.iter().zip(&terms) {
                    let (terms, _) = &terms.lists[range];
                    let slots_of_share = match task.is_first_share {
                        true => slots.reborrow(),
                        false => {
                            buffer.resize(slots.values.len(), T::Acc::ZERO);
                            Slots::new(buffer, None)
                        }
                    };
                    with_block!(self.block, T::CONSTANT_BLOCKS, BLOCK, lanes => lanes.run(Add::<BLOCK, T, S> {
                        terms,
                        grads,
                        slots: slots_of_share,
                        block: self.block,
                        embedding_dim,
                    }));
                    if task.ends_share && !task.is_first_share {
                        add_all(slots.values, buffer);
                        buffer.clear();
                    }
                }
            });
        }
    }
}

/// Bags whose terms one thread writes.
struct Task {
    bags: Range<usize>,
    is_first_share: bool,
    /// Whether these are the last bags of a share.
    ends_share: bool,
}

fn sum_directly<A: Accumulator>(
    team: &Team,
    shares: impl Iterator<Item = Range<usize>>,
    mut slots: Slots<A>,
    add: AddBags<A>,
) {
    let len = slots.values.len();
    let mut first = Some(slots.reborrow());
    let shares = shares.map(|share| (share, first.take()));
    let buffers = team.map(shares, |(share, slots)| match slots {
        Some(slots) => {
            add(share, slots);
            vec![]
        }
        None => {
            let mut buffer = vec![A::ZERO; len];
            add(share, Slots::new(&mut buffer, None));
            buffer
        }
    });
    if buffers.len() > 1 {
        let chunk = len.div_ceil(team.threads()).max(1 << 12);
        let chunks = slots.values.chunks_mut(chunk).enumerate();
        team.for_each(chunks, |(i, sums)| {
            for buffer in &buffers[1..] {
                add_all(sums, &buffer[i * chunk..]);
            }
        });
    }
}

/// Adds as many values as there are sums.
fn add_all<A: Accumulator>(sums: &mut [A], values: &[A]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum += value;
    }
}

/// Consecutive slots of grad_weight.
pub(super) struct Slots<'a, A> {
    pub values: &'a mut [A],
    /// Where what is added to is marked, and how many slots come before these.
    touched: Option<(&'a Touched, usize)>,
}

impl<'a, A> Slots<'a, A> {
    /// `touched`: where what is added to is marked.
    pub fn new(values: &'a mut [A], touched: Option<&'a Touched>) -> Self {
        let touched = touched.map(|touched| (touched, 0));
        Self { values, touched }
    }

    /// Marks `len` slots from `start` on.
    #[inline(always)]
    pub fn mark(&self, start: usize, len: usize) {
        if let Some((touched, before)) = self.touched {
            touched.mark(before + start, len);
        }
    }

    /// Marks all slots, once and for all: buffers of shares need no marks.
    fn mark_all(&mut self) {
        if let Some((touched, _)) = self.touched.take() {
            touched.mark_all();
        }
    }

    fn reborrow(&mut self) -> Slots<'_, A> {
        let touched = self.touched;
        let values = &mut *self.values;
        Slots { values, touched }
    }

    /// All of them, divided.
    fn divide(self, ranges: Ranges) -> impl Iterator<Item = Slots<'a, A>> {
        let touched = self.touched;
        let values = ranges.divide(self.values).enumerate();
        values.map(move |(range, values)| {
            let touched = touched.map(|(touched, _)| (touched, ranges.start(range)));
            Slots { values, touched }
        })
    }
}

/// Adds terms to the slots of a range.
struct Add<'a, const BLOCK: usize, T: Load, S> {
    terms: &'a [Term<S>],
    /// grad_output from the first gradient of the round on.
    grads: &'a [T],
    slots: Slots<'a, T::Acc>,
    block: usize,
    embedding_dim: usize,
}

impl<const BLOCK: usize, T: Load, S: Scale<T::Acc>> Loop for Add<'_, BLOCK, T, S> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self {
            terms,
            grads,
            mut slots,
            embedding_dim,
            ..
        } = self;
        let block = if BLOCK > 0 { BLOCK } else { self.block };
        // The last block of a row may be cut off.
        let is_whole = embedding_dim.is_multiple_of(block);
        for (i, term) in terms.iter().enumerate() {
            if let Some(next) = terms.get(i + ADD_AHEAD) {
                prefetch(slots.values.as_ptr().wrapping_offset(next.start as isize));
            }
            let (start, grad) = (term.start as usize, term.grad as usize);
            let len = if is_whole {
                block
            } else {
                block.min(embedding_dim - grad % embedding_dim)
            };
            let grads = &grads[grad..grad + len];
            let scale = term.scale.get();
            let Some(sums) = slots.values.get_mut(start..start.wrapping_add(len)) else {
                add_edge(&mut slots, start, grads, term);
                continue;
            };
            match grads.first_chunk::<BLOCK>() {
                Some(grads) if BLOCK > 0 => {
                    combine::<Sum, T, _>(lanes, sums, grads, term.signs, scale)
                }
                _ => combine::<Sum, T, _>(lanes, sums, grads, term.signs, scale),
            }
            slots.mark(start, len);
        }
    }
}

/// Adds those values of a term whose slots are in the range.
#[inline(never)]
fn add_edge<T: Load, S: Scale<T::Acc>>(
    slots: &mut Slots<T::Acc>,
    start: usize,
    grads: &[T],
    term: &Term<S>,
) {
    let scale = term.scale.get().unwrap_or(T::Acc::ONE);
    for (i, grad) in grads.iter().enumerate() {
        let slot = start.wrapping_add(i);
        if let Some(sum) = slots.values.get_mut(slot) {
            *sum += (scale * grad.widen()).flip(term.signs, i);
            slots.mark(slot, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every slot is in the range that starts at or before it and ends behind it.
    #[test]
    fn ranges_are_consecutive_and_of_almost_one_length() {
        for len in [
            1,
            1_000,
            1_024,
            1_025,
            90_001,
            1_000_000,
            64_000_000,
            3 << 30,
        ] {
            for wanted in [1, 2, 6, 32, 100] {
                let ranges = Ranges::new(len, wanted);
                let starts: Vec<_> = (0..=ranges.count()).map(|i| ranges.start(i)).collect();
                assert_eq!((starts[0], starts[ranges.count()]), (0, len));
                let granule = 1 << LOG2_GRANULE;
                let most = len.div_ceil(ranges.count()).next_multiple_of(granule) + granule;
                for (range, ends) in starts.windows(2).enumerate() {
                    assert!(
                        ends[0] < ends[1] && ends[1] - ends[0] <= most,
                        "{len} {wanted}"
                    );
                    assert_eq!((ranges.of(ends[0]), ranges.of(ends[1] - 1)), (range, range));
                    assert!(ends[1] - ends[0] <= 1 << 30);
                }
                assert!(ranges.count() <= wanted.max(5));
            }
        }
    }
}
