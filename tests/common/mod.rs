//! What the integration tests share: devices, exactly representable test data, and the naive oracle.
//!
//! The oracle knows nothing of the crate but its configuration types: it hashes with 128-bit integers and plain
//! remainders, and gathers, signs and pools with candle's own differentiable ops in f64 on the CPU.
#![allow(dead_code)] // each test file uses a part

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    Balanced, Gradient, Hash, HashedEmbeddingBag, HashedEmbeddingBagConfig, Mix, Mode,
};
use std::hash::{DefaultHasher, Hash as _, Hasher};
use std::process::Command;

/// Runs a test body on the CPU and, where there is one, on the first CUDA device.
pub fn on_each_device(body: impl Fn(&Device) -> Result<()>) -> Result<()> {
    body(&Device::Cpu)?;
    match cuda() {
        Some(device) => body(&device),
        None => Ok(()),
    }
}

/// The first CUDA device; says so when the half of a test that needs it is skipped.
pub fn cuda() -> Option<Device> {
    if !cfg!(feature = "cuda") {
        eprintln!("CUDA half skipped: built without the feature cuda");
        return None;
    }
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(e) => {
            eprintln!("CUDA half skipped: no CUDA device ({e})");
            None
        }
    }
}

/// Runs `body` in processes of 1, 2 and 5 threads, which must `report` the same bits. `test` is the name of the test that calls
/// this, whose process is started again: the number of candle's threads is that of a process.
pub fn same_on_any_number_of_threads(
    test: &str,
    body: impl FnOnce(&mut dyn FnMut(&[f64])) -> Result<()>,
) -> Result<()> {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    const AGAIN: &str = "CANDLE_HASHED_EMBEDDING_BAG_AGAIN";
    if std::env::var_os(AGAIN).is_some() {
        let threads = candle_core::utils::barrier_pool().n_workers() + 1;
        let wanted = std::env::var(THREADS).map_err(candle_core::Error::wrap)?;
        assert_eq!(threads.to_string(), wanted);
        let mut bits = DefaultHasher::new();
        body(&mut |values| {
            for value in values {
                value.to_bits().hash(&mut bits);
            }
        })?;
        println!("\n{AGAIN} {:016x}", bits.finish());
        return Ok(());
    }
    let run = |threads: usize| -> Result<String> {
        let output = Command::new(std::env::current_exe()?)
            .args([test, "--exact", "--nocapture"])
            .env(THREADS, threads.to_string())
            .env(AGAIN, "")
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let bits = text.lines().find_map(|line| line.strip_prefix(AGAIN));
        match bits {
            Some(bits) if output.status.success() => Ok(bits.to_string()),
            _ => panic!("{threads} threads: {output:?}"),
        }
    };
    let want = run(1)?;
    for threads in [2, 5] {
        assert_eq!(run(threads)?, want, "{threads} threads");
    }
    Ok(())
}

/// A small deterministic generator (an LCG, nothing like the hash under test).
pub struct Draws(u64);

impl Draws {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2) + 1)
    }

    /// A number in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    /// One of -1, -0.5, 0, 0.5, 1: sums of a few dozen are exact in every float dtype, whatever the order, and equal
    /// values are frequent.
    pub fn halves(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.below(5) as f64 / 2.0 - 1.0).collect()
    }
}

