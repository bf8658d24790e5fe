//! Which part a rating belongs to: a pure function of its row number, or of its place in time.
//!
//! No shuffled list has to be stored or agreed on, so every program that reads the same file scores the same test rows.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::data::Part;

/// How ratings are divided into parts, 8 : 1 : 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// By a hash of the row number.
    #[default]
    Hash,
    /// In order of time: a model is to predict the future.
    Time,
}

impl Split {
    /// Whether the rating at `row` of so many belongs to a part. Of [`Time`](Self::Time), rows are in order of time.
    pub fn is_in(self, row: u64, rows: u64, wanted: Part) -> bool {
        match self {
            Self::Hash => wanted == Part::All || part(row) == wanted,
            Self::Time => tenths(rows, wanted).contains(&row),
        }
    }
}

/// The positions of a part of so many examples in order of time.
pub fn tenths(examples: u64, part: Part) -> Range<u64> {
    let tenths = |n| (u128::from(examples) * n / 10) as u64;
    match part {
        Part::Train => 0..tenths(8),
        Part::Valid => tenths(8)..tenths(9),
        Part::Test => tenths(9)..examples,
        Part::All => 0..examples,
    }
}

/// The part of the rating at `row` (0-based, in file order): 80 % train, 10 % valid, 10 % test.
pub fn part(row: u64) -> Part {
    match splitmix64(row) % 10 {
        0..=7 => Part::Train,
        8 => Part::Valid,
        _ => Part::Test,
    }
}

fn splitmix64(seed: u64) -> u64 {
    let mut h = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    h = (h ^ h >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    h = (h ^ h >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    h ^ h >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        // The first output of SplitMix64 seeded with 0, as published with the generator.
        assert_eq!(splitmix64(0), 0xe220_a839_7b1d_cdaf);
        let rows = |wanted| (0..40).filter(move |&row| part(row) == wanted);
        assert!(rows(Part::Valid).eq([4, 5, 9, 14, 24]));
        assert!(rows(Part::Test).eq([17, 34]));
    }

    #[test]
    fn time_divides_in_order() {
        let of = |wanted| (0..25).filter(move |&row| Split::Time.is_in(row, 25, wanted));
        assert!(of(Part::Train).eq(0..20));
        assert!(of(Part::Valid).eq(20..22));
        assert!(of(Part::Test).eq(22..25));
        assert!(of(Part::All).eq(0..25));
    }

    #[test]
    fn proportions() {
        let count = |wanted| (0..100_000).filter(|&row| part(row) == wanted).count();
        assert!(count(Part::Train).abs_diff(80_000) < 500);
        assert!(count(Part::Valid).abs_diff(10_000) < 500);
        assert!(count(Part::Test).abs_diff(10_000) < 500);
    }
}
