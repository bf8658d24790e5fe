//! What opening refuses, and what it tells of a file without reading it.

use super::Folder;
use crate::common::message;
use candle_core::{DType, Device, Result, Tensor};
use candle_hashed_embedding_bag::{
    checkpoint, Checkpoint, HashedEmbeddingBag, HashedEmbeddingBagCollection, StateDict,
};
use std::collections::HashMap;
use std::path::Path;

/// A file of many tables and features opens in a time that grows no faster than the file.
#[test]
fn many_tables() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let weight = Tensor::zeros(16, DType::F32, &device)?;
    let tables = (0..100_000).map(|t| (t.to_string(), 1));
    let features = (0..100_000).map(|t| (format!("of {t}"), t.to_string()));
    let collection = HashedEmbeddingBagCollection::new(weight, tables, 4, Default::default())?
        .with_features(features)?;
    checkpoint::save(&path, [], [("a", &collection)])?;
    let opened = Checkpoint::open(&path)?;
    let (_, spec) = opened.collections().next().unwrap();
    assert_eq!(spec.tables.len(), 100_000);
    let features = spec.features.as_ref().unwrap();
    assert_eq!(features[99_999].table, "99999");
    Ok(())
}

/// The dtype and the shape of every tensor, also of those that candle cannot read.
#[test]
fn tensors_are_described_without_being_read() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let layer = HashedEmbeddingBag::new(
        Tensor::zeros(16, DType::BF16, &device)?,
        10,
        4,
        Default::default(),
    )?;
    let ids = Tensor::zeros((2, 3), DType::I64, &device)?;
    checkpoint::save(&path, [("ids".to_string(), ids)], [("a", &layer)])?;
    let opened = Checkpoint::open(&path)?;
    let listed: Vec<_> = opened
        .tensor_names()
        .map(|name| opened.tensor_info(&name).map(|info| (name, info)))
        .collect::<Result<_>>()?;
    let [(weight, weight_info), (ids, ids_info)] = &listed[..] else {
        panic!("{listed:?}");
    };
    assert_eq!((weight.as_str(), ids.as_str()), ("a.hashed_weight", "ids"));
    assert_eq!(
        (weight_info.dtype.as_str(), &weight_info.shape[..]),
        ("bf16", &[16][..])
    );
    assert_eq!(weight_info.candle_dtype, Some(DType::BF16));
    assert_eq!(
        (ids_info.dtype.as_str(), &ids_info.shape[..]),
        ("i64", &[2, 3][..])
    );
    assert_eq!(
        message(opened.tensor_info("b")),
        "checkpoint: cannot find tensor b"
    );
    Ok(())
}

/// Writes a file with this description and one 1-D tensor.
fn file_with(path: &Path, description: &str, tensor: &str, dtype: DType, shape: &[usize]) {
    let tensor = (tensor, Tensor::zeros(shape, dtype, &Device::Cpu).unwrap());
    let metadata = HashMap::from([("hashed_embedding_bag".to_string(), description.to_string())]);
    safetensors::serialize_to_file([tensor], Some(metadata), path).unwrap();
}

