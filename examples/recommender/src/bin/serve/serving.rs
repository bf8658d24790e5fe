//! The model in service, and its replacement while requests run.
//!
//! A [`Model`] never changes. Each request takes the one in service when it arrives and keeps it to its end, so a
//! replacement disturbs none of them; the old model goes when its last request does, and no other is opened before: there are never
//! more than two in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use candle_core::Device;

use crate::batcher::Work;
use recommender::about::About;
use recommender::candidates::Candidates;
use recommender::catalogue::Change;
use recommender::data::{batch_of_fields, Catalog};
use recommender::embeddings::{list, Table};
use recommender::model::Dlrm;
use recommender::options::Common;
use recommender::profiles::{batch, Profile, Side};
use recommender::saved::{ClickModel, Recommender, Saved};
use recommender::step;

/// How often it is looked whether the last request of the model before has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

pub struct Model {
    pub kind: Kind,
    tables: Vec<Table>,
    device: Device,
    /// 1 for the model the server started with, and one more for each that replaced it.
    pub generation: u64,
    /// How its catalogue differs from that of the model before.
    pub change: Option<Change>,
}

/// What a model answers.
pub enum Kind {
    Ratings(Box<Ratings>),
    Clicks(Box<ClickModel>),
}

/// A model of ratings, and what answering takes besides.
pub struct Ratings {
    pub recommender: Recommender,
    candidates: Candidates,
    /// By published movie id; empty if the checkpoint does not have them and `--data` is not given.
    titles: BTreeMap<i64, String>,
}

pub struct Serving {
    source: Common,
    /// Refuse a model of other movies.
    keep_catalogue: bool,
    device: Device,
    current: RwLock<Arc<Model>>,
    /// Held while a checkpoint is read, so that the later of two reloads reads the later file; the model that was replaced last.
    replaced: tokio::sync::Mutex<Weak<Model>>,
}

