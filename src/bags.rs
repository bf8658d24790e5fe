//! How `indices` are divided into bags, by a fixed length or by offsets, and which table each bag looks into.
//!
//! `kernels/bags.cuh` is the twin of the reading side. The checks that name a position and a value stand here once: a
//! kernel only tells that something is out of range, and these find what.

use candle_core::{bail, Error, Result};
use std::collections::HashSet;
use std::ops::Range;

const OP: &str = "hashed-embedding-bag";

/// What happens with a row or an offset that is out of range.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BoundsCheck {
    /// An error that names position and value, on CPU and CUDA alike. On CUDA a kernel before the lookup looks for one, and
    /// each call waits for that kernel, not for the lookup.
    #[default]
    Error,
    /// No check and no synchronisation. A row outside the table is hashed like any other, offsets are clamped into
    /// `indices`: the result is then meaningless, but nothing outside the tensors is read or written.
    Off,
}

/// An index dtype.
pub(crate) trait Index: Copy + Send + Sync {
    fn as_i64(self) -> i64;
}

impl Index for u32 {
    fn as_i64(self) -> i64 {
        self.into()
    }
}

impl Index for i32 {
    fn as_i64(self) -> i64 {
        self.into()
    }
}

impl Index for i64 {
    fn as_i64(self) -> i64 {
        self
    }
}

/// The order of jagged bags in a collection of tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JaggedLayout {
    /// All bags of the first table, then all of the second, as in TorchRec's `KeyedJaggedTensor`: bag `b` of table `t` is
    /// number `t * batch + b`.
    FeatureMajor,
    /// The bags of all tables for the first sample, then for the second: bag `b` of table `t` is number `b * tables + t`.
    BatchMajor,
}

/// The tables that share one `hashed_weight`: consecutive rows of one virtual table. A layer of its own has one.
#[derive(Debug, Clone)]
pub(crate) struct Tables {
    /// Empty for the table of a layer of its own.
    names: Vec<String>,
    /// Table `t` is rows `first_rows[t]..first_rows[t + 1]`.
    first_rows: Vec<i64>,
}

impl Tables {
    /// One table of `num_embeddings` rows from `first_row` on.
    pub fn one(first_row: usize, num_embeddings: usize) -> Result<Self> {
        let end = first_row.saturating_add(num_embeddings);
        if num_embeddings == 0 || i64::try_from(end).is_err() {
            let from = match first_row {
                0 => String::new(),
                first_row => format!(" from row {first_row} on"),
            };
            bail!("{OP}: num_embeddings must lie in 1..2^63, got {num_embeddings}{from}");
        }
        Ok(Self {
            names: vec![],
            first_rows: vec![first_row as i64, end as i64],
        })
    }

    /// Tables by name and number of rows, one after the other.
    pub fn named(tables: impl IntoIterator<Item = (String, usize)>) -> Result<Self> {
        let (mut names, mut first_rows) = (vec![], vec![0]);
        let (mut end, mut known) = (0, HashSet::new());
        for (name, num_embeddings) in tables {
            let table = Self::one(end, num_embeddings)
                .map_err(|e| candle_core::Error::msg(format!("table {name}: {e}")))?;
            if !known.insert(name.clone()) {
                bail!("{OP}: two tables are named {name}");
            }
            end += num_embeddings;
            names.push(name);
            first_rows.push(table.first_rows[1]);
        }
        if names.is_empty() {
            bail!("{OP}: a collection needs at least one table");
        }
        Ok(Self { names, first_rows })
    }

    pub fn len(&self) -> usize {
        self.first_rows.len() - 1
    }

    /// The names and numbers of rows.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, usize)> {
        self.names
            .iter()
            .enumerate()
            .map(|(t, name)| (name.as_str(), self.num_embeddings(t)))
    }

    /// Row 0 of table `t` as a row of the virtual table.
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

    /// The end of the last table, as a row of the virtual table.
    pub fn end_row(&self) -> usize {
        self.first_rows[self.len()] as usize
    }

    /// The boundaries of all tables; one more than there are tables.
    pub fn first_rows(&self) -> &[i64] {
        &self.first_rows
    }
}

