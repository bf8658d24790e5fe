//! `padding_idx`: rows that take no part in a bag, in its count, its maximum or its gradient.

use crate::common::{
    assert_equal, config, every_hash, floats, integers, layer, message, on_each_device, to_vec,
    whole_blocks, Case, Draws, Dtypes, Form, Table, FORMS, MODES, POOLINGS,
};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_hashed_embedding_bag::{
    Hash, HashedEmbedding, HashedEmbeddingBag, HashedEmbeddingBagConfig, HashedEmbeddingConfig,
    Mode,
};

/// A lookup of bags with padding is that of the same bags without: the same output and the same gradients, and none for the
/// weights of padding.
#[test]
fn padding_is_as_if_left_out() -> Result<()> {
    on_each_device(|device| {
        for hash in every_hash() {
            for (n, (mode, weighted)) in POOLINGS.into_iter().enumerate() {
                for padding_idx in [0, 7, -1, 1 << 40, i64::MIN] {
                    for form in FORMS {
                        let len = whole_blocks(&hash, 150);
                        let table = Table {
                            padding_idx: Some(padding_idx),
                            ..Table::new(20, 19, len, mode, hash)
                        };
                        let case = Case::random(n as u64, &[6; 5], table);
                        let case = if weighted { case.weighted(9) } else { case };
                        let is_padding = |row: &i64| *row == padding_idx;
                        let kept: Vec<bool> = case
                            .bags
                            .concat()
                            .iter()
                            .map(|row| !is_padding(row))
                            .collect();
                        assert!(kept.contains(&false) && kept.contains(&true));

                        let mut without = case.clone();
                        without
                            .bags
                            .iter_mut()
                            .for_each(|bag| bag.retain(|row| !is_padding(row)));
                        without.table.padding_idx = None;
                        let keep = |values: &[f64]| -> Vec<f64> {
                            let kept = values.iter().zip(&kept).filter(|(_, &kept)| kept);
                            kept.map(|(&value, _)| value).collect()
                        };
                        without.per_sample_weights = case.per_sample_weights.as_deref().map(keep);

                        let got = case.run(form, Dtypes::default(), device)?;
                        let want = without.run(Form::Offsets, Dtypes::default(), device)?;
                        let what = format!("{:?} {form:?}\n{case:?}", device.location());
                        // A mean rounds, and its gradient adds rounded values up in any order.
                        let (ulps, sum_ulps) = match mode {
                            Mode::Mean => (2.0, 200.0),
                            _ => (0.0, 0.0),
                        };
                        assert_equal(&got.out, &want.out, ulps, &what);
                        let (got_grad, want_grad) =
                            (got.grad_weight.unwrap(), want.grad_weight.unwrap());
                        assert_equal(&got_grad, &want_grad, sum_ulps, &what);
                        if weighted {
                            let grad = to_vec(&got.grad_per_sample_weights.unwrap())?;
                            let want = to_vec(&want.grad_per_sample_weights.unwrap())?;
                            assert_eq!(keep(&grad), want, "{what}");
                            let of_padding = grad.iter().zip(&kept).filter(|(_, &kept)| !kept);
                            assert!(of_padding.map(|(grad, _)| *grad).all(|x| x == 0.0));
                        }
                    }
                }
            }
        }
        Ok(())
    })
}

