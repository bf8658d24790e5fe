//! Files of tensors: safetensors mapped into memory, and files that are replaced whole. Nothing here knows of layers.
//!
//! Errors name the tensor; the callers say which operation failed, and on which file.

use candle_core::safetensors::Load;
use candle_core::{bail, DType, Device, Error, Result, Tensor};
use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, SafeTensors};
use std::fs::{File, Permissions};
use std::io;
use std::path::{Path, PathBuf};
use tempfile::TempPath;

/// The description of a tensor in a file: everything but its values.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// The dtype in the file, in candle's spelling: `f32`, `i64`; also those that candle lacks: `bool`, `i8`, `c64`.
    pub dtype: String,
    /// The dimensions.
    pub shape: Vec<usize>,
    /// The dtype that the tensor has once it is read, mostly the same; `None` where candle has none for its values, so that
    /// reading it is an error.
    pub candle_dtype: Option<DType>,
}

impl TensorInfo {
    pub(crate) fn new(dtype: Dtype, shape: &[usize]) -> Self {
        Self {
            dtype: dtype_name(dtype),
            shape: shape.to_vec(),
            candle_dtype: match dtype {
                Dtype::U16 => Some(DType::U32), // candle widens it
                dtype => DType::try_from(dtype).ok(),
            },
        }
    }

    /// Of a dtype that neither candle nor safetensors has.
    pub(crate) fn unknown(dtype: &str, shape: &[usize]) -> Self {
        Self {
            dtype: dtype.to_string(),
            shape: shape.to_vec(),
            candle_dtype: None,
        }
    }
}

/// The name of a dtype in candle's spelling.
fn dtype_name(dtype: Dtype) -> String {
    dtype.to_string().to_lowercase().replace('_', "")
}

/// The name of the tensor `name` under the path `prefix`, as `VarBuilder::pp` and PyTorch's modules join them.
pub(crate) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() {
        name.to_string()
    } else {
        format!("{prefix}.{name}")
    }
}

/// Maps a file into memory.
pub(crate) fn map(path: &Path) -> Result<Mmap> {
    // To open a named pipe waits for somebody to write to it.
    if !path.metadata()?.is_file() {
        return Err(not_regular());
    }
    let file = File::open(path)?;
    // SAFETY: a map is sound as long as nobody truncates or rewrites the file under it. `replace` renames a new file over
    // the old one, which leaves the old one's pages alone; the types that hold a map ask the same of everybody else.
    Ok(unsafe { Mmap::map(&file)? })
}

/// A safetensors file mapped into memory, and where in it each tensor lies.
#[derive(Debug)]
pub(crate) struct MappedFile {
    map: Mmap,
    data_start: usize,
    metadata: Metadata,
}

impl MappedFile {
    pub(crate) fn new(map: Mmap) -> Result<Self> {
        let (header_len, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|e| Error::msg(format!("no safetensors file: {e}")))?;
        Ok(Self {
            data_start: size_of::<u64>() + header_len,
            map,
            metadata,
        })
    }

    pub(crate) fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    pub(crate) fn info(&self, name: &str) -> Result<TensorInfo> {
        match self.metadata.info(name) {
            Some(info) => Ok(TensorInfo::new(info.dtype, &info.shape)),
            None => Err(missing(name)),
        }
    }

    pub(crate) fn load(&self, name: &str, device: &Device) -> Result<Tensor> {
        let Some(info) = self.metadata.info(name) else {
            return Err(missing(name));
        };
        check_shape(name, &info.shape)?;
        let (start, end) = info.data_offsets;
        let data = &self.map[self.data_start + start..self.data_start + end];
        tensor(info.dtype, &info.shape, data, device)
    }

    /// The values of a tensor of u32, from the map.
    pub(crate) fn u32s(&self, name: &str) -> Result<impl Iterator<Item = u32> + '_> {
        let Some(info) = self.metadata.info(name) else {
            return Err(missing(name));
        };
        let (start, end) = info.data_offsets;
        let data = &self.map[self.data_start + start..self.data_start + end];
        Ok(data
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| u32::from_le_bytes(bytes)))
    }
}

fn missing(name: &str) -> Error {
    Error::CannotFindTensor {
        path: name.to_string(),
    }
    .bt()
}

/// A tensor from its values in row-major order.
pub(crate) fn tensor(
    dtype: Dtype,
    shape: &[usize],
    values: &[u8],
    device: &Device,
) -> Result<Tensor> {
    if TensorInfo::new(dtype, shape).candle_dtype.is_none() {
        bail!("{}", no_dtype(&dtype_name(dtype)));
    }
    TensorView::new(dtype, shape.to_vec(), values)?.load(device)
}

/// What is said of a tensor of this dtype when it is asked for.
pub(crate) fn no_dtype(name: &str) -> String {
    format!("candle has no dtype for {name}; convert the tensor before saving it")
}

/// Refuses a shape whose strides overflow, which a dimension of zero can hide from the element count.
pub(crate) fn check_shape(name: &str, shape: &[usize]) -> Result<()> {
    let mut dims = shape.iter().filter(|&&dim| dim > 0);
    match dims.try_fold(1usize, |product, &dim| product.checked_mul(dim)) {
        Some(_) => Ok(()),
        None => bail!("the shape of tensor {name} is too large, {shape:?}"),
    }
}

/// Replaces the file at `path` as a whole, or creates it: `write` writes a file beside it, which is synced and renamed over
/// it. Symbolic links are followed, and the mode of the file that is replaced is kept.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let path = follow_links(path)?;
    let (temporary, permissions) = prepare(&path)?;
    write(&temporary)?;
    // safetensors puts a file of its own in that place, readable by its owner alone and not synced.
    let written = File::options().write(true).open(&temporary)?;
    written.set_permissions(permissions)?;
    written.sync_all()?;
    temporary.persist(&path).map_err(|e| e.error)?;
    // The rename itself lasts once the folder is synced.
    #[cfg(unix)]
    File::open(folder(&path))?.sync_all()?;
    Ok(())
}

/// Checks what [`replace`] can know before it writes; leaves nothing behind.
pub(crate) fn ensure_replaceable(path: &Path) -> Result<()> {
    prepare(&follow_links(path)?).map(drop)
}

/// Makes an empty file beside `path`, and returns it with the permissions that the file at `path` is to have.
fn prepare(path: &Path) -> Result<(TempPath, Permissions)> {
    let replaced = match path.metadata() {
        Ok(metadata) => Some(metadata),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(e.into()),
    };
    if replaced.as_ref().is_some_and(|old| !old.is_file()) {
        // A rename would put a file in the place of a device or a pipe.
        return Err(not_regular());
    }
    let mut temporary = tempfile::Builder::new();
    temporary.prefix(".checkpoint-");
    // As any new file: a server under another user must be able to read it.
    #[cfg(unix)]
    temporary.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let temporary = temporary.tempfile_in(folder(path))?;
    let permissions = match replaced {
        Some(old) => old.permissions(),
        None => temporary.as_file().metadata()?.permissions(),
    };
    Ok((temporary.into_temp_path(), permissions))
}

/// The folder that a file is in.
fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn not_regular() -> Error {
    io::Error::other("not a regular file").into()
}

/// The path of the file that a path leads to, which need not exist.
fn follow_links(path: &Path) -> Result<PathBuf> {
    let mut path = path.to_path_buf();
    // As many as Linux follows.
    for _ in 0..40 {
        match path.read_link() {
            Ok(link) => path = path.parent().unwrap_or(Path::new("")).join(link),
            // Not a link, or nothing is there.
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("too many levels of symbolic links").into())
}
