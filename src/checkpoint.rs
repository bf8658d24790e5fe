//! Self-describing safetensors: a model is rebuilt from the file alone.
//!
//! Beside the tensors, the file's `__metadata__` holds one key, `hashed_embedding_bag`, with one JSON string:
//!
//! ```json
//! {"version":1,"layers":{"user":{"num_embeddings":6040,"embedding_dim":16,"mode":"sum","padding_idx":null,
//!  "include_last_offset":false,"hash":{"kind":"mix","seed":0,"block":8,"signed":true,"balanced":true}}}}
//! ```
//!
//! A [`HashedEmbeddingBagCollection`] stands beside the layers, with its tables in order:
//!
//! ```json
//! "collections":{"sparse":{"tables":[{"name":"user","num_embeddings":6040},{"name":"movie","num_embeddings":3952}],
//!  "embedding_dim":16,"mode":"sum","padding_idx":null,"include_last_offset":false,"hash":{…}}}
//! ```
//!
//! The parameter of layer `user` is the tensor `user.hashed_weight` (of the layer with the empty name,
//! `hashed_weight`). Any other reader of safetensors reads the file as it reads every other.
//!
//! ```
//! use candle_core::{DType, Device, Module, Tensor};
//! use candle_hashed_embedding_bag::{checkpoint, hashed_embedding_bag, Checkpoint};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! # fn main() -> candle_core::Result<()> {
//! let device = Device::Cpu;
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
//! let layer = hashed_embedding_bag(1000, 16, 0.1, Default::default(), vb.pp("items"))?;
//! let linear = candle_nn::linear(16, 1, vb.pp("head"))?;
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("model.safetensors");
//! let tensors = vars.data().lock().unwrap().clone();
//! let tensors = tensors.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone()));
//! checkpoint::save(&path, tensors, [("items", &layer)])?;
//!
//! let checkpoint = Checkpoint::open(&path)?;
//! let served = checkpoint.hashed_embedding_bag("items", DType::F32, &device)?;
//! let head = candle_nn::linear(16, 1, checkpoint.var_builder(DType::F32, &device).pp("head"))?;
//! let indices = Tensor::new(&[[1u32, 2, 3]], &device)?;
//! let (before, after) = (linear.forward(&layer.forward(&indices)?)?, head.forward(&served.forward(&indices)?)?);
//! assert_eq!(before.to_vec2::<f32>()?, after.to_vec2::<f32>()?);
//! # Ok(())
//! # }
//! ```

use crate::collection::HashedEmbeddingBagCollection;
use crate::config::HashedEmbeddingBagConfig;
use crate::hash::Hash;
use crate::layer::{HashedEmbedding, HashedEmbeddingBag, HASHED_WEIGHT, INNER_BAG};
use crate::op::{Mode, WEIGHT_DTYPES};
use candle_core::safetensors::Load;
use candle_core::{bail, DType, Device, Error, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorView};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// The key in `__metadata__`.
const METADATA_KEY: &str = "hashed_embedding_bag";
const VERSION: u64 = 1;

/// What a checkpoint says of one hashed layer: all but its parameter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct LayerSpec {
    /// Rows of the virtual table.
    pub num_embeddings: usize,
    /// Columns of the virtual table.
    pub embedding_dim: usize,
    /// How the rows of a bag become one.
    pub mode: Mode,
    /// The index that is padding.
    pub padding_idx: Option<i64>,
    /// Whether offsets hold the end of the last bag.
    pub include_last_offset: bool,
    /// What is added to each index before it is hashed; written where it is not 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub first_row: usize,
    /// Where virtual elements find their slots.
    pub hash: Hash,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl From<&HashedEmbeddingBag> for LayerSpec {
    fn from(layer: &HashedEmbeddingBag) -> Self {
        Self {
            num_embeddings: layer.num_embeddings(),
            embedding_dim: layer.embedding_dim(),
            mode: layer.config().mode,
            padding_idx: layer.config().padding_idx,
            include_last_offset: layer.config().include_last_offset,
            first_row: layer.config().first_row,
            hash: layer.hash(),
        }
    }
}

impl LayerSpec {
    /// The layer this describes, on `hashed_weight`.
    fn build(&self, hashed_weight: Tensor) -> Result<HashedEmbeddingBag> {
        let config = HashedEmbeddingBagConfig {
            mode: self.mode,
            hash: Some(self.hash),
            padding_idx: self.padding_idx,
            include_last_offset: self.include_last_offset,
            first_row: self.first_row,
            ..Default::default()
        };
        HashedEmbeddingBag::new(
            hashed_weight,
            self.num_embeddings,
            self.embedding_dim,
            config,
        )
    }
}

