//! A collection of tables against the layers of its single tables, which the oracle vouches for.

use crate::common::{
    self, assert_equal, floats, integers, lma, message, naive_element, on_each_device, to_vec,
    Draws,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    checkpoint, hashed_embedding_bag_collection, Checkpoint, Hash, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, JaggedLayout, Mix, Mode,
};
use candle_nn::{Module, VarBuilder, VarMap};

const TABLES: [(&str, usize); 3] = [("user", 50), ("movie", 7), ("genre", 300)];
const BATCH: usize = 5;
/// One that is no table's row: outside of all, and not the -1 of an empty cell by chance.
const PADDING: i64 = -7;
const MODES: [Mode; 3] = [Mode::Sum, Mode::Mean, Mode::Max];

fn hashes() -> [Hash; 6] {
    [
        Hash::default_for(8),
        Hash::from(Mix {
            seed: 3,
            block: 4,
            signed: false,
        }),
        Hash::original(),
        lma(4, 8, 1),
        Hash::semantic(4),
        Hash::slot_table(2),
    ]
}

fn config(mode: Mode, hash: Hash) -> HashedEmbeddingBagConfig {
    HashedEmbeddingBagConfig {
        mode,
        hash: Some(hash),
        padding_idx: Some(PADDING),
        ..Default::default()
    }
}

fn weight(device: &Device) -> Result<Var> {
    Var::from_tensor(&floats(&Draws::new(1).halves(64), DType::F32, device)?)
}

/// `bags[b][t]`, some of them empty; with padding when asked for.
fn bags(padding: bool) -> Vec<Vec<Vec<i64>>> {
    let mut draws = Draws::new(2);
    let mut bag = |num_embeddings: usize| {
        let len = draws.below(4);
        let rows = (0..len).map(|_| match draws.below(4) {
            0 if padding => PADDING,
            _ => draws.below(num_embeddings) as i64,
        });
        rows.collect::<Vec<_>>()
    };
    let sample = |_| TABLES.iter().map(|(_, n)| bag(*n)).collect();
    (0..BATCH).map(sample).collect()
}

/// Values and offsets of bags in this order, the end of the last among the offsets when asked for.
fn jagged(
    bags: &[Vec<Vec<i64>>],
    layout: JaggedLayout,
    include_last_offset: bool,
) -> (Vec<i64>, Vec<i64>) {
    let (batch, tables) = (bags.len(), TABLES.len());
    let ordered: Vec<&Vec<i64>> = match layout {
        JaggedLayout::BatchMajor => bags.iter().flatten().collect(),
        JaggedLayout::FeatureMajor => (0..tables * batch)
            .map(|i| &bags[i % batch][i / batch])
            .collect(),
    };
    let mut offsets = vec![0];
    offsets.extend(ordered.iter().scan(0, |end, bag| {
        *end += bag.len() as i64;
        Some(*end)
    }));
    if !include_last_offset {
        offsets.pop();
    }
    (ordered.into_iter().flatten().copied().collect(), offsets)
}

/// What the layers of the single tables give, `(batch, tables, embedding_dim)`.
fn by_layer(collection: &HashedEmbeddingBagCollection, bags: &[Vec<Vec<i64>>]) -> Result<Tensor> {
    let device = collection.hashed_weight().device();
    let of_table = |(t, (name, _)): (usize, &(&str, usize))| {
        let layer = collection.table(name)?;
        let rows: Vec<i64> = bags.iter().flat_map(|sample| sample[t].clone()).collect();
        let mut end = 0;
        let mut offsets: Vec<i64> = vec![];
        for sample in bags {
            offsets.push(end);
            end += sample[t].len() as i64;
        }
        if layer.config().include_last_offset {
            offsets.push(end);
        }
        layer.forward_with_offsets(
            &integers(&rows, DType::I64, device)?,
            &integers(&offsets, DType::I64, device)?,
        )
    };
    let tables = TABLES.iter().enumerate().map(of_table);
    Tensor::stack(&tables.collect::<Result<Vec<_>>>()?, 1)
}

/// The gradient of hashed_weight under an uneven loss, so that no two outputs are interchangeable.
fn grad(out: &Tensor, weight: &Var) -> Result<Tensor> {
    let uneven = floats(
        &Draws::new(9).halves(out.elem_count()),
        DType::F32,
        out.device(),
    )?;
    let loss = (out.flatten_all()? * uneven)?.sum_all()?;
    let grads = loss.backward()?;
    Ok(grads
        .get(weight)
        .cloned()
        .expect("hashed_weight is a variable"))
}

