//! Layers whose hash reads a row tensor: where they get it, what it must be, and that it goes along.

use crate::common::{
    config, floats, integers, layer, lma, message, on_each_device, row_tensor, signature, to_vec,
    Draws, MODES,
};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    checkpoint, hashed_embedding_bag, hashed_embedding_bag_collection,
    hashed_embedding_bag_collection_with_row_tensor, hashed_embedding_bag_with_row_tensor, Bits,
    BoundsCheck, Checkpoint, Hash, HashedEmbeddingBag, HashedEmbeddingBagCollection, Mode,
};
use candle_nn::{VarBuilder, VarMap};
use safetensors::tensor::Dtype;
use std::collections::HashMap;

const HASHES: [fn() -> Hash; 3] = [
    || lma(4, 8, 1),
    || Hash::semantic(4),
    || Hash::slot_table(4),
];

fn said(what: &str) -> String {
    format!("hashed-embedding-bag: {what}")
}

fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

#[test]
fn row_tensors_that_do_not_fit_are_refused() {
    let (signatures, table) = (Hash::semantic(4), Hash::slot_table(4));
    let with = |hash, tensor: Tensor| {
        let weight = zeros(&[64], DType::F32);
        HashedEmbeddingBag::with_row_tensor(weight, &tensor, 10, 10, config(Mode::Sum, hash))
    };
    for (hash, tensor, what) in [
        (
            signatures,
            zeros(&[10], DType::U32),
            "signatures must have dtype i64, got u32",
        ),
        (
            signatures,
            zeros(&[9], DType::I64),
            "signatures must have at least 10 rows, and so shape [10], got [9]",
        ),
        (
            signatures,
            zeros(&[10, 1], DType::I64),
            "signatures must have at least 10 rows, and so shape [10], got [10, 1]",
        ),
        (
            table,
            zeros(&[10, 3], DType::I64),
            "slot_table must have dtype u32, got i64",
        ),
        (
            table,
            zeros(&[10, 2], DType::U32),
            "slot_table must have at least 10 rows, and so shape [10, 3], got [10, 2]",
        ),
        (
            table,
            Tensor::full(15u32, (10, 3), &Device::Cpu).unwrap(),
            "",
        ),
        (
            table,
            Tensor::full(16u32, (10, 3), &Device::Cpu).unwrap(),
            "slot_table must hold numbers of the 16 blocks of hashed_weight, got 16 in row 0, column block 0",
        ),
    ] {
        match what {
            "" => assert!(with(hash, tensor).is_ok()),
            what => assert_eq!(message(with(hash, tensor)), said(what)),
        }
    }
    let mut entries = vec![3u32; 30];
    entries[17] = 99;
    let entries = Tensor::from_vec(entries, (10, 3), &Device::Cpu).unwrap();
    assert_eq!(
        message(with(table, entries)),
        said("slot_table must hold numbers of the 16 blocks of hashed_weight, got 99 in row 5, column block 2")
    );
    let needs_none = message(with(Hash::mix(4), zeros(&[10], DType::I64)));
    assert!(
        needs_none.contains("this hash reads no tensor of the rows"),
        "{needs_none}"
    );

    // A layer may be a part of a larger table; the tables of a collection are all that there is.
    assert!(with(signatures, zeros(&[11], DType::I64)).is_ok());
    let collection = HashedEmbeddingBagCollection::with_row_tensor(
        zeros(&[64], DType::F32),
        &zeros(&[11], DType::I64),
        [("a", 4), ("b", 6)],
        10,
        config(Mode::Sum, signatures),
    );
    assert_eq!(
        message(collection),
        said("signatures must have 10 rows, and so shape [10], got [11]")
    );
}

#[test]
fn a_missing_row_tensor_is_an_error_by_name() {
    for (hash, name) in HASHES.map(|hash| (hash(), hash().row_tensor().unwrap())) {
        let config = config(Mode::Sum, hash);
        let what = format!(
            "{name} is missing, a tensor with a row for each row of the table, which this hash reads: see with_row_tensor"
        );
        let weight = zeros(&[64], DType::F32);
        let new = HashedEmbeddingBag::new(weight.clone(), 10, 8, config);
        assert_eq!(message(new), said(&what));
        let new = HashedEmbeddingBagCollection::new(weight, [("a", 10)], 8, config);
        assert_eq!(message(new), said(&what));
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let created = hashed_embedding_bag(10, 8, 0.5, config, vb.clone());
        assert_eq!(message(created), said(&what));
        let created = hashed_embedding_bag_collection([("a", 10)], 8, 0.5, config, vb);
        assert_eq!(message(created), said(&what));
        assert!(vars.all_vars().is_empty());
        let fit = HashedEmbeddingBag::fit(&zeros(&[10, 8], DType::F32), 0.5, config);
        assert_eq!(message(fit), said(&what));
    }
}

