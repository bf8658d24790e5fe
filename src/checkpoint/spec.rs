//! The description of the hashed layers: the JSON that a checkpoint holds in its metadata, and the layers it stands for.

use super::file::join;
use crate::collection::HashedEmbeddingBagCollection;
use crate::config::HashedEmbeddingBagConfig;
use crate::hash::Hash;
use crate::layer::HashedEmbeddingBag;
use crate::op::Mode;
use candle_core::{bail, Error, Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// The key of the description in `__metadata__`.
pub(super) const METADATA_KEY: &str = "hashed_embedding_bag";
/// The version of the description that is written, and the only one that is read.
const VERSION: u64 = 1;

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

    /// Builds the layer on `hashed_weight`.
    pub(super) fn build(&self, hashed_weight: Tensor) -> Result<HashedEmbeddingBag> {
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

    /// Builds the collection on `hashed_weight`.
    pub(super) fn build(&self, hashed_weight: Tensor) -> Result<HashedEmbeddingBagCollection> {
        let config = HashedEmbeddingBagConfig {
            mode: self.mode,
            hash: Some(self.hash),
            padding_idx: self.padding_idx,
            include_last_offset: self.include_last_offset,
            ..Default::default()
        };
        let tables = self.tables.iter();
        let tables = tables.map(|table| (table.name.as_str(), table.num_embeddings));
        let collection =
            HashedEmbeddingBagCollection::new(hashed_weight, tables, self.embedding_dim, config)?;
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

    pub(super) fn to_json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(Error::wrap)
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
            Some((_, Some(VERSION))) => {}
            Some((version, _)) => bail!("version must be {VERSION}, got {version}"),
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
        Ok(description)
    }
}
