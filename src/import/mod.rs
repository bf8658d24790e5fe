//! State dicts of PyTorch, read without Python: layers trained with HashedEmbeddingBag, ROBE, LMA or SCMA give the same numbers here.
//!
//! | trained as | import with |
//! |---|---|
//! | `HashedEmbeddingBag` of HashedEmbeddingBag | [`StateDict::hashed_embedding_bag`] |
//! | `HashedEmbedding` of HashedEmbeddingBag | [`StateDict::hashed_embedding`] |
//! | `HashedEmbeddingBag` and `HashedEmbeddingCPU` of ROBE | [`StateDict::robe`] |
//! | the DLRM of ROBE's authors: many of these over one parameter | [`StateDict::robe_dlrm`] |
//! | `HashedEmbeddingBag` of the ROBE package with `hmode="lma_hash"` | [`StateDict::lma`] |
//! | the DLRM of SCMA's authors | [`StateDict::scma`] |
//! | the rest of a model | [`StateDict::take`] |
//!
//! [`checkpoint::save`](crate::checkpoint::save) then writes a file that needs none of this. An `nn.EmbeddingBag` that was not
//! hashed can be compressed: [fit](crate::HashedEmbeddingBag::fit) a layer to its table.
//!
//! ```
//! use candle_core::{Device, Module, Tensor};
//! use candle_hashed_embedding_bag::{checkpoint, HashedEmbeddingBagConfig, Mode, StateDict};
//!
//! # fn main() -> candle_core::Result<()> {
//! # let (model, folder) = ("tests/golden/original.pth", tempfile::tempdir()?);
//! # let out = folder.path().join("model.safetensors");
//! let mut state = StateDict::open(model)?;
//! let config = HashedEmbeddingBagConfig { mode: Mode::Mean, ..Default::default() };
//! let layer = state.hashed_embedding_bag("", 1000, 16, config, &Device::Cpu)?;
//! assert!(state.keys().next().is_none(), "nothing is left over");
//!
//! let indices = Tensor::new(&[[1i64, 2, 3], [500, 2, 999]], &Device::Cpu)?;
//! assert_eq!(layer.forward(&indices)?.dims(), [2, 16]);
//! checkpoint::save(out, [], [("categories", &layer)])?;
//! # Ok(())
//! # }
//! ```

mod pickle;
mod pth;
mod robe;
mod semantic;
mod source;

pub use semantic::{scma_table, LmaModule};

use crate::checkpoint::file::{join, TensorInfo};
use crate::config::{HashedEmbeddingBagConfig, HashedEmbeddingConfig};
use crate::hash::Hash;
use crate::layer::{HashedEmbedding, HashedEmbeddingBag, HASHED_WEIGHT, INNER_BAG};
use candle_core::{bail, Device, Error, Result, Tensor};
use source::Source;
use std::collections::BTreeSet;
use std::path::Path;

/// A PyTorch state dict in a file: `torch.save(module.state_dict(), path)`, or the same as safetensors.
///
/// Layers are taken out of it, each with all entries of its module; [`keys`](Self::keys) names the entries that are left. A call
/// that fails takes nothing. Tensors are read when they are taken, and keep their dtype and every bit.
///
/// The caller must provide what a state dict does not hold, and it cannot be checked: a wrong `num_embeddings` only moves the
/// bounds, but a wrong `embedding_dim`, chunk size or offset gives other numbers.
///
/// # What is refused
/// An entry that is missing, that the module does not have, or that has a wrong shape, dtype or value; two names of one parameter
/// with different values. The message names the entry. If PyTorch keeps a parameter under several names (ROBE's `weight` and
/// `hashed_weight`), any of them suffices, because safetensors stores shared memory once. Two modules of HashedEmbeddingBag that
/// share a parameter become two layers with the same values.
///
/// # Files
/// A `.pth` file contains a pickle, and opening one in Python can run code. Nothing is run here, and a broken or hostile file is
/// an error: it neither causes a panic nor exhausts memory. Archives of PyTorch 1.6 and later are read, in pickle protocol 2 (the
/// default) to 5, with tensors in any strides and of every dtype that candle has. Everything else in a file, including objects of
/// any class, is passed over; a subclass of dict counts as a dict.
///
/// The file is mapped: it must not be changed in place while this is alive. Only what is asked for is read.
///
/// # Wrappers
/// DistributedDataParallel puts `module.` before all keys of a model, torch.compile `_orig_mod.`. They are part of the
/// prefix here: a layer `user` of such a model is `module.user`. If they are left out, the error names the key that exists.
#[derive(Debug)]
pub struct StateDict {
    source: Source,
    /// The keys of the entries that have not been taken.
    entries: BTreeSet<String>,
}

