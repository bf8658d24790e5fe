//! Properties over random lookups, tables and files, against the naive oracle. `CANDLE_HASHED_EMBEDDING_BAG_CASES` sets the
//! number of cases of each property; the few hundred by default are meant for every day, 10,000 and more for a change of
//! a loop or a kernel.

mod common;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    checkpoint, Balanced, BoundsCheck, Checkpoint, Gradient, Hash, HashedEmbeddingBag,
    HashedEmbeddingBagConfig, Mix, Mode,
};
use common::{cuda, floats, integers, message, naive_slot, to_vec, Case, Draws, Form, Results};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};

/// Checks `property` for values of `strategy`, on the CPU and, where there is one, on a CUDA device.
fn check<S: Strategy>(strategy: S, property: impl Fn(&S::Value, &Device) -> Result<()>) {
    let cases = match std::env::var("CANDLE_HASHED_EMBEDDING_BAG_CASES") {
        Ok(cases) => cases.parse().expect("a number of cases"),
        Err(_) => 256,
    };
    let config = ProptestConfig {
        cases,
        // A finding becomes a test with a name.
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

fn dtypes() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::F32, DType::F16, DType::BF16, DType::F64])
}

fn index_dtypes() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::U32, DType::I32, DType::I64])
}

fn gradients() -> impl Strategy<Value = Gradient> {
    prop::sample::select(vec![Gradient::Fastest, Gradient::Deterministic])
}

fn modes() -> impl Strategy<Value = Mode> {
    prop::sample::select(vec![Mode::Sum, Mode::Mean, Mode::Max])
}

/// Small numbers, numbers around powers of two, and any others.
fn numbers() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..100u64,
        (0..64u32, 0..3u64).prop_map(|(bits, more)| (1u64 << bits).wrapping_add(more) - 1),
        any::<u64>(),
    ]
}

/// A hash for rows of `embedding_dim` columns. Those of ROBE take tables of up to 2^31 rows.
fn hashes(embedding_dim: usize) -> impl Strategy<Value = Hash> {
    let blocks = || prop_oneof![Just(1), Just(4), Just(8), Just(16), Just(32), 1..=40usize];
    let factors = (numbers(), numbers(), numbers(), numbers());
    prop_oneof![
        Just(Hash::default_for(embedding_dim)),
        Just(Hash::original()),
        Just(Hash::identity(embedding_dim)),
        (numbers(), blocks(), any::<bool>()).prop_map(|(seed, block, signed)| {
            Hash::from(Mix {
                seed,
                block,
                signed: signed && block <= 32,
            })
        }),
        (numbers(), blocks(), any::<bool>()).prop_map(|(seed, block, signed)| {
            Hash::from(Balanced {
                seed,
                block,
                signed: signed && block <= 32,
            })
        }),
        (factors, blocks()).prop_map(|((a, b, c, modulus), block)| {
            Hash::affine(a, b, c, modulus.max(1), block)
        }),
        (vec(1..1i64 << 31, 4), blocks()).prop_map(|(r, block)| Hash::robe(&r, block).unwrap()),
    ]
}

fn is_robe(hash: &Hash) -> bool {
    matches!(hash, Hash::Affine(h) if h.overflow == candle_hashed_embedding_bag::Overflow::Refuse)
}

/// A length of `hashed_weight` that suits the hash, the longer the larger `size` is.
fn len_for(hash: &Hash, size: usize) -> usize {
    match hash {
        Hash::Affine(_) => hash.block() + size,
        _ => hash.block() * (1 + size / hash.block()),
    }
}

/// Where a vector or a block is full, and everywhere else.
fn embedding_dims() -> impl Strategy<Value = usize> {
    prop_oneof![
        1..=9usize,
        10..=140usize,
        prop::sample::select(vec![16, 32, 64, 128])
    ]
}

/// Which row an index names, of a table whose size is not known yet.
#[derive(Debug, Clone, Copy)]
enum Pick {
    Padding,
    Last,
    Row(u64),
}

