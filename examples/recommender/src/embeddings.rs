//! The embedding tables, and how the parameters are divided among them.
//!
//! `compression` limits the parameters of all tables together. Small tables (a dozen genres, two genders) stay plain: they
//! matter a lot and cost next to nothing. The large ones are hashed into the remaining parameters. Each of the two kinds is one
//! collection: one parameter, one lookup.
//!
//! With an `inner_dim`, the rows of large tables have so many columns, and what was pooled of them is multiplied by a learned matrix
//! of the table, so that all vectors are of one length:
//!
//! ```text
//! small tables ── plain, embedding_dim columns ───────────────────────────────────────────┐
//! large tables ── hashed, inner_dim columns ── (inner_dim x embedding_dim of each table) ──┴──> vectors
//! ```

use std::borrow::Cow;

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor, WithDType};
use candle_hashed_embedding_bag::semantic::Records;
use candle_hashed_embedding_bag::{
    hashed_embedding_bag_collection, hashed_embedding_bag_collection_with_row_tensor, Bits,
    Checkpoint, Gradient, Hash, HashedEmbeddingBag, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, JaggedLayout, Mode,
};
use candle_nn::{Init, Module, VarBuilder};

use crate::alike;
use crate::data::{Bags, Examples, Rows, Schema};
use crate::ops::project;
use crate::options::TableBits;
use crate::rare::RareRows;

/// Tables with fewer rows than this are small.
const SMALL: usize = 64;

/// The names of the collections. A model may lack any. Tables of `plain` have no matrices, those of `projected` are not hashed.
const COLLECTIONS: [&str; 3] = ["plain", "projected", "hashed"];

/// The name of the matrices of a collection, `(tables, inner_dim, embedding_dim)`.
const PROJECTION: &str = "projection";

/// How to make the tables.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingConfig {
    /// The columns of every table, or of its matrix.
    pub embedding_dim: usize,
    /// The columns of the large tables, if they are to have matrices.
    pub inner_dim: Option<usize>,
    /// The most parameters per value that all tables together have with `embedding_dim` columns; matrices are parameters, too. 1 is
    /// the baseline, in which no table is hashed.
    pub compression: f64,
    /// The hash of the large tables.
    pub hash: Hash,
}

/// How the parameters are divided.
struct Shares {
    /// Which tables are plain.
    plain: Vec<bool>,
    /// The name of the collection of the others.
    name: &'static str,
    /// Their hash, and the parameters per value of them.
    hash: Hash,
    compression: f64,
}

/// The tables of a schema.
#[derive(Clone)]
pub struct Embeddings {
    collections: Vec<Collection>,
    /// Of each table of the schema, the rows that share one.
    rare: Vec<Option<RareRows>>,
}

/// What one collection is to look up for a batch.
pub enum Lookup {
    /// One row of each table, `(batch, tables)`.
    Rows(Tensor),
    /// A bag of rows per table and example, table by table: the rows of all bags, and where each bag begins and the last ends.
    Bags {
        /// `(nnz,)`.
        values: Tensor,
        /// `(tables * batch + 1,)`.
        offsets: Tensor,
    },
}

#[derive(Clone)]
struct Collection {
    name: &'static str,
    /// The positions of its tables in the schema.
    tables: Vec<usize>,
    collection: HashedEmbeddingBagCollection,
    /// The matrices of the tables, if they have any: `(tables, inner_dim, embedding_dim)`.
    projection: Option<Tensor>,
}

/// One table of the [`Embeddings`].
pub struct Table {
    /// In the schema.
    pub name: String,
    /// Its rows, and how they are pooled.
    pub layer: HashedEmbeddingBag,
    /// Its matrix, if it has one: `(inner_dim, embedding_dim)`.
    projection: Option<Tensor>,
    /// Those that are looked up in one.
    rare: Option<RareRows>,
}

impl Embeddings {
    /// New tables, with variables from `vb`, whose gradients are summed in this way.
    ///
    /// # Errors
    /// A compression that leaves the large tables less than one block of the hash; a hash that needs
    /// [`for_examples`](Self::for_examples).
    pub fn new(
        schema: &Schema,
        config: EmbeddingConfig,
        gradient: Gradient,
        vb: VarBuilder,
    ) -> Result<Self> {
        let none =
            |_: &[usize]| bail!("rows share memory by their examples, of which there are none");
        Self::with_records(schema, config, none, gradient, vb)
    }