/// The entries of one module: those directly under a prefix.
struct Module {
    prefix: String,
    names: Vec<String>,
}

impl Module {
    fn key(&self, name: &str) -> String {
        join(&self.prefix, name)
    }

    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|own| own == name)
    }

    fn keys(&self) -> impl Iterator<Item = String> + '_ {
        self.names.iter().map(|name| self.key(name))
    }
}

impl StateDict {
    /// Opens a `.pth`, `.pt` or `.safetensors` file, told apart by its first bytes.
    ///
    /// # Errors
    /// No such file, a file of neither kind, or one that is broken.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_file(path.as_ref(), None)
    }

    /// Opens a state dict nested in what a training script saved: `state_dict` is the key of the one in
    /// `torch.save({"epoch": 3, "state_dict": …}, path)`.
    ///
    /// Dots lead further down, through the keys of dicts and the positions in lists: `state_dict.generator`, `models.0`. Keys
    /// that contain dots themselves are found, too.
    ///
    /// # Errors
    /// Those of [`open`](Self::open), or nothing under that key; the message names the keys of the state dicts that exist. A
    /// safetensors file holds nothing nested.
    pub fn open_nested(path: impl AsRef<Path>, key: &str) -> Result<Self> {
        Self::open_file(path.as_ref(), Some(key))
    }

    fn open_file(path: &Path, key: Option<&str>) -> Result<Self> {
        let source = Source::open(path, key).map_err(|e| e.with_path(path))?;
        Ok(Self {
            entries: source.keys(),
            source,
        })
    }

    /// The names of the entries that have not been taken, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(String::as_str)
    }

    /// The dtype and the shape of an entry. Does not read its values.
    ///
    /// # Errors
    /// No such entry, or a tensor that is not an array of values in memory, such as a sparse one.
    pub fn tensor_info(&self, key: &str) -> Result<TensorInfo> {
        self.find(key, |key| self.source.info(key))
    }

    /// Takes one entry as it is stored, such as a weight of a layer that is not hashed.
    ///
    /// # Errors
    /// No such entry, a dtype that candle does not have (see [`TensorInfo::candle_dtype`]), or a tensor that is not an array of
    /// values in memory, such as a sparse one.
    pub fn take(&mut self, key: &str, device: &Device) -> Result<Tensor> {
        let tensor = self.load(key, device)?;
        self.entries.remove(key);
        Ok(tensor)
    }

    /// Takes the `HashedEmbeddingBag` at `prefix` (`""`: the state dict is the module's own): `hashed_weight`, 1-D.
    ///
    /// The hash is [`Hash::original`]; leave `config.hash` at `None`.
    ///
    /// # Errors
    /// [What is refused](Self#what-is-refused), and the errors of [`HashedEmbeddingBag::new`].
    pub fn hashed_embedding_bag(
        &mut self,
        prefix: &str,
        num_embeddings: usize,
        embedding_dim: usize,
        config: HashedEmbeddingBagConfig,
        device: &Device,
    ) -> Result<HashedEmbeddingBag> {
        let module = self.module(prefix, &[HASHED_WEIGHT])?;
        let config = with_hash(config, Hash::original())?;
        let key = module.key(HASHED_WEIGHT);
        let weight = self.load(&key, device)?;
        let layer = HashedEmbeddingBag::new(weight, num_embeddings, embedding_dim, config);
        let layer = layer.map_err(|e| named(&key, e))?;
        self.remove(module.keys());
        Ok(layer)
    }

    /// Takes the `HashedEmbedding` at `prefix`: `hashed_embedding_bag.hashed_weight`, 1-D.
    ///
    /// # Errors
    /// Those of [`hashed_embedding_bag`](Self::hashed_embedding_bag).
    pub fn hashed_embedding(
        &mut self,
        prefix: &str,
        num_embeddings: usize,
        embedding_dim: usize,
        config: HashedEmbeddingConfig,
        device: &Device,
    ) -> Result<HashedEmbedding> {
        self.module(prefix, &[&join(INNER_BAG, HASHED_WEIGHT)])?;
        let (inner, config) = (join(prefix, INNER_BAG), config.into());
        self.hashed_embedding_bag(&inner, num_embeddings, embedding_dim, config, device)
            .map(HashedEmbedding::from)
    }

    /// The module at a prefix, whose entries must all be `known`.
    fn module(&self, prefix: &str, known: &[&str]) -> Result<Module> {
        let within = if prefix.is_empty() {
            ""
        } else {
            &join(prefix, "")
        };
        let names: Vec<_> = self
            .keys()
            .filter_map(|key| key.strip_prefix(within))
            .filter(|name| !name.contains('.'))
            .map(str::to_string)
            .collect();
        if let Some(extra) = names.iter().find(|name| !known.contains(&name.as_str())) {
            bail!(
                "import: {} is no entry of this module, which has {}",
                join(prefix, extra),
                known.join(", ")
            );
        }
        Ok(Module {
            prefix: prefix.to_string(),
            names,
        })
    }

    fn load(&self, key: &str, device: &Device) -> Result<Tensor> {
        self.find(key, |key| self.source.load(key, device))
    }

    fn find<T>(&self, key: &str, read: impl FnOnce(&str) -> Result<T>) -> Result<T> {
        if !self.entries.contains(key) {
            return Err(self.missing(key));
        }
        read(key).map_err(|e| named(key, e))
    }

    /// The error for an entry that does not exist. It names entries that match with a longer prefix or with other wrappers.
    fn missing(&self, key: &str) -> Error {
        let longer = |other: &&str| (other.strip_suffix(key)).is_some_and(|p| p.ends_with('.'));
        let same = |other: &&str| without_wrappers(other).eq(without_wrappers(key));
        let similar: Vec<_> = self
            .keys()
            .filter(|other| longer(other) || same(other))
            .take(MAX_NAMED)
            .collect();
        let message = if similar.is_empty() {
            let mut keys: Vec<_> = self.keys().take(MAX_NAMED).collect();
            if self.entries.len() > keys.len() {
                keys.push("…");
            }
            format!("import: {key} is missing from {}", keys.join(", "))
        } else {
            let prefixes: Vec<_> = (similar.iter())
                .filter_map(|other| other.strip_suffix(key))
                .collect();
            let advice = match prefixes.is_empty() {
                true => String::new(),
                false => format!("; begin the prefix with {}", prefixes.join(" or ")),
            };
            format!(
                "import: {key} is missing, but there is {}{advice}",
                similar.join(" and ")
            )
        };
        Error::msg(message).bt()
    }

    fn remove(&mut self, keys: impl Iterator<Item = String>) {
        for key in keys {
            self.entries.remove(&key);
        }
    }
}

/// How many keys a message names at most.
const MAX_NAMED: usize = 8;

/// The attributes under which PyTorch's wrappers keep a module: DataParallel and DistributedDataParallel, torch.compile, FSDP,
/// and activation checkpointing.
const WRAPPERS: [&str; 4] = [
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
];

/// The parts of a key, without those of wrappers.
fn without_wrappers(key: &str) -> impl Iterator<Item = &str> {
    key.split('.').filter(|part| !WRAPPERS.contains(part))
}

/// The configuration, with its hash set to that of the module.
fn with_hash(config: HashedEmbeddingBagConfig, hash: Hash) -> Result<HashedEmbeddingBagConfig> {
    if config.hash.is_some_and(|other| other != hash) {
        bail!("import: the hash is that of the module, {hash:?}; leave config.hash None");
    }
    Ok(HashedEmbeddingBagConfig {
        hash: Some(hash),
        ..config
    })
}

/// An error that names the operation and the entry.
fn named(key: &str, e: Error) -> Error {
    Error::msg(format!("import: {key}: {e}"))
}
