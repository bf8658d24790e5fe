//! What models of ratings answer: lists of movies, and scores of pairs.

use std::collections::HashSet;
use std::sync::Arc;

use axum::extract::State;
use axum::Json;
use serde::{Deserialize, Serialize};

use super::features::{Asked, Features};
use super::id::Id;
use super::{at_most, in_range, internal, Answer, App};
use crate::batcher::Work;
use crate::error::ApiError;
use crate::input::{Input, Object};
use crate::serving::{Kind, Model, Ratings};
use recommender::evaluate::sigmoid;
use recommender::profiles::{batch, Profile, Side};
use recommender::recommend::{all_but, top, Basis};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recommend {
    /// Published id of the user; nobody in particular without it.
    user: Option<Id>,
    /// Of the user, instead of those that the catalogue has.
    features: Option<Features>,
    /// How many movies.
    #[serde(default = "ten")]
    k: usize,
    /// Movies that are not wanted.
    #[serde(default)]
    exclude: Vec<Id>,
    /// The only movies that are wanted; all without it.
    candidates: Option<Vec<Id>>,
    /// Only movies of at least one of these genres; of any without it.
    genres: Option<Vec<String>>,
    /// Movies that the catalogue does not have, ranked among those it has.
    #[serde(default)]
    items: Vec<Object<Item>>,
    /// Say what speaks for each movie.
    #[serde(default)]
    explain: bool,
}

fn ten() -> usize {
    10
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Item {
    movie: Id,
    features: Features,
}

#[derive(Serialize)]
pub struct Recommended {
    user: Option<Id>,
    basis: Basis,
    movies: Vec<Movie>,
    /// Candidates of which nothing is known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unknown: Vec<Id>,
}

#[derive(Serialize)]
struct Movie {
    movie: Id,
    /// That the user likes it.
    probability: f32,
    basis: Basis,
    #[serde(skip_serializing_if = "Option::is_none")]
    title: Option<String>,
    genres: String,
    /// In the train part.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratings: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<Vec<Reason>>,
}

/// What a feature does to the answer.
#[derive(Serialize)]
struct Reason {
    /// The table: the user, the movie, or a feature of either.
    feature: &'static str,
    /// Of a feature.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    /// By how much the logit is larger than it were if nothing were known of this feature.
    logit: f32,
}

/// A movie on its way into the list.
struct Ranked<'a> {
    score: f32,
    probability: f32,
    place: Place<'a>,
}

enum Place<'a> {
    Row(u32),
    Item(&'a Item, Asked),
}

/// The `k` movies which the user has not rated and will like best, best first.
pub async fn recommend(
    State(app): State<Arc<App>>,
    Input(input, _in_flight): Input<Recommend>,
) -> Answer<Recommended> {
    let model = app.serving.model();
    let ratings = of_ratings(&model)?;
    let catalog = ratings.catalog();
    in_range("k", input.k, 1, catalog.movies.ids.len())?;
    let user = input.user.as_ref();
    let features = || "features".to_owned();
    let user = Asked::new(ratings, Side::User, user, input.features.as_ref(), features)?;
    let (open, unknown) = open_movies(ratings, &user, &input)?;
    let items = new_items(&app, ratings, &input)?;

    let by_popularity = user.basis == Basis::Popularity;
    let (scores, of_items) = if by_popularity {
        // Nobody has liked what is new.
        (popularity(ratings)?.likes(), vec![0.0; items.len()])
    } else {
        let scores = score_all(&app, &model, &user.profile).await?;
        let pairs = items.iter().map(|(_, item)| (&user.profile, &item.profile));
        (scores, score_pairs(&app, &model, ratings, pairs).await?)
    };
    let best = top(&scores, &open, input.k).map_err(internal)?;
    let probability = |row: Option<u32>, score: f32| -> Result<f32, ApiError> {
        Ok(if by_popularity {
            popularity(ratings)?.probability(row) as f32
        } else {
            sigmoid(score.into()) as f32
        })
    };
    let mut ranked = Vec::new();
    for (row, score) in best {
        ranked.push(Ranked {
            score,
            probability: probability(Some(row), score)?,
            place: Place::Row(row),
        });
    }
    for ((item, asked), score) in items.into_iter().zip(of_items) {
        ranked.push(Ranked {
            score,
            probability: probability(None, score)?,
            place: Place::Item(item, asked),
        });
    }
    // The sort is stable: of equal ones, those of the catalogue come first.
    ranked.sort_by(|a, b| b.score.total_cmp(&a.score));
    ranked.truncate(input.k);

    let reasons = if input.explain && !by_popularity {
        let reasons = explain(&app, &model, ratings, &user.profile, &ranked).await?;
        reasons.into_iter().map(Some).collect()
    } else {
        vec![]
    };
    let mut reasons = reasons.into_iter();
    let movies = ranked
        .iter()
        .map(|movie| describe(ratings, user.basis, movie, reasons.next().flatten()));
    Ok(Json(Recommended {
        movies: movies.collect(),
        basis: user.basis,
        user: input.user,
        unknown,
    }))
}