/// The division of `nnz` indices into `num_bags` bags, as the shapes alone tell it.
///
/// Bags are counted in the order of the output: bag `bag` looks into table `bag % tables`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BagShape {
    pub nnz: usize,
    pub num_bags: usize,
    pub tables: usize,
    pub division: Division,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Division {
    /// Every bag holds this many indices.
    Fixed(usize),
    /// The bag at place `p` of the layout runs from `offsets[p]` to `offsets[p + 1]`, or to `nnz` where there is no
    /// `offsets[p + 1]`.
    Offsets {
        include_last_offset: bool,
        layout: JaggedLayout,
    },
}

impl BagShape {
    /// Bags of the 2-D `indices` of shape `(num_bags, bag_len)`.
    pub fn fixed(num_bags: usize, bag_len: usize, tables: usize) -> Result<Self> {
        let Some(nnz) = num_bags.checked_mul(bag_len) else {
            bail!("{OP}: indices of shape [{num_bags}, {bag_len}] are too many");
        };
        Ok(Self {
            nnz,
            num_bags,
            tables,
            division: Division::Fixed(bag_len),
        })
    }

    /// Bags of 1-D `indices` by `num_offsets` offsets.
    pub fn ragged(
        nnz: usize,
        num_offsets: usize,
        include_last_offset: bool,
        tables: usize,
        layout: JaggedLayout,
    ) -> Result<Self> {
        let num_bags = if include_last_offset {
            match num_offsets.checked_sub(1) {
                Some(num_bags) => num_bags,
                None => bail!(
                    "{OP}: offsets must hold num_bags + 1 values when include_last_offset is set, got none"
                ),
            }
        } else {
            num_offsets
        };
        if !num_bags.is_multiple_of(tables) {
            bail!("{OP}: offsets must tell the same number of bags for each of {tables} tables, got {num_bags} bags");
        }
        Ok(Self {
            nnz,
            num_bags,
            tables,
            division: Division::Offsets {
                include_last_offset,
                layout,
            },
        })
    }

    /// The length of each bag, where all are of one by definition.
    pub fn bag_len(&self) -> Option<usize> {
        match self.division {
            Division::Fixed(bag_len) => Some(bag_len),
            Division::Offsets { .. } => None,
        }
    }

    /// For jagged bags in feature-major order, how many there are of each table; 0 for any other.
    pub fn feature_stride(&self) -> usize {
        match self.division {
            Division::Offsets {
                layout: JaggedLayout::FeatureMajor,
                ..
            } if self.tables > 1 => self.num_bags / self.tables,
            _ => 0,
        }
    }

    /// The place of `bag` in the layout of the offsets.
    fn place(&self, bag: usize) -> usize {
        match self.feature_stride() {
            0 => bag,
            batch => bag % self.tables * batch + bag / self.tables,
        }
    }

    /// The indices of `bag`, clamped into `0..nnz` whatever the offsets say.
    pub fn range<O: Index>(&self, bag: usize, offsets: &[O]) -> Range<usize> {
        match self.division {
            Division::Fixed(bag_len) => bag * bag_len..(bag + 1) * bag_len,
            Division::Offsets { .. } => {
                let clamp = |offset: O| offset.as_i64().clamp(0, self.nnz as i64) as usize;
                let place = self.place(bag);
                let start = clamp(offsets[place]);
                let end = offsets.get(place + 1).map_or(self.nnz, |&end| clamp(end));
                start..end.max(start)
            }
        }
    }
}

/// An error for the first offset that breaks the contract: the first is 0, none decreases, none passes `nnz`.
pub(crate) fn check_offsets<O: Index>(offsets: &[O], nnz: usize) -> Result<()> {
    let mut previous = 0;
    for (position, offset) in offsets.iter().enumerate() {
        let offset = offset.as_i64();
        let previous = std::mem::replace(&mut previous, offset);
        if position == 0 && offset != 0 {
            bail!("{OP}: offsets must start at 0, got {offset} at position 0");
        }
        if offset < previous {
            bail!("{OP}: offsets must not decrease, got {offset} after {previous} at position {position}");
        }
        if offset > nnz as i64 {
            bail!("{OP}: offsets must not pass the number of indices ({nnz}), got {offset} at position {position}");
        }
    }
    Ok(())
}

/// An index whose row is neither padding nor in its table; ordered by position.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BadRow {
    position: usize,
    table: usize,
}

