//! Jagged bags per feature, joined for a lookup in a collection.

use crate::common::{
    assert_equal, cuda, floats, integers, message, offsets_of, on_each_device, to_vec, Draws,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    BoundsCheck, HashedEmbeddingBagCollection, HashedEmbeddingBagConfig, JaggedLayout,
    JaggedTensor, KeyedJaggedTensor, Mode,
};

const FEATURES: [(&str, &str); 3] = [("user", "user"), ("history", "movie"), ("next", "movie")];

fn collection(
    weight: &Tensor,
    config: HashedEmbeddingBagConfig,
) -> Result<HashedEmbeddingBagCollection> {
    let tables = [("user", 50), ("movie", 70)];
    HashedEmbeddingBagCollection::new(weight.clone(), tables, 8, config)?.with_features(FEATURES)
}

/// How a test gives the bags of a feature.
#[derive(Debug, Clone, Copy)]
enum Form {
    Lengths,
    Starts,
    StartsAndEnd,
}
use Form::*;

fn bags_of(
    bags: &[Vec<i64>],
    form: Form,
    dtypes: [DType; 2],
    device: &Device,
) -> Result<JaggedTensor> {
    let indices = integers(&bags.concat(), dtypes[0], device)?;
    let mut offsets = offsets_of(bags);
    Ok(match form {
        Lengths => {
            let lengths: Vec<_> = bags.iter().map(|bag| bag.len() as i64).collect();
            JaggedTensor::from_lengths(indices, integers(&lengths, dtypes[1], device)?)
        }
        StartsAndEnd => {
            JaggedTensor::from_offsets(indices, integers(&offsets, dtypes[1], device)?, true)
        }
        Starts => {
            offsets.pop();
            JaggedTensor::from_offsets(indices, integers(&offsets, dtypes[1], device)?, false)
        }
    })
}

/// Joins bags under the names of the features, checked.
fn join(bags: impl IntoIterator<Item = Result<JaggedTensor>>) -> Result<KeyedJaggedTensor> {
    let features = FEATURES.iter().zip(bags);
    let features = features.map(|((name, _), bags)| Ok((*name, bags?)));
    let features: Vec<_> = features.collect::<Result<_>>()?;
    KeyedJaggedTensor::new(features, BoundsCheck::Error)
}

/// Bags of up to four rows for each of the features.
fn bags(batch: usize, seed: u64) -> Vec<Vec<Vec<i64>>> {
    let mut draws = Draws::new(seed);
    [50, 70, 70]
        .map(|rows| {
            let bag = |_| {
                let len = draws.below(5);
                draws.rows(len, rows)
            };
            (0..batch).map(bag).collect()
        })
        .to_vec()
}

#[test]
fn features_are_joined_one_after_the_other() -> Result<()> {
    on_each_device(|device| {
        let weight = floats(&Draws::new(1).halves(200), DType::F32, device)?;
        for (forms, batch) in [
            ([Lengths, Lengths, Lengths], 5),
            ([Starts, Starts, Starts], 5),
            ([StartsAndEnd, StartsAndEnd, StartsAndEnd], 5),
            ([Starts, Lengths, StartsAndEnd], 5),
            ([Lengths, StartsAndEnd, Starts], 1),
            // More bags than are summed at once on CUDA.
            ([Lengths, Starts, Lengths], 1000),
        ] {
            for dtypes in [
                [DType::U32, DType::I64],
                [DType::I64, DType::U32],
                [DType::I32, DType::I32],
            ] {
                if device.is_cuda() && dtypes.contains(&DType::I32) {
                    continue;
                }
                let what = format!("{forms:?} {batch} {dtypes:?}");
                let bags = bags(batch, 7);
                let keyed = join(
                    bags.iter()
                        .zip(forms)
                        .map(|(bags, form)| bags_of(bags, form, dtypes, device)),
                )?;
                assert!(keyed.keys().eq(["user", "history", "next"]));
                assert_eq!(keyed.batch_size(), batch);
                let all = bags.concat();
                let as_f64 =
                    |values: Vec<i64>| values.into_iter().map(|v| v as f64).collect::<Vec<_>>();
                assert_eq!(keyed.indices().dtype(), dtypes[0]);
                assert_eq!(to_vec(keyed.indices())?, as_f64(all.concat()), "{what}");
                assert_eq!(to_vec(keyed.offsets())?, as_f64(offsets_of(&all)), "{what}");
                let lengths = keyed.lengths()?;
                assert_eq!(lengths.dims(), [batch, 3]);
                let want =
                    (0..batch).flat_map(|b| bags.iter().map(move |bags| bags[b].len() as f64));
                assert_eq!(to_vec(&lengths)?, want.collect::<Vec<_>>(), "{what}");

                for include_last_offset in [false, true] {
                    let config = HashedEmbeddingBagConfig {
                        mode: Mode::Mean,
                        include_last_offset,
                        ..Default::default()
                    };
                    let collection = collection(&weight, config)?;
                    let n = all.len() + usize::from(include_last_offset);
                    let want = collection.forward_jagged(
                        &integers(&all.concat(), DType::I64, device)?,
                        &integers(&offsets_of(&all)[..n], DType::I64, device)?,
                        JaggedLayout::FeatureMajor,
                    )?;
                    let got = collection.forward_keyed(&keyed)?;
                    assert_eq!(got.dims(), [batch, 3, 8]);
                    assert_equal(&got, &want, 0.0, &what);
                }
            }
        }
        Ok(())
    })
}

