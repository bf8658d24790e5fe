//! Features of a collection, several of which may look into one table, against the layers of the tables.

use crate::common::{
    self, assert_equal, config, every_hash, floats, integers, message, offsets_of, on_each_device,
    to_vec, whole_blocks, Draws, MODES,
};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    checkpoint, hashed_embedding_bag_collection, Checkpoint, Hash, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, JaggedLayout, Mode,
};
use candle_nn::{VarBuilder, VarMap};

const TABLES: [(&str, usize); 4] = [("genre", 20), ("movie", 70), ("unused", 5), ("user", 50)];
/// In another order than the tables; two of one table, and one table without any.
const FEATURES: [(&str, &str); 4] = [
    ("user", "user"),
    ("history", "movie"),
    ("genre", "genre"),
    ("candidate", "movie"),
];
const DIM: usize = 8;
const BATCH: usize = 6;
const PADDING: i64 = -7;

fn collection(
    weight: &Tensor,
    config: HashedEmbeddingBagConfig,
) -> Result<HashedEmbeddingBagCollection> {
    common::collection(weight, TABLES, DIM, config)?.with_features(FEATURES)
}

fn weight(len: usize, device: &Device) -> Result<Var> {
    Var::from_tensor(&floats(&Draws::new(1).halves(len), DType::F32, device)?)
}

/// The bags of each feature, some of them empty, some with padding.
fn bags() -> Vec<(&'static str, Vec<Vec<i64>>)> {
    let mut draws = Draws::new(2);
    let of_feature = |(feature, table)| {
        let (_, rows) = TABLES.into_iter().find(|(name, _)| *name == table).unwrap();
        let bag = |_| {
            let len = draws.below(5);
            let mut bag = draws.rows(len, rows);
            if len > 2 {
                bag[1] = PADDING;
            }
            bag
        };
        (feature, (0..BATCH).map(bag).collect())
    };
    FEATURES.map(of_feature).to_vec()
}

/// What the layers of the tables give for these features, `(batch, features, embedding_dim)`.
fn by_layer(
    collection: &HashedEmbeddingBagCollection,
    bags: &[(&str, Vec<Vec<i64>>)],
) -> Result<Tensor> {
    let device = collection.hashed_weight().device();
    let of_feature = |(feature, bags): &(&str, Vec<Vec<i64>>)| {
        let (_, table) = FEATURES.iter().find(|(name, _)| name == feature).unwrap();
        let mut offsets = offsets_of(bags);
        offsets.pop();
        collection.table(table)?.forward_with_offsets(
            &integers(&bags.concat(), DType::I64, device)?,
            &integers(&offsets, DType::I64, device)?,
        )
    };
    let pooled = bags.iter().map(of_feature).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&pooled, 1)
}

/// The same in one lookup.
fn jagged(
    collection: &HashedEmbeddingBagCollection,
    bags: &[(&str, Vec<Vec<i64>>)],
    layout: JaggedLayout,
) -> Result<Tensor> {
    let device = collection.hashed_weight().device();
    let ordered: Vec<Vec<i64>> = match layout {
        JaggedLayout::FeatureMajor => bags.iter().flat_map(|(_, bags)| bags.clone()).collect(),
        JaggedLayout::BatchMajor => (0..BATCH)
            .flat_map(|b| bags.iter().map(move |(_, bags)| bags[b].clone()))
            .collect(),
    };
    let mut offsets = offsets_of(&ordered);
    offsets.pop();
    collection.forward_jagged(
        &integers(&ordered.concat(), DType::I64, device)?,
        &integers(&offsets, DType::I64, device)?,
        layout,
    )
}

/// The gradient of `weight` under a loss in which no two outputs are interchangeable.
fn grad(out: &Tensor, weight: &Var) -> Result<Tensor> {
    let uneven = Draws::new(9).halves(out.elem_count());
    let uneven = floats(&uneven, DType::F32, out.device())?;
    let grads = (out.flatten_all()? * uneven)?.sum_all()?.backward()?;
    Ok(grads.get(weight).cloned().expect("a gradient"))
}

