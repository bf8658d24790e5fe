//! The instruction set, resolved once per task, and the one thing that the compiler does not make vectors of by itself:
//! sixteen values that are negated where a bit is set.
//!
//! Loops are plain Rust, compiled once for each set of [`Lanes`] ([`dispatch`]); that reaches as far as functions are
//! inlined, which is why the loops say `inline(always)`. The portable lanes are always tested beside the others.

use super::element::{Accumulator, Element};
use half::f16;

/// What is written by hand for each instruction set.
pub(super) trait Lanes: Copy {
    /// `sums[i] += (-1)^(bit i of signs) * values[i]`
    fn add(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32);

    /// The same for eight.
    fn add_half(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32);

    /// `sums[i] = max(sums[i], (-1)^(bit i of signs) * values[i])`, where NaN is larger than every number.
    fn max(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32);

    /// The same for eight.
    fn max_half(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32);

    /// f16 to f32.
    fn widen(self, values: &[f16; 16]) -> [f32; 16];
}

/// A loop to run on the widest lanes of this machine; `run` must be `inline(always)`.
pub(super) trait Task {
    type Output;
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// Runs `task` compiled for the widest vectors of this machine.
pub(super) fn dispatch<T: Task>(task: T) -> T::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if x86::Avx512::is_available() {
            // SAFETY: the features that the function is compiled for were just found.
            return unsafe { x86::avx512(task) };
        }
        if x86::Avx2::is_available() {
            // SAFETY: as above.
            return unsafe { x86::avx2(task) };
        }
    }
    task.run(Portable)
}

/// Nothing but what every machine has.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Portable {
    #[inline(always)]
    fn add_all<const N: usize>(sums: &mut [f32; N], values: &[f32; N], signs: u32) {
        for i in 0..N {
            sums[i] += values[i].flip(signs, i);
        }
    }

    #[inline(always)]
    fn max_all<const N: usize>(sums: &mut [f32; N], values: &[f32; N], signs: u32) {
        for i in 0..N {
            sums[i].raise(values[i].flip(signs, i));
        }
    }
}

impl Lanes for Portable {
    #[inline(always)]
    fn add(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
        Self::add_all(sums, values, signs);
    }

    #[inline(always)]
    fn add_half(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
        Self::add_all(sums, values, signs);
    }

    #[inline(always)]
    fn max(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
        Self::max_all(sums, values, signs);
    }

    #[inline(always)]
    fn max_half(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
        Self::max_all(sums, values, signs);
    }

    #[inline(always)]
    fn widen(self, values: &[f16; 16]) -> [f32; 16] {
        values.map(f16::widen)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, Task};
    use half::f16;
    use std::arch::x86_64::*;

    /// AVX-512 with its byte, word, double word and shorter-vector parts; only made where they are found.
    #[derive(Clone, Copy)]
    pub struct Avx512(());

    /// AVX2, FMA and F16C; only made where they are found.
    #[derive(Clone, Copy)]
    pub struct Avx2(());

    impl Avx512 {
        pub fn is_available() -> bool {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && Avx2::is_available()
        }
    }

    impl Avx2 {
        pub fn is_available() -> bool {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub fn avx512<T: Task>(task: T) -> T::Output {
        task.run(Avx512(()))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn avx2<T: Task>(task: T) -> T::Output {
        task.run(Avx2(()))
    }

    impl Lanes for Avx512 {
        #[inline(always)]
        fn add(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
            // SAFETY: an `Avx512` exists only where its features do; the arrays hold the sixteen values that are accessed.
            unsafe {
                let sum = _mm512_loadu_ps(sums.as_ptr());
                let value = _mm512_loadu_ps(values.as_ptr());
                let minus = _mm512_set1_ps(-0.0);
                let value = _mm512_mask_xor_ps(value, signs as __mmask16, value, minus);
                _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_add_ps(sum, value));
            }
        }

        #[inline(always)]
        fn max(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
            // SAFETY: as for `add`.
            unsafe {
                let sum = _mm512_loadu_ps(sums.as_ptr());
                let value = _mm512_loadu_ps(values.as_ptr());
                let minus = _mm512_set1_ps(-0.0);
                let value = _mm512_mask_xor_ps(value, signs as __mmask16, value, minus);
                let larger = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(value, sum);
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
                let sum = _mm512_mask_blend_ps(larger | nan, sum, value);
                _mm512_storeu_ps(sums.as_mut_ptr(), sum);
            }
        }

        #[inline(always)]
        fn add_half(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
            Avx2(()).add_half(sums, values, signs);
        }

        #[inline(always)]
        fn max_half(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
            Avx2(()).max_half(sums, values, signs);
        }

        #[inline(always)]
        fn widen(self, values: &[f16; 16]) -> [f32; 16] {
            let mut wide = [0.0; 16];
            // SAFETY: as for `add`.
            unsafe {
                let values = _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast()));
                _mm512_storeu_ps(wide.as_mut_ptr(), values);
            }
            wide
        }
    }

