//! A trained model in one file, with everything that is needed to use it.
//!
//! | tensor | dtype | |
//! |---|---|---|
//! | `plain.hashed_weight`, `projected.hashed_weight`, `hashed.hashed_weight` | f32; u8 in 8 or 4 bits | the embedding tables; the crate's metadata says how to read them |
//! | `projected.projection`, `hashed.projection` | f32 | only with `--inner-dim`: a matrix of each table, `(tables, inner_dim, embedding_dim)` |
//! | `top.<i>.weight`, `top.<i>.bias` | f32 | the MLP |
//! | `<table>.rare` | u8 | only with `--min-count`: a bit per row of the table, 1 if the row is rare; rare rows share the first of them |
//! | `about` | u8 | what the checkpoint says of itself: [`About`], as JSON |
//!
//! A model of ratings, a [`Recommender`], brings its catalog:
//!
//! | tensor | dtype | |
//! |---|---|---|
//! | `user_ids`, `movie_ids` | i64 | the published id of each row |
//! | `<feature>.vocabulary` | u8 | the values, joined by newlines; a newline in a value is `\n`, a backslash `\\` |
//! | `<feature>.indices`, `<feature>.offsets` | u32 | the bag of values of each user or movie |
//! | `seen.indices`, `seen.offsets` | u32 | the movies that each user has rated |
//! | `movie.examples` | u32 | of each movie, the training examples, and how many of those are liked |
//! | `generator_seed` | i64 | only if trained on generated data: its seed |
//! | `interactions` | i64 | only if trained on interactions: how many |
//!
//! A model of clicks, a [`ClickModel`], needs only its hash:
//!
//! | tensor | dtype | |
//! |---|---|---|
//! | `bottom.<i>.weight`, `bottom.<i>.bias` | f32 | the MLP of the numbers |
//! | `clicks.counts` | i64 | how many examples the log had, and how many were clicked |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_hashed_embedding_bag::optim::named_variables;
use candle_hashed_embedding_bag::{checkpoint, checkpoint::TableSpec, Checkpoint};
use candle_nn::VarMap;

use crate::about::{fingerprint, About};
use crate::data::{
    Bags, Catalog, Clicks, Data, Entities, Feature, Ratings, Rules, Source, MOVIE_FEATURES,
    USER_FEATURES,
};
use crate::embeddings::rare_rows_name;
use crate::model::Dlrm;
use crate::popularity::Popularity;

/// A trained model of ratings.
pub struct Recommender {
    /// The users and movies it knows.
    pub catalog: Catalog,
    /// Scores pairs of them.
    pub model: Dlrm,
    popularity: Option<Popularity>,
    /// What the checkpoint says of itself, if it does.
    pub about: Option<About>,
    kind: Kind,
}

/// What a model of ratings was trained on.
#[derive(Clone, Copy)]
enum Kind {
    Generated { seed: u64 },
    MovieLens,
    Interactions,
}

/// A trained model of either kind.
pub enum Saved {
    /// Of ratings.
    Ratings(Box<Recommender>),
    /// Of clicks.
    Clicks(Box<ClickModel>),
}

impl Saved {
    /// Opens what [`save`] wrote.
    ///
    /// # Errors
    /// A file that is missing, damaged or of another kind, by its path.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        open(path, |checkpoint| {
            if checkpoint.tensor_info(CLICK_COUNTS).is_ok() {
                Ok(Self::Clicks(Box::new(ClickModel::read(
                    checkpoint, device,
                )?)))
            } else {
                let recommender = Recommender::read(checkpoint, device)?;
                Ok(Self::Ratings(Box::new(recommender)))
            }
        })
    }
}

/// A trained model of clicks.
pub struct ClickModel {
    /// Scores clicks.
    pub model: Dlrm,
    /// What the checkpoint says of itself, if it does.
    pub about: Option<About>,
    /// The rows of each category's table.
    pub rows_per_field: u32,
    /// The numbers of examples and of clicked examples in the log it was trained on.
    counts: [i64; 2],
}