/// Which movies of the catalogue may be in the list, and the candidates that are not in the catalogue.
fn open_movies(
    ratings: &Ratings,
    user: &Asked,
    input: &Recommend,
) -> Result<(Vec<bool>, Vec<Id>), ApiError> {
    let catalog = ratings.catalog();
    let seen = user.row.map(|row| catalog.seen.bag(row as usize));
    let mut open = all_but(seen.unwrap_or_default(), catalog.movies.ids.len());
    let row = |id: &Id| catalog.movies.row(id.number()?);
    let mut unknown = Vec::new();
    if let Some(candidates) = &input.candidates {
        let mut wanted = HashSet::new();
        for id in candidates {
            match row(id) {
                Some(row) => _ = wanted.insert(row),
                None => unknown.push(id.clone()),
            }
        }
        let rows = (0u32..).zip(&mut open);
        rows.for_each(|(row, open)| *open &= wanted.contains(&row));
    }
    for row in input.exclude.iter().filter_map(row) {
        open[row as usize] = false;
    }
    if let Some(genres) = &input.genres {
        let mut features = catalog.movies.features.iter();
        let feature = features.find(|feature| feature.name == "genres");
        let Some(feature) = feature else {
            let error = "the movies of this model have no genres";
            return Err(ApiError::field("genres", error));
        };
        let mut wanted = HashSet::new();
        for (i, genre) in genres.iter().enumerate() {
            let Ok(value) = feature.vocabulary.binary_search(genre) else {
                let known = feature.vocabulary.join(", ");
                let error = format!("no genre {genre}, only {known}");
                return Err(ApiError::field(format!("genres[{i}]"), error));
            };
            wanted.insert(value as u32);
        }
        for (row, open) in open.iter_mut().enumerate() {
            let mut own = feature.bags.bag(row).iter();
            *open &= own.any(|genre| wanted.contains(genre));
        }
    }
    Ok((open, unknown))
}

/// The movies that come with the request, if they are wanted.
fn new_items<'a>(
    app: &App,
    ratings: &Ratings,
    input: &'a Recommend,
) -> Result<Vec<(&'a Item, Asked)>, ApiError> {
    at_most("items", input.items.len(), app.batcher.max_rows())?;
    let mut items = Vec::new();
    for (i, Object(item)) in input.items.iter().enumerate() {
        let features = || format!("items[{i}].features");
        if item.features.is_empty() {
            let error = "must tell something of the movie";
            return Err(ApiError::field(features(), error));
        }
        let (id, given) = (Some(&item.movie), Some(&item.features));
        let asked = Asked::new(ratings, Side::Movie, id, given, features)?;
        if asked.row.is_some() {
            let error = format!("the catalogue has movie {} already", item.movie);
            return Err(ApiError::field(format!("items[{i}].movie"), error));
        }
        let own = item.features.values("genres");
        let is_wanted = |wanted: &Vec<String>| wanted.iter().any(|genre| own.contains(genre));
        let is_excluded = input.exclude.contains(&item.movie);
        if !is_excluded && input.genres.as_ref().is_none_or(is_wanted) {
            items.push((item, asked));
        }
    }
    Ok(items)
}

