//! The forward pass over a `hashed_weight` in 8 or 4 bits, whose sums are exact: they are sums of integers.
//!
//! Every slot holds a *level*, a byte, from which its value follows; with a negative sign it is the highest level minus that.
//!
//! | | level | highest | value |
//! |---|---|---|---|
//! | 8 bits | `u` | 255 | `(2 * level - 255) * unit` |
//! | 4 bits | `((2u - 15) << (3 - shift)) + 120` | 240 | `(level - 120) * unit` |
//!
//! Columns are pooled in groups of 32, which are one block, a part of one or several short ones. The levels of a group are added as
//! 16-bit integers: those of 257 rows fit, and a window has at most 256. A bag that is longer than a window is summed in 64 bits.
//!
//! Blocks that have no vector loop, such as those of affine hashes, which may start anywhere, are pooled level by level.

use super::call::HashedRows;
use super::forward::pooled_rows;
use super::lanes::{prefetch, Lanes, Loop, Portable, Wide};
use super::window::{Blocks, Rows, READ_AHEAD};
use super::{slice, with_rows};
use crate::error::bail;
use crate::hash::{Locate, Located, MAX_ROWS};
use crate::low_bit::{shift_of, Bits, LowBit, GROUP as SHIFT_GROUP};
use crate::op::{Lookup, Mode, Operands, View};
use candle_core::{CpuStorage, Result, WithDType};
use std::mem::MaybeUninit;

/// Columns that are pooled together.
const GROUP: usize = 32;

// Sums of a window in 16 bits do not overflow.
const _: () = assert!(MAX_ROWS * 255 <= u16::MAX as usize);

/// `(num_bags, embedding_dim)` in f32. `shifts` are those of the table of the lookup.
pub(super) fn forward(
    lookup: &Lookup,
    low_bit: &LowBit,
    shifts: Option<View<CpuStorage>>,
    operands: &Operands<CpuStorage>,
) -> Result<CpuStorage> {
    let packed: &[u8] = slice(operands.hashed_weight)?;
    match (low_bit.bits(), shifts) {
        (Bits::Eight, _) => by_hash(Bytes { packed }, lookup, low_bit, operands),
        (Bits::Four, Some(shifts)) => {
            let shifts = slice(shifts)?;
            by_hash(Nibbles { packed, shifts }, lookup, low_bit, operands)
        }
        (Bits::Four, None) => bail!("4 bits need a hashed_weight_shift"),
    }
}

fn by_hash<S: Stored>(
    stored: S,
    lookup: &Lookup,
    low_bit: &LowBit,
    operands: &Operands<CpuStorage>,
) -> Result<CpuStorage> {
    with_rows(lookup, |hash| match hash {
        Located::Blocks(hash) => run(stored, lookup, hash, low_bit, operands),
        Located::Starts(hash) => run(stored, lookup, hash, low_bit, operands),
    })
}

fn run<S: Stored, H: Locate>(
    stored: S,
    lookup: &Lookup,
    hash: H,
    low_bit: &LowBit,
    operands: &Operands<CpuStorage>,
) -> Result<CpuStorage> {
    let call = &Call {
        hashed: HashedRows::new(lookup, hash, operands, stored.len())?,
        stored,
        unit: low_bit.unit(),
        per_sample_weights: operands.per_sample_weights.map(slice).transpose()?,
    };
    let pool = |first, output: &mut [_]| pool_bags(call, first, output);
    // SAFETY: a `Pool` writes all of its output.
    let output = unsafe { pooled_rows(&call.hashed, pool)? };
    Ok(f32::to_cpu_storage_owned(output))
}

/// Inputs of one lookup as CPU slices, with what is computed once per call.
struct Call<'a, S, H: Locate> {
    hashed: HashedRows<'a, H>,
    stored: S,
    unit: f32,
    per_sample_weights: Option<&'a [f32]>,
}

/// The packed `hashed_weight`, as levels.
trait Stored: Copy + Sync {
    /// `value = (FACTOR * level - OFFSET) * unit`
    const FACTOR: i32;
    const OFFSET: i32;

    /// The number of slots.
    fn len(self) -> usize;

    /// The address of a slot, which need not exist.
    fn address(self, slot: usize) -> *const u8;

