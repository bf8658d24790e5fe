//! The optimisers: equal to candle-nn's and torch's, resumed bit for bit, the same on every device and number of threads.

use crate::common::{
    assert_equal, cuda, floats, message, on_each_device, same_on_any_number_of_threads, to_vec,
    Draws,
};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::hashed_embedding_bag;
use candle_hashed_embedding_bag::optim::{
    Adagrad, AdamW, InPlace, Params, ParamsAdagrad, ParamsAdamW, ParamsSgd, Sgd,
};
use candle_nn::{Optimizer, VarBuilder, VarMap};
use std::collections::HashMap;

/// Values between -1 and 1.
fn uniform(draws: &mut Draws, n: usize) -> Vec<f64> {
    let steps = 1 << 20;
    let uniform = |_| draws.below(2 * steps + 1) as f64 / steps as f64 - 1.0;
    (0..n).map(uniform).collect()
}

/// A variable of random values, the same on every device and, but for rounding, in every dtype.
fn variable(seed: u64, n: usize, dtype: DType, device: &Device) -> Result<Var> {
    Var::from_tensor(&floats(&uniform(&mut Draws::new(seed), n), dtype, device)?)
}

/// These gradients.
fn gradients(pairs: &[(&Var, &Tensor)]) -> Result<GradStore> {
    let mut grads = Tensor::zeros((), DType::F32, &Device::Cpu)?.backward()?;
    for (var, grad) in pairs {
        grads.insert(var, (*grad).clone());
    }
    Ok(grads)
}

/// Random gradients of a variable, step by step.
fn random_gradients(var: &Var, steps: usize) -> Result<Vec<Tensor>> {
    let mut draws = Draws::new(99);
    (0..steps)
        .map(|_| {
            floats(
                &uniform(&mut draws, var.elem_count()),
                var.dtype(),
                var.device(),
            )
        })
        .collect()
}

fn assert_same_bits(got: &Tensor, want: &Tensor, what: &str) -> Result<()> {
    assert_eq!(
        (got.dims(), got.dtype()),
        (want.dims(), want.dtype()),
        "{what}"
    );
    let bits = |tensor| -> Result<Vec<u64>> {
        Ok(to_vec(tensor)?.into_iter().map(f64::to_bits).collect())
    };
    assert!(
        bits(got)? == bits(want)?,
        "{what}\n  got {got}\n want {want}"
    );
    Ok(())
}

/// One of each kind, with everything on.
fn adagrad() -> ParamsAdagrad {
    ParamsAdagrad {
        lr: 0.2,
        lr_decay: 0.1,
        weight_decay: 0.3,
        initial_accumulator_value: 0.5,
        eps: 1e-3,
    }
}

fn adamw() -> ParamsAdamW {
    ParamsAdamW {
        lr: 0.03,
        beta1: 0.8,
        beta2: 0.95,
        eps: 1e-3,
        weight_decay: 0.2,
    }
}

fn sgd() -> ParamsSgd {
    ParamsSgd {
        lr: 0.1,
        weight_decay: 0.2,
        ..Default::default()
    }
}

fn momentum() -> ParamsSgd {
    ParamsSgd {
        lr: 0.05,
        momentum: 0.8,
        dampening: 0.4,
        weight_decay: 0.1,
        nesterov: false,
    }
}

fn nesterov() -> ParamsSgd {
    ParamsSgd {
        lr: 0.05,
        momentum: 0.7,
        weight_decay: 0.1,
        nesterov: true,
        ..Default::default()
    }
}

/// What a test does with one optimiser.
trait Body {
    fn run<P: Params>(&self, name: &str, params: P) -> Result<()>;
}

fn for_each_optimizer(body: impl Body) -> Result<()> {
    body.run("adamw", adamw())?;
    body.run("adagrad", adagrad())?;
    body.run("sgd", sgd())?;
    body.run("momentum", momentum())?;
    body.run("nesterov", nesterov())
}

