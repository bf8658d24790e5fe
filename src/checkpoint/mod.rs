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
//! Layers in 8 or 4 bits ([`HashedEmbeddingBag::to_bits`]) are saved as their bytes, and opened as such: nothing of the size of
//! the values in f32 is allocated. docs/format.md specifies all of this.
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
//! checkpoint::save(&path, checkpoint::variables(&vars), [("items", &layer)])?;
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
//!
//! # Resuming
//!
//! What [`Checkpoint::hashed_embedding_bag`] opens is for inference: an optimiser step leaves it unchanged, without an error.
//! To go on training, [`Checkpoint::trainable_hashed_embedding_bag`] builds the same layer on a variable. `VarMap::load` then
//! sets the variables of the other layers. The state of an optimiser is [saved beside the model](crate::optim).
//!
//! ```
//! # use candle_core::{DType, Device, Module, Tensor};
//! # use candle_hashed_embedding_bag::{checkpoint, hashed_embedding_bag, Checkpoint};
//! # use candle_nn::{VarBuilder, VarMap};
//! # fn main() -> candle_core::Result<()> {
//! # let device = Device::Cpu;
//! # let vars = VarMap::new();
//! # let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
//! # let saved = hashed_embedding_bag(1000, 16, 0.1, Default::default(), vb.pp("items"))?;
//! # candle_nn::linear(16, 1, vb.pp("head"))?;
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("model.safetensors");
//! checkpoint::save_with_metadata(
//!     &path,
//!     checkpoint::variables(&vars),
//!     [("items", &saved)],
//!     [("history_len", "20")],
//! )?;
//!
//! let checkpoint = Checkpoint::open(&path)?;
//! let mut vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
//! let layer = checkpoint.trainable_hashed_embedding_bag("items", vb.pp("items"))?;
//! let linear = candle_nn::linear(16, 1, vb.pp("head"))?;
//! vars.load(&path)?;
//! assert!(layer.hashed_weight().is_variable());
//! assert_eq!(checkpoint.metadata("history_len"), Some("20"));
//! # Ok(())
//! # }
//! ```
//!
//! `VarMap::load` alone compares nothing but the shapes of tensors. If a model is rebuilt by code that has changed, with another
//! seed, say, or with the tables of a collection in another order, rows silently get the values of other rows.
//! [`LayerSpec::check`] and [`CollectionSpec::check`] name the field that differs.

pub(crate) mod file;
mod spec;

pub use spec::{CollectionSpec, FeatureSpec, LayerSpec, LowBitSpec, TableSpec};

use crate::collection::HashedEmbeddingBagCollection;
use crate::hash::Hash;
use crate::layer::{
    HashedEmbedding, HashedEmbeddingBag, Stored, HASHED_WEIGHT, HASHED_WEIGHT_SHIFT, INNER_BAG,
};
use crate::low_bit::{Bits, LowBit};
use crate::op::WEIGHT_DTYPES;
use crate::row_tensor::{self, LargestEntry, RowTensor};
use candle_core::{bail, DType, Device, Error, Result, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use file::{check_shape, join, MappedFile, TensorInfo};
use spec::{Description, METADATA_KEY};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, PoisonError};

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
    fn stored(&self) -> &Stored {
        match self {
            Self::Bag(layer) => layer.stored(),
            Self::Collection(collection) => collection.stored(),
        }
    }

    fn hash(&self) -> Hash {
        match self {
            Self::Bag(layer) => layer.hash(),
            Self::Collection(collection) => collection.hash(),
        }
    }
}

/// The name of the parameter of layer `name`.
fn weight_name(name: &str) -> String {
    join(name, HASHED_WEIGHT)
}

/// The name of the shifts of layer `name`, if it is in 4 bits.
fn shift_name(name: &str) -> String {
    join(name, HASHED_WEIGHT_SHIFT)
}

