//! The file behind a state dict, of either kind.

use super::pth;
use crate::checkpoint::file::{self, MappedFile, TensorInfo};
use candle_core::{bail, Device, Error, Result, Tensor};
use std::collections::BTreeSet;
use std::path::Path;

/// A file of tensors.
#[derive(Debug)]
pub(super) enum Source {
    Pth(pth::Archive),
    Safetensors(MappedFile),
}

impl Source {
    /// Opens a file, whose kind is told by its first bytes.
    pub(super) fn open(path: &Path, key: Option<&str>) -> Result<Self> {
        let map = file::map(path)?;
        if map.starts_with(pth::MAGIC) {
            let archive = pth::Archive::open(map, key);
            return Ok(Self::Pth(archive.map_err(named)?));
        }
        let file = MappedFile::new(map).map_err(|e| {
            named(Error::msg(format!(
                "neither an archive of torch.save (since PyTorch 1.6) nor safetensors: {e}"
            )))
        })?;
        match key {
            Some(key) => bail!("import: safetensors holds nothing nested, such as {key}"),
            None => Ok(Self::Safetensors(file)),
        }
    }

    /// The keys of the entries.
    pub(super) fn keys(&self) -> BTreeSet<String> {
        match self {
            Self::Pth(archive) => archive.keys().map(str::to_string).collect(),
            Self::Safetensors(file) => {
                let metadata = file.metadata();
                let aliases = metadata.metadata().iter().flatten();
                aliases
                    .filter(|(_, name)| metadata.info(name).is_some())
                    .map(|(alias, _)| alias.clone())
                    .chain(metadata.offset_keys())
                    .collect()
            }
        }
    }

    /// Whether two entries are the same tensor in the file.
    pub(super) fn is_same(&self, a: &str, b: &str) -> bool {
        match self {
            Self::Pth(archive) => archive.is_same(a, b),
            Self::Safetensors(file) => stored_name(file, a) == stored_name(file, b),
        }
    }

    /// The dtype and the shape of an entry.
    pub(super) fn info(&self, key: &str) -> Result<TensorInfo> {
        match self {
            Self::Pth(archive) => archive.info(key),
            Self::Safetensors(file) => file.info(stored_name(file, key)),
        }
    }

    /// The tensor of an entry, contiguous.
    pub(super) fn load(&self, key: &str, device: &Device) -> Result<Tensor> {
        match self {
            Self::Pth(archive) => archive.load(key, device),
            Self::Safetensors(file) => file.load(stored_name(file, key), device),
        }
    }
}

/// The name under which a safetensors file stores an entry: `safetensors.torch.save_model` stores shared memory once, and its
/// metadata maps the other names to the stored one.
fn stored_name<'a>(file: &'a MappedFile, key: &'a str) -> &'a str {
    let metadata = file.metadata();
    let alias = metadata.metadata().as_ref().and_then(|m| m.get(key));
    match alias {
        Some(name) if metadata.info(key).is_none() => name,
        _ => key,
    }
}

/// An error that names the operation.
fn named(e: Error) -> Error {
    Error::msg(format!("import: {e}"))
}
