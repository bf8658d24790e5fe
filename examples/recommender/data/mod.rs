//! What every source of ratings is turned into before the model sees it.
//!
//! ```text
//! MovieLens files ─┐              ┌─ catalog: users and movies with dense row numbers and their features
//!                  ├──> Dataset ──┤
//! generator ───────┘              └─ ratings: (user row, movie row, liked) in file order
//! ```
//!
//! The [`Catalog`] is the part a trained model cannot work without, so it travels in the checkpoint.

mod bags;
mod generated;
mod movielens;
mod records;
mod split;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use anyhow::Result;

pub use bags::Bags;
pub use split::{part, Part};

/// The features a user or a movie may have besides its id, in the order in which the model reads them.
pub const USER_FEATURES: [&str; 4] = ["gender", "age", "occupation", "zip"];
pub const MOVIE_FEATURES: [&str; 2] = ["genres", "words"];

/// A word in a single title says nothing that the movie's own row does not.
const MIN_WORD_COUNT: usize = 2;

/// Where ratings come from.
pub enum Source {
    Generated {
        seed: u64,
    },
    /// The folder of a MovieLens set.
    Files(PathBuf),
}

pub struct Dataset {
    pub catalog: Catalog,
    /// In file order: the split goes by position.
    pub ratings: Vec<Rating>,
    /// The probability each label was drawn with, where the data is generated.
    pub probabilities: Option<Vec<f64>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rating {
    pub user: u32,
    pub movie: u32,
    pub liked: bool,
}

/// Users and movies as the model knows them.
#[derive(Clone, Debug, PartialEq)]
pub struct Catalog {
    pub users: Entities,
    pub movies: Entities,
    /// For each user row, the movie rows this user has rated: not to be recommended again.
    pub seen: Bags,
}

/// One side of a rating: all users, or all movies.
#[derive(Clone, Debug, PartialEq)]
pub struct Entities {
    /// The published ids, ascending; the position of an id is its row. Rows are dense, so the size of the table that
    /// hashing replaces is the number of distinct ids and not the largest id.
    pub ids: Vec<i64>,
    pub features: Vec<Feature>,
}

/// A feature with a vocabulary, and the bag of its values that each row of an [`Entities`] has.
#[derive(Clone, Debug, PartialEq)]
pub struct Feature {
    pub name: &'static str,
    pub vocabulary: Vec<String>,
    pub bags: Bags,
}

impl Source {
    pub fn load(&self) -> Result<Dataset> {
        match self {
            Self::Generated { seed } => generated::generate(*seed),
            Self::Files(dir) => movielens::read(dir),
        }
    }

    /// The titles of all movies by published id, without reading or drawing a single rating.
    pub fn titles(&self) -> Result<BTreeMap<i64, String>> {
        match self {
            Self::Generated { seed } => Ok((1..).zip(generated::titles(*seed)).collect()),
            Self::Files(dir) => movielens::titles(dir),
        }
    }
}

impl Dataset {
    pub fn part(&self, wanted: Part) -> Vec<Rating> {
        self.select(wanted, &self.ratings)
    }

    /// The true probabilities of the labels in a part, where they are known.
    pub fn probabilities(&self, wanted: Part) -> Option<Vec<f64>> {
        self.probabilities
            .as_ref()
            .map(|probabilities| self.select(wanted, probabilities))
    }

    fn select<T: Copy>(&self, wanted: Part, per_rating: &[T]) -> Vec<T> {
        (0..)
            .zip(per_rating)
            .filter(|(row, _)| part(*row) == wanted)
            .map(|(_, &value)| value)
            .collect()
    }
}

impl Rating {
    pub fn pair(&self) -> (u32, u32) {
        (self.user, self.movie)
    }
}

impl Catalog {
    /// The embedding tables a model of this catalog has: name and number of rows, in the order of [`Self::bags`].
    pub fn tables(&self) -> Vec<(&'static str, usize)> {
        let side = |name, entities: &Entities| {
            let mut tables = vec![(name, entities.ids.len())];
            tables.extend(
                entities
                    .features
                    .iter()
                    .map(|feature| (feature.name, feature.vocabulary.len())),
            );
            tables
        };
        [side("user", &self.users), side("movie", &self.movies)].concat()
    }

