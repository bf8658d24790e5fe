//! `Gradient::Deterministic`: the same bits in every run, close to the exact sum, and no number made finite.

use crate::common::{floats, on_each_device, to_vec, Draws};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    Gradient, Hash, HashedEmbeddingBag, HashedEmbeddingBagConfig, Mix, Mode,
};

const DTYPES: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];
const NUM_BAGS: usize = 200;
const BAG_LEN: usize = 13;
const DIM: usize = 48;
const LEN: usize = 480;

/// Values of very different sizes, which no order of float additions sums alike.
fn uneven(seed: u64, n: usize) -> Vec<f64> {
    let mut draws = Draws::new(seed);
    (0..n)
        .map(|_| {
            let size = 10f64.powi(draws.below(7) as i32 - 4);
            (draws.below(2001) as f64 - 1000.0) / 1000.0 * size
        })
        .collect()
}

struct Backward {
    hash: Hash,
    mode: Mode,
    dtype: DType,
    weighted: bool,
}

impl Backward {
    /// The gradient of hashed_weight for a grad_output.
    fn grad(&self, gradient: Gradient, grad_output: &[f64], device: &Device) -> Result<Tensor> {
        self.grad_in(self.dtype, gradient, grad_output, device)
    }

    /// The same in f64 on the CPU, from what this dtype makes of the inputs, and rounded to it at the end.
    fn exact(&self, grad_output: &[f64]) -> Result<Tensor> {
        self.grad_in(DType::F64, Gradient::Fastest, grad_output, &Device::Cpu)?
            .to_dtype(self.dtype)
    }

    fn grad_in(
        &self,
        dtype: DType,
        gradient: Gradient,
        grad_output: &[f64],
        device: &Device,
    ) -> Result<Tensor> {
        let floats = |values: &[f64]| floats(values, self.dtype, device)?.to_dtype(dtype);
        let config = HashedEmbeddingBagConfig {
            mode: self.mode,
            hash: Some(self.hash),
            gradient,
            ..Default::default()
        };
        let weight = Var::from_tensor(&floats(&uneven(1, LEN))?)?;
        let layer = HashedEmbeddingBag::new(weight.as_tensor().clone(), 1000, DIM, config)?;
        let mut draws = Draws::new(2);
        let rows = Tensor::from_iter(
            (0..NUM_BAGS * BAG_LEN).map(|_| draws.below(1000) as u32),
            &Device::Cpu,
        )?;
        let rows = rows.reshape((NUM_BAGS, BAG_LEN))?.to_device(device)?;
        let out = if self.weighted {
            let weights = floats(&uneven(3, NUM_BAGS * BAG_LEN))?;
            layer.forward_weighted(&rows, &weights.reshape((NUM_BAGS, BAG_LEN))?)?
        } else {
            candle_nn::Module::forward(&layer, &rows)?
        };
        let grad_output = floats(grad_output)?.reshape(out.shape())?;
        let grads = (out * grad_output)?.sum_all()?.backward()?;
        Ok(grads.get(&weight).cloned().expect("a variable"))
    }
}

fn each(body: impl Fn(&Backward, &Device) -> Result<()>) -> Result<()> {
    on_each_device(|device| {
        for hash in [
            Hash::default_for(DIM),
            Hash::from(Mix {
                seed: 1,
                block: 6,
                signed: true,
            }),
            Hash::original(),
        ] {
            for dtype in DTYPES {
                for (mode, weighted) in [
                    (Mode::Sum, false),
                    (Mode::Sum, true),
                    (Mode::Mean, false),
                    (Mode::Max, false),
                ] {
                    let backward = Backward {
                        hash,
                        mode,
                        dtype,
                        weighted,
                    };
                    body(&backward, device)?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn the_same_bits_every_time() -> Result<()> {
    let grad_output = uneven(4, NUM_BAGS * DIM);
    each(|backward, device| {
        let first = to_vec(&backward.grad(Gradient::Deterministic, &grad_output, device)?)?;
        for _ in 0..2 {
            let again = to_vec(&backward.grad(Gradient::Deterministic, &grad_output, device)?)?;
            assert_eq!(first, again);
        }
        Ok(())
    })
}

#[test]
fn more_exact_than_additions_in_floats() -> Result<()> {
    let grad_output = uneven(4, NUM_BAGS * DIM);
    each(|backward, device| {
        let got = to_vec(&backward.grad(Gradient::Deterministic, &grad_output, device)?)?;
        let want = to_vec(&backward.exact(&grad_output)?)?;
        let epsilon = match backward.dtype {
            DType::F16 => 2f64.powi(-11),
            DType::BF16 => 2f64.powi(-8),
            DType::F32 => 2f64.powi(-24),
            _ => 2f64.powi(-53),
        };
        // Values go up to 100. A sum has some 260 terms, and is rounded once; the CPU also adds in floats.
        let (terms, largest) = (1000.0, if backward.weighted { 1e4 } else { 100.0 });
        let on_cpu = if device.is_cpu() {
            terms * largest
        } else {
            0.0
        };
        let product = if backward.weighted || backward.mode == Mode::Mean {
            terms * largest
        } else {
            0.0
        };
        // In f64 there is nothing more exact to compare with: the reference rounds as well.
        let slack = if backward.dtype == DType::F64 {
            epsilon * terms * largest
        } else {
            let single = 2f64.powi(-24);
            single * (on_cpu + product) + largest * single / 64.0
        };
        for (slot, (&got, &want)) in got.iter().zip(&want).enumerate() {
            assert!(
                got == want || (got - want).abs() <= 2.0 * epsilon * want.abs() + slack,
                "slot {slot}: {got} is not {want}, {:?} {:?} {:?} weighted {}",
                backward.hash,
                backward.dtype,
                backward.mode,
                backward.weighted,
            );
        }
        Ok(())
    })
}

#[test]
fn what_is_not_finite_stays_so() -> Result<()> {
    each(|backward, device| {
        let mut grad_output = uneven(4, NUM_BAGS * DIM);
        (grad_output[5], grad_output[2000], grad_output[9000]) =
            (f64::INFINITY, f64::NAN, f64::NEG_INFINITY);
        let got = to_vec(&backward.grad(Gradient::Deterministic, &grad_output, device)?)?;
        let want = to_vec(&backward.grad(Gradient::Fastest, &grad_output, &Device::Cpu)?)?;
        let kind = |x: &f64| (x.is_nan(), x.is_infinite().then_some(*x));
        assert_eq!(
            got.iter().map(kind).collect::<Vec<_>>(),
            want.iter().map(kind).collect::<Vec<_>>()
        );
        assert!(got.iter().any(|x| !x.is_finite()));
        Ok(())
    })
}

#[test]
fn tiny_and_huge_gradients_keep_their_digits() -> Result<()> {
    on_each_device(|device| {
        for scale in [1e-30, 1e30] {
            let backward = Backward {
                hash: Hash::default_for(DIM),
                mode: Mode::Sum,
                dtype: DType::F32,
                weighted: false,
            };
            let grad_output: Vec<f64> = Draws::new(8)
                .halves(NUM_BAGS * DIM)
                .iter()
                .map(|x| x * scale)
                .collect();
            let got = to_vec(&backward.grad(Gradient::Deterministic, &grad_output, device)?)?;
            let want = to_vec(&backward.grad(Gradient::Fastest, &grad_output, &Device::Cpu)?)?;
            for (got, want) in got.iter().zip(&want) {
                assert!(
                    (got - want).abs() <= 1e-5 * (want.abs() + scale),
                    "{got} is not {want}"
                );
            }
        }
        Ok(())
    })
}
