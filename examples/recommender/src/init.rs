//! Initial values that depend on the seed alone.
//!
//! The random numbers of candle's CPU device cannot be seeded. This `VarBuilder` backend draws them itself, from the
//! distribution that each layer asks for.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::init::NormalOrUniform;
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use rand::distr::Uniform;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_distr::Normal;

/// A `VarBuilder` that puts its variables into `vars`.
pub fn seeded(vars: &VarMap, seed: u64, device: &Device) -> VarBuilder<'static> {
    let backend = Seeded {
        vars: vars.clone(),
        rng: Mutex::new(StdRng::seed_from_u64(seed)),
    };
    VarBuilder::from_backend(Box::new(backend), DType::F32, device.clone())
}

struct Seeded {
    vars: VarMap,
    rng: Mutex<StdRng>,
}

impl Seeded {
    fn draw(&self, shape: &Shape, init: Init) -> Result<Vec<f32>> {
        let n = shape.elem_count();
        let mut values = Vec::new();
        if values.try_reserve_exact(n).is_err() {
            candle_core::bail!("there is no memory for {n} parameters");
        }
        let (normal, center, spread) = match init {
            Init::Const(value) => {
                values.resize(n, value as f32);
                return Ok(values);
            }
            Init::Randn { mean, stdev } => (true, mean, stdev),
            Init::Uniform { lo, up } => (false, (lo + up) / 2.0, (up - lo) / 2.0),
            Init::Kaiming {
                dist,
                fan,
                non_linearity,
            } => {
                let stdev = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
                match dist {
                    NormalOrUniform::Normal => (true, 0.0, stdev),
                    NormalOrUniform::Uniform => (false, 0.0, 3f64.sqrt() * stdev),
                }
            }
        };
        let (center, spread) = (center as f32, spread as f32);
        let rng = &mut *self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        if normal {
            let distribution = Normal::new(center, spread).map_err(candle_core::Error::wrap)?;
            values.extend(rng.sample_iter(distribution).take(n));
        } else {
            let distribution = Uniform::new_inclusive(center - spread, center + spread)
                .map_err(candle_core::Error::wrap)?;
            values.extend(rng.sample_iter(distribution).take(n));
        }
        Ok(values)
    }
}

impl SimpleBackend for Seeded {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let values =
            Tensor::from_vec(self.draw(&shape, init)?, shape.clone(), device)?.to_dtype(dtype)?;
        let variable = self
            .vars
            .get(shape, name, candle_nn::init::ZERO, dtype, device)?;
        self.vars.clone().set_one(name, values)?;
        Ok(variable)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("{name}: a new variable needs a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.vars.contains_tensor(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(seed: u64, init: Init) -> Result<Vec<f32>> {
        seeded(&VarMap::new(), seed, &Device::Cpu)
            .get_with_hints((50, 40), "weight", init)?
            .flatten_all()?
            .to_vec1()
    }

    #[test]
    fn the_seed_decides() -> Result<()> {
        let init = candle_nn::init::DEFAULT_KAIMING_NORMAL;
        assert_eq!(draw(1, init)?, draw(1, init)?);
        assert_ne!(draw(1, init)?, draw(2, init)?);
        Ok(())
    }

    #[test]
    fn more_parameters_than_memory_are_an_error() {
        let vb = seeded(&VarMap::new(), 1, &Device::Cpu);
        let error = vb.get(1 << 60, "weight").unwrap_err().to_string();
        assert!(
            error.contains("no memory for 1152921504606846976"),
            "{error}"
        );
    }

    #[test]
    fn the_layer_decides_the_distribution() -> Result<()> {
        let rms = |values: &[f32]| {
            (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt()
        };
        assert_eq!(draw(1, Init::Const(0.5))?, vec![0.5; 2000]);
        let uniform = draw(1, Init::Uniform { lo: -0.1, up: 0.1 })?;
        assert!(uniform.iter().all(|value| value.abs() <= 0.1));
        assert!((rms(&uniform) - 0.1 / 3f32.sqrt()).abs() < 0.005);
        // Kaiming for ReLU: variance 2 over the 40 inputs.
        for init in [
            candle_nn::init::DEFAULT_KAIMING_NORMAL,
            candle_nn::init::DEFAULT_KAIMING_UNIFORM,
        ] {
            assert!((rms(&draw(1, init)?) - (2f32 / 40.0).sqrt()).abs() < 0.01);
        }
        Ok(())
    }
}
