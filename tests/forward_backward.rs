//! Outputs and gradients against the naive oracle: every mode, dtype, index dtype, hash family, form of bags, padding,
//! and the shapes where vector accesses, blocks and warps end.
//!
//! The test data are multiples of 1/2 and small, so that sums are exact in every dtype and in every order of additions;
//! only mean, which divides, is compared within a rounding.

mod common;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    Balanced, BoundsCheck, Hash, HashedEmbedding, HashedEmbeddingBag, HashedEmbeddingConfig, Mix,
    Mode,
};
use common::{
    assert_equal, floats, integers, naive_slot, on_each_device, to_vec, Case, Draws, Form,
};

const DTYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];
const INDEX_DTYPES: [DType; 3] = [DType::U32, DType::I64, DType::I32];
const FORMS: [Form; 3] = [Form::Fixed, Form::Offsets, Form::OffsetsWithLast];

/// Runs one case and compares output and gradients with the oracle's.
fn check(
    case: &Case,
    form: Form,
    dtype: DType,
    index: DType,
    offset: DType,
    device: &Device,
) -> Result<()> {
    let what = format!(
        "{:?} {form:?} {dtype:?} indices {index:?} offsets {offset:?}\n{case:?}",
        device.location()
    );
    let results = case.run(form, dtype, index, offset, device)?;
    case.assert_results(&results, dtype, &what)
}

/// Every hash family, with blocks that fill a 16-byte access once, often, in part or not at all.
fn hashes() -> Vec<Hash> {
    let robe = [2_038_074_743, 634_329_019, 1_825_252_241, 871_205_356];
    vec![
        Hash::original(),
        Hash::robe(&robe, 1).unwrap(),
        Hash::robe(&robe, 8).unwrap(),
        Hash::affine(u64::MAX - 58, u64::MAX / 3, 7, u64::MAX - 4, 3),
        Hash::mix(1),
        Hash::from(Balanced {
            seed: 7,
            block: 3,
            signed: true,
        }),
        Hash::from(Mix {
            seed: u64::MAX,
            block: 4,
            signed: false,
        }),
        Hash::balanced(1),
        Hash::from(Balanced {
            seed: 1,
            block: 4,
            signed: true,
        }),
        Hash::from(Mix {
            seed: 1,
            block: 8,
            signed: true,
        }),
        Hash::from(Balanced {
            seed: 9,
            block: 8,
            signed: false,
        }),
        Hash::from(Mix {
            seed: 2,
            block: 16,
            signed: true,
        }),
        Hash::from(Balanced {
            seed: 2,
            block: 16,
            signed: true,
        }),
        Hash::from(Balanced {
            seed: 3,
            block: 32,
            signed: true,
        }),
        Hash::from(Mix {
            seed: 4,
            block: 64,
            signed: false,
        }),
    ]
}

/// A length of about `about` that suits the hash.
fn len_for(hash: &Hash, about: usize) -> usize {
    about.div_ceil(hash.block()) * hash.block()
}

