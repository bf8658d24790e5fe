//! The sums of a sparse gradient on the CPU, and flags for those parts that may not be zero.

use candle_core::{CpuStorage, DType, WithDType};
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// A chunk has a flag: a cache line of f32.
const CHUNK: usize = 16;

/// So has a region of many chunks, so that few flags are looked at where little was touched.
pub(crate) const REGION: usize = 1 << 14;

pub(crate) struct SparseSums {
    /// `(len,)`, f32 or f64
    pub values: CpuStorage,
    pub touched: Touched,
}

impl SparseSums {
    pub fn new(len: usize, dtype: DType) -> Self {
        Self {
            values: match dtype {
                DType::F64 => CpuStorage::F64(vec![0.; len]),
                _ => CpuStorage::F32(vec![0.; len]),
            },
            touched: Touched {
                chunks: flags(len.div_ceil(CHUNK)),
                regions: flags(len.div_ceil(REGION)),
            },
        }
    }

    /// Makes all of them zero.
    pub fn clear(&mut self) {
        match &mut self.values {
            CpuStorage::F64(values) => self.touched.clear(values),
            CpuStorage::F32(values) => self.touched.clear(values),
            _ => unreachable!("sums are f32 or f64"),
        }
    }
}

fn flags(n: usize) -> Vec<AtomicU8> {
    (0..n).map(|_| AtomicU8::new(0)).collect()
}

/// Which slots may have been added to. Any thread may mark any of them.
pub(crate) struct Touched {
    chunks: Vec<AtomicU8>,
    regions: Vec<AtomicU8>,
}

impl Touched {
    /// Marks `len` slots from `start` on.
    #[inline(always)]
    pub(super) fn mark(&self, start: usize, len: usize) {
        for chunk in start / CHUNK..(start + len).div_ceil(CHUNK) {
            // No branch here: its outcome could not be predicted. Threads mark slots of their own.
            self.chunks[chunk].store(1, Relaxed);
            // Marked by all threads, and seldom for the first time.
            let region = &self.regions[chunk * CHUNK / REGION];
            if region.load(Relaxed) == 0 {
                region.store(1, Relaxed);
            }
        }
    }

    pub(super) fn mark_all(&self) {
        for mark in self.chunks.iter().chain(&self.regions) {
            mark.store(1, Relaxed);
        }
    }

    /// All regions.
    pub fn regions(&mut self) -> impl Iterator<Item = Region<'_>> {
        let chunks = self.chunks.chunks_mut(REGION / CHUNK);
        let regions = self.regions.iter_mut().zip(chunks);
        regions.map(|(is_touched, chunks)| Region { is_touched, chunks })
    }

    /// Makes all values zero that are marked, and takes the marks off.
    fn clear<A: WithDType>(&mut self, values: &mut [A]) {
        for (region, values) in self.regions().zip(values.chunks_mut(REGION)) {
            for run in region.take(values.len()) {
                values[run].fill(A::zero());
            }
        }
    }
}

/// The marks of [`REGION`] slots, fewer at the end.
pub(crate) struct Region<'a> {
    is_touched: &'a mut AtomicU8,
    chunks: &'a mut [AtomicU8],
}

impl Region<'_> {
    /// Whether there is any mark.
    pub fn is_touched(&mut self) -> bool {
        *self.is_touched.get_mut() != 0
    }

    /// Takes the marks off, and returns the runs of slots that they were on, counted from the first of the region, which has
    /// `len` slots.
    pub fn take(mut self, len: usize) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = vec![];
        if !self.is_touched() {
            return runs;
        }
        *self.is_touched.get_mut() = 0;
        // A word of marks at a time, whose runs are found without a branch for each mark.
        for (i, marks) in self.chunks.chunks_mut(64).enumerate() {
            let mut word = 0u64;
            for (i, marks) in marks.chunks_mut(8).enumerate() {
                word |= take_marks(marks) << (8 * i);
            }
            while word != 0 {
                let first = word.trailing_zeros();
                let chunks = (word >> first).trailing_ones();
                word &= !(u64::MAX >> (64 - chunks) << first);
                let start = (64 * i + first as usize) * CHUNK;
                let end = len.min(start + chunks as usize * CHUNK);
                match runs.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => runs.push(start..end),
                }
            }
        }
        runs
    }
}

/// Takes off up to eight marks, and returns them as bits.
#[inline(always)]
fn take_marks(marks: &mut [AtomicU8]) -> u64 {
    match marks.first_chunk_mut::<8>() {
        Some(marks) => {
            let bytes = u64::from_le_bytes(std::array::from_fn(|i| *marks[i].get_mut()));
            *marks = Default::default();
            // Moves the bit of each byte to the highest byte.
            bytes.wrapping_mul(0x0102_0408_1020_4080) >> 56
        }
        None => {
            let bits = marks.iter_mut().enumerate();
            bits.fold(0, |word, (i, mark)| {
                word | u64::from(std::mem::take(mark.get_mut())) << i
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_runs_of_whole_chunks() {
        let len = 3 * REGION + 5;
        let mut sums = SparseSums::new(len, DType::F32);
        let runs = |sums: &mut SparseSums| -> Vec<(usize, usize)> {
            let mut runs = vec![];
            for (i, region) in sums.touched.regions().enumerate() {
                let start = i * REGION;
                let of_region = region.take(REGION.min(len - start));
                runs.extend(
                    of_region
                        .iter()
                        .map(|run| (start + run.start, start + run.end)),
                );
            }
            runs
        };
        assert_eq!(runs(&mut sums), []);
        let marked = [(0, 1), (16, 32), (70, 4), (REGION - 1, 2), (len - 1, 1)];
        for (start, slots) in marked {
            sums.touched.mark(start, slots);
        }
        // Runs end where a region does.
        let want = [
            (0, 48),
            (64, 80),
            (REGION - CHUNK, REGION),
            (REGION, REGION + CHUNK),
            (3 * REGION, len),
        ];
        assert_eq!(runs(&mut sums), want);
        assert_eq!(runs(&mut sums), []);
    }
}