fn picks() -> impl Strategy<Value = Pick> {
    prop_oneof![
        1 => Just(Pick::Padding),
        1 => Just(Pick::Last),
        // Few enough to meet again in a bag.
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

/// A table, and a row that is padding.
#[derive(Debug, Clone)]
struct Table {
    hash: Hash,
    len: usize,
    num_embeddings: usize,
    first_row: usize,
    embedding_dim: usize,
    mode: Mode,
    padding_idx: Option<i64>,
}

fn tables() -> impl Strategy<Value = Table> {
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
            } else {
                i64::MAX as usize
            };
            let num_embeddings = num_embeddings.clamp(1, most);
            Table {
                hash,
                len: len_for(&hash, size),
                num_embeddings,
                first_row: first_row.min(most - num_embeddings),
                embedding_dim,
                mode,
                padding_idx,
            }
        })
}

/// How the elements of a 1-D tensor lie in memory.
#[derive(Debug, Clone, Copy)]
enum Lay {
    Plain,
    /// So many elements after the start, and not up to the end.
    Within(usize),
    EveryOther,
}

fn lays() -> impl Strategy<Value = Lay> {
    prop_oneof![
        Just(Lay::Plain),
        (1..9usize).prop_map(Lay::Within),
        Just(Lay::EveryOther)
    ]
}

impl Lay {
    /// The whole memory, with `filler` where no element lies.
    fn memory<T: Copy>(self, elements: &[T], filler: T) -> Vec<T> {
        match self {
            Self::Plain => elements.to_vec(),
            Self::Within(before) => [&vec![filler; before], elements, &[filler; 3]].concat(),
            Self::EveryOther => elements.iter().flat_map(|&x| [filler, x]).collect(),
        }
    }

    /// The elements, in a 1-D tensor of the whole memory.
    fn view(self, memory: &Tensor, n: usize) -> Result<Tensor> {
        match self {
            Self::Plain => Ok(memory.clone()),
            Self::Within(before) => memory.narrow(0, before, n),
            Self::EveryOther if n == 0 => Ok(memory.clone()),
            Self::EveryOther => memory.reshape((n, 2))?.narrow(1, 1, 1)?.squeeze(1),
        }
    }
}

/// A matrix whose rows or columns lie one after the other.
#[derive(Debug, Clone, Copy)]
struct Matrix {
    rows: usize,
    columns: usize,
    by_columns: bool,
}

impl Matrix {
    /// The elements, given row by row, in the order in which they lie.
    fn order<T: Copy>(self, elements: &[T]) -> Vec<T> {
        let Self { rows, columns, .. } = self;
        if !self.by_columns {
            return elements.to_vec();
        }
        (0..columns)
            .flat_map(|c| (0..rows).map(move |r| elements[r * columns + c]))
            .collect()
    }

    fn view(self, elements: &Tensor) -> Result<Tensor> {
        if self.by_columns {
            elements.reshape((self.columns, self.rows))?.t()
        } else {
            elements.reshape((self.rows, self.columns))
        }
    }
}

#[derive(Debug, Clone)]
struct Lookup {
    case: Case,
    form: Form,
    dtype: DType,
    index: DType,
    offset: DType,
    weight_lay: Lay,
    index_lay: Lay,
    offset_lay: Lay,
    sample_lay: Lay,
    /// Indices, per-sample weights and grad_output, where they are matrices.
    by_columns: [bool; 3],
}

/// One past the largest row that fits the dtype.
fn rows_of(index: DType) -> usize {
    match index {
        DType::U32 => 1 << 32,
        DType::I32 => 1 << 31,
        _ => i64::MAX as usize,
    }
}

fn fits(row: i64, index: DType) -> bool {
    match index {
        DType::U32 => u32::try_from(row).is_ok(),
        DType::I32 => i32::try_from(row).is_ok(),
        _ => true,
    }
}

/// The row that is picked of `table` by an index of dtype `index`.
fn picked(pick: Pick, table: &Table, index: DType) -> i64 {
    let rows = table.num_embeddings.min(rows_of(index)) as u64;
    match (pick, table.padding_idx) {
        (Pick::Padding, Some(padding)) if fits(padding, index) => padding,
        (Pick::Padding, _) => 0,
        (Pick::Last, _) => (rows - 1) as i64,
        (Pick::Row(row), _) => (row % rows) as i64,
    }
}

