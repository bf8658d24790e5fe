//! The movies a user has not seen and will like best.

use anyhow::{ensure, Context, Result};

use crate::data::Catalog;
use crate::evaluate::{logits, sigmoid};
use crate::saved::Recommender;

/// A movie row, and the probability that the user likes it.
pub struct Recommendation {
    /// Row of the movie in the catalog.
    pub movie: u32,
    /// The probability that the user likes it.
    pub probability: f64,
}

/// The row of a published user id.
pub fn user_row(recommender: &Recommender, id: i64) -> Result<u32> {
    let users = &recommender.catalog.users;
    users.row(id).with_context(|| users.unknown("user", id))
}

/// The `count` best of all movies that `user` has not rated, best first.
pub fn recommend(
    recommender: &Recommender,
    user: u32,
    count: usize,
) -> Result<Vec<Recommendation>> {
    let catalog = &recommender.catalog;
    let pairs = unseen(catalog, user);
    let logits = logits(&recommender.model, catalog, &pairs)?;
    best(&pairs, logits, count)
}

/// `user` paired with every movie that `user` has not rated.
pub fn unseen(catalog: &Catalog, user: u32) -> Vec<(u32, u32)> {
    let mut unseen = vec![true; catalog.movies.ids.len()];
    catalog
        .seen
        .bag(user as usize)
        .iter()
        .for_each(|&movie| unseen[movie as usize] = false);
    (0u32..)
        .zip(unseen)
        .filter(|(_, unseen)| *unseen)
        .map(|(movie, _)| (user, movie))
        .collect()
}

/// The `count` best of the movies in `pairs`, best first.
pub fn best(pairs: &[(u32, u32)], logits: Vec<f64>, count: usize) -> Result<Vec<Recommendation>> {
    ensure!(
        logits.iter().all(|logit| !logit.is_nan()),
        "the model scores a movie as NaN: training has diverged"
    );
    let mut ranked: Vec<_> = pairs
        .iter()
        .zip(logits)
        .map(|(&(_, movie), logit)| Recommendation {
            movie,
            probability: sigmoid(logit),
        })
        .collect();
    ranked.sort_by(|a, b| b.probability.total_cmp(&a.probability));
    ranked.truncate(count);
    Ok(ranked)
}
