//! Random hashes, tables and lookups for proptest, and the runner of properties.
//!
//! `CANDLE_HASHED_EMBEDDING_BAG_CASES` sets the number of cases of each property. The default is for every day; run 10,000 or
//! more after changing a loop or a kernel.

use super::{cuda, floats, integers, robe, Case, Draws, Form, Results, Table, DTYPES};
use super::{INDEX_DTYPES, MODES};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    Bits, Gradient, Hash, HashedEmbeddingBag, Mode, Overflow, Semantic,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};

/// Checks `property` for values of `strategy`, on the CPU and, where there is one, on a CUDA device.
pub fn check<S: Strategy>(strategy: S, property: impl Fn(&S::Value, &Device) -> Result<()>) {
    let cases = match std::env::var("CANDLE_HASHED_EMBEDDING_BAG_CASES") {
        Ok(cases) => cases.parse().expect("a number of cases"),
        Err(_) => 256,
    };
    let config = ProptestConfig {
        cases,
        // What a property finds becomes a test of its own instead of an entry in a file.
        failure_persistence: None,
        ..Default::default()
    };
    let devices: Vec<_> = [Some(Device::Cpu), cuda()].into_iter().flatten().collect();
    let checked = TestRunner::new(config).run(&strategy, |value| {
        for device in &devices {
            property(&value, device).map_err(|e| TestCaseError::fail(e.to_string()))?;
        }
        Ok(())
    });
    if let Err(e) = checked {
        panic!("{e}");
    }
}

pub fn dtypes() -> impl Strategy<Value = DType> {
    prop::sample::select(DTYPES.to_vec())
}

pub fn index_dtypes() -> impl Strategy<Value = DType> {
    prop::sample::select(INDEX_DTYPES.to_vec())
}

pub fn gradients() -> impl Strategy<Value = Gradient> {
    prop::sample::select(vec![Gradient::Fastest, Gradient::Deterministic])
}

pub fn modes() -> impl Strategy<Value = Mode> {
    prop::sample::select(MODES.to_vec())
}

/// Small numbers, numbers around powers of two, and any others.
pub fn numbers() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..100u64,
        (0..64u32, 0..3u64).prop_map(|(bits, more)| (1u64 << bits).wrapping_add(more) - 1),
        any::<u64>(),
    ]
}

/// A hash for rows of `embedding_dim` columns. ROBE's hashes accept tables of up to 2^31 rows.
pub fn hashes(embedding_dim: usize) -> BoxedStrategy<Hash> {
    let blocks = || prop_oneof![Just(1), Just(4), Just(8), Just(16), Just(32), 1..=40usize];
    let factors = (numbers(), numbers(), numbers(), numbers());
    prop_oneof![
        Just(Hash::default_for(embedding_dim)),
        Just(Hash::original()),
        Just(super::identity(embedding_dim)),
        (numbers(), blocks(), any::<bool>()).prop_map(|(seed, block, signed)| super::mix(
            seed,
            block,
            signed && block <= 32
        )),
        (numbers(), blocks(), any::<bool>()).prop_map(|(seed, block, signed)| super::balanced(
            seed,
            block,
            signed && block <= 32
        )),
        (factors, blocks()).prop_map(|((a, b, c, modulus), block)| super::affine(
            a,
            b,
            c,
            modulus.max(1),
            block
        )),
        (vec(1..1i64 << 31, 4), blocks()).prop_map(|(r, block)| Hash::robe(&r, block).unwrap()),
        hashes_of_rows(),
    ]
    .boxed()
}

/// A hash that reads a row tensor.
fn hashes_of_rows() -> BoxedStrategy<Hash> {
    let blocks = || prop_oneof![Just(1), Just(4), Just(8), Just(16), Just(32), 1..=40usize];
    // Below 2^30, so that sums of no column overflow.
    let numbers_of_lma = || vec(1..1i64 << 30, 51);
    let keys = (1..=32usize).prop_flat_map(|bits| (Just(bits), 1..=(32 / bits).min(20)));
    let semantic = (0..6u32, any::<u32>(), numbers(), blocks(), any::<bool>());
    prop_oneof![
        (numbers_of_lma(), keys, blocks())
            .prop_map(|(r, (bits, keys), block)| Hash::lma(&r, bits, keys, block).unwrap()),
        semantic.prop_map(|(log2_bits, keys, seed, block, signed)| {
            let key_bits = 1 << log2_bits;
            Hash::from(Semantic {
                seed,
                key_bits,
                keys_to_use: 1 + keys as usize % (64 / key_bits),
                block,
                signed: signed && block <= 32,
            })
        }),
        blocks().prop_map(Hash::slot_table),
    ]
    // A debug build would need more stack for all of them than a test has.
    .boxed()
}