#[test]
fn strided_tensors_are_joined() -> Result<()> {
    on_each_device(|device| {
        let strided = |values: &[i64]| {
            let values = integers(values, DType::I64, device)?;
            Tensor::stack(&[&values, &values.zeros_like()?], 1)?
                .narrow(1, 0, 1)?
                .squeeze(1)
        };
        assert!(!strided(&[1, 2])?.is_contiguous());
        let weights = floats(&[0.5, 2.0, 1.0], DType::F32, device)?;
        let weights = Tensor::stack(&[&weights, &weights], 1)?
            .narrow(1, 0, 1)?
            .squeeze(1)?;
        let bags = |bags: JaggedTensor| Ok(bags.with_per_sample_weights(weights.clone()));
        let keyed = join([
            bags(JaggedTensor::from_lengths(
                strided(&[1, 2, 3])?,
                strided(&[2, 1])?,
            )),
            bags(JaggedTensor::from_offsets(
                strided(&[4, 5, 6])?,
                strided(&[0, 1])?,
                false,
            )),
            bags(JaggedTensor::from_offsets(
                strided(&[7, 8, 9])?,
                strided(&[0, 3, 3])?,
                true,
            )),
        ])?;
        let indices: Vec<_> = (1..10).map(f64::from).collect();
        assert_eq!(to_vec(keyed.indices())?, indices);
        assert_eq!(
            to_vec(keyed.offsets())?,
            [0.0, 2.0, 3.0, 4.0, 6.0, 9.0, 9.0]
        );
        let weights = keyed.per_sample_weights().expect("weights");
        assert_eq!(to_vec(weights)?, [0.5, 2.0, 1.0].repeat(3));
        Ok(())
    })
}

#[test]
fn weights_are_joined_and_get_gradients() -> Result<()> {
    on_each_device(|device| {
        let weight = floats(&Draws::new(1).halves(200), DType::F32, device)?;
        let collection = collection(&weight, Default::default())?;
        let bags = bags(4, 3);
        let scales = bags.iter().zip(0..).map(|(bags, seed)| {
            let scales = Draws::new(seed).halves(bags.concat().len());
            Var::from_tensor(&floats(&scales, DType::F32, device)?)
        });
        let scales = scales.collect::<Result<Vec<_>>>()?;
        let keyed = join(bags.iter().zip(&scales).map(|(bags, scales)| {
            let bags = bags_of(bags, Lengths, [DType::I64; 2], device)?;
            Ok(bags.with_per_sample_weights(scales.as_tensor().clone()))
        }))?;
        let out = collection.forward_keyed(&keyed)?;
        let grads = out.sum_all()?.backward()?;
        for (f, (_, table)) in FEATURES.into_iter().enumerate() {
            // Each feature as bags of one row of its table.
            let rows = integers(&bags[f].concat(), DType::I64, device)?.unsqueeze(1)?;
            let rows = collection
                .table(table)?
                .forward_weighted(&rows, &scales[f].unsqueeze(1)?)?;
            let mut row = 0;
            for (b, bag) in bags[f].iter().enumerate() {
                let got = to_vec(&out.get(b)?.get(f)?)?;
                let want = match bag.len() {
                    0 => vec![0.0; 8],
                    len => to_vec(&rows.narrow(0, row, len)?.sum(0)?)?,
                };
                assert_eq!(got, want, "feature {f} bag {b}");
                row += bag.len();
            }
            let own = rows.sum_all()?.backward()?;
            let (got, want) = (grads.get(&scales[f]), own.get(&scales[f]));
            assert_eq!(to_vec(got.unwrap())?, to_vec(want.unwrap())?);
        }
        Ok(())
    })
}