/// Writes the model, whose variables are `vars` and which was trained on `data`. Its tables may have been rounded since.
pub fn save(path: &Path, model: &Dlrm, vars: &VarMap, data: &Data, about: &About) -> Result<()> {
    // The tables come from the model, which may hold others than the variables.
    let mut tensors: Vec<_> = checkpoint::variables(vars)
        .into_iter()
        .filter(|(name, _)| !name.ends_with(".hashed_weight"))
        .collect();
    for (table, rare) in data
        .examples()
        .schema()
        .tables
        .iter()
        .zip(model.embeddings().rare())
    {
        if let Some(rare) = rare {
            put(&mut tensors, rare_rows_name(table.0), rare.bits())?;
        }
    }
    put(&mut tensors, ABOUT, &serde_json::to_vec(about)?)?;
    match data {
        Data::Ratings(ratings) => {
            let Ratings {
                source,
                catalog,
                rows,
                ..
            } = ratings;
            let examples = ratings.all_examples_per_movie();
            let shape = (examples.len(), 2);
            let examples = Tensor::from_slice(examples.as_flattened(), shape, &Device::Cpu)?;
            tensors.push((EXAMPLES.to_owned(), examples));
            put_entities(&mut tensors, "user", &catalog.users)?;
            put_entities(&mut tensors, "movie", &catalog.movies)?;
            put_bags(&mut tensors, "seen", &catalog.seen)?;
            match source {
                Source::Generated { seed } => {
                    put(&mut tensors, "generator_seed", &[*seed as i64])?;
                }
                Source::Files { .. } => {}
                Source::Interactions(_) => {
                    put(&mut tensors, "interactions", &[rows.len() as i64])?;
                }
            }
        }
        Data::Clicks(clicks) => put(&mut tensors, CLICK_COUNTS, &counts(clicks))?,
    }
    checkpoint::save(path, tensors, model.embeddings().collections())
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Whether two tensors of integers are the same.
fn is_equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    let values = |x: &Tensor| {
        x.to_device(&Device::Cpu)?
            .to_dtype(DType::I64)?
            .flatten_all()?
            .to_vec1::<i64>()
    };
    Ok(a.shape() == b.shape() && values(a)? == values(b)?)
}

/// Gives a new model, whose variables are `vars`, the values of the model in a checkpoint.
///
/// # Errors
/// A checkpoint of other tables or layers, or one whose tables were rounded.
pub fn warm_start(path: &Path, model: &Dlrm, vars: &VarMap) -> Result<()> {
    open(path, |checkpoint| {
        for (name, collection) in model.embeddings().collections() {
            let spec = checkpoint
                .collection(name)
                .context("its tables are other ones")?;
            ensure!(
                spec.low_bit.is_none(),
                "its tables were rounded: only those of --bits 32 can be trained further"
            );
            spec.check(collection)
                .context("its tables are other ones")?;
            // Values mean nothing at places that depend on the records of another log.
            if let (Some(kind), Some(rows)) = (collection.hash().row_tensor(), collection.row_tensor()) {
                let kept = checkpoint.tensor(&format!("{name}.{kind}"), &Device::Cpu)?;
                ensure!(
                    is_equal(&kept, rows)?,
                    "its {kind} were made of other records: tables with --hash semantic, lma or scma can be trained further only on \
                     the data they began with"
                );
            }
        }
        for (name, var) in named_variables(vars)? {
            let value = checkpoint.tensor(&name, var.device())?;
            ensure!(
                value.shape() == var.shape(),
                "its tensor {name} has the shape {:?}, not {:?}",
                value.shape(),
                var.shape()
            );
            vars.clone().set_one(name, value)?;
        }
        Ok(())
    })
    .context("--warm-start")
}

