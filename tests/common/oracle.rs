//! The naive oracle: lookups computed from the formulas, and the comparison with the crate.
//!
//! It knows nothing of the crate but its configuration types. It hashes with 128-bit integers and plain remainders, then
//! gathers, signs and pools with candle's own differentiable operations, in f64 on the CPU.

use super::{
    assert_equal, config, floats, integers, layer, offsets_of, signature, table_entry, Draws,
};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    Balanced, Gradient, Hash, HashedEmbeddingBag, HashedEmbeddingBagConfig, Mix, Mode, Semantic,
};

/// The slot and sign of a virtual element of a layer with the row tensor of the tests.
pub fn naive_element(hash: &Hash, row: i64, column: usize, len: usize) -> (usize, f64) {
    let block = hash.block();
    match hash.row_tensor() {
        None => naive_slot(hash, row, column, len),
        Some("signatures") => naive_slot(hash, signature(row), column, len),
        Some(_) => {
            let start = table_entry(row, column / block, len / block) * block;
            (start + column % block, 1.0)
        }
    }
}

/// The slot and sign of a virtual element, straight from the formulas. For hashes of signatures, `row` is one.
pub fn naive_slot(hash: &Hash, row: i64, column: usize, len: usize) -> (usize, f64) {
    let (block, mod64) = (hash.block() as u128, 1u128 << 64);
    let (row, column_block) = (u128::from(row as u64), column as u128 / block);
    let within = column as u128 % block;
    match hash {
        Hash::Affine(h) => {
            let sum = (row * u128::from(h.a) % mod64
                + column_block * u128::from(h.b) % mod64
                + u128::from(h.c))
                % mod64;
            let start = sum % u128::from(h.modulus) % (len as u128 - block + 1);
            ((start + within) as usize, 1.0)
        }
        Hash::Lma(lma) => {
            let r: Vec<u128> = lma.random_numbers().iter().map(|&r| r.into()).collect();
            let bits = lma.key_bits();
            let key = |position: u128| (row >> (position as usize * bits)) % (1 << bits);
            let selected = (0..lma.keys_to_use()).map(|t| {
                let sum = (r[11 + 2 * t] * column_block % mod64 + r[12 + 2 * t]) % mod64;
                key(sum % r[0] % (64 / bits as u128 - 1)) << (t * bits)
            });
            let x = selected.fold(0, |x, key| x ^ key);
            let sum = (x * r[3] + column_block * r[2] % mod64 + r[1]) % mod64;
            let start = sum % r[0] % (len as u128 - block + 1);
            ((start + within) as usize, 1.0)
        }
        Hash::Mix(Mix { seed, signed, .. })
        | Hash::Balanced(Balanced { seed, signed, .. })
        | Hash::Semantic(Semantic { seed, signed, .. }) => {
            let finalize = |h: u128| {
                let h = (h ^ (h >> 30)) * 0xBF58_476D_1CE4_E5B9 % mod64;
                let h = (h ^ (h >> 27)) * 0x94D0_49BB_1331_11EB % mod64;
                h ^ (h >> 31)
            };
            let (mod32, num_blocks) = (1u128 << 32, len as u128 / block);
            let steps = (column_block + 1) * 0x9E37_79B9_7F4A_7C15 % mod64;
            let start = (finalize(u128::from(*seed)) + steps) % mod64;
            let (fraction, signs) = if matches!(hash, Hash::Balanced(_)) {
                let product = row * ((u128::from(u64::MAX) / num_blocks + 1) % mod64);
                let (y, stratum) = ((product >> 32) % mod32, (product >> 64) % mod32);
                let turn = (stratum * 0x9E37_79B9 + (finalize(start) >> 32)) % mod32;
                let turn = (turn ^ (turn >> 15)) * 0x846C_A68B % mod32;
                let signs = ((row % mod32) ^ turn) * 0x7FEB_352D % mod32;
                let signs = (signs ^ (signs >> 15)) * 0x846C_A68B % mod32;
                let shares_a_divisor = |stride: u128| {
                    (2..=stride).any(|d| stride.is_multiple_of(d) && num_blocks.is_multiple_of(d))
                };
                let stride = (7..).find(|&stride| !shares_a_divisor(stride)).unwrap();
                ((y * stride + turn) % mod32, signs ^ (signs >> 16))
            } else {
                let hashed = match hash {
                    Hash::Semantic(h) => {
                        let keys = 64 / h.key_bits;
                        let selected =
                            (0..h.keys_to_use).map(|t| (column_block as usize + t) % keys);
                        let bits =
                            |key: usize| (mod64 - 1) >> (64 - h.key_bits) << (key * h.key_bits);
                        row & selected.fold(0, |all, key| all | bits(key))
                    }
                    _ => row,
                };
                let h = finalize((start + hashed) % mod64);
                (h >> 32, h)
            };
            let start = ((fraction * num_blocks) >> 32) * block;
            let negative = *signed && (signs >> within) & 1 == 1;
            ((start + within) as usize, if negative { -1.0 } else { 1.0 })
        }
        other => panic!("the oracle does not know {other:?}"),
    }
}