/// Of a batch without samples, of features without indices, and of both.
#[test]
fn nothing_is_joined_to_nothing() -> Result<()> {
    on_each_device(|device| {
        let weight = floats(&Draws::new(1).halves(200), DType::F32, device)?;
        let collection = collection(&weight, Default::default())?;
        for form in [Lengths, Starts, StartsAndEnd] {
            for batch in [0, 3] {
                let bags = vec![vec![]; batch];
                let of_feature = || bags_of(&bags, form, [DType::U32, DType::I64], device);
                let keyed = join([of_feature(), of_feature(), of_feature()])?;
                assert_eq!(keyed.batch_size(), batch);
                assert_eq!(keyed.indices().dims(), [0]);
                assert_eq!(to_vec(keyed.offsets())?, vec![0.0; 3 * batch + 1]);
                if batch > 0 {
                    let out = collection.forward_keyed(&keyed)?;
                    assert_eq!(to_vec(&out)?, vec![0.0; batch * 3 * 8]);
                }
            }
        }
        // One feature with indices among two without.
        let bags = [
            vec![vec![], vec![]],
            vec![vec![], vec![7, 8]],
            vec![vec![], vec![]],
        ];
        let dtypes = [DType::U32, DType::I64];
        let keyed = join(
            bags.iter()
                .map(|bags| bags_of(bags, Lengths, dtypes, device)),
        )?;
        assert_eq!(
            to_vec(keyed.offsets())?,
            [0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0]
        );
        assert_eq!(to_vec(keyed.indices())?, [7.0, 8.0]);
        Ok(())
    })
}

#[test]
fn joined_bags_move_between_devices() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let weight = floats(&Draws::new(1).halves(200), DType::F32, &device)?;
    let collection = collection(&weight, Default::default())?;
    for bags in [bags(5, 2), vec![vec![vec![]; 2]; 3]] {
        let dtypes = [DType::U32, DType::I64];
        let keyed = |device: &Device| {
            join(
                bags.iter()
                    .map(|bags| bags_of(bags, Lengths, dtypes, device)),
            )
        };
        let (moved, joined) = (keyed(&Device::Cpu)?.to_device(&device)?, keyed(&device)?);
        assert_eq!(to_vec(moved.offsets())?, to_vec(joined.offsets())?);
        assert_eq!(
            to_vec(&collection.forward_keyed(&moved)?)?,
            to_vec(&collection.forward_keyed(&joined)?)?
        );
        let back = joined.to_device(&Device::Cpu)?;
        assert_eq!(to_vec(back.indices())?, to_vec(joined.indices())?);
    }
    Ok(())
}

