//! Sparse gradients: the same values as candle's dense ones, and the same steps of optimisers, without a tensor.

use crate::common::{
    affine, assert_equal, config, every_hash, floats, integers, layer, message, mix,
    on_each_device, same_on_any_number_of_threads, to_vec, whole_blocks, Draws, MODES, POOLINGS,
    SIGNED,
};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::optim::{
    Adagrad, AdamW, InPlace, Params, ParamsAdagrad, ParamsAdamW, ParamsSgd, ParamsSparseAdam, Sgd,
    SparseAdam,
};
use candle_hashed_embedding_bag::{
    hashed_embedding, hashed_embedding_bag, Gradient, Hash, HashedEmbeddingBag,
    HashedEmbeddingBagCollection, HashedEmbeddingBagConfig, HashedEmbeddingConfig, JaggedLayout,
    Mode,
};
use candle_nn::{Optimizer, VarBuilder, VarMap, SGD};

/// A layer with a dense gradient and one with a sparse gradient, on equal variables.
struct Pair {
    vars: [Var; 2],
    layers: [HashedEmbeddingBag; 2],
}

impl Pair {
    fn new(
        values: &Tensor,
        num_embeddings: usize,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
    ) -> Result<Self> {
        let vars = [Var::from_tensor(values)?, Var::from_tensor(values)?];
        let layer = |var: &Var, sparse| {
            let config = HashedEmbeddingBagConfig { sparse, ..config };
            layer(var, num_embeddings, embedding_dim, config)
        };
        let layers = [layer(&vars[0], false)?, layer(&vars[1], true)?];
        Ok(Self { vars, layers })
    }

    /// The gradients of `loss` for either layer, as f64.
    fn gradients(
        &self,
        loss: impl Fn(&HashedEmbeddingBag) -> Result<Tensor>,
    ) -> Result<[Tensor; 2]> {
        let dense = loss(&self.layers[0])?.backward()?;
        let none = loss(&self.layers[1])?.backward()?;
        assert!(none.get(&self.vars[1]).is_none());
        let dense = dense.get(&self.vars[0]).expect("a gradient").clone();
        Ok([dense, sparse_gradient(&self.layers[1])?])
    }
}

fn sparse_gradient(layer: &HashedEmbeddingBag) -> Result<Tensor> {
    let gradient = layer.sparse_gradient().expect("a sparse gradient");
    gradient.to_tensor()
}

/// Sums on CUDA are the same bits in every run if they are deterministic.
fn deterministic(mode: Mode, hash: Hash) -> HashedEmbeddingBagConfig {
    HashedEmbeddingBagConfig {
        gradient: Gradient::Deterministic,
        ..config(mode, hash)
    }
}

/// Bit for bit in every mode and form of bags, for every hash; with blocks that are cut off, padding and an empty bag.
#[test]
fn the_values_are_those_of_the_dense_gradient() -> Result<()> {
    on_each_device(|device| {
        let mut draws = Draws::new(4);
        let rows = draws.rows(60, 40);
        let indices = integers(&rows, DType::I64, device)?;
        let offsets = integers(&[0, 7, 7, 20], DType::I64, device)?;
        for (dtype, hash) in every_hash()
            .into_iter()
            .flat_map(|hash| [DType::F32, DType::F64].map(|dtype| (dtype, hash)))
        {
            for (embedding_dim, (mode, weighted)) in [20, 32]
                .into_iter()
                .flat_map(|dim| POOLINGS.map(|pooling| (dim, pooling)))
            {
                if hash.check_len(whole_blocks(&hash, 900)).is_err() {
                    continue;
                }
                let len = whole_blocks(&hash, 900);
                let values = floats(&draws.reals(len), dtype, device)?;
                let weights = floats(&draws.reals(60), dtype, device)?;
                let out = floats(&draws.reals(12 * embedding_dim), dtype, device)?;
                let config = HashedEmbeddingBagConfig {
                    padding_idx: Some(rows[9]),
                    ..deterministic(mode, hash)
                };
                let Ok(pair) = Pair::new(&values, 40, embedding_dim, config) else {
                    // A hash that is not made for rows of this length.
                    continue;
                };
                let [dense, sparse] = pair.gradients(|layer| {
                    let (fixed, ragged) = if weighted {
                        let fixed = indices.reshape((12, 5))?;
                        (
                            layer.forward_weighted(&fixed, &weights.reshape((12, 5))?)?,
                            layer.forward_weighted_with_offsets(&indices, &offsets, &weights)?,
                        )
                    } else {
                        (
                            layer.forward(&indices.reshape((12, 5))?)?,
                            layer.forward_with_offsets(&indices, &offsets)?,
                        )
                    };
                    let out = out.reshape((12, embedding_dim))?;
                    (fixed * &out)?.sum_all()? + (ragged * out.narrow(0, 0, 4)?)?.sum_all()?
                })?;
                // Two lookups: candle adds their tensors, and here both are added to one buffer.
                assert_equal(
                    &sparse,
                    &dense.to_device(&Device::Cpu)?,
                    8.0,
                    &format!("{hash:?} {mode:?} weighted {weighted} {embedding_dim} {dtype:?}"),
                );
            }
        }
        Ok(())
    })
}