impl BadRow {
    /// The first of some bags. Offsets have passed [`check_offsets`]; indices in no bag are not looked at, nor ever looked up.
    pub fn find<I: Index>(
        indices: &[I],
        ranges: impl Fn(usize) -> Range<usize>,
        of: Range<usize>,
        bags: &BagShape,
        tables: &Tables,
        padding_idx: Option<i64>,
    ) -> Option<Self> {
        let first_bad = |range: Range<usize>, table: usize| {
            let rows = 0..tables.num_embeddings(table) as i64;
            // The sign bit is set by a row below 0 and by one past the last: no branches, so this becomes vectors.
            let signs = indices[range.clone()].iter().fold(0, |signs, index| {
                let row = index.as_i64();
                signs | row | (rows.end - 1).wrapping_sub(row)
            });
            if signs >= 0 {
                return None;
            }
            let bad = indices[range.clone()].iter().position(|index| {
                let row = index.as_i64();
                !rows.contains(&row) && Some(row) != padding_idx
            })?;
            Some(Self {
                position: range.start + bad,
                table,
            })
        };
        match (of.clone().next(), of.clone().next_back()) {
            // All bags are one stretch of indices.
            (Some(first), Some(last)) if bags.tables == 1 => {
                first_bad(ranges(first).start..ranges(last).end, 0)
            }
            _ => of
                .filter_map(|bag| first_bad(ranges(bag), bag % bags.tables))
                .min(),
        }
    }

    pub fn error<I: Index>(&self, indices: &[I], tables: &Tables) -> Error {
        let of_table = match tables.names.get(self.table) {
            Some(name) => format!(" of table {name}"),
            None => String::new(),
        };
        Error::msg(format!(
            "{OP}: indices{of_table} must lie in 0..{}, got {} at position {}",
            tables.num_embeddings(self.table),
            indices[self.position].as_i64(),
            self.position,
        ))
        .bt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ragged(nnz: usize, num_offsets: usize, include_last_offset: bool) -> BagShape {
        let layout = JaggedLayout::BatchMajor;
        BagShape::ragged(nnz, num_offsets, include_last_offset, 1, layout).unwrap()
    }

    /// Positions past 2^32, as no test has the memory for.
    #[test]
    fn bags_lie_past_32_bits() {
        let fixed = BagShape::fixed((1 << 33) + 1, 3, 1).unwrap();
        assert_eq!(fixed.nnz, 3 * (1 << 33) + 3);
        assert_eq!(fixed.range::<i64>(1 << 33, &[]), 3 << 33..(3 << 33) + 3);

        let (a, b) = ((1i64 << 31) + 1, (1i64 << 33) + 5);
        let (start, middle) = (a as usize, b as usize);
        let nnz = (1 << 40) + 7;
        let bags = ragged(nnz, 3, false);
        assert_eq!(bags.range(0, &[0, a, b]), 0..start);
        assert_eq!(bags.range(1, &[0, a, b]), start..middle);
        assert_eq!(bags.range(2, &[0, a, b]), middle..nnz);
        assert_eq!(
            bags.range(1, &[0u32, u32::MAX, 7]),
            u32::MAX as usize..u32::MAX as usize
        );
        assert_eq!(bags.range(0, &[0u32, u32::MAX, 7]), 0..u32::MAX as usize);
        let last = ragged(nnz, 3, true);
        assert_eq!(
            (last.num_bags, last.range(1, &[0, a, b])),
            (2, start..middle)
        );
        assert!(check_offsets(&[0, a, nnz as i64], nnz).is_ok());
        assert!(check_offsets(&[0, a, nnz as i64 + 1], nnz).is_err());
    }

    /// Whatever the offsets say, a bag lies within the indices.
    #[test]
    fn offsets_are_clamped() {
        for nnz in [0, 1, 5] {
            let bags = ragged(nnz, 2, true);
            for start in [i64::MIN, -1, 0, 1, 4, 5, 6, 1 << 32, i64::MAX] {
                for end in [i64::MIN, -1, 0, 1, 4, 5, 6, 1 << 32, i64::MAX] {
                    let range = bags.range(0, &[start, end]);
                    assert!(
                        range.start <= range.end && range.end <= nnz,
                        "{start} {end}"
                    );
                }
            }
        }
    }
}
