//! How the gradient of `hashed_weight` is summed: terms, each for a few consecutive slots, of many bags that meet in a slot.
//!
//! A large gradient of a small weight is divided into *shares* of consecutive bags. The sum of each is a partial sum of every slot,
//! and partial sums are added in their order. The number of shares depends on the sizes alone. What the threads do depends on
//! their number too, but gives the same bits:
//!
//! * *Directly*, where there are shares enough to keep all threads busy, one thread alone included: each share is added by one
//!   thread, into grad_weight or into a buffer of its length.
//! * *By ranges of slots*, else, in two steps. First, the bags are divided among the threads, and their terms are written into
//!   lists, one for each range of slots. Then the ranges are divided among the threads, and the terms of each are added in the
//!   order of the bags. So no two threads add to one slot, and no thread needs a copy of all slots. Many bags are taken in
//!   several rounds, so that lists stay in the caches.
//!
//! docs/performance.md has the measurements behind this choice.

use super::call::with_block;
use super::combine::{combine, Load, Sum};
use super::lanes::{prefetch, Lanes, Loop};
use super::scalar::Accumulator;
use super::window::ADD_AHEAD;
use super::MIN_VALUES_PER_THREAD;
use crate::parallel::Team;
use std::ops::Range;

/// The most shares.
const MAX_SHARES: usize = 16;

/// The most terms of a round.
const TERMS_PER_ROUND: usize = 1 << 17;

/// Tasks, and ranges of slots, for each thread: a thread that comes late leaves some to others.
const TASKS_PER_THREAD: usize = 2;
const RANGES_PER_THREAD: usize = 4;

/// Shorter ranges of slots would have threads write to the same cache lines.
const MIN_RANGE: usize = 1 << 8;

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

/// The terms of some bags, in their order, for each range of `2^log2_range` slots.
pub(super) struct Terms<S> {
    /// The first of the round, in grad_output.
    first_grad: usize,
    log2_range: u32,
    of_ranges: Vec<Vec<Term<S>>>,
    /// How many more terms there is room for in every list.
    room: usize,
}

impl<S: Copy> Terms<S> {
    /// Makes room for so many terms.
    pub fn reserve(&mut self, terms: usize) {
        for list in &mut self.of_ranges {
            list.reserve(terms);
        }
        self.room = terms;
    }

