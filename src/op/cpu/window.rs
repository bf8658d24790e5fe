//! Rows hashed a window at a time.
//!
//! Hashing needs nothing but rows, so the rows of many bags are hashed at once, in vectors, wherever they stand in
//! `indices`; padding is left out on the way. The loops behind see where blocks lie and nothing else: they are compiled
//! for no hash. They also see which blocks come next, and ask for their memory ahead.

use super::call::BagRows;
use super::lanes::{widest, Lanes, Loop};
use crate::bags::Bag;
use crate::hash::{Locate, MAX_ROWS};
use std::ops::Range;

/// So many places and their signs stay in the nearest cache.
const NEAR_PLACES: usize = 1 << 12;

/// How many rows before it is read a block is asked for. A processor that looks far ahead finds most misses by itself; one of
/// 2021 gains a quarter.
pub(super) const READ_AHEAD: usize = 6;

/// The same for a block that is added to, which waits longer for what others have written.
pub(super) const ADD_AHEAD: usize = 16;

/// The hashed rows of consecutive bags, a window at a time.
pub(super) struct Window<'a, H: Locate> {
    source: BagRows<'a>,
    hash: H,
    column_blocks: &'a [H::ColumnBlock],
    /// Rows per window.
    capacity: usize,
    /// Column block `b` of row `i` at `b * rows + i`, and enough behind it for the arrays of a [`Blocks`].
    places: Vec<H::Place>,
    signs: Vec<u32>,
    rows: usize,
    /// Where in `indices` the rows stand, for those who ask for it.
    positions: [usize; MAX_ROWS],
    notes_positions: bool,
    /// Which rows of the window are of which bag, in order; from `next_segment` on not yet taken.
    segments: Vec<Segment>,
    next_segment: usize,
    /// The length of bags that all have one, lie one behind the other, are of one feature and have no padding.
    plain_bag_len: Option<usize>,
    /// The first bag that is left to read, perhaps only some positions of it, and the number of the bag behind the last.
    next: Bag,
    unread_part: Option<Range<usize>>,
    end: usize,
}

/// Consecutive rows of a window that are of one bag.
struct Segment {
    bag: usize,
    rows: Range<usize>,
}

/// Rows of one bag.
pub(super) struct Rows<'a, P> {
    places: &'a [P],
    signs: &'a [u32],
    stride: usize,
    len: usize,
    /// Where in `indices` the rows stand.
    positions: &'a [usize; MAX_ROWS],
    first: usize,
}

/// Where one block of columns of each of some rows lies. Arrays, whatever the number of rows: so the loops, whose rows are at
/// most [`MAX_ROWS`], need no test of an index, for which there would be no registers.
pub(super) struct Blocks<'a, P> {
    places: &'a [P; MAX_ROWS + ADD_AHEAD],
    signs: &'a [u32; MAX_ROWS],
}

impl<P: Copy> Rows<'_, P> {
    /// How many; at most [`MAX_ROWS`].
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len.min(MAX_ROWS)
    }

    /// Where in `indices` row `i` stands; meaningless in a window that does not note it.
    #[inline(always)]
    pub fn position(&self, i: usize) -> usize {
        self.positions[self.first + i]
    }

    /// Column block `block` of each row.
    #[inline(always)]
    pub fn blocks(&self, block: usize) -> Blocks<'_, P> {
        let start = block * self.stride;
        let places = self.places[start..].first_chunk();
        let signs = self.signs[start..].first_chunk();
        let (Some(places), Some(signs)) = (places, signs) else {
            unreachable!("Window::new makes room behind the last row");
        };
        Blocks { places, signs }
    }
}

impl<P: Copy> Blocks<'_, P> {
    /// The place of row `i`; up to [`ADD_AHEAD`] rows past the last, some place.
    #[inline(always)]
    pub fn place(&self, i: usize) -> P {
        self.places[i]
    }

    /// A sign bit for each column of row `i`. Past the last row there is no promise that one exists.
    #[inline(always)]
    pub fn signs(&self, i: usize) -> u32 {
        self.signs[i]
    }
}

impl<'a, H: Locate> Window<'a, H> {
    pub fn new(
        source: BagRows<'a>,
        hash: H,
        column_blocks: &'a [H::ColumnBlock],
        bags: Range<usize>,
        notes_positions: bool,
    ) -> Self {
        let capacity = (NEAR_PLACES / column_blocks.len()).clamp(8, MAX_ROWS);
        // Little to look up needs little memory.
        let bag_len = source.lookup.bags.bag_len();
        // Offsets that are not checked may let bags overlap.
        let rows = bag_len.unwrap_or(source.nnz()).saturating_mul(bags.len());
        let len = column_blocks.len() * capacity.min(rows) + MAX_ROWS + ADD_AHEAD;
        Self {
            source,
            hash,
            column_blocks,
            capacity,
            places: vec![H::Place::default(); len],
            signs: vec![0; len],
            rows: 0,
            positions: [0; MAX_ROWS],
            notes_positions,
            segments: Vec::with_capacity(MAX_ROWS.min(bags.len())),
            next_segment: 0,
            plain_bag_len: source.plain_bag_len(),
            next: source.lookup.bags.bag(bags.start),
            unread_part: None,
            end: bags.end,
        }
    }