    /// New tables for examples, by whose train part a hash may decide which rows share memory.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), and what reading says.
    pub fn for_examples(
        examples: &dyn Examples,
        config: EmbeddingConfig,
        gradient: Gradient,
        vb: VarBuilder,
    ) -> Result<Self> {
        let records = |tables: &[usize]| alike::records(examples, tables);
        Self::with_records(&examples.schema(), config, records, gradient, vb)
    }

    /// `records` gives those of some tables.
    fn with_records(
        schema: &Schema,
        config: EmbeddingConfig,
        records: impl Fn(&[usize]) -> Result<Records>,
        gradient: Gradient,
        vb: VarBuilder,
    ) -> Result<Self> {
        let rows: Vec<usize> = schema.tables.iter().map(|&(_, rows)| rows).collect();
        let shares = config.share_out(&rows)?;
        let (small, large): (Vec<usize>, Vec<usize>) =
            (0..rows.len()).partition(|&table| shares.plain[table]);
        let dim = config.embedding_dim;
        let kinds = [
            ("plain", small, dim, Hash::identity(dim), 1.0),
            (
                shares.name,
                large,
                config.inner_dim(),
                shares.hash,
                shares.compression,
            ),
        ];

        let mut collections = Vec::new();
        for (name, tables, columns, hash, compression) in kinds {
            if tables.is_empty() {
                continue;
            }
            let bag = HashedEmbeddingBagConfig {
                // The mean, so that a film with six genres does not count for more than one with two.
                mode: Mode::Mean,
                hash: Some(hash),
                include_last_offset: true,
                gradient,
                ..Default::default()
            };
            let named = tables.iter().map(|&table| schema.tables[table]);
            let vb = vb.pp(name);
            let values = tables.iter().map(|&table| rows[table]).sum::<usize>() * columns;
            let len = ((values as f64 * compression) as usize).max(1);
            let len = len.next_multiple_of(hash.block());
            let row_tensor = alike::row_tensor(hash, || records(&tables), columns, len)?;
            let collection = match row_tensor {
                None => {
                    hashed_embedding_bag_collection(named, columns, compression, bag, vb.clone())
                }
                Some(tensor) => hashed_embedding_bag_collection_with_row_tensor(
                    named,
                    columns,
                    compression,
                    &tensor.to_device(vb.device())?,
                    bag,
                    vb.clone(),
                ),
            }?;
            let inner_dim = config.inner_dim.filter(|_| name != "plain");
            let projection = inner_dim.map(|columns| {
                // Such that a vector is as long as what was pooled.
                let stdev = (1.0 / dim as f64).sqrt();
                let init = Init::Randn { mean: 0.0, stdev };
                vb.get_with_hints((tables.len(), columns, dim), PROJECTION, init)
            });
            collections.push(Collection {
                name,
                tables,
                collection,
                projection: projection.transpose()?,
            });
        }
        let rare = vec![None; rows.len()];
        Ok(Self { collections, rare })
    }

    /// The same tables, in which rows with fewer than `min_count` training examples share one row of their table. `counts` are
    /// those of the train part, per table.
    pub fn sharing_rare_rows(mut self, counts: &[Vec<u32>], min_count: u32) -> Self {
        let rare = |counts: &Vec<u32>| RareRows::of_counts(counts, min_count);
        self.rare = counts.iter().map(rare).collect();
        self
    }

    /// The same tables, which keep a sparse gradient: see [`TableOptimizer`](crate::optimizers::TableOptimizer).
    ///
    /// # Errors
    /// Those of [`HashedEmbeddingBagCollection::with_sparse`].
    pub fn with_sparse_gradients(mut self) -> Result<Self> {
        for kind in &mut self.collections {
            kind.collection = kind.collection.with_sparse(true)?;
        }
        Ok(self)
    }

    /// Of each table of the schema, the rows that share one.
    pub fn rare(&self) -> &[Option<RareRows>] {
        &self.rare
    }