fn lookups() -> impl Strategy<Value = Lookup> {
    let kinds = (dtypes(), index_dtypes(), index_dtypes());
    let lays = (lays(), lays(), lays(), lays());
    let rest = (any::<u32>(), any::<bool>(), gradients(), any::<[bool; 3]>());
    (tables(), bags(), kinds, lays, rest).prop_map(|(table, (form, bags), kinds, lays, rest)| {
        let (dtype, index, offset) = kinds;
        let (weight_lay, index_lay, offset_lay, sample_lay) = lays;
        let (seed, weighted, gradient, by_columns) = rest;
        let bags: Vec<Vec<i64>> = bags
            .into_iter()
            .map(|bag| {
                bag.into_iter()
                    .map(|pick| picked(pick, &table, index))
                    .collect()
            })
            .collect();
        let mut draws = Draws::new(seed.into());
        let case = Case {
            num_embeddings: table.num_embeddings,
            first_row: table.first_row,
            embedding_dim: table.embedding_dim,
            mode: table.mode,
            hash: table.hash,
            gradient,
            padding_idx: table.padding_idx,
            per_sample_weights: None,
            hashed_weight: draws.halves(table.len),
            grad_output: draws.halves(bags.len() * table.embedding_dim),
            bags,
        };
        Lookup {
            case: match table.mode {
                Mode::Sum if weighted => case.weighted(seed.into()),
                _ => case,
            },
            form,
            dtype,
            index,
            offset,
            weight_lay,
            index_lay,
            offset_lay,
            sample_lay,
            by_columns,
        }
    })
}

impl Lookup {
    fn matrix(&self, i: usize, rows: usize, columns: usize) -> Matrix {
        Matrix {
            rows,
            columns,
            by_columns: self.by_columns[i],
        }
    }

    /// The integers in this layout; laid out on the CPU, because candle cannot copy i32 on CUDA.
    fn integers(&self, values: &[i64], dtype: DType, lay: Lay, device: &Device) -> Result<Tensor> {
        let memory = integers(&lay.memory(values, 77), dtype, &Device::Cpu)?;
        if values.is_empty() {
            // candle cannot make an empty tensor on CUDA.
            return integers(&[], dtype, device);
        }
        lay.view(&memory, values.len())?.to_device(device)
    }

