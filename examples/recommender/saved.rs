//! A trained recommender in one file: the model, and what is needed to ask it something.
//!
//! | tensor | dtype | |
//! |---|---|---|
//! | `<table>.hashed_weight` | f32 | the hashed embeddings; the crate's metadata says how to read them |
//! | `top.<i>.weight`, `top.<i>.bias` | f32 | the MLP |
//! | `user_ids`, `movie_ids` | i64 | the published id of each row |
//! | `<feature>.vocabulary` | u8 | the values, joined by newlines |
//! | `<feature>.indices`, `<feature>.offsets` | u32 | the bag of values of each user or movie |
//! | `seen.indices`, `seen.offsets` | u32 | the movies that each user has rated |
//! | `generator_seed` | i64 | only if trained on generated data: its seed |

use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail, ensure, Context, Result};
use candle_core::{Device, Tensor};
use candle_hashed_embedding_bag::{checkpoint, Checkpoint};
use candle_nn::VarMap;

use crate::data::{Bags, Catalog, Entities, Feature, Source, MOVIE_FEATURES, USER_FEATURES};
use crate::model::Dlrm;

pub struct Recommender {
    pub catalog: Catalog,
    pub model: Dlrm,
    generator_seed: Option<u64>,
}

/// Writes the model, whose variables are `vars`, and its catalog.
pub fn save(
    path: &Path,
    model: &Dlrm,
    vars: &VarMap,
    catalog: &Catalog,
    source: &Source,
) -> Result<()> {
    let variables = vars
        .data()
        .lock()
        .map_err(|_| anyhow!("a thread panicked while it held the variables"))?
        .clone();
    let mut tensors: Vec<_> = variables
        .into_iter()
        .map(|(name, var)| (name, var.as_tensor().clone()))
        .collect();
    put_entities(&mut tensors, "user", &catalog.users)?;
    put_entities(&mut tensors, "movie", &catalog.movies)?;
    put_bags(&mut tensors, "seen", &catalog.seen)?;
    if let Source::Generated { seed } = source {
        put(&mut tensors, "generator_seed", &[*seed as i64])?;
    }
    checkpoint::save(path, tensors, model.tables())
        .with_context(|| format!("cannot write {}", path.display()))
}

impl Recommender {
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let context = || {
            format!(
                "cannot open the checkpoint {}; training writes it",
                path.display()
            )
        };
        let checkpoint = Checkpoint::open(path).with_context(context)?;
        Self::read(&checkpoint, device).with_context(context)
    }

    fn read(checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        let users = entities(checkpoint, "user", &USER_FEATURES)?;
        let movies = entities(checkpoint, "movie", &MOVIE_FEATURES)?;
        let seen = get_bags(checkpoint, "seen", users.ids.len(), movies.ids.len())?;
        let catalog = Catalog {
            users,
            movies,
            seen,
        };
        let model = Dlrm::open(&catalog, checkpoint, device)?;
        let seed: Option<Vec<i64>> = get(checkpoint, "generator_seed").ok();
        Ok(Self {
            catalog,
            model,
            generator_seed: seed.and_then(|seed| seed.first().map(|&seed| seed as u64)),
        })
    }

    /// The ratings this was trained on: in `dir`, or, if they were generated, made again.
    pub fn source(&self, dir: Option<PathBuf>) -> Result<Source> {
        match (self.generator_seed, dir) {
            (Some(seed), None) => Ok(Source::Generated { seed }),
            (None, Some(dir)) => Ok(Source::Files(dir)),
            (Some(_), Some(_)) => {
                bail!("the checkpoint was trained on generated ratings: leave out --data")
            }
            (None, None) => {
                bail!("the checkpoint was trained on a MovieLens set: name its folder with --data")
            }
        }
    }
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
            feature.vocabulary.join("\n").as_bytes(),
        )?;
        put_bags(tensors, feature.name, &feature.bags)?;
    }
    Ok(())
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
    let has = |feature: &&&str| checkpoint.layers().any(|(layer, _)| layer == **feature);
    let features = features
        .iter()
        .filter(has)
        .map(|&name| {
            let vocabulary = String::from_utf8(get(checkpoint, &format!("{name}.vocabulary"))?)
                .with_context(|| format!("tensor {name}.vocabulary"))?;
            let vocabulary: Vec<String> = vocabulary.split('\n').map(str::to_owned).collect();
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
    use crate::evaluate::logits;
    use crate::options::{Command, Options};
    use crate::{init, train};
    use clap::Parser;

    #[test]
    fn a_trained_model_comes_back_whole() -> Result<()> {
        let Command::Train(options) =
            Options::parse_from(["", "--epochs", "1", "--batch-size", "20000"]).command()
        else {
            bail!("train is the default")
        };
        let source = Source::Generated { seed: u64::MAX };
        let data = source.load()?;
        let vars = VarMap::new();
        let model = Dlrm::new(
            &data.catalog,
            &options.tables()?,
            init::seeded(&vars, 1, &Device::Cpu),
        )?;
        let before =
            crate::evaluate::evaluate(&model, &data.catalog, &data.ratings, &Device::Cpu)?.logloss;
        let best = train::train(&model, &vars, &data, &options, &Device::Cpu)?;
        assert!(best.valid.logloss < before);

        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.safetensors");
        save(&path, &model, &vars, &data.catalog, &source)?;
        let opened = Recommender::open(&path, &Device::Cpu)?;
        assert_eq!(opened.catalog, data.catalog);
        assert!(matches!(
            opened.source(None)?,
            Source::Generated { seed: u64::MAX }
        ));
        assert!(opened.source(Some(dir.path().to_owned())).is_err());

        let pairs: Vec<_> = (0..100).map(|i| (i, 2 * i)).collect();
        let score = |model: &Dlrm, catalog: &Catalog| logits(model, catalog, &pairs, &Device::Cpu);
        assert_eq!(
            score(&opened.model, &opened.catalog)?,
            score(&model, &data.catalog)?
        );
        Ok(())
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