/// The slot and sign of a virtual element, straight from the formulas.
pub fn naive_slot(hash: &Hash, row: i64, column: usize, len: usize) -> (usize, f64) {
    let (block, mod64) = (hash.block() as u128, 1u128 << 64);
    let (row, run) = (u128::from(row as u64), column as u128 / block);
    let within = column as u128 % block;
    match hash {
        Hash::Affine(h) => {
            let sum =
                (row * u128::from(h.a) % mod64 + run * u128::from(h.b) % mod64 + u128::from(h.c))
                    % mod64;
            let start = sum % u128::from(h.modulus) % (len as u128 - block + 1);
            ((start + within) as usize, 1.0)
        }
        Hash::Mix(Mix { seed, signed, .. }) | Hash::Balanced(Balanced { seed, signed, .. }) => {
            let finalize = |h: u128| {
                let h = (h ^ (h >> 30)) * 0xBF58_476D_1CE4_E5B9 % mod64;
                let h = (h ^ (h >> 27)) * 0x94D0_49BB_1331_11EB % mod64;
                h ^ (h >> 31)
            };
            let (mod32, num_blocks) = (1u128 << 32, len as u128 / block);
            let steps = (run + 1) * 0x9E37_79B9_7F4A_7C15 % mod64;
            let start = (finalize(u128::from(*seed)) + steps) % mod64;
            let (place, signs) = if matches!(hash, Hash::Balanced(_)) {
                let product = row * ((u128::from(u64::MAX) / num_blocks + 1) % mod64);
                let (fraction, stratum) = ((product >> 32) % mod32, (product >> 64) % mod32);
                let turn = (stratum * 0x9E37_79B9 + (finalize(start) >> 32)) % mod32;
                let turn = (turn ^ (turn >> 15)) * 0x846C_A68B % mod32;
                let signs = ((row % mod32) ^ turn) * 0x7FEB_352D % mod32;
                let signs = (signs ^ (signs >> 15)) * 0x846C_A68B % mod32;
                let shares_a_divisor = |stride: u128| {
                    (2..=stride).any(|d| stride.is_multiple_of(d) && num_blocks.is_multiple_of(d))
                };
                let stride = (7..).find(|&stride| !shares_a_divisor(stride)).unwrap();
                ((fraction * stride + turn) % mod32, signs ^ (signs >> 16))
            } else {
                let h = finalize((start + row) % mod64);
                (h >> 32, h)
            };
            let start = (place * num_blocks) >> 32;
            let negative = *signed && (signs >> within) & 1 == 1;
            (
                (start * block + within) as usize,
                if negative { -1.0 } else { 1.0 },
            )
        }
        other => panic!("the oracle does not know {other:?}"),
    }
}

/// One lookup, with everything on the host.
#[derive(Debug, Clone)]
pub struct Case {
    pub num_embeddings: usize,
    pub first_row: usize,
    pub embedding_dim: usize,
    pub mode: Mode,
    pub hash: Hash,
    pub gradient: Gradient,
    pub padding_idx: Option<i64>,
    /// The rows of each bag, padding included.
    pub bags: Vec<Vec<i64>>,
    /// A weight for each index, in order.
    pub per_sample_weights: Option<Vec<f64>>,
    pub hashed_weight: Vec<f64>,
    pub grad_output: Vec<f64>,
}

/// How the bags of a case are handed over.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
    /// 2-D indices; all bags must have one length.
    Fixed,
    Offsets,
    OffsetsWithLast,
}

/// output, grad_weight and the gradient of per_sample_weights
pub type Results = (Tensor, Option<Tensor>, Option<Tensor>);

impl Case {
    /// A case with random contents of these shapes; `lens` are the lengths of its bags.
    #[allow(clippy::too_many_arguments)]
    pub fn random(
        seed: u64,
        lens: &[usize],
        num_embeddings: usize,
        embedding_dim: usize,
        len: usize,
        mode: Mode,
        hash: Hash,
        padding_idx: Option<i64>,
    ) -> Self {
        let mut draws = Draws::new(seed);
        let bags = lens
            .iter()
            .map(|&len| {
                (0..len)
                    .map(|_| match padding_idx {
                        Some(padding) if draws.below(4) == 0 => padding,
                        _ => draws.below(num_embeddings) as i64,
                    })
                    .collect()
            })
            .collect();
        Self {
            num_embeddings,
            first_row: 0,
            embedding_dim,
            mode,
            hash,
            gradient: Gradient::Fastest,
            padding_idx,
            bags,
            per_sample_weights: None,
            hashed_weight: draws.halves(len),
            grad_output: draws.halves(lens.len() * embedding_dim),
        }
    }

    pub fn weighted(mut self, seed: u64) -> Self {
        self.per_sample_weights = Some(Draws::new(seed).halves(self.nnz()));
        self
    }

    pub fn nnz(&self) -> usize {
        self.bags.iter().map(Vec::len).sum()
    }

    pub fn config(&self) -> HashedEmbeddingBagConfig {
        HashedEmbeddingBagConfig {
            mode: self.mode,
            hash: Some(self.hash),
            padding_idx: self.padding_idx,
            first_row: self.first_row,
            gradient: self.gradient,
            ..Default::default()
        }
    }

    pub fn layer(&self, hashed_weight: &Tensor, form: Form) -> Result<HashedEmbeddingBag> {
        let config = HashedEmbeddingBagConfig {
            include_last_offset: form == Form::OffsetsWithLast,
            ..self.config()
        };
        HashedEmbeddingBag::new(
            hashed_weight.clone(),
            self.num_embeddings,
            self.embedding_dim,
            config,
        )
    }