/// Saves a model: its tensors, and its hashed layers and collections by name (the prefix of their variable).
///
/// The parameter of layer `name` is written as `<name>.hashed_weight`; `tensors` may hold it too, as the variables of a
/// `VarMap` do. (Those of a layer in 8 or 4 bits hold its values from before: leave them out.) A [`HashedEmbedding`] `emb` is
/// saved as layer `emb.hashed_embedding_bag`: pass `emb.bag()`. Where there are both layers and collections, each goes
/// [`into`](Into::into) a [`Layer`].
///
/// The file appears whole or not at all: it is written beside `path`, synced, and renamed over it, and the folder is synced.
/// Where only that last step fails, the error is reported though the new file is in place.
///
/// A symbolic link at `path` is followed: the file that it leads to is replaced, and the link stays. On Unix a file that is
/// replaced keeps its mode, though not its owner or access control lists, which belong to the process that saves.
///
/// # Errors
/// A name given twice with different tensors, a layer whose `hashed_weight` also has another name, a dtype without a
/// safetensors form in candle, something at `path` that is not a regular file, or what the file system reports.
///
/// The second refusal protects what layers share: the tables of a collection
/// ([`table`](HashedEmbeddingBagCollection::table)) train one parameter, but as layers of a file each would have a copy. Save the
/// collection instead.
pub fn save<'a, N: Into<String>, L: Into<Layer<'a>>>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (String, Tensor)>,
    layers: impl IntoIterator<Item = (N, L)>,
) -> Result<()> {
    save_with_metadata::<N, L, String, String>(path, tensors, layers, [])
}

/// [`save`] with metadata of the model's own: strings such as the length of its histories, hyper-parameters, metrics, or a map
/// of ids as JSON. [`Checkpoint::metadata`] reads them back, and so does any other reader of safetensors.
///
/// # Errors
/// Those of [`save`], a key given twice, and the key `hashed_embedding_bag`, under which the layers are described.
pub fn save_with_metadata<
    'a,
    N: Into<String>,
    L: Into<Layer<'a>>,
    K: Into<String>,
    V: Into<String>,
>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (String, Tensor)>,
    layers: impl IntoIterator<Item = (N, L)>,
    metadata: impl IntoIterator<Item = (K, V)>,
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
    let mut description = Description::default();
    for (name, layer) in layers {
        let (name, layer) = (name.into(), layer.into());
        let stored = layer.stored();
        insert(weight_name(&name), stored.hashed_weight.clone())?;
        if let Some(shifts) = stored.low_bit.as_ref().and_then(LowBit::shifts) {
            insert(shift_name(&name), shifts.clone())?;
        }
        if let (Some(tensor), Some(rows)) = (layer.hash().row_tensor(), &stored.row_tensor) {
            insert(join(&name, tensor), rows.tensor().clone())?;
        }
        if description.layers.contains_key(&name) || description.collections.contains_key(&name) {
            bail!("checkpoint: two layers are named {name}");
        }
        match layer {
            Layer::Bag(layer) => {
                description.layers.insert(name, layer.into());
            }
            Layer::Collection(collection) => {
                description.collections.insert(name, collection.into());
            }
        }
    }
    for name in description.names() {
        check_unshared(name, &all)?;
    }
    let mut all_metadata = HashMap::from([(METADATA_KEY.to_string(), description.to_json()?)]);
    for (key, value) in metadata {
        let key = key.into();
        if key == METADATA_KEY {
            bail!("checkpoint: the metadata {key} describes the layers; choose another key");
        }
        if all_metadata.contains_key(&key) {
            bail!("checkpoint: the metadata {key} is given twice");
        }
        all_metadata.insert(key, value.into());
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
    let path = path.as_ref();
    file::replace(path, |temporary| {
        Ok(safetensors::serialize_to_file(
            all,
            Some(all_metadata),
            temporary,
        )?)
    })
    .map_err(|e| e.with_path(path))
}

/// Refuses a layer whose parameter is saved under a second name too: opened again, the two would no longer be one.
fn check_unshared(name: &str, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let weight = weight_name(name);
    let id = tensors[&weight].id();
    for (other, tensor) in tensors {
        if *other != weight && tensor.id() == id {
            bail!(
                "checkpoint: {weight} and {other} are one tensor, but would be two in the file; instead of tables of a collection, \
                 save the collection"
            );
        }
    }
    Ok(())
}

/// Refuses to train a layer or collection in low bits.
fn refuse_low_bit(name: &str, low_bit: Option<LowBitSpec>) -> Result<()> {
    match low_bit {
        None => Ok(()),
        Some(LowBitSpec { bits, .. }) => bail!(
            "checkpoint: {name} is in {} bits and does not train; train from the checkpoint that it was made of",
            u32::from(bits)
        ),
    }
}

/// The variables of a `VarMap` with their names, as [`save`] takes them.
pub fn variables(vars: &VarMap) -> Vec<(String, Tensor)> {
    // A thread that panicked while it held the lock leaves whole variables behind.
    let vars = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    vars.iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect()
}

