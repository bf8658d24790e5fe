//! MovieLens as published by GroupLens, in both of its layouts.
//!
//! | | `ratings.csv`, `movies.csv` | `ratings.dat`, `users.dat`, `movies.dat` |
//! |---|---|---|
//! | sets | ml-latest-small, 20M, 25M, 32M | 1M, 10M (which has no `users.dat`) |
//! | separator | `,` with `"` around titles that hold one; the first line is a header | `::`, no header |
//! | text | UTF-8 | latin-1 (1M) or UTF-8 (10M) |
//! | users | only their ids | gender, age, occupation, zip, where there is `users.dat` |
//!
//! A line that does not fit is an error that names the file, the line and the field.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{bail, ensure, Result};

use super::records::{File, Layout};
use super::{
    seen, title_words, Catalog, Entities, Feature, Rating, Ratings, Rules, Source, Split,
    MIN_WORD_COUNT, USER_FEATURES,
};

/// How the csv layout spells an empty list of genres.
const NO_GENRES: &str = "(no genres listed)";

/// Zip codes are cut to these leading characters, which name a region: whole ones are nearly as many as the users.
const ZIP_PREFIX: usize = 3;

/// Gender, age, occupation and zip, as [`USER_FEATURES`] has them.
type Demographics = [String; 4];

pub fn read(dir: &Path, rules: Rules) -> Result<Ratings> {
    let layout = Layout::of(dir)?;
    let movies = read_movies(&layout.file(dir, "movies"))?;
    let users = layout.file(dir, "users");
    let users = if users.path.exists() {
        Some(read_users(&users)?)
    } else {
        None
    };
    let ratings = layout.file(dir, "ratings");
    let mut rated = read_ratings(&ratings, users.as_ref(), &movies, rules)?;
    if rules.split == Split::Time {
        // Stable: what happened in the same second stays in file order.
        rated.sort_by_key(|rated| rated.time);
    }

    let mut left_out = Vec::new();
    let users = match users {
        Some(users) => user_entities(&users, &mut left_out),
        None => Entities {
            ids: distinct(rated.iter().map(|r| r.user)),
            features: Vec::new(),
        },
    };
    let movies = movie_entities(&movies, &mut left_out);
    let row = |entities: &Entities, id| {
        entities
            .row(id)
            .expect("read_ratings has looked up every id")
    };
    let ratings: Vec<Rating> = rated
        .into_iter()
        .map(|r| Rating {
            user: row(&users, r.user),
            movie: row(&movies, r.movie),
            liked: r.liked,
        })
        .collect();
    let seen = seen(users.ids.len(), &ratings);
    let catalog = Catalog {
        users,
        movies,
        seen,
    };
    Ok(Ratings {
        source: Source::Files {
            dir: dir.to_owned(),
            rules,
        },
        catalog,
        rows: ratings,
        split: rules.split,
        probabilities: None,
        popularity: None,
        left_out,
    })
}

/// The titles alone, by movie id.
pub fn titles(dir: &Path) -> Result<BTreeMap<i64, String>> {
    let movies = read_movies(&Layout::of(dir)?.file(dir, "movies"))?;
    Ok(movies
        .into_iter()
        .map(|(id, movie)| (id, movie.title))
        .collect())
}

struct Movie {
    title: String,
    genres: Vec<String>,
}

/// A rating by published ids; rows are known only when every user is.
struct Rated {
    user: i64,
    movie: i64,
    liked: bool,
    /// In seconds; 0 if it is not needed.
    time: i64,
}

fn read_movies(file: &File) -> Result<BTreeMap<i64, Movie>> {
    let mut movies = BTreeMap::new();
    file.each_record(["movieId", "title", "genres"], |record| {
        let [_, title, genres] = record.values;
        let genres = genres
            .split('|')
            .filter(|genre| *genre != NO_GENRES)
            .map(str::to_owned)
            .collect();
        let earlier = movies.insert(
            record.parse(0)?,
            Movie {
                title: title.to_owned(),
                genres,
            },
        );
        ensure!(earlier.is_none(), record.wrong(0, "appears a second time"));
        Ok(())
    })?;
    Ok(movies)
}

