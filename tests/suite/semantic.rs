//! Signatures and slot tables from records: what they promise of rows that are used alike.

use crate::common::{message, same_on_any_number_of_threads, to_vec, Draws};
use candle_core::{DType, Device, Result, Tensor};
use candle_hashed_embedding_bag::semantic::{similarity, Records};

const ROWS: usize = 4000;

/// Records in which rows `4 i` and `4 i + 1` always occur together, `4 i + 2` in half of these records and in as many others, and
/// `4 i + 3` never.
fn records(num_records: usize) -> Vec<Vec<(usize, usize)>> {
    let mut draws = Draws::new(3);
    let record = |_| {
        let groups = (0..20).map(|_| (4 * draws.below(ROWS / 4), draws.below(4)));
        let rows: Vec<_> = groups
            .flat_map(|(first, kind)| match kind {
                0 => vec![first, first + 1],
                1 => vec![first, first + 1, first + 2],
                2 => vec![first + 2],
                _ => vec![],
            })
            .collect();
        rows.into_iter().map(|row| (0, row)).collect()
    };
    (0..num_records).map(record).collect()
}

fn signatures(records: &Records, key_bits: usize) -> Result<Vec<i64>> {
    records.signatures(key_bits)?.to_vec1()
}

/// The share of pairs that `agree`, of `pairs` of rows.
fn share(pairs: impl Iterator<Item = (usize, usize)>, agree: impl Fn(usize, usize) -> bool) -> f64 {
    let agree: Vec<bool> = pairs.map(|(a, b)| agree(a, b)).collect();
    agree.iter().filter(|&&agree| agree).count() as f64 / agree.len() as f64
}

#[test]
fn rows_of_the_same_records_share_all_their_slots_and_others_none_beyond_chance() -> Result<()> {
    let records = Records::sample([ROWS], records(20_000), 1 << 20, 7)?;
    assert_eq!((records.num_rows(), records.num_records()), (ROWS, 20_000));
    let num_blocks = 500;
    let table = records.slot_table(8, num_blocks, 2)?;
    assert_eq!((table.dims(), table.dtype()), (&[ROWS, 8][..], DType::U32));
    let table = table.to_vec2::<u32>()?;
    assert!(table.iter().flatten().all(|&block| block < 500));
    let signatures = signatures(&records, 16)?;
    let groups = || (0..ROWS / 4).map(|group| 4 * group);
    for row in groups() {
        assert_eq!(table[row], table[row + 1]);
        assert_eq!(signatures[row], signatures[row + 1]);
    }
    let chance = 1.0 / num_blocks as f64;
    let shared_by = |i: usize| {
        let table = &table;
        move |a: usize, b: usize| table[a][i] == table[b][i]
    };
    for i in 0..8 {
        // Rows of other groups share few records.
        let others = groups().map(|row| (row, (row + 4 * 313) % ROWS));
        let shared = share(others, shared_by(i));
        assert!(shared < 8.0 * chance, "column block {i}: {shared}");
        // So do rows that no record holds.
        let unseen = groups().map(|row| (row + 3, (row + 4 * 313) % ROWS + 3));
        let shared = share(unseen, shared_by(i));
        assert!(shared < 8.0 * chance, "column block {i}: {shared}");
    }
    let mut of_unseen: Vec<i64> = groups().map(|row| signatures[row + 3]).collect();
    of_unseen.sort_unstable();
    of_unseen.dedup();
    assert_eq!(of_unseen.len(), ROWS / 4);
    Ok(())
}

