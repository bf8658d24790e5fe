//! Row tensors from records: signatures and slot tables with which rows that are used alike share memory.
//!
//! A record is what is looked up together, such as the rows of a click, one or several of each field, or the items of one user.
//! Two rows are alike if the same records hold them: the *Jaccard similarity* of two rows is the number of records that hold both,
//! over the number of those that hold either.
//!
//! A *MinHash* of a row is the smallest hash of the records that hold it. Two rows agree in one with a probability that is their
//! similarity. So where the place of a row is a hash of `k` MinHashes, two rows share it with the `k`-th power of that.
//!
//! | for | use | bytes per row |
//! |---|---|---|
//! | [`Hash::semantic`](crate::Hash::semantic) (keys of 16 bits), [`Hash::lma`](crate::Hash::lma) | [`Records::signatures`] | 8 |
//! | [`Hash::slot_table`](crate::Hash::slot_table) | [`Records::slot_table`] | 4 for each block of columns |
//!
//! The ideas are those of SCMA (["Semantically Constrained Memory Allocation"](https://arxiv.org/abs/2103.06124)) and of LMA, its form
//! without a table.
//!
//! ```
//! use candle_core::{DType, Device};
//! use candle_hashed_embedding_bag::semantic::Records;
//! use candle_hashed_embedding_bag::{hashed_embedding_bag_with_row_tensor, Hash, HashedEmbeddingBagConfig};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! # fn main() -> candle_core::Result<()> {
//! // Users, and which of 1,000 films they have seen: everybody either the even or the odd ones of ten.
//! let seen = (0..5_000).map(|user| (0..5).map(move |i| (0, user % 1_000 / 10 * 10 + user % 2 + 2 * i)));
//! let records = Records::sample([1_000], seen, 125_000, 0)?;
//! assert_eq!(records.similarity(20, 28)?, 1.0);
//! assert_eq!(records.similarity(20, 21)?, 0.0);
//!
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let config = HashedEmbeddingBagConfig { hash: Some(Hash::semantic(8)), ..Default::default() };
//! let signatures = records.signatures(16)?;
//! let films = hashed_embedding_bag_with_row_tensor(1_000, 32, 0.25, &signatures, config, vb)?;
//! let vectors = films.to_table(20..30)?.to_vec2::<f32>()?;
//! assert_eq!(vectors[0], vectors[8]);
//! assert_ne!(vectors[0], vectors[1]);
//! # Ok(())
//! # }
//! ```

use crate::error::bail;
use crate::hash::{finalize, GOLDEN};
use crate::op::{check_dtype, check_output};
use crate::parallel::Team;
use candle_core::{DType, Device, Result, Tensor, WithDType};

/// Rows that a thread takes at a time.
const TASK_ROWS: usize = 1 << 10;

/// Fewer hashes than this are not worth a second thread.
const MIN_HASHES_PER_THREAD: usize = 1 << 16;

/// What the seed is combined with, so that random numbers for one purpose do not depend on those for another.
const DRAWS: u64 = 1;
const MIN_HASHES: u64 = 2;
const UNSEEN: u64 = 3;

/// A sample of records, and which of them hold each row.
///
/// It takes 8 bytes per row, and 4 per row of a record of the sample, three times as much while it is made.
#[derive(Debug, Clone)]
pub struct Records {
    /// The records that hold row `r` are `positions[starts[r]..starts[r + 1]]`, in order.
    starts: Vec<usize>,
    positions: Vec<u32>,
    num_records: usize,
    /// What hashes of records, and of rows that none holds, start from.
    min_hash_key: u64,
    unseen_key: u64,
}

