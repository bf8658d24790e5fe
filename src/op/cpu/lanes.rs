//! Instruction sets: resolved once per loop, and the few operations that the compiler does not turn into vectors by
//! itself, sixteen or eight values that are negated where a bit is set.
//!
//! Loops are plain Rust, compiled once per set of [`Lanes`] by [`widest`] or [`up_to_avx2`]. That reaches as far as functions
//! are inlined, which is why everything inside a loop says `inline(always)`. Each set compiled costs every user build
//! time, so a loop asks for AVX-512 only where it was measured to pay. The portable lanes are always tested beside the others.

use super::scalar::{Accumulator, Scalar};
use half::f16;

/// What is written by hand for each instruction set, for sums in f32.
pub(super) trait Lanes: Copy {
    /// These lanes, if this machine has them.
    fn detect() -> Option<Self>;

    /// Runs a loop compiled for these lanes.
    fn run<T: Loop>(self, work: T) -> T::Output;

    /// `sums[i] += (-1)^(bit i of signs) * values[i]`
    fn add16(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32);

    /// The same for eight.
    fn add8(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32);

    /// `sums[i] = max(sums[i], (-1)^(bit i of signs) * values[i])`, where NaN is larger than every number.
    fn max16(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32);

    /// The same for eight.
    fn max8(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32);

    /// `max8` that also notes the winner: `rows[i] = row` where `sums[i]` is replaced.
    #[inline(always)]
    fn arg_max8(
        self,
        sums: &mut [f32; 8],
        rows: &mut [u32; 8],
        values: &[f32; 8],
        signs: u32,
        row: u32,
    ) {
        raise_noting(sums, rows, values, signs, row);
    }

    /// f16 to f32.
    fn widen16(self, values: &[f16; 16]) -> [f32; 16];
}

/// A loop to be compiled for several instruction sets; `run` must be `inline(always)`.
pub(super) trait Loop {
    type Output;
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// Runs a loop compiled for the widest vectors of this machine.
pub(super) fn widest<T: Loop>(work: T) -> T::Output {
    #[cfg(target_arch = "x86_64")]
    if let Some(lanes) = x86::Avx512::detect() {
        return lanes.run(work);
    }
    up_to_avx2(work)
}

/// The same for a loop that is no faster with AVX-512, which is not compiled for it.
pub(super) fn up_to_avx2<T: Loop>(work: T) -> T::Output {
    match Wide::detect() {
        Some(lanes) => lanes.run(work),
        None => Portable.run(work),
    }
}

/// What a loop over groups of columns uses when the machine has vectors at all.
#[cfg(target_arch = "x86_64")]
pub(super) type Wide = x86::Avx2;
/// Other processors have vectors that the compiler uses by itself.
#[cfg(not(target_arch = "x86_64"))]
pub(super) type Wide = Portable;

/// The lanes for a block of some length, and whether it has a loop of its own: where its length is a constant.
///
/// Each case is a copy of every loop that each build of this crate compiles: hence AVX-512 only where it pays.
pub(super) enum Blocked {
    One(Portable),
    Four(Wide),
    Eight(Wide),
    Sixteen(Wide),
    #[cfg(target_arch = "x86_64")]
    SixteenAvx512(x86::Avx512),
    ThirtyTwo(Wide),
    #[cfg(target_arch = "x86_64")]
    ThirtyTwoAvx512(x86::Avx512),
    Any(Wide),
    /// On an x86 processor that has not even AVX2.
    AnyPortable(Portable),
}

impl Blocked {
    /// `constants` has bit `i` set where a block of `i` columns has a loop of its own.
    #[inline(always)]
    pub fn of(block: usize, constants: u64) -> Self {
        let has_constant = block < 64 && constants >> block & 1 == 1;
        if has_constant && block == 1 {
            return Self::One(Portable);
        }
        let Some(lanes) = Wide::detect() else {
            return Self::AnyPortable(Portable);
        };
        #[cfg(target_arch = "x86_64")]
        if let (true, Some(lanes)) = (has_constant, x86::Avx512::detect()) {
            match block {
                16 => return Self::SixteenAvx512(lanes),
                32 => return Self::ThirtyTwoAvx512(lanes),
                _ => {}
            }
        }
        match block {
            4 if has_constant => Self::Four(lanes),
            8 if has_constant => Self::Eight(lanes),
            16 if has_constant => Self::Sixteen(lanes),
            32 if has_constant => Self::ThirtyTwo(lanes),
            _ => Self::Any(lanes),
        }
    }
}

/// Asks for memory that will be read or added to soon. A hint: it may point anywhere.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch accesses nothing, wherever it points, and every x86-64 processor has it.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// What every machine has.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Portable {
    #[inline(always)]
    fn add<const N: usize>(sums: &mut [f32; N], values: &[f32; N], signs: u32) {
        for i in 0..N {
            sums[i] += values[i].flip(signs, i);
        }
    }

