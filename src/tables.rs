//! The tables that share one `hashed_weight`: their names, and which rows of the virtual table each of them owns.

use crate::error::{bail, error};
use candle_core::Result;
use std::collections::HashSet;

/// One or more tables over one `hashed_weight`, as consecutive rows of one virtual table.
#[derive(Debug, Clone)]
pub(crate) struct Tables {
    /// Empty for a layer, whose single table has no name.
    names: Vec<String>,
    /// Table `t` is rows `first_rows[t]..first_rows[t + 1]`.
    first_rows: Vec<i64>,
}

impl Tables {
    /// One table of `num_embeddings` rows from `first_row` on.
    pub fn one(first_row: usize, num_embeddings: usize) -> Result<Self> {
        let end = end_row(first_row, num_embeddings).map_err(error)?;
        Ok(Self {
            names: vec![],
            first_rows: vec![first_row as i64, end],
        })
    }

    /// Tables by name and number of rows, one after the other.
    pub fn named(tables: impl IntoIterator<Item = (String, usize)>) -> Result<Self> {
        let (mut names, mut first_rows) = (vec![], vec![0]);
        let (mut end, mut known) = (0i64, HashSet::new());
        for (name, num_embeddings) in tables {
            end = end_row(end as usize, num_embeddings)
                .map_err(|message| error(format_args!("table {name}: {message}")))?;
            if !known.insert(name.clone()) {
                bail!("two tables are named {name}");
            }
            names.push(name);
            first_rows.push(end);
        }
        if names.is_empty() {
            bail!("a collection needs at least one table");
        }
        Ok(Self { names, first_rows })
    }

    /// How many tables there are.
    pub fn len(&self) -> usize {
        self.first_rows.len() - 1
    }

    /// The name of table `t`, if it has one.
    pub fn name(&self, t: usize) -> Option<&str> {
        self.names.get(t).map(String::as_str)
    }

    /// Each table's name and number of rows.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, usize)> {
        self.names
            .iter()
            .enumerate()
            .map(|(t, name)| (name.as_str(), self.num_embeddings(t)))
    }

    /// The row of the virtual table that is row 0 of table `t`.
    pub fn first_row(&self, t: usize) -> i64 {
        self.first_rows[t]
    }

    /// The rows of table `t`.
    pub fn num_embeddings(&self, t: usize) -> usize {
        (self.first_rows[t + 1] - self.first_rows[t]) as usize
    }

    /// The rows of all tables.
    pub fn num_rows(&self) -> usize {
        self.end_row() - self.first_rows[0] as usize
    }

    /// The row of the virtual table after the last row of the last table.
    pub fn end_row(&self) -> usize {
        self.first_rows[self.len()] as usize
    }

    /// The boundaries of the tables in the virtual table; one more than there are tables.
    pub fn first_rows(&self) -> &[i64] {
        &self.first_rows
    }
}

/// The row after the last of `num_embeddings` rows from `first_row` on, or an error message about their number.
fn end_row(first_row: usize, num_embeddings: usize) -> std::result::Result<i64, String> {
    match i64::try_from(first_row.saturating_add(num_embeddings)) {
        Ok(end) if num_embeddings > 0 => Ok(end),
        _ => {
            let from = match first_row {
                0 => String::new(),
                first_row => format!(" from row {first_row} on"),
            };
            Err(format!(
                "num_embeddings must lie in 1..2^63, got {num_embeddings}{from}"
            ))
        }
    }
}