    /// What the crate makes of it.
    fn run(&self, device: &Device) -> Result<Results> {
        let (case, dtype) = (&self.case, self.dtype);
        let lay = |lay: Lay, values: &[f64]| -> Result<(Var, Tensor)> {
            let memory = match lay.memory(values, 1e3) {
                memory if memory.is_empty() => floats(&[0.0], dtype, device)?.narrow(0, 0, 0)?,
                memory => floats(&memory, dtype, device)?,
            };
            let memory = Var::from_tensor(&memory)?;
            let view = lay.view(&memory, values.len())?;
            Ok((memory, view))
        };
        let (weight_memory, hashed_weight) = lay(self.weight_lay, &case.hashed_weight)?;
        let layer = case.layer(&hashed_weight, self.form)?;

        let (num_bags, rows) = (case.bags.len(), case.bags.concat());
        let bag_len = rows.len().checked_div(num_bags).unwrap_or(0);
        let shape = (self.form == Form::Fixed).then_some((num_bags, bag_len));
        let indices = match shape.map(|(rows, columns)| self.matrix(0, rows, columns)) {
            None => self.integers(&rows, self.index, self.index_lay, device)?,
            Some(matrix) => {
                let rows = matrix.order(&rows);
                // A matrix of every other element would be copied, on CUDA by candle.
                let lay = match self.index_lay {
                    Lay::EveryOther => Lay::Plain,
                    lay => lay,
                };
                matrix.view(&self.integers(&rows, self.index, lay, device)?)?
            }
        };
        let offsets = match self.form {
            Form::Fixed => None,
            form => {
                let (_, offsets) = case.inputs(form, DType::I64, DType::I64, &Device::Cpu)?;
                let offsets = offsets.expect("a form with offsets").to_vec1()?;
                Some(self.integers(&offsets, self.offset, self.offset_lay, device)?)
            }
        };
        let samples = match &case.per_sample_weights {
            None => None,
            Some(weights) => Some(match shape {
                None => lay(self.sample_lay, weights)?,
                Some((rows, columns)) => {
                    let matrix = self.matrix(1, rows, columns);
                    let (memory, view) = lay(self.sample_lay, &matrix.order(weights))?;
                    (memory, matrix.view(&view)?)
                }
            }),
        };
        let out = match (&offsets, &samples) {
            (None, None) => layer.forward(&indices)?,
            (Some(offsets), None) => layer.forward_with_offsets(&indices, offsets)?,
            (None, Some((_, weights))) => layer.forward_weighted(&indices, weights)?,
            (Some(offsets), Some((_, weights))) => {
                layer.forward_weighted_with_offsets(&indices, offsets, weights)?
            }
        };
        // Multiplied as they lie, so that the gradient that comes back lies like that too.
        let matrix = self.matrix(2, num_bags, case.embedding_dim);
        let grad_output = floats(&matrix.order(&case.grad_output), dtype, device)?;
        let loss = if matrix.by_columns {
            out.t()?
                .mul(&grad_output.reshape((case.embedding_dim, num_bags))?)?
        } else {
            out.mul(&grad_output.reshape((num_bags, case.embedding_dim))?)?
        };
        let grads = loss.sum_all()?.backward()?;

        let n = case.hashed_weight.len();
        let grad_weight = match grads.get(&weight_memory) {
            None => None,
            Some(grad) => Some(self.weight_lay.view(grad, n)?),
        };
        let grad_samples = match &samples {
            None => None,
            Some((memory, _)) => match grads.get(memory) {
                None => None,
                Some(grad) => {
                    let grad = self.sample_lay.view(grad, rows.len())?;
                    Some(match shape {
                        None => grad,
                        Some((rows, columns)) => self.matrix(1, rows, columns).view(&grad)?,
                    })
                }
            },
        };
        Ok((out, grad_weight, grad_samples))
    }
}

#[test]
fn lookups_and_gradients_are_the_oracles() {
    check(lookups(), |lookup, device| {
        let results = lookup.run(device)?;
        let what = format!("{:?}\n{lookup:?}", device.location());
        lookup.case.assert_results(&results, lookup.dtype, &what)
    });
}

/// Indices and offsets of any values, right or wrong.
#[derive(Debug, Clone)]
struct Anything {
    table: Table,
    rows: Vec<i64>,
    offsets: Vec<i64>,
    index: DType,
    offset: DType,
    include_last_offset: bool,
    seed: u64,
}

fn anything() -> impl Strategy<Value = Anything> {
    let any_row = prop_oneof![8 => picks().prop_map(Ok), 1 => any::<i64>().prop_map(Err)];
    let any_offset = prop_oneof![8 => 0..20i64, 1 => -3..0i64, 1 => any::<i64>()];
    let offsets = (vec(any_offset, 0..12), any::<bool>(), any::<bool>()).prop_map(
        |(mut offsets, sorted, from_zero)| {
            if sorted {
                offsets.sort_unstable();
            }
            if from_zero {
                offsets.first_mut().into_iter().for_each(|first| *first = 0);
            }
            offsets
        },
    );
    let dtypes = (index_dtypes(), index_dtypes());
    (
        tables(),
        vec(any_row, 0..24),
        offsets,
        dtypes,
        any::<bool>(),
        any::<u32>(),
    )
        .prop_map(
            |(table, rows, offsets, (index, offset), include_last_offset, seed)| {
                // As the dtype has them: an i32 or u32 of the same bits.
                let cast = |value: i64, dtype| match dtype {
                    DType::U32 => (value as u32).into(),
                    DType::I32 => (value as i32).into(),
                    _ => value,
                };
                let row = |row| match row {
                    Ok(pick) => picked(pick, &table, index),
                    Err(row) => cast(row, index),
                };
                Anything {
                    rows: rows.into_iter().map(row).collect(),
                    offsets: offsets
                        .into_iter()
                        .map(|value| cast(value, offset))
                        .collect(),
                    table,
                    index,
                    offset,
                    include_last_offset,
                    seed: seed.into(),
                }
            },
        )
}

