//! Outputs and gradients that PyTorch computed (tests/golden/make.py), from the state dicts that it saved.

use crate::common::{on_each_device, to_vec};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::semantic::Records;
use candle_hashed_embedding_bag::{
    checkpoint, Checkpoint, Hash, HashedEmbedding, HashedEmbeddingBag,
    HashedEmbeddingBagCollection, HashedEmbeddingBagConfig, JaggedLayout, Mix, Mode, StateDict,
};
use std::collections::HashMap;

const MODES: [(&str, Mode); 3] = [("sum", Mode::Sum), ("mean", Mode::Mean), ("max", Mode::Max)];

fn path(name: &str) -> String {
    format!("tests/golden/{name}")
}

struct Expected(HashMap<String, Tensor>);

impl Expected {
    fn of(name: &str) -> Result<Self> {
        let path = path(&format!("{name}.expected.safetensors"));
        Ok(Self(candle_core::safetensors::load(path, &Device::Cpu)?))
    }

    fn tensor(&self, key: &str, device: &Device) -> Result<Tensor> {
        self.0[key].to_device(device)
    }

    /// Every bit, where all sums are exact.
    #[track_caller]
    fn assert_is(&self, got: &Tensor, key: &str) {
        let want = &self.0[key];
        assert_eq!(
            (got.dims(), got.dtype()),
            (want.dims(), want.dtype()),
            "{key}"
        );
        assert_eq!(to_vec(got).unwrap(), to_vec(want).unwrap(), "{key}");
    }
}

/// The layer on a variable, and the gradient of `lookup` in it.
fn gradient(
    layer: &HashedEmbeddingBag,
    grad_output: &Tensor,
    lookup: impl Fn(HashedEmbeddingBag) -> Result<Tensor>,
) -> Result<(Tensor, Tensor)> {
    let weight = Var::from_tensor(layer.hashed_weight())?;
    let (rows, columns) = (layer.num_embeddings(), layer.embedding_dim());
    let layer = HashedEmbeddingBag::new(weight.as_tensor().clone(), rows, columns, layer.config())?;
    let output = lookup(layer)?;
    let grads = (&output * grad_output)?.sum_all()?.backward()?;
    Ok((output, grads.get(&weight).unwrap().clone()))
}

/// Bags in every mode; the keys of the expected tensors start with `prefix`.
fn assert_pooled(
    expected: &Expected,
    prefix: &str,
    layer: impl Fn(HashedEmbeddingBagConfig, &Device) -> Result<HashedEmbeddingBag>,
) -> Result<()> {
    on_each_device(|device| {
        let tensor = |key| expected.tensor(&format!("{prefix}{key}"), device);
        for (name, mode) in MODES {
            let config = HashedEmbeddingBagConfig {
                mode,
                ..Default::default()
            };
            let layer = layer(config, device)?;
            let (output, grad_weight) = gradient(&layer, &tensor("grad_output")?, |layer| {
                layer.forward_with_offsets(&tensor("indices")?, &tensor("offsets")?)
            })?;
            expected.assert_is(&output, &format!("{prefix}{name}.output"));
            expected.assert_is(&grad_weight, &format!("{prefix}{name}.grad_weight"));
        }
        Ok(())
    })
}

/// Single rows.
fn assert_rows(
    expected: &Expected,
    layer: impl Fn(&Device) -> Result<HashedEmbeddingBag>,
) -> Result<()> {
    on_each_device(|device| {
        let grad_output = expected.tensor("grad_output", device)?;
        let (output, grad_weight) = gradient(&layer(device)?, &grad_output, |layer| {
            HashedEmbedding::from(layer).forward(&expected.tensor("indices", device)?)
        })?;
        expected.assert_is(&output, "output");
        expected.assert_is(&grad_weight, "grad_weight");
        Ok(())
    })
}

#[test]
fn original() -> Result<()> {
    assert_pooled(&Expected::of("original")?, "", |config, device| {
        let mut state = StateDict::open(path("original.pth"))?;
        let layer = state.hashed_embedding_bag("", 1000, 16, config, device)?;
        assert_eq!(state.keys().count(), 0);
        Ok(layer)
    })
}

#[test]
fn original_rows_that_wrap_in_f64() -> Result<()> {
    assert_pooled(&Expected::of("original_wide")?, "", |config, device| {
        let mut state = StateDict::open(path("original_wide.pth"))?;
        let layer = state.hashed_embedding_bag("", 1 << 40, 6, config, device)?;
        assert_eq!(layer.hashed_weight().dtype(), DType::F64);
        Ok(layer)
    })
}

#[test]
fn original_embedding_in_a_model() -> Result<()> {
    assert_rows(&Expected::of("original_embedding")?, |device| {
        let mut state = StateDict::open_nested(path("original_embedding.pth"), "state_dict")?;
        let layer = state.hashed_embedding("words", 3000, 10, Default::default(), device)?;
        let left: Vec<_> = state.keys().collect();
        assert_eq!(left, ["head.bias", "head.weight"]);
        assert_eq!(state.take("head.weight", device)?.dims(), [2, 10]);
        Ok(layer.bag().clone())
    })
}