fn read_users(file: &File) -> Result<BTreeMap<i64, Demographics>> {
    let mut users = BTreeMap::new();
    file.each_record(["userId", "gender", "age", "occupation", "zip"], |record| {
        let [_, gender, age, occupation, zip] = record.values;
        ensure!(
            ["F", "M"].contains(&gender),
            record.wrong(1, "is neither F nor M")
        );
        record.parse::<u32>(2)?;
        record.parse::<u32>(3)?;
        let earlier = users.insert(
            record.parse(0)?,
            [
                gender.to_owned(),
                age.to_owned(),
                occupation.to_owned(),
                region(zip),
            ],
        );
        ensure!(earlier.is_none(), record.wrong(0, "appears a second time"));
        Ok(())
    })?;
    Ok(users)
}

/// See [`ZIP_PREFIX`].
pub fn region(zip: &str) -> String {
    zip.chars().take(ZIP_PREFIX).collect()
}

fn read_ratings(
    file: &File,
    users: Option<&BTreeMap<i64, Demographics>>,
    movies: &BTreeMap<i64, Movie>,
    rules: Rules,
) -> Result<Vec<Rated>> {
    let mut ratings = Vec::new();
    file.each_record(["userId", "movieId", "rating", "timestamp"], |record| {
        let (user, movie, stars) = (record.parse(0)?, record.parse(1)?, record.parse::<f32>(2)?);
        ensure!(
            users.is_none_or(|users| users.contains_key(&user)),
            record.wrong(0, "is not in the file of users")
        );
        ensure!(
            movies.contains_key(&movie),
            record.wrong(1, "is not in the file of movies")
        );
        ensure!(
            (0.0..=5.0).contains(&stars),
            record.wrong(2, "is not between 0 and 5")
        );
        ratings.push(Rated {
            user,
            movie,
            liked: stars >= rules.like_from,
            time: match rules.split {
                Split::Time => record.parse(3)?,
                Split::Hash => 0,
            },
        });
        Ok(())
    })?;
    if ratings.is_empty() {
        bail!("{}: no ratings", file.path.display());
    }
    Ok(ratings)
}

fn user_entities(
    users: &BTreeMap<i64, Demographics>,
    left_out: &mut Vec<&'static str>,
) -> Entities {
    let feature = |(column, name): (usize, _)| {
        let values: Vec<Vec<&str>> = users
            .values()
            .map(|user| vec![user[column].as_str()])
            .collect();
        Feature::new(name, &values, 1)
    };
    let ids = users.keys().copied().collect();
    let features = USER_FEATURES.into_iter().enumerate().map(feature);
    Entities::new(ids, features, left_out)
}

fn movie_entities(movies: &BTreeMap<i64, Movie>, left_out: &mut Vec<&'static str>) -> Entities {
    let genres: Vec<_> = movies.values().map(|movie| movie.genres.clone()).collect();
    let words: Vec<_> = movies
        .values()
        .map(|movie| title_words(&movie.title))
        .collect();
    let features = [
        Feature::new("genres", &genres, 1),
        Feature::new("words", &words, MIN_WORD_COUNT),
    ];
    let ids = movies.keys().copied().collect();
    Entities::new(ids, features, left_out)
}