/// Checks that [`save`] can write to `path`, before a long training instead of after it. Nothing is written or changed.
///
/// # Errors
/// A folder that does not exist or takes no new file, or something at `path` that is not a regular file.
pub fn check_writable(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    file::ensure_replaceable(path).map_err(|e| e.with_path(path))
}

/// A checkpoint file, opened: mapped, its description checked, no tensor read yet.
///
/// The file must not be changed in place while this is alive (as with every mapped file); [`save`] never does so.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    file: Arc<MappedFile>,
    description: Arc<Description>,
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
            let file = MappedFile::new(file::map(path)?).map_err(named)?;
            let description = describe(&file).map_err(named)?;
            Ok(Self {
                file: Arc::new(file),
                description: Arc::new(description),
            })
        };
        open().map_err(|e: Error| e.with_path(path))
    }

    /// The hashed layers, by name, in order.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &LayerSpec)> {
        let layers = self.description.layers.iter();
        layers.map(|(name, spec)| (name.as_str(), spec))
    }

    /// The collections, by name, in order.
    pub fn collections(&self) -> impl Iterator<Item = (&str, &CollectionSpec)> {
        let collections = self.description.collections.iter();
        collections.map(|(name, spec)| (name.as_str(), spec))
    }

    /// The description of the hashed layer `name`.
    ///
    /// # Errors
    /// No such layer.
    pub fn layer(&self, name: &str) -> Result<&LayerSpec> {
        match self.description.layers.get(name) {
            Some(spec) => Ok(spec),
            None => {
                let names: Vec<_> = self.layers().map(|(name, _)| name).collect();
                bail!("checkpoint: no layer {name}, only {}", names.join(", "))
            }
        }
    }

    /// The description of the collection `name`.
    ///
    /// # Errors
    /// No such collection.
    pub fn collection(&self, name: &str) -> Result<&CollectionSpec> {
        match self.description.collections.get(name) {
            Some(spec) => Ok(spec),
            None => {
                let names: Vec<_> = self.collections().map(|(name, _)| name).collect();
                bail!(
                    "checkpoint: no collection {name}, only {}",
                    names.join(", ")
                )
            }
        }
    }

    /// The metadata `key` of the model's own; see [`save_with_metadata`].
    pub fn metadata(&self, key: &str) -> Option<&str> {
        if key == METADATA_KEY {
            return None;
        }
        let metadata = self.file.metadata().metadata().as_ref()?;
        metadata.get(key).map(String::as_str)
    }

    /// All metadata of the model's own, by key, in order: what [`save_with_metadata`] takes, so that a tool which rewrites a
    /// checkpoint keeps it.
    pub fn own_metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        let metadata = self.file.metadata().metadata().iter().flatten();
        let own = metadata.filter(|(key, _)| *key != METADATA_KEY);
        let own: BTreeMap<&str, &str> = own.map(|(k, v)| (k.as_str(), v.as_str())).collect();
        own.into_iter()
    }

    /// The hashed layer `name`, its parameter cast to `dtype` on `device`; untracked, for inference. An optimiser does not
    /// change it: see [`trainable_hashed_embedding_bag`](Self::trainable_hashed_embedding_bag). A layer in 8 or 4 bits keeps its
    /// bytes, and gives `dtype`: f32, f16 or bf16.
    ///
    /// # Errors
    /// No such layer, or what the device says.
    pub fn hashed_embedding_bag(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<HashedEmbeddingBag> {
        let spec = self.layer(name)?;
        spec.build(self.stored(name, &spec.hash, spec.low_bit, dtype, device)?)
    }

    /// The collection `name`, its parameter cast to `dtype` on `device`; untracked, for inference. In 8 or 4 bits as for
    /// [`hashed_embedding_bag`](Self::hashed_embedding_bag).
    ///
    /// # Errors
    /// No such collection, or what the device says.
    pub fn hashed_embedding_bag_collection(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<HashedEmbeddingBagCollection> {
        let spec = self.collection(name)?;
        spec.build(self.stored(name, &spec.hash, spec.low_bit, dtype, device)?)
    }

    /// The tensors of layer or collection `name`.
    fn stored(
        &self,
        name: &str,
        hash: &Hash,
        low_bit: Option<LowBitSpec>,
        dtype: DType,
        device: &Device,
    ) -> Result<Stored> {
        let hashed_weight = self.tensor(&weight_name(name), device)?;
        let row_tensor = self.row_tensor(name, hash, device)?;
        let Some(LowBitSpec { bits, scale }) = low_bit else {
            return Ok(Stored {
                row_tensor,
                ..hashed_weight.to_dtype(dtype)?.into()
            });
        };
        let shifts = match bits {
            Bits::Eight => None,
            Bits::Four => Some(self.tensor(&shift_name(name), device)?),
        };
        let low_bit = LowBit::new(bits, scale, &hashed_weight, shifts)?;
        Ok(Stored {
            hashed_weight,
            low_bit: Some(low_bit.with_output_dtype(dtype)?),
            row_tensor,
        })
    }

    /// What the hash of layer or collection `name` reads of each row, if it does.
    fn row_tensor(&self, name: &str, hash: &Hash, device: &Device) -> Result<Option<RowTensor>> {
        let Some(tensor) = hash.row_tensor() else {
            return Ok(None);
        };
        let values = self.tensor(&join(name, tensor), &Device::Cpu)?;
        RowTensor::new(tensor, &values)?.to_device(device).map(Some)
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

    /// The hashed layer `name`, to be trained on: its parameter is the variable `hashed_weight` of the `VarBuilder`, as for
    /// [`hashed_embedding_bag()`](crate::hashed_embedding_bag()), with the values of the file in the `VarBuilder`'s dtype and
    /// on its device. With `vb.pp(name)` it is saved again under the same name. A variable that exists already is overwritten.
    ///
    /// # Errors
    /// No such layer; a `VarBuilder` that is not of variables, as that of a `VarMap` is; a variable of this name that has
    /// another shape; what the device says.
    pub fn trainable_hashed_embedding_bag(
        &self,
        name: &str,
        vb: VarBuilder,
    ) -> Result<HashedEmbeddingBag> {
        let spec = self.layer(name)?;
        refuse_low_bit(name, spec.low_bit)?;
        spec.build(self.trainable(name, &spec.hash, vb)?)
    }

    /// The collection `name`, to be trained on; see
    /// [`trainable_hashed_embedding_bag`](Self::trainable_hashed_embedding_bag).
    ///
    /// # Errors
    /// No such collection, and those of [`trainable_hashed_embedding_bag`](Self::trainable_hashed_embedding_bag).
    pub fn trainable_hashed_embedding_bag_collection(
        &self,
        name: &str,
        vb: VarBuilder,
    ) -> Result<HashedEmbeddingBagCollection> {
        let spec = self.collection(name)?;
        refuse_low_bit(name, spec.low_bit)?;
        spec.build(self.trainable(name, &spec.hash, vb)?)
    }

    /// The [`HashedEmbedding`] `name`, saved as layer `<name>.hashed_embedding_bag`, to be trained on. Its variable is
    /// `hashed_embedding_bag.hashed_weight` of the `VarBuilder`, as for [`hashed_embedding`](crate::hashed_embedding()).
    ///
    /// # Errors
    /// Those of [`trainable_hashed_embedding_bag`](Self::trainable_hashed_embedding_bag).
    pub fn trainable_hashed_embedding(
        &self,
        name: &str,
        vb: VarBuilder,
    ) -> Result<HashedEmbedding> {
        self.trainable_hashed_embedding_bag(&join(name, INNER_BAG), vb.pp(INNER_BAG))
            .map(HashedEmbedding::from)
    }

    /// The tensors of layer or collection `name`, its parameter as a variable of the `VarBuilder`.
    fn trainable(&self, name: &str, hash: &Hash, vb: VarBuilder) -> Result<Stored> {
        let hashed_weight = self.variable(name, vb)?;
        Ok(Stored {
            row_tensor: self.row_tensor(name, hash, hashed_weight.device())?,
            ..hashed_weight.into()
        })
    }

    /// A variable of the `VarBuilder` with the values of the parameter of layer or collection `name`.
    fn variable(&self, name: &str, vb: VarBuilder) -> Result<Tensor> {
        let weight = weight_name(name);
        if !WEIGHT_DTYPES.contains(&vb.dtype()) {
            bail!(
                "checkpoint: {weight} must have a float dtype, got {:?}",
                vb.dtype()
            );
        }
        let shape = self.tensor_info(&weight)?.shape;
        // The values do not matter, they are set below.
        let variable = vb.get_with_hints(shape, HASHED_WEIGHT, Init::Const(0.))?;
        if !variable.is_variable() {
            bail!("checkpoint: {weight} needs a VarBuilder of variables to be trained, such as that of a VarMap");
        }
        let values = self.tensor(&weight, variable.device())?;
        Var::from_tensor(&variable)?.set(&values.to_dtype(variable.dtype())?)?;
        Ok(variable)
    }

    /// The tensors of the file, for the layers that are not hashed. Reads what is asked for, and casts it to `dtype`.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Tensors(self.file.clone())), dtype, device.clone())
    }

    /// The names of all tensors of the file, in order; a layer's own are among them.
    pub fn tensor_names(&self) -> impl Iterator<Item = String> {
        let mut names = self.file.metadata().offset_keys();
        names.sort_unstable();
        names.into_iter()
    }

    /// The dtype and the shape of a tensor. Reads nothing of its values.
    ///
    /// # Errors
    /// No such tensor.
    pub fn tensor_info(&self, name: &str) -> Result<TensorInfo> {
        self.file.info(name).map_err(named)
    }

    /// A tensor as it is stored, such as one of integers.
    ///
    /// # Errors
    /// No such tensor, or a dtype candle does not have.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.file.load(name, device).map_err(named)
    }
}