    /// The level of a slot, with a sign.
    fn level(self, slot: usize, is_negative: bool) -> u8;

    /// The levels of `PARTS` times `32 / PARTS` consecutive slots, with bit `i` of `signs` for the sign of level `i`.
    ///
    /// # Safety
    /// So many slots exist from each of `starts` on, which are multiples of `32 / PARTS`.
    unsafe fn levels<const PARTS: usize, L: Lanes>(
        self,
        lanes: L,
        starts: [usize; PARTS],
        signs: u32,
    ) -> [u8; GROUP];
}

/// 8 bits.
#[derive(Clone, Copy)]
struct Bytes<'a> {
    packed: &'a [u8],
}

impl Stored for Bytes<'_> {
    const FACTOR: i32 = 2;
    const OFFSET: i32 = 255;

    fn len(self) -> usize {
        Bits::Eight.len(self.packed.len())
    }

    #[inline(always)]
    fn address(self, slot: usize) -> *const u8 {
        self.packed.as_ptr().wrapping_add(slot)
    }

    #[inline(always)]
    fn level(self, slot: usize, is_negative: bool) -> u8 {
        self.packed[slot] ^ u8::from(is_negative).wrapping_neg()
    }

    #[inline(always)]
    unsafe fn levels<const PARTS: usize, L: Lanes>(
        self,
        lanes: L,
        starts: [usize; PARTS],
        signs: u32,
    ) -> [u8; GROUP] {
        let mut bytes = [0; GROUP];
        let parts = bytes.chunks_exact_mut(const { GROUP / PARTS });
        for (part, start) in parts.zip(starts) {
            // SAFETY: the caller promises that they exist.
            part.copy_from_slice(unsafe { self.packed.get_unchecked(start..start + part.len()) });
        }
        lanes.flip32(&bytes, signs, 255)
    }
}

/// 4 bits.
#[derive(Clone, Copy)]
struct Nibbles<'a> {
    packed: &'a [u8],
    /// As many as the packed bytes need, see [`LowBit`].
    shifts: &'a [u8],
}

/// The level of each nibble, by shift.
const LEVELS: [[u8; 16]; 4] = {
    let mut levels = [[0; 16]; 4];
    let mut i = 0;
    while i < 64 {
        let (shift, nibble) = (i / 16, i % 16);
        levels[shift][nibble] = (120 + ((2 * nibble as i32 - 15) << (3 - shift))) as u8;
        i += 1;
    }
    levels
};

impl Stored for Nibbles<'_> {
    const FACTOR: i32 = 1;
    const OFFSET: i32 = 120;

    fn len(self) -> usize {
        Bits::Four.len(self.packed.len())
    }

    #[inline(always)]
    fn address(self, slot: usize) -> *const u8 {
        self.packed.as_ptr().wrapping_add(slot / 2)
    }

    #[inline(always)]
    fn level(self, slot: usize, is_negative: bool) -> u8 {
        let nibble = self.packed[slot / 2] >> (4 * (slot % 2)) & 15;
        let nibble = nibble ^ u8::from(is_negative).wrapping_neg() & 15;
        LEVELS[usize::from(shift_of(self.shifts, slot))][usize::from(nibble)]
    }

    #[inline(always)]
    unsafe fn levels<const PARTS: usize, L: Lanes>(
        self,
        lanes: L,
        starts: [usize; PARTS],
        signs: u32,
    ) -> [u8; GROUP] {
        let mut bytes = [0; GROUP / 2];
        let parts = bytes.chunks_exact_mut(const { GROUP / 2 / PARTS });
        for (part, start) in parts.zip(starts) {
            let start = start / 2;
            // SAFETY: the caller promises that they exist.
            part.copy_from_slice(unsafe { self.packed.get_unchecked(start..start + part.len()) });
        }
        let nibbles = lanes.flip32(&lanes.nibbles32(&bytes), signs, 15);
        // Eight slots or more that start at a multiple of their number share a shift.
        // SAFETY: there is a byte of shifts for each 128 slots, and the slots exist.
        let shift = |start: usize| unsafe {
            let group = start / SHIFT_GROUP;
            self.shifts.get_unchecked(group / 4) >> (2 * (group % 4)) & 3
        };
        let table = |start: usize| &LEVELS[usize::from(shift(start))];
        let look_up = |low: usize, high: usize| {
            lanes.look_up32(&nibbles, [table(starts[low]), table(starts[high])])
        };
        let mut levels = look_up(0, PARTS / 2);
        if PARTS == 4 {
            // Each half of the nibbles is of two blocks.
            let of_others = look_up(1, PARTS - 1);
            for (i, (level, other)) in levels.iter_mut().zip(of_others).enumerate() {
                if i / 8 % 2 == 1 {
                    *level = other;
                }
            }
        }
        levels
    }
}

