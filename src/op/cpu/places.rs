//! Hashing rows ahead of their use, so that the blocks they name are in the cache when their turn comes.
//!
//! What a lookup costs on a CPU is the hash and the cache misses. The hash of a row needs nothing but its index, so a
//! window of rows is hashed at once, in vectors, and every block is prefetched; by the time the window is summed, the next
//! one is on its way. (The vectors are what pays. A processor that looks far ahead finds the misses by itself: on the one in
//! benches/README.md, prefetching 4 MB of weights made no difference.)

use super::{Bags, Element};
use crate::hash::{Locate, Place};
use std::ops::Range;

/// How many blocks are on their way at least: enough to hide a trip to memory, few enough for the nearest cache.
const BLOCKS_AHEAD: usize = 64;

/// A `hashed_weight` of at most so many bytes is near anyway.
const NEAR_BYTES: usize = 1 << 19;

/// The places of rows by position, in the order of positions; out of order is right too, only slower.
pub(super) struct Places<'a, T, H: Locate> {
    bags: &'a Bags<'a, T, H>,
    /// Two windows of `window` rows: position `p` stands in row `p % (2 * window)`.
    places: Vec<Place>,
    window: usize,
    /// The positions whose places are there.
    hashed: Range<usize>,
    /// No position from here on will be asked for.
    end: usize,
    prefetches: bool,
}

impl<'a, T: Element, H: Locate> Places<'a, T, H> {
    /// The places of the rows of these bags.
    #[inline(always)]
    pub fn new(bags: &'a Bags<'a, T, H>, of: Range<usize>) -> Self {
        let runs = bags.runs.len();
        let end = of.map(|bag| bags.range(bag).end).max().unwrap_or(0);
        let shape = &bags.lookup.bags;
        let mut window = (BLOCKS_AHEAD / runs).max(1);
        if shape.feature_stride() > 0 {
            // The next bag is not the next in memory: what a window holds beyond a bag is hashed in vain.
            window = window.min(shape.nnz.div_ceil(shape.num_bags).max(1));
        }
        Self {
            bags,
            places: vec![0; 2 * window * runs],
            window,
            hashed: 0..0,
            end,
            prefetches: size_of_val(bags.hashed_weight) > NEAR_BYTES,
        }
    }

    /// The places of the blocks of the row at `position`.
    #[inline(always)]
    pub fn of(&mut self, position: usize) -> &[Place] {
        let rows = 2 * self.window;
        if !self.hashed.contains(&position) {
            // Windows start at multiples of their length, so that none wraps around.
            let start = position / self.window * self.window;
            self.hashed = start..start;
            self.hash_window();
        }
        if position + self.window >= self.hashed.end && self.hashed.end < self.end {
            self.hash_window();
        }
        let runs = self.bags.runs.len();
        let start = position % rows * runs;
        &self.places[start..start + runs]
    }

    /// Hashes the next window of rows and prefetches what they name.
    #[inline(always)]
    fn hash_window(&mut self) {
        let (bags, runs) = (self.bags, self.bags.runs.len());
        let next = self.hashed.end;
        let until = (next + self.window).min(self.end);
        let start = next % (2 * self.window);
        let rows = (next..until).map(|position| bags.row(position));
        let places = &mut self.places[start * runs..(start + until - next) * runs];
        bags.hash.locate(rows, &bags.runs, places);
        if self.prefetches {
            let block = bags.hash.block();
            for &place in places.iter() {
                prefetch(bags.hashed_weight, bags.hash.slot(place, block), block);
            }
        }
        // What this window was written over is gone.
        let oldest = until.saturating_sub(2 * self.window);
        self.hashed = self.hashed.start.max(oldest)..until;
    }
}

/// Asks for the cache lines of a block of `values`; `start` may lie outside of them, even below zero.
#[inline(always)]
pub(super) fn prefetch<T>(values: &[T], start: usize, len: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        let line = |i: usize| values.as_ptr().wrapping_add(i).cast::<i8>();
        // SAFETY: a prefetch is a hint; it reads nothing and cannot fault, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line(start)) };
        if len > 1 {
            // Blocks are not aligned to lines: the last value may lie in the next.
            // SAFETY: as above.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line(start.wrapping_add(len - 1))) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, start, len);
}
