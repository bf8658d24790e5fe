//! Fitting a layer to a table that was not hashed: a way to compress an existing model.
//!
//! Every virtual element has one slot, so the least-squares problem falls apart into one problem per slot, whose solution is the
//! mean of the elements in that slot, each times its sign. The table is read twice, a chunk at a time: once for the means, once
//! for the error. Nothing as large as the table is allocated.

use crate::config::HashedEmbeddingBagConfig;
use crate::error::bail;
use crate::hash::{Locate, Located, RowValues};
use crate::layer::{new_len, HashedEmbeddingBag};
use crate::op::{check_dtype, WEIGHT_DTYPES};
use crate::parallel::Team;
use crate::row_tensor;
use crate::tables::Tables;
use candle_core::{DType, Device, Result, Tensor};
use std::ops::Range;

/// How many values of the table are read at once.
const CHUNK_VALUES: usize = 1 << 20;

/// How many of those values a thread takes at a time.
const TASK_VALUES: usize = 1 << 14;

impl HashedEmbeddingBag {
    /// The layer whose virtual table is closest to `table` in least squares, and its relative error
    /// `|table - virtual| / |table|` (Frobenius norms; 0 for a table of zeros).
    ///
    /// * `table`: `(num_embeddings, embedding_dim)`; f32, f64, f16 or bf16, on any device, in any strides; such as the
    ///   weight of `torch.nn.EmbeddingBag` or `candle_nn::Embedding`. `hashed_weight` has its dtype and device.
    /// * `compression`: the length of `hashed_weight` over the size of the table, as for
    ///   [`hashed_embedding_bag`](crate::hashed_embedding_bag()).
    /// * The row at `config.padding_idx` is never looked up, so it is ignored.
    ///
    /// Means are computed in f64; the error is that of `hashed_weight` rounded to its own dtype. Slots without elements are 0.
    /// Memory: `hashed_weight`, 16 more bytes for each of its values, and a few MB for the part of the table being read. The
    /// result does not depend on the number of threads.
    ///
    /// The error is large if rows have little in common, because all values that share a slot are replaced by their mean. A fit
    /// is a starting point: a small `hashed_weight` becomes good by training.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_hashed_embedding_bag::HashedEmbeddingBag;
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let table = Tensor::randn(0f32, 1., (1000, 16), &Device::Cpu)?;
    /// let (layer, error) = HashedEmbeddingBag::fit(&table, 0.5, Default::default())?;
    /// assert_eq!(layer.hashed_weight().dims(), [8000]);
    /// assert!(0.5 < error && error < 1.0);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A `table` that is not 2-D, not of a float dtype, or holds a value that is not finite (the message gives its position); a
    /// compression or a size that [`hashed_embedding_bag`](crate::hashed_embedding_bag()) refuses; a hash that reads a
    /// [row tensor](crate::Hash::row_tensor).
    pub fn fit(
        table: &Tensor,
        compression: f64,
        config: HashedEmbeddingBagConfig,
    ) -> Result<(Self, f64)> {
        check_dtype("table", table, &WEIGHT_DTYPES)?;
        let &[num_embeddings, embedding_dim] = table.dims() else {
            bail!("table must have rank 2, got {:?}", table.dims());
        };
        let tables = Tables::one(config.first_row, num_embeddings)?;
        let len = new_len(&tables, embedding_dim, compression, &config)?;
        let hash = config.hash_for(embedding_dim);
        if let Some(name) = hash.row_tensor() {
            return Err(row_tensor::missing(name));
        }
        let (hashed_weight, error) = match hash.slots(len)?.with_rows(RowValues::None)? {
            Located::Blocks(hash) => Fit::new(table, hash, &config)?.solve(len),
            Located::Starts(hash) => Fit::new(table, hash, &config)?.solve(len),
        }?;
        let layer = Self::new(hashed_weight, num_embeddings, embedding_dim, config)?;
        Ok((layer, error))
    }
}

/// A table to fit, and the hash that maps its values to slots.
struct Fit<'a, H: Locate> {
    table: &'a Tensor,
    num_embeddings: usize,
    embedding_dim: usize,
    hash: H,
    /// The constants of each column block.
    column_blocks: Vec<H::ColumnBlock>,
    first_row: usize,
    /// The row that is ignored.
    padding: Option<usize>,
}

/// Some consecutive rows of the table.
struct Chunk {
    rows: Range<usize>,
    values: Vec<f64>,
}

/// Some consecutive rows of a chunk, and where their column blocks lie in `hashed_weight`.
struct LocatedRows<'a, P> {
    first_row: usize,
    values: &'a [f64],
    places: Vec<P>,
    signs: Vec<u32>,
}

impl<'a, H: Locate> Fit<'a, H> {
    fn new(table: &'a Tensor, hash: H, config: &HashedEmbeddingBagConfig) -> Result<Self> {
        let (num_embeddings, embedding_dim) = table.dims2()?;
        let column_blocks = embedding_dim.div_ceil(hash.block()) as u64;
        Ok(Self {
            table,
            num_embeddings,
            embedding_dim,
            hash,
            column_blocks: (0..column_blocks)
                .map(|block| hash.column_block(block))
                .collect(),
            first_row: config.first_row,
            padding: config.padding_idx.and_then(|row| row.try_into().ok()),
        })
    }