/// A virtual table folded into a `hashed_weight` of `len` values, and how its rows are pooled.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    pub num_embeddings: usize,
    pub embedding_dim: usize,
    pub len: usize,
    pub mode: Mode,
    pub hash: Hash,
    pub first_row: usize,
    pub padding_idx: Option<i64>,
    pub gradient: Gradient,
}

impl Table {
    /// A table that starts at row 0 and has no padding.
    pub fn new(
        num_embeddings: usize,
        embedding_dim: usize,
        len: usize,
        mode: Mode,
        hash: Hash,
    ) -> Self {
        Self {
            num_embeddings,
            embedding_dim,
            len,
            mode,
            hash,
            first_row: 0,
            padding_idx: None,
            gradient: Gradient::Fastest,
        }
    }

    pub fn config(&self) -> HashedEmbeddingBagConfig {
        HashedEmbeddingBagConfig {
            padding_idx: self.padding_idx,
            first_row: self.first_row,
            gradient: self.gradient,
            ..config(self.mode, self.hash)
        }
    }
}

/// How bags are passed to the crate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
    /// 2-D indices; all bags must have the same length.
    Fixed,
    Offsets,
    OffsetsWithLast,
}

pub const FORMS: [Form; 3] = [Form::Fixed, Form::Offsets, Form::OffsetsWithLast];

/// The dtypes of the inputs of a lookup.
#[derive(Debug, Clone, Copy)]
pub struct Dtypes {
    /// Of `hashed_weight` and `per_sample_weights`.
    pub weight: DType,
    pub indices: DType,
    pub offsets: DType,
}

impl Default for Dtypes {
    fn default() -> Self {
        Self {
            weight: DType::F32,
            indices: DType::I64,
            offsets: DType::I64,
        }
    }
}

/// The inputs of one lookup and of its backward pass, on the host.
#[derive(Debug, Clone)]
pub struct Case {
    pub table: Table,
    /// The rows of each bag, padding included.
    pub bags: Vec<Vec<i64>>,
    /// A weight for each index, in order.
    pub per_sample_weights: Option<Vec<f64>>,
    pub hashed_weight: Vec<f64>,
    pub grad_output: Vec<f64>,
}

/// What a lookup and its backward pass give.
#[derive(Debug, Clone)]
pub struct Results {
    pub out: Tensor,
    pub grad_weight: Option<Tensor>,
    pub grad_per_sample_weights: Option<Tensor>,
}

impl Case {
    /// These bags, with random values for everything else.
    pub fn of_bags(seed: u64, bags: Vec<Vec<i64>>, table: Table) -> Self {
        let mut draws = Draws::new(seed);
        Self {
            table,
            per_sample_weights: None,
            hashed_weight: draws.halves(table.len),
            grad_output: draws.halves(bags.len() * table.embedding_dim),
            bags,
        }
    }

    /// Random bags of these lengths. Where the table has padding, about a quarter of the indices are padding.
    pub fn random(seed: u64, lens: &[usize], table: Table) -> Self {
        let mut draws = Draws::new(!seed);
        let mut row = || match table.padding_idx {
            Some(padding) if draws.below(4) == 0 => padding,
            _ => draws.below(table.num_embeddings) as i64,
        };
        let bags = lens
            .iter()
            .map(|&len| (0..len).map(|_| row()).collect())
            .collect();
        Self::of_bags(seed, bags, table)
    }

    /// The same with random per-sample weights.
    pub fn weighted(mut self, seed: u64) -> Self {
        self.per_sample_weights = Some(Draws::new(seed).halves(self.nnz()));
        self
    }