#[test]
fn adamw_is_candle_nns_over_100_steps() -> Result<()> {
    on_each_device(|device| {
        // Whole vectors, a vector and a tail, several threads and a tail.
        for n in [1, 16, 100_003] {
            for (dtype, ulps) in [(DType::F32, 32.0), (DType::F64, 64.0)] {
                let params = || ParamsAdamW {
                    lr: 0.01,
                    weight_decay: 0.1,
                    ..Default::default()
                };
                let (ours, theirs) = (
                    variable(1, n, dtype, device)?,
                    variable(1, n, dtype, device)?,
                );
                let mut our = AdamW::new(vec![ours.clone()], params())?;
                let mut their = candle_nn::AdamW::new(vec![theirs.clone()], params())?;
                for grad in random_gradients(&ours, 100)? {
                    our.step(&gradients(&[(&ours, &grad)])?)?;
                    their.step(&gradients(&[(&theirs, &grad)])?)?;
                }
                assert_equal(&ours, &theirs, ulps, &format!("{n} values of {dtype:?}"));
            }
        }
        Ok(())
    })
}

#[test]
fn defaults_are_torchs() {
    let ParamsAdamW {
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
    } = ParamsAdamW::default();
    assert_eq!(
        [lr, beta1, beta2, eps, weight_decay],
        [1e-3, 0.9, 0.999, 1e-8, 1e-2]
    );
    let zeros = ParamsAdagrad {
        lr: 1e-2,
        lr_decay: 0.0,
        weight_decay: 0.0,
        initial_accumulator_value: 0.0,
        eps: 1e-10,
    };
    assert_eq!(ParamsAdagrad::default(), zeros);
    let plain = ParamsSgd {
        lr: 1e-3,
        momentum: 0.0,
        dampening: 0.0,
        weight_decay: 0.0,
        nesterov: false,
    };
    assert_eq!(ParamsSgd::default(), plain);
}

/// Golden files: what torch.optim makes of two parameters, one of which has no gradient in most steps, while the learning rate
/// is halved (tests/golden/make.py).
#[test]
fn every_step_is_torchs() -> Result<()> {
    struct Golden<'a>(&'a HashMap<String, Tensor>, &'a Device);
    impl Body for Golden<'_> {
        fn run<P: Params>(&self, optimizer: &str, params: P) -> Result<()> {
            let Self(golden, device) = *self;
            for (dtype, ulps) in [("f32", 4.0), ("f64", 8.0)] {
                let tensor = |key: &str| golden[&format!("{dtype}.{key}")].to_device(device);
                let names = ["always", "sometimes"];
                let vars = names.map(|name| Var::from_tensor(&tensor(name).unwrap()).unwrap());
                let mut ours =
                    InPlace::with_names(names.into_iter().zip(vars.clone()), params.clone())?;
                for step in 0..20 {
                    let grads = names
                        .map(|name| tensor(&format!("{name}.grads")).unwrap().get(step).unwrap());
                    match step % 3 {
                        1 => {
                            ours.step(&gradients(&[(&vars[0], &grads[0]), (&vars[1], &grads[1])])?)?
                        }
                        _ => ours.step(&gradients(&[(&vars[0], &grads[0])])?)?,
                    }
                    if step == 9 {
                        ours.set_learning_rate(ours.learning_rate() / 2.0);
                    }
                    for (name, var) in names.iter().zip(&vars) {
                        let want = tensor(&format!("{optimizer}.{name}"))?.get(step)?;
                        let what = format!("{dtype} {optimizer}: {name} after step {step}");
                        assert_equal(var, &want.to_device(&Device::Cpu)?, ulps, &what);
                    }
                }
            }
            Ok(())
        }
    }
    let golden = candle_core::safetensors::load(
        "tests/golden/optimizers.expected.safetensors",
        &Device::Cpu,
    )?;
    on_each_device(|device| for_each_optimizer(Golden(&golden, device)))
}