/// What a checkpoint says of one collection: all but its parameter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct CollectionSpec {
    /// The tables, in order.
    pub tables: Vec<TableSpec>,
    /// Columns of every table.
    pub embedding_dim: usize,
    /// How the rows of a bag become one.
    pub mode: Mode,
    /// The index that is padding, in every table.
    pub padding_idx: Option<i64>,
    /// Whether offsets hold the end of the last bag.
    pub include_last_offset: bool,
    /// Where virtual elements find their slots.
    pub hash: Hash,
}

/// One table of a [`CollectionSpec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct TableSpec {
    /// Its name, no other's.
    pub name: String,
    /// Its rows.
    pub num_embeddings: usize,
}

impl From<&HashedEmbeddingBagCollection> for CollectionSpec {
    fn from(collection: &HashedEmbeddingBagCollection) -> Self {
        let tables = collection.tables().map(|(name, num_embeddings)| TableSpec {
            name: name.to_string(),
            num_embeddings,
        });
        Self {
            tables: tables.collect(),
            embedding_dim: collection.embedding_dim(),
            mode: collection.config().mode,
            padding_idx: collection.config().padding_idx,
            include_last_offset: collection.config().include_last_offset,
            hash: collection.hash(),
        }
    }
}

impl CollectionSpec {
    /// The collection this describes, on `hashed_weight`.
    fn build(&self, hashed_weight: Tensor) -> Result<HashedEmbeddingBagCollection> {
        let config = HashedEmbeddingBagConfig {
            mode: self.mode,
            hash: Some(self.hash),
            padding_idx: self.padding_idx,
            include_last_offset: self.include_last_offset,
            ..Default::default()
        };
        let tables = self.tables.iter();
        let tables = tables.map(|table| (table.name.as_str(), table.num_embeddings));
        HashedEmbeddingBagCollection::new(hashed_weight, tables, self.embedding_dim, config)
    }
}

/// Something with a `hashed_weight` that [`save`] describes; made of a reference by `into`.
#[derive(Debug, Clone, Copy)]
pub enum Layer<'a> {
    /// A [`HashedEmbeddingBag`].
    Bag(&'a HashedEmbeddingBag),
    /// A [`HashedEmbeddingBagCollection`].
    Collection(&'a HashedEmbeddingBagCollection),
}

impl<'a> From<&'a HashedEmbeddingBag> for Layer<'a> {
    fn from(layer: &'a HashedEmbeddingBag) -> Self {
        Self::Bag(layer)
    }
}

impl<'a> From<&'a HashedEmbeddingBagCollection> for Layer<'a> {
    fn from(collection: &'a HashedEmbeddingBagCollection) -> Self {
        Self::Collection(collection)
    }
}

impl Layer<'_> {
    fn hashed_weight(&self) -> &Tensor {
        match self {
            Self::Bag(layer) => layer.hashed_weight(),
            Self::Collection(collection) => collection.hashed_weight(),
        }
    }
}

/// The JSON of [`METADATA_KEY`]; the version has been read before.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u64,
    layers: BTreeMap<String, LayerSpec>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    collections: BTreeMap<String, CollectionSpec>,
}

/// The name of the parameter of layer `name`.
fn weight_name(name: &str) -> String {
    join(name, HASHED_WEIGHT)
}

/// The name of what is called `name` under `prefix`.
pub(crate) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() {
        name.to_string()
    } else {
        format!("{prefix}.{name}")
    }
}

