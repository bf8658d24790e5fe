//! A linear layer with its activation as one operation.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::product::{add_product, Matrix};
use super::{tracked, values};

/// `x weightᵀ + bias`, and `relu` of it if `relu`: `(rows, in)`, `(out, in)` and `(out,)` to `(rows, out)`.
///
/// One operation: on the CPU, for f32, on the calling thread; on CUDA, for f32 and bf16, to which the parameters are rounded.
///
/// # Errors
/// Shapes that do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor, relu: bool) -> Result<Tensor> {
    let (x, dtype) = (x.contiguous()?, x.dtype());
    x.apply_op3(
        &weight.to_dtype(dtype)?,
        &bias.to_dtype(dtype)?,
        Linear { relu },
    )
}

struct Linear {
    relu: bool,
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (
            matrix(x, x_layout)?,
            matrix(weight, weight_layout)?.transposed(),
        );
        let (m, n) = (x.rows(), weight.columns());
        let bias = values(bias, bias_layout)?;
        if bias.len() != n {
            candle_core::bail!("linear: {} biases for {n} outputs", bias.len());
        }
        let mut y = bias.repeat(m);
        add_product(&mut y, n, x, weight)?;
        if self.relu {
            y.iter_mut().for_each(|y| *y = y.max(0.0));
        }
        Ok((CpuStorage::F32(y), Shape::from((m, n))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &Layout,
        bias: &candle_core::CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let (m, k) = x_layout.shape().dims2()?;
        let (n, inputs) = weight_layout.shape().dims2()?;
        if (inputs, bias_layout.dims()) != (k, &[n]) {
            candle_core::bail!(
                "linear: {x_layout:?}, {weight_layout:?} and {bias_layout:?} do not fit"
            );
        }
        let mut y = x.matmul(
            weight,
            (1, m, n, k),
            x_layout,
            &weight_layout.transpose(0, 1)?,
        )?;
        cuda::add_bias(&mut y, (bias, bias_layout), (m, n), self.relu)?;
        Ok((y, Shape::from((m, n))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        y: &Tensor,
        grad_y: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad_y = grad_y.contiguous()?;
        let grad = if self.relu {
            grad_y.apply_op2_no_bwd(y, &WherePositive)?
        } else {
            grad_y
        };
        if !x.device().is_cpu() {
            return Ok((
                tracked(x, || grad.matmul(&weight.detach()))?,
                tracked(weight, || grad.t()?.matmul(&x.detach()))?,
                tracked(bias, || {
                    let sums = grad.apply_op1_no_bwd(&ColumnSums)?.sum(0)?;
                    sums.to_dtype(bias.dtype())
                })?,
            ));
        }
        let product =
            |lhs: &Tensor, rhs, lhs_t, rhs_t| lhs.apply_op2_no_bwd(rhs, &MatMul { lhs_t, rhs_t });
        Ok((
            tracked(x, || product(&grad, weight, false, false))?,
            tracked(weight, || product(&grad, x, true, false))?,
            tracked(bias, || grad.sum(0))?,
        ))
    }
}

/// The product of two matrices, each of which may be transposed.
struct MatMul {
    lhs_t: bool,
    rhs_t: bool,
}

impl CustomOp2 for MatMul {
    fn name(&self) -> &'static str {
        "matmul-of-one-thread"
    }

    fn cpu_fwd(
        &self,
        lhs: &CpuStorage,
        lhs_layout: &Layout,
        rhs: &CpuStorage,
        rhs_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let of = |storage, layout, transposed| -> Result<Matrix> {
            let matrix = matrix(storage, layout)?;
            Ok(if transposed {
                matrix.transposed()
            } else {
                matrix
            })
        };
        let lhs = of(lhs, lhs_layout, self.lhs_t)?;
        let rhs = of(rhs, rhs_layout, self.rhs_t)?;
        let (m, n) = (lhs.rows(), rhs.columns());
        let mut out = vec![0.0; m * n];
        add_product(&mut out, n, lhs, rhs)?;
        Ok((CpuStorage::F32(out), Shape::from((m, n))))
    }
}

/// Its first argument where the second is above 0, and 0 elsewhere.
struct WherePositive;

impl CustomOp2 for WherePositive {
    fn name(&self) -> &'static str {
        "where-positive"
    }

    fn cpu_fwd(
        &self,
        grad: &CpuStorage,
        grad_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let pairs = values(grad, grad_layout)?.iter().zip(values(y, y_layout)?);
        let masked = pairs.map(|(&grad, &y)| if y > 0.0 { grad } else { 0.0 });
        Ok((
            CpuStorage::F32(masked.collect()),
            grad_layout.shape().clone(),
        ))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        grad: &candle_core::CudaStorage,
        grad_layout: &Layout,
        y: &candle_core::CudaStorage,
        y_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        cuda::where_positive((grad, grad_layout), (y, y_layout))
    }
}

/// The sums of the columns over some parts of the rows, `(parts, columns)`, f32: on CUDA, where candle gives each column one thread
/// block.
struct ColumnSums;

impl CustomOp1 for ColumnSums {
    fn name(&self) -> &'static str {
        "column-sums"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("column-sums has no CPU implementation; candle's sum is one")
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        cuda::column_sums((x, layout))
    }
}