impl Records {
    /// Draws `most` of the records, or takes all if there are no more. They are read one by one, and only those of the sample are
    /// kept; 125,000 were enough for the authors of SCMA.
    ///
    /// * `fields`: the number of rows of each field, such as those of the tables of a collection, in its order. The rows of a field
    ///   follow those of the fields before it.
    /// * `records`: each as pairs of a field and a row of it, in any order. A record may hold several rows of a field, or none.
    ///
    /// The sample depends on the records, their order and the seed alone.
    ///
    /// # Errors
    /// No field or record, a field or a row that is out of range (the message gives the record), or a sample of none or of 2^32
    /// records or more.
    pub fn sample<R: IntoIterator<Item = (usize, usize)>>(
        fields: impl IntoIterator<Item = usize>,
        records: impl IntoIterator<Item = R>,
        most: usize,
        seed: u64,
    ) -> Result<Self> {
        if most == 0 || u32::try_from(most).is_err() {
            bail!("a sample must have 1..2^32 records, got {most}");
        }
        let mut first_rows = vec![0usize];
        for rows in fields {
            match first_rows[first_rows.len() - 1].checked_add(rows) {
                Some(end) => first_rows.push(end),
                None => bail!("the rows of all fields are too many"),
            }
        }
        let num_rows = first_rows[first_rows.len() - 1];
        if num_rows == 0 {
            bail!("records need at least one field with rows");
        }
        let (mut sample, mut num_seen) = (vec![], 0u64);
        let draws_key = key(seed, DRAWS);
        for record in records {
            let mut rows = vec![];
            for (field, row) in record {
                match *first_rows.get(field..).unwrap_or_default() {
                    [first, end, ..] if row < end - first => rows.push(first + row),
                    [first, end, ..] => bail!(
                        "record {num_seen}: row {row} of field {field} is outside its {} rows",
                        end - first
                    ),
                    _ => bail!(
                        "record {num_seen}: there are {} fields, got number {field}",
                        first_rows.len() - 1
                    ),
                }
            }
            rows.sort_unstable();
            rows.dedup();
            rows.shrink_to_fit();
            // Each record so far is in the sample with the same probability.
            if sample.len() < most {
                sample.push(rows);
            } else {
                let below = u128::from(random(draws_key, num_seen)) * (u128::from(num_seen) + 1);
                if let Some(place) = sample.get_mut((below >> 64) as usize) {
                    *place = rows;
                }
            }
            num_seen += 1;
        }
        if sample.is_empty() {
            bail!("there must be at least one record");
        }
        Ok(Self::new(num_rows, &sample, seed))
    }

    fn new(num_rows: usize, sample: &[Vec<usize>], seed: u64) -> Self {
        let mut starts = vec![0; num_rows + 1];
        for &row in sample.iter().flatten() {
            starts[row + 1] += 1;
        }
        for row in 0..num_rows {
            starts[row + 1] += starts[row];
        }
        let mut positions = vec![0; starts[num_rows]];
        // While they are filled in, each start is where the next position goes, and in the end where those of the next row start.
        for (position, rows) in (0..).zip(sample) {
            for &row in rows {
                positions[starts[row]] = position;
                starts[row] += 1;
            }
        }
        starts.rotate_right(1);
        starts[0] = 0;
        Self {
            starts,
            positions,
            num_records: sample.len(),
            min_hash_key: key(seed, MIN_HASHES),
            unseen_key: key(seed, UNSEEN),
        }
    }

    /// The number of rows of all fields.
    pub fn num_rows(&self) -> usize {
        self.starts.len() - 1
    }

    /// The number of records of the sample.
    pub fn num_records(&self) -> usize {
        self.num_records
    }

    /// The numbers of the records that hold a row, counted through the rows of all fields.
    fn of(&self, row: usize) -> &[u32] {
        &self.positions[self.starts[row]..self.starts[row + 1]]
    }

    /// The Jaccard similarity of two rows, counted through the rows of all fields, in the sample; 0 if no record holds either.
    ///
    /// # Errors
    /// A row that does not exist.
    pub fn similarity(&self, a: usize, b: usize) -> Result<f64> {
        let num_rows = self.num_rows();
        if a.max(b) >= num_rows {
            bail!("there are {num_rows} rows, got {a} and {b}");
        }
        let (a, b) = (self.of(a), self.of(b));
        let both = a.iter().filter(|&at| b.binary_search(at).is_ok()).count();
        Ok(both as f64 / (a.len() + b.len() - both).max(1) as f64)
    }

