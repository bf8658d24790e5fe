//! Layers in 8 and 4 bits: saved as their bytes, opened as them, and refused by field.

use super::Folder;
use crate::common::{config, floats, integers, message, on_each_device, to_vec, Draws};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_hashed_embedding_bag::{
    checkpoint, Bits, Checkpoint, Hash, HashedEmbedding, HashedEmbeddingBag,
    HashedEmbeddingBagCollection, Mode,
};
use safetensors::SafeTensors;
use serde_json::{json, Value};
use std::collections::HashMap;
use std::path::Path;

fn weight(len: usize, device: &Device) -> Result<Tensor> {
    floats(&Draws::new(len as u64).reals(len), DType::F32, device)
}

#[test]
fn what_is_saved_is_what_is_opened() -> Result<()> {
    on_each_device(|device| {
        let (folder, rows) = (Folder::new(), integers(&[1, 2, 7, 9], DType::U32, device)?);
        let rows = rows.reshape((2, 2))?;
        for bits in [Bits::Eight, Bits::Four] {
            let path = folder.file("model.safetensors");
            let new = |len, hash| {
                HashedEmbeddingBag::new(weight(len, device)?, 10, 16, config(Mode::Mean, hash))
            };
            let (bag, _) = new(640, Hash::balanced(16))?.to_bits(bits)?;
            let words = HashedEmbedding::from(new(500, Hash::original())?);
            let (words, _) = words.to_bits(bits)?;
            let plain = new(64, Hash::balanced(4))?;
            let tables = [("user", 10), ("movie", 20)];
            let both = weight(320, device)?;
            let both = HashedEmbeddingBagCollection::new(both, tables, 32, Default::default())?;
            let (both, _) = both.to_bits(bits)?;
            let layers = [
                ("", checkpoint::Layer::from(&bag)),
                ("words.hashed_embedding_bag", words.bag().into()),
                ("both", (&both).into()),
                ("plain", (&plain).into()),
            ];
            checkpoint::save(&path, [], layers)?;

            let opened = Checkpoint::open(&path)?;
            let again = opened.hashed_embedding_bag("", DType::F32, device)?;
            assert_eq!(again.config(), bag.config());
            assert_eq!(again.hashed_weight().dtype(), DType::U8);
            let (low, was) = (again.low_bit().unwrap(), bag.low_bit().unwrap());
            assert_eq!((low.bits(), low.scale()), (was.bits(), was.scale()));
            assert_eq!(
                to_vec(&again.forward(&rows)?)?,
                to_vec(&bag.forward(&rows)?)?
            );
            let half = opened.hashed_embedding_bag("", DType::F16, device)?;
            let want = bag.forward(&rows)?.to_dtype(DType::F16)?;
            assert_eq!(to_vec(&half.forward(&rows)?)?, to_vec(&want)?);
            let again = opened.hashed_embedding("words", DType::F32, device)?;
            assert_eq!(
                to_vec(&again.forward(&rows)?)?,
                to_vec(&words.forward(&rows)?)?
            );
            let again = opened.hashed_embedding_bag_collection("both", DType::F32, device)?;
            assert_eq!(
                to_vec(&again.forward(&rows)?)?,
                to_vec(&both.forward(&rows)?)?
            );
            let again = opened.hashed_embedding_bag("plain", DType::F32, device)?;
            assert!(again.low_bit().is_none());
            assert_eq!(
                to_vec(&again.forward(&rows)?)?,
                to_vec(&plain.forward(&rows)?)?
            );
            let got = message(opened.hashed_embedding_bag("", DType::F64, device));
            assert!(got.contains("gives f32, f16 or bf16, got f64"), "{got}");
        }
        Ok(())
    })
}

/// The description and the tensors, byte for byte: others may rely on them.
#[test]
fn the_file_is_as_specified() -> Result<()> {
    let (folder, device) = (Folder::new(), &Device::Cpu);
    let path = folder.file("model.safetensors");
    // Levels of 4 bits at scale 0.5, then at 0.25.
    let levels = (0..64).map(|i| (f64::from(i % 16) - 7.5) * if i < 32 { 0.5 } else { 0.25 });
    let weight = floats(&levels.collect::<Vec<_>>(), DType::F32, device)?;
    let layer = |bits| -> Result<_> {
        let config = config(Mode::Sum, Hash::balanced(4));
        let (layer, _) = HashedEmbeddingBag::new(weight.clone(), 10, 4, config)?.to_bits(bits)?;
        Ok(layer)
    };
    let (four, eight) = (layer(Bits::Four)?, layer(Bits::Eight)?);
    checkpoint::save(&path, [], [("a", &four), ("b", &eight)])?;

    let file = std::fs::read(&path)?;
    let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
    let metadata = metadata.metadata().clone().unwrap();
    let start = r#"{"num_embeddings":10,"embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"hash":{"kind":"mix","seed":0,"block":4,"signed":true,"balanced":true},"low_bit":"#;
    let scale = f64::from(eight.low_bit().unwrap().scale());
    assert_eq!(
        metadata["hashed_embedding_bag"],
        format!(
            r#"{{"version":2,"layers":{{"a":{start}{{"bits":4,"scale":0.5,"group":32}}}},"b":{start}{{"bits":8,"scale":{scale:?}}}}}}}}}"#
        )
    );
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let bytes = |name| tensors.tensor(name).unwrap().data().to_vec();
    assert_eq!(&bytes("a.hashed_weight")[..4], [0x10, 0x32, 0x54, 0x76]);
    assert_eq!(bytes("a.hashed_weight").len(), 32);
    assert_eq!(bytes("a.hashed_weight_shift"), [0b0100]);
    assert_eq!(bytes("b.hashed_weight").len(), 64);
    assert_eq!(tensors.len(), 3);
    Ok(())
}

