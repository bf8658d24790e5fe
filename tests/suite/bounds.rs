//! Rows and offsets out of range: errors that name position and value, and what `BoundsCheck::Off` makes of them instead.

use crate::common::strategies::{check, index_dtypes, picks, tables};
use crate::common::{
    config, floats, integers, layer, message, on_each_device, to_vec, Case, Results, Table, MODES,
};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    BoundsCheck, Hash, HashedEmbeddingBag, HashedEmbeddingBagCollection, HashedEmbeddingBagConfig,
    JaggedLayout, Mode,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// 10 rows of 4 columns.
fn bag(device: &Device) -> Result<HashedEmbeddingBag> {
    let weight = Tensor::ones(16, DType::F32, device)?;
    layer(&weight, 10, 4, Default::default())
}

/// Indices out of range of a table of 10 rows, and what is said of them.
const BAD_ROWS: [(&[i64], &str); 4] = [
    (&[0, 9, 10, 11], "got 10 at position 2"),
    (&[-1, 0, 0, 0], "got -1 at position 0"),
    (
        &[0, 0, 0, i64::MAX],
        "got 9223372036854775807 at position 3",
    ),
    (
        &[0, i64::MIN, 0, 77],
        "got -9223372036854775808 at position 1",
    ),
];

/// Offsets that do not divide 4 indices, and what is said of them.
const BAD_OFFSETS: [(&[i64], &str); 6] = [
    (&[1, 2, 3], "must start at 0, got 1 at position 0"),
    (&[-1, 2, 3], "must start at 0, got -1 at position 0"),
    (&[0, 3, 2], "must not decrease, got 2 after 3 at position 2"),
    (
        &[0, -5, 2],
        "must not decrease, got -5 after 0 at position 1",
    ),
    (
        &[0, 5, 5],
        "must not pass the number of indices (4), got 5 at position 1",
    ),
    (
        &[0, 4, i64::MAX],
        "must not pass the number of indices (4), got 9223372036854775807 at position 2",
    ),
];

#[test]
fn errors_name_position_and_value() -> Result<()> {
    on_each_device(|device| {
        let bag = bag(device)?;
        let indices = integers(&[0, 1, 2, 9], DType::I64, device)?;
        for (rows, said) in BAD_ROWS {
            let rows = integers(rows, DType::I64, device)?;
            let expected = format!("hashed-embedding-bag: indices must lie in 0..10, {said}");
            assert_eq!(message(bag.forward(&rows.reshape((2, 2))?)), expected);
            let offsets = integers(&[0, 1], DType::I32, device)?;
            assert_eq!(message(bag.forward_with_offsets(&rows, &offsets)), expected);
        }
        // A u32 above every i32, and an i32 below zero.
        for (dtype, row) in [
            (DType::U32, 3_000_000_000),
            (DType::I32, -7),
            (DType::I32, i64::from(i32::MIN)),
        ] {
            let rows = integers(&[1, row], dtype, device)?.reshape((2, 1))?;
            assert_eq!(
                message(bag.forward(&rows)),
                format!("hashed-embedding-bag: indices must lie in 0..10, got {row} at position 1")
            );
        }
        for (offsets, said) in BAD_OFFSETS {
            let offsets = integers(offsets, DType::I64, device)?;
            assert_eq!(
                message(bag.forward_with_offsets(&indices, &offsets)),
                format!("hashed-embedding-bag: offsets {said}")
            );
        }
        // The device is still usable.
        let out = bag.forward(&indices.reshape((2, 2))?)?;
        assert_eq!(out.dims(), [2, 4]);
        Ok(())
    })
}

#[test]
fn the_first_of_many_bad_rows_is_named() -> Result<()> {
    on_each_device(|device| {
        let mut rows = vec![3; 10_000];
        rows[4_321] = 10;
        rows[4_322..].fill(-1);
        let rows = integers(&rows, DType::I32, device)?.reshape((100, 100))?;
        assert_eq!(
            message(bag(device)?.forward(&rows)),
            "hashed-embedding-bag: indices must lie in 0..10, got 10 at position 4321"
        );
        Ok(())
    })
}

