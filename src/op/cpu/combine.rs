//! How the values of a block enter the row that they are pooled into: added, or compared.

use super::lanes::{raise_noting, Lanes};
use super::scalar::{Accumulator, Scalar};
use half::{bf16, f16};

/// A dtype of sums, with its operations on lanes.
pub(super) trait Vector: Accumulator {
    fn add16<L: Lanes>(lanes: L, sums: &mut [Self; 16], values: &[Self; 16], signs: u32);
    fn add8<L: Lanes>(lanes: L, sums: &mut [Self; 8], values: &[Self; 8], signs: u32);
    fn max16<L: Lanes>(lanes: L, sums: &mut [Self; 16], values: &[Self; 16], signs: u32);
    fn max8<L: Lanes>(lanes: L, sums: &mut [Self; 8], values: &[Self; 8], signs: u32);
    fn arg_max8<L: Lanes>(
        lanes: L,
        sums: &mut [Self; 8],
        rows: &mut [u32; 8],
        values: &[Self; 8],
        signs: u32,
        row: u32,
    );
}

impl Vector for f32 {
    #[inline(always)]
    fn add16<L: Lanes>(lanes: L, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
        lanes.add16(sums, values, signs);
    }

    #[inline(always)]
    fn add8<L: Lanes>(lanes: L, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
        lanes.add8(sums, values, signs);
    }

    #[inline(always)]
    fn max16<L: Lanes>(lanes: L, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
        lanes.max16(sums, values, signs);
    }

    #[inline(always)]
    fn max8<L: Lanes>(lanes: L, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
        lanes.max8(sums, values, signs);
    }

    #[inline(always)]
    fn arg_max8<L: Lanes>(
        lanes: L,
        sums: &mut [f32; 8],
        rows: &mut [u32; 8],
        values: &[f32; 8],
        signs: u32,
        row: u32,
    ) {
        lanes.arg_max8(sums, rows, values, signs, row);
    }
}

/// In f64 the loops are left to the compiler.
impl Vector for f64 {
    #[inline(always)]
    fn add16<L: Lanes>(_: L, sums: &mut [f64; 16], values: &[f64; 16], signs: u32) {
        add(sums, values, signs);
    }

    #[inline(always)]
    fn add8<L: Lanes>(_: L, sums: &mut [f64; 8], values: &[f64; 8], signs: u32) {
        add(sums, values, signs);
    }

    #[inline(always)]
    fn max16<L: Lanes>(_: L, sums: &mut [f64; 16], values: &[f64; 16], signs: u32) {
        raise(sums, values, signs);
    }

    #[inline(always)]
    fn max8<L: Lanes>(_: L, sums: &mut [f64; 8], values: &[f64; 8], signs: u32) {
        raise(sums, values, signs);
    }

    #[inline(always)]
    fn arg_max8<L: Lanes>(
        _: L,
        sums: &mut [f64; 8],
        rows: &mut [u32; 8],
        values: &[f64; 8],
        signs: u32,
        row: u32,
    ) {
        raise_noting(sums, rows, values, signs, row);
    }
}

#[inline(always)]
fn add<A: Accumulator>(sums: &mut [A], values: &[A], signs: u32) {
    for (i, (sum, value)) in sums.iter_mut().zip(values).enumerate() {
        *sum += value.flip(signs, i);
    }
}

#[inline(always)]
fn raise<A: Accumulator>(sums: &mut [A], values: &[A], signs: u32) {
    for (i, (sum, value)) in sums.iter_mut().zip(values).enumerate() {
        sum.raise(value.flip(signs, i));
    }
}

/// A dtype of `hashed_weight`, sixteen of which are widened at once.
pub(super) trait Load: Scalar<Acc: Vector> {
    /// Bit `i` is set where blocks of `i` columns have loops of their own, which is some 15 % faster and costs every build of
    /// this crate time: those of the default hash, and for f16 and bf16 the longer ones.
    const CONSTANT_BLOCKS: u64;