/// f16 and bf16 are widened, updated in f32 and rounded once per step; state is f32 and never rounded.
#[test]
fn f16_and_bf16_are_updated_in_f32() -> Result<()> {
    struct Halves<'a>(&'a Device);
    impl Body for Halves<'_> {
        fn run<P: Params>(&self, name: &str, params: P) -> Result<()> {
            for dtype in [DType::F16, DType::BF16] {
                for n in [5, 3_000] {
                    let half = variable(3, n, dtype, self.0)?;
                    let full = Var::from_tensor(&half.to_dtype(DType::F32)?)?;
                    let mut optimizer = InPlace::new(vec![half.clone()], params.clone())?;
                    let mut reference = InPlace::new(vec![full.clone()], params.clone())?;
                    for grad in random_gradients(&half, 10)? {
                        optimizer.step(&gradients(&[(&half, &grad)])?)?;
                        let grad = grad.to_dtype(DType::F32)?;
                        reference.step(&gradients(&[(&full, &grad)])?)?;
                        full.set(&full.to_dtype(dtype)?.to_dtype(DType::F32)?)?;
                    }
                    let what = format!("{name}, {n} values of {dtype:?}");
                    assert_same_bits(&half, &full.to_dtype(dtype)?, &what)?;
                    for ((key, got), (_, want)) in optimizer.state()?.iter().zip(reference.state()?)
                    {
                        assert_same_bits(got, &want, &format!("{key} of {what}"))?;
                    }
                }
            }
            Ok(())
        }
    }
    on_each_device(|device| for_each_optimizer(Halves(device)))
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one() -> Result<()> {
    struct Resumed<'a>(&'a Device);
    impl Body for Resumed<'_> {
        fn run<P: Params>(&self, name: &str, params: P) -> Result<()> {
            let device = self.0;
            for dtype in [DType::F32, DType::F64, DType::BF16] {
                let vars = || -> Result<[(&str, Var); 3]> {
                    let shaped = variable(1, 60, dtype, device)?.reshape((3, 4, 5))?;
                    Ok([
                        ("table", variable(2, 1_000, dtype, device)?),
                        ("head.weight", Var::from_tensor(&shaped)?),
                        ("head.unused", variable(3, 7, dtype, device)?),
                    ])
                };
                let run = |vars: &[(&str, Var); 3],
                           optimizer: &mut InPlace<P>,
                           steps: std::ops::Range<usize>| {
                    let [(_, table), (_, head), _] = vars;
                    let grads = random_gradients(table, steps.end)?;
                    for grad in &grads[steps] {
                        let head_grad = grad.narrow(0, 0, 60)?.reshape((3, 4, 5))?;
                        optimizer.step(&gradients(&[(table, grad), (head, &head_grad)])?)?;
                    }
                    Ok::<_, candle_core::Error>(())
                };
                let whole = vars()?;
                let mut optimizer = InPlace::with_names(whole.clone(), params.clone())?;
                run(&whole, &mut optimizer, 0..12)?;

                let part = vars()?;
                let mut stopped = InPlace::with_names(part.clone(), params.clone())?;
                run(&part, &mut stopped, 0..5)?;
                let folder = tempfile::tempdir()?;
                let path = folder.path().join("state.safetensors");
                let state: HashMap<_, _> = stopped.state()?.into_iter().collect();
                assert!(!state.keys().any(|key| key.starts_with("head.unused")));
                candle_core::safetensors::save(&state, &path)?;
                // What was handed out is a copy.
                run(&part, &mut stopped, 5..6)?;
                assert_eq!(state["table.step"].to_scalar::<i64>()?, 5);

                let rest = vars()?;
                let mut other = InPlace::with_names(rest.clone(), params.clone())?;
                run(&rest, &mut other, 0..5)?;
                let mut resumed = InPlace::with_names(rest.clone(), params.clone())?;
                resumed.load_state(candle_core::safetensors::load(&path, &Device::Cpu)?)?;
                run(&rest, &mut resumed, 5..12)?;

                for ((key, got), (_, want)) in rest.iter().zip(&whole) {
                    assert_same_bits(got, want, &format!("{name} {dtype:?} {key}"))?;
                }
                let (got, want) = (resumed.state()?, optimizer.state()?);
                assert_eq!(got.len(), want.len());
                for ((got_key, got), (want_key, want)) in got.iter().zip(&want) {
                    assert_eq!(got_key, want_key);
                    assert_same_bits(got, want, &format!("{name} {dtype:?} {got_key}"))?;
                }
            }
            Ok(())
        }
    }
    on_each_device(|device| for_each_optimizer(Resumed(device)))
}