/// Several tasks on the CPU find bad rows; the error names the first by position. In feature-major order that is not the first
/// that the first task finds.
#[test]
fn the_first_bad_row_of_a_collection_is_named_whichever_task_finds_it() -> Result<()> {
    let (tables, batch, bag_len, dim) = ([("a", 100), ("b", 100)], 1_024, 4, 32);
    on_each_device(|device| {
        let weight = Tensor::zeros(6_400, DType::F32, device)?;
        let collection =
            HashedEmbeddingBagCollection::new(weight, tables, dim, Default::default())?;
        let of_table = batch * bag_len;
        let offsets: Vec<i64> = (0..tables.len() * batch)
            .map(|bag| (bag * bag_len) as i64)
            .collect();
        let offsets = integers(&offsets, DType::I64, device)?;
        let error = |bad: &[usize]| -> Result<String> {
            let mut rows = vec![1; tables.len() * of_table];
            bad.iter().for_each(|&position| rows[position] = 100);
            let rows = integers(&rows, DType::I64, device)?;
            let layout = JaggedLayout::FeatureMajor;
            Ok(message(collection.forward_jagged(&rows, &offsets, layout)))
        };
        for (bad, want) in [
            (
                [of_table, of_table - 1],
                "table a must lie in 0..100, got 100 at position 4095",
            ),
            (
                [of_table + 1, of_table + 9],
                "table b must lie in 0..100, got 100 at position 4097",
            ),
            (
                [2, 3_000],
                "table a must lie in 0..100, got 100 at position 2",
            ),
        ] {
            let got = error(&bad)?;
            assert!(got.ends_with(want), "{got}");
        }
        Ok(())
    })
}

#[test]
fn errors_of_a_collection_name_the_table() -> Result<()> {
    on_each_device(|device| {
        const PADDING: i64 = -7;
        let tables = [("user", 50), ("movie", 7), ("genre", 300)];
        let config = HashedEmbeddingBagConfig {
            padding_idx: Some(PADDING),
            ..Default::default()
        };
        let weight = Tensor::ones(64, DType::F32, device)?;
        let collection = HashedEmbeddingBagCollection::new(weight, tables, 8, config)?;
        let ids = |ids: &[i64]| integers(ids, DType::I64, device)?.reshape((2, 3));
        let good = ids(&[49, 6, 299, 0, PADDING, 0])?;
        collection.forward(&good)?;
        for (bad, want) in [
            (
                [49, 7, 0, 0, 0, 0],
                "indices of table movie must lie in 0..7, got 7 at position 1",
            ),
            (
                [0, 0, 0, 50, 9, 0],
                "indices of table user must lie in 0..50, got 50 at position 3",
            ),
            (
                [0, 0, 0, 0, 0, -1],
                "indices of table genre must lie in 0..300, got -1 at position 5",
            ),
        ] {
            let got = message(collection.forward(&ids(&bad)?));
            assert_eq!(got, format!("hashed-embedding-bag: {want}"));
        }
        // The first position in memory, whatever the order of the bags.
        let values = integers(&[0, 51, 0, 7, 300, 0], DType::I64, device)?;
        let offsets = integers(&[0, 1, 2, 3, 4, 5], DType::I64, device)?;
        for (layout, want) in [
            (
                JaggedLayout::FeatureMajor,
                "of table user must lie in 0..50, got 51 at position 1",
            ),
            (
                JaggedLayout::BatchMajor,
                "of table movie must lie in 0..7, got 51 at position 1",
            ),
        ] {
            let got = message(collection.forward_jagged(&values, &offsets, layout));
            assert!(got.ends_with(want), "{got}");
        }
        // The device is still usable.
        collection.forward(&good)?;
        let off = collection.with_bounds_check(BoundsCheck::Off);
        assert_eq!(
            off.forward(&ids(&[49, 7, 0, -50, 0, i64::MAX])?)?.dims(),
            [2, 3, 8]
        );
        Ok(())
    })
}

