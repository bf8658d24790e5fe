//! Going on from a checkpoint: training what was saved, and refusing to load it into another layer.

use super::Folder;
use crate::common::{floats, message, on_each_device, to_vec, Draws};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_hashed_embedding_bag::{
    checkpoint, hashed_embedding, hashed_embedding_bag, hashed_embedding_bag_collection, Balanced,
    BoundsCheck, Checkpoint, Hash, HashedEmbeddingBag, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, Mode,
};
use candle_nn::{Optimizer, VarBuilder, VarMap, SGD};

fn max_of_original() -> HashedEmbeddingBagConfig {
    HashedEmbeddingBagConfig {
        mode: Mode::Max,
        hash: Some(Hash::original()),
        padding_idx: Some(-1),
        include_last_offset: true,
        ..Default::default()
    }
}

/// One step on the sum of squares, after which every value that was looked up is smaller.
fn step(vars: &VarMap, out: &Tensor) -> Result<()> {
    SGD::new(vars.all_vars(), 0.1)?.backward_step(&out.sqr()?.sum_all()?)
}

#[test]
fn a_saved_model_trains_on() -> Result<()> {
    on_each_device(|device| {
        let folder = Folder::new();
        let path = folder.file("model.safetensors");
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let bag = hashed_embedding_bag(50, 6, 0.3, max_of_original(), vb.pp("deep.items"))?;
        let words = hashed_embedding(90, 4, 0.5, Default::default(), vb.pp("words"))?;
        let (tables, config) = ([("user", 10), ("movie", 20)], Default::default());
        let both = hashed_embedding_bag_collection(tables, 8, 0.5, config, vb.pp("both"))?;
        candle_nn::linear(6, 1, vb.pp("head"))?;
        let layers = [
            ("deep.items", checkpoint::Layer::from(&bag)),
            ("words.hashed_embedding_bag", words.bag().into()),
            ("both", (&both).into()),
        ];
        checkpoint::save(&path, checkpoint::variables(&vars), layers)?;

        let opened = Checkpoint::open(&path)?;
        let mut resumed = VarMap::new();
        let vb = VarBuilder::from_varmap(&resumed, DType::F32, device);
        let bag2 = opened.trainable_hashed_embedding_bag("deep.items", vb.pp("deep.items"))?;
        let words2 = opened.trainable_hashed_embedding("words", vb.pp("words"))?;
        let both2 = opened.trainable_hashed_embedding_bag_collection("both", vb.pp("both"))?;
        candle_nn::linear(6, 1, vb.pp("head"))?;
        resumed.load(&path)?;
        assert_eq!(bag2.config(), bag.config());
        assert_eq!(words2.config(), words.config());
        assert_eq!(both2.config(), both.config());
        assert!(both2.tables().eq(both.tables()));

        // Under the names, and with the values, that were saved.
        let sorted = |vars: &VarMap| -> Result<Vec<(String, Vec<f64>)>> {
            let mut all = checkpoint::variables(vars)
                .into_iter()
                .map(|(name, tensor)| Ok((name, to_vec(&tensor)?)))
                .collect::<Result<Vec<_>>>()?;
            all.sort_by(|(a, _), (b, _)| a.cmp(b));
            Ok(all)
        };
        assert_eq!(sorted(&resumed)?, sorted(&vars)?);

        // A step changes both models in the same way.
        let ids = Tensor::new(&[[1u32, 2, 3], [9, 3, 1]], device)?;
        let pairs = Tensor::new(&[[1u32, 2], [9, 19]], device)?;
        let rows = ids.narrow(1, 0, 1)?;
        let out = |bag: &HashedEmbeddingBag, both: &HashedEmbeddingBagCollection, words: Tensor| {
            Tensor::cat(
                &[
                    bag.forward(&ids)?.flatten_all()?,
                    both.forward(&pairs)?.flatten_all()?,
                    words.flatten_all()?,
                ],
                0,
            )
        };
        let before = to_vec(&out(&bag, &both, words.forward(&rows)?)?)?;
        step(&vars, &out(&bag, &both, words.forward(&rows)?)?)?;
        step(&resumed, &out(&bag2, &both2, words2.forward(&rows)?)?)?;
        let after = to_vec(&out(&bag, &both, words.forward(&rows)?)?)?;
        let after2 = to_vec(&out(&bag2, &both2, words2.forward(&rows)?)?)?;
        for ((before, after), after2) in before.iter().zip(&after).zip(&after2) {
            assert_ne!(before, after);
            // Gradients on CUDA are summed in the order of threads.
            assert!((after - after2).abs() <= 1e-6, "{after} {after2}");
        }
        Ok(())
    })
}