    /// Indices and offsets in this form and these dtypes.
    pub fn inputs(
        &self,
        form: Form,
        index: DType,
        offset: DType,
        device: &Device,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let rows: Vec<i64> = self.bags.concat();
        let nnz = rows.len();
        let indices = integers(&rows, index, device)?;
        if form == Form::Fixed {
            let num_bags = self.bags.len();
            return Ok((
                indices.reshape((num_bags, nnz.checked_div(num_bags).unwrap_or(0)))?,
                None,
            ));
        }
        let mut offsets = vec![0];
        offsets.extend(self.bags.iter().scan(0, |end, bag| {
            *end += bag.len() as i64;
            Some(*end)
        }));
        if form == Form::Offsets {
            offsets.pop();
        }
        Ok((indices, Some(integers(&offsets, offset, device)?)))
    }

    /// What the crate makes of the case.
    pub fn run(
        &self,
        form: Form,
        dtype: DType,
        index: DType,
        offset: DType,
        device: &Device,
    ) -> Result<Results> {
        let hashed_weight = Var::from_tensor(&floats(&self.hashed_weight, dtype, device)?)?;
        let layer = self.layer(&hashed_weight, form)?;
        let (indices, offsets) = self.inputs(form, index, offset, device)?;
        let per_sample_weights = match &self.per_sample_weights {
            None => None,
            Some(weights) => Some(Var::from_tensor(
                &floats(weights, dtype, device)?.reshape(indices.shape())?,
            )?),
        };
        let out = match (&offsets, &per_sample_weights) {
            (None, None) => candle_nn::Module::forward(&layer, &indices)?,
            (Some(offsets), None) => layer.forward_with_offsets(&indices, offsets)?,
            (None, Some(weights)) => layer.forward_weighted(&indices, weights)?,
            (Some(offsets), Some(weights)) => {
                layer.forward_weighted_with_offsets(&indices, offsets, weights)?
            }
        };
        let grad_output = floats(&self.grad_output, dtype, device)?.reshape(out.shape())?;
        let grads = (&out * grad_output)?.sum_all()?.backward()?;
        Ok((
            out,
            grads.get(&hashed_weight).cloned(),
            per_sample_weights.and_then(|w| grads.get(&w).cloned()),
        ))
    }

    /// The same from candle's own ops in f64 on the CPU; gradients by its autograd.
    pub fn oracle(&self) -> Result<Results> {
        let device = &Device::Cpu;
        let hashed_weight = Var::from_tensor(&floats(&self.hashed_weight, DType::F64, device)?)?;
        let weights = match &self.per_sample_weights {
            None => None,
            Some(weights) => Some(Var::from_tensor(&floats(weights, DType::F64, device)?)?),
        };
        let mut pooled = vec![];
        let mut position = 0;
        for bag in &self.bags {
            let mut rows = vec![];
            for &row in bag {
                if Some(row) != self.padding_idx {
                    let mut values = self.row(&hashed_weight, row)?;
                    if let Some(weights) = &weights {
                        values = values.broadcast_mul(&weights.narrow(0, position, 1)?)?;
                    }
                    rows.push(values);
                }
                position += 1;
            }
            pooled.push(self.pool(&rows)?);
        }
        let shape = (self.bags.len(), self.embedding_dim);
        let out = if pooled.is_empty() {
            Tensor::zeros(shape, DType::F64, device)?
        } else {
            Tensor::stack(&pooled, 0)?
        };
        let grad_output = floats(&self.grad_output, DType::F64, device)?.reshape(shape)?;
        let grads = (&out * grad_output)?.sum_all()?.backward()?;
        Ok((
            out,
            grads.get(&hashed_weight).cloned(),
            weights.and_then(|w| grads.get(&w).cloned()),
        ))
    }

    /// Compares what the crate made of the case in `dtype` with the oracle's results.
    #[track_caller]
    pub fn assert_results(&self, got: &Results, dtype: DType, what: &str) -> Result<()> {
        let (out, grad_weight, grad_weights) = got;
        let (want, want_grad_weight, want_grad_weights) = self.oracle()?;
        // Only mean, which divides, rounds at all.
        let ulps = if self.mode == Mode::Mean { 2.0 } else { 0.0 };
        assert_eq!(out.dtype(), dtype, "{what}");
        assert_equal(out, &want, ulps, &format!("output of {what}"));

        let grad_weight = grad_weight.as_ref().expect("hashed_weight is a variable");
        assert_eq!(grad_weight.dtype(), dtype, "{what}");
        // Where no row is looked up, candle's autograd has no gradient at all; ours is zeros.
        let zeros = Tensor::zeros(self.hashed_weight.len(), DType::F64, &Device::Cpu)?;
        let want = want_grad_weight.unwrap_or(zeros);
        // Its errors add up, in f32 at least, with as many values as may meet in a slot.
        let met = match dtype {
            DType::F16 | DType::BF16 => 0,
            _ => self.nnz() * self.embedding_dim.div_ceil(self.hash.block()),
        };
        let sum_ulps = ulps * met.max(8) as f64;
        let what_sum = format!("grad_weight of {what}");
        assert_equal(grad_weight, &want, sum_ulps, &what_sum);

        if let Some(grad_weights) = grad_weights {
            let zeros = Tensor::zeros(self.nnz(), DType::F64, &Device::Cpu)?;
            let want = want_grad_weights.unwrap_or(zeros);
            let what = format!("gradient of per_sample_weights of {what}");
            assert_equal(&grad_weights.flatten_all()?, &want, 0.0, &what);
        }
        Ok(())
    }