fn write(path: &Path, description: &Value, tensors: &[(&str, Tensor)]) {
    let metadata = HashMap::from([("hashed_embedding_bag".to_string(), description.to_string())]);
    let tensors = tensors.iter().map(|(name, tensor)| (*name, tensor.clone()));
    safetensors::serialize_to_file(tensors, Some(metadata), path).unwrap();
}

#[test]
fn opening_refuses_by_field() -> Result<()> {
    let (folder, device) = (Folder::new(), &Device::Cpu);
    let path = folder.file("model.safetensors");
    let layer = |low_bit: Value| {
        json!({"version": 2, "layers": {"a": {
            "num_embeddings": 10, "embedding_dim": 4, "mode": "sum", "padding_idx": null, "include_last_offset": false,
            "hash": {"kind": "mix", "seed": 0, "block": 4, "signed": true}, "low_bit": low_bit,
        }}})
    };
    let bytes = |len: usize| Tensor::zeros(len, DType::U8, device);
    let (weight, shift) = ("a.hashed_weight", "a.hashed_weight_shift");
    let four = json!({"bits": 4, "scale": 0.5, "group": 32});
    let eight = json!({"bits": 8, "scale": 0.5});
    let open = |low_bit: &Value, tensors: &[(&str, Tensor)]| {
        write(&path, &layer(low_bit.clone()), tensors);
        Checkpoint::open(&path)
    };
    open(&four, &[(weight, bytes(128)?), (shift, bytes(2)?)])?;
    open(&eight, &[(weight, bytes(128)?)])?;
    // Null: as of a layer of floats.
    let floats = Tensor::zeros(8, DType::F32, device)?;
    open(&Value::Null, &[(weight, floats.clone())])?;

    let with = |low_bit: &Value, field: &str, value: Value| {
        let mut low_bit = low_bit.clone();
        low_bit[field] = value;
        low_bit
    };
    for (low_bit, said) in [
        (with(&four, "bits", json!(5)), "bits must be 8 or 4, got 5"),
        (
            with(&four, "bits", json!(-4)),
            "invalid value: integer `-4`",
        ),
        (
            with(&four, "scale", json!(0)),
            "scale must be a finite number of at least",
        ),
        (
            with(&four, "scale", json!(-0.5)),
            "scale must be a finite number of at least",
        ),
        (
            with(&four, "scale", json!(1e300)),
            "scale must be a finite number of at least",
        ),
        (
            with(&four, "scale", json!(1e-40)),
            "scale must be a finite number of at least",
        ),
        (with(&four, "scale", json!("NaN")), "invalid type: string"),
        (with(&four, "scale", Value::Null), "invalid type: null"),
        (with(&four, "group", json!(64)), "group must be 32, got 64"),
        (with(&four, "group", Value::Null), "group is missing"),
        (
            with(&eight, "group", json!(32)),
            "group goes with 4 bits only",
        ),
        (with(&eight, "zero", json!(0)), "unknown field `zero`"),
    ] {
        let got = message(open(&low_bit, &[(weight, bytes(128)?), (shift, bytes(2)?)]));
        let path = "checkpoint: layers.a.low_bit";
        assert!(got.contains(path) && got.contains(said), "{low_bit}: {got}");
    }
    for (low_bit, tensors, said) in [
        (
            &four,
            vec![(weight, bytes(128)?)],
            "no tensor a.hashed_weight_shift",
        ),
        (
            &four,
            vec![(weight, bytes(128)?), (shift, bytes(3)?)],
            "hashed_weight_shift must have 2 bytes, got 3",
        ),
        (
            &four,
            vec![(weight, bytes(128)?), (shift, floats.clone())],
            "a.hashed_weight_shift must have dtype U8, got F32",
        ),
        (
            &four,
            vec![(weight, bytes(127)?), (shift, bytes(2)?)],
            "must be a multiple of the block, got 254 and block 4",
        ),
        (
            &eight,
            vec![(shift, bytes(2)?)],
            "no tensor a.hashed_weight",
        ),
        (
            &eight,
            vec![(weight, floats.clone())],
            "a.hashed_weight must have dtype U8, got F32",
        ),
        (
            &eight,
            vec![(weight, bytes(128)?.reshape((2, 64))?)],
            "hashed_weight must have rank 1, got [2, 64]",
        ),
        (
            &Value::Null,
            vec![(weight, bytes(128)?)],
            "a.hashed_weight must have a float dtype, got U8",
        ),
    ] {
        let got = message(open(low_bit, &tensors));
        assert!(
            got.contains("checkpoint: layer a: ") && got.contains(said),
            "{got}"
        );
    }

    // A reader of version 1 would not know the field, so a file with it says 2.
    let mut old = layer(eight);
    old["version"] = json!(1);
    write(&path, &old, &[(weight, bytes(128)?)]);
    let got = message(Checkpoint::open(&path));
    assert!(got.contains("a: low_bit goes with version 2 only"), "{got}");
    Ok(())
}

/// The values that it was made of would be a second tensor of the same name.
#[test]
fn the_variable_of_a_rounded_layer_is_not_saved_beside_it() -> Result<()> {
    let (folder, device) = (Folder::new(), &Device::Cpu);
    let path = folder.file("model.safetensors");
    let values = weight(64, device)?;
    let layer = HashedEmbeddingBag::new(values.clone(), 10, 4, Default::default())?;
    let (rounded, _) = layer.to_bits(Bits::Eight)?;
    let got = message(checkpoint::save(
        &path,
        [("a.hashed_weight".to_string(), values)],
        [("a", &rounded)],
    ));
    assert!(
        got.contains("two different tensors are named a.hashed_weight"),
        "{got}"
    );
    assert!(!path.exists());
    Ok(())
}