/// Without checks, the same inputs read and write nothing outside the tensors. Run this test under a sanitizer to see it.
#[test]
fn unchecked_values_out_of_range_are_harmless() -> Result<()> {
    on_each_device(|device| {
        for mode in MODES {
            for hash in [Hash::original(), Hash::default_for(4)] {
                let weight = Var::ones(16, DType::F32, device)?;
                let config = HashedEmbeddingBagConfig {
                    bounds_check: BoundsCheck::Off,
                    ..config(mode, hash)
                };
                let bag = layer(&weight, 10, 4, config)?;
                let indices = integers(&[0, 1, 2, 9], DType::I64, device)?;
                for (rows, _) in BAD_ROWS {
                    let rows = integers(rows, DType::I64, device)?.reshape((2, 2))?;
                    let out = bag.forward(&rows)?;
                    assert_eq!(out.dims(), [2, 4]);
                    assert!(to_vec(&out)?.iter().all(|x| x.abs() <= 2.0));
                    let grads = out.sum_all()?.backward()?;
                    let grad = to_vec(grads.get(&weight).unwrap())?;
                    assert!(grad.iter().all(|x| x.abs() <= 16.0));
                }
                for (offsets, _) in BAD_OFFSETS {
                    let offsets = integers(offsets, DType::I64, device)?;
                    let out = bag.forward_with_offsets(&indices, &offsets)?;
                    assert_eq!(out.dims(), [3, 4]);
                    assert!(to_vec(&out)?.iter().all(|x| x.abs() <= 4.0));
                    out.sum_all()?.backward()?;
                    if mode == Mode::Sum {
                        let weights = Var::ones(4, DType::F32, device)?;
                        let out =
                            bag.forward_weighted_with_offsets(&indices, &offsets, &weights)?;
                        out.sum_all()?.backward()?;
                    }
                }
            }
        }
        Ok(())
    })
}

/// Indices and offsets of any values, right or wrong.
#[derive(Debug, Clone)]
struct Anything {
    table: Table,
    rows: Vec<i64>,
    offsets: Vec<i64>,
    index: DType,
    offset: DType,
    include_last_offset: bool,
    seed: u64,
}

fn anything() -> impl Strategy<Value = Anything> {
    let any_row = prop_oneof![8 => picks().prop_map(Ok), 1 => any::<i64>().prop_map(Err)];
    let any_offset = prop_oneof![8 => 0..20i64, 1 => -3..0i64, 1 => any::<i64>()];
    let offsets = (vec(any_offset, 0..12), any::<bool>(), any::<bool>()).prop_map(
        |(mut offsets, sorted, from_zero)| {
            if sorted {
                offsets.sort_unstable();
            }
            if from_zero {
                offsets.first_mut().into_iter().for_each(|first| *first = 0);
            }
            offsets
        },
    );
    let dtypes = (index_dtypes(), index_dtypes());
    let rest = (any::<bool>(), any::<u32>());
    (tables(), vec(any_row, 0..24), offsets, dtypes, rest).prop_map(
        |(table, rows, offsets, (index, offset), (include_last_offset, seed))| {
            // What a tensor of the dtype makes of the value: the i32 or u32 of its low bits.
            let cast = |value: i64, dtype| match dtype {
                DType::U32 => (value as u32).into(),
                DType::I32 => (value as i32).into(),
                _ => value,
            };
            let rows = rows.into_iter().map(|row| match row {
                Ok(pick) => pick.row(&table, index),
                Err(row) => cast(row, index),
            });
            let offsets = offsets.into_iter().map(|value| cast(value, offset));
            Anything {
                rows: rows.collect(),
                offsets: offsets.collect(),
                table,
                index,
                offset,
                include_last_offset,
                seed: seed.into(),
            }
        },
    )
}