/// Pools the bags from `first` on into the rows of `output`, and writes all of it.
fn pool_bags<S: Stored, H: Locate>(
    call: &Call<S, H>,
    first: usize,
    output: &mut [MaybeUninit<f32>],
) {
    macro_rules! pool {
        ($lanes:ident, $block:literal) => {
            $lanes.run(Pool::<$block, _, _> {
                call,
                first,
                output,
            })
        };
    }
    // Constant, so that no vector loop is compiled for hashes whose blocks start anywhere. AVX-512 was measured to gain 10 % at best,
    // which is not worth as many loops again in every build.
    if const { H::SIGNED } {
        if let Some(lanes) = Wide::detect() {
            match call.hashed.hash.block() {
                8 => return pool!(lanes, 8),
                16 => return pool!(lanes, 16),
                block if block.is_multiple_of(32) => return pool!(lanes, 32),
                _ => {}
            }
        }
    }
    pool!(Portable, 0)
}

/// The loop for blocks of `BLOCK` columns, or of a multiple if that is 32; 0 stands for all others.
struct Pool<'a, const BLOCK: usize, S, H: Locate> {
    call: &'a Call<'a, S, H>,
    first: usize,
    output: &'a mut [MaybeUninit<f32>],
}

impl<const BLOCK: usize, S: Stored, H: Locate> Loop for Pool<'_, BLOCK, S, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let call = self.call;
        match call.hashed.mode() {
            Mode::Max => self.pool::<Max, _>(lanes),
            Mode::Sum if call.per_sample_weights.is_some() => self.pool::<Weighted, _>(lanes),
            Mode::Sum | Mode::Mean => self.pool::<Sum, _>(lanes),
        }
    }
}

impl<const BLOCK: usize, S: Stored, H: Locate> Pool<'_, BLOCK, S, H> {
    #[inline(always)]
    fn pool<P: Pooling, L: Lanes>(self, lanes: L) {
        let (call, embedding_dim) = (self.call, self.call.hashed.embedding_dim());
        let last = self.first + self.output.len() / embedding_dim;
        let is_weighted = call.per_sample_weights.is_some();
        let mut window = call.hashed.window_noting(self.first..last, is_weighted);
        // The sums of one window, and of a longer bag those of the windows before it.
        let mut pooled = vec![P::Column::default(); embedding_dim.next_multiple_of(GROUP)];
        let mut totals = vec![];
        for (bag, output) in (self.first..last).zip(self.output.chunks_exact_mut(embedding_dim)) {
            let mut count = 0;
            totals.clear();
            while let Some(rows) = window.take(bag) {
                if count > 0 && !P::CONTINUES {
                    P::add_to(&mut totals, &pooled);
                }
                let is_new = count == 0 || !P::CONTINUES;
                pool_rows::<BLOCK, P, _, _, _>(lanes, call, &rows, is_new, &mut pooled);
                count += rows.len();
            }
            let (factor, offset) = (i64::from(S::FACTOR), i64::from(S::OFFSET));
            let values = Values {
                factor,
                offset: offset * count as i64,
                unit: match call.hashed.mode() {
                    Mode::Mean => call.unit / count as f32,
                    Mode::Sum | Mode::Max => call.unit,
                },
            };
            if count == 0 {
                output.fill(MaybeUninit::new(0.0));
            } else if totals.is_empty() {
                P::write::<S>(&pooled, &values, output);
            } else {
                P::add_to(&mut totals, &pooled);
                for (output, &total) in output.iter_mut().zip(&totals) {
                    output.write(values.of_sum(total));
                }
            }
        }
    }
}

