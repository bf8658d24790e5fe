//! How `indices` are divided into bags: by a fixed length or by offsets, and which of them are padding.
//!
//! `kernels/bags.cuh` is the twin of the reading side; the checks that name a position and a value stand here once, and
//! the CUDA side asks its kernels only for the first position that fails.

use candle_core::{bail, Result};
use std::ops::Range;

/// What happens with a row or an offset that is out of range.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BoundsCheck {
    /// An error that names position and value, on CPU and CUDA alike. On CUDA this costs one small kernel and one
    /// synchronisation with the device per call.
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

/// The division of `nnz` indices into `num_bags` bags, as the shapes alone tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BagShape {
    pub nnz: usize,
    pub num_bags: usize,
    pub division: Division,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Division {
    /// Every bag holds this many indices.
    Fixed(usize),
    /// Bag `b` runs from `offsets[b]` to `offsets[b + 1]`, or to `nnz` where there is no `offsets[b + 1]`.
    Offsets { include_last_offset: bool },
}

impl BagShape {
    /// Bags of the 2-D `indices` of shape `(num_bags, bag_len)`.
    pub fn fixed(num_bags: usize, bag_len: usize) -> Self {
        Self {
            nnz: num_bags * bag_len,
            num_bags,
            division: Division::Fixed(bag_len),
        }
    }

    /// Bags of 1-D `indices` by `num_offsets` offsets.
    pub fn ragged(nnz: usize, num_offsets: usize, include_last_offset: bool) -> Result<Self> {
        let num_bags = if include_last_offset {
            match num_offsets.checked_sub(1) {
                Some(num_bags) => num_bags,
                None => bail!(
                    "hashed-embedding-bag: offsets must hold num_bags + 1 values when include_last_offset is set, got none"
                ),
            }
        } else {
            num_offsets
        };
        Ok(Self {
            nnz,
            num_bags,
            division: Division::Offsets {
                include_last_offset,
            },
        })
    }

    /// The indices of `bag`, clamped into `0..nnz` whatever the offsets say.
    pub fn range<O: Index>(&self, bag: usize, offsets: &[O]) -> Range<usize> {
        match self.division {
            Division::Fixed(bag_len) => bag * bag_len..(bag + 1) * bag_len,
            Division::Offsets { .. } => {
                let clamp = |offset: O| offset.as_i64().clamp(0, self.nnz as i64) as usize;
                let start = clamp(offsets[bag]);
                let end = offsets.get(bag + 1).map_or(self.nnz, |&end| clamp(end));
                start..end.max(start)
            }
        }
    }
}

/// The first position in `indices` whose row is neither padding nor in `0..num_embeddings`.
pub(crate) fn first_bad_row<I: Index>(
    indices: &[I],
    num_embeddings: usize,
    padding_idx: Option<i64>,
) -> Option<usize> {
    indices.iter().position(|index| {
        let row = index.as_i64();
        !(0..num_embeddings as i64).contains(&row) && Some(row) != padding_idx
    })
}

/// The first position in `offsets` that breaks the contract: the first is 0, none decreases, none passes `nnz`.
pub(crate) fn first_bad_offset<O: Index>(offsets: &[O], nnz: usize) -> Option<usize> {
    let mut previous = 0;
    offsets.iter().enumerate().position(|(i, offset)| {
        let offset = offset.as_i64();
        let lowest = std::mem::replace(&mut previous, offset);
        offset < lowest || offset > nnz as i64 || (i == 0 && offset != 0)
    })
}

/// The error for [`first_bad_row`].
pub(crate) fn bad_row<T>(position: usize, row: i64, num_embeddings: usize) -> Result<T> {
    bail!("hashed-embedding-bag: indices must lie in 0..{num_embeddings}, got {row} at position {position}")
}

/// The error for [`first_bad_offset`]; `previous` is the offset before it, where there is one.
pub(crate) fn bad_offset<T>(
    position: usize,
    offset: i64,
    previous: Option<i64>,
    nnz: usize,
) -> Result<T> {
    match previous {
        None => bail!("hashed-embedding-bag: offsets must start at 0, got {offset} at position 0"),
        Some(previous) if offset < previous => bail!(
            "hashed-embedding-bag: offsets must not decrease, got {offset} after {previous} at position {position}"
        ),
        Some(_) => bail!(
            "hashed-embedding-bag: offsets must not pass the number of indices ({nnz}), got {offset} at position {position}"
        ),
    }
}