fn distinct(ids: impl Iterator<Item = i64>) -> Vec<i64> {
    let mut ids: Vec<i64> = ids.collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests {
    use super::super::records::BYTE_ORDER_MARK;
    use super::*;
    use crate::data::Part;
    use std::fs;

    const CSV_MOVIES: &str = "movieId,title,genres\n\
        7,\"City, Lost (1995)\",Drama|Comedy\n\
        3,Lost Sea (1995),(no genres listed)\n";
    const CSV_RATINGS: &str =
        "userId,movieId,rating,timestamp\n20,7,4.0,1\n5,3,3.5,2\n20,3,0.5,3\n";
    const DAT_MOVIES: &[u8] = b"7::Caf\xe9 (1995)::Drama|Comedy\n3::Caf\xe9 Lost (1996)::Drama\n";
    const DAT_USERS: &[u8] = b"20::F::1::10::48067\n5::M::25::15::55117\n";
    const DAT_RATINGS: &[u8] = b"20::7::5::978300760\n5::3::3::978302109\n";

    fn folder(files: &[(&str, &[u8])]) -> Result<tempfile::TempDir> {
        let dir = tempfile::tempdir()?;
        for (name, content) in files {
            fs::write(dir.path().join(name), content)?;
        }
        Ok(dir)
    }

    fn read_files(files: &[(&str, &[u8])]) -> Result<Ratings> {
        read(folder(files)?.path(), Rules::default())
    }

    fn csv(movies: &str, ratings: &str) -> Result<Ratings> {
        read_files(&[
            ("movies.csv", movies.as_bytes()),
            ("ratings.csv", ratings.as_bytes()),
        ])
    }

    fn error(dataset: Result<Ratings>) -> String {
        format!("{:#}", dataset.err().expect("an error"))
    }

    #[test]
    fn csv_layout() -> Result<()> {
        let data = csv(CSV_MOVIES, CSV_RATINGS)?;
        assert_eq!(
            (&data.catalog.users.ids[..], &data.catalog.movies.ids[..]),
            (&[5, 20][..], &[3, 7][..])
        );
        let rating = |user, movie, liked| Rating { user, movie, liked };
        assert_eq!(
            data.rows,
            [rating(1, 1, true), rating(0, 0, false), rating(1, 0, false)]
        );
        assert_eq!(data.catalog.seen.bag(1), [1, 0]);
        assert_eq!(data.catalog.movies.describe("genres", 0), "");
        assert_eq!(data.catalog.movies.describe("genres", 1), "Drama, Comedy");
        assert_eq!(data.catalog.movies.describe("words", 1), "1995, lost");
        assert!(data.catalog.users.features.is_empty());
        Ok(())
    }

    #[test]
    fn dat_layout() -> Result<()> {
        let dir = folder(&[
            ("movies.dat", DAT_MOVIES),
            ("users.dat", DAT_USERS),
            ("ratings.dat", DAT_RATINGS),
        ])?;
        assert_eq!(titles(dir.path())?[&7], "Café (1995)");
        let data = read(dir.path(), Rules::default())?;
        assert_eq!(data.catalog.movies.describe("words", 1), "café");
        assert_eq!(data.catalog.users.features.len(), 4);
        assert_eq!(data.catalog.users.describe("gender", 1), "F");
        assert_eq!(data.catalog.users.describe("zip", 0), "551");
        Ok(())
    }

    #[test]
    fn rules_decide_what_is_liked_and_when() -> Result<()> {
        let dir = folder(&[
            ("movies.csv", CSV_MOVIES.as_bytes()),
            (
                "ratings.csv",
                b"userId,movieId,rating,timestamp\n20,7,4.0,9\n5,3,3.5,2\n20,3,0.5,3\n",
            ),
        ])?;
        let rules = Rules {
            like_from: 3.5,
            split: Split::Time,
        };
        let data = read(dir.path(), rules)?;
        let rating = |user, movie, liked| Rating { user, movie, liked };
        let expected = [rating(0, 0, true), rating(1, 0, false), rating(1, 1, true)];
        assert_eq!(data.rows, expected);
        let parts = [Part::Train, Part::Valid, Part::Test].map(|part| data.part(part).len());
        assert_eq!(parts, [2, 0, 1]);
        let bad = folder(&[
            ("movies.csv", CSV_MOVIES.as_bytes()),
            (
                "ratings.csv",
                b"userId,movieId,rating,timestamp\n20,7,4.0,x\n",
            ),
        ])?;
        let message = error(read(bad.path(), rules));
        assert!(
            message.ends_with("field timestamp: `x` is not a number"),
            "{message}"
        );
        read(bad.path(), Rules::default())?;
        Ok(())
    }

    #[test]
    fn blank_lines_and_a_byte_order_mark_are_passed_over() -> Result<()> {
        let marked = |text: &[u8]| [BYTE_ORDER_MARK, text].concat();
        let utf_8 = "7::Café (1995)::Drama|Comedy\n3::Café Lost (1996)::Drama\n".as_bytes();
        let plain = read_files(&[("movies.dat", utf_8), ("ratings.dat", DAT_RATINGS)])?;
        let blank = [DAT_RATINGS, b"\r\n\n"].concat();
        let (movies, ratings) = (marked(utf_8), marked(&blank));
        let data = read_files(&[("movies.dat", &movies), ("ratings.dat", &ratings)])?;
        assert_eq!(
            (data.catalog, data.rows),
            (plain.catalog, plain.rows.clone())
        );
        // Of latin-1 text too.
        let (movies, ratings) = (marked(DAT_MOVIES), marked(DAT_RATINGS));
        let data = read_files(&[("movies.dat", &movies), ("ratings.dat", &ratings)])?;
        assert_eq!(data.rows, plain.rows);

        let (movies, ratings) = (
            format!("\u{feff}{CSV_MOVIES}\n\n"),
            format!("\u{feff}{CSV_RATINGS}\n"),
        );
        assert_eq!(
            csv(&movies, &ratings)?.rows,
            csv(CSV_MOVIES, CSV_RATINGS)?.rows
        );
        Ok(())
    }

    #[test]
    fn values_that_are_missing_are_none() -> Result<()> {
        let movies = "movieId,title,genres\n7,Lost (1995),\n3,Lost Sea (1995),Drama||War\n";
        let data = csv(movies, CSV_RATINGS)?;
        let genres = &data.catalog.movies.features[0];
        assert_eq!(genres.vocabulary, ["Drama", "War"]);
        assert_eq!(data.catalog.movies.describe("genres", 1), "");
        assert!(data.left_out.is_empty());
        Ok(())
    }

    #[test]
    fn features_without_values_are_left_out() -> Result<()> {
        let no_word_twice = "movieId,title,genres\n7,Alien,Drama\n3,Brazil,War\n";
        let no_genres = "movieId,title,genres\n7,Lost,(no genres listed)\n3,Lost Sea,\n";
        for (movies, left, out) in [
            (no_word_twice, "genres", "words"),
            (no_genres, "words", "genres"),
        ] {
            let data = csv(movies, CSV_RATINGS)?;
            let features = &data.catalog.movies.features;
            assert_eq!(features.iter().map(|f| f.name).collect::<Vec<_>>(), [left]);
            assert_eq!(data.left_out, [out]);
            let tables = data.catalog.schema().tables;
            assert!(tables.iter().all(|&(_, rows)| rows > 0), "{tables:?}");
        }
        Ok(())
    }

    #[test]
    fn dat_layout_without_users() -> Result<()> {
        let data = read_files(&[("movies.dat", DAT_MOVIES), ("ratings.dat", DAT_RATINGS)])?;
        assert_eq!(data.catalog.users.ids, [5, 20]);
        Ok(())
    }

    #[test]
    fn malformed_lines_name_file_line_and_field() {
        for (ratings, expected) in [
            ("20,7,4.0\n", "ratings.csv:2: expected 4 fields, got 3"),
            (
                "20,7,4.0,1\nx,7,4.0,1\n",
                "ratings.csv:3: field userId: `x` is not a number",
            ),
            (
                "20,7,,1\n",
                "ratings.csv:2: field rating: `` is not a number",
            ),
            (
                "20,7,NaN,1\n",
                "ratings.csv:2: field rating: `NaN` is not between 0 and 5",
            ),
            (
                "20,8,4.0,1\n",
                "ratings.csv:2: field movieId: `8` is not in the file of movies",
            ),
            ("", "ratings.csv: no ratings"),
        ] {
            let message = error(csv(
                CSV_MOVIES,
                &format!("userId,movieId,rating,timestamp\n{ratings}"),
            ));
            assert!(message.ends_with(expected), "{message}");
        }
        let message = error(csv("id,title\n", CSV_RATINGS));
        assert!(
            message.ends_with("movies.csv:1: expected the header movieId,title,genres"),
            "{message}"
        );
        let message = error(csv(&format!("{CSV_MOVIES}7,Again,Drama\n"), CSV_RATINGS));
        assert!(
            message.ends_with("movies.csv:4: field movieId: `7` appears a second time"),
            "{message}"
        );

        for (users, expected) in [
            (
                &b"20::F::1::10\n"[..],
                "users.dat:1: expected 5 fields, got 4",
            ),
            (
                b"20::F::1::10::1\n5::X::25::15::2\n",
                "users.dat:2: field gender: `X` is neither F nor M",
            ),
            (
                b"20::F::1::10::1\n",
                "ratings.dat:2: field userId: `5` is not in the file of users",
            ),
        ] {
            let files = [
                ("movies.dat", DAT_MOVIES),
                ("users.dat", users),
                ("ratings.dat", DAT_RATINGS),
            ];
            let message = error(read_files(&files));
            assert!(message.ends_with(expected), "{message}");
        }
    }

    #[test]
    fn a_folder_without_ratings_is_named() {
        let message = error(read_files(&[]));
        assert!(
            message.ends_with("holds neither ratings.csv nor ratings.dat"),
            "{message}"
        );
    }
}