/// Saves a model: its tensors, and its hashed layers and collections by name (the prefix of their variable).
///
/// The parameter of layer `name` is written as `<name>.hashed_weight`; `tensors` may hold it too, as the variables of a
/// `VarMap` do. A [`HashedEmbedding`] `emb` is saved as layer `emb.hashed_embedding_bag`: pass `emb.bag()`. Where there are
/// both layers and collections, each goes [`into`](Into::into) a [`Layer`].
///
/// The file appears whole or not at all: it is written beside `path`, synced, and renamed over it, and the folder is synced.
/// Where only that last step fails, the error is told though the new file is in place.
///
/// # Errors
/// A name given twice with different tensors, a dtype without a safetensors form in candle, or what the file system says.
pub fn save<'a, N: Into<String>, L: Into<Layer<'a>>>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (String, Tensor)>,
    layers: impl IntoIterator<Item = (N, L)>,
) -> Result<()> {
    let mut all: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut insert = |name: String, tensor: Tensor| match all.get(&name) {
        // safetensors would write it, and nothing could read the file.
        _ if name == "__metadata__" => bail!("checkpoint: no tensor can be named {name}"),
        Some(other) if other.id() != tensor.id() => {
            bail!("checkpoint: two different tensors are named {name}")
        }
        _ => {
            all.insert(name, tensor);
            Ok(())
        }
    };
    for (name, tensor) in tensors {
        insert(name, tensor)?;
    }
    let mut header = Header {
        version: VERSION,
        ..Default::default()
    };
    for (name, layer) in layers {
        let (name, layer) = (name.into(), layer.into());
        insert(weight_name(&name), layer.hashed_weight().clone())?;
        if header.layers.contains_key(&name) || header.collections.contains_key(&name) {
            bail!("checkpoint: two layers are named {name}");
        }
        match layer {
            Layer::Bag(layer) => {
                header.layers.insert(name, layer.into());
            }
            Layer::Collection(collection) => {
                header.collections.insert(name, collection.into());
            }
        }
    }
    // On the CPU first: the writer below has no way to report a failed copy.
    let all = all
        .into_iter()
        .map(|(name, tensor)| {
            if matches!(
                tensor.dtype(),
                DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0
            ) {
                bail!(
                    "checkpoint: tensor {name} has dtype {:?}, which candle cannot write",
                    tensor.dtype()
                );
            }
            Ok((name, tensor.to_device(&Device::Cpu)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let header = serde_json::to_string(&header).map_err(Error::wrap)?;
    let metadata = HashMap::from([(METADATA_KEY.to_string(), header)]);
    let path = path.as_ref();
    replace(path, |temporary| {
        Ok(safetensors::serialize_to_file(
            all,
            Some(metadata),
            temporary,
        )?)
    })
    .map_err(|e| e.with_path(path))
}

/// Writes a file beside `path`, syncs it and renames it over `path`.
fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
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

/// A checkpoint file, opened: mapped, its description checked, no tensor read yet.
///
/// The file must not be changed in place while this is alive (as with every mapped file); [`save`] never does so.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    file: Arc<MappedFile>,
    header: Arc<Header>,
}

impl Checkpoint {
    /// Maps the file and checks what it says of its layers.
    ///
    /// # Errors
    /// No such file, no safetensors file, no `hashed_embedding_bag` in its metadata, a missing or unknown version; and
    /// by layer and field: an unknown hash, a value out of range, a missing tensor, a length that does not suit the
    /// hash, a dtype that is no float.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let open = || {
            let file = MappedFile::open(path)?;
            let header = file.header()?;
            Ok(Self {
                file: Arc::new(file),
                header: Arc::new(header),
            })
        };
        open().map_err(|e: Error| e.with_path(path))
    }

    /// The hashed layers, by name, in order.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &LayerSpec)> {
        let layers = self.header.layers.iter();
        layers.map(|(name, spec)| (name.as_str(), spec))
    }

    /// The collections, by name, in order.
    pub fn collections(&self) -> impl Iterator<Item = (&str, &CollectionSpec)> {
        let collections = self.header.collections.iter();
        collections.map(|(name, spec)| (name.as_str(), spec))
    }

    /// The hashed layer `name`, its parameter cast to `dtype` on `device`; untracked, for inference.
    ///
    /// # Errors
    /// No such layer, or what the device says.
    pub fn hashed_embedding_bag(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<HashedEmbeddingBag> {
        let Some(spec) = self.header.layers.get(name) else {
            let names: Vec<_> = self.layers().map(|(name, _)| name).collect();
            bail!("checkpoint: no layer {name}, only {}", names.join(", "));
        };
        let hashed_weight = self.tensor(&weight_name(name), device)?;
        spec.build(hashed_weight.to_dtype(dtype)?)
    }

    /// The collection `name`, its parameter cast to `dtype` on `device`; untracked, for inference.
    ///
    /// # Errors
    /// No such collection, or what the device says.
    pub fn hashed_embedding_bag_collection(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<HashedEmbeddingBagCollection> {
        let Some(spec) = self.header.collections.get(name) else {
            let names: Vec<_> = self.collections().map(|(name, _)| name).collect();
            bail!(
                "checkpoint: no collection {name}, only {}",
                names.join(", ")
            );
        };
        let hashed_weight = self.tensor(&weight_name(name), device)?;
        spec.build(hashed_weight.to_dtype(dtype)?)
    }

    /// The [`HashedEmbedding`] `name`, saved as layer `<name>.hashed_embedding_bag`.
    ///
    /// # Errors
    /// Those of [`hashed_embedding_bag`](Self::hashed_embedding_bag).
    pub fn hashed_embedding(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<HashedEmbedding> {
        let name = join(name, INNER_BAG);
        self.hashed_embedding_bag(&name, dtype, device)
            .map(HashedEmbedding::from)
    }

    /// The tensors of the file, for the layers that are not hashed. Reads what is asked for, and casts it to `dtype`.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Tensors(self.file.clone())), dtype, device.clone())
    }

    /// The names of all tensors of the file, in order; a layer's own are among them.
    pub fn tensor_names(&self) -> impl Iterator<Item = String> {
        let mut names = self.file.metadata.offset_keys();
        names.sort_unstable();
        names.into_iter()
    }

    /// A tensor as it is stored, such as one of integers.
    ///
    /// # Errors
    /// No such tensor, or a dtype candle does not have.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.file.load(name, device)
    }
}

/// A safetensors file in memory, and where in it each tensor lies.
#[derive(Debug)]
pub(crate) struct MappedFile {
    map: Mmap,
    data_start: usize,
    metadata: Metadata,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        // SAFETY: a map is sound as long as nobody truncates or rewrites the file under it. `save` renames a new file
        // over the old one, which leaves the old one's pages alone; `Checkpoint` asks the same of everybody else.
        let map = unsafe { Mmap::map(&file)? };
        let (header_len, metadata) = SafeTensors::read_metadata(&map)?;
        Ok(Self {
            data_start: size_of::<u64>() + header_len,
            map,
            metadata,
        })
    }

    /// Reads and checks the description of the hashed layers.
    fn header(&self) -> Result<Header> {
        let metadata = self.metadata.metadata().as_ref();
        let Some(header) = metadata.and_then(|metadata| metadata.get(METADATA_KEY)) else {
            bail!("checkpoint: no {METADATA_KEY} in __metadata__");
        };
        let header: serde_json::Value = serde_json::from_str(header)
            .map_err(|e| Error::msg(format!("checkpoint: {METADATA_KEY} is no JSON: {e}")))?;
        // The version first: of another one, nothing else is known.
        match header
            .get("version")
            .map(|version| (version, version.as_u64()))
        {
            None => bail!("checkpoint: version is missing"),
            Some((_, Some(VERSION))) => {}
            Some((version, _)) => bail!("checkpoint: version must be {VERSION}, got {version}"),
        }
        let header: Header = serde_path_to_error::deserialize(header).map_err(|e| {
            let path = match e.path().to_string().as_str() {
                "." => String::new(),
                path => format!("{path}: "),
            };
            Error::msg(format!("checkpoint: {path}{}", e.inner()))
        })?;
        for (name, spec) in &header.layers {
            self.check("layer", name, |weight| spec.build(weight).map(drop))?;
        }
        for (name, spec) in &header.collections {
            if header.layers.contains_key(name) {
                bail!("checkpoint: collection {name} has the name of a layer");
            }
            self.check("collection", name, |weight| spec.build(weight).map(drop))?;
        }
        Ok(header)
    }

    /// Checks the parameter of a layer or collection, which `build` makes of it.
    fn check(&self, kind: &str, name: &str, build: impl Fn(Tensor) -> Result<()>) -> Result<()> {
        let weight = weight_name(name);
        let Some(info) = self.metadata.info(&weight) else {
            bail!("checkpoint: {kind} {name}: no tensor {weight}");
        };
        let dtype = DType::try_from(info.dtype).ok();
        if !dtype.is_some_and(|dtype| WEIGHT_DTYPES.contains(&dtype)) {
            bail!(
                "checkpoint: {kind} {name}: {weight} must have a float dtype, got {:?}",
                info.dtype
            );
        }
        check_shape(&weight, &info.shape)?;
        // The layer's own rules, on a stand-in of the right shape that holds no data.
        let stand_in = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        stand_in
            .broadcast_as(info.shape.as_slice())
            .and_then(build)
            .map_err(|e| Error::msg(format!("checkpoint: {kind} {name}: {e}")))
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
fn check_shape(name: &str, shape: &[usize]) -> Result<()> {
    let mut dims = shape.iter().filter(|&&dim| dim > 0);
    match dims.try_fold(1usize, |product, &dim| product.checked_mul(dim)) {
        Some(_) => Ok(()),
        None => bail!("checkpoint: the shape of tensor {name} is too large, {shape:?}"),
    }
}

/// The file as the source of a `VarBuilder`.
struct Tensors(Arc<MappedFile>);

impl SimpleBackend for Tensors {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            return Err(Error::UnexpectedShape {
                msg: format!("shape mismatch for {name}"),
                expected: shape,
                got: tensor.shape().clone(),
            }
            .bt());
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0.load(name, device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.metadata.info(name).is_some()
    }
}