impl Recommender {
    /// Opens what [`save`] wrote of a model of ratings.
    ///
    /// # Errors
    /// A file that is missing, damaged or of another kind, by its path.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        open(path, |checkpoint| Self::read(checkpoint, device))
    }

    fn read(checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        let users =
            entities(checkpoint, "user", &USER_FEATURES).context("it is no model of ratings")?;
        let movies = entities(checkpoint, "movie", &MOVIE_FEATURES)?;
        let seen = get_bags(checkpoint, "seen", users.ids.len(), movies.ids.len())?;
        let catalog = Catalog {
            users,
            movies,
            seen,
        };
        let model = Dlrm::open(&catalog.schema(), checkpoint, device)?;
        let number = |name| -> Option<i64> { get(checkpoint, name).ok()?.first().copied() };
        let kind = match (number("generator_seed"), number("interactions")) {
            (Some(seed), _) => Kind::Generated { seed: seed as u64 },
            (None, Some(_)) => Kind::Interactions,
            (None, None) => Kind::MovieLens,
        };
        Ok(Self {
            popularity: popularity(checkpoint, catalog.movies.ids.len())?,
            about: about(checkpoint)?,
            catalog,
            model,
            kind,
        })
    }

    /// What is liked by many.
    ///
    /// # Errors
    /// A checkpoint that does not tell.
    pub fn popularity(&self) -> Result<&Popularity> {
        let popularity = self.popularity.as_ref();
        popularity.with_context(|| {
            format!("an older version wrote the checkpoint, without {EXAMPLES}: it does not know what is popular")
        })
    }

    /// The source of its ratings: the folder or file `path`, or the generator, if they were generated.
    pub fn source(&self, path: Option<PathBuf>) -> Result<Source> {
        match (self.kind, path) {
            (Kind::Generated { seed }, None) => Ok(Source::Generated { seed }),
            (Kind::MovieLens, Some(dir)) => Ok(Source::Files {
                dir,
                rules: self.rules(),
            }),
            (Kind::Interactions, Some(file)) => Ok(Source::Interactions(file)),
            (Kind::Generated { .. }, Some(_)) => {
                bail!("the checkpoint was trained on generated ratings: leave out --data")
            }
            (Kind::MovieLens, None) => {
                bail!("the checkpoint was trained on a MovieLens set: name its folder with --data")
            }
            (Kind::Interactions, None) => {
                bail!("the checkpoint was trained on interactions: name their file with --data")
            }
        }
    }

    /// How its ratings were read; as by default, if the checkpoint does not tell.
    fn rules(&self) -> Rules {
        let rules = self.about.as_ref().and_then(|about| about.data.rules);
        rules.unwrap_or_default()
    }

    /// The titles of all movies by published id, without reading a rating. Items of interactions have none.
    ///
    /// # Errors
    /// Those of [`source`](Self::source), what reading says, and titles of other movies than the model was trained on.
    pub fn titles(&self, path: Option<PathBuf>) -> Result<BTreeMap<i64, String>> {
        if let Kind::Interactions = self.kind {
            return Ok(BTreeMap::new());
        }
        let titles = self.source(path)?.titles()?;
        let known = self.about.as_ref().and_then(|a| a.catalogue.as_ref());
        let are_its_own = match known {
            Some(known) => *known == fingerprint(&titles),
            // An older checkpoint knows at least the ids.
            None => titles.keys().eq(&self.catalog.movies.ids),
        };
        ensure!(
            are_its_own,
            "--data has the titles of another catalogue than that of the checkpoint"
        );
        Ok(titles)
    }

    /// The ratings it was trained on, or others by the rows of its catalogue.
    ///
    /// # Errors
    /// Those of [`source`](Self::source), what reading says, and ratings of which it knows none.
    pub fn ratings(&self, dir: Option<PathBuf>) -> Result<TriedOn<Ratings>> {
        let ratings = self.source(dir)?.load()?;
        if ratings.catalog == self.catalog {
            return Ok(TriedOn {
                data: ratings,
                is_trained_on: true,
                left_out: 0,
            });
        }
        ensure!(
            !matches!(self.kind, Kind::Interactions),
            "these are not the interactions that the checkpoint was trained on, of which the negative examples are drawn"
        );
        let (data, left_out) = ratings.in_catalog(&self.catalog);
        ensure!(
            !data.rows.is_empty(),
            "the checkpoint knows no user or no movie of these ratings"
        );
        Ok(TriedOn {
            data,
            is_trained_on: false,
            left_out,
        })
    }
}