    /// A row of the virtual table.
    fn row(&self, hashed_weight: &Tensor, row: i64) -> Result<Tensor> {
        // It wraps for a row that is in no table.
        let row = row.wrapping_add(self.first_row as i64);
        let (slots, signs): (Vec<u32>, Vec<f64>) = (0..self.embedding_dim)
            .map(|column| naive_slot(&self.hash, row, column, self.hashed_weight.len()))
            .map(|(slot, sign)| (slot as u32, sign))
            .unzip();
        let slots = Tensor::new(slots, &Device::Cpu)?;
        hashed_weight.index_select(&slots, 0)? * Tensor::new(signs, &Device::Cpu)?
    }

    fn pool(&self, rows: &[Tensor]) -> Result<Tensor> {
        if rows.is_empty() {
            return Tensor::zeros(self.embedding_dim, DType::F64, &Device::Cpu);
        }
        let stacked = Tensor::stack(rows, 0)?;
        match self.mode {
            Mode::Sum => stacked.sum(0),
            Mode::Mean => stacked.sum(0)? / rows.len() as f64,
            Mode::Max => {
                // candle's max spreads its gradient over equals; the contract gives it to the first of them.
                let values = stacked.to_vec2::<f64>()?;
                let winners: Vec<u32> = (0..self.embedding_dim)
                    .map(|column| {
                        let beats = |&a: &usize, &b: &usize| {
                            let order = values[a][column].partial_cmp(&values[b][column]);
                            order.unwrap_or(std::cmp::Ordering::Equal).then(b.cmp(&a))
                        };
                        (0..rows.len()).max_by(beats).unwrap_or(0) as u32
                    })
                    .collect();
                let winners = Tensor::new(winners, &Device::Cpu)?.unsqueeze(0)?;
                stacked.gather(&winners, 0)?.squeeze(0)
            }
        }
    }
}

/// A 1-D float tensor.
pub fn floats(values: &[f64], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::from_slice(values, values.len(), &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(device)
}

/// A 1-D integer tensor.
pub fn integers(values: &[i64], dtype: DType, device: &Device) -> Result<Tensor> {
    let n = values.len();
    let tensor = match dtype {
        DType::U32 => Tensor::from_iter(values.iter().map(|&v| v as u32), &Device::Cpu),
        DType::I32 => Tensor::from_iter(values.iter().map(|&v| v as i32), &Device::Cpu),
        _ => Tensor::from_slice(values, n, &Device::Cpu),
    }?;
    if n == 0 && device.is_cuda() {
        // An allocation of nothing is an error of the driver: an empty view of something.
        return integers(&[0], dtype, device)?.narrow(0, 0, 0);
    }
    tensor.to_device(device)
}

/// The message of an error, without the backtrace that RUST_BACKTRACE adds.
#[track_caller]
pub fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(e) => e.to_string().lines().next().unwrap_or_default().to_string(),
    }
}

/// All values, in f64 on the host.
pub fn to_vec(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()
}

/// `got` equals `want` once that is rounded to the dtype of `got`, within `ulps` roundings of the larger.
#[track_caller]
pub fn assert_equal(got: &Tensor, want: &Tensor, ulps: f64, what: &str) {
    let same = || -> Result<bool> {
        let epsilon = match got.dtype() {
            DType::F16 => 2f64.powi(-11),
            DType::BF16 => 2f64.powi(-8),
            DType::F32 => 2f64.powi(-24),
            _ => 2f64.powi(-53),
        };
        let rounded = to_vec(&want.to_dtype(got.dtype())?)?;
        let values = to_vec(got)?;
        let close = |(g, w): (&f64, &f64)| {
            g == w || (g - w).abs() <= ulps * 2.0 * epsilon * w.abs().max(1.0)
        };
        Ok(got.dims() == want.dims() && values.iter().zip(&rounded).all(close))
    };
    match same() {
        Ok(true) => {}
        Ok(false) => panic!("{what}\n  got {got}\n want {want}"),
        Err(e) => panic!("{what}: {e}"),
    }
}