/// Rows of different records use blocks as evenly as rows at random places do.
#[test]
fn rows_that_have_nothing_in_common_are_spread() -> Result<()> {
    // Every row in three records of its own.
    let records = (0..3 * ROWS).map(|record| [(0, record % ROWS)]);
    let records = Records::sample([ROWS], records, 1 << 20, 1)?;
    let table = records.slot_table(4, 100, 2)?.to_vec2::<u32>()?;
    for i in 0..4 {
        let mut loads = [0; 100];
        for row in &table {
            loads[row[i] as usize] += 1;
        }
        // 40 rows in each on average, with a deviation of 6.3.
        assert!(
            loads.iter().all(|&load| (10..80).contains(&load)),
            "{loads:?}"
        );
    }
    let signatures = signatures(&records, 16)?;
    let equal_keys = |a: i64, b: i64| {
        (0..4)
            .filter(|k| ((a ^ b) >> (16 * k)) & 0xFFFF == 0)
            .count()
    };
    let pairs = signatures.iter().enumerate();
    let equal: usize = pairs
        .flat_map(|(i, &a)| signatures[..i].iter().map(move |&b| equal_keys(a, b)))
        .sum();
    let chance = (ROWS * (ROWS - 1) / 2 * 4) as f64 / 65536.0;
    assert!(
        (equal as f64 / chance - 1.0).abs() < 0.2,
        "{equal} of {chance}"
    );
    Ok(())
}

/// A MinHash agrees with the probability of the similarity, so the estimate is right on average, for keys of any length, and the
/// blocks that two rows share are its square.
#[test]
fn the_similarity_is_estimated_without_bias() -> Result<()> {
    let records = Records::sample([ROWS], records(20_000), 1 << 20, 5)?;
    let pairs: Vec<_> = (0..ROWS / 4)
        .map(|group| (4 * group, 4 * group + 2))
        .collect();
    let exact: Vec<f64> = pairs
        .iter()
        .map(|&(a, b)| records.similarity(a, b))
        .collect::<Result<_>>()?;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    assert!((mean(&exact) - 1.0 / 3.0).abs() < 0.02);
    for key_bits in [1, 2, 4, 5, 8, 16, 32] {
        let signatures = signatures(&records, key_bits)?;
        let estimates: Vec<f64> = pairs
            .iter()
            .map(|&(a, b)| similarity(signatures[a], signatures[b], key_bits))
            .collect::<Result<_>>()?;
        // A thousand pairs of at least two keys: a deviation of at most 0.011.
        let (got, want) = (mean(&estimates), mean(&exact));
        assert!((got - want).abs() < 0.04, "{key_bits} bits: {got}, {want}");
    }
    for min_hashes in [1, 2, 3] {
        let table = records
            .slot_table(16, 1 << 20, min_hashes)?
            .to_vec2::<u32>()?;
        let shared = |&(a, b): &(usize, usize)| {
            let (a, b) = (&table[a], &table[b]);
            a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / 16.0
        };
        let got = mean(&pairs.iter().map(shared).collect::<Vec<_>>());
        let powers: Vec<_> = exact.iter().map(|j| j.powi(min_hashes as i32)).collect();
        let want = mean(&powers);
        assert!((got - want).abs() < 0.02, "{min_hashes}: {got}, {want}");
    }
    Ok(())
}

#[test]
fn fields_follow_each_other_and_duplicates_count_once() -> Result<()> {
    let of_fields = [
        vec![(1, 0), (0, 2), (0, 2)],
        vec![(1, 0)],
        vec![],
        vec![(2, 4), (0, 2)],
    ];
    let of_rows = [vec![3, 2], vec![3], vec![], vec![9, 2]];
    let of_rows = of_rows.map(|rows| rows.into_iter().map(|row| (0, row)).collect::<Vec<_>>());
    let by_fields = Records::sample([3, 2, 5], of_fields, 10, 3)?;
    let by_rows = Records::sample([10], of_rows, 10, 3)?;
    assert_eq!(by_fields.num_rows(), 10);
    assert_eq!(by_fields.similarity(3, 2)?, 1.0 / 3.0);
    assert_eq!(by_fields.similarity(9, 2)?, 0.5);
    assert_eq!(by_fields.similarity(0, 1)?, 0.0);
    assert_eq!(signatures(&by_fields, 8)?, signatures(&by_rows, 8)?);
    Ok(())
}