#[test]
fn values_are_cast_to_the_variables() -> Result<()> {
    on_each_device(|device| {
        let folder = Folder::new();
        let path = folder.file("model.safetensors");
        let weight = floats(&Draws::new(1).halves(64), DType::F32, device)?;
        let layer = HashedEmbeddingBag::new(weight.clone(), 50, 8, Default::default())?;
        checkpoint::save(&path, [], [("a", &layer)])?;
        let opened = Checkpoint::open(&path)?;
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, dtype, device);
            let layer = opened.trainable_hashed_embedding_bag("a", vb.pp("b"))?;
            assert_eq!(layer.hashed_weight().dtype(), dtype);
            assert_eq!(to_vec(layer.hashed_weight())?, to_vec(&weight)?);
            // The variable of the map itself, not a copy of it.
            let vars = checkpoint::variables(&vars);
            assert_eq!(vars.len(), 1);
            assert_eq!(vars[0].0, "b.hashed_weight");
            assert_eq!(vars[0].1.id(), layer.hashed_weight().id());
        }
        Ok(())
    })
}

#[test]
fn only_variables_of_the_right_shape_are_trainable() -> Result<()> {
    let device = &Device::Cpu;
    let folder = Folder::new();
    let path = folder.file("model.safetensors");
    let weight = Tensor::zeros(64, DType::F32, device)?;
    let layer = HashedEmbeddingBag::new(weight, 50, 8, Default::default())?;
    checkpoint::save(&path, [], [("a", &layer)])?;
    let opened = Checkpoint::open(&path)?;

    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let got = message(opened.trainable_hashed_embedding_bag("b", vb.clone()));
    assert!(got.contains("no layer b, only a"), "{got}");
    let got = message(opened.trainable_hashed_embedding_bag_collection("a", vb.clone()));
    assert!(got.contains("no collection a"), "{got}");
    vb.get(63, "hashed_weight")?;
    let got = message(opened.trainable_hashed_embedding_bag("a", vb));
    assert!(got.contains("shape mismatch on hashed_weight"), "{got}");

    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::U32, device);
    let got = message(opened.trainable_hashed_embedding_bag("a", vb));
    assert!(
        got.contains("a.hashed_weight must have a float dtype, got U32"),
        "{got}"
    );
    assert!(vars.all_vars().is_empty());

    // A checkpoint's own tensors are not variables: training on them would change nothing.
    for vb in [
        VarBuilder::zeros(DType::F32, device),
        opened.var_builder(DType::F32, device).pp("a"),
    ] {
        let got = message(opened.trainable_hashed_embedding_bag("a", vb));
        assert!(
            got.contains("a.hashed_weight needs a VarBuilder of variables"),
            "{got}"
        );
    }
    Ok(())
}

