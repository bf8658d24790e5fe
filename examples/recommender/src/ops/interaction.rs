//! The interaction of a DLRM: the dots of all pairs of an example's vectors, after the vectors themselves.
//!
//! Of candle's operations it takes a square matrix of dots, a gather of its lower triangle and a concatenation, and each again in
//! the backward pass. Here, one pass over an example reads its vectors and writes what the top MLP reads.

use std::ops::Range;

use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{tracked, values};

/// What the top MLP reads besides the dots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopInput {
    /// All vectors.
    Vectors,
    /// The output of the bottom MLP alone, as in the DLRM of Naumov et al.
    Bottom,
}

/// The sizes of an interaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interaction {
    /// The number of pooled vectors per example.
    pub tables: usize,
    /// Whether the bottom MLP adds one.
    pub bottom: bool,
    /// The number of values of each vector.
    pub dim: usize,
    /// What is kept besides the dots.
    pub input: TopInput,
}

impl Interaction {
    /// The number of vectors of an example.
    pub fn vectors(&self) -> usize {
        self.tables + usize::from(self.bottom)
    }

    /// The number of values that precede the dots.
    pub fn kept(&self) -> usize {
        let vectors = match self.input {
            TopInput::Vectors => self.vectors(),
            TopInput::Bottom => usize::from(self.bottom),
        };
        vectors * self.dim
    }

    /// The number of values per example.
    pub fn width(&self) -> usize {
        let n = self.vectors();
        self.kept() + n * n.saturating_sub(1) / 2
    }

    /// The pairs in the order of their dots: `(1, 0), (2, 0), (2, 1), (3, 0), …`. The vector of the bottom MLP is the last.
    pub fn pairs(&self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.vectors()).flat_map(|i| (0..i).map(move |j| (i, j)))
    }

    /// Vectors `(batch, tables, dim)` and, if there is a bottom MLP, its outputs `(batch, dim)`, to `(batch, width)`: f32 on the CPU,
    /// on the calling thread; f32 or bf16 on CUDA, and there with zeros behind the dots, up to a multiple of 8 values, so that
    /// the product that follows reads whole vectors from every row.
    ///
    /// # Errors
    /// Other shapes and dtypes, and on CUDA more than 108 vectors.
    pub fn apply(&self, vectors: &Tensor, bottom: Option<&Tensor>) -> Result<Tensor> {
        let vectors = vectors.contiguous()?;
        let bottom = match bottom {
            Some(bottom) => bottom.contiguous()?,
            // An argument that stands for none, and gets no gradient.
            None => {
                let vectors = vectors.detach();
                vectors.narrow(1, 0, 1)?.squeeze(1)?.narrow(1, 0, 0)?
            }
        };
        vectors.apply_op2(&bottom, Forward(*self))
    }

    /// Checks the shapes; returns the number of examples.
    fn batch(&self, vectors: &Layout, bottom: &Layout) -> Result<usize> {
        let bottom_dim = if self.bottom { self.dim } else { 0 };
        match (vectors.dims(), bottom.dims()) {
            (&[batch, tables, dim], &[same, width])
                if (tables, dim) == (self.tables, self.dim)
                    && (same, width) == (batch, bottom_dim) =>
            {
                Ok(batch)
            }
            (vectors, bottom) => bail!("{self:?} does not take {vectors:?} and {bottom:?}"),
        }
    }

    /// The outputs of the bottom MLP, or nothing without one.
    fn bottom_values<'a>(&self, bottom: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
        match self.bottom {
            true => values(bottom, layout),
            false => Ok(&[]),
        }
    }

    /// The values of example `i`, one vector after the other.
    fn gather(&self, x: &mut [f32], vectors: &[f32], bottom: &[f32], i: usize) {
        let split = self.tables * self.dim;
        let rest = x.len() - split;
        x[..split].copy_from_slice(&vectors[i * split..][..split]);
        x[split..].copy_from_slice(&bottom[i * rest..][..rest]);
    }
}

struct Forward(Interaction);

