//! Ratings of movies by users, with what is known of both: small enough to be held in memory.
//!
//! ```text
//! MovieLens files ─┐              ┌─ catalog: users and movies with dense row numbers and their features
//! interactions ────┼──> Ratings ──┤
//! generator ───────┘              └─ rows: (user row, movie row, liked) in file order
//! ```
//!
//! Of interactions, items are the movies, and what is in the file is liked; negative examples are drawn.
//!
//! The [`Catalog`] is the part a trained model cannot work without, so it travels in the checkpoint.

mod generated;
mod interactions;
mod movielens;
pub mod pairs;
mod records;
mod split;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::PathBuf;

use anyhow::Result;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::SeedableRng;
use serde::{Deserialize, Serialize};

use self::interactions::{Popularity, NEGATIVES};
pub use self::split::{tenths, Split};
use super::{Bags, Batch, Batches, Examples, Part, Record, Records, Rows, Schema, Truth};

/// The features a user or a movie may have besides its id, in the order in which the model reads them.
pub const USER_FEATURES: [&str; 4] = ["gender", "age", "occupation", "zip"];
/// See [`USER_FEATURES`].
pub const MOVIE_FEATURES: [&str; 2] = ["genres", "words"];

/// A word in a single title says nothing that the movie's own row does not.
const MIN_WORD_COUNT: usize = 2;

/// Where ratings come from.
pub enum Source {
    /// Made up, with a planted structure.
    Generated {
        /// Decides all of it.
        seed: u64,
    },
    /// A MovieLens set.
    Files {
        /// Its folder.
        dir: PathBuf,
        /// How it is read.
        rules: Rules,
    },
    /// A file of interactions: a line per user, its number and those of its items.
    Interactions(PathBuf),
}

/// How a MovieLens set becomes examples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rules {
    /// The lowest rating, of 0.5 to 5 stars, that counts as liked.
    pub like_from: f32,
    /// How it is divided.
    pub split: Split,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            like_from: 4.0,
            split: Split::Hash,
        }
    }
}

/// A data set.
pub struct Ratings {
    /// Where it came from.
    pub source: Source,
    /// Its users and movies.
    pub catalog: Catalog,
    /// In file order, or in that of time: the split goes by position.
    pub rows: Vec<Rating>,
    /// How they are divided into parts.
    pub split: Split,
    /// The probability each label was drawn with, where the data is generated.
    pub probabilities: Option<Vec<f64>>,
    /// What negative examples are drawn by, where all rows are positive ones.
    pub popularity: Option<Popularity>,
    /// The features that no row has a value of, or none often enough to be learnt from: they get no table.
    pub left_out: Vec<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Hash)]
pub struct Rating {
    pub user: u32,
    pub movie: u32,
    pub liked: bool,
}

/// Users and movies as the model knows them.
#[derive(Clone, Debug, PartialEq, Hash)]
pub struct Catalog {
    /// Who rated, or might have.
    pub users: Entities,
    /// What was rated, or might have been.
    pub movies: Entities,
    /// For each user row, the movie rows this user has rated: not to be recommended again.
    pub seen: Bags,
}

/// One side of a rating: all users, or all movies.
#[derive(Clone, Debug, PartialEq, Hash)]
pub struct Entities {
    /// The published ids, ascending; the position of an id is its row. Rows are dense, so the size of the table that
    /// hashing replaces is the number of distinct ids and not the largest id.
    pub ids: Vec<i64>,
    /// What is known of them besides their ids.
    pub features: Vec<Feature>,
}

/// A feature with a vocabulary, and the bag of its values that each row of an [`Entities`] has.
#[derive(Clone, Debug, PartialEq, Hash)]
pub struct Feature {
    /// Of the feature, and of its embedding table.
    pub name: &'static str,
    /// The distinct values, sorted; the position of a value is its row.
    pub vocabulary: Vec<String>,
    /// The rows of the values of each user or movie.
    pub bags: Bags,
}

impl Source {
    /// Reads or makes the data set.
    ///
    /// # Errors
    /// A file that is missing, or a line that does not fit, by file, line and field.
    pub fn load(self) -> Result<Ratings> {
        match self {
            Self::Generated { seed } => generated::generate(seed),
            Self::Files { dir, rules } => movielens::read(&dir, rules),
            Self::Interactions(file) => interactions::read(&file),
        }
    }

    /// The titles of all movies by published id, without reading or drawing a single rating.
    pub fn titles(&self) -> Result<BTreeMap<i64, String>> {
        match self {
            Self::Generated { seed } => Ok((1..).zip(generated::titles(*seed)).collect()),
            Self::Files { dir, .. } => movielens::titles(dir),
            // Their numbers say all there is to say.
            Self::Interactions(_) => Ok(BTreeMap::new()),
        }
    }
}

impl Ratings {
    /// The examples of a part: its ratings in file order, then the negative ones that are drawn, which are always the same.
    pub fn examples(&self, part: Part) -> Vec<Rating> {
        self.with_negatives(part, &mut StdRng::seed_from_u64(part as u64))
    }