    /// A term for the `len` slots from `slot` on, of the values of grad_output from `grad` on. There must be room for it.
    #[inline(always)]
    pub fn push(&mut self, slot: usize, len: usize, signs: u32, grad: usize, scale: S) {
        assert!(self.room > 0);
        self.room -= 1;
        let mut range = slot >> self.log2_range;
        let last = (slot + len - 1) >> self.log2_range;
        loop {
            let list = &mut self.of_ranges[range];
            let n = list.len();
            // SAFETY: `reserve` made room for as many terms in each list as `room` allows, and each list gets at most one of
            // them here. `Vec::push` would take a sixth longer in all.
            unsafe {
                list.as_mut_ptr().add(n).write(Term {
                    start: slot.wrapping_sub(range << self.log2_range) as i32,
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

/// A gradient to be summed.
pub(super) struct Gradient<'a, T: Load> {
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

impl<T: Load> Gradient<'_, T> {
    /// Adds all terms to `slots`.
    pub fn sum<S: Scale<T::Acc>>(
        &self,
        slots: Slots<T::Acc>,
        add: AddBags<T::Acc>,
        write: WriteBags<S>,
    ) {
        let (len, num_bags) = (
            slots.values.len(),
            self.grad_output.len() / self.embedding_dim,
        );
        let values = self.num_terms.saturating_mul(self.block);
        let team = Team::new(values / MIN_VALUES_PER_THREAD);
        // So few that the buffers hold at most a quarter as many values as are added.
        let buffers = (values / (4 * len)).min(values / MIN_VALUES_PER_THREAD);
        let shares = (1 + buffers).min(MAX_SHARES);
        let bags_per_share = num_bags.div_ceil(shares).max(1);
        let shares = (0..num_bags).step_by(bags_per_share);
        let shares = shares.map(|start| start..num_bags.min(start + bags_per_share));
        if shares.len() > team.threads() / 2 {
            sum_directly(&team, shares, slots, add);
        } else {
            self.sum_by_ranges(&team, shares, slots, write);
        }
    }

    fn sum_by_ranges<S: Scale<T::Acc>>(
        &self,
        team: &Team,
        shares: impl ExactSizeIterator<Item = Range<usize>>,
        mut slots: Slots<T::Acc>,
        write: WriteBags<S>,
    ) {
        let (len, embedding_dim) = (slots.values.len(), self.embedding_dim);
        let range = len.div_ceil(RANGES_PER_THREAD * team.threads());
        // A slot of a range is counted in 31 bits.
        let log2_range = range
            .max(MIN_RANGE)
            .next_power_of_two()
            .trailing_zeros()
            .min(30);
        let ranges = len.div_ceil(1 << log2_range);
        let tasks = TASKS_PER_THREAD * team.threads();
        let terms_per_share = self.num_terms / shares.len().max(1);
        // Gradients are counted in 32 bits.
        let most_bags = (u32::MAX as usize / embedding_dim).max(1);

        let mut buffer = vec![T::Acc::ZERO; if shares.len() > 1 { len } else { 0 }];
        for (i, share) in shares.enumerate() {
            // Bags are taken to be of about one length.
            let rounds = terms_per_share.div_ceil(TERMS_PER_ROUND).max(1);
            let bags_per_round = share.len().div_ceil(rounds).clamp(1, most_bags);
            let bags_per_task = bags_per_round.div_ceil(tasks);
            for start in share.clone().step_by(bags_per_round) {
                let end = share.end.min(start + bags_per_round);
                let parts = (start..end).step_by(bags_per_task);
                let terms = team.map(parts, |first| {
                    let mut terms = Terms {
                        first_grad: start * embedding_dim,
                        log2_range,
                        of_ranges: (0..ranges).map(|_| vec![]).collect(),
                        room: 0,
                    };
                    write(first..end.min(first + bags_per_task), &mut terms);
                    terms
                });
                let grads = &self.grad_output[start * embedding_dim..];
                let add = |range: usize, mut slots: Slots<T::Acc>| {
                    for terms in &terms {
                        let (terms, slots) = (&terms.of_ranges[range], slots.reborrow());
                        with_block!(self.block, T::CONSTANT_BLOCKS, BLOCK, lanes => lanes.run(Add::<BLOCK, T, S> {
                            terms,
                            grads,
                            slots,
                            block: self.block,
                            embedding_dim,
                        }));
                    }
                };
                let targets = slots.reborrow().chunks(1 << log2_range).enumerate();
                if i == 0 {
                    team.for_each(targets, |(range, slots)| add(range, slots));
                    continue;
                }
                let buffers = buffer.chunks_mut(1 << log2_range);
                team.for_each(targets.zip(buffers), |((range, slots), buffer)| {
                    add(range, Slots::new(buffer));
                    if end == share.end {
                        add_all(slots.values, buffer);
                        buffer.fill(T::Acc::ZERO);
                    }
                });
            }
        }
    }
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
            add(share, Slots::new(&mut buffer));
            buffer
        }
    });
    if buffers.len() > 1 {
        let chunk = len.div_ceil(team.threads()).max(1 << 12);
        team.for_each(slots.chunks(chunk).enumerate(), |(i, slots)| {
            for buffer in &buffers[1..] {
                add_all(slots.values, &buffer[i * chunk..]);
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
}

impl<'a, A> Slots<'a, A> {
    pub fn new(values: &'a mut [A]) -> Self {
        Self { values }
    }

    fn reborrow(&mut self) -> Slots<'_, A> {
        Slots::new(self.values)
    }

    fn chunks(self, len: usize) -> impl Iterator<Item = Slots<'a, A>> {
        self.values.chunks_mut(len).map(Slots::new)
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
            slots,
            embedding_dim,
            ..
        } = self;
        let slots = slots.values;
        let block = if BLOCK > 0 { BLOCK } else { self.block };
        // The last block of a row may be cut off.
        let is_whole = embedding_dim.is_multiple_of(block);
        for (i, term) in terms.iter().enumerate() {
            if let Some(next) = terms.get(i + ADD_AHEAD) {
                prefetch(slots.as_ptr().wrapping_offset(next.start as isize));
            }
            let (start, grad) = (term.start as usize, term.grad as usize);
            let len = if is_whole {
                block
            } else {
                block.min(embedding_dim - grad % embedding_dim)
            };
            let grads = &grads[grad..grad + len];
            let whole = slots.get_mut(start..start.wrapping_add(len));
            match (whole, grads.first_chunk::<BLOCK>()) {
                (Some(slots), Some(grads)) if BLOCK > 0 => {
                    combine::<Sum, T, _>(lanes, slots, grads, term.signs, term.scale.get());
                }
                (Some(slots), _) => {
                    combine::<Sum, T, _>(lanes, slots, grads, term.signs, term.scale.get());
                }
                (None, _) => add_edge(slots, start, grads, term),
            }
        }
    }
}

/// Adds those values of a term whose slots are in the range.
#[inline(never)]
fn add_edge<T: Load, S: Scale<T::Acc>>(
    slots: &mut [T::Acc],
    start: usize,
    grads: &[T],
    term: &Term<S>,
) {
    let scale = term.scale.get().unwrap_or(T::Acc::ONE);
    for (i, grad) in grads.iter().enumerate() {
        if let Some(sum) = slots.get_mut(start.wrapping_add(i)) {
            *sum += (scale * grad.widen()).flip(term.signs, i);
        }
    }
}
