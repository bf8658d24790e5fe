//! The description of the layers, byte for byte.

use super::Folder;
use candle_core::{DType, Device, Result, Tensor};
use candle_hashed_embedding_bag::{
    checkpoint, Checkpoint, Hash, HashedEmbeddingBag, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, Mix,
};
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::Path;

fn metadata(path: &Path) -> HashMap<String, String> {
    let file = std::fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
    metadata.metadata().clone().unwrap()
}

/// The description, byte for byte: others may rely on it.
#[test]
fn the_description_is_as_specified() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let layer = |len, config| {
        HashedEmbeddingBag::new(
            Tensor::zeros(len, DType::BF16, &device).unwrap(),
            10,
            4,
            config,
        )
    };
    let with = |hash| HashedEmbeddingBagConfig {
        hash: Some(hash),
        ..Default::default()
    };
    let plain = layer(16, Default::default())?;
    let large = layer(
        32,
        with(Hash::from(Mix {
            seed: u64::MAX,
            block: 16,
            signed: false,
        })),
    )?;
    let original = layer(9, with(Hash::original()))?;
    let robe = layer(9, with(Hash::robe(&[5, 4, 3, 2], 3)?))?;
    let layers = [("", &plain), ("b", &large), ("c", &original), ("d", &robe)];
    checkpoint::save(&path, [], layers)?;
    let file = metadata(&path);
    assert_eq!(file.len(), 1);
    assert_eq!(
        file["hashed_embedding_bag"],
        concat!(
            r#"{"version":1,"layers":{"#,
            r#""":{"num_embeddings":10,"embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"#,
            r#""hash":{"kind":"mix","seed":0,"block":4,"signed":true,"balanced":true}},"#,
            r#""b":{"num_embeddings":10,"embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"#,
            r#""hash":{"kind":"mix","seed":18446744073709551615,"block":16,"signed":false}},"#,
            r#""c":{"num_embeddings":10,"embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"#,
            r#""hash":{"kind":"affine","a":9824516537,"b":57857966300227,"c":104729,"modulus":117130198221199,"block":1}},"#,
            r#""d":{"num_embeddings":10,"embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"#,
            r#""hash":{"kind":"affine","a":2,"b":3,"c":4,"modulus":5,"block":3,"overflow":"refuse"}}}}"#
        )
    );
    let opened = Checkpoint::open(&path)?;
    for (name, layer) in layers {
        let again = opened.hashed_embedding_bag(name, DType::BF16, &device)?;
        assert_eq!(again.hash(), layer.hash());
    }
    let bytes = std::fs::read(&path)?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    assert_eq!(tensors.tensor("hashed_weight")?.dtype(), Dtype::BF16);
    assert_eq!(tensors.tensor("b.hashed_weight")?.shape(), [32]);

    // The same model gives the same bytes.
    checkpoint::save(folder.file("again"), [], layers)?;
    assert_eq!(std::fs::read(folder.file("again"))?, bytes);
    Ok(())
}

/// A collection without features of its own is written as it was before there were any, so that older readers open it. One with
/// features has a field that they do not know, and refuse.
#[test]
fn features_are_described_where_they_are_not_the_tables() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let weight = Tensor::zeros(16, DType::F32, &device)?;
    let tables = [("user", 10), ("movie", 20)];
    let plain = HashedEmbeddingBagCollection::new(weight, tables, 4, Default::default())?;
    let head = concat!(
        r#"{"version":1,"layers":{},"collections":{"a":{"#,
        r#""tables":[{"name":"user","num_embeddings":10},{"name":"movie","num_embeddings":20}],"#
    );
    let tail = concat!(
        r#""embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"#,
        r#""hash":{"kind":"mix","seed":0,"block":4,"signed":true,"balanced":true}}}}"#
    );
    for (features, field) in [
        (&[("user", "user"), ("movie", "movie")][..], ""),
        (
            &[("user", "user"), ("movie", "movie"), ("next", "movie")],
            concat!(
                r#""features":[{"name":"user","table":"user"},{"name":"movie","table":"movie"},"#,
                r#"{"name":"next","table":"movie"}],"#
            ),
        ),
        (
            &[("movie", "movie"), ("user", "user")],
            r#""features":[{"name":"movie","table":"movie"},{"name":"user","table":"user"}],"#,
        ),
        (
            &[("movie", "movie")],
            r#""features":[{"name":"movie","table":"movie"}],"#,
        ),
    ] {
        let collection = plain.with_features(features.iter().copied())?;
        checkpoint::save(&path, [], [("a", &collection)])?;
        assert_eq!(
            metadata(&path)["hashed_embedding_bag"],
            format!("{head}{field}{tail}")
        );
        let opened = Checkpoint::open(&path)?;
        let again = opened.hashed_embedding_bag_collection("a", DType::F32, &device)?;
        assert_eq!(again.features().collect::<Vec<_>>(), features);
        assert_eq!(again.tables().collect::<Vec<_>>(), tables);
        opened.collection("a")?.check(&collection)?;
    }
    Ok(())
}

/// What docs/format.md shows is read as it says.
#[test]
fn the_example_of_the_specification_opens() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let document = include_str!("../../../docs/format.md");
    let (_, json) = document.split_once("```json\n").expect("an example");
    let (json, _) = json.split_once("```").expect("its end");
    let weight = Tensor::zeros(64, DType::F32, &device)?;
    let tensors =
        ["user", "item", "context"].map(|name| (format!("{name}.hashed_weight"), weight.clone()));
    let metadata = HashMap::from([("hashed_embedding_bag".to_string(), json.to_string())]);
    safetensors::serialize_to_file(tensors, Some(metadata), &path)?;

    let opened = Checkpoint::open(&path)?;
    assert_eq!(opened.layer("item")?.first_row, 6040);
    assert_eq!(opened.layer("user")?.hash, Hash::balanced(8));
    let context = opened.hashed_embedding_bag_collection("context", DType::F32, &device)?;
    assert_eq!(
        context.features().collect::<Vec<_>>(),
        [("hour", "hour"), ("home", "city"), ("destination", "city")]
    );
    Ok(())
}