impl Anything {
    /// What is said of the first offset, or else the first row, that breaks the contract.
    fn refusal(&self) -> Option<String> {
        let (table, nnz) = (&self.table, self.rows.len() as i64);
        if self.include_last_offset && self.offsets.is_empty() {
            return Some(
                "offsets must hold num_bags + 1 values when include_last_offset is set, got none"
                    .into(),
            );
        }
        for (i, &offset) in self.offsets.iter().enumerate() {
            if i == 0 && offset != 0 {
                return Some(format!(
                    "offsets must start at 0, got {offset} at position 0"
                ));
            }
            if i > 0 && offset < self.offsets[i - 1] {
                let previous = self.offsets[i - 1];
                return Some(format!(
                    "offsets must not decrease, got {offset} after {previous} at position {i}"
                ));
            }
            if offset > nnz {
                return Some(format!(
                    "offsets must not pass the number of indices ({nnz}), got {offset} at position {i}"
                ));
            }
        }
        // Indices that are in no bag are not checked.
        let end = match self.offsets.last() {
            Some(&end) if self.include_last_offset => end as usize,
            Some(_) => self.rows.len(),
            None => 0,
        };
        let is_bad = |&row: &i64| {
            (row < 0 || row >= table.num_embeddings as i64) && Some(row) != table.padding_idx
        };
        let position = self.rows[..end].iter().position(is_bad)?;
        let (n, row) = (table.num_embeddings, self.rows[position]);
        Some(format!(
            "indices must lie in 0..{n}, got {row} at position {position}"
        ))
    }

    /// The lookup that is made without checks: every offset is clamped to the number of indices.
    fn clamped(&self) -> Case {
        let nnz = self.rows.len();
        let clamp = |&offset: &i64| offset.clamp(0, nnz as i64) as usize;
        let mut offsets: Vec<_> = self.offsets.iter().map(clamp).collect();
        if !self.include_last_offset {
            offsets.push(nnz);
        }
        let bags = offsets.windows(2).map(|ends| match ends {
            &[start, end] if start < end => self.rows[start..end].to_vec(),
            _ => vec![],
        });
        Case::of_bags(self.seed, bags.collect(), self.table)
    }
}

/// With checks, exactly what breaks the contract is refused, by position and value. Without, rows are hashed like any other and
/// offsets are clamped, forward and backward.
#[test]
fn random_indices_and_offsets_are_refused_or_clamped() {
    check(anything(), |input, device| {
        let refusal = input.refusal();
        let case = input.clamped();
        let weight = Var::from_tensor(&floats(&case.hashed_weight, DType::F32, device)?)?;
        let Table {
            num_embeddings,
            embedding_dim,
            ..
        } = case.table;
        let config = HashedEmbeddingBagConfig {
            include_last_offset: input.include_last_offset,
            ..case.table.config()
        };
        let layer = layer(&weight, num_embeddings, embedding_dim, config)?;
        let indices = integers(&input.rows, input.index, device)?;
        let offsets = integers(&input.offsets, input.offset, device)?;
        let out = layer.forward_with_offsets(&indices, &offsets);
        match &refusal {
            Some(refusal) => assert_eq!(message(out), format!("hashed-embedding-bag: {refusal}")),
            None => drop(out?),
        }
        if input.include_last_offset && input.offsets.is_empty() {
            return Ok(());
        }
        let layer = layer.with_bounds_check(BoundsCheck::Off);
        let out = layer.forward_with_offsets(&indices, &offsets)?;
        let grad_output = floats(&case.grad_output, DType::F32, device)?.reshape(out.shape())?;
        let grads = out.mul(&grad_output)?.sum_all()?.backward()?;
        let results = Results {
            grad_weight: grads.get(&weight).cloned(),
            grad_per_sample_weights: None,
            out,
        };
        let what = format!("{:?} {refusal:?}\n{input:?}", device.location());
        case.assert_results(&results, DType::F32, &what)?;
        // candle cannot make an empty variable on CUDA.
        if case.table.mode == Mode::Sum && !input.rows.is_empty() {
            let weights = Var::ones(indices.shape(), DType::F32, device)?;
            let out = layer.forward_weighted_with_offsets(&indices, &offsets, &weights)?;
            let grads = out.sum_all()?.backward()?;
            // A position may be in many bags or in none, so only the shape of its gradient is certain.
            let grad = grads.get(&weights).expect("the weights are a variable");
            assert_eq!(grad.shape(), indices.shape());
        }
        Ok(())
    });
}
