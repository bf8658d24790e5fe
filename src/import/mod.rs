//! State dicts of PyTorch, read without Python: what was trained with HashedEmbeddingBag or ROBE gives the same numbers
//! here.
//!
//! | trained as | import with |
//! |---|---|
//! | `HashedEmbeddingBag` of HashedEmbeddingBag | [`StateDict::hashed_embedding_bag`] |
//! | `HashedEmbedding` of HashedEmbeddingBag | [`StateDict::hashed_embedding`] |
//! | `HashedEmbeddingBag` and `HashedEmbeddingCPU` of ROBE | [`StateDict::robe`] |
//! | the DLRM of ROBE's authors: many of these over one parameter | [`StateDict::robe_dlrm`] |
//! | the rest of a model | [`StateDict::take`] |
//!
//! [`checkpoint::save`](crate::checkpoint::save) then writes a file that needs none of this. To make a hashed layer of an
//! `nn.EmbeddingBag` that was not hashed, [fit](crate::HashedEmbeddingBag::fit) one to its table.
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

mod pth;

use crate::checkpoint::{join, MappedFile};
use crate::collection::HashedEmbeddingBagCollection;
use crate::config::{HashedEmbeddingBagConfig, HashedEmbeddingConfig};
use crate::hash::Hash;
use crate::layer::{HashedEmbedding, HashedEmbeddingBag, HASHED_WEIGHT, INNER_BAG};
use candle_core::{bail, DType, Device, Error, Result, Tensor};
use safetensors::View;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A PyTorch state dict in a file: `torch.save(module.state_dict(), path)`, or the same as safetensors.
///
/// Layers are taken out of it, each with all entries of its module: what [`keys`](Self::keys) names in the end is what
/// nothing took. A call that fails takes nothing. Tensors are read when they are taken, and keep dtype and every bit.
///
/// What a state dict does not hold is the caller's to say, and cannot be checked: a wrong `num_embeddings` only moves the
/// bounds, but a wrong `embedding_dim`, chunk size or offset gives other numbers.
///
/// # What is refused
/// By the name of the entry: one that is missing, one that the module does not have, a wrong shape, dtype or value, two
/// names of one parameter with different values. The names of a parameter that PyTorch keeps under several (ROBE's
/// `weight` and `hashed_weight`) are one, any of which suffices: safetensors stores shared memory once. Two modules of
/// HashedEmbeddingBag that were given one parameter become two layers with the same values.
///
/// # Files
/// A `.pth` is a pickle, and in Python, opening one can run its code. Nothing is run here, and a broken or hostile file is
/// an error, not a panic or the end of the memory. Read are archives of PyTorch 1.6 and later in pickle protocol 2, the
/// default, with tensors of f32, f64, f16, bf16, i64, i32, i16 and u8 in any strides. A safetensors file is mapped: it must
/// not be changed in place meanwhile.
#[derive(Debug)]
pub struct StateDict {
    source: Box<dyn Source>,
    /// What nothing has taken yet, and where it lies in the file: two entries of one place share their memory.
    entries: BTreeMap<String, String>,
}

/// A file of tensors.
trait Source: std::fmt::Debug + Send + Sync {
    /// The entries, and the place of each.
    fn entries(&self) -> BTreeMap<String, String>;
    /// The tensor of an entry, contiguous.
    fn load(&self, key: &str, device: &Device) -> Result<Tensor>;
}

/// `safetensors.torch.save_model` stores shared memory under one name and writes the others, each with that one, into the
/// metadata.
impl Source for MappedFile {
    fn entries(&self) -> BTreeMap<String, String> {
        let metadata = self.metadata();
        let names = metadata.offset_keys();
        let aliases = metadata.metadata().iter().flatten();
        aliases
            .filter(|(_, name)| metadata.info(name).is_some())
            .map(|(alias, name)| (alias.clone(), name.clone()))
            .chain(names.into_iter().map(|name| (name.clone(), name)))
            .collect()
    }

    fn load(&self, key: &str, device: &Device) -> Result<Tensor> {
        let metadata = self.metadata();
        let alias = metadata.metadata().as_ref().and_then(|m| m.get(key));
        match alias {
            Some(name) if metadata.info(key).is_none() => self.load(name, device),
            _ => self.load(key, device),
        }
    }
}

/// The entries of ROBE's modules, besides `hashed_weight`.
const WEIGHT: &str = "weight";
const RANDOM_NUMBERS: &str = "random_numbers";
const SIGNATURE: &str = "signature";

