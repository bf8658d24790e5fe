//! The model in service, and its replacement while requests run.
//!
//! A [`Model`] never changes. Each request takes the one in service when it arrives and keeps it to its end, so a
//! replacement disturbs none of them; the old model goes when its last request does.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{ensure, Context, Result};
use candle_core::Device;

use crate::batcher::Work;
use recommender::candidates::Candidates;
use recommender::data::Catalog;
use recommender::embeddings::{list, Table};
use recommender::options::Common;
use recommender::saved::Recommender;
use recommender::step;

pub struct Model {
    recommender: Recommender,
    candidates: Candidates,
    tables: Vec<Table>,
    /// By published movie id; empty if the checkpoint does not have them and `--data` is not given.
    titles: BTreeMap<i64, String>,
    device: Device,
    /// 1 for the model the server started with, and one more for each that replaced it.
    pub generation: u64,
}

pub struct Serving {
    source: Common,
    device: Device,
    current: RwLock<Arc<Model>>,
    /// Held while a checkpoint is read, so that the later of two reloads reads the later file.
    reloading: tokio::sync::Mutex<()>,
}

impl Serving {
    pub fn open(source: Common) -> Result<Self> {
        let device = source.device()?;
        let model = Model::open(&source, &device, 1)?;
        Ok(Self {
            source,
            device,
            current: RwLock::new(Arc::new(model)),
            reloading: tokio::sync::Mutex::default(),
        })
    }

    /// The model that answers new requests.
    pub fn model(&self) -> Arc<Model> {
        let current = self.current.read();
        current.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the checkpoint again and puts its model in service.
    ///
    /// # Errors
    /// If something is wrong with the new checkpoint; the old model then stays.
    pub async fn reload(&self) -> Result<Arc<Model>> {
        let _turn = self.reloading.lock().await;
        let (source, device) = (self.source.clone(), self.device.clone());
        let generation = self.model().generation + 1;
        let open = move || Model::open(&source, &device, generation);
        let model = Arc::new(tokio::task::spawn_blocking(open).await??);
        let current = self.current.write();
        *current.unwrap_or_else(PoisonError::into_inner) = model.clone();
        Ok(model)
    }
}

impl Model {
    fn open(source: &Common, device: &Device, generation: u64) -> Result<Self> {
        let recommender = Recommender::open(&source.checkpoint(), device)?;
        let titles = match recommender.titles(source.data.clone()) {
            Ok(titles) => titles,
            Err(_) if source.data.is_none() => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        let model = Self {
            tables: recommender.model.embeddings().tables()?,
            candidates: Candidates::new(&recommender.model, &recommender.catalog)?,
            recommender,
            titles,
            device: device.clone(),
            generation,
        };
        // The first forward starts thread pools and loads kernels: better now than at the first request. It also shows that
        // this model works.
        let scored = model.compute(&Work::Pairs(vec![(0, 0)]))?;
        ensure!(
            scored.iter().all(|logit| logit.is_finite()),
            "the model scores its first user and movie as {scored:?}"
        );
        Ok(model)
    }

    pub fn catalog(&self) -> &Catalog {
        &self.recommender.catalog
    }

    pub fn title(&self, movie: i64) -> Option<&str> {
        self.titles.get(&movie).map(String::as_str)
    }

    /// The embedding tables.
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    pub fn table(&self, name: &str) -> Option<&Table> {
        self.tables.iter().find(|table| table.name == name)
    }

    /// A logit per pair or movie, or the vectors of the bags one after the other.
    pub fn compute(&self, work: &Work) -> Result<Vec<f32>> {
        match work {
            Work::Pairs(pairs) => {
                let batch = self.catalog().batch(pairs);
                let model = &self.recommender.model;
                Ok(step::logits(model, &model.inputs(&batch)?)?)
            }
            Work::Candidates { user, movies } => {
                let (model, movies) = (&self.recommender.model, movies.clone());
                let candidates = &self.candidates;
                candidates.logits(model, self.catalog(), *user, movies)
            }
            Work::Bags {
                table,
                indices,
                offsets,
            } => {
                let table = self.table(table).context("no such table")?;
                let end = table
                    .layer
                    .config()
                    .include_last_offset
                    .then_some(indices.len() as i64);
                let offsets: Vec<i64> = offsets.iter().copied().chain(end).collect();
                let indices = list(indices, &self.device)?;
                let offsets = list(&offsets, &self.device)?;
                let vectors = table.forward(&indices, &offsets)?;
                Ok(vectors.flatten_all()?.to_vec1()?)
            }
        }
    }
}