    /// A signature of each row: i64, `(num_rows,)`, on the CPU. It is `64 / key_bits` keys, the first in the lowest bits, each the
    /// lowest bits of a MinHash. A row that no record holds has one of its own, by its number.
    ///
    /// Keys of `b` bits also agree by chance, one in `2^b`. The same with any number of threads.
    ///
    /// # Errors
    /// `key_bits` outside `1..=32`.
    pub fn signatures(&self, key_bits: usize) -> Result<Tensor> {
        check_key_bits(key_bits)?;
        let num_keys = 64 / key_bits;
        let mask = u64::MAX >> (64 - key_bits);
        let signatures = self.for_each_row(num_keys, 1, |row, to: &mut [i64]| {
            let signature = match self.of(row) {
                [] => self.unseen(row, 0),
                records => (0..num_keys).fold(0, |signature, key| {
                    let key_of_row = self.min_hash(records, key) & mask;
                    signature | key_of_row << (key * key_bits)
                }),
            };
            to[0] = signature as i64;
        });
        Tensor::from_vec(signatures, self.num_rows(), &Device::Cpu)
    }

    /// A slot table: u32, `(num_rows, column_blocks)`, on the CPU, of numbers below `num_blocks`, which is the length of
    /// `hashed_weight` over that of a block. Each is a hash of `min_hashes` MinHashes, others for each block of columns. SCMA takes two.
    /// A row that no record holds has places of its own, by its number.
    ///
    /// The same with any number of threads.
    ///
    /// # Errors
    /// No column block or MinHash, `num_blocks` outside `1..2^32`, or a table too large for one tensor.
    pub fn slot_table(
        &self,
        column_blocks: usize,
        num_blocks: usize,
        min_hashes: usize,
    ) -> Result<Tensor> {
        if column_blocks == 0 || min_hashes == 0 {
            bail!("a slot table needs column blocks and MinHashes, got {column_blocks} and {min_hashes}");
        }
        let Some(num_blocks) = u32::try_from(num_blocks).ok().filter(|&n| n > 0) else {
            bail!("num_blocks must lie in 1..2^32, got {num_blocks}");
        };
        check_output(self.num_rows(), column_blocks)?;
        let hashes = column_blocks.saturating_mul(min_hashes);
        let table = self.for_each_row(hashes, column_blocks, |row, to: &mut [u32]| {
            let records = self.of(row);
            for (i, to) in to.iter_mut().enumerate() {
                let hash = match records {
                    [] => self.unseen(row, i),
                    records => (0..min_hashes).fold(i as u64, |hash, t| {
                        finalize(hash ^ self.min_hash(records, i * min_hashes + t))
                    }),
                };
                *to = ((u128::from(hash) * u128::from(num_blocks)) >> 64) as u32;
            }
        });
        Tensor::from_vec(table, (self.num_rows(), column_blocks), &Device::Cpu)
    }

