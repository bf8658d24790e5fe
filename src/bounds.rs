//! Checks of indices and offsets against their ranges, and the errors they give.
//!
//! On the CPU, each thread of a lookup checks the indices that it looks up. On CUDA a kernel only finds out whether anything is
//! out of range; the checks here then find out what, so that the message is the same.

use crate::bags::{Bag, BagShape, Index};
use crate::error::{bail, error};
use crate::tables::Tables;
use candle_core::{Error, Result};
use serde::{Deserialize, Serialize};
use std::iter;
use std::ops::Range;

/// What to do about a row or an offset that is out of range.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum BoundsCheck {
    /// Returns an error that gives position and value, on CPU and CUDA alike. On CUDA a kernel checks them before the lookup, and
    /// each call waits for that kernel, not for the lookup.
    #[default]
    Error,
    /// No check and no synchronisation. A row outside the table is hashed like any other and offsets are clamped to
    /// `indices`: the result is then meaningless, but nothing outside the tensors is read or written.
    Off,
}

/// An error for the first offset that breaks the contract: the first is 0, none decreases, none exceeds `nnz`.
pub(crate) fn check_offsets<O: Index>(offsets: &[O], nnz: usize) -> Result<()> {
    let mut previous = 0;
    for (position, offset) in offsets.iter().enumerate() {
        let offset = offset.as_i64();
        let previous = std::mem::replace(&mut previous, offset);
        if position == 0 && offset != 0 {
            bail!("offsets must start at 0, got {offset} at position 0");
        }
        if offset < previous {
            bail!(
                "offsets must not decrease, got {offset} after {previous} at position {position}"
            );
        }
        if offset > nnz as i64 {
            bail!("offsets must not pass the number of indices ({nnz}), got {offset} at position {position}");
        }
    }
    Ok(())
}

/// An index that is neither padding nor a row of its table; ordered by position.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BadRow {
    position: usize,
    feature: usize,
}

impl BadRow {
    /// The first one in the bags `of`. Offsets must have passed [`check_offsets`]. Indices outside every bag are not checked,
    /// because they are never looked up.
    pub fn find<I: Index>(
        indices: &[I],
        ranges: impl Fn(Bag) -> Range<usize>,
        of: Range<usize>,
        bags: &BagShape,
        tables: &Tables,
        padding_idx: Option<i64>,
    ) -> Option<Self> {
        let first_bad = |range: Range<usize>, feature: usize| {
            let rows = 0..tables.num_embeddings(feature) as i64;
            // A row below 0 and a row past the last both set the sign bit. Being free of branches, this vectorises.
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
                feature,
            })
        };
        match (of.clone().next(), of.clone().next_back()) {
            // The indices of all these bags are consecutive and belong to one feature.
            (Some(first), Some(last)) if bags.features == 1 => {
                let (first, last) = (ranges(bags.bag(first)), ranges(bags.bag(last)));
                first_bad(first.start..last.end, 0)
            }
            _ => {
                let first = bags.bag(of.start);
                let all = iter::successors(Some(first), |&bag| Some(bags.after(bag)));
                all.take(of.len())
                    .filter_map(|bag| first_bad(ranges(bag), bag.feature))
                    .min()
            }
        }
    }

    pub fn error<I: Index>(&self, indices: &[I], tables: &Tables) -> Error {
        error(format_args!(
            "indices{} must lie in 0..{}, got {} at position {}",
            tables.describe(self.feature),
            tables.num_embeddings(self.feature),
            indices[self.position].as_i64(),
            self.position,
        ))
    }
}