#[test]
fn a_layer_that_differs_is_named_by_its_field() -> Result<()> {
    let device = &Device::Cpu;
    let folder = Folder::new();
    let path = folder.file("model.safetensors");
    let layer = |rows, columns, config| {
        HashedEmbeddingBag::new(
            Tensor::zeros(64, DType::F32, device)?,
            rows,
            columns,
            config,
        )
    };
    let config = HashedEmbeddingBagConfig {
        hash: Some(Hash::balanced(8)),
        ..Default::default()
    };
    checkpoint::save(&path, [], [("a", &layer(50, 8, config)?)])?;
    let opened = Checkpoint::open(&path)?;
    let spec = opened.layer("a")?;
    spec.check(&layer(50, 8, config)?)?;
    let unchecked = HashedEmbeddingBagConfig {
        bounds_check: BoundsCheck::Off,
        ..config
    };
    spec.check(&layer(50, 8, unchecked)?)?;

    let seeded = Balanced {
        seed: 7,
        block: 8,
        signed: true,
    };
    let with = |change: &dyn Fn(&mut HashedEmbeddingBagConfig)| {
        let mut config = config;
        change(&mut config);
        layer(50, 8, config)
    };
    for (other, want) in [
        (
            layer(51, 8, config)?,
            "num_embeddings is 50 in the file, 51 in the layer",
        ),
        (
            layer(50, 16, config)?,
            "embedding_dim is 8 in the file, 16 in the layer",
        ),
        (
            with(&|c| c.mode = Mode::Max)?,
            r#"mode is "sum" in the file, "max" in the layer"#,
        ),
        (
            with(&|c| c.padding_idx = Some(-1))?,
            "padding_idx is null in the file, -1 in the layer",
        ),
        (
            with(&|c| c.include_last_offset = true)?,
            "include_last_offset is false in the file, true in the layer",
        ),
        (
            with(&|c| c.first_row = 5)?,
            "first_row is absent in the file, 5 in the layer",
        ),
        (
            with(&|c| c.hash = Some(seeded.into()))?,
            "hash.seed is 0 in the file, 7 in the layer",
        ),
        (
            with(&|c| c.hash = Some(Hash::original()))?,
            r#"hash.kind is "mix" in the file, "affine" in the layer"#,
        ),
    ] {
        assert_eq!(message(spec.check(&other)), format!("checkpoint: {want}"));
    }
    let got = message(opened.layer("b"));
    assert!(got.contains("no layer b, only a"), "{got}");
    Ok(())
}

/// The shapes of both collections are the same, so that loading one into the other reports nothing.
#[test]
fn a_collection_that_differs_is_named_by_its_field() -> Result<()> {
    let device = &Device::Cpu;
    let folder = Folder::new();
    let path = folder.file("model.safetensors");
    let collection = |tables: &[(&str, usize)]| {
        let weight = Tensor::zeros(64, DType::F32, device)?;
        let tables = tables.iter().copied();
        HashedEmbeddingBagCollection::new(weight, tables, 8, Default::default())
    };
    let saved = collection(&[("u", 10), ("i", 20)])?;
    checkpoint::save(&path, [], [("both", &saved)])?;
    let opened = Checkpoint::open(&path)?;
    let spec = opened.collection("both")?;
    spec.check(&saved)?;
    for (tables, want) in [
        (
            &[("i", 20), ("u", 10)][..],
            r#"tables[0].name is "u" in the file, "i" in the layer"#,
        ),
        (
            &[("u", 10), ("i", 21)],
            "tables[1].num_embeddings is 20 in the file, 21 in the layer",
        ),
        (
            &[("u", 10)],
            r#"tables[1] is {"name":"i","num_embeddings":20} in the file, absent in the layer"#,
        ),
    ] {
        let got = message(spec.check(&collection(tables)?));
        assert_eq!(got, format!("checkpoint: {want}"));
    }
    let features = saved.with_features([("u", "u"), ("next", "i")])?;
    let got = message(spec.check(&features));
    let want = r#"features is absent in the file, [{"name":"u","table":"u"},{"name":"next","table":"i"}] in the layer"#;
    assert_eq!(got, format!("checkpoint: {want}"));
    checkpoint::save(&path, [], [("both", &features)])?;
    let opened = Checkpoint::open(&path)?;
    let spec = opened.collection("both")?;
    spec.check(&features)?;
    let got = message(spec.check(&saved.with_features([("u", "u"), ("next", "u")])?));
    let want = r#"features[1].table is "i" in the file, "u" in the layer"#;
    assert_eq!(got, format!("checkpoint: {want}"));
    Ok(())
}