    /// The table of SCMA's own programs, their `big_min_hash_table`, from the random numbers that they drew: i64,
    /// `(num_rows, columns)`, on the CPU. [`StateDict::scma`](crate::StateDict::scma) makes a slot table of it.
    ///
    /// * `a`: i64, `(k, 3, columns)`; `a4`: i64, `(k,)`.
    ///
    /// Entry `(row, j)` is the sum over `i` of `a4[i]` times the smallest, among the records `q` of the row, counted from 1, of
    /// `(q a[i, 0, j] + q^2 a[i, 1, j] + q^3 a[i, 2, j]) mod num_records`. A row that no record holds is as if a random one did.
    ///
    /// # Errors
    /// Tensors of another dtype or shape.
    pub fn scma_table(&self, a: &Tensor, a4: &Tensor) -> Result<Tensor> {
        check_dtype("a", a, &[DType::I64])?;
        check_dtype("a4", a4, &[DType::I64])?;
        let (k, columns) = match (a.dims(), a4.dims()) {
            (&[k, 3, columns], &[n]) if k == n && columns > 0 => (k, columns),
            (a, a4) => {
                bail!("a and a4 must have shapes [k, 3, columns] and [k], got {a:?} and {a4:?}")
            }
        };
        let (a, a4) = (a.flatten_all()?.to_vec1::<i64>()?, a4.to_vec1::<i64>()?);
        let n = self.num_records as i64;
        let table = self.for_each_row(k * columns, columns, |row, to: &mut [i64]| {
            let any = [(self.unseen(row, 0) % n as u64) as u32];
            let records = match self.of(row) {
                [] => &any[..],
                records => records,
            };
            for (j, to) in to.iter_mut().enumerate() {
                let sum = (0..k).fold(0i64, |sum, i| {
                    let [a1, a2, a3] = [0, 1, 2].map(|power| a[(3 * i + power) * columns + j]);
                    let hash = |&record: &u32| {
                        let q = i64::from(record) + 1;
                        // In Horner's form, which is the same modulo 2^64.
                        let sum = q.wrapping_mul(a3).wrapping_add(a2);
                        let sum = q.wrapping_mul(sum).wrapping_add(a1);
                        q.wrapping_mul(sum).rem_euclid(n)
                    };
                    let least = records.iter().map(hash).min().unwrap_or_default();
                    sum.wrapping_add(a4[i].wrapping_mul(least))
                });
                *to = sum;
            }
        });
        Tensor::from_vec(table, (self.num_rows(), columns), &Device::Cpu)
    }

    /// `width` values of each row, which `write` computes with `hashes` hashes of each of its records.
    fn for_each_row<T: WithDType>(
        &self,
        hashes: usize,
        width: usize,
        write: impl Fn(usize, &mut [T]) + Sync,
    ) -> Vec<T> {
        let mut values = vec![T::zero(); self.num_rows() * width];
        let work = self.positions.len().saturating_mul(hashes);
        let team = Team::new(work / MIN_HASHES_PER_THREAD);
        let tasks = values.chunks_mut(TASK_ROWS * width).enumerate();
        team.for_each(tasks, |(task, values)| {
            for (i, values) in values.chunks_mut(width).enumerate() {
                write(task * TASK_ROWS + i, values);
            }
        });
        values
    }

    /// MinHash number `number` of a row that these records hold.
    fn min_hash(&self, records: &[u32], number: usize) -> u64 {
        let key = random(self.min_hash_key, number as u64);
        let hashes = records
            .iter()
            .map(|&record| finalize(key.wrapping_add(record.into())));
        hashes.min().unwrap_or_default()
    }

    /// A random number for a row that no record holds.
    fn unseen(&self, row: usize, number: usize) -> u64 {
        finalize(random(self.unseen_key, row as u64).wrapping_add(number as u64))
    }
}

/// Estimates the Jaccard similarity of two rows from their [signatures](Records::signatures): the share of equal keys, less those
/// that are equal by chance. With few keys the estimate is rough, and may be below 0.
///
/// # Errors
/// `key_bits` outside `1..=32`.
pub fn similarity(a: i64, b: i64, key_bits: usize) -> Result<f64> {
    check_key_bits(key_bits)?;
    let num_keys = 64 / key_bits;
    let mask = u64::MAX >> (64 - key_bits);
    let differ = |key: &usize| ((a ^ b) as u64 >> (key * key_bits)) & mask != 0;
    let equal = 1.0 - (0..num_keys).filter(differ).count() as f64 / num_keys as f64;
    let chance = 1.0 / (1u64 << key_bits) as f64;
    Ok((equal - chance) / (1.0 - chance))
}

fn check_key_bits(key_bits: usize) -> Result<()> {
    if !(1..=32).contains(&key_bits) {
        bail!("key_bits must lie in 1..=32, got {key_bits}");
    }
    Ok(())
}

/// What the random numbers for one purpose start from.
fn key(seed: u64, purpose: u64) -> u64 {
    finalize(finalize(seed).wrapping_add(purpose.wrapping_mul(GOLDEN)))
}

/// Random number `number` from a key, by SplitMix64.
fn random(key: u64, number: u64) -> u64 {
    finalize(key.wrapping_add(number.wrapping_add(1).wrapping_mul(GOLDEN)))
}