#[test]
fn state_is_named_by_parameter_and_in_its_shape() -> Result<()> {
    on_each_device(|device| {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F16, device);
        vb.get((2, 3), "b.weight")?;
        vb.get(4, "a")?;
        let loss = |vars: &VarMap| -> Result<Tensor> {
            let vars = vars.data().lock().unwrap();
            vars["b.weight"].sum_all()? + vars["a"].sum_all()?
        };
        let mut optimizer = AdamW::from_varmap(&vars, adamw())?;
        assert!(optimizer.state()?.is_empty());
        optimizer.backward_step(&loss(&vars)?)?;
        optimizer.backward_step(&loss(&vars)?)?;
        let state = optimizer.state()?;
        let keys: Vec<_> = state.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(
            keys,
            [
                "a.step",
                "a.exp_avg",
                "a.exp_avg_sq",
                "b.weight.step",
                "b.weight.exp_avg",
                "b.weight.exp_avg_sq"
            ]
        );
        assert_eq!(state[3].1.to_scalar::<i64>()?, 2);
        for (_, tensor) in &state[4..] {
            assert_eq!((tensor.dims(), tensor.dtype()), (&[2, 3][..], DType::F32));
            assert!(tensor.device().same_device(device));
        }
        let numbered = Sgd::new(vec![variable(1, 3, DType::F64, device)?], momentum())?;
        assert!(format!("{numbered:?}").contains("\"0\""));
        Ok(())
    })
}

#[test]
fn a_parameter_without_gradient_is_passed_over() -> Result<()> {
    struct Without<'a>(&'a Device);
    impl Body for Without<'_> {
        fn run<P: Params>(&self, name: &str, params: P) -> Result<()> {
            let vars = [1, 2].map(|seed| variable(seed, 9, DType::F32, self.0).unwrap());
            let before = vars[1].copy()?;
            let mut optimizer = InPlace::new(vars.to_vec(), params)?;
            let grads = random_gradients(&vars[0], 2)?;
            optimizer.step(&gradients(&[(&vars[0], &grads[0])])?)?;
            assert_same_bits(&vars[1], &before, name)?;
            optimizer.step(&gradients(&[(&vars[1], &grads[1])])?)?;
            let state: HashMap<_, _> = optimizer.state()?.into_iter().collect();
            for parameter in ["0", "1"] {
                assert_eq!(state[&format!("{parameter}.step")].to_scalar::<i64>()?, 1);
            }
            Ok(())
        }
    }
    on_each_device(|device| for_each_optimizer(Without(device)))
}

/// What lets rows that no bag looked up be left alone.
#[test]
fn a_gradient_of_zero_changes_nothing_without_decay_and_momentum() -> Result<()> {
    on_each_device(|device| {
        let zeros = Tensor::zeros(1_000, DType::F32, device)?;
        let var = variable(1, 1_000, DType::F32, device)?;
        let before = var.copy()?;
        Sgd::new_lr(vec![var.clone()], 0.5)?.step(&gradients(&[(&var, &zeros)])?)?;
        assert_same_bits(&var, &before, "sgd")?;

        // From the start, and with a sum.
        let mut adagrad = Adagrad::new_lr(vec![var.clone()], 0.5)?;
        for grad in [zeros.clone(), random_gradients(&var, 1)?.remove(0), zeros] {
            let is_zero = to_vec(&grad)?.iter().all(|&g| g == 0.0);
            let (before, state) = (var.copy()?, adagrad.state()?);
            adagrad.step(&gradients(&[(&var, &grad)])?)?;
            let unchanged = to_vec(&var)? == to_vec(&before)?;
            assert_eq!(unchanged, is_zero);
            if let (true, Some((key, sum))) = (is_zero, state.get(1)) {
                assert_same_bits(&adagrad.state()?[1].1, sum, key)?;
            }
        }
        Ok(())
    })
}