    #[inline(always)]
    fn widen16<L: Lanes>(_: L, values: &[Self; 16]) -> [Self::Acc; 16] {
        Self::widen_all(values)
    }
}

impl Load for f32 {
    const CONSTANT_BLOCKS: u64 = 1 << 1 | 1 << 4 | 1 << 8 | 1 << 16 | 1 << 32;
}

impl Load for f64 {
    const CONSTANT_BLOCKS: u64 = 1 << 16;
}

impl Load for bf16 {
    const CONSTANT_BLOCKS: u64 = 1 << 16 | 1 << 32;
}

impl Load for f16 {
    const CONSTANT_BLOCKS: u64 = 1 << 16 | 1 << 32;

    #[inline(always)]
    fn widen16<L: Lanes>(lanes: L, values: &[f16; 16]) -> [f32; 16] {
        lanes.widen16(values)
    }
}

/// How a value enters the row it is pooled into. A trait and not a closure, whose inlining could not be asked for.
pub(super) trait Combine {
    /// What the first value is combined with.
    fn first<A: Accumulator>() -> A;
    /// Combines `into[i]` with `(-1)^(bit i of signs) * values[i]`.
    fn sixteen<A: Vector, L: Lanes>(lanes: L, into: &mut [A; 16], values: &[A; 16], signs: u32);
    /// The same for eight.
    fn eight<A: Vector, L: Lanes>(lanes: L, into: &mut [A; 8], values: &[A; 8], signs: u32);
    fn one<A: Accumulator>(into: &mut A, value: A);
}

pub(super) struct Sum;

impl Combine for Sum {
    #[inline(always)]
    fn first<A: Accumulator>() -> A {
        A::ZERO
    }

    #[inline(always)]
    fn sixteen<A: Vector, L: Lanes>(lanes: L, into: &mut [A; 16], values: &[A; 16], signs: u32) {
        A::add16(lanes, into, values, signs);
    }

    #[inline(always)]
    fn eight<A: Vector, L: Lanes>(lanes: L, into: &mut [A; 8], values: &[A; 8], signs: u32) {
        A::add8(lanes, into, values, signs);
    }

    #[inline(always)]
    fn one<A: Accumulator>(into: &mut A, value: A) {
        *into += value;
    }
}

pub(super) struct Max;

impl Combine for Max {
    #[inline(always)]
    fn first<A: Accumulator>() -> A {
        A::NEG_INFINITY
    }

    #[inline(always)]
    fn sixteen<A: Vector, L: Lanes>(lanes: L, into: &mut [A; 16], values: &[A; 16], signs: u32) {
        A::max16(lanes, into, values, signs);
    }

    #[inline(always)]
    fn eight<A: Vector, L: Lanes>(lanes: L, into: &mut [A; 8], values: &[A; 8], signs: u32) {
        A::max8(lanes, into, values, signs);
    }

    #[inline(always)]
    fn one<A: Accumulator>(into: &mut A, value: A) {
        into.raise(value);
    }
}

/// Combines `into[i]` with `scale * (-1)^(bit i of signs) * from[i]`.
#[inline(always)]
pub(super) fn combine<C: Combine, T: Load, L: Lanes>(
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
    let (into16, into) = into.as_chunks_mut::<16>();
    let (from16, from) = from.as_chunks::<16>();
    let mut signs = signs;
    for (into, from) in into16.iter_mut().zip(from16) {
        let values = scaled(T::widen16(lanes, from), scale);
        C::sixteen(lanes, into, &values, signs);
        signs >>= 16;
    }
    let (into8, into) = into.as_chunks_mut::<8>();
    let (from8, from) = from.as_chunks::<8>();
    for (into, from) in into8.iter_mut().zip(from8) {
        C::eight(lanes, into, &scaled(T::widen_all(from), scale), signs);
        signs >>= 8;
    }
    for (i, (into, &from)) in into.iter_mut().zip(from).enumerate() {
        let [value] = scaled([from.widen().flip(signs, i)], scale);
        C::one(into, value);
    }
}