    /// The tables of a checkpoint, which records their hash and their rare rows.
    ///
    /// # Errors
    /// Tables other than those of the schema.
    pub fn open(schema: &Schema, checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        let mut collections = Vec::new();
        for name in COLLECTIONS {
            if checkpoint.collections().all(|(other, _)| other != name) {
                continue;
            }
            let collection =
                checkpoint.hashed_embedding_bag_collection(name, DType::F32, device)?;
            let position = |table| {
                let position = schema.tables.iter().position(|known| *known == table);
                let (name, rows) = table;
                position.with_context(|| format!("unexpected table {name} of {rows} rows"))
            };
            let tables: Vec<usize> = collection.tables().map(position).collect::<Result<_>>()?;
            let projection = format!("{name}.{PROJECTION}");
            let projection = match checkpoint.tensor_info(&projection) {
                Err(_) => None,
                Ok(info) => {
                    let (count, columns) = (tables.len(), collection.embedding_dim());
                    ensure!(
                        matches!(info.shape[..], [n, inner, _] if (n, inner) == (count, columns)),
                        "tensor {projection} of shape {:?} is no matrix of {columns} rows for each of {count} tables",
                        info.shape
                    );
                    Some(
                        checkpoint
                            .tensor(&projection, device)?
                            .to_dtype(DType::F32)?,
                    )
                }
            };
            collections.push(Collection {
                name,
                tables,
                collection,
                projection,
            });
        }
        let mut widths = collections.iter().map(Collection::width);
        let width = widths.next().unwrap_or(0);
        ensure!(
            widths.all(|other| other == width),
            "the vectors of the embedding tables are not of one length"
        );
        let found: usize = collections.iter().map(|c| c.tables.len()).sum();
        ensure!(
            found == schema.tables.len(),
            "{found} embedding tables instead of {}",
            schema.tables.len()
        );
        let rare = |&(table, rows): &(&str, usize)| -> Result<Option<RareRows>> {
            let name = rare_rows_name(table);
            if checkpoint.tensor_info(&name).is_err() {
                return Ok(None);
            }
            let bits: Vec<u8> = checkpoint.tensor(&name, &Device::Cpu)?.to_vec1()?;
            let rare = RareRows::from_bits(bits);
            let fits = |rare: &RareRows| {
                rare.bits().len() == rows.div_ceil(8) && (rare.shared() as usize) < rows
            };
            let rare = rare.filter(fits);
            let rare =
                rare.with_context(|| format!("tensor {name} has no bit for each of {rows} rows"))?;
            Ok(Some(rare))
        };
        let rare = schema.tables.iter().map(rare).collect::<Result<_>>()?;
        Ok(Self { collections, rare })
    }

