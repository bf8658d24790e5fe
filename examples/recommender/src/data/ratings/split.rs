//! Which part a rating belongs to: a pure function of its row number.
//!
//! No shuffled list has to be stored or agreed on, so every program that reads the same file scores the same test rows.

use crate::data::Part;

/// The part of the rating at `row` (0-based, in file order): 80 % train, 10 % valid, 10 % test.
pub fn part(row: u64) -> Part {
    match splitmix64(row) % 10 {
        0..=7 => Part::Train,
        8 => Part::Valid,
        _ => Part::Test,
    }
}

/// Whether the rating at `row` belongs to a part.
pub fn is_in(row: u64, wanted: Part) -> bool {
    wanted == Part::All || part(row) == wanted
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
    fn proportions() {
        let count = |wanted| (0..100_000).filter(|&row| part(row) == wanted).count();
        assert!(count(Part::Train).abs_diff(80_000) < 500);
        assert!(count(Part::Valid).abs_diff(10_000) < 500);
        assert!(count(Part::Test).abs_diff(10_000) < 500);
    }
}
