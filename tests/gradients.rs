//! The backward pass by two laws that need no oracle: the adjoint identity, and finite differences.

mod common;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{Hash, HashedEmbeddingBag, HashedEmbeddingBagConfig, Mix, Mode};
use common::{floats, integers, on_each_device, same_on_any_number_of_threads, to_vec, Draws};

/// Values in (-1, 1) that are no multiples of anything.
fn reals(draws: &mut Draws, n: usize) -> Vec<f64> {
    (0..n)
        .map(|_| draws.below(1 << 20) as f64 / f64::from(1 << 19) - 1.0)
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Ragged bags, an empty one and padding among them, of 40 rows and 12 columns.
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
        let rows: Vec<i64> = (0..20).map(|_| draws.below(40) as i64).collect();
        let config = HashedEmbeddingBagConfig {
            mode,
            hash: Some(hash),
            padding_idx: Some(rows[4]),
            ..Default::default()
        };
        let hashed_weight = Var::from_tensor(&floats(&reals(&mut draws, 96), dtype, device)?)?;
        Ok(Self {
            bag: HashedEmbeddingBag::new(hashed_weight.as_tensor().clone(), 40, 12, config)?,
            hashed_weight,
            indices: integers(&rows, DType::I64, device)?,
            offsets: integers(&[0, 3, 3, 11], DType::I64, device)?,
            weights: Var::from_tensor(&floats(&reals(&mut draws, 20), dtype, device)?)?,
            grad_output: floats(&reals(&mut draws, 4 * 12), dtype, device)?.reshape((4, 12))?,
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

    /// `<forward, grad_output>`, whose gradient is the backward of grad_output.
    fn objective(&self, weighted: bool) -> Result<Tensor> {
        (self.forward(weighted)? * &self.grad_output)?.sum_all()
    }

    /// What the objective depends on.
    fn vars(&self, weighted: bool) -> impl Iterator<Item = &Var> {
        let weights = weighted.then_some(&self.weights);
        std::iter::once(&self.hashed_weight).chain(weights)
    }
}

/// Every mode, and whether the rows are weighted.
const MODES: [(Mode, bool); 4] = [
    (Mode::Sum, false),
    (Mode::Sum, true),
    (Mode::Mean, false),
    (Mode::Max, false),
];

fn hashes() -> [Hash; 3] {
    [
        Hash::original(),
        Hash::from(Mix {
            seed: 5,
            block: 4,
            signed: true,
        }),
        Hash::from(Mix {
            seed: 5,
            block: 3,
            signed: true,
        }),
    ]
}

/// `<f(w), g> = <w, f*(g)>` for every mode that is linear in the weights, in f64 and in f32.
#[test]
fn backward_is_the_adjoint_of_forward() -> Result<()> {
    on_each_device(|device| {
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
            for (seed, hash) in hashes().into_iter().enumerate() {
                // Max too is linear along the ray through w: its winners stay.
                for (mode, weighted) in MODES {
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
            for (mode, weighted) in MODES {
                let setup = Setup::new(seed as u64 + 9, hash, mode, DType::F64, device)?;
                let grads = setup.objective(weighted)?.backward()?;
                for var in setup.vars(weighted) {
                    let grad = to_vec(grads.get(var).expect("a gradient"))?;
                    let values = to_vec(var)?;
                    // Smaller than any distance between two values that compete in a maximum.
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

/// Only what is tracked gets a gradient, and a frozen hashed_weight still lets the sample weights learn.
#[test]
fn only_variables_get_gradients() -> Result<()> {
    on_each_device(|device| {
        let setup = Setup::new(1, Hash::default_for(12), Mode::Sum, DType::F32, device)?;
        let config = HashedEmbeddingBagConfig {
            padding_idx: setup.bag.config().padding_idx,
            ..Default::default()
        };
        let frozen = HashedEmbeddingBag::new(setup.hashed_weight.detach(), 40, 12, config)?;
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

/// Two uses of one layer add their gradients; a step of gradient descent lowers the loss.
#[test]
fn trains() -> Result<()> {
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

/// More values than one thread takes: the same bits from 1, 2 and 5 threads, and what a few bags at a time give. With few
/// slots, where threads add into buffers of their own, and with many, where they own slices; for blocks that end with a slice,
/// and for blocks that straddle two.
#[test]
fn cpu_results_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let test = "cpu_results_do_not_depend_on_the_number_of_threads";
    same_on_any_number_of_threads(test, |report| {
        let (device, mut draws) = (Device::Cpu, Draws::new(8));
        let robe = [2_038_074_743, 634_329_019, 1_825_252_241, 871_205_356];
        let hashes = [
            Hash::default_for(32),
            Hash::original(),
            Hash::robe(&robe, 8)?,
            Hash::affine(871_205_356, 3_333, 7, u64::MAX, 3),
        ];
        let (num_bags, bag_len, step) = (5_200, 2, 650);
        let rows: Vec<i64> = (0..num_bags * bag_len)
            .map(|_| draws.below(5_000) as i64)
            .collect();
        let indices = integers(&rows, DType::U32, &device)?.reshape((num_bags, bag_len))?;
        for (len, embedding_dim) in [(1_600, 32), (90_000, 32), (90_000, 33)] {
            let weight = Var::from_tensor(&floats(&reals(&mut draws, len), DType::F32, &device)?)?;
            for hash in hashes {
                for mode in [Mode::Sum, Mode::Mean, Mode::Max] {
                    let config = HashedEmbeddingBagConfig {
                        mode,
                        hash: Some(hash),
                        ..Default::default()
                    };
                    let tensor = weight.as_tensor().clone();
                    let bag = HashedEmbeddingBag::new(tensor, 5_000, embedding_dim, config)?;
                    let run = |indices: &Tensor| -> Result<(Vec<f64>, Vec<f64>)> {
                        let out = bag.forward(indices)?;
                        let grads = out.sqr()?.sum_all()?.backward()?;
                        Ok((to_vec(&out)?, to_vec(grads.get(&weight).unwrap())?))
                    };
                    let want = run(&indices)?;
                    report(&want.0);
                    report(&want.1);
                    // So many bags are too little to divide.
                    let mut grad_weight = vec![0.0; len];
                    for i in (0..num_bags).step_by(step) {
                        let (out, grad) = run(&indices.narrow(0, i, step)?)?;
                        assert_eq!(out, want.0[i * embedding_dim..(i + step) * embedding_dim]);
                        grad_weight
                            .iter_mut()
                            .zip(grad)
                            .for_each(|(sum, x)| *sum += x);
                    }
                    for (slot, (got, want)) in grad_weight.iter().zip(&want.1).enumerate() {
                        let close = (got - want).abs() <= 1e-3 * want.abs().max(1.0);
                        assert!(close, "{hash:?} {mode:?} {len} slot {slot}: {got}, {want}");
                    }
                }
            }
        }
        Ok(())
    })
}