#[test]
fn extreme_gradients_leave_values_finite() -> Result<()> {
    struct Extreme<'a>(&'a Device);
    impl Body for Extreme<'_> {
        fn run<P: Params>(&self, name: &str, params: P) -> Result<()> {
            // Their squares underflow, and overflow where the optimiser takes squares.
            let largest = if name.starts_with("ada") {
                1e30f32
            } else {
                1e3
            };
            let grad = Tensor::new(&[0f32, -0.0, 1e-38, 1e-20, largest, -largest], self.0)?;
            let var = Var::ones(6, DType::F32, self.0)?;
            let mut optimizer = InPlace::new(vec![var.clone()], params)?;
            for _ in 0..5 {
                optimizer.step(&gradients(&[(&var, &grad)])?)?;
                let values = to_vec(&var)?;
                assert!(values.iter().all(|v| v.is_finite()), "{name}: {values:?}");
            }
            Ok(())
        }
    }
    on_each_device(|device| for_each_optimizer(Extreme(device)))
}

/// Neither strides nor where a gradient starts make a difference.
#[test]
fn gradients_may_be_views() -> Result<()> {
    struct Views<'a>(&'a Device);
    impl Body for Views<'_> {
        fn run<P: Params>(&self, name: &str, params: P) -> Result<()> {
            let vars: Vec<_> = (0..3)
                .map(|_| Var::from_tensor(&variable(1, 35, DType::F32, self.0)?.reshape((5, 7))?))
                .collect::<Result<_>>()?;
            let mut optimizer = InPlace::new(vars.clone(), params)?;
            let grad =
                floats(&uniform(&mut Draws::new(5), 35), DType::F32, self.0)?.reshape((5, 7))?;
            let strided = grad.t()?.contiguous()?.t()?;
            assert!(!strided.is_contiguous());
            // No multiple of 16 bytes.
            let behind = floats(&[0.0], DType::F32, self.0)?;
            let shifted = Tensor::cat(&[&behind, &grad.flatten_all()?], 0)?;
            let shifted = shifted.narrow(0, 1, 35)?.reshape((5, 7))?;
            assert_eq!(shifted.layout().start_offset(), 1);
            for _ in 0..3 {
                optimizer.step(&gradients(&[
                    (&vars[0], &grad),
                    (&vars[1], &strided),
                    (&vars[2], &shifted),
                ])?)?;
            }
            assert_same_bits(&vars[1], &vars[0], &format!("{name}, strided"))?;
            assert_same_bits(&vars[2], &vars[0], &format!("{name}, shifted"))
        }
    }
    on_each_device(|device| for_each_optimizer(Views(device)))
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
    type Report<'a> = std::cell::RefCell<&'a mut dyn FnMut(&[f64])>;
    struct Reported<'a>(Report<'a>);
    impl Body for Reported<'_> {
        fn run<P: Params>(&self, _: &str, params: P) -> Result<()> {
            for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
                let var = variable(1, 150_001, dtype, &Device::Cpu)?;
                let mut optimizer = InPlace::new(vec![var.clone()], params.clone())?;
                for grad in random_gradients(&var, 3)? {
                    optimizer.step(&gradients(&[(&var, &grad)])?)?;
                }
                (self.0.borrow_mut())(&to_vec(&var)?);
            }
            Ok(())
        }
    }
    same_on_any_number_of_threads(
        "optim::results_do_not_depend_on_the_number_of_threads",
        |report| for_each_optimizer(Reported(std::cell::RefCell::new(report))),
    )
}