    pub fn nnz(&self) -> usize {
        self.bags.iter().map(Vec::len).sum()
    }

    pub fn layer(&self, hashed_weight: &Tensor, form: Form) -> Result<HashedEmbeddingBag> {
        let Table {
            num_embeddings,
            embedding_dim,
            ..
        } = self.table;
        let config = HashedEmbeddingBagConfig {
            include_last_offset: form == Form::OffsetsWithLast,
            ..self.table.config()
        };
        layer(hashed_weight, num_embeddings, embedding_dim, config)
    }

    /// The offsets in this form, if it has any.
    pub fn offsets(&self, form: Form) -> Option<Vec<i64>> {
        let mut offsets = offsets_of(&self.bags);
        match form {
            Form::Fixed => return None,
            Form::Offsets => drop(offsets.pop()),
            Form::OffsetsWithLast => {}
        }
        Some(offsets)
    }

    /// What the crate makes of the case.
    pub fn run(&self, form: Form, dtypes: Dtypes, device: &Device) -> Result<Results> {
        let floats = |values: &[f64]| floats(values, dtypes.weight, device);
        let hashed_weight = Var::from_tensor(&floats(&self.hashed_weight)?)?;
        let layer = self.layer(&hashed_weight, form)?;
        let per_sample_weights = match &self.per_sample_weights {
            None => None,
            Some(weights) => Some(Var::from_tensor(&floats(weights)?)?),
        };
        let weights = per_sample_weights.as_deref();
        let out = self.forward(&layer, weights, form, dtypes, device)?;
        let grad_output = floats(&self.grad_output)?.reshape(out.shape())?;
        let grads = (&out * grad_output)?.sum_all()?.backward()?;
        Ok(Results {
            grad_weight: grads.get(&hashed_weight).cloned(),
            grad_per_sample_weights: per_sample_weights.and_then(|w| grads.get(&w).cloned()),
            out,
        })
    }

    /// What a layer on the table of the case makes of its bags. Per-sample weights are 1-D.
    pub fn forward(
        &self,
        layer: &HashedEmbeddingBag,
        per_sample_weights: Option<&Tensor>,
        form: Form,
        dtypes: Dtypes,
        device: &Device,
    ) -> Result<Tensor> {
        let mut indices = integers(&self.bags.concat(), dtypes.indices, device)?;
        if form == Form::Fixed {
            let num_bags = self.bags.len();
            let bag_len = self.nnz().checked_div(num_bags).unwrap_or(0);
            indices = indices.reshape((num_bags, bag_len))?;
        }
        let offsets = match self.offsets(form) {
            None => None,
            Some(offsets) => Some(integers(&offsets, dtypes.offsets, device)?),
        };
        let weights = per_sample_weights
            .map(|weights| weights.reshape(indices.shape()))
            .transpose()?;
        match (&offsets, &weights) {
            (None, None) => layer.forward(&indices),
            (Some(offsets), None) => layer.forward_with_offsets(&indices, offsets),
            (None, Some(weights)) => layer.forward_weighted(&indices, weights),
            (Some(offsets), Some(weights)) => {
                layer.forward_weighted_with_offsets(&indices, offsets, weights)
            }
        }
    }

