//! Users and movies as a model reads them, whether the catalogue has them or not.
//!
//! | | its id | its features |
//! |---|---|---|
//! | in the catalogue | its row | those of the catalogue, or given ones |
//! | not there | the row that rare ids share; without one, an empty bag, which pools to zeros | given ones |

use std::collections::BTreeMap;
use std::fmt;

use crate::data::{feature_values, Bags, Batch, Catalog, Entities, Rows};
use crate::model::Dlrm;

/// What a feature may be called in a request besides its name, and its name.
const SYNONYMS: [(&str, &str); 1] = [("title", "words")];

/// More values than this are not listed when one is wrong.
const LISTED: usize = 40;

/// A user or a movie.
#[derive(Clone, Debug, PartialEq)]
pub enum Profile {
    /// The row of the catalogue, with its features.
    Row(u32),
    /// What to look up in each of the tables of its side: that of the ids, then those of the features.
    Bags(Vec<Vec<u32>>),
}

/// The users or the movies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who rates.
    User,
    /// What is rated.
    Movie,
}

/// Values of features by name. A title is a value of the feature `words`.
pub type Given = BTreeMap<String, Vec<String>>;

/// Why features are refused.
#[derive(Debug, PartialEq)]
pub struct WrongFeature {
    /// The name that was given.
    pub name: String,
    /// What is wrong with it.
    pub complaint: String,
}

impl fmt::Display for WrongFeature {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.complaint)
    }
}

impl Side {
    /// `user` or `movie`.
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Movie => "movie",
        }
    }

    /// All of them.
    pub fn of(self, catalog: &Catalog) -> &Entities {
        match self {
            Self::User => &catalog.users,
            Self::Movie => &catalog.movies,
        }
    }

    /// The position in the schema of the table of its ids, which those of its features follow.
    pub fn first_table(self, catalog: &Catalog) -> usize {
        match self {
            Self::User => 0,
            Self::Movie => 1 + catalog.users.features.len(),
        }
    }
}

impl Profile {
    /// A row of the catalogue, or `None` for what is not there; `given` features are taken instead of those of the catalogue.
    ///
    /// # Errors
    /// A feature that this side does not have, or a value that no row has.
    pub fn new(
        model: &Dlrm,
        catalog: &Catalog,
        side: Side,
        row: Option<u32>,
        given: &Given,
    ) -> Result<Self, WrongFeature> {
        if let (Some(row), true) = (row, given.is_empty()) {
            return Ok(Self::Row(row));
        }
        let entities = side.of(catalog);
        let mut given = rows_of(entities, side, given)?;
        let rare = model.embeddings().rare();
        let shared = || Some(rare.get(side.first_table(catalog))?.as_ref()?.shared());
        let mut bags = vec![row.or_else(shared).into_iter().collect()];
        for (i, feature) in entities.features.iter().enumerate() {
            let own = || row.map_or(Vec::new(), |row| feature.bags.bag(row as usize).to_vec());
            bags.push(given.remove(&i).unwrap_or_else(own));
        }
        Ok(Self::Bags(bags))
    }

    /// The same, in which table `table` of its side has nothing to look up.
    pub fn without(&self, catalog: &Catalog, side: Side, table: usize) -> Self {
        let mut bags = self.bags(catalog, side);
        bags[table].clear();
        Self::Bags(bags)
    }

    /// Its values of a feature, given by position, for people.
    pub fn describe(&self, catalog: &Catalog, side: Side, feature: usize) -> String {
        let vocabulary = &side.of(catalog).features[feature].vocabulary;
        let bag = &self.bags(catalog, side)[1 + feature];
        let values = bag.iter().map(|&row| vocabulary[row as usize].as_str());
        values.collect::<Vec<_>>().join(", ")
    }

    fn bags(&self, catalog: &Catalog, side: Side) -> Vec<Vec<u32>> {
        match self {
            Self::Bags(bags) => bags.clone(),
            Self::Row(row) => {
                let features = side.of(catalog).features.iter();
                let features = features.map(|feature| feature.bags.bag(*row as usize).to_vec());
                [vec![*row]].into_iter().chain(features).collect()
            }
        }
    }

