//! The description of the hashed layers: the JSON that a checkpoint holds in its metadata, and the layers it stands for.

use super::file::join;
use crate::collection::HashedEmbeddingBagCollection;
use crate::config::HashedEmbeddingBagConfig;
use crate::hash::Hash;
use crate::layer::{HashedEmbeddingBag, Stored};
use crate::low_bit::{check_scale, Bits, LowBit, GROUP};
use crate::op::Mode;
use crate::tables::Tables;
use candle_core::{bail, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The key of the description in `__metadata__`.
pub(super) const METADATA_KEY: &str = "hashed_embedding_bag";
/// The version of a description without layers in low bits, and of one with. A reader of the first does not know the second.
const VERSION: u64 = 1;
const LOW_BIT_VERSION: u64 = 2;

/// The description of one hashed layer: everything but its parameter.
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
    /// Added to each index before it is hashed; written only where it is not 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub first_row: usize,
    /// Where virtual elements find their slots.
    pub hash: Hash,
    /// What the bytes of the parameter mean, if it is in 8 or 4 bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_bit: Option<LowBitSpec>,
}

/// What the bytes of a parameter in 8 or 4 bits mean.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "LowBitFields", into = "LowBitFields")]
#[non_exhaustive]
pub struct LowBitSpec {
    /// The bits of a value.
    pub bits: Bits,
    /// The distance of two levels, in 4 bits that of groups whose shift is 0.
    pub scale: f32,
}

// A scale is a number: that is checked wherever one is made.
impl Eq for LowBitSpec {}

/// The JSON form of a [`LowBitSpec`]. In f64, whose decimal form any reader takes for the same f32.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LowBitFields {
    bits: u32,
    scale: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<usize>,
}

impl From<LowBitSpec> for LowBitFields {
    fn from(LowBitSpec { bits, scale }: LowBitSpec) -> Self {
        Self {
            bits: bits.into(),
            scale: scale.into(),
            group: (bits == Bits::Four).then_some(GROUP),
        }
    }
}

impl TryFrom<LowBitFields> for LowBitSpec {
    type Error = String;

    fn try_from(fields: LowBitFields) -> std::result::Result<Self, String> {
        let bits = Bits::try_from(fields.bits)?;
        let scale = check_scale(fields.scale as f32)?;
        match (bits, fields.group) {
            (Bits::Four, Some(GROUP)) | (Bits::Eight, None) => Ok(Self { bits, scale }),
            (Bits::Four, Some(group)) => Err(format!("group must be {GROUP}, got {group}")),
            (Bits::Four, None) => Err("group is missing".into()),
            (Bits::Eight, Some(_)) => Err("group goes with 4 bits only".into()),
        }
    }
}

impl From<&LowBit> for LowBitSpec {
    fn from(low_bit: &LowBit) -> Self {
        Self {
            bits: low_bit.bits(),
            scale: low_bit.scale(),
        }
    }
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl From<&HashedEmbeddingBag> for LayerSpec {
    fn from(layer: &HashedEmbeddingBag) -> Self {
        let config = layer.config();
        Self {
            num_embeddings: layer.num_embeddings(),
            embedding_dim: layer.embedding_dim(),
            mode: config.mode,
            padding_idx: config.padding_idx,
            include_last_offset: config.include_last_offset,
            first_row: config.first_row,
            hash: layer.hash(),
            low_bit: layer.low_bit().map(LowBitSpec::from),
        }
    }
}

impl LayerSpec {
    /// Checks that `layer` is the one described here, so that each of its rows finds its values once those of the file are loaded
    /// into it. The bounds check and the kind of gradient are not part of a description, so they may differ.
    ///
    /// # Errors
    /// The first field that differs, such as `mode` or `hash.seed`, with both values.
    pub fn check(&self, layer: &HashedEmbeddingBag) -> Result<()> {
        check_same(self, &Self::from(layer))
    }