#[test]
fn all_modes_hashes_and_dims() -> Result<()> {
    on_each_device(|device| {
        let mut n = 0;
        for hash in hashes() {
            for embedding_dim in [1, 2, 3, 5, 8, 16, 20, 33, 64, 130] {
                for kind in 0..4 {
                    n += 1;
                    let mode = [Mode::Sum, Mode::Mean, Mode::Max, Mode::Sum][kind];
                    let form = FORMS[n % 3];
                    let lens: &[usize] = match form {
                        Form::Fixed => &[5, 5, 5],
                        _ => &[3, 0, 9, 1, 4, 0],
                    };
                    let padding_idx = [None, Some(2), Some(-1)][n / 3 % 3];
                    let index = match padding_idx {
                        Some(-1) => INDEX_DTYPES[1 + n % 2],
                        _ => INDEX_DTYPES[n % 3],
                    };
                    let mut case = Case::random(
                        n as u64,
                        lens,
                        50,
                        embedding_dim,
                        len_for(&hash, 200 + n % 7),
                        mode,
                        hash,
                        padding_idx,
                    );
                    if kind == 3 {
                        case = case.weighted(n as u64);
                    }
                    let dtype = DTYPES[(n + n / 4) % 4];
                    check(&case, form, dtype, index, INDEX_DTYPES[n / 2 % 3], device)?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn all_dtypes() -> Result<()> {
    on_each_device(|device| {
        for hash in [Hash::original(), Hash::default_for(16)] {
            for dtype in DTYPES {
                for index in INDEX_DTYPES {
                    for offset in INDEX_DTYPES {
                        for (n, form) in FORMS.into_iter().enumerate() {
                            let case =
                                Case::random(n as u64, &[4; 3], 30, 16, 320, Mode::Sum, hash, None);
                            check(&case, form, dtype, index, offset, device)?;
                            check(&case.weighted(5), form, dtype, index, offset, device)?;
                        }
                    }
                }
            }
        }
        Ok(())
    })
}

#[test]
fn many_bags_and_long_bags() -> Result<()> {
    on_each_device(|device| {
        for mode in [Mode::Sum, Mode::Mean, Mode::Max] {
            let lens: Vec<usize> = (0..300).map(|i| i * 7 % 11).chain([400]).collect();
            let hash = Hash::default_for(8);
            let case = Case::random(1, &lens, 10_000, 8, 4_000, mode, hash, Some(3));
            check(
                &case,
                Form::Offsets,
                DType::F32,
                DType::I64,
                DType::I64,
                device,
            )?;
        }
        Ok(())
    })
}

/// No bags, no indices, empty bags, and bags of padding only: zeros, without a gradient.
#[test]
fn nothing_to_look_up() -> Result<()> {
    on_each_device(|device| {
        for mode in [Mode::Sum, Mode::Mean, Mode::Max] {
            for lens in [&[][..], &[0], &[0, 0, 0]] {
                for form in FORMS {
                    let hash = Hash::default_for(4);
                    let case = Case::random(0, lens, 10, 4, 16, mode, hash, None);
                    check(&case, form, DType::F32, DType::U32, DType::U32, device)?;
                    if mode == Mode::Sum {
                        check(
                            &case.weighted(0),
                            form,
                            DType::F32,
                            DType::I64,
                            DType::I32,
                            device,
                        )?;
                    }
                }
            }
            let hash = Hash::default_for(4);
            let mut case = Case::random(0, &[3, 2, 3], 10, 4, 16, mode, hash, Some(7));
            case.bags = vec![vec![7, 7, 7], vec![1, 7], vec![7, 7, 7]];
            check(
                &case,
                Form::Offsets,
                DType::F32,
                DType::U32,
                DType::U32,
                device,
            )?;
            let (out, grad_weight, _) =
                case.run(Form::Offsets, DType::F32, DType::U32, DType::U32, device)?;
            assert!(to_vec(&out.get(0)?)?.iter().all(|&x| x == 0.0), "{mode:?}");
            case.bags[1] = vec![7, 7];
            let (_, nothing, _) =
                case.run(Form::Offsets, DType::F32, DType::U32, DType::U32, device)?;
            assert_ne!(
                to_vec(&grad_weight.unwrap())?,
                to_vec(&nothing.clone().unwrap())?
            );
            assert!(to_vec(&nothing.unwrap())?.iter().all(|&x| x == 0.0));
        }
        Ok(())
    })
}

/// Literals small enough to check by eye, no oracle: the columns of rows 0 and 1 of a table of two.
#[test]
fn literals() -> Result<()> {
    on_each_device(|device| {
        // slot = (row + 2 * column) mod 4
        let hash = Hash::affine(1, 2, 0, 1 << 20, 1);
        let hashed_weight = Var::new(&[10f32, 20., 30., 40.], device)?;
        let bag = |mode| {
            let config = candle_hashed_embedding_bag::HashedEmbeddingBagConfig {
                mode,
                hash: Some(hash),
                ..Default::default()
            };
            HashedEmbeddingBag::new(hashed_weight.as_tensor().clone(), 2, 2, config)
        };
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

        let grad = sum.sum_all()?.backward()?;
        let grad = grad.get(&hashed_weight).unwrap();
        assert_eq!(grad.to_vec1::<f32>()?, [1., 3., 1., 3.]);
        let grad = max.sum_all()?.backward()?;
        let grad = grad.get(&hashed_weight).unwrap();
        assert_eq!(grad.to_vec1::<f32>()?, [0., 2., 0., 2.]);
        Ok(())
    })
}

#[test]
fn max_is_the_first_of_equals_and_nan_is_largest() -> Result<()> {
    on_each_device(|device| {
        // slot = row: a table of one column.
        let config = candle_hashed_embedding_bag::HashedEmbeddingBagConfig {
            mode: Mode::Max,
            hash: Some(Hash::affine(1, 0, 0, 1 << 20, 1)),
            ..Default::default()
        };
        let weight = Var::new(&[5f32, 7., 7., f32::NAN, f32::NEG_INFINITY], device)?;
        let bag = HashedEmbeddingBag::new(weight.as_tensor().clone(), 5, 1, config)?;
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

/// A contiguous copy made on the CPU: on CUDA, candle cannot copy i32.
fn contiguous(indices: &Tensor) -> Result<Tensor> {
    let device = indices.device();
    indices
        .to_device(&Device::Cpu)?
        .contiguous()?
        .to_device(device)
}

/// Narrowed, transposed and broadcast inputs give what their contiguous copies give.
#[test]
fn strided_inputs() -> Result<()> {
    on_each_device(|device| {
        for dtype in DTYPES {
            for index in INDEX_DTYPES {
                let hash = Hash::mix(8);
                let mut draws = Draws::new(3);
                let rows: Vec<i64> = (0..48).map(|_| draws.below(40) as i64).collect();
                let whole = integers(&rows, index, device)?;
                // Starting at 1, so that it is not aligned to 16 bytes.
                let padded = Var::from_tensor(&floats(&draws.halves(81), dtype, device)?)?;
                let weight = padded.narrow(0, 1, 80)?;
                let config = candle_hashed_embedding_bag::HashedEmbeddingBagConfig {
                    hash: Some(hash),
                    ..Default::default()
                };
                let strided = HashedEmbeddingBag::new(weight.clone(), 40, 12, config)?;
                let straight_weight = Var::from_tensor(&weight.copy()?)?;
                let straight =
                    HashedEmbeddingBag::new(straight_weight.as_tensor().clone(), 40, 12, config)?;

                let transposed = whole.reshape((8, 6))?.t()?;
                let columns = whole.reshape((6, 8))?.narrow(1, 2, 3)?;
                let every_other = whole.reshape((24, 2))?.narrow(1, 1, 1)?.squeeze(1)?;
                let offsets = integers(&[0, 99, 5, 99, 5, 99, 20, 99], index, device)?
                    .reshape((4, 2))?
                    .narrow(1, 0, 1)?
                    .squeeze(1)?;
                let one_row = whole.narrow(0, 3, 5)?.unsqueeze(0)?.broadcast_as((4, 5))?;
                let weights = floats(&draws.halves(96), dtype, device)?
                    .reshape((48, 2))?
                    .narrow(1, 1, 1)?
                    .squeeze(1)?;
                for indices in [&transposed, &columns, &one_row] {
                    let a = strided.forward(indices)?;
                    let b = straight.forward(&contiguous(indices)?)?;
                    assert_eq!(to_vec(&a)?, to_vec(&b)?);
                    // A gradient that is itself strided.
                    let grad = |out: &Tensor| out.t()?.contiguous()?.narrow(0, 1, 7)?.sum_all();
                    let (a, b) = (grad(&a)?.backward()?, grad(&b)?.backward()?);
                    let a = a.get(&padded).unwrap().narrow(0, 1, 80)?;
                    assert_eq!(to_vec(&a)?, to_vec(b.get(&straight_weight).unwrap())?);
                }
                let a = strided.forward_with_offsets(&every_other, &offsets)?;
                let b = straight
                    .forward_with_offsets(&contiguous(&every_other)?, &contiguous(&offsets)?)?;
                assert_eq!(to_vec(&a)?, to_vec(&b)?);
                let weights = weights.narrow(0, 7, 24)?;
                let a = strided.forward_weighted_with_offsets(&every_other, &offsets, &weights)?;
                let b = straight.forward_weighted_with_offsets(
                    &contiguous(&every_other)?,
                    &contiguous(&offsets)?,
                    &weights.copy()?,
                )?;
                assert_eq!(to_vec(&a)?, to_vec(&b)?);
            }
        }
        Ok(())
    })
}

#[test]
fn hashed_embedding_takes_any_rank() -> Result<()> {
    on_each_device(|device| {
        let case = Case::random(
            0,
            &[1; 12],
            20,
            6,
            64,
            Mode::Sum,
            Hash::default_for(6),
            Some(3),
        );
        let weight = floats(&case.hashed_weight, DType::F32, device)?;
        let config = HashedEmbeddingConfig {
            hash: Some(case.hash),
            padding_idx: case.padding_idx,
            ..Default::default()
        };
        let embedding = HashedEmbedding::new(weight, 20, 6, config)?;
        assert_eq!(embedding.config(), config);
        let rows: Vec<i64> = case.bags.concat();
        let indices = integers(&rows, DType::I64, device)?;
        let (want, _, _) = case.oracle()?;
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

/// What the loops hash is what `Hash::slot` says, on each device: weights that are their own position show it.
#[test]
fn slots_are_the_same_everywhere() -> Result<()> {
    on_each_device(|device| {
        for hash in hashes() {
            let (embedding_dim, len) = (70, len_for(&hash, 100_003));
            // From 1, so that every value has a sign; exact in f64.
            let weight: Vec<f64> = (1..=len).map(|slot| slot as f64).collect();
            let rows = [0, 1, 2, -1, 1 << 31, 1 << 40, i64::MAX, i64::MIN];
            let config = HashedEmbeddingConfig {
                hash: Some(hash),
                bounds_check: BoundsCheck::Off,
                ..Default::default()
            };
            for dtype in [DType::F64, DType::F32] {
                let weight = floats(&weight, dtype, device)?;
                let embedding = HashedEmbedding::new(weight, 100, embedding_dim, config)?;
                let out = to_vec(&embedding.forward(&integers(&rows, DType::I64, device)?)?)?;
                for (i, (&row, column)) in rows
                    .iter()
                    .flat_map(|row| (0..embedding_dim).map(move |column| (row, column)))
                    .enumerate()
                {
                    let (slot, sign) = hash.slot(row, column, len)?;
                    assert_eq!(
                        out[i],
                        (slot + 1) as f64 * f64::from(sign),
                        "{hash:?} {row} {column}"
                    );
                    let naive = naive_slot(&hash, row, column, len);
                    assert_eq!((slot, f64::from(sign)), naive, "{hash:?} {row} {column}");
                }
            }
        }
        Ok(())
    })
}