/// Every record is drawn as often as any other, and by another seed others are.
#[test]
fn samples_are_fair() -> Result<()> {
    let (n, most) = (400, 100);
    let mut drawn = vec![0; n];
    let mut samples = vec![];
    for seed in 0..500 {
        // Record `i` holds row `i`, and all hold the last row.
        let records = (0..n).map(|i| [(0, i), (0, n)]);
        let sample = Records::sample([n + 1], records, most, seed)?;
        assert_eq!(sample.num_records(), most);
        let of_sample: Vec<bool> = (0..n)
            .map(|row| Ok(sample.similarity(row, n)? > 0.0))
            .collect::<Result<_>>()?;
        assert_eq!(of_sample.iter().filter(|&&is| is).count(), most);
        for (drawn, &is) in drawn.iter_mut().zip(&of_sample) {
            *drawn += usize::from(is);
        }
        samples.push(of_sample);
    }
    // 125 times on average, with a deviation of 9.7.
    assert!(drawn.iter().all(|&n| (75..175).contains(&n)), "{drawn:?}");
    samples.dedup();
    assert_eq!(samples.len(), 500);
    Ok(())
}

#[test]
fn the_same_on_any_number_of_threads() -> Result<()> {
    same_on_any_number_of_threads("semantic::the_same_on_any_number_of_threads", |report| {
        let records = Records::sample([ROWS], records(5_000), 3_000, 7)?;
        let signatures = signatures(&records, 4)?;
        let halves = signatures.iter().flat_map(|&s| [s >> 32, s & 0xFFFF_FFFF]);
        report(&halves.map(|half| half as f64).collect::<Vec<_>>());
        report(&to_vec(&records.slot_table(40, 1 << 20, 2)?)?);
        Ok(())
    })
}

#[test]
fn what_makes_no_sense_is_refused() -> Result<()> {
    let said = |what: &str| format!("hashed-embedding-bag: {what}");
    let sample = |fields: &[usize], records: &[[(usize, usize); 2]], most| {
        let records = records.iter().map(|record| record.iter().copied());
        Records::sample(fields.iter().copied(), records, most, 0)
    };
    let good = [[(0, 2), (1, 1)], [(0, 0), (1, 0)]];
    for (fields, records, most, what) in [
        (
            &[3, 2][..],
            &good[..],
            0,
            "a sample must have 1..2^32 records, got 0",
        ),
        (&[3, 2], &[], 9, "there must be at least one record"),
        (&[], &good, 9, "records need at least one field with rows"),
        (
            &[usize::MAX, 2],
            &good,
            9,
            "the rows of all fields are too many",
        ),
        (&[3], &good, 9, "record 0: there are 1 fields, got number 1"),
        (
            &[3, 2],
            &[good[0], [(1, 1), (1, 2)]],
            1,
            "record 1: row 2 of field 1 is outside its 2 rows",
        ),
    ] {
        assert_eq!(message(sample(fields, records, most)), said(what));
    }
    let records = sample(&[3, 2], &good, 9)?;
    assert_eq!(
        message(records.similarity(0, 5)),
        said("there are 5 rows, got 0 and 5")
    );
    for bits in [0, 33] {
        let what = format!("key_bits must lie in 1..=32, got {bits}");
        assert_eq!(message(records.signatures(bits)), said(&what));
        assert_eq!(message(similarity(1, 2, bits)), said(&what));
    }
    assert_eq!(
        message(records.slot_table(0, 9, 2)),
        said("a slot table needs column blocks and MinHashes, got 0 and 2")
    );
    for num_blocks in [0, 1 << 32] {
        let what = format!("num_blocks must lie in 1..2^32, got {num_blocks}");
        assert_eq!(message(records.slot_table(1, num_blocks, 2)), said(&what));
    }
    assert!(message(records.slot_table(usize::MAX, 9, 2)).contains("too large"));
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
    let (a, a4) = (zeros(&[2, 3, 4], DType::I64)?, zeros(&[3], DType::I64)?);
    assert_eq!(
        message(records.scma_table(&a, &a4)),
        said("a and a4 must have shapes [k, 3, columns] and [k], got [2, 3, 4] and [3]")
    );
    let of_floats = zeros(&[2], DType::F32)?;
    assert_eq!(
        message(records.scma_table(&a, &of_floats)),
        said("a4 must have dtype i64, got f32")
    );
    Ok(())
}
