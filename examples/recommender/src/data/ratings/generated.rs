//! Click data with a planted structure, for a program that runs without a download.
//!
//! ```text
//! logit(user, movie) = base + bias(user) + bias(movie) + taste(user) . style(movie)
//!
//! taste(user)  = taste of the gender + of the age group + of the occupation + a little of its own
//! style(movie) = mean style of the genres + style of each title word + a little of its own
//! ```
//!
//! Most of the structure is in features that many rows share, the rest in the ids. As in real data, this is what leaves room for
//! hashing. A label is drawn with probability `sigmoid(logit)`. The generator knows that probability, so it also knows the best
//! AUC that any model can reach on these labels.

use std::collections::HashSet;

use anyhow::Result;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use rand_distr::{Bernoulli, Distribution, StandardNormal, Zipf};

use super::{
    seen, title_words, Catalog, Entities, Feature, Rating, Ratings, Source, Split, MIN_WORD_COUNT,
};

const USERS: usize = 2_000;
const MOVIES: usize = 1_200;
const RATINGS: usize = 300_000;
const FACTORS: usize = 4;

/// How unevenly movies are watched: the exponent of a Zipf law over them.
const POPULARITY: f64 = 0.6;
/// How much of a taste or style belongs to the single user or movie.
const OWN: f64 = 0.05;
const USER_BIAS: f64 = 0.1;
const MOVIE_BIAS: f64 = 0.2;
const BASE: f64 = 0.3;

const GENDERS: [&str; 2] = ["F", "M"];
const AGES: [&str; 6] = ["18", "25", "35", "45", "55", "65"];
const OCCUPATIONS: [&str; 12] = [
    "artist",
    "baker",
    "clerk",
    "driver",
    "farmer",
    "lawyer",
    "nurse",
    "pilot",
    "sailor",
    "scientist",
    "student",
    "teacher",
];
const GENRES: [&str; 12] = [
    "Action",
    "Animation",
    "Comedy",
    "Crime",
    "Drama",
    "Fantasy",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Western",
];
const ADJECTIVES: [&str; 40] = [
    "Amber",
    "Ancient",
    "Bitter",
    "Blue",
    "Bold",
    "Broken",
    "Burning",
    "Crimson",
    "Distant",
    "Electric",
    "Empty",
    "Endless",
    "Fallen",
    "Final",
    "Forgotten",
    "Frozen",
    "Gentle",
    "Golden",
    "Hidden",
    "Hollow",
    "Invisible",
    "Iron",
    "Last",
    "Little",
    "Lonely",
    "Lost",
    "Midnight",
    "Paper",
    "Perfect",
    "Quiet",
    "Restless",
    "Sacred",
    "Scarlet",
    "Secret",
    "Silent",
    "Silver",
    "Sleeping",
    "Stolen",
    "Velvet",
    "Wild",
];
const NOUNS: [&str; 40] = [
    "Affair",
    "Bridge",
    "Captain",
    "Carnival",
    "City",
    "Dancer",
    "Detective",
    "Dream",
    "Empire",
    "Engine",
    "Express",
    "Forest",
    "Garden",
    "Ghost",
    "Harbour",
    "Highway",
    "Horizon",
    "Island",
    "Journey",
    "Kingdom",
    "Letter",
    "Lighthouse",
    "Machine",
    "Mirror",
    "Mountain",
    "Night",
    "Ocean",
    "Orchestra",
    "Planet",
    "Promise",
    "River",
    "Shadow",
    "Song",
    "Station",
    "Stranger",
    "Summer",
    "Tower",
    "Train",
    "Voyage",
    "Winter",
];

type Factors = [f64; FACTORS];

/// The data set of `seed`.
pub fn generate(seed: u64) -> Result<Ratings> {
    let mut rng = StdRng::seed_from_u64(seed);
    let titles = draw_titles(&mut rng);
    let (movies, styles) = draw_movies(&titles, &mut rng);
    let (users, tastes) = draw_users(&mut rng);
    let user_bias = normals(USERS, USER_BIAS, &mut rng);
    let movie_bias = normals(MOVIES, MOVIE_BIAS, &mut rng);

    let popularity = Zipf::new(MOVIES as f64, POPULARITY)?;
    let mut rated = HashSet::with_capacity(RATINGS);
    let mut ratings = Vec::with_capacity(RATINGS);
    let mut probabilities = Vec::with_capacity(RATINGS);
    while ratings.len() < RATINGS {
        let (user, movie) = (
            rng.random_range(0..USERS),
            popularity.sample(&mut rng) as usize - 1,
        );
        if !rated.insert((user, movie)) {
            continue;
        }
        let logit = BASE + user_bias[user] + movie_bias[movie] + dot(&tastes[user], &styles[movie]);
        let probability = 1.0 / (1.0 + (-logit).exp());
        ratings.push(Rating {
            user: user as u32,
            movie: movie as u32,
            liked: Bernoulli::new(probability)?.sample(&mut rng),
        });
        probabilities.push(probability);
    }
    let seen = seen(USERS, &ratings);
    Ok(Ratings {
        source: Source::Generated { seed },
        catalog: Catalog {
            users,
            movies,
            seen,
        },
        rows: ratings,
        split: Split::Hash,
        probabilities: Some(probabilities),
        popularity: None,
        left_out: Vec::new(),
    })
}

