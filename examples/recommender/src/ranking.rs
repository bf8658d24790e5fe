//! How good top tens are, which AUC over ratings does not tell: it never sees the items that nobody rated.
//!
//! For each user who liked items of the part, all items are ranked but those that the user rated in the train part.
//!
//! | | |
//! |---|---|
//! | NDCG@10 | gains of the liked items among the ten, `1 / log2(1 + place)`, over those of the best order; the mean over users |
//! | recall@10 | the share of a user's liked items that are among the ten; the mean over users |
//! | coverage | how many items are in any top ten |
//! | rare | the share of places held by items with fewer than ten training examples |

use anyhow::Result;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash64;

use crate::candidates::Candidates;
use crate::data::{Part, Ratings};
use crate::model::Dlrm;
use crate::profiles::Profile;
use crate::recommend::{all_but, top};
use crate::saved::Recommender;

/// The places of a list.
pub const PLACES: usize = 10;

/// An item with fewer training examples is rare.
pub const RARE: u32 = 10;

/// The most pairs of a user and an item that are scored: if there are more, only every second user gets a list, or every third, …
const PAIRS: usize = 1 << 26;

/// How good the top tens of all users are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranking {
    /// Users who liked an item of the part, as far as they get lists.
    pub users: usize,
    /// See the [module](self).
    pub ndcg: f64,
    /// The share of the liked items that are in the lists.
    pub recall: f64,
    /// Distinct items in all lists.
    pub coverage: usize,
    /// Of so many items.
    pub items: usize,
    /// The share of places that rare items hold.
    pub rare: f64,
}

/// What is ranked for whom, and what counts as right.
pub struct Lists {
    /// For each user, the items that are not ranked: those of the train part.
    trained: Vec<Vec<u32>>,
    /// For each user, the liked items of the part, each once, but for those of the train part.
    liked: Vec<Vec<u32>>,
    /// The training examples of each item, and how many of those were liked.
    examples: Vec<[u32; 2]>,
}

impl Lists {
    /// The lists of a part of the ratings that a model was trained on.
    pub fn new(ratings: &Ratings, part: Part) -> Self {
        let mut trained = vec![Vec::new(); ratings.catalog.users.ids.len()];
        for rating in ratings.part(Part::Train) {
            trained[rating.user as usize].push(rating.movie);
        }
        Self::over(ratings, part, trained, ratings.examples_per_movie())
    }

    /// The lists of a part of other ratings, by the rows of the model's catalogue: movies that a user had rated before are not ranked.
    ///
    /// # Errors
    /// A checkpoint that does not know what is popular.
    pub fn of_others(ratings: &Ratings, part: Part, recommender: &Recommender) -> Result<Self> {
        let seen = &recommender.catalog.seen;
        let trained = (0..seen.len()).map(|user| seen.bag(user).to_vec());
        let examples = recommender.popularity()?.all_examples();
        Ok(Self::over(ratings, part, trained.collect(), examples))
    }

    fn over(
        ratings: &Ratings,
        part: Part,
        trained: Vec<Vec<u32>>,
        examples: Vec<[u32; 2]>,
    ) -> Self {
        let mut liked = vec![Vec::new(); trained.len()];
        for rating in ratings.part(part).iter().filter(|rating| rating.liked) {
            liked[rating.user as usize].push(rating.movie);
        }
        for (items, trained) in liked.iter_mut().zip(&trained) {
            items.sort_unstable();
            items.dedup();
            items.retain(|item| !trained.contains(item));
        }
        let asked = liked.iter_mut().filter(|items| !items.is_empty());
        let asked: Vec<_> = asked.collect();
        let step = (asked.len() * ratings.catalog.movies.ids.len()).div_ceil(PAIRS);
        for (i, items) in asked.into_iter().enumerate() {
            if i % step != 0 {
                items.clear();
            }
        }
        Self {
            trained,
            liked,
            examples,
        }
    }

    /// By how many of the train part a movie was liked.
    pub fn likes(&self, movie: u32) -> u32 {
        self.examples[movie as usize][1]
    }

    /// The lists that a model makes; `None` if no user liked what is left to be ranked.
    ///
    /// # Errors
    /// What the device says, or a model that scores an item as NaN.
    pub fn of_model(&self, model: &Dlrm, ratings: &Ratings) -> Result<Option<Ranking>> {
        let (catalog, items) = (&ratings.catalog, self.examples.len());
        let candidates = Candidates::new(model, catalog)?;
        self.rank(|user| candidates.logits(model, catalog, &Profile::Row(user), 0..items))
    }

    /// Of a model that recommends to everybody what most training examples liked.
    ///
    /// # Errors
    /// None.
    pub fn of_popularity(&self) -> Result<Option<Ranking>> {
        let likes: Vec<f32> = self
            .examples
            .iter()
            .map(|&[_, likes]| likes as f32)
            .collect();
        self.rank(|_| Ok(likes.clone()))
    }

