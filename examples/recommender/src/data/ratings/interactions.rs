//! Interactions: who visited, bought or read what, and nothing of what they did not.
//!
//! A line is a user's number and the numbers of their items, separated by spaces or tabs; the file may be compressed by gzip. Pairs
//! are positive examples; negative ones are drawn: for each pair, [`NEGATIVES`] other items for the same user.
//!
//! * An item is drawn as often as it occurs in the train part, so that to know what is popular does not help, and never one of the
//!   user's own, whichever part that pair is in.
//! * Those of the train part are drawn anew in each epoch, by the seed of the training. Those of the valid and test parts are
//!   the same in every program, as the split is.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::str::FromStr;

use anyhow::{anyhow, ensure, Context, Result};
use rand::{Rng, RngExt};

use super::split::part;
use super::{seen, Catalog, Entities, Rating, Ratings, Source, Split};
use crate::data::gzip::{is_gzip, Members};
use crate::data::{Bags, Part};

/// Negative examples per positive one.
pub const NEGATIVES: usize = 4;

/// Draws before it is more than bad luck that all were the user's own.
const TRIES: usize = 64;

/// How often each item occurs in the train part: what negative examples are drawn by.
pub struct Popularity {
    /// Per item, the occurrences of all items up to it.
    cumulative: Vec<u64>,
}

/// A user and their items, by published numbers.
struct Line {
    number: usize,
    user: i64,
    items: Vec<i64>,
}

pub fn read(path: &Path) -> Result<Ratings> {
    let name = || path.display().to_string();
    let mut file = BufReader::new(File::open(path).with_context(name)?);
    let lines = if is_gzip(&mut file).with_context(name)? {
        parse(BufReader::new(Members::new(file)), path)
    } else {
        parse(file, path)
    }?;

    let users = Entities {
        ids: distinct(lines.iter().map(|line| line.user)),
        features: Vec::new(),
    };
    let items = Entities {
        ids: distinct(lines.iter().flat_map(|line| line.items.iter().copied())),
        features: Vec::new(),
    };
    let row = |entities: &Entities, id| entities.row(id).expect("all ids are there");
    let mut rows = Vec::new();
    for line in &lines {
        let user = row(&users, line.user);
        rows.extend(line.items.iter().map(|&item| Rating {
            user,
            movie: row(&items, item),
            liked: true,
        }));
    }
    ensure!(!rows.is_empty(), "{}: no interactions", path.display());
    let popularity = Popularity::of(&rows, items.ids.len());
    let seen = seen(users.ids.len(), &rows);
    for line in &lines {
        let own = seen.bag(row(&users, line.user) as usize);
        ensure!(
            own.is_empty() || popularity.others(own) > 0,
            "{}:{}: user {} has all items of the train part, which leaves none for negative examples",
            path.display(),
            line.number,
            line.user
        );
    }
    Ok(Ratings {
        source: Source::Interactions(path.to_owned()),
        catalog: Catalog {
            users,
            movies: items,
            seen,
        },
        rows,
        split: Split::Hash,
        probabilities: None,
        popularity: Some(popularity),
        left_out: Vec::new(),
    })
}

fn parse(text: impl BufRead, path: &Path) -> Result<Vec<Line>> {
    let mut lines: Vec<Line> = Vec::new();
    let mut known = HashMap::new();
    for (number, text) in (1..).zip(text.lines()) {
        let text = text.with_context(|| format!("{}:{number}", path.display()))?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let mut fields = text.split_ascii_whitespace();
        let wrong = |field: &str, value: &str, complaint: &str| {
            let path = path.display();
            anyhow!("{path}:{number}: field {field}: `{value}` {complaint}")
        };
        let parse = |field: &str, value: &str| {
            i64::from_str(value).map_err(|_| wrong(field, value, "is not a number"))
        };
        // A blank line.
        let Some(first) = fields.next() else { continue };
        let user = parse("user", first)?;
        if let Some(earlier) = known.insert(user, number) {
            let complaint = format!("appears a second time, after line {earlier}");
            return Err(wrong("user", first, &complaint));
        }
        let items: Result<Vec<_>> = fields.map(|item| parse("item", item)).collect();
        let items = items?;
        let mut sorted = items.clone();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(wrong(
                "item",
                &twice[0].to_string(),
                "appears a second time",
            ));
        }
        lines.push(Line {
            number,
            user,
            items,
        });
    }
    Ok(lines)
}

