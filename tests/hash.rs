//! The hash functions: published vectors, laws, and what constructors refuse.

mod common;

use candle_hashed_embedding_bag::{Hash, Overflow};
use common::message;

/// A length so large that `mod len` changes nothing.
const VAST: usize = 1 << 60;

#[test]
fn original_vectors() {
    let hash = Hash::original();
    for (row, column, want) in [
        (0, 0, 104_729),
        (0, 1, 57_857_966_404_956),
        (1, 0, 9_824_621_266),
        (2, 3, 56_463_349_817_285),
        (-1, 0, 26_276_226_730_497),
        (1 << 31, 5, 57_531_701_859_461),
        (1 << 40, 127, 33_819_236_586_390),
    ] {
        assert_eq!(hash.slot(row, column, VAST).unwrap(), (want, 1));
        for len in [1, 2, 1600, 1_000_003] {
            assert_eq!(hash.slot(row, column, len).unwrap(), (want % len, 1));
        }
    }
}

#[test]
fn robe_vectors() {
    // The first numbers of the module's default seed.
    let numbers = [2_038_074_743, 634_329_019, 1_825_252_241, 871_205_356];
    let hash = Hash::robe(&numbers, 1).unwrap();
    for (row, column, want) in [
        (0, 0, 634_329_019),
        (0, 1, 421_506_517),
        (1, 0, 1_505_534_375),
        (2, 3, 1_738_272_225),
    ] {
        assert_eq!(hash.slot(row, column, VAST).unwrap(), (want, 1));
    }
    // In blocks, columns of one block are neighbours, and the first slot leaves room for the whole block.
    let blocks = Hash::robe(&numbers, 8).unwrap();
    for (row, column) in [(0, 0), (1, 7), (2, 29), (5, 64)] {
        let (start, _) = hash.slot(row, column / 8, 1000 - 8 + 1).unwrap();
        let (slot, _) = blocks.slot(row, column, 1000).unwrap();
        assert_eq!(slot, start + column % 8);
    }
}

#[test]
fn mix_vectors() {
    let (len, block) = (1_280_000, 16);
    for (seed, row, run, want) in [
        (0, 0, 0, 1_130_624),
        (0, 0, 1, 552_352),
        (0, 1, 0, 725_184),
        (42, 123_456_789, 7, 265_040),
        (0, 1 << 40, 3, 1_194_384),
        (0, -1, 0, 1_144_240),
    ] {
        let hash = Hash::mix(seed, block, true).unwrap();
        for within in 0..block {
            let (slot, _) = hash.slot(row, run * block + within, len).unwrap();
            assert_eq!(slot, want + within);
        }
    }
    // h of (0, 0, 0) ends in 0xcdaf: its low bits are the signs.
    let hash = Hash::mix(0, block, true).unwrap();
    for within in 0..block {
        let (_, sign) = hash.slot(0, within, len).unwrap();
        assert_eq!(sign, if (0xcdaf >> within) & 1 == 1 { -1 } else { 1 });
        let unsigned = Hash::mix(0, block, false).unwrap();
        assert_eq!(unsigned.slot(0, within, len).unwrap().1, 1);
    }
}

#[test]
fn default_block_is_a_power_of_two_of_at_most_16() {
    for (embedding_dim, block) in [
        (1, 1),
        (2, 2),
        (3, 2),
        (7, 4),
        (8, 8),
        (16, 16),
        (17, 16),
        (512, 16),
    ] {
        let hash = Hash::default_for(embedding_dim);
        assert_eq!(hash, Hash::mix(0, block, true).unwrap());
        assert!(hash.signed());
    }
}

/// Rows spread evenly: of 64 equal parts of the parameter, none gets more than 10 % over its share.
#[test]
fn mix_spreads_evenly_and_signs_evenly() {
    let (hash, len, rows) = (Hash::mix(0, 4, true).unwrap(), 1 << 16, 50_000);
    let mut parts = [0usize; 64];
    let mut negative = 0;
    for row in 0..rows {
        for column in 0..8 {
            let (slot, sign) = hash.slot(row, column, len).unwrap();
            parts[slot * 64 / len] += 1;
            negative += usize::from(sign < 0);
        }
    }
    let share = (rows as usize * 8) / 64;
    assert!(parts
        .iter()
        .all(|&n| n > share * 9 / 10 && n < share * 11 / 10));
    let half = rows as usize * 4;
    assert!(negative > half * 99 / 100 && negative < half * 101 / 100);
}

#[test]
fn constructors_refuse() {
    assert_eq!(
        message(Hash::mix(0, 0, false)),
        "hash: block must lie in 1..=16777216, got 0"
    );
    assert_eq!(
        message(Hash::mix(0, 33, true)),
        "hash: a signed mix block must be at most 32, got 33"
    );
    assert!(Hash::mix(0, 33, false).is_ok());
    assert_eq!(
        message(Hash::affine(1, 1, 1, 0, 1)),
        "hash: an affine modulus must be at least 1, got 0"
    );
    assert_eq!(
        message(Hash::robe(&[1, 2, 3], 1)),
        "hash: robe needs at least 4 random_numbers, got 3"
    );
    assert_eq!(
        message(Hash::robe(&[1, 2, -3, 4], 1)),
        "hash: robe random_numbers must not be negative, got -3 at position 2"
    );
    assert_eq!(
        message(Hash::robe(&[0, 2, 3, 4], 1)),
        "hash: an affine modulus must be at least 1, got 0"
    );
    match Hash::robe(&[5, 6, 7, 8, 9], 2).unwrap() {
        Hash::Affine(h) => {
            assert_eq!((h.modulus(), h.c(), h.b(), h.a()), (5, 6, 7, 8));
            assert_eq!(h.overflow(), Overflow::Refuse);
        }
        Hash::Mix(_) => panic!("robe is affine"),
    }
}

#[test]
fn lengths_that_do_not_suit() {
    let mix = Hash::mix(0, 16, true).unwrap();
    assert_eq!(
        message(mix.slot(0, 0, 8)),
        "hash: hashed_weight must hold at least one block of 16 values, got 8"
    );
    assert_eq!(
        message(mix.slot(0, 0, 40)),
        "hash: the length of hashed_weight must be a multiple of the block, got 40 and block 16"
    );
    assert_eq!(
        message(mix.slot(0, 0, 16 << 32)),
        "hash: hashed_weight must hold fewer than 2^32 blocks, got 4294967296 of 16 values"
    );
    assert!(mix.check_len((16 << 32) - 16).is_ok());
    assert_eq!(
        message(Hash::original().slot(0, 0, 0)),
        "hash: hashed_weight must hold at least one block of 1 values, got 0"
    );
    assert!(Hash::affine(1, 1, 1, 9, 5).unwrap().check_len(5).is_ok());
}

#[test]
fn identity_is_a_plain_table() {
    let hash = Hash::identity(6).unwrap();
    for row in 0..50 {
        for column in 0..6 {
            let slot = hash.slot(row as i64, column, 50 * 6).unwrap();
            assert_eq!(slot, (row * 6 + column, 1));
        }
    }
}