    impl Avx2 {
        /// The values, negated where a bit is set.
        #[inline(always)]
        fn flipped(self, values: &[f32; 8], signs: u32) -> __m256 {
            // SAFETY: an `Avx2` exists only where its features do; the array holds the eight values that are read.
            unsafe {
                let bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
                let set = _mm256_and_si256(_mm256_set1_epi32(signs as i32), bits);
                let set = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bits));
                let value = _mm256_loadu_ps(values.as_ptr());
                _mm256_xor_ps(value, _mm256_and_ps(set, _mm256_set1_ps(-0.0)))
            }
        }
    }

    impl Lanes for Avx2 {
        #[inline(always)]
        fn add(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
            let (sums, values) = (sums.as_chunks_mut().0, values.as_chunks().0);
            self.add_half(&mut sums[0], &values[0], signs);
            self.add_half(&mut sums[1], &values[1], signs >> 8);
        }

        #[inline(always)]
        fn max(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
            let (sums, values) = (sums.as_chunks_mut().0, values.as_chunks().0);
            self.max_half(&mut sums[0], &values[0], signs);
            self.max_half(&mut sums[1], &values[1], signs >> 8);
        }

        #[inline(always)]
        fn add_half(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
            let value = self.flipped(values, signs);
            let sums = sums.as_mut_ptr();
            // SAFETY: an `Avx2` exists only where its features do; eight values lie at `sums`.
            unsafe { _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), value)) };
        }

        #[inline(always)]
        fn max_half(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
            let value = self.flipped(values, signs);
            let sums = sums.as_mut_ptr();
            // SAFETY: as for `add_half`.
            unsafe {
                let sum = _mm256_loadu_ps(sums);
                let larger = _mm256_cmp_ps::<_CMP_GT_OQ>(value, sum);
                let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(value, value);
                let wins = _mm256_or_ps(larger, nan);
                _mm256_storeu_ps(sums, _mm256_blendv_ps(sum, value, wins));
            }
        }

        #[inline(always)]
        fn widen(self, values: &[f16; 16]) -> [f32; 16] {
            let mut wide = [0.0; 16];
            for (wide, values) in wide
                .as_chunks_mut::<8>()
                .0
                .iter_mut()
                .zip(values.as_chunks::<8>().0)
            {
                // SAFETY: an `Avx2` exists only where its features do; eight values lie on either side.
                unsafe {
                    let values = _mm256_cvtph_ps(_mm_loadu_si128(values.as_ptr().cast()));
                    _mm256_storeu_ps(wide.as_mut_ptr(), values);
                }
            }
            wide
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All operations on values of every kind, for many signs.
    struct All;

    impl Task for All {
        type Output = Vec<u32>;

        #[inline(always)]
        fn run<L: Lanes>(self, lanes: L) -> Vec<u32> {
            let kinds = [
                0.0,
                -0.0,
                1.5,
                -2.5,
                f32::NAN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                1e-40,
            ];
            let mut bits = vec![];
            for round in 0..if cfg!(miri) { 64 } else { 4096u32 } {
                let signs = round.wrapping_mul(0x9E37_79B9);
                let values: [f32; 16] = std::array::from_fn(|i| kinds[(i + round as usize) % 8]);
                let sums: [f32; 16] =
                    std::array::from_fn(|i| kinds[(i * 3 + round as usize / 8) % 8]);
                // The payload of a NaN is nobody's business.
                let bits_of = |x: f32| if x.is_nan() { !0 } else { x.to_bits() };
                for operation in [L::add, L::max] {
                    let mut sums = sums;
                    operation(lanes, &mut sums, &values, signs);
                    bits.extend(sums.map(bits_of));
                }
                for operation in [L::add_half, L::max_half] {
                    let mut sums = *sums.first_chunk().unwrap();
                    operation(lanes, &mut sums, values.first_chunk().unwrap(), signs);
                    bits.extend(sums.map(bits_of));
                }
                let halves =
                    std::array::from_fn(|i| f16::from_bits((round * 16) as u16 + i as u16));
                bits.extend(lanes.widen(&halves).map(bits_of));
            }
            bits
        }
    }

    #[test]
    fn all_lanes_agree_with_the_portable_ones() {
        let want = All.run(Portable);
        assert!(dispatch(All) == want, "the widest lanes");
        #[cfg(target_arch = "x86_64")]
        if x86::Avx2::is_available() {
            // SAFETY: the features were just found.
            assert!(unsafe { x86::avx2(All) } == want, "AVX2");
        }
    }
}
