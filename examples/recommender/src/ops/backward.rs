//! A backward pass that starts from a known gradient instead of from a loss.

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// The gradients of all variables behind `output`, given the gradient of the loss with respect to `output`.
///
/// candle starts from a scalar only. Starting later saves the gradients of the loss itself, which has a closed form, and lets the
/// two parts of a model be differentiated one after the other.
///
/// # Errors
/// A gradient of another shape, or what an operation says.
pub fn backward(output: &Tensor, gradient: Tensor) -> Result<GradStore> {
    output.apply_op1(Start(gradient))?.backward()
}

/// A scalar whose gradient with respect to its argument is given.
struct Start(Tensor);

impl CustomOp1 for Start {
    fn name(&self) -> &'static str {
        "start-of-backward"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        let shape = Shape::from(());
        let zero = storage
            .device()
            .zeros_impl(&shape, candle_core::DType::F32)?;
        Ok((zero, shape))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn it_is_the_gradient_of_the_weighted_sum() -> Result<()> {
        let x = Var::new(&[[1f32, -2.0], [0.5, 3.0]], &Device::Cpu)?;
        let weights = Tensor::new(&[[2f32, 1.0], [-1.0, 0.25]], &Device::Cpu)?;
        let output = x.sqr()?;
        let expected = (&output * &weights)?.sum_all()?.backward()?;
        let found = backward(&output, weights)?;
        let values = |store: &GradStore| store.get(&x).map(Tensor::to_vec2::<f32>).transpose();
        assert_eq!(values(&found)?, values(&expected)?);
        Ok(())
    }
}
