//! Files of tensors: safetensors mapped into memory, and files that are replaced whole. Nothing here knows of layers.
//!
//! Errors name the tensor; the callers say which operation failed, and on which file.

use candle_core::safetensors::Load;
use candle_core::{bail, Device, Error, Result, Tensor};
use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorView};
use safetensors::SafeTensors;
use std::fs::File;
use std::path::Path;

/// The name of the tensor `name` under the path `prefix`, as `VarBuilder::pp` and PyTorch's modules join them.
pub(crate) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() {
        name.to_string()
    } else {
        format!("{prefix}.{name}")
    }
}

/// A safetensors file mapped into memory, and where in it each tensor lies.
#[derive(Debug)]
pub(crate) struct MappedFile {
    map: Mmap,
    data_start: usize,
    metadata: Metadata,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        // SAFETY: a map is sound as long as nobody truncates or rewrites the file under it. `replace` renames a new file
        // over the old one, which leaves the old one's pages alone; the public types ask the same of everybody else.
        let map = unsafe { Mmap::map(&file)? };
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

    pub(crate) fn load(&self, name: &str, device: &Device) -> Result<Tensor> {
        let Some(info) = self.metadata.info(name) else {
            return Err(Error::CannotFindTensor {
                path: name.to_string(),
            }
            .bt());
        };
        check_shape(name, &info.shape)?;
        let (start, end) = info.data_offsets;
        let data = &self.map[self.data_start + start..self.data_start + end];
        TensorView::new(info.dtype, info.shape.clone(), data)?.load(device)
    }
}

/// Refuses a shape whose strides overflow, which a dimension of zero can hide from the element count.
pub(crate) fn check_shape(name: &str, shape: &[usize]) -> Result<()> {
    let mut dims = shape.iter().filter(|&&dim| dim > 0);
    match dims.try_fold(1usize, |product, &dim| product.checked_mul(dim)) {
        Some(_) => Ok(()),
        None => bail!("the shape of tensor {name} is too large, {shape:?}"),
    }
}

/// Has a file written beside `path`, syncs it and renames it over `path`.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut temporary = tempfile::Builder::new();
    temporary.prefix(".checkpoint-");
    // As any new file: a server under another user must be able to read it.
    #[cfg(unix)]
    temporary.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let temporary = temporary.tempfile_in(folder)?;
    let permissions = temporary.as_file().metadata()?.permissions();
    let temporary = temporary.into_temp_path();
    write(&temporary)?;
    // safetensors puts a file of its own in that place, for its owner alone and unsynced.
    let written = File::options().write(true).open(&temporary)?;
    written.set_permissions(permissions)?;
    written.sync_all()?;
    temporary.persist(path).map_err(|e| e.error)?;
    // The rename itself lasts once the folder is synced.
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    Ok(())
}