    /// What each table is asked for a batch of (user row, movie row) pairs: one bag per pair.
    pub fn bags(&self, pairs: &[(u32, u32)]) -> Vec<Bags> {
        let side = |entities: &Entities, rows: Vec<u32>| {
            let mut bags: Vec<Bags> = entities
                .features
                .iter()
                .map(|feature| feature.bags.gather(&rows))
                .collect();
            bags.insert(0, Bags::of_one_each(rows));
            bags
        };
        let (users, movies) = pairs.iter().copied().unzip();
        [side(&self.users, users), side(&self.movies, movies)].concat()
    }
}

impl Entities {
    pub fn row(&self, id: i64) -> Option<u32> {
        self.ids.binary_search(&id).ok().map(|row| row as u32)
    }

    /// The values of `feature` at `row`, for people.
    pub fn describe(&self, feature: &str, row: u32) -> String {
        let Some(feature) = self.features.iter().find(|f| f.name == feature) else {
            return String::new();
        };
        let values = feature
            .bags
            .bag(row as usize)
            .iter()
            .map(|&value| feature.vocabulary[value as usize].as_str());
        values.collect::<Vec<_>>().join(", ")
    }
}

impl Feature {
    /// Builds vocabulary and bags from the values of every row, and drops values that fewer than `min_count` rows have.
    fn new<V: AsRef<str>>(name: &'static str, rows: &[Vec<V>], min_count: usize) -> Self {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        rows.iter()
            .flatten()
            .for_each(|value| *counts.entry(value.as_ref()).or_default() += 1);
        let mut vocabulary: Vec<&str> = counts
            .into_iter()
            .filter(|&(_, count)| count >= min_count)
            .map(|(value, _)| value)
            .collect();
        vocabulary.sort_unstable();
        let mut bags = Bags::default();
        for row in rows {
            bags.push(
                row.iter()
                    .filter_map(|v| vocabulary.binary_search(&v.as_ref()).ok())
                    .map(|value| value as u32),
            );
        }
        Self {
            name,
            vocabulary: vocabulary.into_iter().map(str::to_owned).collect(),
            bags,
        }
    }
}

/// For each user row, the movies this user has rated.
fn seen(users: usize, ratings: &[Rating]) -> Bags {
    let mut movies = vec![Vec::new(); users];
    ratings
        .iter()
        .for_each(|rating| movies[rating.user as usize].push(rating.movie));
    let mut seen = Bags::default();
    movies.into_iter().for_each(|movies| seen.push(movies));
    seen
}

/// The distinct words of a title, lower-cased; the year in brackets counts as a word.
fn title_words(title: &str) -> Vec<String> {
    let mut words: Vec<String> = title
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect();
    words.sort_unstable();
    words.dedup();
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_title() {
        assert_eq!(
            title_words("Amélie & the AMÉLIE (2001)"),
            ["2001", "amélie", "the"]
        );
    }

    #[test]
    fn rare_values_leave_their_bags() {
        let feature = Feature::new("words", &[vec!["b", "a"], vec!["rare"], vec!["a", "b"]], 2);
        assert_eq!(feature.vocabulary, ["a", "b"]);
        let bags: Vec<&[u32]> = (0..3).map(|row| feature.bags.bag(row)).collect();
        assert_eq!(bags, [&[1, 0][..], &[], &[0, 1]]);
    }

    #[test]
    fn a_batch_asks_every_table_for_one_bag_per_pair() -> Result<()> {
        let catalog = generated::generate(0)?.catalog;
        let bags = catalog.bags(&[(7, 1), (3, 0), (7, 0)]);
        assert_eq!(bags.len(), catalog.tables().len());
        assert!(bags.iter().all(|bags| bags.len() == 3));
        assert_eq!(bags[0].indices(), [7, 3, 7]);
        assert_eq!(bags[4].indices(), [1, 0, 0]);
        assert_eq!(bags[5].bag(0), catalog.movies.features[0].bags.bag(1));
        Ok(())
    }
}