/// What turns the sum of the levels of a bag into its value.
struct Values {
    factor: i64,
    /// That of all rows of the bag.
    offset: i64,
    unit: f32,
}

impl Values {
    #[inline(always)]
    fn of_sum(&self, sum: i64) -> f32 {
        (self.factor * sum - self.offset) as f32 * self.unit
    }
}

/// How levels become one value: an interface to the loops.
trait Pooling {
    /// What a group of 32 columns is pooled in.
    type State: Copy;
    /// What one of them is pooled to.
    type Column: Copy + Default;

    /// Whether rows are pooled into what the window before left of the bag; if not, that is added to totals first.
    const CONTINUES: bool;

    const IS_WEIGHTED: bool;

    /// With no row yet, or with those that are pooled already.
    fn start(pooled: Option<&[Self::Column; GROUP]>) -> Self::State;
    fn row<S: Stored, L: Lanes>(
        lanes: L,
        state: &mut Self::State,
        levels: &[u8; GROUP],
        weight: f32,
    );
    fn end(state: &Self::State) -> [Self::Column; GROUP];

    /// [`row`](Self::row) for one column.
    fn one<S: Stored>(pooled: Option<Self::Column>, level: u8, weight: f32) -> Self::Column;

    /// Adds the sums of a window to the totals of a bag, which are empty at first; nothing where windows continue each other.
    fn add_to(_totals: &mut Vec<i64>, _pooled: &[Self::Column]) {}

    /// Writes the value of each column.
    fn write<S: Stored>(pooled: &[Self::Column], values: &Values, output: &mut [MaybeUninit<f32>]);
}

struct Sum;

impl Pooling for Sum {
    /// See [`Lanes::add_pairs`].
    type State = ([u16; GROUP / 2], [u16; GROUP / 2]);
    type Column = u16;
    const CONTINUES: bool = false;
    const IS_WEIGHTED: bool = false;

    #[inline(always)]
    fn start(_: Option<&[u16; GROUP]>) -> Self::State {
        Default::default()
    }

    #[inline(always)]
    fn row<S: Stored, L: Lanes>(
        lanes: L,
        (pairs, uppers): &mut Self::State,
        levels: &[u8; GROUP],
        _: f32,
    ) {
        lanes.add_pairs(pairs, uppers, levels);
    }

    #[inline(always)]
    fn end((pairs, uppers): &Self::State) -> [u16; GROUP] {
        let mut sums = [0; GROUP];
        for i in 0..GROUP / 2 {
            sums[2 * i] = pairs[i].wrapping_sub(uppers[i] << 8);
            sums[2 * i + 1] = uppers[i];
        }
        sums
    }

    #[inline(always)]
    fn one<S: Stored>(pooled: Option<u16>, level: u8, _: f32) -> u16 {
        pooled.unwrap_or(0).wrapping_add(level.into())
    }

    #[inline(never)]
    fn add_to(totals: &mut Vec<i64>, pooled: &[u16]) {
        totals.resize(pooled.len(), 0);
        for (total, &sum) in totals.iter_mut().zip(pooled) {
            *total += i64::from(sum);
        }
    }

    #[inline(always)]
    fn write<S: Stored>(pooled: &[u16], values: &Values, output: &mut [MaybeUninit<f32>]) {
        // Of at most 256 rows, so that 32 bits are enough.
        let offset = values.offset as i32;
        for (output, &sum) in output.iter_mut().zip(pooled) {
            output.write((S::FACTOR * i32::from(sum) - offset) as f32 * values.unit);
        }
    }
}

/// The larger level has the larger value.
struct Max;

impl Pooling for Max {
    type State = [u8; GROUP];
    type Column = u8;
    const CONTINUES: bool = true;
    const IS_WEIGHTED: bool = false;

    #[inline(always)]
    fn start(pooled: Option<&[u8; GROUP]>) -> Self::State {
        pooled.copied().unwrap_or_default()
    }

    #[inline(always)]
    fn row<S: Stored, L: Lanes>(_: L, state: &mut Self::State, levels: &[u8; GROUP], _: f32) {
        for (most, &level) in state.iter_mut().zip(levels) {
            *most = level.max(*most);
        }
    }