impl Anything {
    /// What is said of the first offset, or else the first row, that breaks the contract.
    fn refusal(&self) -> Option<String> {
        let (table, nnz) = (&self.table, self.rows.len() as i64);
        if self.include_last_offset && self.offsets.is_empty() {
            return Some(
                "offsets must hold num_bags + 1 values when include_last_offset is set, got none"
                    .into(),
            );
        }
        for (i, &offset) in self.offsets.iter().enumerate() {
            if i == 0 && offset != 0 {
                return Some(format!(
                    "offsets must start at 0, got {offset} at position 0"
                ));
            }
            if i > 0 && offset < self.offsets[i - 1] {
                let previous = self.offsets[i - 1];
                return Some(format!(
                    "offsets must not decrease, got {offset} after {previous} at position {i}"
                ));
            }
            if offset > nnz {
                return Some(format!(
                    "offsets must not pass the number of indices ({nnz}), got {offset} at position {i}"
                ));
            }
        }
        // Indices in no bag are nobody's business.
        let end = match self.offsets.last() {
            Some(&end) if self.include_last_offset => end as usize,
            Some(_) => self.rows.len(),
            None => 0,
        };
        let is_bad = |&row: &i64| {
            (row < 0 || row >= table.num_embeddings as i64) && Some(row) != table.padding_idx
        };
        let position = self.rows[..end].iter().position(is_bad)?;
        let (n, row) = (table.num_embeddings, self.rows[position]);
        Some(format!(
            "indices must lie in 0..{n}, got {row} at position {position}"
        ))
    }

    /// The same lookup with every offset moved into the indices, which is what happens unchecked.
    fn clamped(&self) -> Case {
        let nnz = self.rows.len();
        let clamp = |&offset: &i64| offset.clamp(0, nnz as i64) as usize;
        let mut offsets: Vec<_> = self.offsets.iter().map(clamp).collect();
        if !self.include_last_offset {
            offsets.push(nnz);
        }
        let bags = offsets.windows(2).map(|ends| match ends {
            &[start, end] if start < end => self.rows[start..end].to_vec(),
            _ => vec![],
        });
        let (table, bags) = (&self.table, bags.collect::<Vec<_>>());
        let mut draws = Draws::new(self.seed);
        Case {
            num_embeddings: table.num_embeddings,
            first_row: table.first_row,
            embedding_dim: table.embedding_dim,
            mode: table.mode,
            hash: table.hash,
            gradient: Gradient::Fastest,
            padding_idx: table.padding_idx,
            per_sample_weights: None,
            hashed_weight: draws.halves(table.len),
            grad_output: draws.halves(bags.len() * table.embedding_dim),
            bags,
        }
    }
}

/// With checks, exactly what breaks the contract is refused, by position and value; without, rows are hashed like any other
/// and offsets are clamped, forward and backward.
#[test]
fn whatever_the_indices_and_offsets() {
    check(anything(), |input, device| {
        let refusal = input.refusal();
        let case = input.clamped();
        let weight = Var::from_tensor(&floats(&case.hashed_weight, DType::F32, device)?)?;
        let config = HashedEmbeddingBagConfig {
            include_last_offset: input.include_last_offset,
            ..case.config()
        };
        let (rows, columns) = (case.num_embeddings, case.embedding_dim);
        let layer = HashedEmbeddingBag::new(weight.as_tensor().clone(), rows, columns, config)?;
        let indices = integers(&input.rows, input.index, device)?;
        let offsets = integers(&input.offsets, input.offset, device)?;
        let out = layer.forward_with_offsets(&indices, &offsets);
        match &refusal {
            Some(refusal) => assert_eq!(message(out), format!("hashed-embedding-bag: {refusal}")),
            None => drop(out?),
        }
        if input.include_last_offset && input.offsets.is_empty() {
            return Ok(());
        }
        let layer = layer.with_bounds_check(BoundsCheck::Off);
        let out = layer.forward_with_offsets(&indices, &offsets)?;
        let grad_output = floats(&case.grad_output, DType::F32, device)?.reshape(out.shape())?;
        let grads = out.mul(&grad_output)?.sum_all()?.backward()?;
        let results = (out, grads.get(&weight).cloned(), None);
        let what = format!("{:?} {refusal:?}\n{input:?}", device.location());
        case.assert_results(&results, DType::F32, &what)?;
        // candle cannot make an empty variable on CUDA.
        if case.mode == Mode::Sum && !input.rows.is_empty() {
            let weights = Var::ones(indices.shape(), DType::F32, device)?;
            let out = layer.forward_weighted_with_offsets(&indices, &offsets, &weights)?;
            let grads = out.sum_all()?.backward()?;
            // Positions may be in many bags or in none: nothing is said of the values.
            let grad = grads.get(&weights).expect("the weights are a variable");
            assert_eq!(grad.shape(), indices.shape());
        }
        Ok(())
    });
}