#[test]
fn cuda_computes_the_bits_of_the_cpu() -> Result<()> {
    struct Both<'a>(&'a Device);
    impl Body for Both<'_> {
        fn run<P: Params>(&self, name: &str, params: P) -> Result<()> {
            for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
                // The last is more than one value for each thread of the largest grid.
                for n in [3, 1_001, 20_000_003] {
                    if n > 10_000 && (name, dtype) != ("adamw", DType::F32) {
                        continue;
                    }
                    let results = [&Device::Cpu, self.0].map(|device| -> Result<_> {
                        let var = variable(1, n, dtype, device)?;
                        let mut optimizer = InPlace::new(vec![var.clone()], params.clone())?;
                        for grad in random_gradients(&var, if n > 10_000 { 2 } else { 20 })? {
                            optimizer.step(&gradients(&[(&var, &grad)])?)?;
                        }
                        Ok((var, optimizer.state()?))
                    });
                    let [cpu, gpu] = results;
                    let ((want, want_state), (got, got_state)) = (cpu?, gpu?);
                    let what = format!("{name}, {n} values of {dtype:?}");
                    assert_same_bits(&got, &want, &what)?;
                    for ((key, got), (_, want)) in got_state.iter().zip(&want_state) {
                        assert_same_bits(got, want, &format!("{key} of {what}"))?;
                    }
                }
            }
            Ok(())
        }
    }
    match cuda() {
        Some(device) => for_each_optimizer(Both(&device)),
        None => Ok(()),
    }
}

#[test]
fn a_hashed_layer_learns() -> Result<()> {
    struct Learns<'a>(&'a Device);
    impl Body for Learns<'_> {
        fn run<P: Params>(&self, name: &str, params: P) -> Result<()> {
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, DType::F32, self.0);
            let layer = hashed_embedding_bag(1_000, 8, 1.0 / 64.0, Default::default(), vb)?;
            let indices = Tensor::new(&[[1u32, 2], [3, 999]], self.0)?;
            let target = Tensor::ones((2, 8), DType::F32, self.0)?;
            let loss =
                || -> Result<Tensor> { (layer.forward(&indices)? - &target)?.sqr()?.mean_all() };
            let mut optimizer = InPlace::from_varmap(&vars, params)?;
            optimizer.set_learning_rate(0.3);
            let first = loss()?.to_scalar::<f32>()?;
            for _ in 0..20 {
                optimizer.backward_step(&loss()?)?;
            }
            let last = loss()?.to_scalar::<f32>()?;
            assert!(last < 0.5 * first, "{name}: {first} became {last}");
            Ok(())
        }
    }
    on_each_device(|device| for_each_optimizer(Learns(device)))
}

#[test]
fn integer_variables_are_skipped() -> Result<()> {
    let counts = Var::new(&[1i64, 2], &Device::Cpu)?;
    let var = variable(1, 2, DType::F32, &Device::Cpu)?;
    let mut optimizer = Sgd::new(vec![counts, var.clone()], momentum())?;
    optimizer.backward_step(&var.sum_all()?)?;
    let keys: Vec<_> = optimizer.state()?.into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["1.step", "1.momentum_buffer"]);
    Ok(())
}

#[test]
fn momentum_may_begin_and_end_during_a_run() -> Result<()> {
    let var = Var::new(&[1f64], &Device::Cpu)?;
    let grad = Tensor::new(&[1f64], &Device::Cpu)?;
    let (with, without) = (
        ParamsSgd {
            lr: 1.0,
            momentum: 0.5,
            dampening: 0.75,
            ..Default::default()
        },
        ParamsSgd {
            lr: 1.0,
            ..Default::default()
        },
    );
    let mut optimizer = Sgd::new(vec![var.clone()], without.clone())?;
    // All of the gradient enters the buffer in its first step, then a quarter.
    let mut want = 1.0;
    for (params, down) in [
        (&without, 1.0),
        (&with, 1.0),
        (&with, 0.75),
        (&without, 1.0),
        (&with, 0.625),
    ] {
        optimizer.set_params(params.clone());
        optimizer.step(&gradients(&[(&var, &grad)])?)?;
        want -= down;
        assert_eq!(var.to_vec1::<f64>()?, [want]);
    }
    Ok(())
}

