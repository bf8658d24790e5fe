//! The rows of bags, hashed a window at a time.
//!
//! Hashing needs nothing but indices, so the rows of many bags are hashed at once, in vectors, and padding is left out on
//! the way: the loops behind see places and nothing else. They see which places come next, too, and can have them fetched.

use super::lanes::Lanes;
use super::{Bags, Element};
use crate::hash::{Locate, MAX_ROWS};
use std::ops::Range;

/// So many places and their signs stay in the nearest cache.
const NEAR_PLACES: usize = 1 << 12;

/// How many rows before it is read a block is fetched. A processor that looks far ahead finds most misses by itself; one of
/// 2021 gains a quarter.
pub(super) const READ_AHEAD: usize = 6;

/// The same for a block that is added to, which waits longer for what others have written.
pub(super) const ADD_AHEAD: usize = 16;

/// The places of rows by position, for bags in the order of their positions; out of order is right too, only slower.
pub(super) struct Places<'a, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    /// Rows per window.
    window: usize,
    /// Block `run` of row `i` at `run * rows + i`, and enough behind it for the arrays of a [`Run`].
    places: Vec<H::Place>,
    signs: Vec<u32>,
    /// The positions of the window, and which of them are no padding.
    hashed: Range<usize>,
    positions: [usize; MAX_ROWS],
    rows: usize,
    /// No position from here on will be asked for.
    end: usize,
}

/// Rows of one bag.
pub(super) struct Rows<'a, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    places: &'a [H::Place],
    signs: &'a [u32],
    stride: usize,
    /// Where in `indices` the rows stand.
    pub positions: &'a [usize],
}

/// Where one block of columns of each of some rows lies. Arrays, whatever the number of rows: so the loops, whose rows are at
/// most [`MAX_ROWS`], need no test of an index, for which there would be no registers.
pub(super) struct Run<'a, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    places: &'a [H::Place; MAX_ROWS + ADD_AHEAD],
    signs: &'a [u32; MAX_ROWS],
}

impl<T: Element, H: Locate> Rows<'_, T, H> {
    /// How many; at most [`MAX_ROWS`].
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.positions.len().min(MAX_ROWS)
    }

    /// Block `run` of each row.
    #[inline(always)]
    pub fn run(&self, run: usize) -> Run<'_, T, H> {
        let start = run * self.stride;
        let places = self.places[start..].first_chunk();
        let signs = self.signs[start..].first_chunk();
        let (Some(places), Some(signs)) = (places, signs) else {
            unreachable!("Places::new makes room behind the last row");
        };
        Run {
            bags: self.bags,
            places,
            signs,
        }
    }
}

impl<T: Element, H: Locate> Run<'_, T, H> {
    /// The first slot of row `i`, and a sign bit for each column; zero where there are no signs.
    #[inline(always)]
    pub fn place(&self, i: usize, block: usize) -> (usize, u32) {
        let signs = if H::SIGNED { self.signs[i] } else { 0 };
        (self.bags.hash.slot(self.places[i], block), signs)
    }

    /// The values of row `i`, as they are kept, and their signs.
    #[inline(always)]
    pub fn values<const BLOCK: usize>(&self, i: usize) -> (&[T; BLOCK], u32) {
        debug_assert_eq!(BLOCK, self.bags.hash.block());
        let (slot, signs) = self.place(i, BLOCK);
        // SAFETY: `Places::hash` found every place to be one of the hash of these bags, or it is the first place, and
        // `Bags::new` found the blocks of all places, of the length that `with_block` has as BLOCK, to lie in
        // `hashed_weight`.
        let values = unsafe { self.bags.hashed_weight.get_unchecked(slot..slot + BLOCK) };
        match values.first_chunk() {
            Some(values) => (values, signs),
            None => unreachable!("so many were just taken"),
        }
    }

    /// Has what `slots`, a tensor like hashed_weight, holds for row `i` fetched; behind the last row, for any row.
    #[inline(always)]
    pub fn fetch_one<A, L: Lanes>(&self, lanes: L, slots: *const A, i: usize, block: usize) {
        let slot = self.bags.hash.slot(self.places[i], block);
        lanes.prefetch(slots.wrapping_add(slot));
    }

    /// Has what `slots`, a tensor like hashed_weight, holds for the first `rows` rows fetched.
    #[inline(always)]
    pub fn fetch<A, L: Lanes>(&self, lanes: L, slots: *const A, rows: usize, block: usize) {
        for &place in &self.places[..rows] {
            lanes.prefetch(slots.wrapping_add(self.bags.hash.slot(place, block)));
        }
    }
}