    /// The same from candle's own operations in f64 on the CPU, with the gradients of its autograd.
    pub fn oracle(&self) -> Result<Results> {
        let floats = |values: &[f64]| floats(values, DType::F64, &Device::Cpu);
        let hashed_weight = Var::from_tensor(&floats(&self.hashed_weight)?)?;
        let weights = match &self.per_sample_weights {
            None => None,
            Some(weights) => Some(Var::from_tensor(&floats(weights)?)?),
        };
        let mut pooled = vec![];
        let mut position = 0;
        for bag in &self.bags {
            let mut rows = vec![];
            for &row in bag {
                if Some(row) != self.table.padding_idx {
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
        let shape = (self.bags.len(), self.table.embedding_dim);
        let out = if pooled.is_empty() {
            Tensor::zeros(shape, DType::F64, &Device::Cpu)?
        } else {
            Tensor::stack(&pooled, 0)?
        };
        let grad_output = floats(&self.grad_output)?.reshape(shape)?;
        let grads = (&out * grad_output)?.sum_all()?.backward()?;
        Ok(Results {
            out,
            grad_weight: grads.get(&hashed_weight).cloned(),
            grad_per_sample_weights: weights.and_then(|w| grads.get(&w).cloned()),
        })
    }

    /// Runs the case and compares output and gradients with the oracle's.
    #[track_caller]
    pub fn check(&self, form: Form, dtypes: Dtypes, device: &Device) -> Result<()> {
        let what = format!("{:?} {form:?} {dtypes:?}\n{self:?}", device.location());
        let results = self.run(form, dtypes, device)?;
        self.assert_results(&results, dtypes.weight, &what)
    }

    /// Compares what the crate made of the case in `dtype` with the oracle's results.
    #[track_caller]
    pub fn assert_results(&self, got: &Results, dtype: DType, what: &str) -> Result<()> {
        let want = self.oracle()?;
        // The data are exact, so only mean rounds at all: it divides.
        let ulps = if self.table.mode == Mode::Mean {
            2.0
        } else {
            0.0
        };
        assert_eq!(got.out.dtype(), dtype, "{what}");
        assert_equal(&got.out, &want.out, ulps, &format!("output of {what}"));

        let grad_weight = got
            .grad_weight
            .as_ref()
            .expect("hashed_weight is a variable");
        assert_eq!(grad_weight.dtype(), dtype, "{what}");
        // Where no row is looked up, candle's autograd gives no gradient, and the crate gives zeros.
        let zeros = |n| Tensor::zeros(n, DType::F64, &Device::Cpu);
        let want_grad_weight = match want.grad_weight {
            Some(grad) => grad,
            None => zeros(self.hashed_weight.len())?,
        };
        // Rounding errors add up over the values that meet in a slot. They do so in f32 at least, which is exact enough for
        // the two short dtypes.
        let column_blocks = self.table.embedding_dim.div_ceil(self.table.hash.block());
        let met = match dtype {
            DType::F16 | DType::BF16 => 0,
            _ => self.nnz() * column_blocks,
        };
        let sum_ulps = ulps * met.max(8) as f64;
        let what_sum = format!("grad_weight of {what}");
        assert_equal(grad_weight, &want_grad_weight, sum_ulps, &what_sum);

        assert!(
            got.grad_per_sample_weights.is_some()
                || self.per_sample_weights.is_none()
                || self.nnz() == 0,
            "no gradient of per_sample_weights of {what}"
        );
        if let Some(grad) = &got.grad_per_sample_weights {
            let want = match want.grad_per_sample_weights {
                Some(grad) => grad,
                None => zeros(self.nnz())?,
            };
            let what = format!("gradient of per_sample_weights of {what}");
            assert_equal(&grad.flatten_all()?, &want, 0.0, &what);
        }
        Ok(())
    }

    /// A row of the virtual table.
    fn row(&self, hashed_weight: &Tensor, row: i64) -> Result<Tensor> {
        // Wraps for rows outside every table, which BoundsCheck::Off lets through.
        let mut row = row.wrapping_add(self.table.first_row as i64);
        if self.table.hash.row_tensor().is_some() {
            let end = self.table.first_row + self.table.num_embeddings;
            row = (row as u64).min(end as u64 - 1) as i64;
        }
        let (slots, signs): (Vec<u32>, Vec<f64>) = (0..self.table.embedding_dim)
            .map(|column| naive_element(&self.table.hash, row, column, self.hashed_weight.len()))
            .map(|(slot, sign)| (slot as u32, sign))
            .unzip();
        let slots = Tensor::new(slots, &Device::Cpu)?;
        hashed_weight.index_select(&slots, 0)? * Tensor::new(signs, &Device::Cpu)?
    }

    fn pool(&self, rows: &[Tensor]) -> Result<Tensor> {
        let embedding_dim = self.table.embedding_dim;
        if rows.is_empty() {
            return Tensor::zeros(embedding_dim, DType::F64, &Device::Cpu);
        }
        let stacked = Tensor::stack(rows, 0)?;
        match self.table.mode {
            Mode::Sum => stacked.sum(0),
            Mode::Mean => stacked.sum(0)? / rows.len() as f64,
            Mode::Max => {
                // candle's max spreads the gradient over equal values; the contract gives it to the first of them.
                let values = stacked.to_vec2::<f64>()?;
                let winners: Vec<u32> = (0..embedding_dim)
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