fn is_robe(hash: &Hash) -> bool {
    matches!(hash, Hash::Affine(h) if h.overflow == Overflow::Refuse)
}

/// A length of `hashed_weight` that suits the hash, and grows with `size`.
pub fn len_for(hash: &Hash, size: usize) -> usize {
    match hash {
        Hash::Affine(_) | Hash::Lma(_) => hash.block() + size,
        _ => hash.block() * (1 + size / hash.block()),
    }
}

/// Widths that fill memory accesses and blocks, and all others.
pub fn embedding_dims() -> impl Strategy<Value = usize> {
    prop_oneof![
        1..=9usize,
        10..=140usize,
        prop::sample::select(vec![16, 32, 64, 128])
    ]
}

/// A table, up to the largest that its hash takes.
pub fn tables() -> impl Strategy<Value = Table> {
    let paddings = prop_oneof![
        2 => Just(None),
        1 => (0..5i64).prop_map(Some),
        1 => Just(Some(-1)),
        1 => any::<i64>().prop_map(Some),
    ];
    let large = || (1..64u32, any::<u64>()).prop_map(|(bits, rows)| (rows >> bits) as usize);
    let sizes = prop_oneof![2 => 1..60usize, 1 => large()];
    let starts = prop_oneof![3 => Just(0), 1 => large()];
    let rest = (starts, modes(), paddings);
    (embedding_dims(), 0..400usize, sizes, rest)
        .prop_flat_map(|table| (Just(table), hashes(table.0)))
        .prop_map(|((embedding_dim, size, num_embeddings, rest), hash)| {
            let (first_row, mode, padding_idx) = rest;
            let most = if is_robe(&hash) {
                1 << 31
            } else if hash.row_tensor().is_some() {
                // These have memory for each row.
                1000
            } else {
                i64::MAX as usize
            };
            let num_embeddings = num_embeddings.clamp(1, most);
            Table {
                first_row: first_row.min(most - num_embeddings),
                padding_idx,
                ..Table::new(
                    num_embeddings,
                    embedding_dim,
                    len_for(&hash, size),
                    mode,
                    hash,
                )
            }
        })
}

/// Which row an index names, chosen before the size of the table is known.
#[derive(Debug, Clone, Copy)]
pub enum Pick {
    Padding,
    Last,
    Row(u64),
}

impl Pick {
    /// The row of `table` that is picked, as an index of dtype `index` can name it.
    pub fn row(self, table: &Table, index: DType) -> i64 {
        let representable = match index {
            DType::U32 => 1 << 32,
            DType::I32 => 1 << 31,
            _ => i64::MAX as u64,
        };
        let fits = |row: i64| match index {
            DType::U32 => u32::try_from(row).is_ok(),
            DType::I32 => i32::try_from(row).is_ok(),
            _ => true,
        };
        let rows = representable.min(table.num_embeddings as u64);
        match (self, table.padding_idx) {
            (Self::Padding, Some(padding)) if fits(padding) => padding,
            (Self::Padding, _) => 0,
            (Self::Last, _) => (rows - 1) as i64,
            (Self::Row(row), _) => (row % rows) as i64,
        }
    }
}

pub fn picks() -> impl Strategy<Value = Pick> {
    prop_oneof![
        1 => Just(Pick::Padding),
        1 => Just(Pick::Last),
        // Few enough to occur more than once in a bag.
        3 => (0..5u64).prop_map(Pick::Row),
        3 => any::<u64>().prop_map(Pick::Row),
    ]
}

fn bags() -> impl Strategy<Value = (Form, Vec<Vec<Pick>>)> {
    let forms = prop::sample::select(vec![Form::Offsets, Form::OffsetsWithLast]);
    let ragged = vec(
        prop_oneof![9 => vec(picks(), 0..9), 1 => vec(picks(), 9..40)],
        0..9,
    );
    let fixed = (0..9usize, 0..9usize).prop_flat_map(|(num, len)| vec(vec(picks(), len), num));
    prop_oneof![2 => (forms, ragged), 1 => (Just(Form::Fixed), fixed)]
}

/// How the elements of a 1-D tensor are spread over its memory.
#[derive(Debug, Clone, Copy)]
enum Spread {
    Plain,
    /// So many other elements come first, and three more follow.
    Within(usize),
    EveryOther,
}

fn spreads() -> impl Strategy<Value = Spread> {
    prop_oneof![
        Just(Spread::Plain),
        (1..9usize).prop_map(Spread::Within),
        Just(Spread::EveryOther)
    ]
}

impl Spread {
    /// The whole memory: `elements`, and `filler` everywhere else.
    fn memory<T: Copy>(self, elements: &[T], filler: T) -> Vec<T> {
        match self {
            Self::Plain => elements.to_vec(),
            Self::Within(before) => [&vec![filler; before], elements, &[filler; 3]].concat(),
            Self::EveryOther => elements.iter().flat_map(|&x| [filler, x]).collect(),
        }
    }