    #[inline(always)]
    fn end(state: &Self::State) -> [u8; GROUP] {
        *state
    }

    #[inline(always)]
    fn one<S: Stored>(pooled: Option<u8>, level: u8, _: f32) -> u8 {
        pooled.unwrap_or(0).max(level)
    }

    #[inline(always)]
    fn write<S: Stored>(pooled: &[u8], values: &Values, output: &mut [MaybeUninit<f32>]) {
        for (output, &most) in output.iter_mut().zip(pooled) {
            output.write((S::FACTOR * i32::from(most) - S::OFFSET) as f32 * values.unit);
        }
    }
}

/// The sum of levels times per-sample weights, in f32.
struct Weighted;

impl Pooling for Weighted {
    type State = [f32; GROUP];
    type Column = f32;
    const CONTINUES: bool = true;
    const IS_WEIGHTED: bool = true;

    #[inline(always)]
    fn start(pooled: Option<&[f32; GROUP]>) -> Self::State {
        pooled.copied().unwrap_or_default()
    }

    #[inline(always)]
    fn row<S: Stored, L: Lanes>(_: L, state: &mut Self::State, levels: &[u8; GROUP], weight: f32) {
        for (sum, &level) in state.iter_mut().zip(levels) {
            *sum += weight * (S::FACTOR * i32::from(level) - S::OFFSET) as f32;
        }
    }

    #[inline(always)]
    fn end(state: &Self::State) -> [f32; GROUP] {
        *state
    }

    #[inline(always)]
    fn one<S: Stored>(pooled: Option<f32>, level: u8, weight: f32) -> f32 {
        let value = (S::FACTOR * i32::from(level) - S::OFFSET) as f32;
        pooled.unwrap_or(0.0) + weight * value
    }

    #[inline(always)]
    fn write<S: Stored>(pooled: &[f32], values: &Values, output: &mut [MaybeUninit<f32>]) {
        for (output, &sum) in output.iter_mut().zip(pooled) {
            output.write(sum * values.unit);
        }
    }
}

/// Pools rows of one bag, at most a window, into the columns of `pooled`.
#[inline(always)]
fn pool_rows<const BLOCK: usize, P: Pooling, S: Stored, H: Locate, L: Lanes>(
    lanes: L,
    call: &Call<S, H>,
    rows: &Rows<H::Place>,
    is_new: bool,
    pooled: &mut [P::Column],
) {
    if const { BLOCK == 0 } {
        return pool_blocks::<P, _, _>(call, rows, is_new, pooled);
    }
    let groups = pooled.as_chunks_mut::<GROUP>().0;
    let mut first = 0;
    // The sums of two groups stay in registers.
    if const { !P::IS_WEIGHTED } {
        while first + 2 <= groups.len() {
            let pooled = &mut groups[first..first + 2];
            pool_block_groups::<BLOCK, 2, P, _, _, _>(lanes, call, rows, first, is_new, pooled);
            first += 2;
        }
    }
    while first < groups.len() {
        let pooled = &mut groups[first..first + 1];
        pool_block_groups::<BLOCK, 1, P, _, _, _>(lanes, call, rows, first, is_new, pooled);
        first += 1;
    }
}

/// [`pool_groups`] with as many blocks per group as BLOCK asks for.
#[inline(always)]
fn pool_block_groups<
    const BLOCK: usize,
    const N: usize,
    P: Pooling,
    S: Stored,
    H: Locate,
    L: Lanes,
>(
    lanes: L,
    call: &Call<S, H>,
    rows: &Rows<H::Place>,
    first: usize,
    is_new: bool,
    pooled: &mut [[P::Column; GROUP]],
) {
    if const { BLOCK == 8 } {
        pool_groups::<BLOCK, 4, N, P, _, _, _>(lanes, call, rows, first, is_new, pooled);
    } else if const { BLOCK == 16 } {
        pool_groups::<BLOCK, 2, N, P, _, _, _>(lanes, call, rows, first, is_new, pooled);
    } else {
        pool_groups::<BLOCK, 1, N, P, _, _, _>(lanes, call, rows, first, is_new, pooled);
    }
}