impl CustomOp2 for Forward {
    fn name(&self) -> &'static str {
        "interaction"
    }

    fn cpu_fwd(
        &self,
        vectors: &CpuStorage,
        vectors_layout: &Layout,
        bottom: &CpuStorage,
        bottom_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = self.0;
        let batch = sizes.batch(vectors_layout, bottom_layout)?;
        let vectors = values(vectors, vectors_layout)?;
        let bottom = sizes.bottom_values(bottom, bottom_layout)?;
        let mut out = vec![0.0; batch * sizes.width()];
        let mut x = vec![0.0; sizes.vectors() * sizes.dim];
        if sizes.width() > 0 {
            for (i, out) in out.chunks_exact_mut(sizes.width()).enumerate() {
                sizes.gather(&mut x, vectors, bottom, i);
                let (kept, dots) = out.split_at_mut(sizes.kept());
                kept.copy_from_slice(&x[x.len() - kept.len()..]);
                write_dots(&x, sizes.dim, dots);
            }
        }
        Ok((CpuStorage::F32(out), Shape::from((batch, sizes.width()))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        vectors: &candle_core::CudaStorage,
        vectors_layout: &Layout,
        bottom: &candle_core::CudaStorage,
        bottom_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.0.batch(vectors_layout, bottom_layout)?;
        cuda::interaction(&self.0, (vectors, vectors_layout), (bottom, bottom_layout))
    }

    fn bwd(
        &self,
        vectors: &Tensor,
        bottom: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (sizes, grad) = (self.0, grad.contiguous()?);
        let gradient =
            |rows: Range<usize>| vectors.apply_op3_no_bwd(bottom, &grad, &Backward { sizes, rows });
        if vectors.device().is_cpu() {
            let grad = gradient(0..sizes.vectors())?;
            return Ok((
                tracked(vectors, || grad.narrow(1, 0, sizes.tables))?,
                match sizes.bottom {
                    true => tracked(bottom, || grad.narrow(1, sizes.tables, 1)?.squeeze(1))?,
                    false => None,
                },
            ));
        }
        // candle adds a gradient to zeros, for which parts of a tensor take three times as long as tensors of their own.
        Ok((
            tracked(vectors, || gradient(0..sizes.tables))?,
            match sizes.bottom {
                true => tracked(bottom, || {
                    gradient(sizes.tables..sizes.vectors())?.squeeze(1)
                })?,
                false => None,
            },
        ))
    }
}

/// The gradients of some of the vectors, `(batch, rows, dim)`; on the CPU those of all.
struct Backward {
    sizes: Interaction,
    rows: Range<usize>,
}

impl CustomOp3 for Backward {
    fn name(&self) -> &'static str {
        "interaction-backward"
    }

    fn cpu_fwd(
        &self,
        vectors: &CpuStorage,
        vectors_layout: &Layout,
        bottom: &CpuStorage,
        bottom_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = self.sizes;
        if self.rows != (0..sizes.vectors()) {
            bail!("on the CPU the gradients of all vectors are computed at once");
        }
        let batch = sizes.batch(vectors_layout, bottom_layout)?;
        let vectors = values(vectors, vectors_layout)?;
        let bottom = sizes.bottom_values(bottom, bottom_layout)?;
        let grad = values(grad, grad_layout)?;
        let row = sizes.vectors() * sizes.dim;
        let mut out = vec![0.0; batch * row];
        let mut x = vec![0.0; row];
        if sizes.width() > 0 {
            let rows = out.chunks_exact_mut(row);
            for (i, (out, grad)) in rows.zip(grad.chunks_exact(sizes.width())).enumerate() {
                sizes.gather(&mut x, vectors, bottom, i);
                let (kept, dots) = grad.split_at(sizes.kept());
                out[row - kept.len()..].copy_from_slice(kept);
                add_gradients(&x, sizes.dim, dots, out);
            }
        }
        let shape = Shape::from((batch, sizes.vectors(), sizes.dim));
        Ok((CpuStorage::F32(out), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        vectors: &candle_core::CudaStorage,
        vectors_layout: &Layout,
        bottom: &candle_core::CudaStorage,
        bottom_layout: &Layout,
        grad: &candle_core::CudaStorage,
        grad_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.sizes.batch(vectors_layout, bottom_layout)?;
        cuda::interaction_backward(
            &self.sizes,
            self.rows.clone(),
            (vectors, vectors_layout),
            (bottom, bottom_layout),
            (grad, grad_layout),
        )
    }
}

/// Compiles a function twice and calls the version that the processor can run. The results are the same: the order of additions
/// is fixed, and multiplications are not fused with them.
macro_rules! with_avx2 {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) $body:block) => {
        $(#[$doc])*
        fn $name($($arg: $ty),*) {
            #[inline(always)]
            fn portable($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2($($arg: $ty),*) {
                portable($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has the instructions.
                return unsafe { avx2($($arg),*) };
            }
            portable($($arg),*)
        }
    };
}

/// Sums are kept in this many parts, so that they fit a register.
const LANES: usize = 8;

with_avx2! {
    /// Writes the dot of each pair of the vectors in `x`, of `dim` values each.
    fn write_dots(x: &[f32], dim: usize, dots: &mut [f32]) {
        let mut start = 0;
        for (i, a) in x.chunks_exact(dim).enumerate() {
            let dots = &mut dots[start..start + i];
            start += i;
            for (dot, b) in dots.iter_mut().zip(x.chunks_exact(dim)) {
                let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
                let rest = a.remainder().iter().zip(b.remainder());
                let rest: f32 = rest.map(|(a, b)| a * b).sum();
                let mut sums = [0.0; LANES];
                for (a, b) in a.zip(b) {
                    for lane in 0..LANES {
                        sums[lane] += a[lane] * b[lane];
                    }
                }
                let [s0, s1, s2, s3, s4, s5, s6, s7] = sums;
                *dot = ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7)) + rest;
            }
        }
    }
}

with_avx2! {
    /// Adds to `out` what the gradients of the dots are with respect to the vectors in `x`.
    fn add_gradients(x: &[f32], dim: usize, grad: &[f32], out: &mut [f32]) {
        let mut start = 0;
        for (i, a) in x.chunks_exact(dim).enumerate() {
            let grads = &grad[start..start + i];
            start += i;
            let (before, own) = out.split_at_mut(i * dim);
            let own = &mut own[..dim];
            let others = x.chunks_exact(dim).zip(before.chunks_exact_mut(dim));
            for (&grad, (b, grad_b)) in grads.iter().zip(others) {
                for column in 0..dim {
                    own[column] += grad * b[column];
                    grad_b[column] += grad * a[column];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::devices;
    use super::*;
    use candle_core::{Device, Var};

    /// The same of candle's operations.
    fn slow(sizes: Interaction, vectors: &Tensor, bottom: &Tensor) -> Result<Tensor> {
        let all = if sizes.bottom {
            Tensor::cat(&[vectors.clone(), bottom.unsqueeze(1)?], 1)?
        } else {
            vectors.clone()
        };
        let n = sizes.vectors();
        let pairs: Vec<u32> = sizes.pairs().map(|(i, j)| (i * n + j) as u32).collect();
        let dots = all.matmul(&all.transpose(1, 2)?)?.flatten_from(1)?;
        let dots = dots.index_select(&Tensor::new(pairs, vectors.device())?, 1)?;
        match sizes.input {
            TopInput::Vectors => Tensor::cat(&[all.flatten_from(1)?, dots], 1),
            TopInput::Bottom => Tensor::cat(&[bottom.clone(), dots], 1),
        }
    }

    fn near(a: &Tensor, b: &Tensor) -> Result<bool> {
        let largest = |x: Tensor| x.abs()?.max_all()?.to_scalar::<f32>();
        Ok(a.dims() == b.dims() && largest((a - b)?)? < 1e-4 * (1.0 + largest(b.clone())?))
    }

    #[test]
    fn it_agrees_with_candles_operations() -> Result<()> {
        for device in devices() {
            it_agrees_on(&device)?;
        }
        Ok(())
    }

    fn it_agrees_on(device: &Device) -> Result<()> {
        // The last has more than a thread block on a GPU keeps at once.
        for (tables, dim) in [(2, 1), (3, 8), (5, 16), (4, 19), (26, 128), (30, 500)] {
            for (bottom, input) in [
                (true, TopInput::Vectors),
                (true, TopInput::Bottom),
                (false, TopInput::Vectors),
            ] {
                let sizes = Interaction {
                    tables,
                    bottom,
                    dim,
                    input,
                };
                let vectors = Var::randn(0f32, 0.3, (6, tables, dim), device)?;
                let width = if bottom { dim } else { 0 };
                let dense = Var::zeros((6, width.max(1)), candle_core::DType::F32, device)?;
                if bottom {
                    dense.set(&Tensor::randn(0f32, 0.3, (6, width), device)?)?;
                }
                let weights = Tensor::randn(0f32, 1.0, (6, sizes.width()), device)?;
                let (fast, slow) = (
                    sizes.apply(&vectors, bottom.then_some(dense.as_tensor()))?,
                    slow(sizes, &vectors, &dense)?,
                );
                let zeros = fast.narrow(1, sizes.width(), fast.dim(1)? - sizes.width())?;
                assert!(zeros
                    .flatten_all()?
                    .to_vec1::<f32>()?
                    .iter()
                    .all(|&x| x == 0.0));
                let fast = fast.narrow(1, 0, sizes.width())?;
                assert!(near(&fast, &slow)?, "{sizes:?}");
                let gradients = |y: Tensor| (y * &weights)?.sum_all()?.backward();
                let (fast, slow) = (gradients(fast)?, gradients(slow)?);
                for var in [&vectors, &dense].into_iter().take(1 + usize::from(bottom)) {
                    let (Some(fast), Some(slow)) = (fast.get(var), slow.get(var)) else {
                        bail!("no gradient")
                    };
                    assert!(near(fast, slow)?, "{sizes:?}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn other_shapes_are_refused() -> Result<()> {
        let sizes = Interaction {
            tables: 3,
            bottom: true,
            dim: 4,
            input: TopInput::Vectors,
        };
        let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu);
        for (vectors, bottom) in [
            ([5, 2, 4], [5, 4]),
            ([5, 3, 5], [5, 4]),
            ([5, 3, 4], [4, 4]),
            ([5, 3, 4], [5, 0]),
        ] {
            assert!(sizes
                .apply(&zeros(&vectors)?, Some(&zeros(&bottom)?))
                .is_err());
        }
        Ok(())
    }
}