/// Such as one that was loaded into the model's `VarMap`: it is saved once.
#[test]
fn a_row_tensor_may_be_a_variable() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    for hash in HASHES.map(|hash| hash()) {
        let config = config(Mode::Sum, hash);
        let name = format!("a.{}", hash.row_tensor().unwrap());
        let tensor = row_tensor(&config, 40, 8, &zeros(&[160], DType::F32))?.unwrap();
        let vars = VarMap::new();
        let var = Var::from_tensor(&tensor)?;
        vars.data().lock().unwrap().insert(name.clone(), var);
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let layer = hashed_embedding_bag(40, 8, 0.5, config, vb.pp("a"))?;
        checkpoint::save(&path, checkpoint::variables(&vars), [("a", &layer)])?;
        let opened = Checkpoint::open(&path)?;
        let saved = opened.tensor(&name, &Device::Cpu)?;
        assert_eq!(to_vec(&saved)?, to_vec(&tensor)?);
    }
    Ok(())
}

/// A new layer trains `hashed_weight` alone, and a `VarBuilder` of its checkpoint has all that it needs.
#[test]
fn layers_are_created_saved_and_opened() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    on_each_device(|device| {
        for hash in HASHES.map(|hash| hash()) {
            let config = config(Mode::Mean, hash);
            let name = hash.row_tensor().unwrap();
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
            let weight = zeros(&[160], DType::F32).to_device(device)?;
            let tensor = row_tensor(&config, 40, 8, &weight)?.unwrap();
            let layer =
                hashed_embedding_bag_with_row_tensor(40, 8, 0.5, &tensor, config, vb.pp("a"))?;
            let tables = [("x", 30), ("y", 10)];
            let collection = hashed_embedding_bag_collection_with_row_tensor(
                tables,
                8,
                0.5,
                &tensor,
                config,
                vb.pp("b"),
            )?;
            assert_eq!(vars.all_vars().len(), 2);
            assert_eq!(layer.hashed_weight().dims(), [160]);
            checkpoint::save(
                &path,
                checkpoint::variables(&vars),
                [
                    ("a", checkpoint::Layer::from(&layer)),
                    ("b", (&collection).into()),
                ],
            )?;

            let opened = Checkpoint::open(&path)?;
            let names: Vec<_> = opened.tensor_names().collect();
            let want = ["a", "b"]
                .map(|layer| [format!("{layer}.hashed_weight"), format!("{layer}.{name}")]);
            assert_eq!(names, want.concat());
            let indices = integers(&[0, 39, 7, 8], DType::I64, device)?.reshape((2, 2))?;
            let want = to_vec(&layer.forward(&indices)?)?;
            let check = |layer: &HashedEmbeddingBag| -> Result<()> {
                assert_eq!(to_vec(&layer.forward(&indices)?)?, want);
                let rows = layer.row_tensor().unwrap();
                assert_eq!(to_vec(rows)?, to_vec(&tensor)?);
                assert!(rows.device().same_device(device));
                Ok(())
            };
            check(&opened.hashed_embedding_bag("a", DType::F32, device)?)?;
            let vb = opened.var_builder(DType::F32, device);
            check(&hashed_embedding_bag(40, 8, 0.5, config, vb.pp("a"))?)?;
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
            check(&opened.trainable_hashed_embedding_bag("a", vb)?)?;
            assert_eq!(vars.all_vars().len(), 1);

            let again = opened.hashed_embedding_bag_collection("b", DType::F32, device)?;
            let rows = integers(&[29, 9], DType::I64, device)?.reshape((1, 2))?;
            let want = to_vec(&collection.forward(&rows)?)?;
            assert_eq!(to_vec(&again.forward(&rows)?)?, want);
            let vb = opened.var_builder(DType::F32, device).pp("b");
            let again = hashed_embedding_bag_collection(tables, 8, 0.5, config, vb)?;
            assert_eq!(to_vec(&again.forward(&rows)?)?, want);
            let y = again
                .table("y")?
                .forward(&rows.narrow(1, 1, 1)?.contiguous()?)?;
            assert_eq!(to_vec(&y)?, want[8..]);
            let y = again
                .with_features([("only", "y")])?
                .forward(&rows.narrow(1, 1, 1)?)?;
            assert_eq!(to_vec(&y)?, want[8..]);
        }
        Ok(())
    })
}

/// A checkpoint in low bits has the row tensor too.
#[test]
fn rounded_layers_keep_their_row_tensor() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    for hash in HASHES.map(|hash| hash()) {
        for bits in [Bits::Eight, Bits::Four] {
            let weight = floats(&Draws::new(1).reals(64), DType::F32, &Device::Cpu)?;
            let (served, _) = layer(&weight, 20, 12, config(Mode::Sum, hash))?.to_bits(bits)?;
            checkpoint::save(&path, [], [("a", &served)])?;
            let again =
                Checkpoint::open(&path)?.hashed_embedding_bag("a", DType::F32, &Device::Cpu)?;
            assert_eq!(
                to_vec(&again.to_table(..)?)?,
                to_vec(&served.to_table(..)?)?
            );
        }
    }
    Ok(())
}

