//! Outputs and gradients of the same formulas in NumPy (tests/golden/make.py), read from files.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_hashed_embedding_bag::{Hash, HashedEmbeddingBag, HashedEmbeddingBagConfig, Mode};
use common::{on_each_device, to_vec};
use std::collections::HashMap;

fn golden(name: &str, num_embeddings: usize, embedding_dim: usize, hash: Hash) -> Result<()> {
    let path = format!("tests/golden/{name}.npz");
    let arrays: HashMap<String, Tensor> = Tensor::read_npz(path)?.into_iter().collect();
    on_each_device(|device| {
        for dtype in [DType::F64, DType::F32] {
            let tolerance = if dtype == DType::F64 { 1e-13 } else { 1e-5 };
            let array = |key: &str| arrays[key].to_device(device);
            let weight = Var::from_tensor(&array("hashed_weight")?.to_dtype(dtype)?)?;
            for (key, mode) in [("sum", Mode::Sum), ("mean", Mode::Mean), ("max", Mode::Max)] {
                let config = HashedEmbeddingBagConfig {
                    mode,
                    hash: Some(hash),
                    ..Default::default()
                };
                let weight_tensor = weight.as_tensor().clone();
                let bag =
                    HashedEmbeddingBag::new(weight_tensor, num_embeddings, embedding_dim, config)?;
                let out = bag.forward_with_offsets(&array("indices")?, &array("offsets")?)?;
                let grad_output = array("grad_output")?.to_dtype(dtype)?;
                let grads = (&out * grad_output)?.sum_all()?.backward()?;
                let close = |got: &Tensor, key: String| -> Result<()> {
                    let (got, want) = (to_vec(got)?, to_vec(&arrays[&key])?);
                    assert_eq!(got.len(), want.len());
                    for (i, (got, want)) in got.iter().zip(want).enumerate() {
                        assert!(
                            (got - want).abs() <= tolerance,
                            "{name} {key} {dtype:?} at {i}: got {got}, want {want}"
                        );
                    }
                    Ok(())
                };
                close(&out, format!("{key}.output"))?;
                close(grads.get(&weight).unwrap(), format!("{key}.grad_weight"))?;
            }
        }
        Ok(())
    })
}

#[test]
fn original() -> Result<()> {
    golden("original", 1000, 16, Hash::original())
}

#[test]
fn robe() -> Result<()> {
    let numbers = [2_038_074_743, 634_329_019, 1_825_252_241, 871_205_356];
    golden("robe", 1000, 20, Hash::robe(&numbers, 8)?)
}

#[test]
fn mix() -> Result<()> {
    golden("mix", 1000, 40, Hash::mix(42, 16, true)?)
}
