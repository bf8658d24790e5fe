//! The tensor beside `hashed_weight` from which some hashes read what they hash of each row: signatures, or a slot table.
//!
//! It has the rows of the whole virtual table: row `r` of a table that starts at row `first_row` is its row `first_row + r`. It is
//! not trained.

use crate::error::{bail, error};
use crate::hash::Hash;
use crate::op::check_dtype;
use crate::tables::Tables;
use candle_core::{DType, Device, Error, Result, Shape, Storage, Tensor};

/// A row tensor whose dtype and rank are right, and contiguous. Clones share its memory.
#[derive(Debug, Clone)]
pub(crate) struct RowTensor {
    tensor: Tensor,
    /// Of a slot table.
    largest: Option<LargestEntry>,
}

/// The largest entry of a slot table, and where it stands, counted through all rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LargestEntry {
    value: u32,
    position: usize,
}

impl LargestEntry {
    /// Of no entries, 0.
    pub fn of(entries: impl Iterator<Item = u32>) -> Self {
        let first = Self {
            value: 0,
            position: 0,
        };
        entries
            .enumerate()
            .fold(first, |largest, (position, value)| {
                if value > largest.value {
                    Self { value, position }
                } else {
                    largest
                }
            })
    }
}

/// Reads a contiguous tensor of u32.
fn largest_entry(tensor: &Tensor) -> Result<LargestEntry> {
    let tensor = tensor.to_device(&Device::Cpu)?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => {
            let entries = &storage.as_slice::<u32>()?[start..end];
            Ok(LargestEntry::of(entries.iter().copied()))
        }
        _ => bail!("a slot_table must be contiguous"),
    }
}

/// The dtype of the row tensor of this name.
pub(crate) fn dtype(name: &str) -> DType {
    match name {
        "slot_table" => DType::U32,
        _ => DType::I64,
    }
}

/// The shape of the row tensor of this name for a virtual table of `rows` rows.
pub(crate) fn shape(name: &str, hash: &Hash, rows: usize, embedding_dim: usize) -> Shape {
    match name {
        "slot_table" => (rows, embedding_dim.div_ceil(hash.block())).into(),
        _ => rows.into(),
    }
}

impl RowTensor {
    /// `name` is what the hash of the layer calls it. Reads a slot table once.
    ///
    /// # Errors
    /// Another dtype or rank.
    pub fn new(name: &str, tensor: &Tensor) -> Result<Self> {
        check_dtype(name, tensor, &[dtype(name)])?;
        // Not detached, so that a variable is still known as itself when it is saved.
        let tensor = tensor.contiguous()?;
        let largest = match tensor.dtype() {
            DType::U32 => Some(largest_entry(&tensor)?),
            _ => None,
        };
        Ok(Self { tensor, largest })
    }

    /// One that holds no data, to check a shape: that of a slot table with this largest entry.
    pub fn stand_in(tensor: Tensor, largest: Option<LargestEntry>) -> Self {
        Self { tensor, largest }
    }

    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            tensor: self.tensor.to_device(device)?,
            largest: self.largest,
        })
    }

    /// Checks that it is what `hash` needs for a `hashed_weight` of `len` values on `device`.
    ///
    /// # Errors
    /// Another dtype, shape or device, or an entry of a slot table that is no block of `hashed_weight`.
    fn check(
        &self,
        name: &str,
        hash: &Hash,
        len: usize,
        tables: &Tables,
        embedding_dim: usize,
        device: &Device,
    ) -> Result<()> {
        let Self { tensor, largest } = self;
        check_dtype(name, tensor, &[dtype(name)])?;
        let (end_row, got) = (tables.end_row(), tensor.dims());
        let want = shape(name, hash, end_row, embedding_dim);
        let want = want.dims();
        // A single layer may be a part of a larger table, whose other parts its row tensor describes too.
        let suits = match tables.is_collection() {
            true => got == want,
            false => got.len() == want.len() && got[1..] == want[1..] && got[0] >= want[0],
        };
        if !suits {
            let at_least = if tables.is_collection() {
                ""
            } else {
                "at least "
            };
            bail!("{name} must have {at_least}{end_row} rows, and so shape {want:?}, got {got:?}");
        }
        if !tensor.device().same_device(device) {
            bail!(
                "{name} must be on the device of hashed_weight ({:?}), got {:?}",
                device.location(),
                tensor.device().location()
            );
        }
        match *largest {
            Some(LargestEntry { value, position }) if value as usize >= len / hash.block() => {
                let columns = want[1];
                bail!(
                    "{name} must hold numbers of the {} blocks of hashed_weight, got {value} in row {}, column block {}",
                    len / hash.block(),
                    position / columns,
                    position % columns
                )
            }
            _ => Ok(()),
        }
    }
}

/// Checks that there is a row tensor where `hash` needs one, that it is the right one, and none elsewhere.
pub(crate) fn check(
    row_tensor: Option<&RowTensor>,
    hash: &Hash,
    len: usize,
    tables: &Tables,
    embedding_dim: usize,
    device: &Device,
) -> Result<()> {
    match (hash.row_tensor(), row_tensor) {
        (None, None) => Ok(()),
        (Some(name), Some(tensor)) => tensor.check(name, hash, len, tables, embedding_dim, device),
        (Some(name), None) => Err(missing(name)),
        (None, Some(_)) => Err(needless(hash)),
    }
}

/// The error for a row tensor that `hash` does not read.
pub(crate) fn needless(hash: &Hash) -> Error {
    error(format_args!(
        "this hash reads no tensor of the rows: {hash:?}"
    ))
}

/// The error for a hash whose row tensor `name` was not given.
pub(crate) fn missing(name: &str) -> Error {
    error(format_args!(
        "{name} is missing, a tensor with a row for each row of the table, which this hash reads: see with_row_tensor"
    ))
}