/// Data to evaluate a model on.
pub struct TriedOn<T> {
    /// Examples that the model can score.
    pub data: T,
    /// Whether the model was trained on them, so that their parts mean what they did then.
    pub is_trained_on: bool,
    /// Examples that the model cannot score.
    pub left_out: usize,
}

impl ClickModel {
    /// Opens what [`save`] wrote of a model of clicks.
    ///
    /// # Errors
    /// A file that is missing, damaged or of another kind, by its path.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        open(path, |checkpoint| Self::read(checkpoint, device))
    }

    fn read(checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        let counts: Vec<i64> = get(checkpoint, CLICK_COUNTS).context("it is no model of clicks")?;
        let counts = counts.try_into().map_err(|counts: Vec<_>| {
            anyhow!("tensor {CLICK_COUNTS} has {counts:?}, not 2 values")
        })?;
        let table = tables(checkpoint).next().context("no embedding tables")?;
        let rows_per_field = u32::try_from(table.num_embeddings)?;
        let model = Dlrm::open(&Clicks::schema_of(rows_per_field), checkpoint, device)?;
        Ok(Self {
            model,
            about: about(checkpoint)?,
            rows_per_field,
            counts,
        })
    }

    /// The clicks in the log at `path`, on which it was trained or not.
    ///
    /// # Errors
    /// Those of [`Clicks::open`].
    pub fn clicks(&self, path: &Path, skip_malformed: bool) -> Result<TriedOn<Clicks>> {
        let clicks = Clicks::open(path, Some(self.rows_per_field), skip_malformed)?;
        Ok(TriedOn {
            is_trained_on: counts(&clicks) == self.counts,
            data: clicks,
            left_out: 0,
        })
    }
}

const CLICK_COUNTS: &str = "clicks.counts";
const EXAMPLES: &str = "movie.examples";
const ABOUT: &str = "about";

/// `None` if the checkpoint was written before it said anything of itself.
fn about(checkpoint: &Checkpoint) -> Result<Option<About>> {
    if checkpoint.tensor_info(ABOUT).is_err() {
        return Ok(None);
    }
    let json: Vec<u8> = get(checkpoint, ABOUT)?;
    let about = serde_json::from_slice(&json);
    Ok(Some(about.with_context(|| format!("tensor {ABOUT}"))?))
}

fn popularity(checkpoint: &Checkpoint, movies: usize) -> Result<Option<Popularity>> {
    if checkpoint.tensor_info(EXAMPLES).is_err() {
        return Ok(None);
    }
    let counts = checkpoint.tensor(EXAMPLES, &Device::Cpu)?;
    ensure!(
        counts.dims() == [movies, 2],
        "tensor {EXAMPLES} must have the shape [{movies}, 2], got {:?}",
        counts.dims()
    );
    let counts: Vec<u32> = counts.flatten_all()?.to_vec1()?;
    let popularity = Popularity::new(counts.as_chunks().0.to_vec());
    Ok(Some(
        popularity.with_context(|| format!("tensor {EXAMPLES}"))?,
    ))
}

fn counts(clicks: &Clicks) -> [i64; 2] {
    let counts = clicks.counts();
    [counts.examples as i64, counts.clicked as i64]
}

fn open<T>(path: &Path, read: impl FnOnce(&Checkpoint) -> Result<T>) -> Result<T> {
    let opened = Checkpoint::open(path).map_err(anyhow::Error::from);
    opened
        .and_then(|checkpoint| read(&checkpoint))
        .with_context(|| {
            format!(
                "cannot open the checkpoint {}; training writes it",
                path.display()
            )
        })
}

type Tensors = Vec<(String, Tensor)>;

fn put<T: candle_core::WithDType>(
    tensors: &mut Tensors,
    name: impl Into<String>,
    values: &[T],
) -> Result<()> {
    tensors.push((name.into(), Tensor::new(values, &Device::Cpu)?));
    Ok(())
}