/// What the helpers of ROBE's CPU module hold for a column, of a chunk size and `random_numbers`.
type Helper = fn(column: i64, chunk: i64, numbers: &[i64]) -> i64;
const HELPERS: [(&str, Helper); 4] = [
    ("helper_E1sR", |_, _, numbers| numbers[3]),
    ("helper_Eidx_base", |column, chunk, _| column / chunk),
    ("helper_Eidx_offset", |column, chunk, _| column % chunk),
    // Of the versions before chunks.
    ("helper_Eidx", |column, chunk, _| column / chunk),
];

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

    /// The names of its parameter that there are.
    fn parameter(&self) -> impl Iterator<Item = String> + '_ {
        let names = [HASHED_WEIGHT, WEIGHT].into_iter();
        names
            .filter(|name| self.has(name))
            .map(|name| self.key(name))
    }

    /// Whether it is ROBE's for the CPU.
    fn has_helpers(&self) -> bool {
        HELPERS.iter().any(|(name, _)| self.has(name))
    }
}

impl StateDict {
    /// Opens a `.pth`, `.pt` or `.safetensors` file; which it is, its first bytes tell.
    ///
    /// # Errors
    /// No such file, a file of neither kind, or one that is broken.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_file(path.as_ref(), None)
    }

    /// Opens a state dict within what a training script saved: that of `torch.save({"epoch": 3, "state_dict": …}, path)`
    /// is under `state_dict`.
    ///
    /// # Errors
    /// Those of [`open`](Self::open), and nothing under that key. A safetensors file holds nothing nested.
    pub fn open_nested(path: impl AsRef<Path>, key: &str) -> Result<Self> {
        Self::open_file(path.as_ref(), Some(key))
    }

    fn open_file(path: &Path, key: Option<&str>) -> Result<Self> {
        let open = || -> Result<Box<dyn Source>> {
            let mut file = File::open(path)?;
            let mut magic = [0; pth::MAGIC.len()];
            if file.read_exact(&mut magic).is_ok() && magic == pth::MAGIC {
                return Ok(Box::new(pth::Archive::open(file, key)?));
            }
            let file = MappedFile::open(path).map_err(|e| {
                Error::msg(format!(
                    "import: neither an archive of torch.save (since PyTorch 1.6) nor safetensors: {e}"
                ))
            })?;
            match key {
                Some(key) => bail!("import: safetensors holds nothing nested, such as {key}"),
                None => Ok(Box::new(file)),
            }
        };
        let source = open().map_err(|e| e.with_path(path))?;
        Ok(Self {
            entries: source.entries(),
            source,
        })
    }

    /// The names of the entries that nothing has taken, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Takes one entry as it is stored, such as a weight of a layer that is not hashed.
    ///
    /// # Errors
    /// No such entry, or a dtype that candle does not have.
    pub fn take(&mut self, key: &str, device: &Device) -> Result<Tensor> {
        let tensor = self.load(key, device)?;
        self.entries.remove(key);
        Ok(tensor)
    }

    /// Takes the `HashedEmbeddingBag` at `prefix` (`""`: the state dict is the module's own): `hashed_weight`, 1-D.
    ///
    /// The hash is [`Hash::original`]; leave that of the config `None`.
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
        let (key, weight) = self.parameter(module.parameter(), &module, device)?;
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

    /// Takes the ROBE module at `prefix`, which is either
    ///
    /// * `HashedEmbeddingBag`: `hashed_weight` and its other name `weight`, 1-D; `random_numbers`, i64 `(51,)`;
    ///   `signature`, i64 `(2,)`, zeros;
    /// * or `HashedEmbeddingCPU`: `weight`, 1-D; `random_numbers`, i64 `(11,)`; `helper_E1sR`, `helper_Eidx_base` and
    ///   `helper_Eidx_offset` (in older versions `helper_Eidx`), i64 `(embedding_dim,)`, which must agree with the arguments.
    ///
    /// `uma_chunk_size` is the module's, 1 by default; its `val_offset` is `config.first_row`. The hash is [`Hash::robe`];
    /// leave that of the config `None`. ROBE sums bags or looks up single rows, for which there is
    /// `HashedEmbedding::from(layer)`. Its other hashes, `lma_hash` and `keymode_static_pm`, and its later `RobezEmbedding`
    /// are not known here.
    ///
    /// # Errors
    /// [What is refused](Self#what-is-refused), and the errors of [`Hash::robe`] and [`HashedEmbeddingBag::new`].
    pub fn robe(
        &mut self,
        prefix: &str,
        num_embeddings: usize,
        embedding_dim: usize,
        uma_chunk_size: usize,
        config: HashedEmbeddingBagConfig,
        device: &Device,
    ) -> Result<HashedEmbeddingBag> {
        let module = self.robe_module(prefix)?;
        let (numbers, hash) = self.robe_hash(&module, uma_chunk_size)?;
        let config = with_hash(config, hash)?;
        self.check_helpers(&module, &numbers, embedding_dim, uma_chunk_size)?;
        let (key, weight) = self.parameter(module.parameter(), &module, device)?;
        let layer = HashedEmbeddingBag::new(weight, num_embeddings, embedding_dim, config);
        let layer = layer.map_err(|e| named(&key, e))?;
        self.remove(module.keys());
        Ok(layer)
    }

    /// Takes the tables of the DLRM of ROBE's authors at `prefix`: `hashed_weight`, and for table `t` the [ROBE
    /// module](Self::robe) `emb_l.{t}` over the same parameter, whose `val_offset` is the number of rows of the tables
    /// before it. `tables` are their names here and their rows, in order. The rest of the model is left.
    ///
    /// # Errors
    /// Those of [`robe`](Self::robe) for each table, tables with different `random_numbers`, more tables in the state dict
    /// than in `tables`, and those of [`HashedEmbeddingBagCollection::new`].
    pub fn robe_dlrm<N: Into<String>>(
        &mut self,
        prefix: &str,
        tables: impl IntoIterator<Item = (N, usize)>,
        embedding_dim: usize,
        uma_chunk_size: usize,
        config: HashedEmbeddingBagConfig,
        device: &Device,
    ) -> Result<HashedEmbeddingBagCollection> {
        let tables: Vec<(N, usize)> = tables.into_iter().collect();
        let folder = join(prefix, "emb_l");
        let modules = (0..tables.len())
            .map(|t| self.robe_module(&join(&folder, &t.to_string())))
            .collect::<Result<Vec<_>>>()?;
        let Some(first) = modules.first() else {
            bail!("import: a DLRM has at least one table");
        };
        let within = join(&folder, "");
        let known: BTreeSet<_> = modules.iter().flat_map(Module::keys).collect();
        if let Some(extra) = self
            .keys()
            .find(|key| key.starts_with(&within) && !known.contains(*key))
        {
            bail!("import: {extra} belongs to none of {} tables", tables.len());
        }

        let (numbers, hash) = self.robe_hash(first, uma_chunk_size)?;
        let config = with_hash(config, hash)?;
        for module in &modules {
            if self.random_numbers(module)? != numbers {
                bail!(
                    "import: {} differs from {}",
                    module.key(RANDOM_NUMBERS),
                    first.key(RANDOM_NUMBERS)
                );
            }
            self.check_helpers(module, &numbers, embedding_dim, uma_chunk_size)?;
        }
        let top = Some(join(prefix, HASHED_WEIGHT)).filter(|key| self.entries.contains_key(key));
        let names = modules
            .iter()
            .flat_map(Module::parameter)
            .chain(top.clone());
        let (key, weight) = self.parameter(names, first, device)?;
        let collection = HashedEmbeddingBagCollection::new(weight, tables, embedding_dim, config);
        let collection = collection.map_err(|e| named(&key, e))?;
        self.remove(known.into_iter().chain(top));
        Ok(collection)
    }

    /// The module at a prefix; each of its entries must be among those that it may have.
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

    fn robe_module(&self, prefix: &str) -> Result<Module> {
        let helpers = HELPERS.map(|(name, _)| name);
        let is_cpu = helpers
            .iter()
            .any(|name| self.entries.contains_key(&join(prefix, name)));
        if is_cpu {
            self.module(prefix, &[&[WEIGHT, RANDOM_NUMBERS][..], &helpers].concat())
        } else {
            let known = [HASHED_WEIGHT, WEIGHT, RANDOM_NUMBERS, SIGNATURE];
            self.module(prefix, &known)
        }
    }

    /// The random numbers of a ROBE module and the hash they make.
    fn robe_hash(&self, module: &Module, uma_chunk_size: usize) -> Result<(Vec<i64>, Hash)> {
        let numbers = self.random_numbers(module)?;
        let hash = Hash::robe(&numbers, uma_chunk_size)
            .map_err(|e| named(&module.key(RANDOM_NUMBERS), e))?;
        Ok((numbers, hash))
    }

    /// The random numbers of a ROBE module, and a check of the signature that its GPU module has beside them.
    fn random_numbers(&self, module: &Module) -> Result<Vec<i64>> {
        let key = module.key(RANDOM_NUMBERS);
        if module.has_helpers() {
            return self.integers(&key, 11);
        }
        let is_robez = !module.has(SIGNATURE) && !module.has(HASHED_WEIGHT);
        if is_robez && self.integers(&key, 11).is_ok() {
            bail!(
                "import: {key} has no helpers beside it: a RobezEmbedding, whose hash is another"
            );
        }
        let numbers = self.integers(&key, 51)?;
        let signature = module.key(SIGNATURE);
        if self.integers(&signature, 2)? != [0, 0] {
            bail!("import: {signature} must be [0, 0], what it is unless the hash is lma_hash");
        }
        Ok(numbers)
    }

    /// The helpers of ROBE's CPU module, where there are, against the arguments.
    fn check_helpers(
        &self,
        module: &Module,
        numbers: &[i64],
        embedding_dim: usize,
        chunk: usize,
    ) -> Result<()> {
        if !module.has_helpers() {
            return Ok(());
        }
        let is_old = module.has("helper_Eidx");
        for (name, helper) in HELPERS {
            let is_required = name == "helper_E1sR" || is_old == (name == "helper_Eidx");
            if !is_required && !module.has(name) {
                continue;
            }
            let key = module.key(name);
            let values = self.integers(&key, embedding_dim)?;
            for (column, &value) in values.iter().enumerate() {
                let expected = helper(column as i64, chunk as i64, numbers);
                if value != expected {
                    bail!("import: {key} must hold {expected} at {column} for a chunk size of {chunk}, got {value}");
                }
            }
        }
        Ok(())
    }

    /// An i64 entry of shape `(len,)`.
    fn integers(&self, key: &str, len: usize) -> Result<Vec<i64>> {
        let tensor = self.load(key, &Device::Cpu)?;
        if tensor.dtype() != DType::I64 || tensor.dims() != [len] {
            bail!(
                "import: {key} must be i64 of shape [{len}], got {} of shape {:?}",
                tensor.dtype().as_str(),
                tensor.dims()
            );
        }
        tensor.to_vec1()
    }

    /// The parameter that all these entries are names of, and the first of them.
    fn parameter(
        &self,
        mut keys: impl Iterator<Item = String>,
        module: &Module,
        device: &Device,
    ) -> Result<(String, Tensor)> {
        let Some(first) = keys.next() else {
            let name = if module.has_helpers() {
                WEIGHT
            } else {
                HASHED_WEIGHT
            };
            return Err(self.missing(&module.key(name)));
        };
        let tensor = self.load(&first, &Device::Cpu)?;
        for key in keys.filter(|key| self.entries.get(key) != self.entries.get(&first)) {
            let other = self.load(&key, &Device::Cpu)?;
            let same = other.dims() == tensor.dims()
                && other.dtype() == tensor.dtype()
                && other.data() == tensor.data();
            if !same {
                bail!("import: {key} must be another name of {first}, but differs from it");
            }
        }
        Ok((first, tensor.to_device(device)?))
    }

    fn load(&self, key: &str, device: &Device) -> Result<Tensor> {
        if !self.entries.contains_key(key) {
            return Err(self.missing(key));
        }
        self.source.load(key, device)
    }

    fn missing(&self, key: &str) -> Error {
        let mut keys: Vec<_> = self.keys().take(8).collect();
        if self.entries.len() > keys.len() {
            keys.push("…");
        }
        Error::msg(format!("import: {key} is missing from {}", keys.join(", "))).bt()
    }

    fn remove(&mut self, keys: impl Iterator<Item = String>) {
        for key in keys {
            self.entries.remove(&key);
        }
    }
}

/// The configuration with the hash of the module.
fn with_hash(config: HashedEmbeddingBagConfig, hash: Hash) -> Result<HashedEmbeddingBagConfig> {
    if config.hash.is_some_and(|other| other != hash) {
        bail!("import: the hash is that of the module, {hash:?}; leave config.hash None");
    }
    Ok(HashedEmbeddingBagConfig {
        hash: Some(hash),
        ..config
    })
}

/// An error that names the entry.
fn named(key: &str, e: Error) -> Error {
    Error::msg(format!("import: {key}: {e}"))
}
