//! The modules of ROBE and the DLRM of its authors.

use super::{named, with_hash, Module, StateDict};
use crate::checkpoint::file::join;
use crate::collection::HashedEmbeddingBagCollection;
use crate::config::HashedEmbeddingBagConfig;
use crate::hash::Hash;
use crate::layer::{HashedEmbeddingBag, HASHED_WEIGHT};
use candle_core::{bail, DType, Device, Result, Tensor};
use safetensors::View;
use std::collections::BTreeSet;

/// Entries of ROBE's modules, besides `hashed_weight`.
pub(super) const WEIGHT: &str = "weight";
pub(super) const RANDOM_NUMBERS: &str = "random_numbers";
pub(super) const SIGNATURE: &str = "signature";

/// The value that a helper tensor of ROBE's CPU module holds for a column, given the chunk size and `random_numbers`.
type Helper = fn(column: i64, chunk: i64, numbers: &[i64]) -> i64;
const HELPERS: [(&str, Helper); 4] = [
    ("helper_E1sR", |_, _, numbers| numbers[3]),
    ("helper_Eidx_base", |column, chunk, _| column / chunk),
    ("helper_Eidx_offset", |column, chunk, _| column % chunk),
    // In versions of ROBE that had no chunks yet.
    ("helper_Eidx", |column, chunk, _| column / chunk),
];

/// ROBE has two modules, one for GPUs and one for the CPU, with different names for the parameter.
impl Module {
    /// Whether this is the module for the CPU.
    fn has_helpers(&self) -> bool {
        HELPERS.iter().any(|(name, _)| self.has(name))
    }

    /// The key of the parameter, for the error message if it is missing.
    fn parameter(&self) -> String {
        let name = if self.has_helpers() {
            WEIGHT
        } else {
            HASHED_WEIGHT
        };
        self.key(name)
    }

    /// The keys under which the parameter exists.
    pub(super) fn parameters(&self) -> impl Iterator<Item = String> + '_ {
        let names = [HASHED_WEIGHT, WEIGHT].into_iter();
        names
            .filter(|name| self.has(name))
            .map(|name| self.key(name))
    }
}

impl StateDict {
    /// Takes the ROBE module at `prefix`, which is either
    ///
    /// * `HashedEmbeddingBag`: `hashed_weight` and its other name `weight`, 1-D; `random_numbers`, i64 `(51,)`;
    ///   `signature`, i64 `(2,)`, zeros;
    /// * or `HashedEmbeddingCPU`: `weight`, 1-D; `random_numbers`, i64 `(11,)`; `helper_E1sR`, `helper_Eidx_base` and
    ///   `helper_Eidx_offset` (in older versions `helper_Eidx`), i64 `(embedding_dim,)`, which must agree with the arguments.
    ///
    /// `uma_chunk_size` is the module's, 1 by default; its `val_offset` is `config.first_row`. The hash is [`Hash::robe`];
    /// leave `config.hash` at `None`. ROBE sums bags or looks up single rows; for the latter, use `HashedEmbedding::from(layer)`.
    /// Of its other hashes, `lma_hash` is read by [`lma`](Self::lma); `keymode_static_pm` and the later `RobezEmbedding` are not
    /// supported.
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
        let (key, weight) = self.parameter(module.parameters(), &module.parameter(), device)?;
        let layer = HashedEmbeddingBag::new(weight, num_embeddings, embedding_dim, config);
        let layer = layer.map_err(|e| named(&key, e))?;
        self.remove(module.keys());
        Ok(layer)
    }

    /// Takes the tables of the DLRM of ROBE's authors at `prefix`: `hashed_weight`, and for table `t` the [ROBE
    /// module](Self::robe) `emb_l.{t}` over the same parameter, whose `val_offset` is the number of rows of the tables
    /// before it. `tables` gives their names here and their numbers of rows, in order. The rest of the model is left.
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
        let top = Some(join(prefix, HASHED_WEIGHT)).filter(|key| self.entries.contains(key));
        let names = modules
            .iter()
            .flat_map(Module::parameters)
            .chain(top.clone());
        let (key, weight) = self.parameter(names, &first.parameter(), device)?;
        let collection = HashedEmbeddingBagCollection::new(weight, tables, embedding_dim, config);
        let collection = collection.map_err(|e| named(&key, e))?;
        self.remove(known.into_iter().chain(top));
        Ok(collection)
    }

    fn robe_module(&self, prefix: &str) -> Result<Module> {
        let helpers = HELPERS.map(|(name, _)| name);
        let is_cpu = helpers
            .iter()
            .any(|name| self.entries.contains(&join(prefix, name)));
        if is_cpu {
            self.module(prefix, &[&[WEIGHT, RANDOM_NUMBERS][..], &helpers].concat())
        } else {
            let known = [HASHED_WEIGHT, WEIGHT, RANDOM_NUMBERS, SIGNATURE];
            self.module(prefix, &known)
        }
    }

    /// The random numbers of a ROBE module, and its hash.
    fn robe_hash(&self, module: &Module, uma_chunk_size: usize) -> Result<(Vec<i64>, Hash)> {
        let numbers = self.random_numbers(module)?;
        let hash = Hash::robe(&numbers, uma_chunk_size)
            .map_err(|e| named(&module.key(RANDOM_NUMBERS), e))?;
        Ok((numbers, hash))
    }

    /// The random numbers of a ROBE module. Checks the signature that the GPU module has as well.
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
            bail!("import: {signature} must be [0, 0], what it is unless the hash is lma_hash, which StateDict::lma reads");
        }
        Ok(numbers)
    }

    /// Checks the helper tensors of ROBE's CPU module, if any, against the arguments.
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
    pub(super) fn integers(&self, key: &str, len: usize) -> Result<Vec<i64>> {
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

    /// The parameter, of which all `keys` must be names, and the first key. Without any keys, `name` is reported missing.
    pub(super) fn parameter(
        &self,
        mut keys: impl Iterator<Item = String>,
        name: &str,
        device: &Device,
    ) -> Result<(String, Tensor)> {
        let Some(first) = keys.next() else {
            return Err(self.missing(name));
        };
        let tensor = self.load(&first, &Device::Cpu)?;
        for key in keys.filter(|key| !self.source.is_same(key, &first)) {
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
}
