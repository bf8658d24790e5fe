//! The file behind a state dict, of either kind.

use super::pth;
use crate::checkpoint::file::MappedFile;
use candle_core::{bail, Device, Error, Result, Tensor};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A file of tensors.
#[derive(Debug)]
pub(super) enum Source {
    Pth(pth::Archive),
    Safetensors(MappedFile),
}

impl Source {
    /// Opens a file; its first bytes tell its kind.
    pub(super) fn open(path: &Path, key: Option<&str>) -> Result<Self> {
        let mut file = File::open(path)?;
        let mut magic = [0; pth::MAGIC.len()];
        if file.read_exact(&mut magic).is_ok() && magic == pth::MAGIC {
            return Ok(Self::Pth(pth::Archive::open(file, key)?));
        }
        let file = MappedFile::open(path).map_err(|e| {
            Error::msg(format!(
                "import: neither an archive of torch.save (since PyTorch 1.6) nor safetensors: {e}"
            ))
        })?;
        match key {
            Some(key) => bail!("import: safetensors holds nothing nested, such as {key}"),
            None => Ok(Self::Safetensors(file)),
        }
    }

    /// The keys of the entries, and where the tensor of each lies: two entries of one place share their memory.
    pub(super) fn entries(&self) -> BTreeMap<String, String> {
        match self {
            Self::Pth(archive) => archive.entries(),
            Self::Safetensors(file) => {
                let metadata = file.metadata();
                let names = metadata.offset_keys();
                let aliases = metadata.metadata().iter().flatten();
                aliases
                    .filter(|(_, name)| metadata.info(name).is_some())
                    .map(|(alias, name)| (alias.clone(), name.clone()))
                    .chain(names.into_iter().map(|name| (name.clone(), name)))
                    .collect()
            }
        }
    }

    /// The tensor of an entry, contiguous.
    pub(super) fn load(&self, key: &str, device: &Device) -> Result<Tensor> {
        match self {
            Self::Pth(archive) => archive.load(key, device),
            Self::Safetensors(file) => file.load(name(file, key), device),
        }
    }
}

/// The name under which a safetensors file holds an entry: `safetensors.torch.save_model` stores shared memory once, and
/// notes the other names of it in the metadata, each with the one that is stored.
fn name<'a>(file: &'a MappedFile, key: &'a str) -> &'a str {
    let metadata = file.metadata();
    let alias = metadata.metadata().as_ref().and_then(|m| m.get(key));
    match alias {
        Some(name) if metadata.info(key).is_none() => name,
        _ => key,
    }
}
