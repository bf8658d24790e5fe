//! The hash functions: vectors, laws, and what constructors refuse.
//!
//! The vectors are tests/golden/hash_vectors.json. They hold for [`Hash::slot`], for the oracle of the other tests and, on each
//! device, for lookups in a `hashed_weight` whose values tell their slots; so they tie src/hash/ and kernels/hash.cuh to the
//! formulas and to each other.

use crate::common::strategies::{check, embedding_dims, hashes, len_for, numbers};
use crate::common::{
    every_hash, floats, integers, lma, message, naive_slot, on_each_device, robe, to_vec,
    whole_blocks,
};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_hashed_embedding_bag::{
    hashed_embedding_bag, Affine, Balanced, BoundsCheck, Hash, HashedEmbedding, HashedEmbeddingBag,
    HashedEmbeddingBagConfig, Mix, Overflow, Semantic,
};
use candle_nn::VarBuilder;
use proptest::collection::vec;
use proptest::prelude::*;

/// A virtual element `(row, column)`, its slot and its sign.
type Element = (i64, usize, usize, i8);

/// A line of tests/golden/hash_vectors.json.
struct Vector {
    hash: Hash,
    len: usize,
    elements: Vec<Element>,
}

fn vectors() -> Vec<Vector> {
    let json = include_str!("../golden/hash_vectors.json");
    let vectors: Vec<serde_json::Value> = serde_json::from_str(json).expect("a list of vectors");
    let field = |vector: &serde_json::Value, name: &str| vector[name].clone();
    vectors
        .iter()
        .map(|vector| Vector {
            hash: serde_json::from_value(field(vector, "hash")).expect("a hash"),
            len: serde_json::from_value(field(vector, "len")).expect("a length"),
            elements: serde_json::from_value(field(vector, "elements")).expect("elements"),
        })
        .collect()
}

/// Asserts that lookups on `device` find these elements where they are said to be. For hashes of signatures, the rows of elements
/// are signatures.
fn assert_lookups(hash: Hash, len: usize, elements: &[Element], device: &Device) -> Result<()> {
    let mut rows: Vec<i64> = elements.iter().map(|(row, ..)| *row).collect();
    rows.sort_unstable();
    rows.dedup();
    let columns = elements.iter().map(|(_, column, ..)| column + 1).max();
    let embedding_dim = columns.expect("at least one element");
    let config = HashedEmbeddingBagConfig {
        hash: Some(hash),
        bounds_check: BoundsCheck::Off,
        ..Default::default()
    };
    let indices: Vec<i64> = match hash.row_tensor() {
        None => rows.clone(),
        Some(_) => (0..rows.len() as i64).collect(),
    };
    let indices = integers(&indices, DType::I64, device)?;
    // Each value is its slot, counted from 1 so that every value has a sign. Both dtypes hold it exactly.
    let weight: Vec<f64> = (1..=len).map(|slot| slot as f64).collect();
    for dtype in [DType::F64, DType::F32] {
        let weight = floats(&weight, dtype, device)?;
        let layer = match hash.row_tensor() {
            None => HashedEmbeddingBag::new(weight, 100, embedding_dim, config)?,
            Some(_) => {
                let signatures = integers(&rows, DType::I64, device)?;
                let n = rows.len();
                HashedEmbeddingBag::with_row_tensor(weight, &signatures, n, embedding_dim, config)?
            }
        };
        let out = to_vec(&HashedEmbedding::from(layer).forward(&indices)?)?;
        for &(row, column, slot, sign) in elements {
            let i = rows.binary_search(&row).expect("a row that is looked up");
            assert_eq!(
                out[i * embedding_dim + column],
                (slot + 1) as f64 * f64::from(sign),
                "{hash:?} {dtype:?} row {row} column {column} of {len}"
            );
        }
    }
    Ok(())
}

#[test]
fn slots_are_those_of_the_vectors() -> Result<()> {
    for Vector {
        hash,
        len,
        elements,
    } in vectors()
    {
        for (row, column, slot, sign) in elements {
            let what = format!("{hash:?} row {row} column {column} of {len}");
            assert_eq!(hash.slot(row, column, len)?, (slot, sign), "{what}");
            let naive = naive_slot(&hash, row, column, len);
            assert_eq!(naive, (slot, f64::from(sign)), "the oracle, {what}");
        }
    }
    Ok(())
}