    /// The same tables in 8 or 4 bits, for serving, with the relative error of each collection.
    ///
    /// # Errors
    /// Tables that are rounded already, or values that are not finite.
    pub fn to_bits(&self, bits: Bits) -> Result<(Self, Vec<(&'static str, f64)>)> {
        let (mut collections, mut errors) = (Vec::new(), Vec::new());
        for kind in &self.collections {
            let (collection, error) = kind.collection.to_bits(bits)?;
            collections.push(Collection {
                name: kind.name,
                tables: kind.tables.clone(),
                collection,
                projection: kind.projection.clone(),
            });
            errors.push((kind.name, error));
        }
        let rare = self.rare.clone();
        Ok((Self { collections, rare }, errors))
    }

    /// The rows of a batch, in the tables of the schema, as tensors: what each collection is to look up.
    ///
    /// # Errors
    /// What the device says.
    pub fn lookups(&self, rows: &Rows, device: &Device) -> candle_core::Result<Vec<Lookup>> {
        let rows = &*self.shared(rows);
        let lookup = |kind: &Collection| -> candle_core::Result<Lookup> {
            match rows {
                Rows::OnePerTable(rows) => {
                    let (all, own) = (self.num_tables(), kind.tables.len());
                    let shape = (rows.len() / all, own);
                    Ok(Lookup::Rows(if kind.has_all(all) {
                        Tensor::from_slice(rows, shape, device)?
                    } else {
                        let rows = rows.chunks_exact(all);
                        let own = rows.flat_map(|row| kind.tables.iter().map(|&table| row[table]));
                        Tensor::from_vec(own.collect(), shape, device)?
                    }))
                }
                Rows::Bags(bags) => {
                    let bags: Bags = kind.tables.iter().map(|&table| &bags[table]).collect();
                    Ok(Lookup::Bags {
                        values: list(bags.indices(), device)?,
                        offsets: list(bags.offsets(), device)?,
                    })
                }
            }
        };
        self.collections.iter().map(lookup).collect()
    }

    /// The rows to look up for those of a batch: rare rows are replaced by the one that they share.
    pub fn shared<'a>(&self, rows: &'a Rows) -> Cow<'a, Rows> {
        if self.rare.iter().all(Option::is_none) {
            return Cow::Borrowed(rows);
        }
        let mut rows = rows.clone();
        match &mut rows {
            Rows::OnePerTable(rows) => {
                for row in rows.chunks_exact_mut(self.rare.len()) {
                    for (row, rare) in row.iter_mut().zip(&self.rare) {
                        *row = rare.as_ref().map_or(*row, |rare| rare.map(*row));
                    }
                }
            }
            Rows::Bags(bags) => {
                for (bags, rare) in bags.iter_mut().zip(&self.rare) {
                    if let Some(rare) = rare {
                        bags.map(|row| rare.map(row));
                    }
                }
            }
        }
        Cow::Owned(rows)
    }

    /// [`lookups`](Self::lookups) of rows that are on the device: one [`shared`](Self::shared) row of each table of the schema,
    /// `(batch, tables)`.
    ///
    /// # Errors
    /// What the device says.
    pub fn lookups_of(&self, rows: &Tensor) -> candle_core::Result<Vec<Lookup>> {
        let all = self.num_tables();
        let lookup = |kind: &Collection| {
            if kind.has_all(all) {
                return Ok(Lookup::Rows(rows.clone()));
            }
            let columns: Vec<u32> = kind.tables.iter().map(|&table| table as u32).collect();
            let columns = Tensor::new(columns, rows.device())?;
            Ok(Lookup::Rows(rows.index_select(&columns, 1)?))
        };
        self.collections.iter().map(lookup).collect()
    }

    /// Pools what [`lookups`](Self::lookups) made of a batch into `(batch, tables, embedding_dim)`. The tables come in the order
    /// of the collections, not of the schema.
    ///
    /// # Errors
    /// What the device says.
    pub fn forward(&self, lookups: &[Lookup]) -> candle_core::Result<Tensor> {
        let pooled = self.collections.iter().zip(lookups);
        let pooled = pooled.map(|(kind, lookup)| {
            let pooled = match lookup {
                Lookup::Rows(rows) => kind.collection.forward(rows),
                Lookup::Bags { values, offsets } => {
                    let layout = JaggedLayout::FeatureMajor;
                    kind.collection.forward_jagged(values, offsets, layout)
                }
            }?;
            match &kind.projection {
                Some(projection) => project(&pooled, projection),
                None => Ok(pooled),
            }
        });
        let mut pooled = pooled.collect::<candle_core::Result<Vec<_>>>()?;
        match pooled.len() {
            1 => Ok(pooled.swap_remove(0)),
            _ => Tensor::cat(&pooled, 1),
        }
    }

    /// The collections by name, in the form that a checkpoint takes.
    pub fn collections(
        &self,
    ) -> impl Iterator<Item = (&'static str, &HashedEmbeddingBagCollection)> {
        let collections = self.collections.iter();
        collections.map(|kind| (kind.name, &kind.collection))
    }

    /// The positions in the schema of the tables, in the order of [`forward`](Self::forward).
    pub fn order(&self) -> impl Iterator<Item = usize> + '_ {
        self.collections
            .iter()
            .flat_map(|kind| &kind.tables)
            .copied()
    }

    /// The number of tables.
    pub fn num_tables(&self) -> usize {
        self.collections.iter().map(|kind| kind.tables.len()).sum()
    }

    /// The length of every vector.
    pub fn embedding_dim(&self) -> usize {
        self.collections.first().map_or(0, Collection::width)
    }

    /// The tables one by one, as layers on the shared parameters.
    ///
    /// # Errors
    /// What the device says.
    pub fn tables(&self) -> candle_core::Result<Vec<Table>> {
        let mut tables = Vec::new();
        for kind in &self.collections {
            for (i, (name, _)) in kind.collection.tables().enumerate() {
                tables.push(Table {
                    name: name.to_owned(),
                    layer: kind.collection.table(name)?,
                    projection: match &kind.projection {
                        Some(projection) => Some(projection.get(i)?),
                        None => None,
                    },
                    rare: self.rare[kind.tables[i]].clone(),
                });
            }
        }
        Ok(tables)
    }

    /// How many parameters the tables have, matrices included, and how many values without hashing and with `embedding_dim` columns.
    pub fn parameters(&self) -> (usize, usize) {
        let values = |kind: &Collection| {
            let stored = kind.collection.hashed_weight().elem_count();
            let stored = match kind.collection.low_bit() {
                None => stored,
                Some(low_bit) => stored * 8 / u32::from(low_bit.bits()) as usize,
            };
            stored + kind.projection.as_ref().map_or(0, Tensor::elem_count)
        };
        let stored = self.collections.iter().map(values).sum();
        let rows = self.collections().flat_map(|(_, c)| c.tables());
        let rows: usize = rows.map(|(_, rows)| rows).sum();
        (stored, rows * self.embedding_dim())
    }

    /// The bytes of all that [`forward`](Self::forward) reads besides the rows: weights, their scales and shifts, matrices, and what
    /// the hash reads of each row.
    pub fn bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let of = |kind: &Collection| {
            let rounding = kind.collection.low_bit().map_or(0, |low_bit| {
                size_of_val(&low_bit.scale()) + low_bit.shifts().map_or(0, bytes)
            });
            bytes(kind.collection.hashed_weight())
                + rounding
                + kind.collection.row_tensor().map_or(0, bytes)
                + kind.projection.as_ref().map_or(0, bytes)
        };
        self.collections.iter().map(of).sum()
    }
}

