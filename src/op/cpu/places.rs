//! The rows of bags, hashed a window at a time.
//!
//! Hashing needs nothing but indices, so the rows of many bags are hashed at once, in vectors, and padding is left out on
//! the way: the loops behind see places and nothing else. (Nothing is prefetched: a processor that looks far ahead finds
//! the cache misses by itself, and was never faster for being told.)

use super::{Bags, Element};
use crate::hash::{Locate, Place, MAX_ROWS};
use std::ops::Range;

/// So many places stay in the nearest cache.
const NEAR_PLACES: usize = 1 << 12;

/// The places of rows by position, for bags in the order of their positions; out of order is right too, only slower.
pub(super) struct Places<'a, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    /// Rows per window.
    window: usize,
    /// Block `run` of row `i` at `run * rows + i`.
    places: Vec<Place>,
    /// The positions of the window, and which of them are no padding.
    hashed: Range<usize>,
    positions: [usize; MAX_ROWS],
    rows: usize,
    /// No position from here on will be asked for.
    end: usize,
}

/// Rows of one bag.
pub(super) struct Rows<'a> {
    places: &'a [Place],
    stride: usize,
    /// Where in `indices` the rows stand.
    pub positions: &'a [usize],
}

impl Rows<'_> {
    /// The places of block `run` of each row.
    #[inline(always)]
    pub fn run(&self, run: usize) -> &[Place] {
        &self.places[run * self.stride..][..self.positions.len()]
    }
}

impl<'a, T: Element, H: Locate> Places<'a, T, H> {
    /// The places of the rows of these bags.
    pub fn new(bags: &'a Bags<'a, T, H>, of: Range<usize>) -> Self {
        let (runs, shape) = (bags.runs.len(), &bags.lookup.bags);
        let mut window = (NEAR_PLACES / runs).clamp(8, MAX_ROWS);
        if shape.feature_stride() > 0 {
            // The next bag is not the next in memory: what a window holds beyond a bag is hashed in vain.
            window = window.min(shape.nnz.div_ceil(shape.num_bags).max(1));
        }
        Self {
            bags,
            window,
            places: vec![0; runs * window],
            hashed: 0..0,
            positions: [0; MAX_ROWS],
            rows: 0,
            end: of.map(|bag| bags.range(bag).end).max().unwrap_or(0),
        }
    }

    /// Takes rows off the front of the positions of a bag, as many as there are in the window; `None` when none are left.
    #[inline(always)]
    pub fn take(&mut self, positions: &mut Range<usize>) -> Option<Rows<'_>> {
        if positions.start >= positions.end {
            return None;
        }
        if !self.hashed.contains(&positions.start) {
            self.hash(positions.start);
        }
        let until = positions.end.min(self.hashed.end);
        let (first, last) = (self.rows_before(positions.start), self.rows_before(until));
        positions.start = until;
        Some(Rows {
            places: &self.places[first..],
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
            let places = &mut self.places[..bags.runs.len() * self.rows];
            bags.hash.locate(&rows[..self.rows], &bags.runs, places);
        }
    }
}
