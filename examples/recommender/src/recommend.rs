//! The movies a user has not seen and will like best.

use anyhow::{ensure, Result};
use serde::Serialize;

use crate::candidates::Candidates;
use crate::evaluate::sigmoid;
use crate::profiles::Profile;
use crate::saved::Recommender;

/// A movie row, and the probability that the user likes it.
pub struct Recommendation {
    /// Row of the movie in the catalog.
    pub movie: u32,
    /// The probability that the user likes it.
    pub probability: f64,
}

/// What the answer to a question about a user and a movie rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    /// The model has learnt from ratings of both.
    Known,
    /// At least one of them has no row of its own, and is known by its features alone.
    Features,
    /// Nothing is known of one of them: what people in general think of the movie.
    Popularity,
}

impl Basis {
    /// Of a pair whose sides are known as `self` and `other` tell.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Known, Self::Known) => Self::Known,
            (Self::Popularity, _) | (_, Self::Popularity) => Self::Popularity,
            _ => Self::Features,
        }
    }
}

/// The `count` best of all movies that `user` has not rated, best first; for a user whom the catalogue does not have, what is liked by
/// most.
///
/// # Errors
/// What the device says, a model that scores a movie as NaN, or a checkpoint that does not know what is popular.
pub fn recommend(
    recommender: &Recommender,
    user: Option<u32>,
    count: usize,
) -> Result<Vec<Recommendation>> {
    let (model, catalog) = (&recommender.model, &recommender.catalog);
    let movies = catalog.movies.ids.len();
    let Some(user) = user else {
        let popularity = recommender.popularity()?;
        let best = top(&popularity.likes(), &vec![true; movies], count)?;
        let recommendation = |(movie, _)| Recommendation {
            movie,
            probability: popularity.probability(Some(movie)),
        };
        return Ok(best.into_iter().map(recommendation).collect());
    };
    let candidates = Candidates::new(model, catalog)?;
    let logits = candidates.logits(model, catalog, &Profile::Row(user), 0..movies)?;
    let open = all_but(catalog.seen.bag(user as usize), movies);
    let recommendation = |(movie, logit): (u32, f32)| Recommendation {
        movie,
        probability: sigmoid(logit.into()),
    };
    let best = top(&logits, &open, count)?;
    Ok(best.into_iter().map(recommendation).collect())
}

/// The `count` items with the highest scores of those that are `open`, best first, with their scores; of equal ones, the lower row
/// comes first.
///
/// # Errors
/// A score that is NaN.
pub fn top(scores: &[f32], open: &[bool], count: usize) -> Result<Vec<(u32, f32)>> {
    ensure!(
        scores.iter().all(|score| !score.is_nan()),
        "the model scores a movie as NaN: training has diverged"
    );
    let items = (0u32..).zip(scores).zip(open);
    let mut ranked: Vec<_> = items
        .filter_map(|((item, &score), &open)| open.then_some((item, score)))
        .collect();
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if count < ranked.len() {
        ranked.select_nth_unstable_by(count, order);
        ranked.truncate(count);
    }
    ranked.sort_unstable_by(order);
    Ok(ranked)
}

/// Which of so many items are open: all but the excluded ones.
pub fn all_but(excluded: &[u32], items: usize) -> Vec<bool> {
    let mut open = vec![true; items];
    for &item in excluded {
        open[item as usize] = false;
    }
    open
}