    /// The next rows of `bag`, as many as there are in the window; `None` when none are left. Bags are asked for in order.
    #[inline(always)]
    pub fn take(&mut self, bag: usize) -> Option<Rows<'_, H::Place>> {
        if self.is_taken() {
            // An unread bag that comes later says that this one has been read.
            if self.next.number > bag || self.is_read() {
                return None;
            }
            self.fill();
        }
        let Segment { bag: of, rows } = self.segments.get(self.next_segment)?;
        if *of != bag {
            return None;
        }
        self.next_segment += 1;
        Some(self.rows(rows))
    }

    /// The next rows, of whatever bag comes next; `None` when all are read.
    #[inline(always)]
    pub fn take_next(&mut self) -> Option<(usize, Rows<'_, H::Place>)> {
        while self.is_taken() {
            if self.is_read() {
                return None;
            }
            self.fill();
        }
        let Segment { bag, rows } = &self.segments[self.next_segment];
        self.next_segment += 1;
        Some((*bag, self.rows(rows)))
    }

    /// The most rows of a window.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether no bag is left to read.
    #[inline(always)]
    fn is_read(&self) -> bool {
        self.next.number >= self.end
    }

    /// Whether all rows of the window have been taken.
    #[inline(always)]
    pub fn is_taken(&self) -> bool {
        self.next_segment == self.segments.len()
    }

    #[inline(always)]
    fn rows(&self, rows: &Range<usize>) -> Rows<'_, H::Place> {
        Rows {
            places: &self.places[rows.start..],
            signs: &self.signs[rows.start..],
            stride: self.rows,
            len: rows.len(),
            positions: &self.positions,
            first: rows.start,
        }
    }

    /// Reads some indices of a feature as rows, but for padding, and notes their positions from number `first` on; returns how many.
    #[inline(always)]
    fn read(
        &mut self,
        feature: usize,
        positions: Range<usize>,
        rows: &mut [u64],
        first: usize,
    ) -> usize {
        let read = positions.len();
        self.source.read(feature, positions.clone(), rows);
        let noted = &mut self.positions[first..first + read];
        if self.source.lookup.table.padding_idx.is_none() {
            if self.notes_positions {
                for (to, position) in noted.iter_mut().zip(positions) {
                    *to = position;
                }
            }
            return read;
        }
        let mut n = 0;
        for (i, position) in positions.enumerate() {
            (rows[n], noted[n]) = (rows[i], position);
            n += usize::from(self.source.counts(position));
        }
        n
    }

    /// Reads the next window, of so many indices, and hashes its rows.
    #[inline(never)]
    fn fill(&mut self) {
        self.segments.clear();
        self.next_segment = 0;
        let mut rows = [0; MAX_ROWS];
        // Rows, and how many more indices may be read.
        let (mut n, mut room) = (0, self.capacity);
        while room > 0 && !self.is_read() {
            let bag = self.next.number;
            if let Some(bag_len) = self.plain_bag_len {
                // Bags of one length lie one behind the other and are read at once.
                let bags = (room / bag_len).min(self.end - bag);
                if bags > 0 {
                    let (start, read) = (bag * bag_len, bags * bag_len);
                    let segments = (bag..bag + bags).zip((n..).step_by(bag_len));
                    self.segments.extend(segments.map(|(bag, first)| Segment {
                        bag,
                        rows: first..first + bag_len,
                    }));
                    n += self.read(0, start..start + read, &mut rows[n..], n);
                    self.next = self.source.lookup.bags.bag(bag + bags);
                    room -= read;
                    continue;
                }
            }
            let positions = match self.unread_part.take() {
                Some(part) => part,
                None => self.source.range(self.next),
            };
            if positions.len() > room && room < self.capacity {
                // Only a bag longer than a window is cut: the sums of others stay in registers.
                self.unread_part = Some(positions);
                break;
            }
            let end = positions.start + positions.len().min(room);
            room -= end - positions.start;
            let first = n;
            n += self.read(
                self.next.feature,
                positions.start..end,
                &mut rows[first..],
                first,
            );
            if n > first {
                self.segments.push(Segment {
                    bag,
                    rows: first..n,
                });
            }
            if end < positions.end {
                self.unread_part = Some(end..positions.end);
            } else {
                self.next = self.source.lookup.bags.after(self.next);
            }
        }
        self.rows = n;
        if n > 0 {
            let len = self.column_blocks.len() * n;
            widest(Hashing {
                hash: &self.hash,
                rows: &rows[..n],
                column_blocks: self.column_blocks,
                places: &mut self.places[..len],
                signs: &mut self.signs[..len],
            });
        }
    }
}

/// Hashes the rows of a window.
struct Hashing<'a, H: Locate> {
    hash: &'a H,
    rows: &'a [u64],
    column_blocks: &'a [H::ColumnBlock],
    places: &'a mut [H::Place],
    signs: &'a mut [u32],
}

impl<H: Locate> Loop for Hashing<'_, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        self.hash
            .locate(self.rows, self.column_blocks, self.places, self.signs);
        // What lets `Block::values` do without a test of its own. Places that are left from before passed it then.
        let last = self
            .places
            .iter()
            .fold(H::Place::default(), |last, &place| last.max(place));
        assert!(last <= self.hash.last_place(), "a place past the last");
    }
}