/// Reads the description of the hashed layers, and checks that each layer can be built on its tensor.
fn describe(file: &MappedFile) -> Result<Description> {
    let metadata = file.metadata().metadata().as_ref();
    let Some(json) = metadata.and_then(|metadata| metadata.get(METADATA_KEY)) else {
        bail!("no {METADATA_KEY} in __metadata__");
    };
    let description = Description::from_json(json)?;
    for (name, spec) in &description.layers {
        stand_ins(file, name, &spec.hash, spec.low_bit)
            .and_then(|stored| spec.build(stored))
            .map_err(|e| Error::msg(format!("layer {name}: {e}")))?;
    }
    for (name, spec) in &description.collections {
        stand_ins(file, name, &spec.hash, spec.low_bit)
            .and_then(|stored| spec.build(stored))
            .map_err(|e| Error::msg(format!("collection {name}: {e}")))?;
    }
    Ok(description)
}

/// The tensors of a layer or collection, from which it can be built to be checked.
fn stand_ins(
    file: &MappedFile,
    name: &str,
    hash: &Hash,
    low_bit: Option<LowBitSpec>,
) -> Result<Stored> {
    let of_dtype = |name: &str, only: DType| {
        let wanted = format!("dtype {only:?}");
        stand_in(file, name, &wanted, |dtype| dtype == only)
    };
    let (hashed_weight, low_bit) = match low_bit {
        None => {
            let weight = stand_in(file, &weight_name(name), "a float dtype", |dtype| {
                WEIGHT_DTYPES.contains(&dtype)
            })?;
            (weight, None)
        }
        Some(LowBitSpec { bits, scale }) => {
            let weight = of_dtype(&weight_name(name), DType::U8)?;
            let shifts = match bits {
                Bits::Eight => None,
                Bits::Four => Some(of_dtype(&shift_name(name), DType::U8)?),
            };
            let low_bit = LowBit::new(bits, scale, &weight, shifts)?;
            (weight, Some(low_bit))
        }
    };
    let row_tensor = match hash.row_tensor() {
        None => None,
        Some(tensor) => {
            let name = join(name, tensor);
            let dtype = row_tensor::dtype(tensor);
            let stand_in = of_dtype(&name, dtype)?;
            // Of a slot table every entry is checked, in the mapped file.
            let largest = match dtype {
                DType::U32 => Some(LargestEntry::of(file.u32s(&name)?)),
                _ => None,
            };
            Some(RowTensor::stand_in(stand_in, largest))
        }
    };
    Ok(Stored {
        hashed_weight,
        low_bit,
        row_tensor,
    })
}

/// A tensor that holds no data, with the shape of tensor `name` and a dtype that stands for those that suit; a layer's own rules
/// are checked on it.
fn stand_in(
    file: &MappedFile,
    name: &str,
    wanted: &str,
    suits: impl Fn(DType) -> bool,
) -> Result<Tensor> {
    let Some(info) = file.metadata().info(name) else {
        bail!("no tensor {name}");
    };
    let Some(dtype) = DType::try_from(info.dtype)
        .ok()
        .filter(|&dtype| suits(dtype))
    else {
        bail!("{name} must have {wanted}, got {:?}", info.dtype);
    };
    check_shape(name, &info.shape)?;
    Tensor::zeros((), dtype, &Device::Cpu)?.broadcast_as(info.shape.as_slice())
}

/// An error that names the operation.
fn named(e: Error) -> Error {
    Error::msg(format!("checkpoint: {e}"))
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
        self.0.metadata().info(name).is_some()
    }
}
