//! Division by a constant that is only known at run time.

/// Divides many numbers by the same one, with a multiplication instead of a division.
///
/// CUDA kernels take it as it is: it is the twin of `Divisor` in `kernels/hash.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Divisor {
    pub(crate) value: u64,
    /// `floor((2^64 - 1) / value)`
    pub(crate) reciprocal: u64,
}

impl Divisor {
    /// `value` must not be zero.
    pub fn new(value: u64) -> Self {
        Self {
            value,
            reciprocal: u64::MAX / value,
        }
    }

    /// `x mod value`, exactly.
    ///
    /// The reciprocal is at most one below `2^64 / value` and `x < 2^64`, so `x * reciprocal / 2^64` is less than one below
    /// `x / value`: its floor is the quotient or one less, and one correction suffices.
    #[inline]
    pub fn rem(self, x: u64) -> u64 {
        let quotient = ((u128::from(x) * u128::from(self.reciprocal)) >> 64) as u64;
        let remainder = x - quotient * self.value;
        if remainder >= self.value {
            remainder - self.value
        } else {
            remainder
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisor_is_exact_at_the_edges() {
        let edges = |around: u64| [around.wrapping_sub(1), around, around.wrapping_add(1)];
        for value in [
            1,
            2,
            3,
            5,
            7,
            117_130_198_221_199,
            (1 << 32) - 5,
            1 << 32,
            1 << 63,
            u64::MAX,
        ] {
            let divisor = Divisor::new(value);
            for x in [
                0,
                value,
                value.wrapping_mul(2),
                u64::MAX / value * value,
                u64::MAX,
                1 << 63,
            ]
            .into_iter()
            .flat_map(edges)
            {
                assert_eq!(divisor.rem(x), x % value, "{x} mod {value}");
            }
        }
    }
}