    /// The `n` elements as a view of a 1-D tensor of the whole memory.
    fn view(self, memory: &Tensor, n: usize) -> Result<Tensor> {
        match self {
            Self::Plain => Ok(memory.clone()),
            Self::Within(before) => memory.narrow(0, before, n),
            Self::EveryOther if n == 0 => Ok(memory.clone()),
            Self::EveryOther => memory.reshape((n, 2))?.narrow(1, 1, 1)?.squeeze(1),
        }
    }
}

/// A matrix stored row by row or column by column.
#[derive(Debug, Clone, Copy)]
struct Matrix {
    rows: usize,
    columns: usize,
    by_columns: bool,
}

impl Matrix {
    /// Elements given row by row, in the order in which they are stored.
    fn stored<T: Copy>(self, elements: &[T]) -> Vec<T> {
        let Self { rows, columns, .. } = self;
        if !self.by_columns {
            return elements.to_vec();
        }
        (0..columns)
            .flat_map(|c| (0..rows).map(move |r| elements[r * columns + c]))
            .collect()
    }

    fn view(self, stored: &Tensor) -> Result<Tensor> {
        if self.by_columns {
            stored.reshape((self.columns, self.rows))?.t()
        } else {
            stored.reshape((self.rows, self.columns))
        }
    }
}

/// A case, and how its tensors are laid out in memory.
#[derive(Debug, Clone)]
pub struct Lookup {
    pub case: Case,
    form: Form,
    pub dtype: DType,
    index: DType,
    offset: DType,
    weight_spread: Spread,
    index_spread: Spread,
    offset_spread: Spread,
    sample_spread: Spread,
    /// Whether indices, per-sample weights and grad_output are stored by columns where they are matrices.
    by_columns: [bool; 3],
}

pub fn lookups() -> impl Strategy<Value = Lookup> {
    let kinds = (dtypes(), index_dtypes(), index_dtypes());
    let spreads = (spreads(), spreads(), spreads(), spreads());
    let rest = (any::<u32>(), any::<bool>(), gradients(), any::<[bool; 3]>());
    (tables(), bags(), kinds, spreads, rest).prop_map(
        |(table, (form, bags), kinds, spreads, rest)| {
            let (dtype, index, offset) = kinds;
            let (weight_spread, index_spread, offset_spread, sample_spread) = spreads;
            let (seed, weighted, gradient, by_columns) = rest;
            let bags = bags
                .into_iter()
                .map(|bag| {
                    bag.into_iter()
                        .map(|pick| pick.row(&table, index))
                        .collect()
                })
                .collect();
            let case = Case::of_bags(seed.into(), bags, Table { gradient, ..table });
            Lookup {
                case: match table.mode {
                    Mode::Sum if weighted => case.weighted(seed.into()),
                    _ => case,
                },
                form,
                dtype,
                index,
                offset,
                weight_spread,
                index_spread,
                offset_spread,
                sample_spread,
                by_columns,
            }
        },
    )
}

impl Lookup {
    fn matrix(&self, i: usize, rows: usize, columns: usize) -> Matrix {
        Matrix {
            rows,
            columns,
            by_columns: self.by_columns[i],
        }
    }

    /// Integers in this layout. They are laid out on the CPU, because candle cannot copy i32 on CUDA.
    fn integers(
        &self,
        values: &[i64],
        dtype: DType,
        spread: Spread,
        device: &Device,
    ) -> Result<Tensor> {
        if values.is_empty() {
            return integers(&[], dtype, device);
        }
        let memory = integers(&spread.memory(values, 77), dtype, &Device::Cpu)?;
        spread.view(&memory, values.len())?.to_device(device)
    }

    /// A variable of the whole memory, and the view of it that holds these values.
    fn variable(&self, values: &[f64], spread: Spread, device: &Device) -> Result<(Var, Tensor)> {
        let memory = match spread.memory(values, 1e3) {
            // candle cannot make an empty tensor on CUDA.
            memory if memory.is_empty() => floats(&[0.0], self.dtype, device)?.narrow(0, 0, 0)?,
            memory => floats(&memory, self.dtype, device)?,
        };
        let memory = Var::from_tensor(&memory)?;
        let view = spread.view(&memory, values.len())?;
        Ok((memory, view))
    }

