//! What is saved is what is opened.

use super::Folder;
use crate::common::strategies::{check, dtypes, tables};
use crate::common::{floats, integers, layer, message, on_each_device, to_vec, Draws};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_hashed_embedding_bag::{
    checkpoint, hashed_embedding, hashed_embedding_bag, Checkpoint, Hash, HashedEmbeddingBag,
    HashedEmbeddingBagConfig, Mode,
};
use candle_nn::{VarBuilder, VarMap};
use proptest::collection::vec;
use proptest::prelude::*;

#[test]
fn a_model_is_rebuilt_from_the_file_alone() -> Result<()> {
    on_each_device(|device| {
        let (folder, vars) = (Folder::new(), VarMap::new());
        let path = folder.file("model.safetensors");
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let users = hashed_embedding_bag(100, 8, 0.1, Default::default(), vb.pp("users"))?;
        let config = HashedEmbeddingBagConfig {
            mode: Mode::Max,
            hash: Some(Hash::original()),
            padding_idx: Some(-1),
            include_last_offset: true,
            ..Default::default()
        };
        let items = hashed_embedding_bag(50, 6, 0.3, config, vb.pp("deep.items"))?;
        let words = hashed_embedding(1000, 4, 0.1, Default::default(), vb.pp("words"))?;
        let head = candle_nn::linear(8, 3, vb.pp("head"))?;
        let ids = Tensor::new(&[7i64, 1 << 40], device)?;
        let all = checkpoint::variables(&vars)
            .into_iter()
            .chain([("ids".into(), ids)]);
        let layers = [
            ("users", &users),
            ("deep.items", &items),
            ("words.hashed_embedding_bag", words.bag()),
        ];
        checkpoint::save(&path, all, layers)?;

        let opened = Checkpoint::open(&path)?;
        let names: Vec<_> = opened.layers().map(|(name, _)| name.to_string()).collect();
        assert_eq!(names, ["deep.items", "users", "words.hashed_embedding_bag"]);
        let (_, spec) = opened.layers().next().unwrap();
        assert_eq!((spec.num_embeddings, spec.embedding_dim), (50, 6));
        assert_eq!(spec.hash, Hash::original());

        let two = integers(&[1, 2, 3, 4, 5, 6], DType::U32, device)?.reshape((3, 2))?;
        let users2 = opened.hashed_embedding_bag("users", DType::F32, device)?;
        assert_eq!(
            to_vec(&users.forward(&two)?)?,
            to_vec(&users2.forward(&two)?)?
        );
        assert!(!users2.hashed_weight().is_variable());
        let items2 = opened.hashed_embedding_bag("deep.items", DType::F32, device)?;
        let rows = integers(&[1, -1, 49, 3], DType::I64, device)?;
        let offsets = integers(&[0, 3, 4], DType::I64, device)?;
        assert_eq!(
            to_vec(&items.forward_with_offsets(&rows, &offsets)?)?,
            to_vec(&items2.forward_with_offsets(&rows, &offsets)?)?
        );
        assert_eq!(
            (items2.config().mode, items2.config().padding_idx),
            (Mode::Max, Some(-1))
        );
        assert!(items2.config().include_last_offset);
        let words2 = opened.hashed_embedding("words", DType::F32, device)?;
        assert_eq!(
            to_vec(&words.forward(&two)?)?,
            to_vec(&words2.forward(&two)?)?
        );

        let vb = opened.var_builder(DType::F32, device);
        assert!(vb.contains_tensor("head.weight") && !vb.contains_tensor("head"));
        let head2 = candle_nn::linear(8, 3, vb.pp("head"))?;
        let x = users.forward(&two)?;
        assert_eq!(to_vec(&head.forward(&x)?)?, to_vec(&head2.forward(&x)?)?);
        assert!(message(vb.get((2, 8), "head.weight")).contains("shape mismatch for head.weight"));
        assert!(message(vb.get(3, "tail")).contains("cannot find tensor tail"));
        let ids = opened.tensor("ids", device)?;
        assert_eq!(ids.to_vec1::<i64>()?, [7, 1 << 40]);

        // In another dtype.
        let half = opened.hashed_embedding_bag("users", DType::F16, device)?;
        assert_eq!(half.forward(&two)?.dtype(), DType::F16);
        assert_eq!(
            message(opened.hashed_embedding_bag("user", DType::F32, device)),
            "checkpoint: no layer user, only deep.items, users, words.hashed_embedding_bag"
        );
        Ok(())
    })
}