#[test]
fn hyper_parameters_out_of_range_are_errors() -> Result<()> {
    fn error<P: Params>(params: P) -> String {
        message(InPlace::new(vec![], params))
    }
    let adamw = ParamsAdamW::default;
    for (params, want) in [
        (
            ParamsAdamW {
                lr: -1.0,
                ..adamw()
            },
            "hashed-embedding-bag: adamw: lr must be finite and at least 0, got -1",
        ),
        (
            ParamsAdamW {
                eps: f64::NAN,
                ..adamw()
            },
            "hashed-embedding-bag: adamw: eps must be finite and at least 0, got NaN",
        ),
        (
            ParamsAdamW {
                weight_decay: -0.5,
                ..adamw()
            },
            "hashed-embedding-bag: adamw: weight_decay must be finite and at least 0, got -0.5",
        ),
        (
            ParamsAdamW {
                beta1: 1.0,
                ..adamw()
            },
            "hashed-embedding-bag: adamw: beta1 must lie in [0, 1), got 1",
        ),
        (
            ParamsAdamW {
                beta2: -0.1,
                ..adamw()
            },
            "hashed-embedding-bag: adamw: beta2 must lie in [0, 1), got -0.1",
        ),
    ] {
        assert_eq!(error(params), want);
    }
    let adagrad = ParamsAdagrad::default;
    for (params, want) in [
        (
            ParamsAdagrad {
                lr_decay: -1.0,
                ..adagrad()
            },
            "hashed-embedding-bag: adagrad: lr_decay must be finite and at least 0, got -1",
        ),
        (
            ParamsAdagrad {
                initial_accumulator_value: f64::INFINITY,
                ..adagrad()
            },
            "hashed-embedding-bag: adagrad: initial_accumulator_value must be finite and at least 0, got inf",
        ),
    ] {
        assert_eq!(error(params), want);
    }
    let sgd = ParamsSgd::default;
    for (params, want) in [
        (
            ParamsSgd {
                momentum: -0.9,
                ..sgd()
            },
            "hashed-embedding-bag: sgd: momentum must be finite and at least 0, got -0.9",
        ),
        (
            ParamsSgd {
                dampening: f64::NAN,
                ..sgd()
            },
            "hashed-embedding-bag: sgd: dampening must be finite, got NaN",
        ),
        (
            ParamsSgd {
                nesterov: true,
                ..sgd()
            },
            "hashed-embedding-bag: sgd: nesterov needs a momentum and no dampening, got momentum 0 and dampening 0",
        ),
        (
            ParamsSgd {
                nesterov: true,
                ..momentum()
            },
            "hashed-embedding-bag: sgd: nesterov needs a momentum and no dampening, got momentum 0.8 and dampening 0.4",
        ),
    ] {
        assert_eq!(error(params), want);
    }
    // A scheduler's mistake is found in the next step.
    let var = variable(1, 3, DType::F32, &Device::Cpu)?;
    let mut optimizer = Sgd::new_lr(vec![var.clone()], 0.1)?;
    optimizer.set_learning_rate(f64::NAN);
    let step = optimizer.backward_step(&var.sum_all()?);
    assert_eq!(
        message(step),
        "hashed-embedding-bag: sgd: lr must be finite and at least 0, got NaN"
    );
    Ok(())
}

#[test]
fn parameters_that_cannot_be_updated_are_errors() -> Result<()> {
    let device = &Device::Cpu;
    let a = variable(1, 3, DType::F32, device)?;
    let tied = Adagrad::with_names([("a", a.clone()), ("b", a.clone())], adagrad());
    assert_eq!(
        message(tied),
        "hashed-embedding-bag: adagrad: parameter b is the same variable as a"
    );
    let b = variable(2, 3, DType::F32, device)?;
    let twice = Adagrad::with_names([("a", a), ("a", b)], adagrad());
    assert_eq!(
        message(twice),
        "hashed-embedding-bag: adagrad: parameter a appears twice"
    );
    let eight_bits = Var::zeros(4, DType::F8E4M3, device)?;
    assert_eq!(
        message(Sgd::new(vec![eight_bits], sgd())),
        "hashed-embedding-bag: sgd: parameter 0 must have one of the dtypes [F16, BF16, F32, F64], got F8E4M3"
    );
    Ok(())
}