/// The logits of a user with all movies of the catalogue.
async fn score_all(app: &App, model: &Arc<Model>, user: &Profile) -> Result<Vec<f32>, ApiError> {
    let count = of_ratings(model)?.catalog().movies.ids.len();
    let mut logits = Vec::with_capacity(count);
    // One part after the other, so that a long list leaves room in the queue and in the batches for others.
    let most = app.batcher.max_rows();
    for start in (0..count).step_by(most) {
        let part = Work::Candidates {
            user: user.clone(),
            movies: start..count.min(start + most),
        };
        logits.extend(app.batcher.compute(model, part).await?);
    }
    Ok(logits)
}

/// The logits of pairs, however many.
async fn score_pairs<'a>(
    app: &App,
    model: &Arc<Model>,
    ratings: &Ratings,
    pairs: impl Iterator<Item = (&'a Profile, &'a Profile)>,
) -> Result<Vec<f32>, ApiError> {
    let pairs: Vec<_> = pairs.collect();
    let mut logits = Vec::with_capacity(pairs.len());
    for part in pairs.chunks(app.batcher.max_rows()) {
        let part = Work::Examples {
            batch: batch(ratings.catalog(), part.iter().copied()),
            count: part.len(),
        };
        logits.extend(app.batcher.compute(model, part).await?);
    }
    Ok(logits)
}

/// For each movie, what each feature does to its logit: the difference to the logit without it, the greatest first.
async fn explain(
    app: &App,
    model: &Arc<Model>,
    ratings: &Ratings,
    user: &Profile,
    ranked: &[Ranked<'_>],
) -> Result<Vec<Vec<Reason>>, ApiError> {
    let catalog = ratings.catalog();
    let tables = |side: Side| {
        let features = side.of(catalog).features.iter().map(|f| f.name);
        [side.name()].into_iter().chain(features).enumerate()
    };
    let users: Vec<_> = tables(Side::User)
        .map(|(table, _)| user.without(catalog, Side::User, table))
        .collect();
    let movies: Vec<_> = ranked.iter().map(|movie| movie.place.profile()).collect();
    let without: Vec<Vec<_>> = movies
        .iter()
        .map(|movie| {
            let tables = tables(Side::Movie);
            let without = tables.map(|(table, _)| movie.without(catalog, Side::Movie, table));
            without.collect()
        })
        .collect();
    let mut pairs = Vec::new();
    for (movie, without) in movies.iter().zip(&without) {
        pairs.extend(users.iter().map(|user| (user, movie)));
        pairs.extend(without.iter().map(|movie| (user, movie)));
    }
    let logits = score_pairs(app, model, ratings, pairs.into_iter()).await?;
    let per_movie = users.len() + without.first().map_or(0, Vec::len);
    let names = || {
        tables(Side::User)
            .map(|t| (Side::User, t))
            .chain(tables(Side::Movie).map(|t| (Side::Movie, t)))
    };
    let reasons = ranked
        .iter()
        .zip(&movies)
        .zip(logits.chunks(per_movie.max(1)));
    Ok(reasons
        .map(|((ranked, movie), logits)| {
            let reasons = names().zip(logits);
            let reasons = reasons.map(|((side, (table, feature)), without)| Reason {
                feature,
                value: table.checked_sub(1).map(|feature| match side {
                    Side::User => user.describe(catalog, side, feature),
                    Side::Movie => movie.describe(catalog, side, feature),
                }),
                logit: ranked.score - without,
            });
            let mut reasons: Vec<_> = reasons.collect();
            reasons.sort_by(|a, b| b.logit.total_cmp(&a.logit));
            reasons
        })
        .collect())
}

impl Place<'_> {
    fn profile(&self) -> Profile {
        match self {
            Self::Row(row) => Profile::Row(*row),
            Self::Item(_, asked) => asked.profile.clone(),
        }
    }
}