fn put_entities(tensors: &mut Tensors, name: &str, entities: &Entities) -> Result<()> {
    put(tensors, format!("{name}_ids"), &entities.ids)?;
    for feature in &entities.features {
        put(
            tensors,
            format!("{}.vocabulary", feature.name),
            join(&feature.vocabulary).as_bytes(),
        )?;
        put_bags(tensors, feature.name, &feature.bags)?;
    }
    Ok(())
}

/// Joins values into one text, which [`split`] can take apart whatever the values contain.
fn join(values: &[String]) -> String {
    let escaped = values
        .iter()
        .map(|value| value.replace('\\', "\\\\").replace('\n', "\\n"));
    escaped.collect::<Vec<_>>().join("\n")
}

fn split(text: &str) -> Vec<String> {
    text.split('\n').map(unescape).collect()
}

fn unescape(value: &str) -> String {
    let (mut plain, mut rest) = (String::new(), value.chars().peekable());
    while let Some(c) = rest.next() {
        let meant = match (c, rest.peek()) {
            ('\\', Some('\\')) => Some('\\'),
            ('\\', Some('n')) => Some('\n'),
            // A backslash before any other character occurs in files written before escapes were introduced.
            _ => None,
        };
        if meant.is_some() {
            rest.next();
        }
        plain.push(meant.unwrap_or(c));
    }
    plain
}

fn put_bags(tensors: &mut Tensors, name: &str, bags: &Bags) -> Result<()> {
    put(tensors, format!("{name}.indices"), bags.indices())?;
    put(tensors, format!("{name}.offsets"), bags.offsets())
}

fn get<T: candle_core::WithDType>(checkpoint: &Checkpoint, name: &str) -> Result<Vec<T>> {
    checkpoint
        .tensor(name, &Device::Cpu)?
        .to_vec1()
        .with_context(|| format!("tensor {name}"))
}