#[test]
fn features_look_into_their_tables() -> Result<()> {
    on_each_device(|device| {
        for (hash, mode) in every_hash()
            .into_iter()
            .flat_map(|hash| MODES.map(|mode| (hash, mode)))
        {
            let weight = weight(whole_blocks(&hash, 200), device)?;
            let config = HashedEmbeddingBagConfig {
                padding_idx: Some(PADDING),
                ..config(mode, hash)
            };
            let collection = collection(&weight, config)?;
            assert_eq!(collection.features().collect::<Vec<_>>(), FEATURES);
            assert_eq!(collection.tables().collect::<Vec<_>>(), TABLES);

            let bags = bags();
            let want = by_layer(&collection, &bags)?;
            assert_eq!(want.dims(), [BATCH, FEATURES.len(), DIM]);
            let want_grad = grad(&want, &weight)?;
            for layout in [JaggedLayout::FeatureMajor, JaggedLayout::BatchMajor] {
                let what = format!("{hash:?} {mode:?} {layout:?}");
                let out = jagged(&collection, &bags, layout)?;
                assert_equal(&out, &want, 0.0, &what);
                assert_equal(&grad(&out, &weight)?, &want_grad, 4.0, &what);
            }
            // Bags of one length, filled up with padding.
            let padded = (0..BATCH).flat_map(|b| {
                bags.iter().flat_map(move |(_, bags)| {
                    let padding = std::iter::repeat(PADDING);
                    bags[b].iter().copied().chain(padding).take(4)
                })
            });
            let padded: Vec<i64> = padded.collect();
            let padded =
                integers(&padded, DType::I64, device)?.reshape((BATCH, FEATURES.len(), 4))?;
            let out = collection.forward(&padded)?;
            assert_equal(&out, &want, 0.0, &format!("{hash:?} {mode:?} padded"));
            assert_equal(&grad(&out, &weight)?, &want_grad, 4.0, "padded");
        }
        Ok(())
    })
}

#[test]
fn a_selection_shares_parameter_and_places() -> Result<()> {
    on_each_device(|device| {
        let weight = weight(200, device)?;
        // Without padding, so that a single feature takes the path of a layer.
        let collection = collection(&weight, Default::default())?;
        let bags: Vec<(&str, Vec<Vec<i64>>)> = bags()
            .into_iter()
            .map(|(feature, mut bags)| {
                bags.iter_mut()
                    .for_each(|bag| bag.retain(|&row| row != PADDING));
                (feature, bags)
            })
            .collect();
        let all = by_layer(&collection, &bags)?;
        for chosen in [
            &[3][..],
            &[0],
            &[2, 0],
            &[1, 3],
            &[0, 1, 2, 3],
            &[3, 2, 1, 0],
        ] {
            let names = chosen.iter().map(|&f| FEATURES[f].0);
            let selection = collection.select(names)?;
            let features: Vec<_> = chosen.iter().map(|&f| FEATURES[f]).collect();
            assert_eq!(selection.features().collect::<Vec<_>>(), features);
            assert_eq!(selection.tables().collect::<Vec<_>>(), TABLES);
            assert_eq!(selection.config(), collection.config());
            assert_eq!(selection.hashed_weight().id(), weight.id());
            let bags: Vec<_> = chosen.iter().map(|&f| bags[f].clone()).collect();
            let chosen: Vec<u32> = chosen.iter().map(|&f| f as u32).collect();
            let want = all.index_select(&Tensor::new(chosen, device)?, 1)?;
            for layout in [JaggedLayout::FeatureMajor, JaggedLayout::BatchMajor] {
                let out = jagged(&selection, &bags, layout)?;
                assert_equal(&out, &want, 0.0, &format!("{features:?} {layout:?}"));
                let (got, want) = (grad(&out, &weight)?, grad(&want, &weight)?);
                assert_equal(&got, &want, 4.0, &format!("{features:?} {layout:?}"));
            }
            // Single rows, in bags of one length.
            let rows: Vec<i64> = (0..2 * features.len() as i64).map(|i| i % 5).collect();
            let rows = integers(&rows, DType::I64, device)?.reshape((2, features.len()))?;
            let of_table = features.iter().enumerate().map(|(f, (_, table))| {
                let rows = rows.narrow(1, f, 1)?.contiguous()?;
                collection.table(table)?.forward(&rows)
            });
            let want = Tensor::stack(&of_table.collect::<Result<Vec<_>>>()?, 1)?;
            assert_equal(&selection.forward(&rows)?, &want, 0.0, "single rows");
        }
        Ok(())
    })
}

#[test]
fn names_that_do_not_fit_are_refused() -> Result<()> {
    let weight = Tensor::zeros(200, DType::F32, &Device::Cpu)?;
    let collection = collection(&weight, Default::default())?;
    let with =
        |features: &[(&str, &str)]| message(collection.with_features(features.iter().copied()));
    assert_eq!(
        with(&[("user", "user"), ("next", "film")]),
        "hashed-embedding-bag: feature next: no table film, only genre, movie, unused, user"
    );
    assert_eq!(
        with(&[("next", "user"), ("next", "movie")]),
        "hashed-embedding-bag: two features are named next"
    );
    assert_eq!(
        with(&[]),
        "hashed-embedding-bag: a collection needs at least one feature"
    );
    assert_eq!(
        message(collection.select(["user", "movie"])),
        "hashed-embedding-bag: no feature movie, only user, history, genre, candidate"
    );
    assert_eq!(
        message(collection.select(["user", "user"])),
        "hashed-embedding-bag: two features are named user"
    );
    assert_eq!(
        message(collection.select::<&str>([])),
        "hashed-embedding-bag: a collection needs at least one feature"
    );
    // Tables are still known by their own names, and only by them.
    assert_eq!(collection.table("movie")?.num_embeddings(), 70);
    assert_eq!(
        message(collection.table("history")),
        "hashed-embedding-bag: no table history, only genre, movie, unused, user"
    );
    Ok(())
}