impl<'a, T: Element, H: Locate> Places<'a, T, H> {
    /// The places of the rows of these bags.
    pub fn new(bags: &'a Bags<'a, T, H>, of: Range<usize>) -> Self {
        let (runs, shape) = (bags.runs.len(), &bags.lookup.bags);
        let first = of.clone().next().map_or(0, |bag| bags.range(bag).start);
        let end = of.map(|bag| bags.range(bag).end).max().unwrap_or(0);
        let mut window = (NEAR_PLACES / runs).clamp(8, MAX_ROWS);
        match shape.bag_len() {
            // Whole bags.
            Some(bag_len) if (1..window).contains(&bag_len) => window -= window % bag_len,
            // The next bag is not the next in memory: what a window holds beyond a bag is hashed in vain.
            None if shape.feature_stride() > 0 => {
                window = window.min(shape.nnz.div_ceil(shape.num_bags).max(1));
            }
            _ => {}
        }
        // Little to look up needs little memory.
        window = window.min(end.saturating_sub(first).max(1));
        let len = runs * window + MAX_ROWS + ADD_AHEAD;
        Self {
            bags,
            window,
            places: vec![H::Place::default(); len],
            signs: vec![0; len],
            hashed: 0..0,
            positions: [0; MAX_ROWS],
            rows: 0,
            end,
        }
    }

    /// Takes rows off the front of the positions of a bag, as many as there are in the window; `None` when none are left.
    #[inline(always)]
    pub fn take(&mut self, positions: &mut Range<usize>) -> Option<Rows<'_, T, H>> {
        if positions.start >= positions.end {
            return None;
        }
        // A short bag is not cut in two: its first rows are hashed again with the rest.
        let is_short = positions.len() <= self.window / 4;
        let is_cut = is_short && positions.end > self.hashed.end;
        if is_cut || !self.hashed.contains(&positions.start) {
            self.hash(positions.start);
        }
        let until = positions.end.min(self.hashed.end);
        let (first, last) = (self.rows_before(positions.start), self.rows_before(until));
        positions.start = until;
        Some(Rows {
            bags: self.bags,
            places: &self.places[first..],
            signs: &self.signs[first..],
            stride: self.rows,
            positions: &self.positions[first..last],
        })
    }

    /// How many rows of the window stand before `position`.
    #[inline(always)]
    fn rows_before(&self, position: usize) -> usize {
        if self.rows == self.hashed.len() {
            position - self.hashed.start
        } else {
            self.positions[..self.rows].partition_point(|&other| other < position)
        }
    }

    /// Hashes the window from `start` on.
    #[inline(always)]
    fn hash(&mut self, start: usize) {
        let bags = self.bags;
        self.hashed = start..(start + self.window).min(self.end);
        self.rows = self.hashed.len();
        let mut rows = [0; MAX_ROWS];
        bags.rows(self.hashed.clone(), &mut rows[..self.rows]);
        for (i, position) in self.positions[..self.rows].iter_mut().enumerate() {
            *position = start + i;
        }
        if bags.lookup.table.padding_idx.is_some() {
            self.rows = 0;
            for i in 0..self.hashed.len() {
                (self.positions[self.rows], rows[self.rows]) = (self.positions[i], rows[i]);
                self.rows += usize::from(bags.counts(start + i));
            }
        }
        if self.rows > 0 {
            let len = bags.runs.len() * self.rows;
            let (places, signs) = (&mut self.places[..len], &mut self.signs[..len]);
            let rows = &rows[..self.rows];
            bags.hash.locate(rows, &bags.runs, places, signs);
            // What lets `Run::values` do without a test of its own. Places that are left from before passed it then.
            let last = places
                .iter()
                .fold(H::Place::default(), |last, &place| last.max(place));
            assert!(last <= bags.hash.last_place(), "a place past the last");
        }
    }
}
