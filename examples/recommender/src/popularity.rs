//! What is liked by many: the answer to those of whom nothing is known.

use anyhow::{ensure, Result};

/// A movie with few examples is taken to be liked as movies are in general: as if it had so many more examples.
const PRIOR: f64 = 10.0;

/// How often each movie of a catalogue was rated and liked in training.
#[derive(Clone, Debug, PartialEq)]
pub struct Popularity {
    examples: Vec<[u32; 2]>,
    rate: f64,
}

impl Popularity {
    /// Of the training examples of each movie, and how many of those were liked.
    ///
    /// # Errors
    /// No examples at all.
    pub fn new(examples: Vec<[u32; 2]>) -> Result<Self> {
        let sum = |i: usize| -> f64 { examples.iter().map(|counts| f64::from(counts[i])).sum() };
        let (all, liked) = (sum(0), sum(1));
        ensure!(
            all > 0.0 && liked <= all,
            "{liked} of {all} training examples are liked"
        );
        let rate = liked / all;
        Ok(Self { examples, rate })
    }

    /// The training examples of a movie.
    pub fn examples(&self, movie: u32) -> u32 {
        self.examples[movie as usize][0]
    }

    /// Of each movie, the training examples and how many of those were liked.
    pub fn all_examples(&self) -> Vec<[u32; 2]> {
        self.examples.clone()
    }

    /// By how many each movie was liked: the order of a list for everybody.
    pub fn likes(&self) -> Vec<f32> {
        let likes = self.examples.iter().map(|&[_, likes]| likes as f32);
        likes.collect()
    }

    /// The share of those who rated the movie that liked it; of a movie that is not in the catalogue, that of all examples.
    pub fn probability(&self, movie: Option<u32>) -> f64 {
        let [all, likes] = movie.map_or([0, 0], |movie| self.examples[movie as usize]);
        (f64::from(likes) + PRIOR * self.rate) / (f64::from(all) + PRIOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_examples_say_little() -> Result<()> {
        let popularity = Popularity::new(vec![[90, 90], [0, 0], [110, 10]])?;
        assert_eq!(popularity.rate, 0.5);
        assert_eq!(popularity.probability(Some(0)), 0.95);
        assert_eq!(popularity.probability(Some(1)), 0.5);
        assert_eq!(popularity.probability(Some(2)), 0.125);
        assert_eq!(popularity.probability(None), 0.5);
        assert_eq!(popularity.likes(), [90.0, 0.0, 10.0]);
        assert_eq!(popularity.examples(2), 110);
        for nothing in [vec![], vec![[0, 0]], vec![[1, 2]]] {
            assert!(Popularity::new(nothing).is_err());
        }
        Ok(())
    }
}