/// Zeros, without a gradient.
#[test]
fn bags_of_padding_only_are_zeros() -> Result<()> {
    on_each_device(|device| {
        for mode in MODES {
            let table = Table {
                padding_idx: Some(7),
                ..Table::new(10, 4, 16, mode, Hash::default_for(4))
            };
            let dtypes = Dtypes {
                indices: DType::U32,
                offsets: DType::U32,
                ..Default::default()
            };
            let bags = vec![vec![7, 7, 7], vec![1, 7], vec![7, 7, 7]];
            let mut case = Case::of_bags(0, bags, table);
            case.check(Form::Offsets, dtypes, device)?;
            let some = case.run(Form::Offsets, dtypes, device)?;
            for bag in [0, 2] {
                assert_eq!(to_vec(&some.out.get(bag)?)?, [0.0; 4], "{mode:?}");
            }
            case.bags[1] = vec![7, 7];
            let none = case.run(Form::Offsets, dtypes, device)?;
            let [some, none] = [some, none].map(|results| to_vec(&results.grad_weight.unwrap()));
            assert_ne!(some?, [0.0; 16]);
            assert_eq!(none?, [0.0; 16]);
        }
        Ok(())
    })
}

#[test]
fn single_rows_of_padding_are_zeros() -> Result<()> {
    on_each_device(|device| {
        let config = HashedEmbeddingConfig {
            padding_idx: Some(2),
            ..Default::default()
        };
        let weight = Tensor::ones(16, DType::F32, device)?;
        let embedding = HashedEmbedding::new(weight, 10, 4, config)?;
        let out = embedding.forward(&integers(&[1, 2, 3], DType::U32, device)?)?;
        assert_eq!(to_vec(&out.get(1)?)?, [0.0; 4]);
        for row in [0, 2] {
            assert!(to_vec(&out.get(row)?)?.iter().all(|x| x.abs() == 1.0));
        }
        Ok(())
    })
}

/// Padding outside the table is no row out of range; its neighbours are.
#[test]
fn padding_may_lie_outside_the_table() -> Result<()> {
    on_each_device(|device| {
        let weight = Tensor::ones(16, DType::F32, device)?;
        for (padding_idx, outside) in [(-1, -2), (10, 11), (i64::MAX, i64::MIN)] {
            let config = HashedEmbeddingBagConfig {
                padding_idx: Some(padding_idx),
                ..Default::default()
            };
            let bag = layer(&weight, 10, 4, config)?;
            let rows = [3, padding_idx, padding_idx, padding_idx];
            let rows = integers(&rows, DType::I64, device)?.reshape((2, 2))?;
            assert_eq!(to_vec(&bag.forward(&rows)?.get(1)?)?, [0.0; 4]);
            let rows = integers(&[3, outside], DType::I64, device)?.reshape((1, 2))?;
            assert_eq!(
                message(bag.forward(&rows)),
                format!(
                    "hashed-embedding-bag: indices must lie in 0..10, got {outside} at position 1"
                )
            );
        }
        Ok(())
    })
}

/// A table of padding only fits without error, and not even its NaN does harm.
#[test]
fn fit_leaves_padding_out() -> Result<()> {
    let device = &Device::Cpu;
    let padded = HashedEmbeddingBagConfig {
        padding_idx: Some(0),
        ..Default::default()
    };
    let nan = Tensor::full(f32::NAN, (1, 4), device)?;
    let (layer, error) = HashedEmbeddingBag::fit(&nan, 0.1, padded)?;
    assert_eq!((error, to_vec(layer.hashed_weight())?), (0.0, vec![0.0; 4]));

    // Beside other rows, it is as if they were alone.
    let rows = floats(&Draws::new(1).reals(8), DType::F32, device)?.reshape((2, 4))?;
    let plain = config(Mode::Sum, Hash::original());
    let fit = |table: &Tensor, compression: f64, config| -> Result<_> {
        let (layer, error) = HashedEmbeddingBag::fit(table, compression, config)?;
        Ok((to_vec(layer.hashed_weight())?, error))
    };
    let shifted = HashedEmbeddingBagConfig {
        first_row: 1,
        ..plain
    };
    let padded = HashedEmbeddingBagConfig {
        padding_idx: Some(0),
        ..plain
    };
    let both = Tensor::cat(&[&nan, &rows], 0)?;
    assert_eq!(fit(&both, 0.5, padded)?, fit(&rows, 0.75, shifted)?);
    Ok(())
}
