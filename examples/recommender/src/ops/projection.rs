//! Narrow pooled rows made wide: the vector of each table times a matrix of its own.

use std::sync::Mutex;

use candle_core::{bail, CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::product::{add_product, Matrix};
use super::{in_pool, tracked, values};

/// Examples that a core projects at once. It is fixed, so that sums over examples do not depend on the number of cores.
const SHARD: usize = 256;

/// `out[i, table, :] = x[i, table, :] matrices[table, :, :]`: `(batch, tables, inner)` and `(tables, inner, dim)` to
/// `(batch, tables, dim)`.
///
/// On the CPU, for f32, all cores take part; elsewhere it is one batched product.
///
/// # Errors
/// Shapes that do not fit.
pub fn project(x: &Tensor, matrices: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() {
        return x.contiguous()?.apply_op2(matrices, Project);
    }
    let by_table = x.transpose(0, 1)?.contiguous()?.matmul(matrices)?;
    by_table.transpose(0, 1)?.contiguous()
}

/// The sizes of a projection.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    tables: usize,
    inner: usize,
    dim: usize,
}

impl Sizes {
    fn of(x: &Layout, matrices: &Layout) -> Result<Self> {
        let (batch, tables, inner) = x.shape().dims3()?;
        let (count, rows, dim) = matrices.shape().dims3()?;
        if (count, rows) != (tables, inner) {
            bail!("project: {tables} vectors of {inner} values do not fit {count} matrices of {rows} rows");
        }
        Ok(Self {
            batch,
            tables,
            inner,
            dim,
        })
    }

    fn shards(self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let starts = (0..self.batch).step_by(SHARD);
        starts.map(move |start| start..self.batch.min(start + SHARD))
    }
}

/// Writes for each example and table `rows[i, table, :]` times the matrix that `matrix` gives of the table: `(batch, tables, from)`
/// to `(batch, tables, to)`.
fn multiply<'a>(
    sizes: Sizes,
    rows: &[f32],
    (from, to): (usize, usize),
    matrix: impl Fn(usize) -> Result<Matrix<'a>> + Sync,
) -> Result<Vec<f32>> {
    let tables = sizes.tables;
    let mut out = vec![0.0; sizes.batch * tables * to];
    let parts = out.chunks_mut((SHARD * tables * to).max(1)).map(Mutex::new);
    let shards: Vec<_> = sizes.shards().zip(parts).collect();
    in_pool(&shards, |(shard, part)| {
        let Ok(mut part) = part.lock() else {
            bail!("project: a thread panicked")
        };
        for table in 0..tables {
            let rows = &rows[(shard.start * tables + table) * from..];
            let rows = Matrix::new(rows, shard.len(), from, tables * from)?;
            add_product(&mut part[table * to..], tables * to, rows, matrix(table)?)?;
        }
        Ok(())
    })?;
    drop(shards);
    Ok(out)
}

struct Project;

impl CustomOp2 for Project {
    fn name(&self) -> &'static str {
        "project"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        matrices: &CpuStorage,
        matrices_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = Sizes::of(x_layout, matrices_layout)?;
        let Sizes {
            batch,
            tables,
            inner,
            dim,
        } = sizes;
        let matrices = values(matrices, matrices_layout)?;
        let matrix = |table| Matrix::new(&matrices[table * inner * dim..], inner, dim, dim);
        let out = multiply(sizes, values(x, x_layout)?, (inner, dim), matrix)?;
        Ok((CpuStorage::F32(out), Shape::from((batch, tables, dim))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        matrices: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        Ok((
            tracked(x, || grad.apply_op2_no_bwd(matrices, &GradientOfRows))?,
            tracked(matrices, || x.apply_op2_no_bwd(&grad, &GradientOfMatrices))?,
        ))
    }
}

/// `(batch, tables, dim)` and `(tables, inner, dim)` to `(batch, tables, inner)`.
struct GradientOfRows;

impl CustomOp2 for GradientOfRows {
    fn name(&self) -> &'static str {
        "project-gradient-of-rows"
    }