impl Serving {
    pub fn open(source: Common, keep_catalogue: bool) -> Result<Self> {
        let device = source.device()?;
        let model = Model::open(&source, &device)?;
        Ok(Self {
            source,
            keep_catalogue,
            device,
            current: RwLock::new(Arc::new(model)),
            replaced: tokio::sync::Mutex::default(),
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
    /// If something is wrong with the new checkpoint, or its movies are others and may not be; the old model then stays.
    pub async fn reload(&self) -> Result<Arc<Model>> {
        let mut replaced = self.replaced.lock().await;
        while replaced.upgrade().is_some() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        let (source, device) = (self.source.clone(), self.device.clone());
        let open = move || Model::open(&source, &device);
        let mut model = tokio::task::spawn_blocking(open).await??;
        let old = self.model();
        model.generation = old.generation + 1;
        model.change = match (&old.kind, &model.kind) {
            (Kind::Ratings(old), Kind::Ratings(new)) => {
                Change::between(&old.recommender, &new.recommender)
            }
            (Kind::Clicks(_), Kind::Clicks(_)) => None,
            _ => bail!("the model in service and that of the checkpoint are not of one kind"),
        };
        if let (Some(change), true) = (&model.change, self.keep_catalogue) {
            bail!("--keep-catalogue refuses another catalogue: {change}");
        }
        let model = Arc::new(model);
        *replaced = Arc::downgrade(&old);
        drop(old);
        let current = self.current.write();
        *current.unwrap_or_else(PoisonError::into_inner) = model.clone();
        Ok(model)
    }
}

impl Model {
    pub fn open(source: &Common, device: &Device) -> Result<Self> {
        let kind = match Saved::open(&source.checkpoint(), device)? {
            Saved::Clicks(clicks) => Kind::Clicks(clicks),
            Saved::Ratings(recommender) => {
                let recommender = *recommender;
                // Titles are read only where it is known where they are.
                let titles = match &source.data {
                    None if recommender.source(None).is_err() => BTreeMap::new(),
                    data => recommender.titles(data.clone())?,
                };
                let ratings = Ratings {
                    candidates: Candidates::new(&recommender.model, &recommender.catalog)?,
                    recommender,
                    titles,
                };
                Kind::Ratings(Box::new(ratings))
            }
        };
        let model = Self {
            tables: kind.dlrm().embeddings().tables()?,
            kind,
            device: device.clone(),
            generation: 1,
            change: None,
        };
        model.try_it()?;
        Ok(model)
    }

    /// The first forward starts thread pools and loads kernels: better now than at the first request. It also shows that this model
    /// works.
    fn try_it(&self) -> Result<()> {
        let (what, examples) = match &self.kind {
            Kind::Ratings(ratings) => {
                let (user, movie) = (Profile::Row(0), Profile::Row(0));
                let batch = batch(ratings.catalog(), [(&user, &movie)]);
                ("its first user and movie", batch)
            }
            Kind::Clicks(clicks) => {
                let batch = batch_of_fields([[]], clicks.rows_per_field);
                let batch = batch.ok().context("a row without fields is a row")?;
                ("a row without fields", batch)
            }
        };
        let scored = self.compute(&Work::Examples {
            batch: examples,
            count: 1,
        })?;
        ensure!(
            scored.iter().all(|logit| logit.is_finite()),
            "the model scores {what} as {scored:?}"
        );
        Ok(())
    }

    /// What its checkpoint says of itself.
    pub fn about(&self) -> Option<&About> {
        match &self.kind {
            Kind::Ratings(ratings) => ratings.recommender.about.as_ref(),
            Kind::Clicks(clicks) => clicks.about.as_ref(),
        }
    }

    /// The embedding tables.
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    pub fn table(&self, name: &str) -> Option<&Table> {
        self.tables.iter().find(|table| table.name == name)
    }

    /// A logit per example or movie, or the vectors of the bags one after the other.
    pub fn compute(&self, work: &Work) -> Result<Vec<f32>> {
        let model = self.kind.dlrm();
        match work {
            Work::Examples { batch, .. } => Ok(step::logits(model, &model.inputs(batch)?)?),
            Work::Candidates { user, movies } => {
                let Kind::Ratings(ratings) = &self.kind else {
                    bail!("a model of clicks has no candidates")
                };
                let candidates = &ratings.candidates;
                candidates.logits(model, ratings.catalog(), user, movies.clone())
            }
            Work::Bags {
                table,
                indices,
                offsets,
            } => {
                let table = self.table(table).context("no such table")?;
                let indices: Vec<i64> = indices.iter().map(|&row| table.shared(row)).collect();
                let end = table
                    .layer
                    .config()
                    .include_last_offset
                    .then_some(indices.len() as i64);
                let offsets: Vec<i64> = offsets.iter().copied().chain(end).collect();
                let indices = list(&indices, &self.device)?;
                let offsets = list(&offsets, &self.device)?;
                let vectors = table.forward(&indices, &offsets)?;
                Ok(vectors.flatten_all()?.to_vec1()?)
            }
        }
    }
}

impl Kind {
    /// `ratings` or `clicks`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ratings(_) => "ratings",
            Self::Clicks(_) => "clicks",
        }
    }

    fn dlrm(&self) -> &Dlrm {
        match self {
            Self::Ratings(ratings) => &ratings.recommender.model,
            Self::Clicks(clicks) => &clicks.model,
        }
    }
}

impl Ratings {
    /// Whether a row of the catalogue shares one with others that were seldom seen in training.
    pub fn is_rare(&self, side: Side, row: u32) -> bool {
        let table = side.first_table(self.catalog());
        let rare = self.recommender.model.embeddings().rare();
        rare[table].as_ref().is_some_and(|rare| rare.contains(row))
    }

    pub fn catalog(&self) -> &Catalog {
        &self.recommender.catalog
    }

    pub fn title(&self, movie: i64) -> Option<&str> {
        self.titles.get(&movie).map(String::as_str)
    }
}