#[test]
fn what_cannot_be_joined_is_named_by_feature() -> Result<()> {
    on_each_device(|device| {
        let ids = |values: &[i64]| integers(values, DType::I64, device);
        let user = || -> Result<JaggedTensor> {
            Ok(JaggedTensor::from_lengths(ids(&[1, 2])?, ids(&[1, 1])?))
        };
        let joined = |history: JaggedTensor| {
            KeyedJaggedTensor::new(
                [("user", user()?), ("history", history)],
                BoundsCheck::Error,
            )
        };
        let refused = |history| message(joined(history));
        joined(user()?)?;
        let weights = |n: usize| floats(&vec![1.0; n], DType::F32, device);
        for (history, want) in [
            (
                JaggedTensor::from_lengths(ids(&[1, 2])?, ids(&[1, 1, 0])?),
                "feature history must have as many bags as feature user, 2, got 3",
            ),
            (
                JaggedTensor::from_offsets(ids(&[1, 2])?, ids(&[0, 2])?, true),
                "feature history must have as many bags as feature user, 2, got 1",
            ),
            (
                JaggedTensor::from_offsets(ids(&[1, 2])?, ids(&[])?, true),
                "offsets of feature history must hold num_bags + 1 values when include_last_offset is set, got none",
            ),
            (
                JaggedTensor::from_lengths(ids(&[1, 2])?, ids(&[1, 1])?.unsqueeze(0)?),
                "lengths of feature history must have rank 1, got [1, 2]",
            ),
            (
                JaggedTensor::from_lengths(ids(&[1, 2])?.unsqueeze(1)?, ids(&[1, 1])?),
                "indices of feature history must have rank 1, got [2, 1]",
            ),
            (
                JaggedTensor::from_lengths(ids(&[1, 2])?, weights(2)?),
                "lengths of feature history must have dtype u32 or i32 or i64, got f32",
            ),
            (
                JaggedTensor::from_lengths(ids(&[1, 2])?.to_dtype(DType::U32)?, ids(&[1, 1])?),
                "indices of feature history must have the dtype of those of feature user, i64, got u32",
            ),
            (
                JaggedTensor::from_lengths(ids(&[1, 2])?, ids(&[1, 0])?),
                "lengths of feature history must add up to its number of indices (2), got 1",
            ),
            (
                JaggedTensor::from_lengths(ids(&[1, 2])?, ids(&[1, 2])?),
                "lengths of feature history must add up to its number of indices (2), got 3",
            ),
            (
                JaggedTensor::from_offsets(ids(&[1, 2])?, ids(&[0, 1, 1])?, true),
                "offsets of feature history must end at its number of indices (2), got 1",
            ),
            (
                JaggedTensor::from_offsets(ids(&[1, 2])?, ids(&[0, 1, 3])?, true),
                "offsets of feature history must end at its number of indices (2), got 3",
            ),
            (
                JaggedTensor::from_offsets(ids(&[1, 2])?, ids(&[1, 1])?, false),
                "offsets of feature history must start at 0, got 1",
            ),
            (
                user()?.with_per_sample_weights(weights(2)?),
                "feature history has per_sample_weights, feature user has none",
            ),
        ] {
            assert_eq!(refused(history), format!("hashed-embedding-bag: {want}"));
        }
        let weighted =
            |n| -> Result<JaggedTensor> { Ok(user()?.with_per_sample_weights(weights(n)?)) };
        for (history, want) in [
            (user()?, "feature user has per_sample_weights, feature history has none"),
            (
                weighted(3)?,
                "per_sample_weights of feature history must have the shape of its indices, [2], got [3]",
            ),
            (
                user()?.with_per_sample_weights(weights(2)?.to_dtype(DType::F16)?),
                "per_sample_weights of feature history must have dtype f32, got f16",
            ),
        ] {
            let features = [("user", weighted(2)?), ("history", history)];
            let got = message(KeyedJaggedTensor::new(features, BoundsCheck::Error));
            assert_eq!(got, format!("hashed-embedding-bag: {want}"));
        }
        let twice = [("user", user()?), ("user", user()?)];
        assert_eq!(
            message(KeyedJaggedTensor::new(twice, BoundsCheck::Error)),
            "hashed-embedding-bag: two features are named user"
        );
        let none: [(&str, JaggedTensor); 0] = [];
        assert_eq!(
            message(KeyedJaggedTensor::new(none, BoundsCheck::Error)),
            "hashed-embedding-bag: at least one feature is needed"
        );
        let no_bag = JaggedTensor::from_lengths(ids(&[1, 2])?, ids(&[])?);
        assert_eq!(
            message(KeyedJaggedTensor::new(
                [("user", no_bag)],
                BoundsCheck::Error
            )),
            "hashed-embedding-bag: feature user has 2 indices, but no bag"
        );
        Ok(())
    })
}