impl Collection {
    /// Whether it holds all tables of a schema of so many, which are then in the order of the schema.
    fn has_all(&self, tables: usize) -> bool {
        self.tables.iter().copied().eq(0..tables)
    }

    /// The length of its vectors.
    fn width(&self) -> usize {
        match &self.projection {
            Some(projection) => projection.dims()[2],
            None => self.collection.embedding_dim(),
        }
    }
}

impl Table {
    /// The number of rows.
    pub fn num_embeddings(&self) -> usize {
        self.layer.num_embeddings()
    }

    /// The length of its vectors.
    pub fn embedding_dim(&self) -> usize {
        match &self.projection {
            Some(projection) => projection.dims()[1],
            None => self.layer.embedding_dim(),
        }
    }

    /// The row that is looked up for `row`: another one if it is rare.
    pub fn shared(&self, row: i64) -> i64 {
        match (&self.rare, u32::try_from(row)) {
            (Some(rare), Ok(index)) => rare.map(index).into(),
            _ => row,
        }
    }

    /// The vectors of bags of [`shared`](Self::shared) rows, `(bags, embedding_dim)`, as [`HashedEmbeddingBag::forward_with_offsets`] takes them.
    ///
    /// # Errors
    /// Those of that lookup.
    pub fn forward(&self, indices: &Tensor, offsets: &Tensor) -> candle_core::Result<Tensor> {
        let pooled = self.layer.forward_with_offsets(indices, offsets)?;
        match &self.projection {
            Some(projection) => {
                project(&pooled.unsqueeze(1)?, &projection.unsqueeze(0)?)?.squeeze(1)
            }
            None => Ok(pooled),
        }
    }
}

impl EmbeddingConfig {
    /// The columns of the large tables.
    fn inner_dim(&self) -> usize {
        self.inner_dim.unwrap_or(self.embedding_dim)
    }

    /// The parameters of the matrices of so many tables.
    fn projection(&self, tables: usize) -> usize {
        let columns = self.inner_dim.unwrap_or(0);
        tables * columns * self.embedding_dim
    }

    /// The same tables, as large as fits into `share` of the bytes of plain ones in f32 once they are rounded to `bits`, given their
    /// numbers of rows. Matrices stay f32; scales, shifts and what the hash reads of each row count.
    ///
    /// # Errors
    /// Too few bytes for the matrices.
    pub fn within(self, share: f64, bits: TableBits, rows: &[usize]) -> Result<Self> {
        let (dim, inner) = (self.embedding_dim as f64, self.inner_dim() as f64);
        let (small, large): (Vec<_>, Vec<_>) = rows.iter().partition(|&&n| n < SMALL);
        let count = |rows: &[usize]| rows.iter().sum::<usize>() as f64;
        let values = count(rows) * dim;
        // Two scales, and the last bytes of two lists of shifts.
        let (bytes_of_value, rest) = match bits {
            TableBits::Exact => (4.0, 0.0),
            TableBits::Rounded(Bits::Eight) => (1.0, 8.0),
            TableBits::Rounded(_) => (0.5 + 1.0 / 128.0, 10.0),
        };
        let projection = self.projection(large.len()) as f64;
        let (budget, rest) = (4.0 * values * share, rest + 4.0 * projection);
        let hashed = alike::row_tensor_bytes(self.hash, large.iter().sum(), self.inner_dim());
        let whole = count(&small) * dim + count(&large) * inner;
        // Scales alone are no reason to hash what would fit.
        let compression = if whole * bytes_of_value + rest <= 1.001 * budget {
            1.0
        } else {
            ((budget - rest - hashed as f64) / bytes_of_value + projection) / values
        };
        ensure!(
            compression > 0.0,
            "{budget:.0} bytes are too few for tables of {inner} columns"
        );
        Ok(Self {
            compression,
            ..self
        })
    }

