//! Outputs and gradients against the naive oracle, over every mode, dtype, hash, form of bags, and width at which memory
//! accesses, blocks and warps end.
//!
//! The test data are small multiples of 1/2, so sums are exact in every dtype and in every order of additions. Only mean, which
//! divides, is compared within a rounding.

use crate::common::strategies::{check, lookups};
use crate::common::{
    assert_equal, every_hash, floats, integers, on_each_device, to_vec, whole_blocks, Case, Dtypes,
    Form, Table, DTYPES, FORMS, INDEX_DTYPES, MODES, POOLINGS,
};
use candle_core::{DType, Module, Result};
use candle_hashed_embedding_bag::{Hash, HashedEmbedding, HashedEmbeddingConfig, Mode};

#[test]
fn every_mode_hash_and_width_matches_the_oracle() -> Result<()> {
    on_each_device(|device| {
        let mut n = 0;
        for hash in every_hash() {
            for embedding_dim in [1, 2, 3, 5, 8, 16, 20, 33, 64, 130] {
                for (mode, weighted) in POOLINGS {
                    // Everything else changes from case to case.
                    n += 1;
                    let form = FORMS[n % 3];
                    let lens: &[usize] = match form {
                        Form::Fixed => &[5, 5, 5],
                        _ => &[3, 0, 9, 1, 4, 0],
                    };
                    let padding_idx = [None, Some(2), Some(-1)][n / 3 % 3];
                    let indices = match padding_idx {
                        // u32 cannot name row -1.
                        Some(-1) => INDEX_DTYPES[1 + n % 2],
                        _ => INDEX_DTYPES[n % 3],
                    };
                    let dtypes = Dtypes {
                        weight: DTYPES[(n + n / 4) % 4],
                        indices,
                        offsets: INDEX_DTYPES[n / 2 % 3],
                    };
                    let len = whole_blocks(&hash, 200 + n % 7);
                    let table = Table {
                        padding_idx,
                        ..Table::new(50, embedding_dim, len, mode, hash)
                    };
                    let case = Case::random(n as u64, lens, table);
                    let case = if weighted {
                        case.weighted(n as u64)
                    } else {
                        case
                    };
                    case.check(form, dtypes, device)?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn every_combination_of_dtypes_matches_the_oracle() -> Result<()> {
    on_each_device(|device| {
        for hash in [Hash::original(), Hash::default_for(16)] {
            for weight in DTYPES {
                for indices in INDEX_DTYPES {
                    for offsets in INDEX_DTYPES {
                        let dtypes = Dtypes {
                            weight,
                            indices,
                            offsets,
                        };
                        for (n, form) in FORMS.into_iter().enumerate() {
                            let table = Table::new(30, 16, 320, Mode::Sum, hash);
                            let case = Case::random(n as u64, &[4; 3], table);
                            case.check(form, dtypes, device)?;
                            case.weighted(5).check(form, dtypes, device)?;
                        }
                    }
                }
            }
        }
        Ok(())
    })
}

#[test]
fn many_bags_and_long_bags_match_the_oracle() -> Result<()> {
    on_each_device(|device| {
        for mode in MODES {
            let lens: Vec<usize> = (0..300).map(|i| i * 7 % 11).chain([400]).collect();
            let table = Table {
                padding_idx: Some(3),
                ..Table::new(10_000, 8, 4_000, mode, Hash::default_for(8))
            };
            Case::random(1, &lens, table).check(Form::Offsets, Dtypes::default(), device)?;
        }
        Ok(())
    })
}

/// Random tables, dtypes, forms of bags and layouts of every tensor in memory.
#[test]
fn random_lookups_match_the_oracle() {
    check(lookups(), |lookup, device| {
        let results = lookup.run(device)?;
        let what = format!("{:?}\n{lookup:?}", device.location());
        lookup.case.assert_results(&results, lookup.dtype, &what)
    });
}

/// `HashedEmbedding` adds the embedding dimension to the shape of the indices, whatever their rank and strides.
#[test]
fn single_rows_have_the_shape_of_their_indices() -> Result<()> {
    on_each_device(|device| {
        let table = Table {
            padding_idx: Some(3),
            ..Table::new(20, 6, 64, Mode::Sum, Hash::default_for(6))
        };
        let case = Case::random(0, &[1; 12], table);
        let weight = floats(&case.hashed_weight, DType::F32, device)?;
        let config = HashedEmbeddingConfig {
            hash: Some(table.hash),
            padding_idx: table.padding_idx,
            ..Default::default()
        };
        let embedding = HashedEmbedding::new(weight, 20, 6, config)?;
        assert_eq!(embedding.config(), config);
        let rows: Vec<i64> = case.bags.concat();
        assert!(rows.contains(&3), "a padding row is among them");
        let indices = integers(&rows, DType::I64, device)?;
        let want = case.oracle()?.out;
        for shape in [&[12][..], &[3, 4], &[2, 3, 2], &[1, 2, 1, 6]] {
            let out = embedding.forward(&indices.reshape(shape)?)?;
            assert_eq!(out.dims(), [shape, &[6]].concat());
            assert_equal(&out.reshape((12, 6))?, &want, 0.0, "embedding");
        }
        let strided = integers(&[&rows[..], &rows[..]].concat(), DType::I32, device)?;
        let strided = strided.reshape((2, 3, 4))?.t()?;
        let want_strided = want.reshape((3, 4, 6))?.transpose(0, 1)?.unsqueeze(0)?;
        let want_strided = want_strided.broadcast_as((2, 4, 3, 6))?;
        let out = embedding.forward(&strided)?;
        assert_equal(&out, &want_strided.contiguous()?, 0.0, "strided embedding");
        let scalar = indices.get(5)?;
        assert_eq!(embedding.forward(&scalar)?.dims(), [6]);
        assert_eq!(
            to_vec(&embedding.forward(&scalar)?)?,
            to_vec(&want.get(5)?)?
        );
        Ok(())
    })
}