    fn with_negatives(&self, part: Part, rng: &mut StdRng) -> Vec<Rating> {
        let mut rows = self.part(part);
        if let Some(popularity) = &self.popularity {
            rows.extend(popularity.negatives(&rows, &self.catalog.seen, rng));
        }
        rows
    }

    /// The ratings of a part, in file order.
    pub fn part(&self, wanted: Part) -> Vec<Rating> {
        self.select(wanted, &self.rows)
    }

    /// The truth of a part, where it is known.
    pub fn truth(&self, wanted: Part) -> Option<Truth> {
        let probabilities = self.probabilities.as_ref()?;
        Some(Truth {
            labels: self.part(wanted).iter().map(|r| r.liked).collect(),
            probabilities: self.select(wanted, probabilities),
        })
    }

    /// The same ratings by the rows of another catalogue, and how many are left out, as it lacks the user or the movie.
    pub fn in_catalog(self, catalog: &Catalog) -> (Self, usize) {
        let row = |own: &Entities, row: u32, other: &Entities| other.row(own.ids[row as usize]);
        let own = &self.catalog;
        let rows: Vec<_> = self
            .rows
            .iter()
            .filter_map(|rating| {
                Some(Rating {
                    user: row(&own.users, rating.user, &catalog.users)?,
                    movie: row(&own.movies, rating.movie, &catalog.movies)?,
                    liked: rating.liked,
                })
            })
            .collect();
        let left_out = self.rows.len() - rows.len();
        let ratings = Self {
            rows,
            catalog: catalog.clone(),
            probabilities: None,
            ..self
        };
        (ratings, left_out)
    }

    /// How many ratings of the train part each movie has, and how many of those are likes.
    pub fn examples_per_movie(&self) -> Vec<[u32; 2]> {
        let mut counts = vec![[0; 2]; self.catalog.movies.ids.len()];
        for rating in self.part(Part::Train) {
            let [ratings, likes] = &mut counts[rating.movie as usize];
            *ratings += 1;
            *likes += u32::from(rating.liked);
        }
        counts
    }

    /// The same, drawn negative examples included.
    pub fn all_examples_per_movie(&self) -> Vec<[u32; 2]> {
        let mut counts = self.examples_per_movie();
        if self.popularity.is_some() {
            // They are drawn as often as the movie occurs.
            for [examples, _] in &mut counts {
                *examples *= 1 + NEGATIVES as u32;
            }
        }
        counts
    }

    fn select<T: Copy>(&self, wanted: Part, per_rating: &[T]) -> Vec<T> {
        let rows = self.rows.len() as u64;
        (0..)
            .zip(per_rating)
            .filter(|(row, _)| self.split.is_in(*row, rows, wanted))
            .map(|(_, &value)| value)
            .collect()
    }
}

impl Examples for Ratings {
    /// A record for each user, of the movies that they liked, and for each movie, of the users who liked it; with the features of the
    /// one that it is for.
    fn records<'a>(&'a self) -> Result<Records<'a>> {
        let (users, movies) = (&self.catalog.users, &self.catalog.movies);
        // Tables in the order of the schema: users and their features, movies and theirs.
        let (of_users, of_movies) = (0, 1 + users.features.len());
        let mut by_user = vec![Record::new(); users.ids.len()];
        let mut by_movie = vec![Record::new(); movies.ids.len()];
        for rating in self.part(Part::Train).iter().filter(|rating| rating.liked) {
            by_user[rating.user as usize].push((of_movies, rating.movie));
            by_movie[rating.movie as usize].push((of_users, rating.user));
        }
        let with_features = |records: Vec<Record>, entities: &'a Entities, first: usize| {
            let used = (0..).zip(records).filter(|(_, record)| !record.is_empty());
            used.map(move |(row, mut record): (usize, Record)| {
                for (table, feature) in (first + 1..).zip(&entities.features) {
                    let values = feature.bags.bag(row).iter();
                    record.extend(values.map(|&value| (table, value)));
                }
                Ok(record)
            })
        };
        let by_user = with_features(by_user, users, of_users);
        let by_movie = with_features(by_movie, movies, of_movies);
        Ok(Box::new(by_user.chain(by_movie)))
    }

    fn schema(&self) -> Schema {
        self.catalog.schema()
    }

    fn len(&self, wanted: Part) -> usize {
        let all = self.rows.len() as u64;
        let rows = (0..all).filter(|&row| self.split.is_in(row, all, wanted));
        let each = match self.popularity {
            Some(_) => 1 + NEGATIVES,
            None => 1,
        };
        each * rows.count()
    }

    fn batches_at<'a>(
        &'a self,
        part: Part,
        positions: Range<usize>,
        batch_size: usize,
        shuffle: Option<&'a mut StdRng>,
    ) -> Result<Batches<'a>> {
        let at = |rows: Vec<Rating>| rows[positions].to_vec();
        let rows = match shuffle {
            Some(rng) => {
                let mut rows = at(self.with_negatives(part, rng));
                rows.shuffle(rng);
                rows
            }
            None => at(self.examples(part)),
        };
        let starts = (0..rows.len()).step_by(batch_size);
        Ok(Box::new(starts.map(move |start| {
            let rows = &rows[start..rows.len().min(start + batch_size)];
            let pairs: Vec<_> = rows.iter().map(Rating::pair).collect();
            let labels = rows.iter().map(|rating| rating.liked).collect();
            Ok((self.catalog.batch(&pairs), labels))
        })))
    }
}

