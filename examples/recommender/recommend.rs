//! The movies a user has not seen and will like best.

use anyhow::{ensure, Context, Result};
use candle_core::Device;

use crate::evaluate::{logits, sigmoid};
use crate::saved::Recommender;

/// A movie row, and the probability that the user likes it.
pub struct Recommendation {
    pub movie: u32,
    pub probability: f64,
}

/// The row of a published user id.
pub fn user_row(recommender: &Recommender, id: i64) -> Result<u32> {
    let ids = &recommender.catalog.users.ids;
    let (first, last) = (
        ids.first().copied().unwrap_or(0),
        ids.last().copied().unwrap_or(0),
    );
    recommender.catalog.users.row(id).with_context(|| {
        format!(
            "no user {id}: the model knows {} users, with ids from {first} to {last}",
            ids.len()
        )
    })
}

/// The `count` best of all movies that `user` has not rated, best first.
pub fn recommend(
    recommender: &Recommender,
    user: u32,
    count: usize,
    device: &Device,
) -> Result<Vec<Recommendation>> {
    let catalog = &recommender.catalog;
    let mut unseen = vec![true; catalog.movies.ids.len()];
    catalog
        .seen
        .bag(user as usize)
        .iter()
        .for_each(|&movie| unseen[movie as usize] = false);
    let pairs: Vec<_> = (0u32..)
        .zip(unseen)
        .filter(|(_, unseen)| *unseen)
        .map(|(movie, _)| (user, movie))
        .collect();

    let logits = logits(&recommender.model, catalog, &pairs, device)?;
    ensure!(
        logits.iter().all(|logit| !logit.is_nan()),
        "the model scores a movie as NaN: training has diverged"
    );
    let mut ranked: Vec<_> = pairs
        .into_iter()
        .zip(logits)
        .map(|((_, movie), logit)| Recommendation {
            movie,
            probability: sigmoid(logit),
        })
        .collect();
    ranked.sort_by(|a, b| b.probability.total_cmp(&a.probability));
    ranked.truncate(count);
    Ok(ranked)
}