/// All vectors but those of a `hashed_weight` that is larger than any memory.
#[test]
fn lookups_find_the_slots_of_the_vectors() -> Result<()> {
    let vectors = vectors();
    let (small, large): (Vec<_>, Vec<_>) = vectors.iter().partition(|v| v.len < 1 << 24);
    assert!(small.len() > 60 && large.iter().all(|v| v.len > 1 << 33));
    on_each_device(|device| {
        small
            .iter()
            .try_for_each(|v| assert_lookups(v.hash, v.len, &v.elements, device))
    })
}

/// The vectors are of the hashes that the constructors make.
#[test]
fn constructors_make_the_hashes_of_the_vectors() {
    let vectors = vectors();
    for hash in [
        Hash::original(),
        robe(1),
        robe(8),
        Hash::affine(u64::MAX - 58, u64::MAX / 3, 7, u64::MAX - 4, 3),
        Hash::mix(16),
        Hash::balanced(16),
        Hash::default_for(32),
        lma(4, 8, 1),
        Hash::semantic(1),
    ] {
        assert!(vectors.iter().any(|v| v.hash == hash), "{hash:?}");
    }
}

#[test]
fn default_block_is_half_a_row_within_bounds() {
    for (embedding_dim, block) in [
        (1, 1),
        (2, 2),
        (3, 2),
        (4, 4),
        (15, 4),
        (16, 8),
        (31, 8),
        (32, 16),
        (512, 16),
    ] {
        let hash = Hash::default_for(embedding_dim);
        assert_eq!(hash, Hash::balanced(block));
        assert!(hash.signed());
    }
}

/// Each block of columns goes to every place once per stratum, but for one row more or less where strata do not begin at a
/// multiple of 2^-32.
#[test]
fn balanced_places_are_balanced() {
    for (num_blocks, rows) in [(1, 7), (7, 70), (64, 640), (1000, 4000), (3027, 12_108)] {
        let hash = Hash::from(Balanced {
            seed: 5,
            block: 2,
            signed: true,
        });
        for run in 0..4 {
            let mut loads = vec![0; num_blocks];
            for row in 0..rows {
                let (slot, _) = hash.slot(row as i64, 2 * run, 2 * num_blocks).unwrap();
                loads[slot / 2] += 1;
            }
            let even = rows / num_blocks;
            let near = loads
                .iter()
                .all(|&load| load + 1 >= even && load <= even + 1);
            let exact = loads.iter().filter(|&&load| load == even).count();
            assert!(
                near && exact * 100 >= 98 * num_blocks,
                "{num_blocks}: {loads:?}"
            );
        }
    }
}

/// The number of the block that holds block of columns `run` of a row, and the signs of its 16 columns.
fn place(hash: &Hash, row: usize, run: usize, num_blocks: usize) -> (usize, u16) {
    let column = |i| {
        hash.slot(row as i64, 16 * run + i, 16 * num_blocks)
            .unwrap()
    };
    let signs = (0..16).map(|i| u16::from(column(i).1 < 0) << i).sum();
    (column(0).0 / 16, signs)
}

/// Two strata lie as far apart in one block of columns as in another no more often than by chance.
#[test]
fn balanced_strata_turn_independently() {
    let (hash, num_blocks) = (Hash::balanced(16), 50);
    let turns: Vec<[usize; 4]> = (0..500)
        .map(|stratum| {
            [0, 1, 2, 7].map(|run| place(&hash, stratum * num_blocks, run, num_blocks).0)
        })
        .collect();
    let apart = |a: usize, b: usize| (a + num_blocks - b) % num_blocks;
    for (run, other) in [(0, 1), (1, 2), (0, 3)] {
        let pairs = turns
            .iter()
            .enumerate()
            .flat_map(|(i, a)| turns[..i].iter().map(move |b| (a, b)));
        let equal = pairs
            .filter(|(a, b)| apart(a[run], b[run]) == apart(a[other], b[other]))
            .count();
        let chance = 500 * 499 / 2 / num_blocks;
        assert!(equal.abs_diff(chance) < chance / 8, "{equal} of {chance}");
    }
}