#[test]
fn a_table_is_the_rows_after_those_before_it() -> Result<()> {
    on_each_device(|device| {
        for hash in hashes() {
            let weight = weight(device)?;
            let collection = common::collection(&weight, TABLES, 8, config(Mode::Sum, hash))?;
            let values = to_vec(&weight)?;
            let mut first = 0;
            for (name, num_embeddings) in TABLES {
                let layer = collection.table(name)?;
                assert_eq!(layer.config().first_row, first);
                let row = num_embeddings as i64 - 1;
                let out = layer.forward(&integers(&[row], DType::I64, device)?.reshape((1, 1))?)?;
                let want = (0..8).map(|column| {
                    let (slot, sign) =
                        naive_element(&hash, first as i64 + row, column, values.len());
                    sign * values[slot]
                });
                assert_eq!(to_vec(&out)?, want.collect::<Vec<_>>(), "{name} {hash:?}");
                first += num_embeddings;
            }
        }
        Ok(())
    })
}

#[test]
fn single_ids_are_rows_of_their_own_tables() -> Result<()> {
    on_each_device(|device| {
        let mut draws = Draws::new(4);
        let bags: Vec<Vec<Vec<i64>>> = (0..BATCH)
            .map(|_| TABLES.map(|(_, n)| vec![draws.below(n) as i64]).to_vec())
            .collect();
        let ids: Vec<i64> = bags.iter().flatten().flatten().copied().collect();
        for hash in hashes() {
            for index in [DType::U32, DType::I32, DType::I64] {
                let weight = weight(device)?;
                let collection = common::collection(&weight, TABLES, 8, config(Mode::Sum, hash))?;
                let ids = integers(&ids, index, device)?.reshape((BATCH, TABLES.len()))?;
                let out = collection.forward(&ids)?;
                let want = by_layer(&collection, &bags)?;
                assert_equal(&out, &want, 0.0, &format!("{hash:?} {index:?}"));
                let (got, want) = (grad(&out, &weight)?, grad(&want, &weight)?);
                assert_equal(&got, &want, 0.0, "gradient");
                // Indices that lie the other way round in memory.
                if device.is_cuda() && index == DType::I32 {
                    continue; // candle cannot copy i32 on CUDA
                }
                let turned = ids.t()?.contiguous()?.t()?;
                assert_equal(&collection.forward(&turned)?, &out, 0.0, "strided");
            }
        }
        Ok(())
    })
}

#[test]
fn padded_and_jagged_bags_agree_with_the_layers() -> Result<()> {
    on_each_device(|device| {
        for (hash, mode) in hashes().into_iter().flat_map(|h| MODES.map(|m| (h, m))) {
            let bags = bags(true);
            let longest = bags.iter().flatten().map(Vec::len).max().unwrap_or(0);
            let weight = weight(device)?;
            let new = |include_last_offset| {
                let config = HashedEmbeddingBagConfig {
                    include_last_offset,
                    ..config(mode, hash)
                };
                common::collection(&weight, TABLES, 8, config)
            };
            let want = by_layer(&new(false)?, &bags)?;
            let want_grad = grad(&want, &weight)?;

            let padded: Vec<i64> = bags
                .iter()
                .flatten()
                .flat_map(|bag| {
                    let padding = std::iter::repeat(PADDING);
                    bag.iter().copied().chain(padding).take(longest)
                })
                .collect();
            let padded = integers(&padded, DType::I64, device)?;
            let out = new(false)?.forward(&padded.reshape((BATCH, TABLES.len(), longest))?)?;
            assert_equal(&out, &want, 0.0, &format!("{mode:?} {hash:?} padded"));
            assert_equal(&grad(&out, &weight)?, &want_grad, 4.0, "padded gradient");

            for layout in [JaggedLayout::FeatureMajor, JaggedLayout::BatchMajor] {
                for last in [false, true] {
                    let what = format!("{mode:?} {hash:?} {layout:?} {last}");
                    let (values, offsets) = jagged(&bags, layout, last);
                    let out = new(last)?.forward_jagged(
                        &integers(&values, DType::I64, device)?,
                        &integers(&offsets, DType::U32, device)?,
                        layout,
                    )?;
                    assert_equal(&out, &want, 0.0, &what);
                    assert_equal(&grad(&out, &weight)?, &want_grad, 4.0, &what);
                }
            }
        }
        Ok(())
    })
}

