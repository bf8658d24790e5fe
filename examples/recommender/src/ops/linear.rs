//! A linear layer with its activation as one operation.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use super::product::{add_product, Matrix};
use super::{tracked, values};

/// `x weightᵀ + bias`, and `relu` of it if `relu`: `(rows, in)`, `(out, in)` and `(out,)` to `(rows, out)`.
///
/// On the CPU, for f32, it is one operation on the calling thread; elsewhere it consists of candle's.
///
/// # Errors
/// Shapes that do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor, relu: bool) -> Result<Tensor> {
    if x.device().is_cpu() {
        return x.contiguous()?.apply_op3(weight, bias, Linear { relu });
    }
    let dtype = x.dtype();
    let y = x
        .matmul(&weight.to_dtype(dtype)?.t()?)?
        .broadcast_add(&bias.to_dtype(dtype)?)?;
    if relu {
        y.relu()
    } else {
        Ok(y)
    }
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
}

/// A contiguous tensor of rank 2.
fn matrix<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Matrix<'a>> {
    let (rows, columns) = layout.shape().dims2()?;
    Matrix::new(values(storage, layout)?, rows, columns, columns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// Distinct values of both signs.
    fn var(shape: (usize, usize), scale: f32) -> Result<Var> {
        let n = shape.0 * shape.1;
        let values: Vec<f32> = (0..n)
            .map(|i| scale * ((i * 37 % 23) as f32 - 11.0))
            .collect();
        Var::from_vec(values, shape, &Device::Cpu)
    }

    #[test]
    fn it_agrees_with_candles_operations() -> Result<()> {
        let (x, weight) = (var((7, 5), 0.1)?, var((3, 5), 0.2)?);
        let bias = Var::new(&[0.3f32, -0.2, 0.0], &Device::Cpu)?;
        let weights = var((7, 3), 0.5)?;
        for relu in [false, true] {
            let fused = linear(&x, &weight, &bias, relu)?;
            let slow = x.matmul(&weight.t()?)?.broadcast_add(&bias)?;
            let slow = if relu { slow.relu()? } else { slow };
            let near = |a: &Tensor, b: &Tensor| -> Result<bool> {
                Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5)
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
            let (x, weight) = (var(x, 1.0)?, var(weight, 1.0)?);
            assert!(linear(&x, &weight, &bias, true).is_err());
        }
        Ok(())
    }
}
