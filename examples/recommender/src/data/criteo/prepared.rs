//! A log whose lines need not be parsed again: what a model reads of them, in a safetensors file that is mapped.
//!
//! | tensor | dtype | shape | |
//! |---|---|---|---|
//! | `numbers` | f32 | `(examples, 13)` | `ln(1 + x)` of the integers |
//! | `rows` | u32 | `(examples, 26)` | the row of each category in the table of its field |
//! | `labels` | u8 | `(examples,)` | 1 if clicked, else 0 |
//!
//! The metadata's `clicks` is JSON: version, rows per field, counts and fingerprint. Rows depend on the rows per field, so a log is
//! prepared for one number of them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{bail, ensure, Context, Result};
use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::reader::{Click, CATEGORIES, NUMBERS};
use super::{Counts, Summary};

const VERSION: u32 = 1;

/// The key of the metadata.
const CLICKS: &str = "clicks";

/// The clicks that are read at once.
const BLOCK: u64 = 1 << 13;

/// A prepared log.
pub struct Prepared {
    map: Mmap,
    numbers: Range<usize>,
    rows: Range<usize>,
    labels: Range<usize>,
    pub rows_per_field: u32,
    pub summary: Summary,
}

#[derive(Serialize, Deserialize)]
struct Description {
    version: u32,
    rows_per_field: u32,
    examples: u64,
    clicked: u64,
    malformed: u64,
    /// In hexadecimal: JSON's numbers do not hold 64 bits everywhere.
    fingerprint: String,
}

impl Prepared {
    /// Maps the file at `path`; `None` if it is something else.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let mut file = File::open(path)?;
        let mut start = [0; 9];
        // A header of at most 16 MiB, in JSON. Neither text nor gzip begins so.
        let read = file.read(&mut start)?;
        if read < start.len() || start[3..8] != [0; 5] || start[8] != b'{' {
            return Ok(None);
        }
        // SAFETY: as with every mapped file, it must not be changed while it is used; `write` replaces it as a whole.
        let map = unsafe { Mmap::map(&file)? };
        let (_, metadata) = SafeTensors::read_metadata(&map)?;
        let description = metadata.metadata().as_ref().and_then(|all| all.get(CLICKS));
        let description = description.context("a safetensors file, but not of a prepared log")?;
        let description: Description = serde_json::from_str(description).context(CLICKS)?;
        ensure!(
            description.version == VERSION,
            "version {} of prepared logs, this program knows {VERSION}",
            description.version
        );
        let examples = usize::try_from(description.examples)?;
        ensure!(
            examples > 0 && description.rows_per_field > 0,
            "it is empty"
        );
        let tensors = SafeTensors::deserialize(&map)?;
        let range = |name, dtype, shape: &[usize]| -> Result<Range<usize>> {
            let tensor = tensors.tensor(name)?;
            ensure!(
                tensor.dtype() == dtype && tensor.shape() == shape,
                "tensor {name} must be {dtype:?} of shape {shape:?}, got {:?} of {:?}",
                tensor.dtype(),
                tensor.shape()
            );
            let start = tensor.data().as_ptr() as usize - map.as_ptr() as usize;
            Ok(start..start + tensor.data().len())
        };
        let numbers = range("numbers", Dtype::F32, &[examples, NUMBERS])?;
        let rows = range("rows", Dtype::U32, &[examples, CATEGORIES.len()])?;
        let labels = range("labels", Dtype::U8, &[examples])?;
        let counts = Counts {
            examples: description.examples,
            clicked: description.clicked,
            malformed: description.malformed,
        };
        let fingerprint = u64::from_str_radix(&description.fingerprint, 16);
        Ok(Some(Self {
            numbers,
            rows,
            labels,
            rows_per_field: description.rows_per_field,
            summary: Summary {
                counts,
                fingerprint: fingerprint.context("fingerprint")?,
            },
            map,
        }))
    }

    /// The clicks at these positions, some at a time.
    pub fn clicks(self: &Arc<Self>, range: Range<u64>) -> impl Iterator<Item = Vec<Click>> {
        let (this, end) = (self.clone(), range.end);
        let starts = range.step_by(BLOCK as usize);
        starts.map(move |start| {
            let block = start as usize..end.min(start + BLOCK) as usize;
            block.map(|i| this.click(i)).collect()
        })
    }

    fn click(&self, i: usize) -> Click {
        let mut click = Click {
            clicked: self.map[self.labels.clone()][i] != 0,
            numbers: [0.0; NUMBERS],
            rows: [0; CATEGORIES.len()],
        };
        let numbers = &self.map[self.numbers.clone()][4 * NUMBERS * i..][..4 * NUMBERS];
        for (number, bytes) in click.numbers.iter_mut().zip(numbers.as_chunks().0) {
            *number = f32::from_le_bytes(*bytes);
        }
        let rows = 4 * CATEGORIES.len();
        let rows = &self.map[self.rows.clone()][rows * i..][..rows];
        for (row, bytes) in click.rows.iter_mut().zip(rows.as_chunks().0) {
            // The lookup checks it.
            *row = u32::from_le_bytes(*bytes);
        }
        click
    }
}

/// Writes a prepared log to `out`, replacing what is there. All of `clicks` are never in memory together.
pub fn write(
    out: &Path,
    rows_per_field: u32,
    summary: Summary,
    clicks: impl Iterator<Item = Result<Vec<Click>>>,
) -> Result<()> {
    let Summary {
        counts,
        fingerprint,
    } = summary;
    let description = Description {
        version: VERSION,
        rows_per_field,
        examples: counts.examples,
        clicked: counts.clicked,
        malformed: counts.malformed,
        fingerprint: format!("{fingerprint:016x}"),
    };
    let description = (CLICKS.to_owned(), serde_json::to_string(&description)?);
    let examples = usize::try_from(counts.examples)?;
    let mut end = 0;
    let mut tensor = |name: &str, dtype: Dtype, shape: &[usize]| {
        let start = end;
        end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let info = TensorInfo {
            dtype,
            shape: shape.to_vec(),
            data_offsets: (start, end),
        };
        (name.to_owned(), info)
    };
    let tensors = vec![
        tensor("numbers", Dtype::F32, &[examples, NUMBERS]),
        tensor("rows", Dtype::U32, &[examples, CATEGORIES.len()]),
        tensor("labels", Dtype::U8, &[examples]),
    ];
    let starts: Vec<usize> = tensors
        .iter()
        .map(|(_, info)| info.data_offsets.0)
        .collect();
    let metadata = Metadata::new(Some(HashMap::from([description])), tensors)?;
    let mut header = serde_json::to_vec(&metadata)?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut builder = tempfile::Builder::new();
    // As any file is made; by default, only its owner could read it.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder.unwrap_or(Path::new(".")))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let data = 8 + header.len();
    file.as_file().set_len((data + end) as u64)?;
    // Each tensor grows where it belongs.
    let mut parts = Vec::new();
    for start in starts {
        let mut part = File::options().write(true).open(file.path())?;
        part.seek(SeekFrom::Start((data + start) as u64))?;
        parts.push(BufWriter::with_capacity(1 << 20, part));
    }
    let [numbers, rows, labels] = &mut parts[..] else {
        bail!("there are three tensors")
    };
    for clicks in clicks {
        for click in clicks? {
            for number in click.numbers {
                numbers.write_all(&number.to_le_bytes())?;
            }
            for row in click.rows {
                rows.write_all(&row.to_le_bytes())?;
            }
            labels.write_all(&[u8::from(click.clicked)])?;
        }
    }
    for part in &mut parts {
        part.flush()?;
    }
    file.persist(out)?;
    Ok(())
}
