//! What sum, mean and max make of a bag: small examples, empty bags, equal values, and values that are not finite.

use crate::common::strategies::{check, gradients, hashes, len_for, modes};
use crate::common::{
    affine, config, integers, layer, naive_element, offsets_of, on_each_device, Case, Dtypes,
    Table, FORMS, MODES,
};
use candle_core::{DType, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{Hash, HashedEmbeddingBagConfig, Mode};
use proptest::collection::vec;
use proptest::prelude::*;

/// Examples small enough to check by eye.
#[test]
fn two_rows_of_two_columns() -> Result<()> {
    on_each_device(|device| {
        // slot = (row + 2 * column) mod 4
        let hash = affine(1, 2, 0, 1 << 20, 1);
        let hashed_weight = Var::new(&[10f32, 20., 30., 40.], device)?;
        let bag = |mode| layer(&hashed_weight, 2, 2, config(mode, hash));
        // Rows 0 = [10, 30] and 1 = [20, 40].
        let indices = Tensor::new(&[[0u32, 1], [1, 1]], device)?;
        let sum = bag(Mode::Sum)?.forward(&indices)?;
        assert_eq!(sum.to_vec2::<f32>()?, [[30., 70.], [40., 80.]]);
        let mean = bag(Mode::Mean)?.forward(&indices)?;
        assert_eq!(mean.to_vec2::<f32>()?, [[15., 35.], [20., 40.]]);
        let max = bag(Mode::Max)?.forward(&indices)?;
        assert_eq!(max.to_vec2::<f32>()?, [[20., 40.], [20., 40.]]);
        let weights = Tensor::new(&[[0.5f32, 2.], [1., -1.]], device)?;
        let weighted = bag(Mode::Sum)?.forward_weighted(&indices, &weights)?;
        assert_eq!(weighted.to_vec2::<f32>()?, [[45., 95.], [0., 0.]]);

        for (out, want) in [
            (sum, [1., 3., 1., 3.]),
            (mean, [0.5, 1.5, 0.5, 1.5]),
            (max, [0., 2., 0., 2.]),
            (weighted, [0.5, 2., 0.5, 2.]),
        ] {
            let grads = out.sum_all()?.backward()?;
            let grad = grads.get(&hashed_weight).unwrap();
            assert_eq!(grad.to_vec1::<f32>()?, want);
        }
        Ok(())
    })
}

/// No bags, no indices, and empty bags: zeros, without a gradient.
#[test]
fn empty_bags_are_zeros() -> Result<()> {
    on_each_device(|device| {
        for mode in MODES {
            for lens in [&[][..], &[0], &[0, 0, 0]] {
                for form in FORMS {
                    let table = Table::new(10, 4, 16, mode, Hash::default_for(4));
                    let case = Case::random(0, lens, table);
                    let u32s = Dtypes {
                        indices: DType::U32,
                        offsets: DType::U32,
                        ..Default::default()
                    };
                    case.check(form, u32s, device)?;
                    if mode == Mode::Sum {
                        let mixed = Dtypes {
                            indices: DType::I64,
                            offsets: DType::I32,
                            ..Default::default()
                        };
                        case.weighted(0).check(form, mixed, device)?;
                    }
                }
            }
        }
        Ok(())
    })
}

#[test]
fn max_takes_the_first_of_equals_and_nan_is_largest() -> Result<()> {
    on_each_device(|device| {
        // slot = row: a table of one column.
        let config = config(Mode::Max, affine(1, 0, 0, 1 << 20, 1));
        let weight = Var::new(&[5f32, 7., 7., f32::NAN, f32::NEG_INFINITY], device)?;
        let bag = layer(&weight, 5, 1, config)?;
        let grad_of = |rows: &[u32]| -> Result<(f32, Vec<f32>)> {
            let out = bag.forward(&Tensor::new(rows, device)?.unsqueeze(0)?)?;
            let grads = out.sum_all()?.backward()?;
            let grad = grads.get(&weight).unwrap().to_vec1()?;
            Ok((out.flatten_all()?.to_vec1::<f32>()?[0], grad))
        };
        assert_eq!(grad_of(&[0, 2, 1])?, (7., vec![0., 0., 1., 0., 0.]));
        assert_eq!(grad_of(&[1, 0, 2])?, (7., vec![0., 1., 0., 0., 0.]));
        assert_eq!(
            grad_of(&[4])?,
            (f32::NEG_INFINITY, vec![0., 0., 0., 0., 1.])
        );
        let (value, grad) = grad_of(&[1, 3, 2])?;
        assert!(value.is_nan());
        assert_eq!(grad, [0., 0., 0., 1., 0.]);
        Ok(())
    })
}

/// NaN, infinities, zeros of both signs and subnormals. Max is exact to the bit; a sum, a mean or a gradient is not finite
/// exactly where the formula says so.
#[test]
fn values_that_are_not_finite_stay_so() {
    const KINDS: [f32; 9] = [
        0.0,
        -0.0,
        1.5,
        1.5,
        -2.5,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1e-40,
    ];
    let values = || vec(prop::sample::select(KINDS.to_vec()), 8);
    let bags = vec(vec(0..50i64, 0..6), 1..6);
    let strategy = (1..40usize, modes(), gradients(), bags)
        .prop_flat_map(move |table| (Just(table.clone()), hashes(table.0), values(), values()));
    check(
        strategy,
        |((embedding_dim, mode, gradient, bags), hash, values, grads), device| {
            let len = len_for(hash, 64);
            let weight: Vec<f32> = (0..len).map(|slot| values[slot % 8]).collect();
            let grad_output: Vec<f32> = (0..bags.len() * embedding_dim)
                .map(|i| grads[i % 8])
                .collect();
            let mut want = vec![];
            let mut want_grad = vec![0.0; len];
            for (bag, grads) in bags.iter().zip(grad_output.chunks(*embedding_dim)) {
                for (column, grad) in grads.iter().enumerate() {
                    let slots: Vec<_> = bag
                        .iter()
                        .map(|&row| naive_element(hash, row, column, len))
                        .collect();
                    let value = |&(slot, sign): &(usize, f64)| weight[slot] * sign as f32;
                    if *mode == Mode::Max {
                        let mut best: Option<&(usize, f64)> = None;
                        for slot in &slots {
                            let wins = best.is_none_or(|best| {
                                let (best, value) = (value(best), value(slot));
                                value > best || value.is_nan() && !best.is_nan()
                            });
                            best = if wins { Some(slot) } else { best };
                        }
                        want.push(best.map_or(0.0, value));
                        if let Some((slot, sign)) = best {
                            want_grad[*slot] += grad * *sign as f32;
                        }
                    } else {
                        let count = if *mode == Mode::Mean {
                            bag.len().max(1) as f32
                        } else {
                            1.0
                        };
                        want.push(slots.iter().map(value).sum::<f32>() / count);
                        for (slot, sign) in &slots {
                            want_grad[*slot] += grad * *sign as f32 / count;
                        }
                    }
                }
            }
            let var = Var::from_slice(&weight, len, device)?;
            let config = HashedEmbeddingBagConfig {
                gradient: *gradient,
                include_last_offset: true,
                ..config(*mode, *hash)
            };
            let layer = layer(&var, 50, *embedding_dim, config)?;
            let indices = integers(&bags.concat(), DType::I64, device)?;
            let offsets = integers(&offsets_of(bags), DType::I64, device)?;
            let out = layer.forward_with_offsets(&indices, &offsets)?;
            let got: Vec<f32> = out.flatten_all()?.to_vec1()?;
            let same_kind = |a: f32, b: f32| {
                a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= 1e-6 * a.abs().max(1.0)
            };
            for (got, want) in got.iter().zip(&want) {
                // On CUDA the maximum of zeros of both signs is the positive one.
                let exact = got.to_bits() == want.to_bits()
                    || got.is_nan() && want.is_nan()
                    || device.is_cuda() && *got == 0.0 && *want == 0.0;
                assert!(
                    if *mode == Mode::Max {
                        exact
                    } else {
                        same_kind(*got, *want)
                    },
                    "{got} {want}"
                );
            }
            let grad_output = Tensor::from_slice(&grad_output, out.shape(), device)?;
            let loss = out.mul(&grad_output)?.sum_all()?.backward()?;
            let got = loss
                .get(&var)
                .expect("hashed_weight is a variable")
                .to_vec1::<f32>()?;
            for (got, want) in got.iter().zip(&want_grad) {
                assert!(same_kind(*got, *want), "gradient {got} {want}");
            }
            Ok(())
        },
    );
}