    /// Whether any of the tables is hashed.
    ///
    /// # Errors
    /// Those of [`Embeddings::new`].
    pub fn is_hashed(&self, rows: &[usize]) -> Result<bool> {
        Ok(self.share_out(rows)?.name == "hashed")
    }

    /// Decides which tables are plain, given their numbers of rows, and the compression of all others together.
    fn share_out(&self, rows: &[usize]) -> Result<Shares> {
        let (dim, inner) = (self.embedding_dim as f64, self.inner_dim());
        if self.compression == 1.0 && self.inner_dim.is_none() {
            return Ok(Shares {
                plain: vec![true; rows.len()],
                name: "plain",
                hash: Hash::identity(inner),
                compression: 1.0,
            });
        }
        let count = |rows: &[usize]| rows.iter().sum::<usize>() as f64;
        let (small, large): (Vec<_>, Vec<_>) = rows.iter().partition(|&&n| n < SMALL);
        let budget = count(rows) * dim * self.compression;
        // If there are very few parameters, the tables of ids need them more than small plain tables do.
        let small_fits = count(&small) * dim <= budget / 2.0;
        let (plain, large) = match small_fits {
            true => (count(&small) * dim, large),
            false => (0.0, rows.to_vec()),
        };
        let values = count(&large) * inner as f64;
        let rest = budget - plain - self.projection(large.len()) as f64;
        let is_plain = rows.iter().map(|&n| small_fits && n < SMALL).collect();
        // In a plain table no two values share a parameter. Even with as many parameters as values, a random hash would let
        // some values share one and leave a third of the parameters unused.
        if self.inner_dim.is_some() && (self.compression == 1.0 || rest >= values) {
            return Ok(Shares {
                plain: is_plain,
                name: "projected",
                hash: Hash::identity(inner),
                compression: 1.0,
            });
        }
        // A hashed collection is rounded up to whole blocks, so it may exceed its share by up to a block.
        let share = (rest - self.hash.block() as f64) / values;
        ensure!(
            large.is_empty() || share > 0.0,
            "a compression of {} leaves {budget:.0} parameters, too few for hashed tables",
            self.compression
        );
        Ok(Shares {
            plain: is_plain,
            name: "hashed",
            hash: self.hash,
            compression: share,
        })
    }
}

/// The tensor of a checkpoint with the rare rows of a table.
pub fn rare_rows_name(table: &str) -> String {
    format!("{table}.rare")
}