#[test]
fn i32_on_cuda_and_two_devices_are_refused() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let ids = |dtype, device: &Device| integers(&[1, 1], dtype, device);
    let user = JaggedTensor::from_lengths(ids(DType::I64, &device)?, ids(DType::I32, &device)?);
    assert_eq!(
        message(KeyedJaggedTensor::new([("user", user)], BoundsCheck::Error)),
        "hashed-embedding-bag: lengths of feature user must have dtype u32 or i64 on CUDA, where candle cannot copy i32"
    );
    let user = JaggedTensor::from_lengths(ids(DType::I64, &device)?, ids(DType::I64, &device)?);
    let next =
        JaggedTensor::from_lengths(ids(DType::I64, &device)?, ids(DType::I64, &Device::Cpu)?);
    let got = message(KeyedJaggedTensor::new(
        [("user", user), ("next", next)],
        BoundsCheck::Error,
    ));
    assert!(
        got.contains(
            "lengths of feature next must be on the device of the indices of feature user"
        ),
        "{got}"
    );
    Ok(())
}

#[test]
fn a_lookup_names_features_that_are_not_its_own() -> Result<()> {
    on_each_device(|device| {
        let weight = floats(&Draws::new(1).halves(200), DType::F32, device)?;
        let collection = collection(&weight, Default::default())?;
        let ids = |values: &[i64]| integers(values, DType::I64, device);
        let keyed = |features: &[(&str, &[i64])]| {
            let features = features.iter().map(|(name, rows)| {
                Ok((*name, JaggedTensor::from_lengths(ids(rows)?, ids(&[1, 1])?)))
            });
            let features: Vec<_> = features.collect::<Result<_>>()?;
            KeyedJaggedTensor::new(features, BoundsCheck::Error)
        };
        let batch = keyed(&[("user", &[1, 2]), ("next", &[3, 4]), ("history", &[5, 6])])?;
        assert_eq!(
            message(collection.forward_keyed(&batch)),
            "hashed-embedding-bag: features must be user, history, next, in this order, got user, next, history"
        );
        // The features of the batch, in its order.
        let selection = collection.select(batch.keys())?;
        assert_eq!(selection.forward_keyed(&batch)?.dims(), [2, 3, 8]);
        // What is in the batch and what only the lookup knows.
        let batch = keyed(&[("user", &[1, 2]), ("history", &[3, 70]), ("next", &[5, 6])])?;
        assert_eq!(
            message(collection.forward_keyed(&batch)),
            "hashed-embedding-bag: indices of feature history (table movie) must lie in 0..70, got 70 at position 3"
        );
        Ok(())
    })
}

/// Without checks, whatever lengths and offsets say: the lookup stays within the tensors. Run this test under a sanitizer to see
/// it.
#[test]
fn unchecked_lengths_are_harmless() -> Result<()> {
    on_each_device(|device| {
        let weight = floats(&Draws::new(1).halves(200), DType::F32, device)?;
        let config = HashedEmbeddingBagConfig {
            bounds_check: BoundsCheck::Off,
            ..Default::default()
        };
        let collection = collection(&weight, config)?.select(["user", "history"])?;
        let ids = |values: &[i64]| integers(values, DType::I64, device);
        for lengths in [
            [0, 0],
            [1, 7],
            [-5, 2],
            [i64::MAX, i64::MAX],
            [i64::MIN, -1],
        ] {
            let history = JaggedTensor::from_lengths(ids(&[3, 4])?, ids(&lengths)?);
            let user = JaggedTensor::from_offsets(ids(&[3, 4])?, ids(&lengths)?, false);
            let features = [("user", user), ("history", history)];
            let batch = KeyedJaggedTensor::new(features, BoundsCheck::Off)?;
            assert_eq!(collection.forward_keyed(&batch)?.dims(), [2, 2, 8]);
        }
        Ok(())
    })
}
