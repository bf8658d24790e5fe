//! Which rows are used alike, for hashes by which such rows share memory: [`Records`] of the train part.
//!
//! What a record is depends on the data; rows are alike if the same records hold them.
//!
//! | data | a record for each | holds |
//! |---|---|---|
//! | clicks | click | its categories |
//! | ratings, interactions | user who liked a movie | those movies, and the user's features |
//! | | movie that a user liked | those users, and the movie's features |

use std::cell::Cell;

use anyhow::Result;
use candle_core::Tensor;
use candle_hashed_embedding_bag::semantic::Records;
use candle_hashed_embedding_bag::Hash;

use crate::data::Examples;

/// The most records that are kept; the authors of SCMA took as many.
const SAMPLE: usize = 125_000;

/// The MinHashes that decide on a place in a slot table, as in SCMA.
const MIN_HASHES: usize = 2;

/// Records of some of the tables of the schema.
///
/// # Errors
/// What reading says, or no records.
pub fn records(examples: &dyn Examples, tables: &[usize]) -> Result<Records> {
    let schema = examples.schema();
    let field = |table: usize| tables.iter().position(|&own| own == table);
    let fields: Vec<_> = (0..schema.tables.len()).map(field).collect();
    let failed = Cell::new(None);
    let read = examples.records()?.map_while(|record| match record {
        Ok(record) => Some(record),
        Err(error) => {
            failed.set(Some(error));
            None
        }
    });
    let own = read.map(|record| {
        let rows = record.into_iter();
        rows.filter_map(|(table, row)| Some((fields[table]?, row as usize)))
            .collect::<Vec<_>>()
    });
    let rows = tables.iter().map(|&table| schema.tables[table].1);
    let records = Records::sample(rows, own, SAMPLE, 0);
    match failed.take() {
        Some(error) => Err(error),
        None => Ok(records?),
    }
}

/// What a hash reads of each row, if it does, for tables of so many columns and a `hashed_weight` of `len` values.
///
/// # Errors
/// Those of the [`Records`].
pub fn row_tensor(
    hash: Hash,
    records: impl FnOnce() -> Result<Records>,
    columns: usize,
    len: usize,
) -> Result<Option<Tensor>> {
    Ok(match hash {
        Hash::Semantic(hash) => Some(records()?.signatures(hash.key_bits)?),
        Hash::Lma(hash) => Some(records()?.signatures(hash.key_bits())?),
        Hash::SlotTable(hash) => {
            let (blocks, num_blocks) = (columns.div_ceil(hash.block), len / hash.block);
            Some(records()?.slot_table(blocks, num_blocks, MIN_HASHES)?)
        }
        _ => None,
    })
}

/// The bytes of that for so many rows.
pub fn row_tensor_bytes(hash: Hash, rows: usize, columns: usize) -> usize {
    match hash {
        Hash::Semantic(_) | Hash::Lma(_) => 8 * rows,
        Hash::SlotTable(hash) => 4 * rows * columns.div_ceil(hash.block),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Part;
    use crate::data::{write_generated, Clicks, Rows, Source};

    #[test]
    fn users_are_alike_if_they_like_the_same_movies() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("pairs");
        // Users in two groups, each with ten items of its own.
        let line = |user: usize| {
            let items = (0..10).map(|item| format!(" {}", 10 * (user % 2) + item));
            format!("{user}{}\n", items.collect::<String>())
        };
        std::fs::write(&path, (0..40).map(line).collect::<String>())?;
        let ratings = Source::Interactions(path).load()?;
        let records = records(&ratings, &[0, 1])?;
        assert_eq!(
            (records.num_rows(), records.num_records()),
            (40 + 20, 40 + 20)
        );
        // A tenth of their pairs each is in neither the valid nor the test part.
        assert!(records.similarity(0, 2)? > 0.4 && records.similarity(0, 1)? == 0.0);
        assert!(records.similarity(40, 49)? > 0.4 && records.similarity(40, 50)? == 0.0);
        Ok(())
    }

    #[test]
    fn a_click_is_a_record() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("log");
        write_generated(&path, 500, 1)?;
        let log = Clicks::open(&path, Some(100), false)?;
        // Of some of the tables.
        let records = records(&log, &[4, 0])?;
        assert_eq!(records.num_rows(), 200);
        assert_eq!(records.num_records(), log.len(Part::Train));
        let mut batches = log.batches(Part::Train, 1, None)?;
        let Some(Ok((batch, _))) = batches.next() else {
            anyhow::bail!("no click")
        };
        let Rows::OnePerTable(rows) = batch.rows else {
            anyhow::bail!("no rows")
        };
        assert!(records.similarity(rows[4] as usize, 100 + rows[0] as usize)? > 0.0);
        Ok(())
    }
}