#[test]
fn robe() -> Result<()> {
    assert_pooled(&Expected::of("robe")?, "", |config, device| {
        let config = HashedEmbeddingBagConfig {
            first_row: 1234,
            ..config
        };
        let mut state = StateDict::open(path("robe.pth"))?;
        let layer = state.robe("", 1000, 20, 8, config, device)?;
        assert_eq!(state.keys().count(), 0);
        Ok(layer)
    })
}

#[test]
fn robe_cpu() -> Result<()> {
    assert_rows(&Expected::of("robe_cpu")?, |device| {
        let config = HashedEmbeddingBagConfig {
            first_row: 77,
            ..Default::default()
        };
        let mut state = StateDict::open(path("robe_cpu.pth"))?;
        let layer = state.robe("", 1000, 10, 4, config, device)?;
        assert_eq!(state.keys().count(), 0);
        Ok(layer)
    })
}

const DLRM_TABLES: [(&str, usize); 3] = [("user", 100), ("day", 7), ("item", 1000)];

fn robe_dlrm(file: &str, mode: Mode, device: &Device) -> Result<HashedEmbeddingBagCollection> {
    let mut state = match file {
        "robe_dlrm.pth" => StateDict::open_nested(path(file), "state_dict")?,
        file => StateDict::open(path(file))?,
    };
    let config = HashedEmbeddingBagConfig {
        mode,
        ..Default::default()
    };
    let collection = state.robe_dlrm("", DLRM_TABLES, 16, 8, config, device)?;
    assert_eq!(
        state.keys().collect::<Vec<_>>(),
        ["bot_l.0.bias", "bot_l.0.weight"]
    );
    Ok(collection)
}