/// A 1-D tensor. candle cannot allocate an empty one on CUDA, so an empty one is a view of another.
pub fn list<T: WithDType>(values: &[T], device: &Device) -> candle_core::Result<Tensor> {
    match values {
        [] => Tensor::zeros(1, T::DTYPE, device)?.narrow(0, 0, 0),
        values => Tensor::new(values, device),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_nn::VarMap;

    fn embeddings(compression: f64, rows: &[usize]) -> Result<Embeddings> {
        projected(compression, rows, None)
    }

    fn projected(compression: f64, rows: &[usize], inner_dim: Option<usize>) -> Result<Embeddings> {
        let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
        let schema = Schema {
            numbers: 0,
            tables: names.into_iter().zip(rows.iter().copied()).collect(),
        };
        let config = EmbeddingConfig {
            embedding_dim: 16,
            inner_dim,
            compression,
            hash: Hash::default_for(inner_dim.unwrap_or(16)),
        };
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        Embeddings::new(&schema, config, Gradient::Fastest, vb)
    }

    fn pool(embeddings: &Embeddings, bags: &[Bags]) -> Result<Vec<Vec<Vec<f32>>>> {
        let lookups = embeddings.lookups(&Rows::Bags(bags.to_vec()), &Device::Cpu)?;
        Ok(embeddings.forward(&lookups)?.to_vec3()?)
    }

    #[test]
    fn the_promise_is_kept_and_used() -> Result<()> {
        let rows = [6040, 2, 7, 21, 678, 3883, 18, 1461];
        let all = 16 * rows.iter().sum::<usize>();
        assert_eq!(embeddings(1.0, &rows)?.parameters(), (all, all));
        for share in [2, 4, 16, 64, 256, 1024] {
            let (kept, uncompressed) = embeddings(1.0 / share as f64, &rows)?.parameters();
            assert_eq!(uncompressed, all);
            assert!(kept * share <= all, "1/{share}: {kept} of {all}");
            assert!(kept + 2 * 16 >= all / share, "1/{share}: {kept} of {all}");
        }
        assert!(embeddings(1e-5, &rows).is_err());
        Ok(())
    }

    #[test]
    fn projected_tables_keep_the_promise_too() -> Result<()> {
        let rows = [6040, 2, 7, 21, 678, 3883, 18, 1461];
        let all = 16 * rows.iter().sum::<usize>();
        for (inner, share) in [
            (8, 4),
            (4, 16),
            (8, 16),
            (4, 64),
            (12, 2),
            (16, 16),
            (24, 16),
        ] {
            let tables = projected(1.0 / share as f64, &rows, Some(inner))?;
            let (kept, uncompressed) = tables.parameters();
            assert_eq!(uncompressed, all);
            assert!(
                kept * share <= all,
                "{inner} columns, 1/{share}: {kept} of {all}"
            );
            assert!(
                kept + 2 * 16 >= all / share,
                "{inner} columns, 1/{share}: {kept} of {all}"
            );
            assert_eq!(tables.bytes(), 4 * kept);
            assert_eq!(tables.embedding_dim(), 16);
        }
        // As much as all rows of 8 columns take, and all of them at compression 1.
        let small = 16 * (2 + 7 + 21 + 18);
        let large = 8 * (6040 + 678 + 3883 + 1461) + 4 * 8 * 16;
        for compression in [0.9, 1.0] {
            let tables = projected(compression, &rows, Some(8))?;
            assert_eq!(tables.parameters().0, small + large);
            let names: Vec<_> = tables.collections().map(|(name, _)| name).collect();
            assert_eq!(names, ["plain", "projected"]);
        }
        // Matrices alone would be more.
        assert!(projected(0.005, &rows, Some(8)).is_err());
        Ok(())
    }

    #[test]
    fn bytes_are_kept_whatever_they_are_spent_on() -> Result<()> {
        let rows = [6040, 2, 7, 21, 678, 3883, 18, 1461];
        let schema = Schema {
            numbers: 0,
            tables: ["a", "b", "c", "d", "e", "f", "g", "h"]
                .into_iter()
                .zip(rows)
                .collect(),
        };
        let all = 4 * 16 * rows.iter().sum::<usize>();
        for inner_dim in [None, Some(8), Some(5), Some(20)] {
            for share in [2, 4, 16, 64] {
                for bits in [
                    TableBits::Exact,
                    TableBits::Rounded(Bits::Eight),
                    TableBits::Rounded(Bits::Four),
                ] {
                    let config = EmbeddingConfig {
                        embedding_dim: 16,
                        inner_dim,
                        compression: 1.0,
                        hash: Hash::default_for(inner_dim.unwrap_or(16)),
                    };
                    let config = config.within(1.0 / share as f64, bits, &rows)?;
                    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
                    let mut tables = Embeddings::new(&schema, config, Gradient::Fastest, vb)?;
                    if let TableBits::Rounded(bits) = bits {
                        tables = tables.to_bits(bits)?.0;
                    }
                    let (bytes, budget) = (tables.bytes(), all / share);
                    let said =
                        format!("{inner_dim:?} {bits:?} 1/{share}: {bytes} of {budget} bytes");
                    assert!(bytes as f64 <= 1.001 * budget as f64, "{said}");
                    // Nothing is left over, unless everything is there.
                    let is_hashed = config.is_hashed(&rows)?;
                    assert!(!is_hashed || bytes + 200 > budget, "{said}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn pooled_rows_are_projected() -> Result<()> {
        let embeddings = projected(0.1, &[1000, 3, 500], Some(4))?;
        let bags = [vec![999, 1], vec![2, 0], vec![3, 499]].map(Bags::of_one_each);
        let vectors = pool(&embeddings, &bags)?;
        let mut expected = Vec::new();
        for (kind, collection) in embeddings.collections.iter().zip(embeddings.collections()) {
            for (i, &table) in kind.tables.iter().enumerate() {
                let rows = Tensor::new(bags[table].indices(), &Device::Cpu)?.unsqueeze(1)?;
                let layer = collection.1.table(["a", "b", "c"][table])?;
                let rows = layer.forward(&rows)?;
                expected.push(match &kind.projection {
                    Some(projection) => rows.matmul(&projection.get(i)?)?,
                    None => rows,
                });
            }
        }
        let expected = Tensor::stack(&expected, 1)?;
        let difference = (Tensor::new(vectors, &Device::Cpu)? - &expected)?.abs()?;
        assert!(difference.max_all()?.to_scalar::<f32>()? < 1e-6);
        assert_eq!(expected.dims(), [2, 3, 16]);
        // One by one.
        for (i, table) in embeddings.tables()?.iter().enumerate() {
            let bags = &bags[["a", "b", "c"]
                .iter()
                .position(|n| *n == table.name)
                .unwrap()];
            let offsets = Tensor::new(bags.offsets(), &Device::Cpu)?;
            let vectors = table.forward(&Tensor::new(bags.indices(), &Device::Cpu)?, &offsets)?;
            let difference = (vectors - expected.narrow(1, i, 1)?.squeeze(1)?)?.abs()?;
            assert!(
                difference.max_all()?.to_scalar::<f32>()? < 1e-6,
                "{}",
                table.name
            );
            assert_eq!(table.embedding_dim(), 16);
        }
        Ok(())
    }

    #[test]
    fn plain_tables_are_plain() -> Result<()> {
        let embeddings = embeddings(1.0, &[100, 3])?;
        let (_, collection) = embeddings.collections().next().context("a collection")?;
        let weight = collection.hashed_weight().reshape((103, 16))?;
        let bags = [
            Bags::of_one_each(vec![99, 0, 7]),
            Bags::of_one_each(vec![0, 2, 2]),
        ];
        let rows = Tensor::new(&[99u32, 100, 0, 102, 7, 102], &Device::Cpu)?;
        assert_eq!(
            pool(&embeddings, &bags)?,
            weight
                .embedding(&rows)?
                .reshape((3, 2, 16))?
                .to_vec3::<f32>()?
        );
        Ok(())
    }

    #[test]
    fn every_table_gets_its_own_bags() -> Result<()> {
        // The second of the tables is plain, so the order of the vectors is not that of the bags.
        let embeddings = embeddings(0.5, &[1000, 3, 500])?;
        let bags = [vec![999, 1], vec![2, 0], vec![3, 499]].map(Bags::of_one_each);
        let vectors = pool(&embeddings, &bags)?;
        let mut tables = Vec::new();
        for (_, collection) in embeddings.collections() {
            for (name, _) in collection.tables() {
                let bags = &bags[["a", "b", "c"].iter().position(|n| *n == name).unwrap()];
                let indices = Tensor::new(bags.indices(), &Device::Cpu)?;
                let offsets = Tensor::new(bags.offsets(), &Device::Cpu)?;
                let table = collection.table(name)?;
                tables.push(table.forward_with_offsets(&indices, &offsets)?);
            }
        }
        assert_eq!(embeddings.num_tables(), 3);
        assert_eq!(vectors, Tensor::stack(&tables, 1)?.to_vec3::<f32>()?);
        // Bags of one row each may be given as rows.
        let rows = vec![999, 2, 3, 1, 0, 499];
        let on_device = Tensor::from_slice(&rows, (2, 3), &Device::Cpu)?;
        for lookups in [
            embeddings.lookups(&Rows::OnePerTable(rows), &Device::Cpu)?,
            embeddings.lookups_of(&on_device)?,
        ] {
            assert_eq!(embeddings.forward(&lookups)?.to_vec3::<f32>()?, vectors);
        }
        Ok(())
    }

    #[test]
    fn rare_rows_are_looked_up_in_one() -> Result<()> {
        let all = embeddings(0.5, &[1000, 3, 500])?;
        let mut counts = vec![vec![9; 1000], vec![9; 3], vec![9; 500]];
        for row in [5, 7, 999] {
            counts[0][row] = 2;
        }
        let sharing = all.clone().sharing_rare_rows(&counts, 3);
        // Rows 7 and 999 of the first table are looked up as row 5; the last table has no rare rows.
        let asked = [vec![7, 999, 6], vec![0, 1, 2], vec![7, 5, 6]].map(Bags::of_one_each);
        let meant = [vec![5, 5, 6], vec![0, 1, 2], vec![7, 5, 6]].map(Bags::of_one_each);
        assert_eq!(pool(&sharing, &asked)?, pool(&all, &meant)?);
        assert_ne!(pool(&sharing, &asked)?, pool(&all, &asked)?);
        let asked = Rows::OnePerTable(vec![7, 0, 7, 6, 2, 6]);
        let meant = Rows::OnePerTable(vec![5, 0, 7, 6, 2, 6]);
        assert_eq!(*sharing.shared(&asked), meant);
        assert_eq!(*all.shared(&asked), asked);
        Ok(())
    }
}