/// Not a number, infinities, both zeros and subnormals: max is exact to the bit, the first of equals; what a sum, a mean
/// or a gradient makes of them is not finite where the formula says so.
#[test]
fn values_that_are_not_finite() {
    const KINDS: [f32; 9] = [
        0.0,
        -0.0,
        1.5,
        1.5,
        -2.5,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1e-40,
    ];
    let values = || vec(prop::sample::select(KINDS.to_vec()), 8);
    let tables = (
        1..40usize,
        modes(),
        gradients(),
        vec(vec(0..50i64, 0..6), 1..6),
    );
    let strategy = tables
        .prop_flat_map(move |table| (Just(table.clone()), hashes(table.0), values(), values()));
    check(
        strategy,
        |((embedding_dim, mode, gradient, bags), hash, values, grads), device| {
            let len = len_for(hash, 64);
            let weight: Vec<f32> = (0..len).map(|slot| values[slot % 8]).collect();
            let grad_output: Vec<f32> = (0..bags.len() * embedding_dim)
                .map(|i| grads[i % 8])
                .collect();
            let mut want = vec![];
            let mut want_grad = vec![0.0; len];
            for (bag, grads) in bags.iter().zip(grad_output.chunks(*embedding_dim)) {
                for (column, grad) in grads.iter().enumerate() {
                    let slots: Vec<_> = bag
                        .iter()
                        .map(|&row| naive_slot(hash, row, column, len))
                        .collect();
                    let value = |&(slot, sign): &(usize, f64)| weight[slot] * sign as f32;
                    if *mode == Mode::Max {
                        let mut best: Option<&(usize, f64)> = None;
                        for slot in &slots {
                            let wins = best.is_none_or(|best| {
                                let (best, value) = (value(best), value(slot));
                                value > best || value.is_nan() && !best.is_nan()
                            });
                            best = if wins { Some(slot) } else { best };
                        }
                        want.push(best.map_or(0.0, value));
                        if let Some((slot, sign)) = best {
                            want_grad[*slot] += grad * *sign as f32;
                        }
                    } else {
                        let count = if *mode == Mode::Mean {
                            bag.len().max(1) as f32
                        } else {
                            1.0
                        };
                        want.push(slots.iter().map(value).sum::<f32>() / count);
                        for (slot, sign) in &slots {
                            want_grad[*slot] += grad * *sign as f32 / count;
                        }
                    }
                }
            }
            let var = Var::from_slice(&weight, len, device)?;
            let config = HashedEmbeddingBagConfig {
                mode: *mode,
                hash: Some(*hash),
                gradient: *gradient,
                include_last_offset: true,
                ..Default::default()
            };
            let layer =
                HashedEmbeddingBag::new(var.as_tensor().clone(), 50, *embedding_dim, config)?;
            let mut offsets = vec![0];
            offsets.extend(bags.iter().scan(0, |end, bag| {
                *end += bag.len() as i64;
                Some(*end)
            }));
            let indices = integers(&bags.concat(), DType::I64, device)?;
            let out =
                layer.forward_with_offsets(&indices, &integers(&offsets, DType::I64, device)?)?;
            let got: Vec<f32> = out.flatten_all()?.to_vec1()?;
            let same_kind = |a: f32, b: f32| {
                a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= 1e-6 * a.abs().max(1.0)
            };
            for (got, want) in got.iter().zip(&want) {
                // CUDA's maximum of zeros of both signs is the positive one.
                let exact = got.to_bits() == want.to_bits()
                    || got.is_nan() && want.is_nan()
                    || device.is_cuda() && *got == 0.0 && *want == 0.0;
                assert!(
                    if *mode == Mode::Max {
                        exact
                    } else {
                        same_kind(*got, *want)
                    },
                    "{got} {want}"
                );
            }
            let grad_output = Tensor::from_slice(&grad_output, out.shape(), device)?;
            let loss = out.mul(&grad_output)?.sum_all()?.backward()?;
            let got = loss
                .get(&var)
                .expect("hashed_weight is a variable")
                .to_vec1::<f32>()?;
            for (got, want) in got.iter().zip(&want_grad) {
                assert!(same_kind(*got, *want), "gradient {got} {want}");
            }
            Ok(())
        },
    );
}