/// From the training script's file, and from safetensors, which has the shared parameter under one of its seven names.
#[test]
fn robe_dlrm_by_table_and_at_once() -> Result<()> {
    let expected = Expected::of("robe_dlrm")?;
    for file in ["robe_dlrm.pth", "robe_dlrm.safetensors"] {
        for (t, (name, _)) in DLRM_TABLES.iter().enumerate() {
            assert_pooled(&expected, &format!("{t}."), |config, device| {
                robe_dlrm(file, config.mode, device)?.table(name)
            })?;
        }
        on_each_device(|device| {
            let all = |key: &str| -> Result<Vec<Tensor>> {
                let keys = (0..DLRM_TABLES.len()).map(|t| format!("{t}.{key}"));
                keys.map(|key| expected.tensor(&key, device)).collect()
            };
            let indices = all("indices")?;
            let mut nnz = 0;
            let mut offsets = all("offsets")?;
            for (offsets, indices) in offsets.iter_mut().zip(&indices) {
                *offsets = (&*offsets + nnz as f64)?;
                nnz += indices.elem_count();
            }
            let (indices, offsets) = (Tensor::cat(&indices, 0)?, Tensor::cat(&offsets, 0)?);
            for (name, mode) in MODES {
                let collection = robe_dlrm(file, mode, device)?;
                let output =
                    collection.forward_jagged(&indices, &offsets, JaggedLayout::FeatureMajor)?;
                let wanted = Tensor::stack(&all(&format!("{name}.output"))?, 1)?;
                assert_eq!(output.dims(), wanted.dims());
                assert_eq!(to_vec(&output)?, to_vec(&wanted)?);
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn mix() -> Result<()> {
    let expected = Expected::of("mix")?;
    assert_pooled(&expected, "", |config, device| {
        let config = HashedEmbeddingBagConfig {
            hash: Some(Hash::from(Mix {
                seed: 42,
                block: 16,
                signed: true,
            })),
            ..config
        };
        HashedEmbeddingBag::new(expected.tensor("hashed_weight", device)?, 1000, 40, config)
    })
}

/// A plain table is a hash without collisions: what torch.nn.EmbeddingBag computes, with all options at once.
#[test]
fn embedding_bag_of_torch() -> Result<()> {
    let expected = Expected::of("embedding_bag")?;
    on_each_device(|device| {
        let table = StateDict::open(path("embedding_bag.pth"))?.take("weight", device)?;
        let tensor = |key| expected.tensor(key, device);
        let (indices, offsets) = (tensor("indices")?, tensor("offsets")?);
        for (name, mode) in MODES.into_iter().chain([("weighted", Mode::Sum)]) {
            let config = HashedEmbeddingBagConfig {
                mode,
                hash: Some(Hash::identity(6)),
                padding_idx: Some(3),
                include_last_offset: true,
                ..Default::default()
            };
            let (layer, error) = HashedEmbeddingBag::fit(&table, 1.0, config)?;
            assert_eq!(error, 0.0);
            let weights = Var::from_tensor(&tensor("per_sample_weights")?)?;
            let (output, grad_weight) = gradient(&layer, &tensor("grad_output")?, |layer| {
                if name == "weighted" {
                    layer.forward_weighted_with_offsets(&indices, &offsets, &weights)
                } else {
                    layer.forward_with_offsets(&indices, &offsets)
                }
            })?;
            expected.assert_is(&output, &format!("{name}.output"));
            expected.assert_is(&grad_weight, &format!("{name}.grad_weight"));
            if name == "weighted" {
                let grads = (layer.forward_weighted_with_offsets(&indices, &offsets, &weights)?
                    * tensor("grad_output")?)?
                .sum_all()?
                .backward()?;
                let grad = grads.get(&weights).unwrap();
                expected.assert_is(grad, "weighted.grad_per_sample_weights");
            }
        }
        Ok(())
    })
}

/// What was imported survives its own checkpoint.
#[test]
fn saved_and_opened_again() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, Device::Cpu);
    let file = folder.path().join("model.safetensors");
    let config = HashedEmbeddingBagConfig {
        first_row: 1234,
        ..Default::default()
    };
    let mut state = StateDict::open(path("robe.pth"))?;
    let layer = state.robe("", 1000, 20, 8, config, &device)?;
    checkpoint::save(&file, [], [("robe", &layer)])?;
    assert_pooled(&Expected::of("robe")?, "", |config, device| {
        let layer = Checkpoint::open(&file)?.hashed_embedding_bag("robe", DType::F32, device)?;
        let config = HashedEmbeddingBagConfig {
            mode: config.mode,
            ..layer.config()
        };
        HashedEmbeddingBag::new(layer.hashed_weight().clone(), 1000, 20, config)
    })?;

    let collection = robe_dlrm("robe_dlrm.pth", Mode::Sum, &device)?;
    checkpoint::save(&file, [], [("", &collection)])?;
    let opened = Checkpoint::open(&file)?;
    let opened = opened.hashed_embedding_bag_collection("", DType::F32, &device)?;
    let indices = Tensor::new(&[[99i64, 6, 999], [0, 0, 0]], &device)?;
    assert_eq!(
        to_vec(&opened.forward(&indices)?)?,
        to_vec(&collection.forward(&indices)?)?
    );
    Ok(())
}

/// Sums that the formulas of LMA give, for three shapes of keys and chunks; they were taken in f64 and rounded to f32.
#[test]
fn lma() -> Result<()> {
    let all = candle_core::safetensors::load(path("semantic.safetensors"), &Device::Cpu)?;
    let numbers: Vec<i64> = all["random_numbers"].to_vec1()?;
    for name in ["a", "b", "c"] {
        let tensor = |key| &all[&format!("{name}.{key}")];
        let numbers_of_case: Vec<i64> = tensor("config").to_vec1()?;
        let [rows, columns, chunk, key_bits, keys, len] =
            std::array::from_fn(|i| numbers_of_case[i] as usize);
        assert_eq!(tensor("hashed_weight").dims(), [len]);
        let config = HashedEmbeddingBagConfig {
            hash: Some(Hash::lma(&numbers, key_bits, keys, chunk)?),
            ..Default::default()
        };
        on_each_device(|device| {
            let layer = HashedEmbeddingBag::with_row_tensor(
                tensor("hashed_weight")
                    .to_device(device)?
                    .to_dtype(DType::F64)?,
                &tensor("signature").to_device(device)?,
                rows,
                columns,
                config,
            )?;
            let indices = tensor("indices").to_device(device)?;
            let output =
                layer.forward_with_offsets(&indices, &tensor("offsets").to_device(device)?)?;
            let output = to_vec(&output.to_dtype(DType::F32)?)?;
            assert!(output == to_vec(tensor("output"))?, "{name}");
            Ok(())
        })?;
    }
    Ok(())
}

/// The table of SCMA from records, and sums of its rows.
#[test]
fn scma() -> Result<()> {
    let all = candle_core::safetensors::load(path("semantic.safetensors"), &Device::Cpu)?;
    let tensor = |key: &str| &all[&format!("scma.{key}")];
    let num_records = tensor("num_records").to_vec1::<i64>()?[0] as usize;
    let mut records = vec![vec![]; num_records];
    for pair in tensor("records").to_vec2::<i64>()? {
        records[pair[1] as usize].push((0, pair[0] as usize));
    }
    let (rows, columns) = tensor("table").dims2()?;
    let records = Records::sample([rows], records, num_records, 0)?;
    let table = records.scma_table(tensor("a"), tensor("a4"))?;
    assert_eq!(table.to_vec2::<i64>()?, tensor("table").to_vec2::<i64>()?);

    let len = tensor("hashed_weight").elem_count();
    let slots = table.flatten_all()?.to_vec1::<i64>()?.into_iter();
    let slots = slots.map(|raw| raw.rem_euclid(len as i64) as u32);
    let slots = Tensor::from_iter(slots, &Device::Cpu)?.reshape((rows, columns))?;
    let config = HashedEmbeddingBagConfig {
        hash: Some(Hash::slot_table(1)),
        ..Default::default()
    };
    on_each_device(|device| {
        let layer = HashedEmbeddingBag::with_row_tensor(
            tensor("hashed_weight").to_device(device)?,
            &slots.to_device(device)?,
            rows,
            columns,
            config,
        )?;
        let output = layer.forward(&tensor("indices").to_device(device)?)?;
        assert_eq!(to_vec(&output)?, to_vec(tensor("output"))?);
        Ok(())
    })
}