    #[inline(always)]
    fn max<const N: usize>(sums: &mut [f32; N], values: &[f32; N], signs: u32) {
        for i in 0..N {
            sums[i].raise(values[i].flip(signs, i));
        }
    }
}

impl Lanes for Portable {
    fn detect() -> Option<Self> {
        Some(Self)
    }

    fn run<T: Loop>(self, work: T) -> T::Output {
        work.run(self)
    }

    #[inline(always)]
    fn add16(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
        Self::add(sums, values, signs);
    }

    #[inline(always)]
    fn add8(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
        Self::add(sums, values, signs);
    }

    #[inline(always)]
    fn max16(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
        Self::max(sums, values, signs);
    }

    #[inline(always)]
    fn max8(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
        Self::max(sums, values, signs);
    }

    #[inline(always)]
    fn widen16(self, values: &[f16; 16]) -> [f32; 16] {
        f16::widen_all(values)
    }
}

/// [`Lanes::arg_max8`] for any dtype of sums and any number of them.
#[inline(always)]
pub(super) fn raise_noting<A: Accumulator>(
    sums: &mut [A],
    rows: &mut [u32],
    values: &[A],
    signs: u32,
    row: u32,
) {
    for (i, ((sum, of), value)) in sums.iter_mut().zip(rows).zip(values).enumerate() {
        let value = value.flip(signs, i);
        let wins = value.wins(*sum);
        *sum = if wins { value } else { *sum };
        *of = if wins { row } else { *of };
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, Loop};
    use half::f16;
    use std::arch::x86_64::*;

    /// AVX-512 with its byte, word, double word and shorter-vector parts; only made where they are found.
    #[derive(Clone, Copy)]
    pub struct Avx512(Avx2);

    /// AVX2, FMA and F16C; only made where they are found.
    #[derive(Clone, Copy)]
    pub struct Avx2(());

    impl Lanes for Avx512 {
        fn detect() -> Option<Self> {
            let is_available = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            Avx2::detect().filter(|_| is_available).map(Self)
        }

        fn run<T: Loop>(self, work: T) -> T::Output {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn run<T: Loop>(lanes: Avx512, work: T) -> T::Output {
                work.run(lanes)
            }
            // SAFETY: an `Avx512` exists only where its features do.
            unsafe { run(self, work) }
        }

        #[inline(always)]
        fn add16(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
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
        fn max16(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
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
        fn add8(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
            self.0.add8(sums, values, signs);
        }

        #[inline(always)]
        fn max8(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
            self.0.max8(sums, values, signs);
        }

        #[inline(always)]
        fn arg_max8(
            self,
            sums: &mut [f32; 8],
            rows: &mut [u32; 8],
            values: &[f32; 8],
            signs: u32,
            row: u32,
        ) {
            self.0.arg_max8(sums, rows, values, signs, row);
        }

        #[inline(always)]
        fn widen16(self, values: &[f16; 16]) -> [f32; 16] {
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
        /// Eight values, negated where a bit is set of the eight from bit `8 * EIGHT` on.
        #[inline(always)]
        fn flipped<const EIGHT: i32>(self, values: &[f32; 8], signs: u32) -> __m256 {
            // SAFETY: an `Avx2` exists only where its features do; the array holds the eight values that are read.
            unsafe {
                // Bit i to the top of lane i.
                let last = 24 - 8 * EIGHT;
                let shifts = _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0);
                let shifts = _mm256_add_epi32(shifts, _mm256_set1_epi32(last));
                let tops = _mm256_sllv_epi32(_mm256_set1_epi32(signs as i32), shifts);
                let minus = _mm256_and_ps(_mm256_castsi256_ps(tops), _mm256_set1_ps(-0.0));
                _mm256_xor_ps(minus, _mm256_loadu_ps(values.as_ptr()))
            }
        }

        #[inline(always)]
        fn add_eight<const EIGHT: i32>(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
            let value = self.flipped::<EIGHT>(values, signs);
            let sums = sums.as_mut_ptr();
            // SAFETY: an `Avx2` exists only where its features do; eight values lie at `sums`.
            unsafe { _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), value)) };
        }

        #[inline(always)]
        fn max_eight<const EIGHT: i32>(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
            let value = self.flipped::<EIGHT>(values, signs);
            let sums = sums.as_mut_ptr();
            // SAFETY: as for `add_eight`.
            unsafe {
                let sum = _mm256_loadu_ps(sums);
                let larger = _mm256_cmp_ps::<_CMP_GT_OQ>(value, sum);
                let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(value, value);
                let wins = _mm256_or_ps(larger, nan);
                _mm256_storeu_ps(sums, _mm256_blendv_ps(sum, value, wins));
            }
        }
    }

    impl Lanes for Avx2 {
        fn detect() -> Option<Self> {
            let is_available = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            is_available.then_some(Self(()))
        }

        fn run<T: Loop>(self, work: T) -> T::Output {
            #[target_feature(enable = "avx2,fma,f16c")]
            fn run<T: Loop>(lanes: Avx2, work: T) -> T::Output {
                work.run(lanes)
            }
            // SAFETY: an `Avx2` exists only where its features do.
            unsafe { run(self, work) }
        }

        #[inline(always)]
        fn add16(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
            let (sums, values) = (sums.as_chunks_mut().0, values.as_chunks().0);
            self.add_eight::<0>(&mut sums[0], &values[0], signs);
            self.add_eight::<1>(&mut sums[1], &values[1], signs);
        }

        #[inline(always)]
        fn max16(self, sums: &mut [f32; 16], values: &[f32; 16], signs: u32) {
            let (sums, values) = (sums.as_chunks_mut().0, values.as_chunks().0);
            self.max_eight::<0>(&mut sums[0], &values[0], signs);
            self.max_eight::<1>(&mut sums[1], &values[1], signs);
        }

        #[inline(always)]
        fn add8(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
            self.add_eight::<0>(sums, values, signs);
        }

        #[inline(always)]
        fn max8(self, sums: &mut [f32; 8], values: &[f32; 8], signs: u32) {
            self.max_eight::<0>(sums, values, signs);
        }

        #[inline(always)]
        fn arg_max8(
            self,
            sums: &mut [f32; 8],
            rows: &mut [u32; 8],
            values: &[f32; 8],
            signs: u32,
            row: u32,
        ) {
            let value = self.flipped::<0>(values, signs);
            let (sums, rows) = (sums.as_mut_ptr(), rows.as_mut_ptr().cast());
            // SAFETY: as for `add_eight`, and eight numbers lie at `rows`.
            unsafe {
                let sum = _mm256_loadu_ps(sums);
                let larger = _mm256_cmp_ps::<_CMP_GT_OQ>(value, sum);
                // The first NaN stays.
                let is_nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(value, value);
                let was_number = _mm256_cmp_ps::<_CMP_ORD_Q>(sum, sum);
                let wins = _mm256_or_ps(larger, _mm256_and_ps(is_nan, was_number));
                _mm256_storeu_ps(sums, _mm256_blendv_ps(sum, value, wins));
                let of = _mm256_castsi256_ps(_mm256_loadu_si256(rows));
                let row = _mm256_castsi256_ps(_mm256_set1_epi32(row as i32));
                let of = _mm256_castps_si256(_mm256_blendv_ps(of, row, wins));
                _mm256_storeu_si256(rows, of);
            }
        }

        #[inline(always)]
        fn widen16(self, values: &[f16; 16]) -> [f32; 16] {
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

    impl Loop for All {
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
                for operation in [L::add16, L::max16] {
                    let mut sums = sums;
                    operation(lanes, &mut sums, &values, signs);
                    bits.extend(sums.map(bits_of));
                }
                for operation in [L::add8, L::max8] {
                    let mut sums = *sums.first_chunk().unwrap();
                    operation(lanes, &mut sums, values.first_chunk().unwrap(), signs);
                    bits.extend(sums.map(bits_of));
                }
                let (mut of, mut best) = ([round; 8], *sums.first_chunk().unwrap());
                let eight = values.first_chunk().unwrap();
                lanes.arg_max8(&mut best, &mut of, eight, signs, !round);
                bits.extend(of);
                bits.extend(best.map(bits_of));
                let halves =
                    std::array::from_fn(|i| f16::from_bits((round * 16) as u16 + i as u16));
                bits.extend(lanes.widen16(&halves).map(bits_of));
            }
            bits
        }
    }

    #[test]
    fn all_lanes_agree_with_the_portable_ones() {
        let want = Portable.run(All);
        assert!(widest(All) == want, "the widest lanes");
        assert!(up_to_avx2(All) == want, "AVX2");
    }
}
