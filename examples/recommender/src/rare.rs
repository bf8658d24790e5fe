//! Rows with too few training examples to learn from: those of a table share one row.
//!
//! A row of a hashed table is never empty. One without examples wears what the rows that share its slots have learnt, so that a movie
//! which nobody rated may be recommended to everybody. A row that all rare values of a table share is trained on the examples of
//! all of them: it learns what a rare value is like, and an unknown value is looked up there, too.

use anyhow::Result;

use crate::data::{Examples, Part, Rows, Schema};
use crate::evaluate::CHUNK;

/// The rare rows of a table, of which there is at least one.
#[derive(Clone, Debug, PartialEq)]
pub struct RareRows {
    /// Bit `row % 8` of byte `row / 8` is 1 if the row is rare.
    bits: Vec<u8>,
    /// The row that they share: the first of them.
    shared: u32,
}

impl RareRows {
    /// The rows with fewer than `min_count` training examples, given how many each row has; `None` if there are none.
    pub fn of_counts(counts: &[u32], min_count: u32) -> Option<Self> {
        let mut bits = vec![0u8; counts.len().div_ceil(8)];
        for (row, &count) in counts.iter().enumerate() {
            bits[row / 8] |= u8::from(count < min_count) << (row % 8);
        }
        Self::from_bits(bits)
    }

    /// Rows from stored [`bits`](Self::bits); `None` if no bit is 1.
    pub fn from_bits(bits: Vec<u8>) -> Option<Self> {
        let byte = bits.iter().position(|&byte| byte != 0)?;
        let shared = 8 * byte as u32 + bits[byte].trailing_zeros();
        Some(Self { bits, shared })
    }

    /// A bit per row, the lowest of each byte first: 1 if the row is rare.
    pub fn bits(&self) -> &[u8] {
        &self.bits
    }

    /// The row that they share.
    pub fn shared(&self) -> u32 {
        self.shared
    }

    /// Whether a row is rare.
    pub fn contains(&self, row: u32) -> bool {
        let byte = self.bits.get(row as usize / 8);
        byte.is_some_and(|byte| byte >> (row % 8) & 1 == 1)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        let ones = self.bits.iter().map(|byte| byte.count_ones() as usize);
        ones.sum()
    }

    /// The row to look up instead of `row`.
    pub fn map(&self, row: u32) -> u32 {
        if self.contains(row) {
            self.shared
        } else {
            row
        }
    }
}

/// What a pass over the train part finds.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainCounts {
    /// How many examples each row of each table of the schema has.
    pub rows: Vec<Vec<u32>>,
    /// All examples.
    pub examples: u64,
    /// Of those, the liked or clicked.
    pub positives: u64,
}

impl TrainCounts {
    /// Reads the train part.
    ///
    /// # Errors
    /// What reading says.
    pub fn of(examples: &dyn Examples) -> Result<Self> {
        let Schema { tables, .. } = examples.schema();
        let mut counts = Self {
            rows: tables.iter().map(|&(_, rows)| vec![0; rows]).collect(),
            examples: 0,
            positives: 0,
        };
        for batch in examples.batches(Part::Train, CHUNK, None)? {
            let (batch, labels) = batch?;
            counts.examples += labels.len() as u64;
            counts.positives += labels.iter().filter(|label| **label).count() as u64;
            match batch.rows {
                Rows::OnePerTable(rows) => {
                    for row in rows.chunks_exact(counts.rows.len()) {
                        let places = counts.rows.iter_mut().zip(row);
                        places.for_each(|(counts, &row)| add(counts, row));
                    }
                }
                Rows::Bags(bags) => {
                    for (counts, bags) in counts.rows.iter_mut().zip(bags) {
                        bags.indices().iter().for_each(|&row| add(counts, row));
                    }
                }
            }
        }
        Ok(counts)
    }

    /// The share of positive examples.
    pub fn rate(&self) -> f64 {
        self.positives as f64 / self.examples as f64
    }
}

/// A row out of range is left to the lookup, which says so.
fn add(counts: &mut [u32], row: u32) {
    if let Some(count) = counts.get_mut(row as usize) {
        *count = count.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Source;

    #[test]
    fn rare_rows_share_the_first_of_them() {
        let rare = RareRows::of_counts(&[5, 9, 2, 3, 0, 3, 7, 8, 1, 3], 3).unwrap();
        assert_eq!((rare.shared(), rare.count()), (2, 3));
        let mapped: Vec<u32> = (0..12).map(|row| rare.map(row)).collect();
        assert_eq!(mapped, [0, 1, 2, 3, 2, 5, 6, 7, 2, 9, 10, 11]);
        assert_eq!(RareRows::from_bits(rare.bits().to_vec()), Some(rare));
        assert_eq!(RareRows::of_counts(&[5, 9], 5), None);
        assert_eq!(RareRows::of_counts(&[], 5), None);
        assert_eq!(RareRows::of_counts(&[9; 20], 10).unwrap().count(), 20);
    }

    #[test]
    fn only_training_examples_count() -> Result<()> {
        let ratings = Source::Generated { seed: 1 }.load()?;
        let counts = TrainCounts::of(&ratings)?;
        let train = ratings.part(Part::Train);
        let of = |row| train.iter().filter(|r| r.movie == row).count() as u32;
        for row in [0, 500, 1199] {
            assert_eq!(counts.rows[4][row as usize], of(row));
        }
        let all: u32 = counts.rows[0].iter().sum();
        let liked = train.iter().filter(|rating| rating.liked).count();
        assert_eq!(
            (all as usize, counts.examples),
            (train.len(), u64::from(all))
        );
        assert_eq!(counts.positives, liked as u64);
        Ok(())
    }
}