/// Files whose row tensor is missing or not what the description says.
#[test]
fn opening_refuses_by_layer_and_tensor() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    let description = |hash: &str| {
        format!(
            r#"{{"version":1,"layers":{{"a":{{"num_embeddings":10,"embedding_dim":10,"mode":"sum","padding_idx":null,"include_last_offset":false,"hash":{hash}}}}}}}"#
        )
    };
    let semantic =
        r#"{"kind":"semantic","seed":0,"key_bits":16,"keys_to_use":2,"block":4,"signed":true}"#;
    let table = r#"{"kind":"slot_table","block":4}"#;
    let open = |hash: &str, tensor: Option<(&str, Dtype, &[usize], u8)>| {
        let bytes = |dtype: Dtype, shape: &[usize], value| {
            let mut bytes = vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8];
            // The lowest byte of the last value.
            let at = bytes.len() - dtype.bitsize() / 8;
            bytes[at] = value;
            bytes
        };
        let weight = bytes(Dtype::F32, &[64], 0);
        let rows = tensor
            .map(|(name, dtype, shape, value)| (name, dtype, shape, bytes(dtype, shape, value)));
        let view = |dtype, shape: &[usize], bytes| {
            safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes).unwrap()
        };
        let mut tensors = vec![("a.hashed_weight", view(Dtype::F32, &[64], &weight[..]))];
        if let Some((name, dtype, shape, bytes)) = &rows {
            tensors.push((name, view(*dtype, shape, &bytes[..])));
        }
        let metadata = HashMap::from([("hashed_embedding_bag".to_string(), description(hash))]);
        safetensors::serialize_to_file(tensors, Some(metadata), &path)?;
        Checkpoint::open(&path)
    };
    assert!(open(semantic, Some(("a.signatures", Dtype::I64, &[10], 1))).is_ok());
    assert!(open(table, Some(("a.slot_table", Dtype::U32, &[10, 3], 15))).is_ok());
    for (hash, tensor, what) in [
        (semantic, None, "layer a: no tensor a.signatures"),
        (
            semantic,
            Some(("a.slot_table", Dtype::I64, &[10][..], 1)),
            "layer a: no tensor a.signatures",
        ),
        (
            semantic,
            Some(("a.signatures", Dtype::U32, &[10], 1)),
            "layer a: a.signatures must have dtype I64, got U32",
        ),
        (
            semantic,
            Some(("a.signatures", Dtype::I64, &[9], 1)),
            "signatures must have at least 10 rows, and so shape [10], got [9]",
        ),
        (table, None, "layer a: no tensor a.slot_table"),
        (
            table,
            Some(("a.slot_table", Dtype::F32, &[10, 3], 1)),
            "layer a: a.slot_table must have dtype U32, got F32",
        ),
        (
            table,
            Some(("a.slot_table", Dtype::U32, &[30], 1)),
            "slot_table must have at least 10 rows, and so shape [10, 3], got [30]",
        ),
        (
            table,
            Some(("a.slot_table", Dtype::U32, &[10, 3], 16)),
            "slot_table must hold numbers of the 16 blocks of hashed_weight, got 16 in row 9, column block 2",
        ),
    ] {
        let got = message(open(hash, tensor));
        assert!(got.contains(what), "{got}");
    }
    Ok(())
}

/// Without bounds checks, a row past the last gives what the last gives.
#[test]
fn unchecked_rows_read_the_last_row() -> Result<()> {
    on_each_device(|device| {
        for hash in HASHES.map(|hash| hash()) {
            let weight = floats(&Draws::new(1).reals(64), DType::F32, device)?;
            let layer = layer(&weight, 20, 12, config(Mode::Sum, hash))?;
            let layer = layer.with_bounds_check(BoundsCheck::Off);
            let row = |row| -> Result<Vec<f64>> {
                let indices = integers(&[row], DType::I64, device)?;
                to_vec(&layer.forward(&indices.unsqueeze(0)?)?)
            };
            for far in [20, 1 << 40, i64::MAX, -1, i64::MIN] {
                assert_eq!(row(far)?, row(19)?, "{hash:?} {far}");
            }
        }
        Ok(())
    })
}

/// Rows of one signature are one row, with signs and all; a row tensor in any strides is read as it is.
#[test]
fn rows_of_one_signature_are_equal() -> Result<()> {
    on_each_device(|device| {
        let pairs: Vec<i64> = (0..20).flat_map(|row| [signature(row / 2), 0]).collect();
        let strided = Tensor::from_vec(pairs, (20, 2), device)?;
        let signatures = strided.narrow(1, 0, 1)?.squeeze(1)?;
        let weight = floats(&Draws::new(1).reals(4096), DType::F32, device)?;
        for (hash, mode) in [lma(2, 4, 4), Hash::semantic(8)]
            .into_iter()
            .flat_map(|hash| MODES.map(|mode| (hash, mode)))
        {
            let config = config(mode, hash);
            let layer =
                HashedEmbeddingBag::with_row_tensor(weight.clone(), &signatures, 20, 16, config)?;
            let rows = layer
                .to_table(..)?
                .to_device(&Device::Cpu)?
                .to_vec2::<f32>()?;
            for pair in rows.chunks(2) {
                assert_eq!(pair[0], pair[1]);
            }
            assert_ne!(rows[0], rows[2]);
        }
        Ok(())
    })
}