    fn cpu_fwd(
        &self,
        grad: &CpuStorage,
        grad_layout: &Layout,
        matrices: &CpuStorage,
        matrices_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, tables, dim) = grad_layout.shape().dims3()?;
        let inner = matrices_layout.shape().dims3()?.1;
        let sizes = Sizes {
            batch,
            tables,
            inner,
            dim,
        };
        let matrices = values(matrices, matrices_layout)?;
        let matrix = |table| {
            let matrix = Matrix::new(&matrices[table * inner * dim..], inner, dim, dim)?;
            Ok(matrix.transposed())
        };
        let out = multiply(sizes, values(grad, grad_layout)?, (dim, inner), matrix)?;
        Ok((CpuStorage::F32(out), Shape::from((batch, tables, inner))))
    }
}

/// `(batch, tables, inner)` and `(batch, tables, dim)` to `(tables, inner, dim)`.
struct GradientOfMatrices;

impl CustomOp2 for GradientOfMatrices {
    fn name(&self) -> &'static str {
        "project-gradient-of-matrices"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, tables, inner) = x_layout.shape().dims3()?;
        let dim = grad_layout.shape().dims3()?.2;
        let sizes = Sizes {
            batch,
            tables,
            inner,
            dim,
        };
        let (x, grad) = (values(x, x_layout)?, values(grad, grad_layout)?);
        let shards: Vec<_> = sizes.shards().collect();
        let sums = in_pool(&shards, |shard| {
            let mut sum = vec![0.0; tables * inner * dim];
            for table in 0..tables {
                let first = shard.start * tables + table;
                let rows = Matrix::new(&x[first * inner..], shard.len(), inner, tables * inner)?;
                let grad = Matrix::new(&grad[first * dim..], shard.len(), dim, tables * dim)?;
                let sum = &mut sum[table * inner * dim..];
                add_product(sum, dim, rows.transposed(), grad)?;
            }
            Ok(sum)
        })?;
        let mut sums = sums.into_iter();
        let mut total = sums
            .next()
            .unwrap_or_else(|| vec![0.0; tables * inner * dim]);
        for sum in sums {
            total
                .iter_mut()
                .zip(sum)
                .for_each(|(total, sum)| *total += sum);
        }
        Ok((CpuStorage::F32(total), Shape::from((tables, inner, dim))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn it_agrees_with_a_batched_product() -> Result<()> {
        let device = &Device::Cpu;
        // More than two shards, of which the last is short; a single example; none.
        for (batch, tables, inner, dim) in [(600, 3, 4, 7), (1, 1, 1, 1), (0, 2, 3, 4)] {
            let x = Var::from_tensor(&Tensor::randn(0f32, 1.0, (batch, tables, inner), device)?)?;
            let matrices = Var::randn(0f32, 1.0, (tables, inner, dim), device)?;
            let weights = Tensor::randn(0f32, 1.0, (batch, tables, dim), device)?;
            let fast = project(&x, &matrices)?;
            assert_eq!(fast.dims(), [batch, tables, dim]);
            if batch == 0 {
                continue;
            }
            let slow = x.transpose(0, 1)?.contiguous()?.matmul(&matrices)?;
            let slow = slow.transpose(0, 1)?;
            let near = |a: &Tensor, b: &Tensor| -> Result<bool> {
                Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-3)
            };
            assert!(near(&fast, &slow)?);
            let gradients = |y: &Tensor| (y * &weights)?.sum_all()?.backward();
            let (fast, slow) = (gradients(&fast)?, gradients(&slow)?);
            for var in [&x, &matrices] {
                let (Some(fast), Some(slow)) = (fast.get(var), slow.get(var)) else {
                    bail!("no gradient")
                };
                assert!(near(fast, slow)?);
            }
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() -> Result<()> {
        let zeros = |shape: (usize, usize, usize)| {
            Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu)
        };
        for matrices in [(2, 4, 5), (3, 3, 5)] {
            assert!(project(&zeros((2, 3, 4))?, &zeros(matrices)?).is_err());
        }
        Ok(())
    }
}