    /// Builds the layer on its tensors.
    pub(super) fn build(&self, stored: Stored) -> Result<HashedEmbeddingBag> {
        let config = HashedEmbeddingBagConfig {
            mode: self.mode,
            hash: Some(self.hash),
            padding_idx: self.padding_idx,
            include_last_offset: self.include_last_offset,
            first_row: self.first_row,
            ..Default::default()
        };
        let tables = Arc::new(Tables::one(config.first_row, self.num_embeddings)?);
        HashedEmbeddingBag::over(stored, tables, self.embedding_dim, config)
    }
}

/// The description of one collection: everything but its parameter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct CollectionSpec {
    /// The tables, in order.
    pub tables: Vec<TableSpec>,
    /// The features, in order; `None`, and not written, if they are the tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<FeatureSpec>>,
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
    /// What the bytes of the parameter mean, if it is in 8 or 4 bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_bit: Option<LowBitSpec>,
}

/// One table of a [`CollectionSpec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct TableSpec {
    /// Table name, unique within the collection.
    pub name: String,
    /// Rows of the table.
    pub num_embeddings: usize,
}

/// One feature of a [`CollectionSpec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct FeatureSpec {
    /// Feature name, unique within the collection.
    pub name: String,
    /// The name of the table that it looks into.
    pub table: String,
}

impl From<&HashedEmbeddingBagCollection> for CollectionSpec {
    fn from(collection: &HashedEmbeddingBagCollection) -> Self {
        let config = collection.config();
        let tables = collection.tables().map(|(name, num_embeddings)| TableSpec {
            name: name.to_string(),
            num_embeddings,
        });
        let tables: Vec<_> = tables.collect();
        let features = collection.features().map(|(name, table)| FeatureSpec {
            name: name.to_string(),
            table: table.to_string(),
        });
        let features: Vec<_> = features.collect();
        let table_names = tables.iter().map(|table| (&table.name, &table.name));
        let are_the_tables = features
            .iter()
            .map(|feature| (&feature.name, &feature.table))
            .eq(table_names);
        Self {
            features: (!are_the_tables).then_some(features),
            tables,
            embedding_dim: collection.embedding_dim(),
            mode: config.mode,
            padding_idx: config.padding_idx,
            include_last_offset: config.include_last_offset,
            hash: collection.hash(),
            low_bit: collection.low_bit().map(LowBitSpec::from),
        }
    }
}

impl CollectionSpec {
    /// Checks that `collection` is the one described here, with its tables and features in the same order; see
    /// [`LayerSpec::check`].
    ///
    /// # Errors
    /// The first field that differs, such as `tables[0].name` or `hash.seed`, with both values.
    pub fn check(&self, collection: &HashedEmbeddingBagCollection) -> Result<()> {
        check_same(self, &Self::from(collection))
    }

    /// Builds the collection on its tensors.
    pub(super) fn build(&self, stored: Stored) -> Result<HashedEmbeddingBagCollection> {
        let config = HashedEmbeddingBagConfig {
            mode: self.mode,
            hash: Some(self.hash),
            padding_idx: self.padding_idx,
            include_last_offset: self.include_last_offset,
            ..Default::default()
        };
        let tables = self.tables.iter();
        let tables = tables.map(|table| (table.name.as_str(), table.num_embeddings));
        let dim = self.embedding_dim;
        let collection = HashedEmbeddingBagCollection::over(stored, tables, dim, config)?;
        match &self.features {
            Some(features) => collection.with_features(
                features
                    .iter()
                    .map(|feature| (feature.name.as_str(), &feature.table)),
            ),
            None => Ok(collection),
        }
    }
}

/// Refuses a layer whose description is not the saved one. They are compared as JSON, where every field has a path.
fn check_same<T: Serialize>(saved: &T, layer: &T) -> Result<()> {
    let saved = serde_json::to_value(saved).map_err(Error::wrap)?;
    let layer = serde_json::to_value(layer).map_err(Error::wrap)?;
    match first_difference("", Some(&saved), Some(&layer)) {
        Some(difference) => bail!("checkpoint: {difference}"),
        None => Ok(()),
    }
}