    /// Adds a bag for each table of the side.
    fn push_to(&self, entities: &Entities, tables: &mut [Bags]) {
        match self {
            Self::Row(row) => {
                tables[0].push([*row]);
                for (feature, bags) in entities.features.iter().zip(&mut tables[1..]) {
                    bags.push(feature.bags.bag(*row as usize).iter().copied());
                }
            }
            Self::Bags(bags) => {
                for (bag, bags) in bags.iter().zip(tables) {
                    bags.push(bag.iter().copied());
                }
            }
        }
    }
}

/// What a model is asked about pairs of a user and a movie.
pub fn batch<'a>(
    catalog: &Catalog,
    pairs: impl IntoIterator<Item = (&'a Profile, &'a Profile)>,
) -> Batch {
    let movies = Side::Movie.first_table(catalog);
    let mut bags = vec![Bags::default(); movies + 1 + catalog.movies.features.len()];
    for (user, movie) in pairs {
        let (of_user, of_movie) = bags.split_at_mut(movies);
        user.push_to(&catalog.users, of_user);
        movie.push_to(&catalog.movies, of_movie);
    }
    Batch {
        numbers: Vec::new(),
        rows: Rows::Bags(bags),
    }
}

/// For each given feature, by its position among those of `entities`, the rows of its values.
fn rows_of(
    entities: &Entities,
    side: Side,
    given: &Given,
) -> Result<BTreeMap<usize, Vec<u32>>, WrongFeature> {
    let mut rows = BTreeMap::new();
    for (asked, texts) in given {
        let wrong = |complaint| WrongFeature {
            name: asked.clone(),
            complaint,
        };
        let mut synonyms = SYNONYMS.iter();
        let synonym = synonyms.find(|(synonym, _)| synonym == asked);
        let name = synonym.map_or(asked.as_str(), |&(_, name)| name);
        let mut features = entities.features.iter();
        let Some(position) = features.position(|feature| feature.name == name) else {
            // A title is welcome even if its words are no feature.
            if synonym.is_some() && side == Side::Movie {
                continue;
            }
            let names: Vec<_> = entities.features.iter().map(|f| f.name).collect();
            let known = match &names[..] {
                [] => "none".to_owned(),
                names => names.join(", "),
            };
            return Err(wrong(format!(
                "no such feature: a {} has {known}",
                side.name()
            )));
        };
        let feature = &entities.features[position];
        let mut bag = Vec::new();
        for value in texts.iter().flat_map(|text| feature_values(name, text)) {
            match feature.vocabulary.binary_search(&value) {
                Ok(row) => bag.push(row as u32),
                // Words that hardly any title has were left out of the training, too.
                Err(_) if name == "words" => {}
                Err(_) => {
                    let known = if feature.vocabulary.len() <= LISTED {
                        format!(", only {}", feature.vocabulary.join(", "))
                    } else {
                        format!(" among the {} known ones", feature.vocabulary.len())
                    };
                    return Err(wrong(format!("no value `{value}`{known}")));
                }
            }
        }
        rows.insert(position, bag);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Source;
    use crate::embeddings::EmbeddingConfig;
    use crate::init::seeded;
    use anyhow::Result;
    use candle_core::Device;
    use candle_hashed_embedding_bag::Hash;
    use candle_nn::VarMap;

    fn model() -> Result<(Catalog, Dlrm)> {
        let catalog = Source::Generated { seed: 0 }.load()?.catalog;
        let embeddings = EmbeddingConfig {
            embedding_dim: 8,
            inner_dim: None,
            compression: 0.25,
            hash: Hash::default_for(8),
        };
        let vb = seeded(&VarMap::new(), 1, &Device::Cpu);
        let model = Dlrm::new(&catalog.schema(), &embeddings.into(), vb)?;
        Ok((catalog, model))
    }

    fn given(features: &[(&str, &[&str])]) -> Given {
        let texts = |values: &[&str]| values.iter().map(|&value| value.to_owned()).collect();
        let features = features.iter();
        features
            .map(|&(name, values)| (name.to_owned(), texts(values)))
            .collect()
    }

    #[test]
    fn rows_are_asked_for_as_in_training() -> Result<()> {
        let (catalog, model) = model()?;
        let of =
            |side, row| Profile::new(&model, &catalog, side, Some(row), &Given::new()).unwrap();
        let profiles =
            [(3, 7), (0, 1199)].map(|(user, movie)| (of(Side::User, user), of(Side::Movie, movie)));
        let pairs = profiles.iter().map(|(user, movie)| (user, movie));
        assert_eq!(batch(&catalog, pairs), catalog.batch(&[(3, 7), (0, 1199)]));
        Ok(())
    }

    #[test]
    fn the_unknown_have_the_features_that_are_given() -> Result<()> {
        let (catalog, model) = model()?;
        let feature = |name| {
            catalog
                .movies
                .features
                .iter()
                .find(|f| f.name == name)
                .unwrap()
        };
        let row = |name, value: &str| {
            let vocabulary = &feature(name).vocabulary;
            vocabulary.binary_search(&value.to_owned()).unwrap() as u32
        };
        let asked = given(&[
            ("genres", &["Drama", "War"][..1]),
            ("title", &["The Amber Unheard-of (1999)"]),
        ]);
        let new = |row| Profile::new(&model, &catalog, Side::Movie, row, &asked);
        let words = ["1999", "amber", "the"]
            .map(|word| row("words", word))
            .to_vec();
        let features = [vec![row("genres", "Drama")], words];
        let expected = |id: Vec<u32>| Ok(Profile::Bags([&[id][..], &features].concat()));
        assert_eq!(new(None), expected(vec![]));
        assert_eq!(new(Some(5)), expected(vec![5]));

        let mut counts = vec![Vec::new(); catalog.schema().tables.len()];
        counts[4] = vec![9; catalog.movies.ids.len()];
        counts[4][17] = 0;
        let sharing = model.clone().sharing_rare_rows(&counts, 1);
        let shared = Profile::new(&sharing, &catalog, Side::Movie, None, &asked);
        assert_eq!(shared, expected(vec![17]));
        Ok(())
    }

    #[test]
    fn what_is_not_given_is_that_of_the_catalogue() -> Result<()> {
        let (catalog, model) = model()?;
        let asked = given(&[("genres", &["Drama"])]);
        let profile = Profile::new(&model, &catalog, Side::Movie, Some(5), &asked);
        let Ok(Profile::Bags(bags)) = &profile else {
            panic!("{profile:?}")
        };
        let features = &catalog.movies.features;
        assert_eq!(bags[0], [5]);
        assert_eq!(bags[2], features[1].bags.bag(5));
        assert_eq!(
            Profile::Row(5).describe(&catalog, Side::Movie, 0),
            catalog.movies.describe("genres", 5)
        );
        // Without its id, and nothing else.
        let without = Profile::Row(5).without(&catalog, Side::Movie, 0);
        let bag = |i: usize| features[i].bags.bag(5).to_vec();
        assert_eq!(without, Profile::Bags(vec![vec![], bag(0), bag(1)]));
        Ok(())
    }

    #[test]
    fn wrong_features_say_what_there_is() -> Result<()> {
        let (catalog, model) = model()?;
        for (side, asked, said) in [
            (
                Side::User,
                given(&[("genres", &["Drama"])]),
                "genres: no such feature: a user has gender, age, occupation",
            ),
            (
                Side::User,
                given(&[("title", &["x"])]),
                "title: no such feature",
            ),
            (
                Side::User,
                given(&[("gender", &["X"])]),
                "gender: no value `X`, only F, M",
            ),
            (
                Side::Movie,
                given(&[("genres", &["Drama", "drama"])]),
                "genres: no value `drama`, only Action",
            ),
        ] {
            let wrong = Profile::new(&model, &catalog, side, None, &asked).unwrap_err();
            assert!(wrong.to_string().starts_with(said), "{wrong}");
        }
        Ok(())
    }
}
