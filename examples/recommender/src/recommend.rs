//! The movies a user has not seen and will like best.

use anyhow::{ensure, Context, Result};

use crate::candidates::Candidates;
use crate::data::Catalog;
use crate::evaluate::sigmoid;
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
///
/// # Errors
/// What the device says, or a model that scores a movie as NaN.
pub fn recommend(
    recommender: &Recommender,
    user: u32,
    count: usize,
) -> Result<Vec<Recommendation>> {
    let (model, catalog) = (&recommender.model, &recommender.catalog);
    let candidates = Candidates::new(model, catalog)?;
    let logits = candidates.logits(model, catalog, user, 0..catalog.movies.ids.len())?;
    best(catalog, user, &logits, count)
}

/// The `count` best of the movies that `user` has not rated, best first, given the logits of all movies.
///
/// # Errors
/// A logit that is NaN.
pub fn best(
    catalog: &Catalog,
    user: u32,
    logits: &[f32],
    count: usize,
) -> Result<Vec<Recommendation>> {
    let best = top(logits, catalog.seen.bag(user as usize), count)?;
    let recommendation = |(movie, logit): (u32, f32)| Recommendation {
        movie,
        probability: sigmoid(logit.into()),
    };
    Ok(best.into_iter().map(recommendation).collect())
}

/// The `count` items with the highest scores but for those `excluded`, best first, with their scores; of equal ones, the lower row
/// comes first.
///
/// # Errors
/// A score that is NaN.
pub fn top(scores: &[f32], excluded: &[u32], count: usize) -> Result<Vec<(u32, f32)>> {
    ensure!(
        scores.iter().all(|score| !score.is_nan()),
        "the model scores a movie as NaN: training has diverged"
    );
    let mut open = vec![true; scores.len()];
    for &item in excluded {
        open[item as usize] = false;
    }
    let items = (0u32..).zip(scores).zip(open);
    let mut ranked: Vec<_> = items
        .filter_map(|((item, &score), open)| open.then_some((item, score)))
        .collect();
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if count < ranked.len() {
        ranked.select_nth_unstable_by(count, order);
        ranked.truncate(count);
    }
    ranked.sort_unstable_by(order);
    Ok(ranked)
}