#[test]
fn weighted_values_scale_their_rows_and_get_gradients() -> Result<()> {
    on_each_device(|device| {
        for layout in [JaggedLayout::FeatureMajor, JaggedLayout::BatchMajor] {
            let weight = weight(device)?;
            let collection = HashedEmbeddingBagCollection::new(
                weight.as_tensor().clone(),
                TABLES,
                8,
                config(Mode::Sum, Hash::default_for(8)),
            )?;
            let (values, offsets) = jagged(&bags(false), layout, false);
            let rows = integers(&values, DType::I64, device)?;
            let offsets = integers(&offsets, DType::I64, device)?;
            let scales = Var::from_tensor(&floats(
                &Draws::new(3).halves(values.len()),
                DType::F32,
                device,
            )?)?;
            let out = collection.forward_weighted_jagged(&rows, &offsets, layout, &scales)?;
            let grads = out.sum_all()?.backward()?;
            let got = grads.get(&scales).cloned().expect("a variable");
            // d out / d scale of a value is the sum of its row.
            let mut want = vec![];
            let mut of_position = vec![];
            match layout {
                JaggedLayout::BatchMajor => bags(false).iter().for_each(|sample| {
                    for (t, bag) in sample.iter().enumerate() {
                        of_position.extend(bag.iter().map(|_| t));
                    }
                }),
                JaggedLayout::FeatureMajor => (0..TABLES.len()).for_each(|t| {
                    let n: usize = bags(false).iter().map(|sample| sample[t].len()).sum();
                    of_position.extend(std::iter::repeat_n(t, n));
                }),
            }
            for (&row, &t) in values.iter().zip(&of_position) {
                let row = integers(&[row], DType::I64, device)?.reshape((1, 1))?;
                let layer = collection.table(TABLES[t].0)?;
                want.push(to_vec(&layer.forward(&row)?)?.iter().sum::<f64>());
            }
            assert_eq!(to_vec(&got)?, want, "{layout:?}");
        }
        Ok(())
    })
}

#[test]
fn weights_in_every_form_of_bags() -> Result<()> {
    const TABLES: [(&str, usize); 2] = [("user", 30), ("movie", 20)];
    on_each_device(|device| {
        let weight = floats(&Draws::new(5).halves(64), DType::F32, device)?;
        let config = HashedEmbeddingBagConfig {
            padding_idx: Some(7),
            ..Default::default()
        };
        let collection = HashedEmbeddingBagCollection::new(weight.clone(), TABLES, 4, config)?;
        // Three samples of two bags of two rows; some of them padding.
        let rows = [29, 7, 19, 3, 0, 1, 7, 7, 12, 12, 5, 6];
        let indices = integers(&rows, DType::I64, device)?.reshape((3, 2, 2))?;
        let samples = Draws::new(6).halves(rows.len());
        let samples = Var::from_tensor(&floats(&samples, DType::F32, device)?.reshape((3, 2, 2))?)?;
        let pooled = collection.forward_weighted(&indices, &samples)?;
        assert_eq!(pooled.dims(), [3, 2, 4]);
        // The same bags by offsets, and each table as a layer.
        let jagged = collection.forward_weighted_jagged(
            &indices.flatten_all()?,
            &integers(&[0, 2, 4, 6, 8, 10], DType::I64, device)?,
            JaggedLayout::BatchMajor,
            &samples.flatten_all()?,
        )?;
        assert_eq!(to_vec(&pooled)?, to_vec(&jagged)?);
        for (t, (name, _)) in TABLES.into_iter().enumerate() {
            let part = |tensor: &Tensor| tensor.narrow(1, t, 1)?.squeeze(1);
            let (indices, samples) = (part(&indices)?, part(&samples)?);
            let bag = collection.table(name)?;
            let want = to_vec(&part(&pooled)?)?;
            assert_eq!(to_vec(&bag.forward_weighted(&indices, &samples)?)?, want);
            let by_offsets = bag.forward_weighted_with_offsets(
                &indices.flatten_all()?,
                &integers(&[0, 2, 4], DType::I64, device)?,
                &samples.flatten_all()?,
            )?;
            assert_eq!(to_vec(&by_offsets)?, want);
        }
        // One row per table and sample.
        let single = indices.narrow(2, 0, 1)?.squeeze(2)?;
        let of_single = samples.narrow(2, 0, 1)?.squeeze(2)?;
        let out = collection.forward_weighted(&single, &of_single)?;
        let unweighted = collection.forward(&single)?;
        assert_eq!(
            to_vec(&out)?,
            to_vec(&unweighted.broadcast_mul(&of_single.unsqueeze(2)?)?)?
        );
        // The weights have a gradient in their own shape.
        let grads = pooled.sum_all()?.backward()?;
        let grad = grads.get(&samples).expect("a gradient of the weights");
        assert_eq!(grad.dims(), [3, 2, 2]);
        let by_rows = collection
            .with_hashed_weight(weight.clone())?
            .forward(&indices.reshape((3, 2, 2))?.narrow(2, 0, 1)?)?;
        assert_eq!(
            to_vec(&grad.narrow(2, 0, 1)?.squeeze(2)?)?,
            to_vec(&by_rows.sum(2)?)?
        );

        assert_eq!(
            message(collection.forward_weighted(&indices, &samples.reshape((3, 4))?)),
            "hashed-embedding-bag: per_sample_weights must have the shape of indices [3, 2, 2], got [3, 4]"
        );
        let mean = HashedEmbeddingBagConfig {
            mode: Mode::Mean,
            ..config
        };
        let mean = HashedEmbeddingBagCollection::new(weight, TABLES, 4, mean)?;
        assert_eq!(
            message(mean.forward_weighted(&indices, &samples)),
            "hashed-embedding-bag: per_sample_weights need mode sum, got Mean"
        );
        Ok(())
    })
}

