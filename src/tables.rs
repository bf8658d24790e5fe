//! The tables that share one `hashed_weight`, and the features whose indices are looked up in them.

use crate::error::{bail, error};
use candle_core::Result;
use std::collections::{HashMap, HashSet};

/// One or more tables over one `hashed_weight`, as consecutive rows of one virtual table, and which of them each feature looks
/// into.
///
/// A sample has one bag per feature. Several features may look into one table, and a table may be left without any.
#[derive(Debug, Clone)]
pub(crate) struct Tables {
    /// Empty for a layer, whose single table has no name.
    names: Vec<String>,
    /// Table `t` is rows `first_rows[t]..first_rows[t + 1]`.
    first_rows: Vec<i64>,
    features: Vec<Feature>,
}

#[derive(Debug, Clone)]
struct Feature {
    /// Empty for a layer.
    name: String,
    /// The number of its table.
    table: usize,
    /// The first row of its table: beside the feature, because every bag reads it.
    first_row: i64,
}

impl Tables {
    /// One table of `num_embeddings` rows from `first_row` on, and one feature.
    pub fn one(first_row: usize, num_embeddings: usize) -> Result<Self> {
        let end = end_row(first_row, num_embeddings).map_err(error)?;
        let feature = Feature {
            name: String::new(),
            table: 0,
            first_row: first_row as i64,
        };
        Ok(Self {
            names: vec![],
            first_rows: vec![first_row as i64, end],
            features: vec![feature],
        })
    }

    /// Tables by name and number of rows, one after the other, each with one feature of the same name.
    pub fn named(tables: impl IntoIterator<Item = (String, usize)>) -> Result<Self> {
        let (mut names, mut first_rows, mut features) = (vec![], vec![0], vec![]);
        let (mut end, mut known) = (0i64, HashSet::new());
        for (name, num_embeddings) in tables {
            let first_row = end;
            end = end_row(end as usize, num_embeddings)
                .map_err(|message| error(format_args!("table {name}: {message}")))?;
            if !known.insert(name.clone()) {
                bail!("two tables are named {name}");
            }
            features.push(Feature {
                name: name.clone(),
                table: names.len(),
                first_row,
            });
            names.push(name);
            first_rows.push(end);
        }
        if names.is_empty() {
            bail!("a collection needs at least one table");
        }
        Ok(Self {
            names,
            first_rows,
            features,
        })
    }

    /// The same tables with other features, each given by its name and that of its table.
    pub fn with_features<T: AsRef<str>>(
        &self,
        features: impl IntoIterator<Item = (String, T)>,
    ) -> Result<Self> {
        let numbers: HashMap<_, _> = self.names.iter().map(String::as_str).zip(0..).collect();
        let mut known = HashSet::new();
        let feature = |(name, table): (String, T)| {
            let table = table.as_ref();
            let Some(&t) = numbers.get(table) else {
                let names = self.names.join(", ");
                bail!("feature {name}: no table {table}, only {names}");
            };
            if !known.insert(name.clone()) {
                bail!("two features are named {name}");
            }
            Ok(Feature {
                name,
                table: t,
                first_row: self.first_rows[t],
            })
        };
        let features: Vec<_> = features.into_iter().map(feature).collect::<Result<_>>()?;
        if features.is_empty() {
            bail!("a collection needs at least one feature");
        }
        Ok(Self {
            names: self.names.clone(),
            first_rows: self.first_rows.clone(),
            features,
        })
    }

    /// Each table's name and number of rows.
    pub fn tables(&self) -> impl ExactSizeIterator<Item = (&str, usize)> {
        self.names
            .iter()
            .enumerate()
            .map(|(t, name)| (name.as_str(), self.table_len(t)))
    }

    /// Each feature's name and that of its table.
    pub fn features(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.features.iter().map(|feature| {
            let table = self.names.get(feature.table).map_or("", String::as_str);
            (feature.name.as_str(), table)
        })
    }

    /// Whether these are the tables of a collection, and not the one of a layer.
    pub fn is_collection(&self) -> bool {
        !self.names.is_empty()
    }

    /// How many features there are.
    pub fn num_features(&self) -> usize {
        self.features.len()
    }

    /// The row of the virtual table that is row 0 of the table of `feature`.
    #[inline(always)]
    pub fn first_row(&self, feature: usize) -> i64 {
        self.features[feature].first_row
    }

    /// The number of rows of the table of `feature`.
    pub fn num_embeddings(&self, feature: usize) -> usize {
        self.table_len(self.features[feature].table)
    }

    fn table_len(&self, table: usize) -> usize {
        (self.first_rows[table + 1] - self.first_rows[table]) as usize
    }

    /// How an error about the indices of `feature` calls it, such as " of feature history (table movie)"; empty for a layer.
    pub fn describe(&self, feature: usize) -> String {
        let Feature { name, table, .. } = &self.features[feature];
        match self.names.get(*table) {
            None => String::new(),
            Some(table) if table == name => format!(" of table {table}"),
            Some(table) => format!(" of feature {name} (table {table})"),
        }
    }

    /// The first row and the number of rows of the table of each feature, one pair after the other, as CUDA kernels read them.
    pub fn table_rows(&self) -> Vec<i64> {
        (0..self.num_features())
            .flat_map(|feature| [self.first_row(feature), self.num_embeddings(feature) as i64])
            .collect()
    }

    /// The number of rows of all tables together.
    pub fn num_rows(&self) -> usize {
        self.end_row() - self.first_rows[0] as usize
    }

    /// The row of the virtual table after the last row of the last table.
    pub fn end_row(&self) -> usize {
        self.first_rows[self.first_rows.len() - 1] as usize
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
