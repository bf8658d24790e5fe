//! The backward pass by laws that need no oracle: the adjoint identity, finite differences, and that a step of gradient descent
//! lowers the loss. tests/suite/lookup.rs compares gradients with the oracle's.

use crate::common::{
    config, floats, integers, layer, lma, mix, on_each_device, semantic, to_vec, Draws, POOLINGS,
    SIGNED,
};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{Hash, HashedEmbeddingBag, HashedEmbeddingBagConfig, Mode};

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Ragged bags of 40 rows and 12 columns, with an empty bag and padding among them.
struct Setup {
    bag: HashedEmbeddingBag,
    hashed_weight: Var,
    indices: Tensor,
    offsets: Tensor,
    weights: Var,
    grad_output: Tensor,
}

impl Setup {
    fn new(seed: u64, hash: Hash, mode: Mode, dtype: DType, device: &Device) -> Result<Self> {
        let mut draws = Draws::new(seed);
        let rows = draws.rows(20, 40);
        let config = HashedEmbeddingBagConfig {
            padding_idx: Some(rows[4]),
            ..config(mode, hash)
        };
        let mut reals = |n| floats(&draws.reals(n), dtype, device);
        let hashed_weight = Var::from_tensor(&reals(96)?)?;
        Ok(Self {
            bag: layer(&hashed_weight, 40, 12, config)?,
            hashed_weight,
            indices: integers(&rows, DType::I64, device)?,
            offsets: integers(&[0, 3, 3, 11], DType::I64, device)?,
            weights: Var::from_tensor(&reals(20)?)?,
            grad_output: reals(4 * 12)?.reshape((4, 12))?,
        })
    }

    fn forward(&self, weighted: bool) -> Result<Tensor> {
        if weighted {
            self.bag
                .forward_weighted_with_offsets(&self.indices, &self.offsets, &self.weights)
        } else {
            self.bag.forward_with_offsets(&self.indices, &self.offsets)
        }
    }

    /// `<forward, grad_output>`, whose gradient is the backward pass of grad_output.
    fn objective(&self, weighted: bool) -> Result<Tensor> {
        (self.forward(weighted)? * &self.grad_output)?.sum_all()
    }

    /// What the objective depends on.
    fn vars(&self, weighted: bool) -> impl Iterator<Item = &Var> {
        let weights = weighted.then_some(&self.weights);
        std::iter::once(&self.hashed_weight).chain(weights)
    }
}

fn hashes() -> [Hash; 6] {
    [
        Hash::original(),
        mix(5, 4, SIGNED),
        mix(5, 3, SIGNED),
        lma(4, 8, 2),
        semantic(16, 2, 4, SIGNED),
        Hash::slot_table(4),
    ]
}

/// `<f(w), g> = <w, f*(g)>` for every mode, in f64 and in f32. Max too is linear along the ray through w: the largest values
/// stay the largest.
#[test]
fn backward_is_the_adjoint_of_forward() -> Result<()> {
    on_each_device(|device| {
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
            for (seed, hash) in hashes().into_iter().enumerate() {
                for (mode, weighted) in POOLINGS {
                    let setup = Setup::new(seed as u64, hash, mode, dtype, device)?;
                    let grads = setup.objective(weighted)?.backward()?;
                    let forward = dot(
                        &to_vec(&setup.forward(weighted)?)?,
                        &to_vec(&setup.grad_output)?,
                    );
                    for var in setup.vars(weighted) {
                        let grad = grads.get(var).expect("a gradient");
                        let backward = dot(&to_vec(var)?, &to_vec(grad)?);
                        assert!(
                            (forward - backward).abs() <= tolerance * forward.abs().max(1.0),
                            "{hash:?} {mode:?} {dtype:?}: {forward} against {backward}"
                        );
                    }
                }
            }
        }
        Ok(())
    })
}

/// Central differences of every single parameter, in f64.
#[test]
fn gradients_are_the_finite_differences() -> Result<()> {
    on_each_device(|device| {
        for (seed, hash) in hashes().into_iter().enumerate() {
            for (mode, weighted) in POOLINGS {
                let setup = Setup::new(seed as u64 + 9, hash, mode, DType::F64, device)?;
                let grads = setup.objective(weighted)?.backward()?;
                for var in setup.vars(weighted) {
                    let grad = to_vec(grads.get(var).expect("a gradient"))?;
                    let values = to_vec(var)?;
                    // Smaller than the distance of any two values that compete for a maximum.
                    let step = 1e-7;
                    for i in 0..values.len() {
                        let at = |delta: f64| -> Result<f64> {
                            let mut moved = values.clone();
                            moved[i] += delta;
                            var.set(&floats(&moved, DType::F64, device)?)?;
                            setup.objective(weighted)?.to_scalar::<f64>()
                        };
                        let slope = (at(step)? - at(-step)?) / (2.0 * step);
                        assert!(
                            (slope - grad[i]).abs() < 1e-6,
                            "{hash:?} {mode:?} parameter {i}: {slope} against {}",
                            grad[i]
                        );
                    }
                    var.set(&floats(&values, DType::F64, device)?)?;
                }
            }
        }
        Ok(())
    })
}

/// Only variables get gradients, and per-sample weights learn even if hashed_weight is frozen.
#[test]
fn only_variables_get_gradients() -> Result<()> {
    on_each_device(|device| {
        let setup = Setup::new(1, Hash::default_for(12), Mode::Sum, DType::F32, device)?;
        let config = HashedEmbeddingBagConfig {
            padding_idx: setup.bag.config().padding_idx,
            ..Default::default()
        };
        let frozen = layer(&setup.hashed_weight.detach(), 40, 12, config)?;
        let out = frozen.forward_with_offsets(&setup.indices, &setup.offsets)?;
        assert!(!out.track_op());
        let out =
            frozen.forward_weighted_with_offsets(&setup.indices, &setup.offsets, &setup.weights)?;
        let grads = out.sum_all()?.backward()?;
        assert!(grads.get(&setup.hashed_weight).is_none());
        let with_both = setup.forward(true)?.sum_all()?.backward()?;
        assert_eq!(
            to_vec(grads.get(&setup.weights).unwrap())?,
            to_vec(with_both.get(&setup.weights).unwrap())?
        );
        Ok(())
    })
}

/// Two uses of one layer add their gradients, and a step of gradient descent lowers the loss.
#[test]
fn a_step_of_gradient_descent_lowers_the_loss() -> Result<()> {
    on_each_device(|device| {
        let setup = Setup::new(3, Hash::default_for(12), Mode::Sum, DType::F32, device)?;
        let indices = setup.indices.reshape((4, 5))?;
        let loss = || -> Result<Tensor> {
            let twice = (setup.bag.forward(&indices)? + setup.forward(false)?)?;
            (twice - 1.0)?.sqr()?.mean_all()
        };
        let before = loss()?;
        let grads = before.backward()?;
        let grad = grads.get(&setup.hashed_weight).unwrap();
        let stepped = (setup.hashed_weight.as_tensor() - (grad * 0.1)?)?;
        setup.hashed_weight.set(&stepped)?;
        let (before, after) = (before.to_scalar::<f32>()?, loss()?.to_scalar::<f32>()?);
        assert!(after < before, "{after} is not below {before}");
        Ok(())
    })
}