fn describe(ratings: &Ratings, user: Basis, ranked: &Ranked, why: Option<Vec<Reason>>) -> Movie {
    let catalog = ratings.catalog();
    let (movie, basis, title, genres, row) = match &ranked.place {
        Place::Row(row) => {
            let id = catalog.movies.ids[*row as usize];
            let basis = if ratings.is_rare(Side::Movie, *row) {
                Basis::Features
            } else {
                Basis::Known
            };
            let title = ratings.title(id).map(str::to_owned);
            let genres = catalog.movies.describe("genres", *row);
            (Id::Number(id), basis, title, genres, Some(*row))
        }
        Place::Item(item, asked) => {
            let title = item.features.values("title").pop();
            let genres = item.features.values("genres").join(", ");
            (item.movie.clone(), asked.basis, title, genres, None)
        }
    };
    let popularity = ratings.recommender.popularity().ok();
    Movie {
        movie,
        probability: ranked.probability,
        basis: basis.and(user),
        title,
        genres,
        ratings: row.and_then(|row| Some(popularity?.examples(row))),
        why,
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Score {
    pairs: Vec<Object<Pair>>,
}

/// Published ids, and features instead of those that the catalogue has.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    user: Id,
    movie: Id,
    user_features: Option<Features>,
    movie_features: Option<Features>,
}

#[derive(Serialize)]
pub struct Scored {
    /// Per pair, that the user likes the movie.
    probabilities: Vec<f32>,
    /// Per pair, what that rests on.
    basis: Vec<Basis>,
}

/// The probability of each pair.
pub async fn score(
    State(app): State<Arc<App>>,
    Input(input, _in_flight): Input<Score>,
) -> Answer<Scored> {
    let model = app.serving.model();
    let ratings = of_ratings(&model)?;
    at_most("pairs", input.pairs.len(), app.batcher.max_rows())?;
    let mut pairs = Vec::with_capacity(input.pairs.len());
    for (i, Object(pair)) in input.pairs.iter().enumerate() {
        let of_user = || format!("pairs[{i}].user_features");
        let of_movie = || format!("pairs[{i}].movie_features");
        let features = pair.user_features.as_ref();
        let user = Asked::new(ratings, Side::User, Some(&pair.user), features, of_user)?;
        let features = pair.movie_features.as_ref();
        let movie = Asked::new(ratings, Side::Movie, Some(&pair.movie), features, of_movie)?;
        pairs.push((user, movie));
    }
    let basis: Vec<_> = pairs
        .iter()
        .map(|(user, movie)| user.basis.and(movie.basis))
        .collect();
    let for_model = pairs.iter().zip(&basis);
    let for_model = for_model
        .filter(|(_, basis)| **basis != Basis::Popularity)
        .map(|((user, movie), _)| (&user.profile, &movie.profile));
    let logits = score_pairs(&app, &model, ratings, for_model).await?;
    let mut logits = logits.into_iter();
    let mut probabilities = Vec::with_capacity(pairs.len());
    for ((_, movie), basis) in pairs.iter().zip(&basis) {
        let of_model = match basis {
            Basis::Popularity => None,
            Basis::Known | Basis::Features => logits.next(),
        };
        probabilities.push(match of_model {
            Some(logit) => sigmoid(logit.into()) as f32,
            None => popularity(ratings)?.probability(movie.row) as f32,
        });
    }
    Ok(Json(Scored {
        probabilities,
        basis,
    }))
}

fn of_ratings(model: &Model) -> Result<&Ratings, ApiError> {
    match &model.kind {
        Kind::Ratings(ratings) => Ok(ratings),
        Kind::Clicks(_) => Err(ApiError::other_kind("clicks", "/predict")),
    }
}

/// What is popular; of a checkpoint that does not tell, nothing can be said of those it does not know.
fn popularity(ratings: &Ratings) -> Result<&recommender::popularity::Popularity, ApiError> {
    let popularity = ratings.recommender.popularity();
    popularity.map_err(|error| {
        let error = format!("nothing is known of this user or movie, and {error:#}");
        ApiError::new(axum::http::StatusCode::UNPROCESSABLE_ENTITY, error)
    })
}