    /// `hashed_weight` and the relative error.
    fn solve(&self, len: usize) -> Result<(Tensor, f64)> {
        let (mut sums, mut counts) = (vec![0f64; len], vec![0u64; len]);
        for chunk in self.chunks() {
            let chunk = chunk?;
            self.check_finite(&chunk)?;
            let located = self.map_located(&chunk, |rows| rows);
            // Each thread adds to slots of its own, in the order of rows.
            let team = Team::new(located.len());
            let share = len.div_ceil(team.threads());
            let shares = sums.chunks_mut(share).zip(counts.chunks_mut(share));
            team.for_each(shares.enumerate(), |(i, (sums, counts))| {
                let start = i * share;
                for rows in &located {
                    self.for_each_block(rows, |values, slot, signs| {
                        let from = slot.max(start);
                        let to = (slot + values.len()).min(start + sums.len());
                        for at in from..to {
                            sums[at - start] += flip(values[at - slot], signs, at - slot);
                            counts[at - start] += 1;
                        }
                    });
                }
            });
        }
        for (sum, &count) in sums.iter_mut().zip(&counts) {
            *sum /= count.max(1) as f64;
        }
        drop(counts);
        let hashed_weight = Tensor::from_vec(sums, len, &Device::Cpu)?;
        let hashed_weight = hashed_weight.to_dtype(self.table.dtype())?;
        let rounded: Vec<f64> = hashed_weight.to_dtype(DType::F64)?.to_vec1()?;

        let (mut lost, mut total) = (0.0, 0.0);
        for chunk in self.chunks() {
            let chunk = chunk?;
            let squares = |rows: LocatedRows<H::Place>| {
                let (mut lost, mut total) = (0.0, 0.0);
                self.for_each_block(&rows, |values, slot, signs| {
                    let fitted = &rounded[slot..slot + values.len()];
                    for (i, (value, &fitted)) in values.iter().zip(fitted).enumerate() {
                        lost += (value - flip(fitted, signs, i)).powi(2);
                        total += value * value;
                    }
                });
                (lost, total)
            };
            // Only here, so that the order of additions does not depend on the threads.
            for (rows_lost, rows_total) in self.map_located(&chunk, squares) {
                lost += rows_lost;
                total += rows_total;
            }
        }
        let error = if total > 0.0 {
            (lost / total).sqrt()
        } else {
            0.0
        };
        Ok((hashed_weight.to_device(self.table.device())?, error))
    }

    /// The table, a chunk at a time, in f64 on the host.
    fn chunks(&self) -> impl Iterator<Item = Result<Chunk>> + '_ {
        let step = (CHUNK_VALUES / self.embedding_dim).max(1);
        (0..self.num_embeddings).step_by(step).map(move |start| {
            let rows = start..(start + step).min(self.num_embeddings);
            let values = self.table.narrow(0, start, rows.len())?;
            // Copied first: to move a view to another device, candle would move the whole storage behind it.
            let values = values
                .force_contiguous()?
                .to_device(&Device::Cpu)?
                .to_dtype(DType::F64)?;
            Ok(Chunk {
                rows,
                values: values.flatten_all()?.to_vec1()?,
            })
        })
    }

    /// Calls `work` with the rows of a chunk, a few at a time; the division does not depend on the number of threads.
    fn map_located<'b, R: Send>(
        &self,
        chunk: &'b Chunk,
        work: impl Fn(LocatedRows<'b, H::Place>) -> R + Sync,
    ) -> Vec<R> {
        let rows = (TASK_VALUES / self.embedding_dim).max(1);
        let values = chunk.values.chunks(rows * self.embedding_dim);
        Team::new(values.len()).map(values.enumerate(), |(i, values)| {
            let first_row = chunk.rows.start + i * rows;
            let rows = first_row..first_row + values.len() / self.embedding_dim;
            let blocks = self.column_blocks.len();
            let mut places = vec![H::Place::default(); rows.len() * blocks];
            let mut signs = vec![0; places.len()];
            let of_rows = places
                .chunks_exact_mut(blocks)
                .zip(signs.chunks_exact_mut(blocks));
            for (row, (places, signs)) in rows.zip(of_rows) {
                let row = (self.first_row + row) as u64;
                self.hash.locate(&[row], &self.column_blocks, places, signs);
            }
            work(LocatedRows {
                first_row,
                values,
                places,
                signs,
            })
        })
    }

    /// Calls `f` with the values of each column block of each row, its first slot and its signs.
    fn for_each_block(&self, rows: &LocatedRows<H::Place>, mut f: impl FnMut(&[f64], usize, u32)) {
        let (block, blocks) = (self.hash.block(), self.column_blocks.len());
        let values = rows.values.chunks_exact(self.embedding_dim);
        let places = rows.places.chunks_exact(blocks);
        let places = places.zip(rows.signs.chunks_exact(blocks));
        for (i, (row, (places, signs))) in values.zip(places).enumerate() {
            if Some(rows.first_row + i) == self.padding {
                continue;
            }
            let places = places.iter().zip(signs);
            for (values, (&place, &signs)) in row.chunks(block).zip(places) {
                f(values, self.hash.slot(place, block), signs);
            }
        }
    }

    fn check_finite(&self, chunk: &Chunk) -> Result<()> {
        for (i, row) in chunk.values.chunks_exact(self.embedding_dim).enumerate() {
            let row_number = chunk.rows.start + i;
            if let Some(column) = row.iter().position(|value| !value.is_finite()) {
                if Some(row_number) != self.padding {
                    bail!(
                        "table must be finite, got {} at row {row_number}, column {column}",
                        row[column]
                    );
                }
            }
        }
        Ok(())
    }
}

/// The value times the sign of column `i` of its block.
#[inline(always)]
fn flip(value: f64, signs: u32, i: usize) -> f64 {
    // Only blocks of up to 32 columns have signs. Past column 31 the shift wraps, but all bits are zero then.
    let negative = u64::from(signs).wrapping_shr(i as u32) & 1;
    f64::from_bits(value.to_bits() ^ (negative << 63))
}