/// A contiguous tensor of rank 2.
fn matrix<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Matrix<'a>> {
    let (rows, columns) = layout.shape().dims2()?;
    Matrix::new(values(storage, layout)?, rows, columns, columns)
}

#[cfg(test)]
mod tests {
    use super::super::tests::devices;
    use super::*;
    use candle_core::{Device, Var};

    /// Distinct values of both signs.
    fn var(shape: (usize, usize), scale: f32, device: &Device) -> Result<Var> {
        let n = shape.0 * shape.1;
        let values: Vec<f32> = (0..n)
            .map(|i| scale * ((i * 37 % 23) as f32 - 11.0))
            .collect();
        Var::from_vec(values, shape, device)
    }

    #[test]
    fn it_agrees_with_candles_operations() -> Result<()> {
        for device in devices() {
            for (rows, inputs, outputs) in [(7, 5, 3), (1_000, 12, 40)] {
                it_agrees_on(&device, rows, inputs, outputs)?;
            }
        }
        Ok(())
    }

    fn it_agrees_on(device: &Device, rows: usize, inputs: usize, outputs: usize) -> Result<()> {
        let (x, weight) = (
            var((rows, inputs), 0.1, device)?,
            var((outputs, inputs), 0.2, device)?,
        );
        let bias = Var::from_tensor(&var((1, outputs), 0.1, device)?.squeeze(0)?)?;
        let weights = var((rows, outputs), 0.01, device)?;
        for relu in [false, true] {
            let fused = linear(&x, &weight, &bias, relu)?;
            let slow = x.matmul(&weight.t()?)?.broadcast_add(&bias)?;
            let slow = if relu { slow.relu()? } else { slow };
            let near = |a: &Tensor, b: &Tensor| -> Result<bool> {
                Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-4)
            };
            assert!(near(&fused, &slow)?);
            let [fused, slow] =
                [fused, slow].map(|y| (y * weights.as_tensor())?.sum_all()?.backward());
            let (fused, slow) = (fused?, slow?);
            for var in [&x, &weight, &bias] {
                let (Some(fused), Some(slow)) = (fused.get(var), slow.get(var)) else {
                    candle_core::bail!("no gradient")
                };
                assert!(near(fused, slow)?, "{relu}: {fused} {slow}");
            }
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() -> Result<()> {
        let bias = Var::new(&[0f32; 3], &Device::Cpu)?;
        for (x, weight) in [((7, 4), (3, 5)), ((7, 5), (2, 5))] {
            let (x, weight) = (var(x, 1.0, &Device::Cpu)?, var(weight, 1.0, &Device::Cpu)?);
            assert!(linear(&x, &weight, &bias, true).is_err());
        }
        Ok(())
    }
}