/// Steps of both kinds, with more values than one thread takes.
struct Steps<'a> {
    device: &'a Device,
    dtype: DType,
    len: usize,
    hash: Hash,
    mode: Mode,
}

impl Steps<'_> {
    fn assert_same<P: Params>(&self, params: P, what: &str) -> Result<()> {
        let Self {
            device, dtype, len, ..
        } = *self;
        let mut draws = Draws::new(77);
        let values = floats(&draws.reals(len), dtype, device)?;
        let pair = Pair::new(&values, 5_000, 32, deterministic(self.mode, self.hash))?;
        let [mut dense, mut sparse] = [0, 1].map(|i| {
            InPlace::new(vec![pair.vars[i].clone()], params.clone()).expect("an optimiser")
        });
        for step in 0..4 {
            // Fewer rows from step to step, so that touched slots are left alone again.
            let num_bags = 1_600 >> (3 * step);
            let rows = draws.rows(num_bags * 3, 5_000);
            let indices = integers(&rows, DType::U32, device)?.reshape((num_bags, 3))?;
            let grads = pair.layers[0].forward(&indices)?.sqr()?.sum_all()?;
            dense.step(&grads.backward()?)?;
            sparse.backward_step(&pair.layers[1].forward(&indices)?.sqr()?.sum_all()?)?;
            let [want, got] = [0, 1].map(|i| to_vec(&pair.vars[i]).unwrap());
            assert!(want == got, "{what}, {dtype:?}, {len} slots, step {step}");
            let left = to_vec(&sparse_gradient(&pair.layers[1])?)?;
            assert!(left.iter().all(|&x| x == 0.0), "{what}: not used up");
        }
        for ((name, want), (_, got)) in dense.state()?.into_iter().zip(sparse.state()?) {
            assert_eq!(to_vec(&want)?, to_vec(&got)?, "{what}: {name}");
        }
        Ok(())
    }
}

fn adagrad() -> ParamsAdagrad {
    ParamsAdagrad {
        lr: 0.05,
        lr_decay: 0.1,
        initial_accumulator_value: 0.1,
        ..Default::default()
    }
}

fn sgd() -> ParamsSgd {
    ParamsSgd {
        lr: 0.01,
        ..Default::default()
    }
}