/// Rows that share a block differ in half of their signs, and in all the ways there are.
#[test]
fn balanced_rows_in_one_block_are_no_twins() {
    let (hash, num_blocks, strata) = (Hash::balanced(16), 50, 120);
    let mut blocks = vec![vec![]; num_blocks];
    for row in 0..num_blocks * strata {
        let (block, signs) = place(&hash, row, 3, num_blocks);
        blocks[block].push(signs);
    }
    let (mut pairs, mut differ, mut twins) = (0, [0u32; 16], 0);
    for block in &blocks {
        for (i, a) in block.iter().enumerate() {
            for b in &block[..i] {
                pairs += 1;
                twins += usize::from(a == b);
                for (column, differ) in differ.iter_mut().enumerate() {
                    *differ += u32::from((a ^ b) >> column) & 1;
                }
            }
        }
    }
    assert!(twins <= 2 * (pairs >> 16), "{twins} twins of {pairs} pairs");
    let half = pairs as f64 / 2.0;
    assert!(
        differ
            .iter()
            .all(|&n| (f64::from(n) / half - 1.0).abs() < 0.02),
        "{differ:?} of {half}"
    );
}

/// Rows spread evenly: of 64 equal parts of the parameter, none gets more than 10 % over its share.
#[test]
fn mix_spreads_evenly_and_signs_evenly() {
    let (hash, len, rows) = (Hash::mix(4), 1 << 16, 50_000);
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

const MAX_BLOCK: usize = 1 << 24;

#[test]
fn numbers_out_of_range_are_refused_wherever_a_hash_is_used() {
    let unsigned = |block| Mix {
        seed: 0,
        block,
        signed: false,
    };
    for (hash, said) in [
        (unsigned(0).into(), "block must lie in 1..=16777216, got 0"),
        (
            unsigned(MAX_BLOCK + 1).into(),
            "block must lie in 1..=16777216, got 16777217",
        ),
        (Hash::balanced(0), "block must lie in 1..=16777216, got 0"),
        (Hash::mix(33), "a signed block must be at most 32, got 33"),
        (
            Hash::balanced(64),
            "a signed block must be at most 32, got 64",
        ),
        (
            Hash::affine(1, 1, 1, 0, 1),
            "the modulus of an affine hash must be at least 1, got 0",
        ),
        (Hash::identity(0), "block must lie in 1..=16777216, got 0"),
        (Hash::slot_table(0), "block must lie in 1..=16777216, got 0"),
        (
            Hash::semantic(33),
            "a signed block must be at most 32, got 33",
        ),
        (
            Hash::from(Semantic {
                key_bits: 12,
                ..Semantic::new(8)
            }),
            "key_bits of a semantic hash must be 1, 2, 4, 8, 16 or 32, got 12",
        ),
    ] {
        let said = format!("hashed-embedding-bag: {said}");
        assert_eq!(message(hash.check_len(1 << 26)), said);
        assert_eq!(message(hash.slot(0, 0, 1 << 26)), said);
        let config = HashedEmbeddingBagConfig {
            hash: Some(hash),
            ..Default::default()
        };
        let weight = Tensor::zeros(64, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(message(HashedEmbeddingBag::new(weight, 9, 8, config)), said);
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        assert_eq!(message(hashed_embedding_bag(9, 8, 0.5, config, vb)), said);
    }
    assert!(Hash::from(unsigned(33)).check_len(66).is_ok());
    assert!(Hash::from(unsigned(MAX_BLOCK)).check_len(MAX_BLOCK).is_ok());
    for (numbers, said) in [
        (&[1, 2, 3][..], "ROBE has at least 4 random_numbers, got 3"),
        (
            &[1, 2, -3, 4],
            "ROBE's random_numbers must not be negative, got -3 at position 2",
        ),
        (
            &[0, 2, 3, 4],
            "the modulus of an affine hash must be at least 1, got 0",
        ),
    ] {
        assert_eq!(
            message(Hash::robe(numbers, 1)),
            format!("hashed-embedding-bag: {said}")
        );
    }
    let robe = Affine {
        modulus: 5,
        c: 6,
        b: 7,
        a: 8,
        block: 2,
        overflow: Overflow::Refuse,
    };
    assert_eq!(Hash::robe(&[5, 6, 7, 8, 9], 2).unwrap(), robe.into());
}

#[test]
fn lengths_that_do_not_suit() {
    let mix = Hash::mix(16);
    assert_eq!(
        message(mix.slot(0, 0, 8)),
        "hashed-embedding-bag: hashed_weight must hold at least one block of 16 values, got 8"
    );
    assert_eq!(
        message(mix.slot(0, 0, 40)),
        "hashed-embedding-bag: the length of hashed_weight must be a multiple of the block, got 40 and block 16"
    );
    assert_eq!(
        message(mix.slot(0, 0, 16 << 32)),
        "hashed-embedding-bag: hashed_weight must hold fewer than 2^32 blocks, got 4294967296 of 16 values"
    );
    assert!(mix.check_len((16 << 32) - 16).is_ok());
    assert_eq!(
        message(Hash::original().slot(0, 0, 0)),
        "hashed-embedding-bag: hashed_weight must hold at least one block of 1 values, got 0"
    );
    assert!(Hash::affine(1, 1, 1, 9, 5).check_len(5).is_ok());
}

#[test]
fn identity_is_a_plain_table() {
    let hash = Hash::identity(6);
    for row in 0..50 {
        for column in 0..6 {
            let slot = hash.slot(row as i64, column, 50 * 6).unwrap();
            assert_eq!(slot, (row * 6 + column, 1));
        }
    }
}

/// Every hash of the other tests, at widths that end within a memory access: slots are those of the oracle, and lookups on each
/// device find them.
#[test]
fn slots_are_the_same_everywhere() -> Result<()> {
    let rows = [0, 1, 2, -1, 1 << 31, 1 << 40, i64::MAX, i64::MIN];
    let has_slots = |hash: &Hash| !matches!(hash, Hash::SlotTable(_));
    for hash in every_hash().into_iter().filter(has_slots) {
        let len = whole_blocks(&hash, 100_003);
        let mut elements = vec![];
        for row in rows {
            for column in 0..70 {
                let (slot, sign) = hash.slot(row, column, len)?;
                let naive = naive_slot(&hash, row, column, len);
                assert_eq!((slot, f64::from(sign)), naive, "{hash:?} {row} {column}");
                elements.push((row, column, slot, sign));
            }
        }
        on_each_device(|device| assert_lookups(hash, len, &elements, device))?;
    }
    Ok(())
}

/// The slot of any element of any table, also past 2^32 slots, rows and columns: the arithmetic is that of the formulas.
#[test]
fn slots_are_the_formulas() {
    let lens = || (1..61u32, any::<u64>()).prop_map(|(bits, len)| (len >> (64 - bits)) as usize);
    let strategy = (
        embedding_dims(),
        lens(),
        vec((any::<i64>(), numbers()), 1..20),
    )
        .prop_flat_map(|(dim, len, places)| (hashes(dim), Just(len), Just(places)));
    let runner = |(hash, size, places): &(Hash, usize, Vec<(i64, u64)>), _: &Device| {
        // Hashes with aligned blocks have at most 2^32 - 1 of them.
        let most = match hash {
            Hash::Affine(_) | Hash::Lma(_) => usize::MAX,
            _ => hash.block() * (u32::MAX as usize - 1),
        };
        let len = len_for(hash, (*size).min(most));
        if matches!(hash, Hash::SlotTable(_)) {
            assert!(message(hash.slot(0, 0, len)).contains("known to a layer only"));
            return Ok(());
        }
        for &(row, column) in places {
            let (slot, sign) = hash.slot(row, column as usize, len)?;
            assert!(slot < len);
            let naive = naive_slot(hash, row, column as usize, len);
            assert_eq!(
                (slot, f64::from(sign)),
                naive,
                "row {row} column {column} of {len}"
            );
        }
        Ok(())
    };
    check(strategy, runner);
}
