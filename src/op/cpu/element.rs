//! The dtypes of `hashed_weight` and of the sums, in forms that the compiler turns into vector instructions.

use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::{AddAssign, Div, Mul};

/// A dtype of `hashed_weight`, and the dtype its sums are kept in.
pub(super) trait Element: WithDType {
    type Acc: Accumulator;

    fn widen(self) -> Self::Acc;

    /// `to[i] = from[i]`, rounded.
    fn narrow(from: &[Self::Acc], to: &mut [Self]);
}

/// A dtype of sums.
pub(super) trait Accumulator:
    Element<Acc = Self> + AddAssign + Mul<Output = Self> + Div<Output = Self>
{
    const ZERO: Self;
    const ONE: Self;

    fn from_count(count: usize) -> Self;
    fn is_nan(self) -> bool;

    /// `self`, negated where bit `i` (of 32) of `signs` is set.
    fn flip(self, signs: u32, i: usize) -> Self;
}

macro_rules! accumulator {
    ($t:ident, $bits:ident) => {
        impl Element for $t {
            type Acc = $t;

            #[inline(always)]
            fn widen(self) -> $t {
                self
            }

            fn narrow(from: &[$t], to: &mut [$t]) {
                to.copy_from_slice(from);
            }
        }

        impl Accumulator for $t {
            const ZERO: $t = 0.0;
            const ONE: $t = 1.0;

            #[inline(always)]
            fn from_count(count: usize) -> $t {
                count as $t
            }

            #[inline(always)]
            fn is_nan(self) -> bool {
                $t::is_nan(self)
            }

            #[inline(always)]
            fn flip(self, signs: u32, i: usize) -> $t {
                const TOP: u32 = $bits::BITS - 1;
                let sign = ($bits::from(signs) << (TOP - i as u32 % 32)) & (1 << TOP);
                $t::from_bits(self.to_bits() ^ sign)
            }
        }
    };
}
accumulator!(f32, u32);
accumulator!(f64, u64);

impl Element for bf16 {
    type Acc = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn narrow(from: &[f32], to: &mut [bf16]) {
        to.convert_from_f32_slice(from);
    }
}

impl Element for f16 {
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

    fn narrow(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_half() {
        for bits in 0..=u16::MAX {
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