#[test]
fn a_model_keeps_metadata_of_its_own() -> Result<()> {
    let folder = Folder::new();
    let path = folder.file("model.safetensors");
    let weight = Tensor::zeros(64, DType::F32, &Device::Cpu)?;
    let layer = HashedEmbeddingBag::new(weight, 50, 8, Default::default())?;
    let save = |metadata: &[(&str, &str)]| {
        let metadata = metadata.iter().copied();
        checkpoint::save_with_metadata(&path, [], [("a", &layer)], metadata)
    };
    let ids = r#"{"Amélie":7,"\"":8}"#;
    save(&[("ids", ids), ("", "nothing"), ("recall@10", "0.31")])?;
    let opened = Checkpoint::open(&path)?;
    assert_eq!(opened.metadata("ids"), Some(ids));
    assert_eq!(opened.metadata(""), Some("nothing"));
    assert_eq!(opened.metadata("recall@10"), Some("0.31"));
    assert_eq!(opened.metadata("other"), None);
    let own: Vec<_> = opened.own_metadata().collect();
    assert_eq!(own, [("", "nothing"), ("ids", ids), ("recall@10", "0.31")]);
    // The description of the layers is not the model's.
    assert_eq!(opened.metadata("hashed_embedding_bag"), None);
    assert_eq!(opened.layers().count(), 1);

    let before = std::fs::read(&path)?;
    let got = message(save(&[("hashed_embedding_bag", "{}")]));
    assert!(
        got.contains("the metadata hashed_embedding_bag describes the layers"),
        "{got}"
    );
    let got = message(save(&[("k", "1"), ("k", "2")]));
    assert!(got.contains("the metadata k is given twice"), "{got}");
    assert_eq!(std::fs::read(&path)?, before);
    Ok(())
}

/// What is saved is what is opened: every layer under every name, to the bit.
#[test]
fn checkpoints_round_trip() {
    let layers = vec(
        (".{0,6}", tables(), any::<bool>(), dtypes(), any::<u32>()),
        0..4,
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    check(layers, |layers, device| {
        let mut saved = std::collections::BTreeMap::new();
        for (name, table, include_last_offset, dtype, seed) in layers {
            let weight = Draws::new((*seed).into()).halves(table.len);
            let config = HashedEmbeddingBagConfig {
                include_last_offset: *include_last_offset,
                ..table.config()
            };
            let weight = floats(&weight, *dtype, device)?;
            let (rows, columns) = (table.num_embeddings, table.embedding_dim);
            let layer = layer(&weight, rows, columns, config)?;
            saved.insert(name.clone(), layer);
        }
        checkpoint::save(&path, [], saved.iter())?;
        let opened = Checkpoint::open(&path)?;
        assert!(opened.layers().map(|(name, _)| name).eq(saved.keys()));
        for (name, layer) in &saved {
            let dtype = layer.hashed_weight().dtype();
            let again = opened.hashed_embedding_bag(name, dtype, device)?;
            let all = |layer: &HashedEmbeddingBag| -> Result<_> {
                let sizes = (layer.num_embeddings(), layer.embedding_dim());
                let rows = layer.row_tensor().map(to_vec).transpose()?;
                Ok((sizes, layer.config(), to_vec(layer.hashed_weight())?, rows))
            };
            assert_eq!(all(&again)?, all(layer)?);
        }
        Ok(())
    });
}