    /// The tensors to look up with.
    pub fn inputs(&self, device: &Device) -> Result<Inputs> {
        let case = &self.case;
        let (num_bags, rows) = (case.bags.len(), case.bags.concat());
        let bag_len = rows.len().checked_div(num_bags).unwrap_or(0);
        let shape = (self.form == Form::Fixed).then_some((num_bags, bag_len));
        let indices = match shape.map(|(rows, columns)| self.matrix(0, rows, columns)) {
            None => self.integers(&rows, self.index, self.index_spread, device)?,
            Some(matrix) => {
                // Reshaping every other element would copy, on CUDA by candle.
                let spread = match self.index_spread {
                    Spread::EveryOther => Spread::Plain,
                    spread => spread,
                };
                let stored = matrix.stored(&rows);
                matrix.view(&self.integers(&stored, self.index, spread, device)?)?
            }
        };
        let offsets = match case.offsets(self.form) {
            None => None,
            Some(offsets) => {
                Some(self.integers(&offsets, self.offset, self.offset_spread, device)?)
            }
        };
        let samples = match &case.per_sample_weights {
            None => None,
            Some(weights) => Some(match shape {
                None => self.variable(weights, self.sample_spread, device)?,
                Some((rows, columns)) => {
                    let matrix = self.matrix(1, rows, columns);
                    let stored = matrix.stored(weights);
                    let (memory, view) = self.variable(&stored, self.sample_spread, device)?;
                    (memory, matrix.view(&view)?)
                }
            }),
        };
        Ok(Inputs {
            indices,
            offsets,
            samples,
            shape,
        })
    }

    /// A layer in this form on the table of the case, and the same layer in 8 or 4 bits, whose bytes are laid out as the
    /// `hashed_weight` of the lookup is.
    pub fn low_bit_layer(&self, bits: Bits, device: &Device) -> Result<HashedEmbeddingBag> {
        let weight = floats(&self.case.hashed_weight, DType::F32, device)?;
        let (layer, _) = self.case.layer(&weight, self.form)?.to_bits(bits)?;
        let layer = match self.dtype {
            DType::F64 => layer,
            dtype => layer.with_output_dtype(dtype)?,
        };
        let bytes = layer.hashed_weight().to_device(&Device::Cpu)?.to_vec1()?;
        let memory = Tensor::new(self.weight_spread.memory(&bytes, 7u8), device)?;
        layer.with_hashed_weight(self.weight_spread.view(&memory, bytes.len())?)
    }

    /// What the crate makes of it.
    pub fn run(&self, device: &Device) -> Result<Results> {
        let case = &self.case;
        let (weight_memory, hashed_weight) =
            self.variable(&case.hashed_weight, self.weight_spread, device)?;
        let layer = case.layer(&hashed_weight, self.form)?;

        let inputs = self.inputs(device)?;
        let (out, num_bags) = (inputs.forward(&layer)?, case.bags.len());
        // Multiplied as it is stored, so that the gradient that comes back is stored in the same way.
        let embedding_dim = case.table.embedding_dim;
        let matrix = self.matrix(2, num_bags, embedding_dim);
        let grad_output = floats(&matrix.stored(&case.grad_output), self.dtype, device)?;
        let loss = if matrix.by_columns {
            out.t()?
                .mul(&grad_output.reshape((embedding_dim, num_bags))?)?
        } else {
            out.mul(&grad_output.reshape((num_bags, embedding_dim))?)?
        };
        let grads = loss.sum_all()?.backward()?;

        let n = case.hashed_weight.len();
        let grad_weight = match grads.get(&weight_memory) {
            None => None,
            Some(grad) => Some(self.weight_spread.view(grad, n)?),
        };
        let grad_per_sample_weights = match &inputs.samples {
            None => None,
            Some((memory, _)) => match grads.get(memory) {
                None => None,
                Some(grad) => {
                    let grad = self.sample_spread.view(grad, case.nnz())?;
                    Some(match inputs.shape {
                        None => grad,
                        Some((rows, columns)) => self.matrix(1, rows, columns).view(&grad)?,
                    })
                }
            },
        };
        Ok(Results {
            out,
            grad_weight,
            grad_per_sample_weights,
        })
    }
}

/// The tensors of a lookup in their layouts.
pub struct Inputs {
    indices: Tensor,
    offsets: Option<Tensor>,
    /// The whole memory of the per-sample weights, and the view that is used.
    pub samples: Option<(Var, Tensor)>,
    /// That of the indices, if they are a matrix.
    shape: Option<(usize, usize)>,
}

impl Inputs {
    pub fn forward(&self, layer: &HashedEmbeddingBag) -> Result<Tensor> {
        let indices = &self.indices;
        match (&self.offsets, &self.samples) {
            (None, None) => layer.forward(indices),
            (Some(offsets), None) => layer.forward_with_offsets(indices, offsets),
            (None, Some((_, weights))) => layer.forward_weighted(indices, weights),
            (Some(offsets), Some((_, weights))) => {
                layer.forward_weighted_with_offsets(indices, offsets, weights)
            }
        }
    }
}