/// The distinct values, ascending.
fn distinct(values: impl Iterator<Item = i64>) -> Vec<i64> {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    values.dedup();
    values
}

impl Popularity {
    fn of(rows: &[Rating], items: usize) -> Self {
        let mut counts = vec![0u64; items];
        for (_, rating) in (0..).zip(rows).filter(|(row, _)| part(*row) == Part::Train) {
            counts[rating.movie as usize] += 1;
        }
        let cumulative = counts.into_iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        });
        Self {
            cumulative: cumulative.collect(),
        }
    }

    /// For each of some positive examples, those that go with it.
    pub fn negatives(&self, positives: &[Rating], seen: &Bags, rng: &mut impl Rng) -> Vec<Rating> {
        let mut own = Vec::new();
        let mut of = None;
        let mut negatives = Vec::with_capacity(NEGATIVES * positives.len());
        for &Rating { user, .. } in positives {
            if of != Some(user) {
                own.clear();
                own.extend_from_slice(seen.bag(user as usize));
                own.sort_unstable();
                of = Some(user);
            }
            negatives.extend((0..NEGATIVES).map(|_| Rating {
                user,
                movie: self.draw(&own, rng),
                liked: false,
            }));
        }
        negatives
    }

    /// An item that is none of `own`, which are sorted.
    fn draw(&self, own: &[u32], rng: &mut impl Rng) -> u32 {
        let all = self.cumulative.last().copied().unwrap_or(0);
        for _ in 0..TRIES {
            let item = self.at(rng.random_range(0..all));
            if own.binary_search(&item).is_err() {
                return item;
            }
        }
        // Nearly everything that is popular is the user's own: the place is counted among the others alone.
        let mut place = rng.random_range(0..self.others(own));
        let others = (0u32..).zip(&self.cumulative);
        let others = others.filter(|(item, _)| own.binary_search(item).is_err());
        for (item, _) in others {
            match place.checked_sub(self.count(item)) {
                Some(rest) => place = rest,
                None => return item,
            }
        }
        unreachable!("the place is below the occurrences of all others")
    }

    /// The item of one of all occurrences.
    fn at(&self, place: u64) -> u32 {
        self.cumulative.partition_point(|&end| end <= place) as u32
    }

    fn count(&self, item: u32) -> u64 {
        let item = item as usize;
        let before = item
            .checked_sub(1)
            .map_or(0, |before| self.cumulative[before]);
        self.cumulative[item] - before
    }

    /// The occurrences of all items but those of `own`.
    fn others(&self, own: &[u32]) -> u64 {
        let all = self.cumulative.last().copied().unwrap_or(0);
        all - own.iter().map(|&item| self.count(item)).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Examples;
    use rand::rngs::StdRng;
    use rand::SeedableRng;
    use std::fs;
    use std::io::Write;

    /// 200 users with up to 12 of 60 items each, of which those with low numbers are popular.
    fn text() -> String {
        let mut text = String::new();
        for user in 0..200u64 {
            text += &format!("{}", 3 * user);
            let items = (0..12).map(|i| (user * 31 + i * i * 7) % 61 * ((user + i) % 5 + 1) / 5);
            let mut items: Vec<_> = items.collect();
            items.sort_unstable();
            items.dedup();
            items
                .iter()
                .for_each(|item| text += &format!(" {}", 1000 - item));
            text.push('\n');
        }
        text
    }

    fn open(text: &str) -> Result<Ratings> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("pairs.txt");
        fs::write(&path, text)?;
        read(&path)
    }

    fn examples(ratings: &Ratings, part: Part, seed: Option<u64>) -> Result<Vec<Rating>> {
        let mut rng = seed.map(StdRng::seed_from_u64);
        let mut examples = Vec::new();
        for batch in ratings.batches(part, 100, rng.as_mut())? {
            let (batch, labels) = batch?;
            let crate::data::Rows::Bags(bags) = batch.rows else {
                anyhow::bail!("no bags")
            };
            let pairs = bags[0].indices().iter().zip(bags[1].indices());
            examples.extend(pairs.zip(labels).map(|((&user, &movie), liked)| Rating {
                user,
                movie,
                liked,
            }));
        }
        Ok(examples)
    }

    #[test]
    fn lines_become_pairs() -> Result<()> {
        let ratings = open("7 30 10\n\n-2\n5\t10 20 \n")?;
        assert_eq!(ratings.catalog.users.ids, [-2, 5, 7]);
        assert_eq!(ratings.catalog.movies.ids, [10, 20, 30]);
        let pairs: Vec<_> = ratings.rows.iter().map(Rating::pair).collect();
        assert_eq!(pairs, [(2, 2), (2, 0), (1, 0), (1, 1)]);
        assert_eq!(ratings.catalog.seen.bag(2), [2, 0]);
        assert!(ratings.catalog.seen.bag(0).is_empty());
        Ok(())
    }

    #[test]
    fn gzip_makes_no_difference() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("pairs.gz");
        let file = fs::File::create(&path)?;
        let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        gzip.write_all(text().as_bytes())?;
        gzip.finish()?;
        let (plain, gzip) = (open(&text())?, read(&path)?);
        assert_eq!((plain.catalog, plain.rows), (gzip.catalog, gzip.rows));
        Ok(())
    }

    #[test]
    fn negatives_are_others_and_fixed_for_evaluation() -> Result<()> {
        let ratings = open(&text())?;
        for part in [Part::Train, Part::Valid, Part::Test] {
            let found = examples(&ratings, part, None)?;
            assert_eq!(found.len(), ratings.len(part));
            assert_eq!(found, examples(&ratings, part, None)?);
            let (positives, negatives): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|example| example.liked);
            assert_eq!(positives, ratings.part(part));
            assert_eq!(negatives.len(), NEGATIVES * positives.len());
            for example in negatives {
                let own = ratings.catalog.seen.bag(example.user as usize);
                assert!(!own.contains(&example.movie));
            }
        }
        let shuffled = |seed| examples(&ratings, Part::Train, Some(seed));
        assert_eq!(shuffled(1)?, shuffled(1)?);
        assert_ne!(shuffled(1)?, shuffled(2)?);
        Ok(())
    }

    #[test]
    fn items_are_drawn_by_their_popularity() -> Result<()> {
        let rows: Vec<_> = [0, 0, 0, 0, 0, 0, 1, 2, 2, 2]
            .map(|movie| Rating {
                user: 0,
                movie,
                liked: true,
            })
            .repeat(100);
        let popularity = Popularity::of(&rows, 4);
        let counts: Vec<_> = (0..4).map(|item| popularity.count(item)).collect();
        let mut rng = StdRng::seed_from_u64(1);
        // Whether its draws are rejected now and then, or nearly always.
        for own in [vec![3], vec![1], vec![0, 2]] {
            let mut drawn = [0u64; 4];
            for _ in 0..10_000 {
                drawn[popularity.draw(&own, &mut rng) as usize] += 1;
            }
            for item in 0..4 {
                let share = counts[item] as f64 / popularity.others(&own) as f64;
                let share = if own.contains(&(item as u32)) {
                    0.0
                } else {
                    share
                };
                let found = drawn[item] as f64 / 10_000.0;
                assert!(
                    (found - share).abs() < 0.02,
                    "{own:?} {item}: {found}, not {share}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn the_last_resort_draws_by_popularity_too() -> Result<()> {
        // Item 0 is all but two in a hundred thousand.
        let popularity = Popularity {
            cumulative: vec![100_000, 100_001, 100_001, 100_002],
        };
        let mut rng = StdRng::seed_from_u64(1);
        let drawn: Vec<_> = (0..200).map(|_| popularity.draw(&[0], &mut rng)).collect();
        let ones = drawn.iter().filter(|&&item| item == 1).count();
        assert!(drawn.iter().all(|item| [1, 3].contains(item)), "{drawn:?}");
        assert!((50..150).contains(&ones), "{ones}");
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (text, said) in [
            ("", "no interactions"),
            ("1\n2\n", "no interactions"),
            ("1 2\nx 3\n", "pairs.txt:2: field user: `x` is not a number"),
            (
                "1 2 3.5\n",
                "pairs.txt:1: field item: `3.5` is not a number",
            ),
            (
                "1 2\n\n1 3\n",
                "pairs.txt:3: field user: `1` appears a second time, after line 1",
            ),
            (
                "1 2 3 2\n",
                "pairs.txt:1: field item: `2` appears a second time",
            ),
            (
                "1 2\n2 2 3\n3 4\n4 2 3 4\n",
                "pairs.txt:4: user 4 has all items",
            ),
        ] {
            let error = format!("{:#}", open(text).err().expect(text));
            assert!(error.contains(said), "{text:?}: {error}");
        }
    }
}