impl Rating {
    pub fn pair(&self) -> (u32, u32) {
        (self.user, self.movie)
    }
}

impl Catalog {
    /// A table per id and per feature, in the order of [`Self::batch`].
    pub fn schema(&self) -> Schema {
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
        Schema {
            numbers: 0,
            tables: [side("user", &self.users), side("movie", &self.movies)].concat(),
        }
    }

    /// What a model is asked about (user row, movie row) pairs.
    pub fn batch(&self, pairs: &[(u32, u32)]) -> Batch {
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
        Batch {
            numbers: Vec::new(),
            rows: Rows::Bags([side(&self.users, users), side(&self.movies, movies)].concat()),
        }
    }
}

impl Entities {
    /// Users or movies with the features that have values; the names of the others are added to `left_out`.
    fn new(
        ids: Vec<i64>,
        features: impl IntoIterator<Item = Feature>,
        left_out: &mut Vec<&'static str>,
    ) -> Self {
        let is_there = |feature: &Feature| !feature.vocabulary.is_empty();
        let (features, empty): (_, Vec<_>) = features.into_iter().partition(is_there);
        left_out.extend(empty.iter().map(|feature| feature.name));
        Self { ids, features }
    }

    /// The row of a published id.
    pub fn row(&self, id: i64) -> Option<u32> {
        self.ids.binary_search(&id).ok().map(|row| row as u32)
    }

    /// What to say of an id that has no row; `kind` is "user" or "movie".
    pub fn unknown(&self, kind: &str, id: i64) -> String {
        let (first, last) = (
            self.ids.first().copied().unwrap_or(0),
            self.ids.last().copied().unwrap_or(0),
        );
        format!(
            "no {kind} {id}: the model knows {} {kind}s, with ids from {first} to {last}",
            self.ids.len()
        )
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
    /// An empty value is one that is missing.
    fn new<V: AsRef<str>>(name: &'static str, rows: &[Vec<V>], min_count: usize) -> Self {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        rows.iter()
            .flatten()
            .for_each(|value| *counts.entry(value.as_ref()).or_default() += 1);
        let mut vocabulary: Vec<&str> = counts
            .into_iter()
            .filter(|&(value, count)| !value.is_empty() && count >= min_count)
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

/// The values of a feature that a text stands for, as a data set spells them: the words of a title, the region of a zip code.
pub fn feature_values(feature: &str, text: &str) -> Vec<String> {
    match feature {
        "words" => title_words(text),
        "zip" => vec![movielens::region(text)],
        _ => vec![text.to_owned()],
    }
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

    fn bags(batch: Batch) -> Vec<Bags> {
        match batch.rows {
            Rows::Bags(bags) => bags,
            Rows::OnePerTable(rows) => panic!("ratings have bags, not {rows:?}"),
        }
    }

    #[test]
    fn a_batch_asks_every_table_for_one_bag_per_pair() -> Result<()> {
        let catalog = generated::generate(0)?.catalog;
        let bags = bags(catalog.batch(&[(7, 1), (3, 0), (7, 0)]));
        assert_eq!(bags.len(), catalog.schema().tables.len());
        assert!(bags.iter().all(|bags| bags.len() == 3));
        assert_eq!(bags[0].indices(), [7, 3, 7]);
        assert_eq!(bags[4].indices(), [1, 0, 0]);
        assert_eq!(bags[5].bag(0), catalog.movies.features[0].bags.bag(1));
        Ok(())
    }

    #[test]
    fn batches_hold_a_part_once() -> Result<()> {
        let ratings = generated::generate(0)?;
        let mut rng = rand::SeedableRng::seed_from_u64(1);
        let read = |shuffle| -> Result<Vec<_>> {
            let mut rows = Vec::new();
            for batch in ratings.batches(Part::Valid, 1000, shuffle)? {
                let (batch, liked) = batch?;
                let bags = bags(batch);
                let pairs = bags[0].indices().iter().zip(bags[4].indices());
                rows.extend(pairs.zip(liked).map(|((&user, &movie), liked)| Rating {
                    user,
                    movie,
                    liked,
                }));
            }
            Ok(rows)
        };
        let (mut shuffled, in_order) = (read(Some(&mut rng))?, read(None)?);
        assert_eq!(in_order, ratings.part(Part::Valid));
        assert_eq!(in_order.len(), ratings.len(Part::Valid));
        assert_ne!(shuffled, in_order);
        let key = |rating: &Rating| rating.pair();
        let mut in_order = in_order;
        shuffled.sort_by_key(key);
        in_order.sort_by_key(key);
        assert_eq!(shuffled, in_order);
        Ok(())
    }
}