#[test]
fn inputs_that_do_not_suit_the_tables_are_refused() -> Result<()> {
    on_each_device(|device| {
        let collection = HashedEmbeddingBagCollection::new(
            weight(device)?.as_tensor().clone(),
            TABLES,
            8,
            config(Mode::Sum, Hash::default_for(8)),
        )?;
        let values = integers(&[0, 1, 2, 3, 4, 5], DType::I64, device)?;
        let offsets = integers(&[0, 1, 2, 3], DType::I64, device)?;
        let got = message(collection.forward_jagged(&values, &offsets, JaggedLayout::BatchMajor));
        assert!(
            got.contains("same number of bags for each of 3 features, got 4 offsets"),
            "{got}"
        );
        let transposed = values.reshape((2, 3))?.t()?;
        let got = message(collection.forward(&transposed));
        assert!(
            got.contains("[batch, 3] or [batch, 3, bag_len], got [3, 2]"),
            "{got}"
        );
        let got = message(collection.table("actor"));
        assert!(
            got.contains("no table actor, only user, movie, genre"),
            "{got}"
        );
        Ok(())
    })
}

#[test]
fn constructing_refuses_what_is_no_collection() -> Result<()> {
    let vars = VarMap::new();
    let vb = || VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let new = |tables: &[(&str, usize)], config| {
        hashed_embedding_bag_collection(tables.iter().copied(), 8, 1.0 / 16.0, config, vb())
    };
    let plain = HashedEmbeddingBagConfig::default();
    let shifted = HashedEmbeddingBagConfig {
        first_row: 1,
        ..plain
    };
    for (tables, config, want) in [
        (&[][..], plain, "at least one table"),
        (&[("a", 3), ("a", 4)], plain, "two tables are named a"),
        (&[("a", 3), ("b", 0)], plain, "table b"),
        (&[("a", 1 << 62), ("b", 1 << 62)], plain, "table b"),
        (&[("a", 3)], shifted, "first_row 1"),
    ] {
        let got = message(new(tables, config));
        assert!(got.contains(want), "{got}");
    }
    let collection = new(&TABLES, plain)?;
    // 357 rows of 8 columns, over 16, in whole blocks of 4.
    assert_eq!(collection.hashed_weight().dims(), [180]);
    assert_eq!(collection.tables().collect::<Vec<_>>(), TABLES);
    Ok(())
}

#[test]
fn a_checkpoint_brings_it_back_by_name() -> Result<()> {
    let device = &Device::Cpu;
    let collection = HashedEmbeddingBagCollection::new(
        weight(device)?.as_tensor().clone(),
        TABLES,
        8,
        HashedEmbeddingBagConfig {
            include_last_offset: true,
            ..config(Mode::Mean, Hash::default_for(8))
        },
    )?;
    let single = collection.table("movie")?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    let single_weight = Tensor::zeros(64, DType::F32, device)?;
    let other =
        candle_hashed_embedding_bag::HashedEmbeddingBag::new(single_weight, 7, 8, single.config())?;
    let none = [];
    checkpoint::save(
        &path,
        none,
        [
            ("sparse", checkpoint::Layer::from(&collection)),
            ("movie", (&other).into()),
        ],
    )?;
    let opened = Checkpoint::open(&path)?;
    let back = opened.hashed_embedding_bag_collection("sparse", DType::F32, device)?;
    assert_eq!(back.tables().collect::<Vec<_>>(), TABLES);
    assert_eq!(back.config().mode, Mode::Mean);
    assert_eq!(back.config().padding_idx, Some(PADDING));
    assert!(back.config().include_last_offset);
    assert_eq!(back.hash(), collection.hash());
    let ids = integers(&[49, 6, 299], DType::I64, device)?.reshape((1, 3))?;
    assert_equal(
        &back.forward(&ids)?,
        &collection.forward(&ids)?,
        0.0,
        "rows",
    );
    // The row shift of a single table is kept as well.
    assert_eq!(
        opened
            .hashed_embedding_bag("movie", DType::F32, device)?
            .config()
            .first_row,
        50
    );
    let got = message(opened.hashed_embedding_bag_collection("dense", DType::F32, device));
    assert!(got.contains("no collection dense, only sparse"), "{got}");

    let same = [("sparse", &collection), ("sparse", &collection)];
    let got = message(checkpoint::save(&path, [], same));
    assert!(got.contains("two layers are named sparse"), "{got}");
    Ok(())
}