#[test]
fn steps_are_bit_for_bit_those_of_the_dense_gradient() -> Result<()> {
    on_each_device(|device| {
        for (len, hash) in [
            (1_600, Hash::default_for(32)),
            (90_000, Hash::default_for(32)),
            (90_000, Hash::original()),
            (90_001, affine(871_205_356, 3_333, 7, u64::MAX, 3)),
            (90_000, mix(3, 6, SIGNED)),
        ] {
            for mode in MODES {
                for dtype in [DType::F32, DType::F64] {
                    let steps = Steps {
                        device,
                        dtype,
                        len,
                        hash,
                        mode,
                    };
                    steps.assert_same(sgd(), "sgd")?;
                    steps.assert_same(adagrad(), "adagrad")?;
                    steps.assert_same(ParamsSparseAdam::default(), "sparse adam")?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn steps_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let test = "sparse::steps_do_not_depend_on_the_number_of_threads";
    same_on_any_number_of_threads(test, |report| {
        let (device, mut draws) = (&Device::Cpu, Draws::new(3));
        for len in [1_600, 90_000] {
            for mode in MODES {
                let var = Var::from_tensor(&floats(&draws.reals(len), DType::F32, device)?)?;
                let config = HashedEmbeddingBagConfig {
                    sparse: true,
                    ..config(mode, Hash::default_for(32))
                };
                let layer = layer(&var, 5_000, 32, config)?;
                let mut optimizer = Adagrad::new(vec![var.clone()], adagrad())?;
                for num_bags in [9_000, 500, 10] {
                    let rows = draws.rows(num_bags * 2, 5_000);
                    let indices = integers(&rows, DType::U32, device)?.reshape((num_bags, 2))?;
                    optimizer.backward_step(&layer.forward(&indices)?.sqr()?.sum_all()?)?;
                }
                report(&to_vec(&var)?);
            }
        }
        Ok(())
    })
}

/// Several backward passes before a step are one gradient, as `optimizer.zero_grad()` left out is in torch.
#[test]
fn backward_passes_add_up_until_a_step() -> Result<()> {
    on_each_device(|device| {
        let values = floats(&Draws::new(1).halves(64), DType::F32, device)?;
        let pair = Pair::new(&values, 50, 8, deterministic(Mode::Sum, Hash::balanced(8)))?;
        let first = Tensor::new(&[[1u32, 2], [3, 4]], device)?;
        let second = Tensor::new(&[[4u32, 9]], device)?;
        let [want, one] = pair.gradients(|layer| layer.forward(&first)?.sum_all())?;
        assert_eq!(to_vec(&want)?, to_vec(&one)?);
        let [more, both] = pair.gradients(|layer| layer.forward(&second)?.sum_all())?;
        assert_eq!(to_vec(&(want + more)?)?, to_vec(&both)?);

        let gradient = pair.layers[1].sparse_gradient().expect("a gradient");
        gradient.clear()?;
        assert!(to_vec(&gradient.to_tensor()?)?.iter().all(|&x| x == 0.0));
        // Nothing is left to be used up.
        let before = to_vec(&pair.vars[1])?;
        let empty = Tensor::zeros((), DType::F32, device)?.backward()?;
        let mut optimizer = Sgd::new(vec![pair.vars[1].clone()], sgd())?;
        optimizer.step(&empty)?;
        assert_eq!(to_vec(&pair.vars[1])?, before);
        assert!(optimizer.state()?.is_empty());
        Ok(())
    })
}

/// Tables of a collection, copies of layers and layers made apart: one variable has one gradient.
#[test]
fn layers_on_one_variable_share_its_gradient() -> Result<()> {
    on_each_device(|device| {
        let mut draws = Draws::new(2);
        let var = Var::from_tensor(&floats(&draws.reals(96), DType::F32, device)?)?;
        let config = HashedEmbeddingBagConfig {
            sparse: true,
            ..deterministic(Mode::Sum, Hash::balanced(8))
        };
        let tables = [("user", 10), ("movie", 30)];
        let collection =
            HashedEmbeddingBagCollection::new(var.as_tensor().clone(), tables, 8, config)?;
        let pairs = Tensor::new(&[[1u32, 2], [9, 19]], device)?;
        let movies = Tensor::new(&[[2u32], [19]], device)?;
        let movie = collection.table("movie")?;
        let again = layer(&var, 40, 8, config)?.with_bounds_check(Default::default());
        let loss = |dense: bool| -> Result<Tensor> {
            let with = |layer: &HashedEmbeddingBag| layer.with_sparse(!dense);
            let all = with(&again)?.forward(&pairs)?;
            let movie = with(&movie)?.forward(&movies)?;
            let collection = collection.with_sparse(!dense)?;
            let jagged = collection.forward_jagged(
                &Tensor::new(&[1u32, 9, 2], device)?,
                &Tensor::new(&[0u32, 1, 2, 3], device)?,
                JaggedLayout::FeatureMajor,
            )?;
            let parts = [all.sum_all()?, movie.sqr()?.sum_all()?, jagged.sum_all()?];
            Tensor::stack(&parts, 0)?.sum_all()
        };
        let want = loss(true)?.backward()?;
        let none = loss(false)?.backward()?;
        assert!(none.get(&var).is_none());
        let got = sparse_gradient(&movie)?;
        assert_equal(
            &got,
            &want.get(&var).unwrap().to_device(&Device::Cpu)?,
            8.0,
            "the sum",
        );

        // A weight that is also used otherwise has a gradient of either kind, and a step uses both.
        let plain = (var.as_tensor().sqr()? * 0.5)?.sum_all()?;
        let both = (loss(true)? + &plain)?.backward()?;
        let want = (var.as_tensor() - (both.get(&var).unwrap() * 0.01)?)?.detach();
        movie.sparse_gradient().expect("a gradient").clear()?;
        let mut optimizer = Sgd::new(vec![var.clone()], sgd())?;
        optimizer.backward_step(&(loss(false)? + plain)?)?;
        assert_equal(&var, &want.to_device(&Device::Cpu)?, 8.0, "a step");
        assert!(to_vec(&sparse_gradient(&movie)?)?.iter().all(|&x| x == 0.0));
        Ok(())
    })
}

/// f16 and bf16 parameters: the gradient stays in f32 until the step.
#[test]
fn f16_and_bf16_are_not_rounded_before_the_step() -> Result<()> {
    on_each_device(|device| {
        for dtype in [DType::F16, DType::BF16] {
            let mut draws = Draws::new(5);
            let half = floats(&draws.reals(320), dtype, device)?;
            let config = HashedEmbeddingBagConfig {
                sparse: true,
                ..deterministic(Mode::Sum, Hash::balanced(16))
            };
            let (var, wide) = (
                Var::from_tensor(&half)?,
                Var::from_tensor(&half.to_dtype(DType::F32)?)?,
            );
            let indices = integers(&draws.rows(600, 90), DType::U32, device)?.reshape((300, 2))?;
            for (var, name) in [(&var, "half"), (&wide, "wide")] {
                let layer = layer(var, 90, 16, config)?;
                let mut optimizer = Adagrad::new(vec![var.clone()], adagrad())?;
                optimizer.backward_step(&layer.forward(&indices)?.sum_all()?)?;
                assert_eq!(sparse_gradient(&layer)?.dtype(), DType::F32, "{name}");
            }
            let want = wide.to_dtype(dtype)?;
            assert_eq!(to_vec(&var)?, to_vec(&want)?);
        }
        Ok(())
    })
}

/// Golden files: torch.optim.SparseAdam (tests/golden/make.py).
#[test]
fn sparse_adam_is_torchs() -> Result<()> {
    let load = |name: &str| {
        let path = format!("tests/golden/{name}.expected.safetensors");
        candle_core::safetensors::load(path, &Device::Cpu)
    };
    let (inputs, want) = (load("optimizers")?, load("sparse_adam")?);
    on_each_device(|device| {
        for (dtype, ulps) in [("f32", 4.0), ("f64", 8.0)] {
            for name in ["always", "sometimes"] {
                let key = format!("{dtype}.{name}");
                let var = Var::from_tensor(&inputs[&key].to_device(device)?)?;
                let params = ParamsSparseAdam {
                    lr: 0.03,
                    beta1: 0.8,
                    beta2: 0.95,
                    eps: 1e-3,
                };
                let mut optimizer = SparseAdam::new(vec![var.clone()], params)?;
                for step in 0..20 {
                    let grad = inputs[&format!("{key}.grads")].get(step)?;
                    let grad = grad.abs()?.ge(0.5)?.to_dtype(grad.dtype())?.mul(&grad)?;
                    let mut grads = Tensor::zeros((), DType::F32, &Device::Cpu)?.backward()?;
                    grads.insert(&var, grad.to_device(device)?);
                    optimizer.step(&grads)?;
                    let what = format!("{key} after step {step}");
                    assert_equal(&var, &want[&key].get(step)?, ulps, &what);
                }
            }
        }
        Ok(())
    })
}

#[test]
fn optimisers_that_change_every_value_refuse_it() -> Result<()> {
    let device = &Device::Cpu;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let config = HashedEmbeddingBagConfig {
        sparse: true,
        ..Default::default()
    };
    let layer = hashed_embedding_bag(100, 8, 0.5, config, vb)?;
    let before = to_vec(layer.hashed_weight())?;
    let ids = Tensor::new(&[[1u32, 2]], device)?;
    let loss = || layer.forward(&ids)?.sqr()?.sum_all();
    let refused = |result: Result<()>, want: &str| -> Result<()> {
        let got = message(result);
        assert!(got.contains(want), "{got}");
        assert_eq!(to_vec(layer.hashed_weight())?, before);
        Ok(())
    };
    refused(
        AdamW::from_varmap(&vars, ParamsAdamW::default())?.backward_step(&loss()?),
        "adamw: a sparse gradient cannot be used, because every step changes all values",
    )?;
    let params = ParamsAdagrad {
        weight_decay: 0.1,
        ..Default::default()
    };
    refused(
        Adagrad::from_varmap(&vars, params)?.backward_step(&loss()?),
        "adagrad: a sparse gradient cannot be used with weight decay",
    )?;
    let params = ParamsSgd {
        momentum: 0.1,
        ..Default::default()
    };
    refused(
        Sgd::from_varmap(&vars, params)?.backward_step(&loss()?),
        "sgd: a sparse gradient cannot be used with momentum",
    )?;
    // candle's own finds no gradient, as the documentation of `sparse` says.
    SGD::new(vars.all_vars(), 0.1)?.backward_step(&loss()?)?;
    assert_eq!(to_vec(layer.hashed_weight())?, before);
    // The gradients of all these backward passes are still there.
    let gradient = layer.sparse_gradient().expect("a gradient").to_tensor()?;
    let one = loss()?.backward();
    assert!(one?.get(layer.hashed_weight()).is_none());
    assert!(to_vec(&gradient)?.iter().any(|&x| x != 0.0));
    Ok(())
}

#[test]
fn only_variables_have_a_sparse_gradient() -> Result<()> {
    let device = &Device::Cpu;
    let var = Var::from_tensor(&Tensor::ones(64, DType::F32, device)?)?;
    let config = HashedEmbeddingConfig {
        sparse: true,
        ..Default::default()
    };
    let frozen = layer(&var.as_detached_tensor(), 50, 8, config.into())?;
    assert!(frozen.sparse_gradient().is_none());
    assert!(frozen.config().sparse);
    let got = message(layer(&var.affine(2.0, 0.0)?, 50, 8, config.into()));
    assert!(
        got.contains("a sparse gradient needs a hashed_weight that is a variable itself"),
        "{got}"
    );
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let rows = hashed_embedding(100, 8, 0.5, config, vb)?;
    assert!(rows.config().sparse && rows.bag().sparse_gradient().is_some());
    assert!(rows.with_sparse(false)?.bag().sparse_gradient().is_none());
    Ok(())
}

/// What nobody can use up any more is gone.
#[test]
fn a_gradient_ends_with_the_last_layer() -> Result<()> {
    let device = &Device::Cpu;
    let var = Var::from_tensor(&Tensor::ones(64, DType::F32, device)?)?;
    let config = HashedEmbeddingBagConfig {
        sparse: true,
        ..Default::default()
    };
    let ids = Tensor::new(&[[1u32, 2]], device)?;
    let first = layer(&var, 50, 8, config)?;
    first.forward(&ids)?.sum_all()?.backward()?;
    let copy = first.clone();
    drop(first);
    assert!(to_vec(&sparse_gradient(&copy)?)?.iter().any(|&x| x != 0.0));
    drop(copy);
    let second = layer(&var, 50, 8, config)?;
    assert!(to_vec(&sparse_gradient(&second)?)?
        .iter()
        .all(|&x| x == 0.0));
    Ok(())
}