#[test]
fn opening_refuses_by_layer_and_field() {
    let folder = Folder::new();
    let path = folder.file("model.safetensors");
    let hash = r#"{"kind":"mix","seed":0,"block":4,"signed":true}"#;
    let layer = format!(
        r#"{{"num_embeddings":10,"embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"hash":{hash}}}"#
    );
    let good = format!(r#"{{"version":1,"layers":{{"a":{layer}}}}}"#);
    let open = |description: &str, tensor: &str, dtype, shape: &[usize]| {
        file_with(&path, description, tensor, dtype, shape);
        Checkpoint::open(&path)
    };
    assert!(open(&good, "a.hashed_weight", DType::F32, &[16]).is_ok());

    for (from, to, said) in [
        (
            r#""version":1"#,
            r#""version":3"#,
            "version must be 1 or 2, got 3",
        ),
        (
            r#""version":1"#,
            r#""version":"1""#,
            r#"version must be 1 or 2, got "1""#,
        ),
        (r#""version":1,"#, "", "version is missing"),
        (
            r#""layers""#,
            r#""layer""#,
            "layer: unknown field `layer`, expected one of",
        ),
        ("{", "", "hashed_embedding_bag is no JSON"),
        (
            r#""mix""#,
            r#""md5""#,
            "layers.a.hash.kind: unknown variant `md5`, expected one of `mix`, `affine`, `lma`, `semantic`, `slot_table`",
        ),
        (
            r#""kind":"mix","#,
            "",
            "layers.a.hash: missing field `kind`",
        ),
        (r#""seed":0,"#, "", "layers.a.hash: missing field `seed`"),
        (
            r#""seed":0"#,
            r#""seed":-1"#,
            "layers.a.hash: invalid value: integer `-1`",
        ),
        (
            r#""block":4"#,
            r#""block":0"#,
            "layers.a.hash: block must lie in 1..=16777216, got 0",
        ),
        (
            r#""block":4"#,
            r#""block":64"#,
            "layers.a.hash: a signed block must be at most 32, got 64",
        ),
        (
            r#""signed":true"#,
            r#""signed":true,"salt":1"#,
            "layers.a.hash: unknown field `salt`",
        ),
        (
            r#""num_embeddings":10,"#,
            "",
            "layers.a: missing field `num_embeddings`",
        ),
        (
            r#""num_embeddings":10"#,
            r#""num_embeddings":0"#,
            "layer a: hashed-embedding-bag: num_embeddings must lie in 1..2^63, got 0",
        ),
        (
            r#""num_embeddings":10"#,
            r#""num_embeddings":1e3"#,
            "layers.a.num_embeddings: invalid type: floating point `1000.0`",
        ),
        (
            r#""embedding_dim":4"#,
            r#""embedding_dim":0"#,
            "layer a: hashed-embedding-bag: embedding_dim must lie in 1..2^31, got 0",
        ),
        (
            r#""mode":"sum""#,
            r#""mode":"median""#,
            "layers.a.mode: unknown variant `median`",
        ),
        (
            r#""padding_idx":null"#,
            r#""padding_idx":"x""#,
            "layers.a.padding_idx: invalid type: string",
        ),
        (
            r#""layers":{"a""#,
            r#""layers":{"b""#,
            "layer b: no tensor b.hashed_weight",
        ),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good);
        let got = message(open(&bad, "a.hashed_weight", DType::F32, &[16]));
        assert!(got.contains(&format!("checkpoint: {said}")), "{bad}\n{got}");
        assert!(got.contains("model.safetensors"), "{got}");
    }
    for (tensor, dtype, shape, said) in [
        ("b", DType::F32, &[16][..], "layer a: no tensor a.hashed_weight"),
        ("a.hashed_weight", DType::I64, &[16], "layer a: a.hashed_weight must have a float dtype, got I64"),
        ("a.hashed_weight", DType::F32, &[4, 4], "layer a: hashed-embedding-bag: hashed_weight must have rank 1, got [4, 4]"),
        ("a.hashed_weight", DType::F32, &[18], "layer a: hashed-embedding-bag: the length of hashed_weight must be a multiple of the block, got 18 and block 4"),
        ("a.hashed_weight", DType::F32, &[0], "layer a: hashed-embedding-bag: hashed_weight must hold at least one block of 4 values, got 0"),
    ] {
        let got = message(open(&good, tensor, dtype, shape));
        assert!(got.contains(&format!("checkpoint: {said}")), "{got}");
    }
}

#[test]
fn opening_refuses_other_files() {
    let folder = Folder::new();
    let path = folder.file("model.safetensors");
    assert!(message(Checkpoint::open(&path)).contains("No such file"));
    for bytes in [&b""[..], b"PK\x03\x04", &[0xff; 64], &[0; 64]] {
        std::fs::write(&path, bytes).unwrap();
        assert!(Checkpoint::open(&path).is_err(), "{bytes:?}");
    }
    let tensor = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
    safetensors::serialize_to_file([("a.hashed_weight", tensor)], None, &path).unwrap();
    let got = message(Checkpoint::open(&path));
    assert!(
        got.contains("checkpoint: no hashed_embedding_bag in __metadata__"),
        "{got}"
    );
    let whole = std::fs::read(&path).unwrap();
    for len in [whole.len() - 1, whole.len() / 2, 9] {
        std::fs::write(&path, &whole[..len]).unwrap();
        assert!(Checkpoint::open(&path).is_err());
    }
}

/// A named pipe that nobody writes to would keep whoever opens it waiting for ever.
#[cfg(unix)]
#[test]
fn opening_what_is_not_a_regular_file_is_refused_at_once() -> Result<()> {
    let folder = Folder::new();
    let pipe = folder.file("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status()?;
    assert!(made.success());
    for path in [&pipe, folder.0.path()] {
        for said in [
            message(Checkpoint::open(path)),
            message(StateDict::open(path)),
        ] {
            assert!(said.contains("not a regular file"), "{said}");
        }
    }
    Ok(())
}