#[test]
fn errors_name_the_feature_and_its_table() -> Result<()> {
    on_each_device(|device| {
        let weight = weight(200, device)?;
        let collection = collection(&weight, Default::default())?;
        let forward = |rows: [i64; 4]| {
            collection.forward(&integers(&rows, DType::I64, device)?.reshape((1, 4))?)
        };
        forward([49, 69, 19, 69])?;
        for (rows, want) in [
            (
                [49, 69, 19, 70],
                "of feature candidate (table movie) must lie in 0..70, got 70 at position 3",
            ),
            (
                [49, -1, 19, 70],
                "of feature history (table movie) must lie in 0..70, got -1 at position 1",
            ),
            (
                [50, 69, 19, 69],
                "of table user must lie in 0..50, got 50 at position 0",
            ),
        ] {
            assert_eq!(
                message(forward(rows)),
                format!("hashed-embedding-bag: indices {want}")
            );
        }
        let rows = integers(&[1, 2, 3], DType::I64, device)?.reshape((1, 3))?;
        assert_eq!(
            message(collection.forward(&rows)),
            "hashed-embedding-bag: indices must have shape [batch, 4] or [batch, 4, bag_len], got [1, 3]"
        );
        let (rows, offsets) = (rows.flatten_all()?, [0, 1, 1, 2, 3]);
        for (n, last, want) in [
            (5, false, "got 5 offsets with include_last_offset = false"),
            (4, true, "got 4 offsets with include_last_offset = true"),
        ] {
            let config = HashedEmbeddingBagConfig {
                include_last_offset: last,
                ..Default::default()
            };
            let collection = self::collection(&weight, config)?;
            let offsets = integers(&offsets[..n], DType::I64, device)?;
            assert_eq!(
                message(collection.forward_jagged(&rows, &offsets, JaggedLayout::FeatureMajor)),
                format!("hashed-embedding-bag: offsets must tell the same number of bags for each of 4 features, {want}")
            );
        }
        Ok(())
    })
}

/// The recipe of the documentation: the mean of some features and the sum of others, in one lookup.
#[test]
fn sums_divided_by_lengths_are_means() -> Result<()> {
    on_each_device(|device| {
        let weight = weight(200, device)?;
        let new = |mode| collection(&weight, config(mode, Hash::default_for(DIM)));
        let mut bags = bags();
        for (_, bags) in &mut bags {
            bags.iter_mut()
                .for_each(|bag| bag.retain(|&row| row != PADDING));
        }
        assert!(bags[1].1.iter().any(Vec::is_empty));
        let divisors = (0..BATCH).flat_map(|b| {
            bags.iter().map(move |(feature, bags)| match *feature {
                "history" => bags[b].len().max(1) as f64,
                _ => 1.0,
            })
        });
        let divisors = floats(&divisors.collect::<Vec<_>>(), DType::F32, device)?;
        let sums = jagged(&new(Mode::Sum)?, &bags, JaggedLayout::FeatureMajor)?;
        let got = sums.broadcast_div(&divisors.reshape((BATCH, FEATURES.len(), 1))?)?;
        let of_feature = |f: usize| {
            let mode = if FEATURES[f].0 == "history" {
                Mode::Mean
            } else {
                Mode::Sum
            };
            by_layer(&new(mode)?, &bags[f..=f])
        };
        let want = (0..FEATURES.len())
            .map(of_feature)
            .collect::<Result<Vec<_>>>()?;
        let want = Tensor::cat(&want, 1)?;
        assert_equal(&got, &want, 1.0, "output");
        assert_equal(
            &grad(&got, &weight)?,
            &grad(&want, &weight)?,
            4.0,
            "gradient",
        );
        Ok(())
    })
}

#[test]
fn a_selection_is_not_saved_beside_the_whole() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let config = Default::default();
    let whole = hashed_embedding_bag_collection(TABLES, DIM, 0.5, config, vb.pp("both"))?
        .with_features(FEATURES)?;
    let tower = whole.select(["history"])?;
    let got = message(checkpoint::save(
        &path,
        [],
        [("both", &whole), ("tower", &tower)],
    ));
    assert!(
        got.contains("both.hashed_weight and tower.hashed_weight are one tensor"),
        "{got}"
    );
    // The whole has everything that its selections need.
    checkpoint::save(&path, checkpoint::variables(&vars), [("both", &whole)])?;
    let opened = Checkpoint::open(&path)?;
    let again = opened.hashed_embedding_bag_collection("both", DType::F32, &Device::Cpu)?;
    let rows = Tensor::new(&[[69u32]], &Device::Cpu)?;
    assert_eq!(
        to_vec(&again.select(["history"])?.forward(&rows)?)?,
        to_vec(&tower.forward(&rows)?)?
    );
    Ok(())
}