#[test]
fn gradients_that_do_not_fit_are_errors_and_change_nothing() -> Result<()> {
    on_each_device(|device| {
        let (first, second) = (
            variable(1, 4, DType::F32, device)?,
            variable(2, 6, DType::F32, device)?,
        );
        let (before, good) = (first.copy()?, random_gradients(&first, 1)?.remove(0));
        let mut optimizer = AdamW::with_names(
            [("first", first.clone()), ("second", second.clone())],
            adamw(),
        )?;
        let six = Tensor::zeros(6, DType::F32, device)?;
        for (grad, want) in [
            (six.to_dtype(DType::F16)?, "dtype F32, got F16".to_string()),
            (six.reshape((2, 3))?, "shape [6], got [2, 3]".to_string()),
        ] {
            let step = optimizer.step(&gradients(&[(&first, &good), (&second, &grad)])?);
            let want = format!(
                "hashed-embedding-bag: adamw: gradient of parameter second must have {want}"
            );
            assert_eq!(message(step), want);
        }
        if !device.is_cpu() {
            let step = optimizer.step(&gradients(&[(&second, &six.to_device(&Device::Cpu)?)])?);
            let want =
                "hashed-embedding-bag: adamw: gradient of parameter second must have device Cuda { gpu_id: 0 }, got Cpu";
            assert_eq!(message(step), want);
        }
        assert_same_bits(&first, &before, "the other parameter")?;
        assert!(optimizer.state()?.is_empty());
        Ok(())
    })
}

#[test]
fn state_that_does_not_fit_is_an_error_and_changes_nothing() -> Result<()> {
    on_each_device(|device| {
        let var = variable(1, 4, DType::F32, device)?;
        let mut optimizer = AdamW::with_names([("w", var.clone())], adamw())?;
        optimizer.backward_step(&var.sqr()?.sum_all()?)?;
        let before = optimizer.state()?;
        let tensors = || before.iter().cloned().collect::<HashMap<_, _>>();
        let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu);
        let with = |key: &str, tensor: Tensor| {
            let mut state = tensors();
            state.insert(key.to_string(), tensor);
            state
        };
        let without = |key: &str| {
            let mut state = tensors();
            state.remove(key);
            state
        };
        for (state, want) in [
            (
                with("v.step", zeros(&[], DType::I64)?),
                "state v.step belongs to no parameter",
            ),
            (
                with("w.step", Tensor::new(-1i64, &Device::Cpu)?),
                "state w.step must be positive, got -1",
            ),
            (
                with("w.step", zeros(&[], DType::F32)?),
                "state w.step must have dtype I64 and shape [], got F32 and []",
            ),
            (
                with("w.exp_avg", zeros(&[5], DType::F32)?),
                "state w.exp_avg must have dtype F32 and shape [4], got F32 and [5]",
            ),
            (
                with("w.exp_avg_sq", zeros(&[4], DType::F64)?),
                "state w.exp_avg_sq must have dtype F32 and shape [4], got F64 and [4]",
            ),
            (without("w.step"), "state w.exp_avg lacks w.step"),
            (without("w.exp_avg_sq"), "state w.step lacks w.exp_avg_sq"),
        ] {
            assert_eq!(
                message(optimizer.load_state(state)),
                format!("hashed-embedding-bag: adamw: {want}")
            );
        }
        for ((key, got), (_, want)) in optimizer.state()?.iter().zip(&before) {
            assert_same_bits(got, want, key)?;
        }
        // No state at all is that of a new optimiser.
        optimizer.load_state([])?;
        assert!(optimizer.state()?.is_empty());
        Ok(())
    })
}