/// The slot of any element of any table, also past 2^32 slots, rows and columns: the arithmetic is that of the formulas.
#[test]
fn slots_are_the_formulas() {
    let lens = || (1..61u32, any::<u64>()).prop_map(|(bits, len)| (len >> (64 - bits)) as usize);
    let strategy = (
        embedding_dims(),
        lens(),
        vec((any::<i64>(), numbers()), 1..20),
    )
        .prop_flat_map(|(dim, len, places)| (hashes(dim), Just(len), Just(places)));
    let runner = |(hash, size, places): &(Hash, usize, Vec<(i64, u64)>), _: &Device| {
        // All but affine hashes have at most 2^32 - 1 blocks.
        let most = match hash {
            Hash::Affine(_) => usize::MAX,
            _ => hash.block() * (u32::MAX as usize - 1),
        };
        let len = len_for(hash, (*size).min(most));
        for &(row, column) in places {
            let (slot, sign) = hash.slot(row, column as usize, len)?;
            assert!(slot < len);
            let naive = naive_slot(hash, row, column as usize, len);
            assert_eq!(
                (slot, f64::from(sign)),
                naive,
                "row {row} column {column} of {len}"
            );
        }
        Ok(())
    };
    check(strategy, runner);
}

/// What is saved is what is opened: every layer under every name, to the bit.
#[test]
fn checkpoints_round_trip() {
    let layers = vec(
        (".{0,6}", tables(), any::<bool>(), dtypes(), any::<u32>()),
        0..4,
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    check(layers, |layers, device| {
        let mut saved = std::collections::BTreeMap::new();
        for (name, table, include_last_offset, dtype, seed) in layers {
            let weight = Draws::new((*seed).into()).halves(table.len);
            let config = HashedEmbeddingBagConfig {
                mode: table.mode,
                hash: Some(table.hash),
                padding_idx: table.padding_idx,
                include_last_offset: *include_last_offset,
                first_row: table.first_row,
                ..Default::default()
            };
            let weight = floats(&weight, *dtype, device)?;
            let (rows, columns) = (table.num_embeddings, table.embedding_dim);
            let layer = HashedEmbeddingBag::new(weight, rows, columns, config)?;
            saved.insert(name.clone(), layer);
        }
        checkpoint::save(&path, [], saved.iter())?;
        let opened = Checkpoint::open(&path)?;
        assert!(opened.layers().map(|(name, _)| name).eq(saved.keys()));
        for (name, layer) in &saved {
            let dtype = layer.hashed_weight().dtype();
            let again = opened.hashed_embedding_bag(name, dtype, device)?;
            let all = |layer: &HashedEmbeddingBag| -> Result<_> {
                let sizes = (layer.num_embeddings(), layer.embedding_dim());
                Ok((sizes, layer.config(), to_vec(layer.hashed_weight())?))
            };
            assert_eq!(all(&again)?, all(layer)?);
        }
        Ok(())
    });
}
