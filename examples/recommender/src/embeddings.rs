//! The embedding tables, and how the parameters are divided among them.
//!
//! `compression` limits the parameters of all tables together. Small tables (a dozen genres, two genders) stay plain: they
//! matter a lot and cost next to nothing. The large ones are hashed into the remaining parameters. Each of the two kinds is one
//! collection: one parameter, one lookup.

use std::borrow::Cow;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, WithDType};
use candle_hashed_embedding_bag::{
    hashed_embedding_bag_collection, Bits, Checkpoint, Hash, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, JaggedLayout, Mode,
};
use candle_nn::{Module, VarBuilder};

use crate::data::{Bags, Rows, Schema};
use crate::rare::RareRows;

/// Tables with fewer rows than this are small.
const SMALL: usize = 64;

/// The names of the collections. A model may lack either.
const COLLECTIONS: [&str; 2] = ["plain", "hashed"];

/// How to make the tables.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingConfig {
    /// The columns of every table.
    pub embedding_dim: usize,
    /// The most parameters per value of all tables together; 1 is the baseline, in which every table is plain.
    pub compression: f64,
    /// The hash of the large tables.
    pub hash: Hash,
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
}

impl Embeddings {
    /// New tables, with variables from `vb`.
    ///
    /// # Errors
    /// A compression that leaves the large tables less than one block of the hash.
    pub fn new(schema: &Schema, config: EmbeddingConfig, vb: VarBuilder) -> Result<Self> {
        let rows: Vec<usize> = schema.tables.iter().map(|&(_, rows)| rows).collect();
        let (plain, share) = config.share_out(&rows)?;
        let (small, large): (Vec<usize>, Vec<usize>) =
            (0..rows.len()).partition(|&table| plain[table]);
        // In a plain table no two values share a parameter. Even with as many parameters as values, a random hash would let
        // some values share one and leave a third of the parameters unused.
        let identity = Hash::identity(config.embedding_dim);
        let kinds = [(small, identity, 1.0), (large, config.hash, share)];

        let mut collections = Vec::new();
        for (name, (tables, hash, compression)) in COLLECTIONS.into_iter().zip(kinds) {
            if tables.is_empty() {
                continue;
            }
            let bag = HashedEmbeddingBagConfig {
                // The mean, so that a film with six genres does not count for more than one with two.
                mode: Mode::Mean,
                hash: Some(hash),
                include_last_offset: true,
                ..Default::default()
            };
            let named = tables.iter().map(|&table| schema.tables[table]);
            let (dim, vb) = (config.embedding_dim, vb.pp(name));
            let collection = hashed_embedding_bag_collection(named, dim, compression, bag, vb)?;
            collections.push(Collection {
                name,
                tables,
                collection,
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
            collections.push(Collection {
                name,
                tables: collection.tables().map(position).collect::<Result<_>>()?,
                collection,
            });
        }
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
        let pooled = pooled.map(|(kind, lookup)| match lookup {
            Lookup::Rows(rows) => kind.collection.forward(rows),
            Lookup::Bags { values, offsets } => {
                let layout = JaggedLayout::FeatureMajor;
                kind.collection.forward_jagged(values, offsets, layout)
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

    /// The columns of every table.
    pub fn embedding_dim(&self) -> usize {
        let first = self.collections.first();
        first.map_or(0, |kind| kind.collection.embedding_dim())
    }

    /// How many values the tables store, and how many they would store without hashing.
    pub fn parameters(&self) -> (usize, usize) {
        let collections = || self.collections().map(|(_, collection)| collection);
        let values = |collection: &HashedEmbeddingBagCollection| {
            let stored = collection.hashed_weight().elem_count();
            match collection.low_bit() {
                None => stored,
                Some(low_bit) => stored * 8 / u32::from(low_bit.bits()) as usize,
            }
        };
        let stored = collections().map(values).sum();
        let rows = collections().flat_map(|c| c.tables());
        let rows: usize = rows.map(|(_, rows)| rows).sum();
        (stored, rows * self.embedding_dim())
    }
}

impl Collection {
    /// Whether it holds all tables of a schema of so many, which are then in the order of the schema.
    fn has_all(&self, tables: usize) -> bool {
        self.tables.iter().copied().eq(0..tables)
    }
}

impl EmbeddingConfig {
    /// Decides which tables are plain, given their numbers of rows, and the compression of all others together.
    fn share_out(&self, rows: &[usize]) -> Result<(Vec<bool>, f64)> {
        let values = |rows: &[usize]| rows.iter().sum::<usize>() as f64 * self.embedding_dim as f64;
        let small: Vec<usize> = rows.iter().copied().filter(|&n| n < SMALL).collect();
        let (all, small) = (values(rows), values(&small));
        let budget = all * self.compression;
        if self.compression == 1.0 {
            return Ok((vec![true; rows.len()], 1.0));
        }
        // If there are very few parameters, the tables of ids need them more than small plain tables do.
        let small_fits = small <= budget / 2.0;
        let plain = if small_fits { small } else { 0.0 };
        let is_plain = rows.iter().map(|&n| small_fits && n < SMALL).collect();
        // A hashed collection is rounded up to whole blocks, so it may exceed its share by up to a block.
        let share = (budget - plain - self.hash.block() as f64) / (all - plain);
        ensure!(
            plain == all || share > 0.0,
            "a compression of {} leaves {budget:.0} parameters, too few for hashed tables",
            self.compression
        );
        Ok((is_plain, share))
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
        let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
        let schema = Schema {
            numbers: 0,
            tables: names.into_iter().zip(rows.iter().copied()).collect(),
        };
        let config = EmbeddingConfig {
            embedding_dim: 16,
            compression,
            hash: Hash::default_for(16),
        };
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        Embeddings::new(&schema, config, vb)
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