fn entities(checkpoint: &Checkpoint, name: &str, features: &[&'static str]) -> Result<Entities> {
    let ids: Vec<i64> = get(checkpoint, &format!("{name}_ids"))?;
    ensure!(
        ids.is_sorted_by(|a, b| a < b),
        "tensor {name}_ids does not ascend"
    );
    // A feature is there if its table is.
    let has = |feature: &&&str| tables(checkpoint).any(|table| table.name == **feature);
    let features = features
        .iter()
        .filter(has)
        .map(|&name| {
            let vocabulary = String::from_utf8(get(checkpoint, &format!("{name}.vocabulary"))?)
                .with_context(|| format!("tensor {name}.vocabulary"))?;
            let vocabulary = split(&vocabulary);
            let bags = get_bags(checkpoint, name, ids.len(), vocabulary.len())?;
            Ok(Feature {
                name,
                vocabulary,
                bags,
            })
        })
        .collect::<Result<_>>()?;
    Ok(Entities { ids, features })
}

/// The embedding tables of all collections.
fn tables(checkpoint: &Checkpoint) -> impl Iterator<Item = &TableSpec> {
    checkpoint
        .collections()
        .flat_map(|(_, collection)| &collection.tables)
}

/// The bags of `rows` rows, whose indices are all below `bound`.
fn get_bags(checkpoint: &Checkpoint, name: &str, rows: usize, bound: usize) -> Result<Bags> {
    let bags = Bags::from_parts(
        get(checkpoint, &format!("{name}.indices"))?,
        get(checkpoint, &format!("{name}.offsets"))?,
    );
    bags.filter(|bags| {
        bags.len() == rows && bags.indices().iter().all(|&index| (index as usize) < bound)
    })
    .with_context(|| {
        format!(
            "tensors {name}.indices and {name}.offsets are not {rows} bags of values below {bound}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::about::Reached;
    use crate::data::{write_generated, Part};
    use crate::evaluate::{evaluate, logits, Metrics};
    use crate::options::{Command, Options};
    use crate::rare::TrainCounts;
    use crate::train::Settings;
    use crate::{init, train};
    use candle_hashed_embedding_bag::Bits;
    use clap::Parser;

    #[test]
    fn a_trained_model_comes_back_whole() -> Result<()> {
        let source = Source::Generated { seed: u64::MAX };
        let data = Data::Ratings(source.load()?);
        let Data::Ratings(ratings) = &data else {
            bail!("no ratings")
        };
        let (model, vars) = trained(&data)?;
        let counts = TrainCounts::of(ratings)?;
        let model = model.sharing_rare_rows(&counts.rows, 100);
        let rare = model.embeddings().rare();
        assert!(rare[1].is_none() && rare[4].is_some(), "{rare:?}");

        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.safetensors");
        save(&path, &model, &vars, &data, &about(&data)?)?;
        let opened = Recommender::open(&path, &Device::Cpu)?;
        assert_eq!(opened.model.embeddings().rare(), rare);
        assert_eq!(opened.about, Some(about(&data)?));
        assert_eq!(
            opened.popularity()?,
            &Popularity::new(ratings.examples_per_movie())?
        );
        assert_eq!(opened.catalog, ratings.catalog);
        let again = opened.ratings(None)?;
        assert!(again.is_trained_on);
        assert_eq!(again.data.rows, ratings.rows);
        assert!(opened.source(Some(dir.path().to_owned())).is_err());

        let pairs: Vec<_> = (0..100).map(|i| (i, 2 * i)).collect();
        assert_eq!(
            logits(&opened.model, &opened.catalog, &pairs)?,
            logits(&model, &ratings.catalog, &pairs)?
        );
        assert!(ClickModel::open(&path, &Device::Cpu).is_err());
        Ok(())
    }

    #[test]
    fn a_rounded_model_comes_back_as_it_was() -> Result<()> {
        let data = Data::Ratings(Source::Generated { seed: 3 }.load()?);
        let (model, vars) = trained(&data)?;
        let exact = evaluate(&model, data.examples(), Part::Test)?;
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.safetensors");
        save(&path, &model, &vars, &data, &about(&data)?)?;
        let mut len = path.metadata()?.len();
        for bits in [Bits::Eight, Bits::Four] {
            let (rounded, errors) = model.to_bits(bits)?;
            assert!(errors.iter().all(|(_, error)| *error < 0.15), "{errors:?}");
            save(&path, &rounded, &vars, &data, &about(&data)?)?;
            let opened = Recommender::open(&path, &Device::Cpu)?;
            let metrics = evaluate(&opened.model, data.examples(), Part::Test)?;
            assert_eq!(metrics, evaluate(&rounded, data.examples(), Part::Test)?);
            let (auc, was) = (metrics.auc.context("no AUC")?, exact.auc.context("no AUC")?);
            assert!((auc - was).abs() < 0.01, "{bits:?}: {auc}, {was} before");
            assert_eq!(
                opened.model.embeddings().parameters(),
                model.embeddings().parameters()
            );
            let less = path.metadata()?.len();
            assert!(less < len, "{less} bytes, {len} with more bits");
            len = less;
        }
        Ok(())
    }

    /// What a hash reads of each row comes back with the tables, in low bits too, and so do matrices.
    #[test]
    fn models_whose_rows_are_alike_come_back() -> Result<()> {
        let data = Data::Ratings(Source::Generated { seed: 3 }.load()?);
        let Data::Ratings(ratings) = &data else {
            bail!("no ratings")
        };
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.safetensors");
        let pairs: Vec<_> = (0..100).map(|i| (i, 2 * i)).collect();
        for hash in ["semantic", "lma", "scma"] {
            let arguments = [
                "",
                "--hash",
                hash,
                "--inner-dim",
                "8",
                "--compression",
                "1/4",
            ];
            let Command::Train(options) = Options::parse_from(arguments).command() else {
                bail!("train is the default")
            };
            let (vars, config) = (VarMap::new(), options.model_config());
            let vb = init::seeded(&vars, 1, &Device::Cpu);
            let model = Dlrm::for_examples(data.examples(), &config, vb)?;
            for model in [model.clone(), model.to_bits(Bits::Eight)?.0] {
                save(&path, &model, &vars, &data, &about(&data)?)?;
                let opened = Recommender::open(&path, &Device::Cpu)?.model;
                assert_eq!(
                    logits(&opened, &ratings.catalog, &pairs)?,
                    logits(&model, &ratings.catalog, &pairs)?,
                    "{hash}"
                );
                let bytes = opened.embeddings().bytes();
                assert_eq!(bytes, model.embeddings().bytes());
                // Users, movies and words, eight bytes each, are more than the values of the tables in 8 bits.
                assert!(bytes > 8 * 3_000, "{hash}: {bytes}");
            }
            // The same without examples is refused.
            let vb = init::seeded(&VarMap::new(), 1, &Device::Cpu);
            assert!(Dlrm::new(&data.examples().schema(), &config, vb).is_err());
        }
        Ok(())
    }

    #[test]
    fn a_model_of_clicks_comes_back_whole() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (log, other) = (dir.path().join("log.gz"), dir.path().join("other"));
        write_generated(&log, 3_000, 1)?;
        write_generated(&other, 1_000, 1)?;
        let data = Data::Clicks(Clicks::open(&log, Some(2_000), false)?);
        let (model, vars) = trained(&data)?;

        let path = dir.path().join("model.safetensors");
        save(&path, &model, &vars, &data, &about(&data)?)?;
        let opened = ClickModel::open(&path, &Device::Cpu)?;
        let clicks = opened.clicks(&log, false)?;
        assert!(clicks.is_trained_on && opened.about.is_some());
        assert_eq!(
            evaluate(&opened.model, &clicks.data, Part::Test)?,
            evaluate(&model, data.examples(), Part::Test)?
        );
        assert!(!opened.clicks(&other, false)?.is_trained_on);
        assert!(Recommender::open(&path, &Device::Cpu).is_err());
        Ok(())
    }

    fn about(data: &Data) -> Result<About> {
        let metrics = Metrics::of(&[0.5, -0.25], &[true, false]);
        let reached = Reached {
            best_epoch: 1,
            valid: metrics,
            test: metrics,
            test_ranking: None,
        };
        let counts = TrainCounts::of(data.examples())?;
        About::new(data, &counts, serde_json::json!({"seed": 1}), reached)
    }

    /// A model after one epoch, so that it has learnt something.
    fn trained(data: &Data) -> Result<(Dlrm, VarMap)> {
        let Command::Train(options) = Options::parse_from(["", "--epochs", "1"]).command() else {
            bail!("train is the default")
        };
        let settings = Settings {
            batch_size: data.examples().len(Part::Train).div_ceil(12),
            ..options.settings(data)
        };
        let (examples, vars) = (data.examples(), VarMap::new());
        let vb = init::seeded(&vars, 1, &Device::Cpu);
        let model = Dlrm::new(&examples.schema(), &options.model_config(), vb)?;
        let before = evaluate(&model, examples, Part::Valid)?;
        let best = train::train(&model, &vars, examples, settings)?;
        assert!(best.valid.logloss < before.logloss);
        Ok((model, vars))
    }

    #[test]
    fn any_names_come_back() {
        for values in [
            &["Drama", "War"][..],
            &[
                "Drama\nComedy",
                "\n",
                "\\n",
                "\\",
                "\\\n\\",
                "C:\\new",
                "ends\\",
            ],
            &["", "a"],
            &[""],
        ] {
            assert_eq!(
                split(&join(
                    &values.iter().map(|v| v.to_string()).collect::<Vec<_>>()
                )),
                values
            );
        }
        // As in files written before escapes were introduced.
        assert_eq!(split("a\\b\nc\\"), ["a\\b", "c\\"]);
    }

    #[test]
    fn other_files_are_refused() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.safetensors");
        let error = format!(
            "{:#}",
            Recommender::open(&path, &Device::Cpu)
                .err()
                .context("no error")?
        );
        assert!(
            error.contains("model.safetensors; training writes it"),
            "{error}"
        );
        Ok(())
    }
}