/// Pools N groups of columns from group `first` on, each of `PARTS` blocks, or of a part of one.
#[inline(always)]
fn pool_groups<
    const BLOCK: usize,
    const PARTS: usize,
    const N: usize,
    P: Pooling,
    S: Stored,
    H: Locate,
    L: Lanes,
>(
    lanes: L,
    call: &Call<S, H>,
    rows: &Rows<H::Place>,
    first: usize,
    is_new: bool,
    pooled: &mut [[P::Column; GROUP]],
) {
    // Copies, which stay in registers.
    let (stored, hash) = (call.stored, call.hashed.hash);
    let (block, part) = (call.block::<BLOCK>(), GROUP / PARTS);
    let last_block = call.hashed.column_blocks.len() - 1;
    // Of the last group some columns may not exist; another block of the row takes their place.
    let locate = |group: usize, part_of: usize| -> (Blocks<H::Place>, usize) {
        let column = (first + group) * GROUP + part_of * part;
        let column_block = (column / block).min(last_block);
        (rows.blocks(column_block), column % block)
    };
    let blocks: [[_; PARTS]; N] =
        std::array::from_fn(|group| std::array::from_fn(|part_of| locate(group, part_of)));
    let mut states: [P::State; N] = std::array::from_fn(|group| {
        let pooled = (!is_new).then_some(&pooled[group]);
        P::start(pooled)
    });
    for i in 0..rows.len() {
        let weight = if P::IS_WEIGHTED {
            call.sample_weight(rows, i)
        } else {
            1.0
        };
        for (state, blocks) in states.iter_mut().zip(&blocks) {
            let (mut starts, mut signs) = ([0; PARTS], 0);
            for (part_of, (blocks, within)) in blocks.iter().enumerate() {
                starts[part_of] = hash.slot(blocks.place(i), block) + within;
                let part_signs = if H::SIGNED { blocks.signs(i) } else { 0 };
                signs |= (part_signs & (u32::MAX >> (32 - part))) << (part_of * part);
                let ahead = hash.slot(blocks.place(i + READ_AHEAD), block) + within;
                prefetch(stored.address(ahead));
            }
            // SAFETY: `Window::fill` found every place to be one of the hash of this call, whose blocks `HashedRows::new` found
            // to lie in `hashed_weight`. A part of a block of a multiple of its length starts at a multiple of that.
            let levels = unsafe { stored.levels::<PARTS, _>(lanes, starts, signs) };
            P::row::<S, _>(lanes, state, &levels, weight);
        }
    }
    for (pooled, state) in pooled.iter_mut().zip(&states) {
        *pooled = P::end(state);
    }
}

/// Pools blocks of any length, that start anywhere.
#[inline(always)]
fn pool_blocks<P: Pooling, S: Stored, H: Locate>(
    call: &Call<S, H>,
    rows: &Rows<H::Place>,
    is_new: bool,
    pooled: &mut [P::Column],
) {
    let block = call.hashed.hash.block();
    let pooled = &mut pooled[..call.hashed.embedding_dim()];
    for (column_block, pooled) in pooled.chunks_mut(block).enumerate() {
        let blocks = rows.blocks(column_block);
        for i in 0..rows.len() {
            let (slot, signs) = call.hashed.locate(&blocks, i, block);
            let weight = call.sample_weight(rows, i);
            for (column, pooled) in pooled.iter_mut().enumerate() {
                // Only blocks of up to 32 columns have signs.
                let is_negative = u64::from(signs) >> column.min(32) & 1 == 1;
                let level = call.stored.level(slot + column, is_negative);
                let before = (i > 0 || !is_new).then_some(*pooled);
                *pooled = P::one::<S>(before, level, weight);
            }
        }
    }
}

impl<S: Stored, H: Locate> Call<'_, S, H> {
    /// The length of a block, a constant if it is 8 or 16.
    #[inline(always)]
    fn block<const BLOCK: usize>(&self) -> usize {
        match BLOCK {
            8 | 16 => BLOCK,
            _ => self.hashed.hash.block(),
        }
    }

    /// The per-sample weight of row `i`; anything where there are none.
    #[inline(always)]
    fn sample_weight(&self, rows: &Rows<H::Place>, i: usize) -> f32 {
        match self.per_sample_weights {
            Some(weights) => weights[rows.position(i)],
            None => 1.0,
        }
    }
}