/// The titles alone; they are the first thing the generator draws.
pub fn titles(seed: u64) -> Vec<String> {
    draw_titles(&mut StdRng::seed_from_u64(seed))
}

fn draw_titles(rng: &mut StdRng) -> Vec<String> {
    let mut names: Vec<_> = ADJECTIVES
        .iter()
        .flat_map(|a| NOUNS.iter().map(move |n| format!("The {a} {n}")))
        .collect();
    names.shuffle(rng);
    names.truncate(MOVIES);
    names
        .into_iter()
        .map(|name| format!("{name} ({})", rng.random_range(1960..2020)))
        .collect()
}

fn draw_movies(titles: &[String], rng: &mut StdRng) -> (Entities, Vec<Factors>) {
    let genres: Vec<Vec<&str>> = titles
        .iter()
        .map(|_| {
            let count = rng.random_range(1..=3);
            GENRES.sample(rng, count).copied().collect()
        })
        .collect();
    let words: Vec<_> = titles.iter().map(|title| title_words(title)).collect();
    let features = vec![
        Feature::new("genres", &genres, 1),
        Feature::new("words", &words, MIN_WORD_COUNT),
    ];

    // Only the words that the generator put there carry style; "the" and the years are noise, as they would be.
    let genre_styles = Effects::draw(&GENRES, 1.0, rng);
    let word_styles = Effects::draw(&[ADJECTIVES, NOUNS].concat(), 0.25, rng);
    let styles = titles.iter().zip(&genres).map(|(title, genres)| {
        let mut style = own(rng);
        genres
            .iter()
            .for_each(|genre| genre_styles.add(genre, 1.0 / genres.len() as f64, &mut style));
        title
            .split(' ')
            .for_each(|word| word_styles.add(word, 1.0, &mut style));
        style
    });
    let styles = styles.collect();
    (
        Entities {
            ids: (1..=MOVIES as i64).collect(),
            features,
        },
        styles,
    )
}

fn draw_users(rng: &mut StdRng) -> (Entities, Vec<Factors>) {
    let names = ["gender", "age", "occupation"];
    let choices: [&[&str]; 3] = [&GENDERS, &AGES, &OCCUPATIONS];
    let effects: Vec<_> = choices
        .iter()
        .map(|choices| Effects::draw(choices, 0.6, rng))
        .collect();
    let mut columns = vec![Vec::with_capacity(USERS); names.len()];
    let mut tastes = Vec::with_capacity(USERS);
    for _ in 0..USERS {
        let mut taste = own(rng);
        for ((choices, effects), column) in choices.iter().zip(&effects).zip(&mut columns) {
            let value = choices[rng.random_range(0..choices.len())];
            effects.add(value, 1.0, &mut taste);
            column.push(vec![value]);
        }
        tastes.push(taste);
    }
    let features = names
        .into_iter()
        .zip(&columns)
        .map(|(name, column)| Feature::new(name, column, 1))
        .collect();
    (
        Entities {
            ids: (1..=USERS as i64).collect(),
            features,
        },
        tastes,
    )
}

/// What each value of a feature adds to a taste or a style.
struct Effects<'a>(Vec<(&'a str, Factors)>);

impl<'a> Effects<'a> {
    fn draw(values: &[&'a str], scale: f64, rng: &mut StdRng) -> Self {
        Self(
            values
                .iter()
                .map(|value| (*value, factors(scale, rng)))
                .collect(),
        )
    }

    fn add(&self, value: &str, weight: f64, sum: &mut Factors) {
        if let Some((_, effect)) = self.0.iter().find(|(name, _)| *name == value) {
            sum.iter_mut()
                .zip(effect)
                .for_each(|(sum, effect)| *sum += weight * effect);
        }
    }
}

fn factors(scale: f64, rng: &mut StdRng) -> Factors {
    std::array::from_fn(|_| scale * rng.sample::<f64, _>(StandardNormal))
}

fn own(rng: &mut StdRng) -> Factors {
    factors(OWN, rng)
}

fn normals(n: usize, scale: f64, rng: &mut StdRng) -> Vec<f64> {
    (0..n)
        .map(|_| scale * rng.sample::<f64, _>(StandardNormal))
        .collect()
}

fn dot(a: &Factors, b: &Factors) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_decides() -> Result<()> {
        let (one, again, other) = (generate(1)?, generate(1)?, generate(2)?);
        assert_eq!(one.rows, again.rows);
        assert_eq!(one.catalog, again.catalog);
        assert_eq!(titles(1), titles(1));
        assert_ne!(one.rows, other.rows);
        assert_ne!(titles(1), titles(2));
        Ok(())
    }

    #[test]
    fn labels_follow_their_probabilities() -> Result<()> {
        let data = generate(3)?;
        let liked = data.rows.iter().filter(|rating| rating.liked).count() as f64;
        let expected: f64 = data.probabilities.iter().flatten().sum();
        // Four standard deviations of a sum of RATINGS labels with at most 1/4 variance each.
        assert!((liked - expected).abs() < 4.0 * (RATINGS as f64 / 4.0).sqrt());
        assert_eq!(titles(3).iter().collect::<HashSet<_>>().len(), MOVIES);
        Ok(())
    }
}
