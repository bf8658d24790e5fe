//! The dtypes of `hashed_weight` and of its sums: how one value is widened, rounded, negated and compared.
//!
//! Plain arithmetic without branches, so that loops over these functions become vector instructions. `lanes.rs` and
//! `combine.rs` build on it.

use crate::error::bail;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Result, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::mem::MaybeUninit;
use std::ops::{AddAssign, Div, DivAssign, Mul};

/// A dtype whose values are changed where they are stored.
pub(crate) trait ValuesMut: WithDType {
    /// The values of a storage, which must have this dtype.
    fn values_mut(storage: &mut CpuStorage) -> Result<&mut [Self]>;
}

macro_rules! values_mut {
    ($t:ty, $dtype:ident) => {
        impl ValuesMut for $t {
            fn values_mut(storage: &mut CpuStorage) -> Result<&mut [$t]> {
                match storage {
                    CpuStorage::$dtype(values) => Ok(values),
                    other => bail!("expected {:?}, got {:?}", DType::$dtype, other.dtype()),
                }
            }
        }
    };
}
values_mut!(f16, F16);
values_mut!(bf16, BF16);
values_mut!(f32, F32);
values_mut!(f64, F64);

/// A dtype of `hashed_weight`, and the dtype its sums are kept in.
pub(super) trait Scalar: WithDType {
    type Acc: Accumulator;

    fn widen(self) -> Self::Acc;

    /// Some values, widened. A loop, because `map` of an array is a call that is not always inlined.
    #[inline(always)]
    fn widen_all<const N: usize>(values: &[Self; N]) -> [Self::Acc; N] {
        let mut wide = [Self::Acc::ZERO; N];
        for (wide, value) in wide.iter_mut().zip(values) {
            *wide = value.widen();
        }
        wide
    }

    /// `to[i] = from[i]`, rounded.
    fn narrow(from: &[Self::Acc], to: &mut [MaybeUninit<Self>]);
}

/// A dtype of sums.
pub(super) trait Accumulator:
    Scalar<Acc = Self> + ValuesMut + AddAssign + DivAssign + Mul<Output = Self> + Div<Output = Self>
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;

    fn from_count(count: usize) -> Self;

    /// Whether `self` takes the place of `best` in a maximum: it is larger, or the first NaN.
    #[inline(always)]
    #[allow(clippy::eq_op)] // only a NaN differs from itself
    fn wins(self, best: Self) -> bool {
        self > best || (self != self && best == best)
    }

    #[inline(always)]
    fn raise(&mut self, value: Self) {
        if value.wins(*self) {
            *self = value;
        }
    }

    /// `self`, negated where bit `i` (of 32) of `signs` is set.
    fn flip(self, signs: u32, i: usize) -> Self;
}

fn write<T: Copy>(from: &[T], to: &mut [MaybeUninit<T>]) {
    // A few at a time: for so few, a call of memmove takes longer than the copy.
    let ((to, to_rest), (from, from_rest)) = (to.as_chunks_mut::<16>(), from.as_chunks::<16>());
    for (to, from) in to.iter_mut().zip(from) {
        for (to, &from) in to.iter_mut().zip(from) {
            to.write(from);
        }
    }
    for (to, &from) in to_rest.iter_mut().zip(from_rest) {
        to.write(from);
    }
}

/// Rounds a few values at a time, so that half converts them in vectors.
fn round<T: Scalar<Acc = f32> + Default>(from: &[f32], to: &mut [MaybeUninit<T>])
where
    [T]: HalfFloatSliceExt,
{
    for (from, to) in from.chunks(64).zip(to.chunks_mut(64)) {
        let mut rounded = [T::default(); 64];
        rounded[..from.len()].convert_from_f32_slice(from);
        write(&rounded[..from.len()], to);
    }
}

/// A dtype that is its own accumulator.
macro_rules! own_accumulator {
    ($t:ident) => {
        impl Scalar for $t {
            type Acc = $t;

            #[inline(always)]
            fn widen(self) -> $t {
                self
            }

            fn narrow(from: &[$t], to: &mut [MaybeUninit<$t>]) {
                write(from, to);
            }
        }
    };
}
own_accumulator!(f32);
own_accumulator!(f64);

impl Accumulator for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;

    #[inline(always)]
    fn from_count(count: usize) -> f32 {
        count as f32
    }

    #[inline(always)]
    fn flip(self, signs: u32, i: usize) -> f32 {
        f32::from_bits(self.to_bits() ^ ((signs >> (i % 32)) << 31))
    }
}

impl Accumulator for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const NEG_INFINITY: f64 = f64::NEG_INFINITY;

    #[inline(always)]
    fn from_count(count: usize) -> f64 {
        count as f64
    }

    #[inline(always)]
    fn flip(self, signs: u32, i: usize) -> f64 {
        f64::from_bits(self.to_bits() ^ (u64::from(signs >> (i % 32)) << 63))
    }
}

impl Scalar for bf16 {
    type Acc = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn narrow(from: &[f32], to: &mut [MaybeUninit<bf16>]) {
        round(from, to);
    }
}

impl Scalar for f16 {
    type Acc = f32;

    /// As `half` does it, but without a branch or a call, for many values at once.
    #[inline(always)]
    fn widen(self) -> f32 {
        const EXPONENT: u32 = 0x7c00 << 13;
        /// The difference of the two exponent biases, 127 - 15.
        const BIAS: u32 = 112 << 23;
        let bits = u32::from(self.to_bits());
        let sign = (bits & 0x8000) << 16;
        let magnitude = (bits & 0x7fff) << 13;
        let normal = magnitude + BIAS;
        // Infinity and NaN have the largest exponent there as well.
        let large = if magnitude >= EXPONENT {
            normal + BIAS
        } else {
            normal
        };
        // A subnormal is its mantissa times 2^-24: that mantissa behind the exponent of 2^-14, less 2^-14.
        let unit = f32::from_bits(BIAS + (1 << 23));
        let subnormal = (f32::from_bits(normal + (1 << 23)) - unit).to_bits();
        let value = if magnitude < 1 << 23 {
            subnormal
        } else {
            large
        };
        f32::from_bits(value | sign)
    }

    fn narrow(from: &[f32], to: &mut [MaybeUninit<f16>]) {
        round(from, to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_half() {
        for bits in (0..=u16::MAX).step_by(if cfg!(miri) { 251 } else { 1 }) {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert_eq!(half.is_nan(), half.widen().is_nan());
            assert_eq!(brain.is_nan(), brain.widen().is_nan());
            if !half.is_nan() {
                assert_eq!(half.widen().to_bits(), half.to_f32().to_bits(), "{bits:x}");
            }
            if !brain.is_nan() {
                assert_eq!(
                    brain.widen().to_bits(),
                    brain.to_f32().to_bits(),
                    "{bits:x}"
                );
            }
        }
    }

    #[test]
    fn flip_negates_by_bit() {
        for i in 0..32 {
            assert_eq!(1f32.flip(1 << i, i), -1.0);
            assert_eq!(1f64.flip(1 << i, i), -1.0);
            assert_eq!((-2f32).flip(!(1 << i), i), -2.0);
            assert_eq!(2f64.flip(!(1 << i), i), 2.0);
        }
    }
}