    /// Of a model to which all items are equal: each user gets them in a random order.
    ///
    /// # Errors
    /// None.
    pub fn of_constant(&self) -> Result<Option<Ranking>> {
        let items = self.examples.len() as u32;
        let draw = |user: u32, item: u32| {
            let pair = u64::from(user) << 32 | u64::from(item);
            XxHash64::oneshot(0, &pair.to_le_bytes()) as f32
        };
        self.rank(|user| Ok((0..items).map(|item| draw(user, item)).collect()))
    }

    fn rank(&self, mut scores: impl FnMut(u32) -> Result<Vec<f32>>) -> Result<Option<Ranking>> {
        let (mut ndcg, mut recall, mut users) = (0.0, 0.0, 0);
        let (mut places, mut rare) = (0usize, 0usize);
        let mut is_listed = vec![false; self.examples.len()];
        for (user, liked) in (0u32..).zip(&self.liked) {
            if liked.is_empty() {
                continue;
            }
            let open = all_but(&self.trained[user as usize], self.examples.len());
            let list = top(&scores(user)?, &open, PLACES)?;
            let hits: Vec<bool> = list
                .iter()
                .map(|(item, _)| liked.binary_search(item).is_ok())
                .collect();
            let best = vec![true; liked.len().min(PLACES)];
            ndcg += gain(&hits) / gain(&best);
            recall += hits.iter().filter(|hit| **hit).count() as f64 / liked.len() as f64;
            users += 1;
            places += list.len();
            for (item, _) in list {
                is_listed[item as usize] = true;
                rare += usize::from(self.examples[item as usize][0] < RARE);
            }
        }
        let of_users = users as f64;
        Ok((users > 0).then(|| Ranking {
            users,
            ndcg: ndcg / of_users,
            recall: recall / of_users,
            coverage: is_listed.iter().filter(|listed| **listed).count(),
            items: is_listed.len(),
            rare: rare as f64 / places as f64,
        }))
    }
}

/// The discounted gain of a list, given which of its places are hits.
fn gain(hits: &[bool]) -> f64 {
    let gains = (2u32..).zip(hits);
    gains
        .map(|(place, &hit)| {
            if hit {
                1.0 / f64::from(place).log2()
            } else {
                0.0
            }
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two users and four items, of which user 0 was trained on item 3.
    fn lists() -> Lists {
        Lists {
            trained: vec![vec![3], vec![]],
            liked: vec![vec![1, 2], vec![0]],
            examples: vec![[20, 3], [0, 0], [RARE, 9], [RARE - 1, 1]],
        }
    }

    #[test]
    fn known_values() -> Result<()> {
        // User 0 gets 0, 2, 1 and user 1 gets 3, 2, 1, 0.
        let scores = [vec![3.0, 1.0, 2.0, 9.0], vec![1.0, 2.0, 3.0, 4.0]];
        let ranking = lists()
            .rank(|user| Ok(scores[user as usize].clone()))?
            .unwrap();
        let third = 1.0 / 3f64.log2();
        let first = (third + 0.5) / (1.0 + third);
        let second = 1.0 / 5f64.log2();
        assert_eq!(ranking.users, 2);
        assert!((ranking.ndcg - (first + second) / 2.0).abs() < 1e-12);
        assert_eq!(ranking.recall, 1.0);
        assert_eq!((ranking.coverage, ranking.items), (4, 4));
        // Item 1 twice and item 3 once of seven places.
        assert_eq!(ranking.rare, 3.0 / 7.0);
        Ok(())
    }

    #[test]
    fn popularity_is_one_list_for_all() -> Result<()> {
        // 2, 0, 1 and 2, 0, 3, 1.
        let ranking = lists().of_popularity()?.unwrap();
        let third = 1.0 / 3f64.log2();
        let first = (1.0 + 0.5) / (1.0 + third);
        assert!((ranking.ndcg - (first + third) / 2.0).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn only_the_first_ten_places_count() -> Result<()> {
        let lists = Lists {
            trained: vec![vec![]],
            liked: vec![(0..20).collect()],
            examples: vec![[RARE, 0]; 40],
        };
        let at = |start: f32| {
            let scores: Vec<f32> = (0..40)
                .map(|item| if item < 20 { start } else { 1.0 })
                .collect();
            lists.rank(|_| Ok(scores.clone()))
        };
        let (best, worst) = (at(2.0)?.unwrap(), at(0.0)?.unwrap());
        assert_eq!((best.ndcg, best.recall, best.coverage), (1.0, 0.5, 10));
        assert_eq!((worst.ndcg, worst.recall, worst.coverage), (0.0, 0.0, 10));
        Ok(())
    }

    #[test]
    fn a_constant_lists_everything() -> Result<()> {
        let lists = Lists {
            trained: vec![vec![]; 200],
            liked: vec![vec![0]; 200],
            examples: vec![[RARE, 0]; 40],
        };
        let ranking = lists.of_constant()?.unwrap();
        assert_eq!(ranking.coverage, 40);
        // A quarter of the users find the item among their ten of forty.
        assert!((ranking.recall - 0.25).abs() < 0.1, "{ranking:?}");
        Ok(())
    }
}