/// A message about the first field that differs: its path, which starts with `path`, and both values.
fn first_difference(path: &str, saved: Option<&Value>, layer: Option<&Value>) -> Option<String> {
    match (saved, layer) {
        (Some(Value::Object(saved)), Some(Value::Object(layer))) => {
            // The kind of a hash comes first, because hashes of two kinds differ in most other fields as well.
            let fields = saved.keys().chain(layer.keys());
            let fields: BTreeSet<_> = fields.map(|field| (field != "kind", field)).collect();
            fields.into_iter().find_map(|(_, field)| {
                first_difference(&join(path, field), saved.get(field), layer.get(field))
            })
        }
        (Some(Value::Array(saved)), Some(Value::Array(layer))) => (0..saved.len().max(layer.len()))
            .find_map(|i| first_difference(&format!("{path}[{i}]"), saved.get(i), layer.get(i))),
        _ if saved == layer => None,
        _ => {
            let show = |value: Option<&Value>| match value {
                Some(value) => value.to_string(),
                None => "absent".to_string(),
            };
            let (saved, layer) = (show(saved), show(layer));
            Some(format!(
                "{path} is {saved} in the file, {layer} in the layer"
            ))
        }
    }
}

/// The whole description.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Description {
    version: u64,
    pub(super) layers: BTreeMap<String, LayerSpec>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) collections: BTreeMap<String, CollectionSpec>,
}

impl Default for Description {
    fn default() -> Self {
        Self {
            version: VERSION,
            layers: BTreeMap::new(),
            collections: BTreeMap::new(),
        }
    }
}

impl Description {
    /// The names of all layers and collections.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let names = self.layers.keys().chain(self.collections.keys());
        names.map(String::as_str)
    }

    /// The names of the layers and collections in low bits.
    fn low_bit_names(&self) -> impl Iterator<Item = &str> {
        let layers = self.layers.iter();
        let layers = layers.filter_map(|(name, spec)| spec.low_bit.map(|_| name.as_str()));
        let collections = self.collections.iter();
        layers.chain(collections.filter_map(|(name, spec)| spec.low_bit.map(|_| name.as_str())))
    }

    pub(super) fn to_json(&self) -> Result<String> {
        let version = match self.low_bit_names().next() {
            None => VERSION,
            Some(_) => LOW_BIT_VERSION,
        };
        let description = Self {
            version,
            ..self.clone()
        };
        serde_json::to_string(&description).map_err(Error::wrap)
    }

    /// Reads the JSON and checks each field on its own; whether the layers fit their tensors is the caller's to check.
    pub(super) fn from_json(json: &str) -> Result<Self> {
        let json: serde_json::Value = serde_json::from_str(json)
            .map_err(|e| Error::msg(format!("{METADATA_KEY} is no JSON: {e}")))?;
        // The version first: nothing is known about the fields of another one.
        match json
            .get("version")
            .map(|version| (version, version.as_u64()))
        {
            None => bail!("version is missing"),
            Some((_, Some(VERSION | LOW_BIT_VERSION))) => {}
            Some((version, _)) => {
                bail!("version must be {VERSION} or {LOW_BIT_VERSION}, got {version}")
            }
        }
        let description: Self = serde_path_to_error::deserialize(json).map_err(|e| {
            let path = match e.path().to_string().as_str() {
                "." => String::new(),
                path => format!("{path}: "),
            };
            Error::msg(format!("{path}{}", e.inner()))
        })?;
        if let Some(name) =
            (description.collections.keys()).find(|name| description.layers.contains_key(*name))
        {
            bail!("collection {name} has the name of a layer");
        }
        let low_bit = description.low_bit_names().next();
        if let (VERSION, Some(name)) = (description.version, low_bit) {
            bail!("{name}: low_bit goes with version {LOW_BIT_VERSION} only");
        }
        Ok(description)
    }
}
