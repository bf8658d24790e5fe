//! Where examples come from, and the form in which a model sees them.
//!
//! ```text
//! MovieLens files ─┐
//! interactions ────┼──> Ratings, in memory ──┐
//! generator ───────┘                         ├──> Examples ──> batches of numbers, bags of rows and labels
//! Criteo click log ───> Clicks, streamed ────┘
//! ```

mod bags;
mod criteo;
mod gzip;
mod ratings;

use std::hash::{Hash, Hasher};
use std::ops::Range;

use anyhow::Result;
use rand::rngs::StdRng;
use twox_hash::XxHash64;

pub use bags::Bags;
pub use criteo::{
    batch_of_fields, unlabelled, write_generated, Clicks, Unlabelled, Value, WrongField,
};
pub use ratings::{
    feature_values, pairs, Catalog, Entities, Feature, Ratings, Rules, Source, Split,
    MOVIE_FEATURES, USER_FEATURES,
};

/// Training fits the first part, chooses the epoch by the second, and never sees the third.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The model is fitted to it.
    Train,
    /// Used to choose the epoch.
    Valid,
    /// Scored once, at the end.
    Test,
    /// All of them.
    All,
}

impl Part {
    /// What it is called on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Valid => "valid",
            Self::Test => "test",
            Self::All => "all",
        }
    }
}

/// What a model reads of each example.
#[derive(Clone, Debug, PartialEq)]
pub struct Schema {
    /// How many numbers an example has.
    pub numbers: usize,
    /// The embedding tables: name and number of rows.
    pub tables: Vec<(&'static str, usize)>,
}

/// Examples without their labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// `Schema::numbers` of each example, one example after the other.
    pub numbers: Vec<f32>,
    /// What each example looks up in the tables of the schema.
    pub rows: Rows,
}

impl Batch {
    /// Adds the examples of another batch of the same schema.
    pub fn append(&mut self, other: Self) {
        self.numbers.extend(other.numbers);
        match (&mut self.rows, other.rows) {
            (Rows::OnePerTable(rows), Rows::OnePerTable(more)) => rows.extend(more),
            (Rows::Bags(bags), Rows::Bags(more)) => {
                for (bags, more) in bags.iter_mut().zip(&more) {
                    bags.append(more);
                }
            }
            _ => unreachable!("the rows of a schema are of one kind"),
        }
    }
}

/// The rows of a batch.
#[derive(Clone, Debug, PartialEq)]
pub enum Rows {
    /// One row of each table per example, one example after the other.
    OnePerTable(Vec<u32>),
    /// For each table, the bag of rows that each example pools.
    Bags(Vec<Bags>),
}

/// What is used together, as rows of tables of the schema: pairs of a table and a row.
pub type Record = Vec<(usize, u32)>;

/// Records one by one.
pub type Records<'a> = Box<dyn Iterator<Item = Result<Record>> + 'a>;

/// Batches with a label per example.
pub type Batches<'a> = Box<dyn Iterator<Item = Result<(Batch, Vec<bool>)>> + 'a>;

/// Examples in three parts.
pub trait Examples {
    /// What a model of these examples reads.
    fn schema(&self) -> Schema;

    /// The number of examples in a part.
    fn len(&self, part: Part) -> usize;

    /// The examples at these positions of a part in batches of `batch_size`, of which the last may be smaller: in file order or, given a
    /// generator, shuffled.
    fn batches_at<'a>(
        &'a self,
        part: Part,
        positions: Range<usize>,
        batch_size: usize,
        shuffle: Option<&'a mut StdRng>,
    ) -> Result<Batches<'a>>;

    /// Records of the train part, by which rows are [`alike`](crate::alike).
    fn records(&self) -> Result<Records<'_>>;

    /// All of a part: see [`batches_at`](Self::batches_at).
    fn batches<'a>(
        &'a self,
        part: Part,
        batch_size: usize,
        shuffle: Option<&'a mut StdRng>,
    ) -> Result<Batches<'a>> {
        self.batches_at(part, 0..self.len(part), batch_size, shuffle)
    }
}

/// Labels, and the probabilities with which they were drawn, which are known for generated examples.
#[derive(Clone, Debug, Default)]
pub struct Truth {
    /// Whether each example was liked or clicked.
    pub labels: Vec<bool>,
    /// The probability that the label of each example is positive.
    pub probabilities: Vec<f64>,
}

/// The data set that a program was told to use.
pub enum Data {
    /// Ratings of movies by users.
    Ratings(Ratings),
    /// Clicks on advertisements.
    Clicks(Clicks),
}

impl Data {
    /// Either kind, as examples for a model.
    pub fn examples(&self) -> &dyn Examples {
        match self {
            Self::Ratings(ratings) => ratings,
            Self::Clicks(clicks) => clicks,
        }
    }

    /// A hash of all examples, so that results for a data set are not taken for those of another at the same path.
    pub fn fingerprint(&self) -> u64 {
        match self {
            Self::Ratings(ratings) => {
                let mut hasher = XxHash64::with_seed(0);
                (&ratings.catalog, &ratings.rows).hash(&mut hasher);
                hasher.finish()
            }
            Self::Clicks(clicks) => clicks.fingerprint(),
        }
    }

    /// The true probabilities of the test part, if they are known.
    pub fn truth(&self) -> Option<Truth> {
        match self {
            Self::Ratings(ratings) => ratings.truth(Part::Test),
            Self::Clicks(_) => None,
        }
    }
}
