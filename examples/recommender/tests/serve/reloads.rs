//! A model takes the place of another while requests run.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use serde_json::json;

use crate::support::*;

/// Whatever is asked while models are replaced is answered, and wholly by one of them.
#[test]
fn reloads_drop_no_request() {
    let (_folder, checkpoint) = own_checkpoint();
    let server = Server::start(&checkpoint, &[]);
    let client = server.client();
    let asked = pairs(3);
    let first: Vec<f64> = client.score(&asked).into_iter().map(logit).collect();
    // Model n scores each pair higher by n.
    let model_of = |scores: Vec<f32>| -> f64 {
        let differences = scores
            .into_iter()
            .zip(&first)
            .map(|(score, first)| logit(score) - first);
        let (low, high) = differences.fold((f64::MAX, f64::MIN), |(low, high), d| {
            (low.min(d), high.max(d))
        });
        assert!(
            high - low < 1e-2,
            "an answer of two models: {low} to {high}"
        );
        low.round()
    };
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let (client, stop, asked) = (server.client(), &stop, &asked);
                scope.spawn(move || {
                    let mut models = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        models.push(model_of(client.score(asked)));
                    }
                    models
                })
            })
            .collect();
        for n in 1..=4u8 {
            replace(&checkpoint, n.into());
            // By both ways in turn.
            if cfg!(unix) && n % 2 == 0 {
                #[cfg(unix)]
                server.signal(rustix::process::Signal::HUP);
                let start = Instant::now();
                while client.generation() == u64::from(n) {
                    assert!(start.elapsed() < PATIENCE, "SIGHUP was not heard");
                }
            } else {
                let answer = client.ask("/reload", &json!(null));
                assert_eq!(answer["generation"], n + 1);
            }
            assert_eq!(model_of(client.score(&asked)), f64::from(n));
        }
        // A truncated file and a model that cannot answer are refused, and the last model stays.
        replace(&checkpoint, f32::NAN);
        let (status, answer) = client.post("/reload", &json!(null));
        assert_eq!(status, 409);
        assert!(
            answer["error"]
                .as_str()
                .unwrap()
                .contains("scores its first user and movie as [NaN]"),
            "{answer}"
        );
        std::fs::remove_file(&checkpoint).unwrap();
        std::fs::write(&checkpoint, b"short").unwrap();
        let (status, answer) = client.post("/reload", &json!(null));
        assert_eq!(status, 409);
        assert!(
            answer["error"]
                .as_str()
                .unwrap()
                .contains("model.safetensors"),
            "{answer}"
        );
        assert_eq!(client.generation(), 5);
        assert_eq!(model_of(client.score(&asked)), 4.0);

        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            let models = worker.join().unwrap();
            assert!(models.is_sorted(), "an old model came back: {models:?}");
            assert!(models.len() > 4, "{models:?}");
        }
    });
    for (outcome, times) in [("replaced", 4.0), ("refused", 2.0)] {
        let sample = format!(r#"reloads_total{{outcome="{outcome}"}}"#);
        assert_eq!(client.metric(&sample), times);
    }
    assert_eq!(client.metric("model_generation"), 5.0);
    let answered = client.metric(r#"http_requests_total{route="/score",status="200"}"#);
    assert_eq!(
        client.metric(r#"http_request_duration_seconds_count{route="/score"}"#),
        answered
    );
}

/// A MovieLens set of two users and the given movies.
fn movielens(folder: &Path, movies: &[(i64, &str)]) {
    let lines: String = movies
        .iter()
        .map(|(id, title)| format!("{id},{title},Drama\n"))
        .collect();
    let ratings: String = (0..40)
        .map(|i| {
            format!(
                "{},{},{}.0,1\n",
                i % 2 + 1,
                movies[i % movies.len()].0,
                i % 5 + 1
            )
        })
        .collect();
    std::fs::create_dir_all(folder).unwrap();
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    write("movies.csv", format!("movieId,title,genres\n{lines}"));
    write(
        "ratings.csv",
        format!("userId,movieId,rating,timestamp\n{ratings}"),
    );
}

#[test]
fn titles_of_other_movies_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_owned();
    movielens(&path("one"), &[(1, "Alien (1979)"), (2, "Brazil (1985)")]);
    // The same ids, with other titles.
    movielens(&path("other"), &[(1, "Cube (1997)"), (2, "Dune (1984)")]);
    movielens(
        &path("more"),
        &[
            (1, "Alien (1979)"),
            (2, "Brazil (1985)"),
            (7, "Cube (1997)"),
        ],
    );
    let train_on = |data: &str| {
        let flags = ["--compression", "1", "--epochs", "1", "--checkpoint"];
        recommender(&[&["--data", &text(data)], &flags[..], &[&text("m")]].concat());
    };
    train_on("one");
    let other = text("other");
    let refused = command("127.0.0.1:0", &path("m"), &["--data", &other])
        .output()
        .unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("--data has the titles of another catalogue"),
        "{said}"
    );

    for (flags, is_refused) in [(&[][..], false), (&["--keep-catalogue"], true)] {
        train_on("one");
        let server = Server::start(&path("m"), flags);
        let client = server.client();
        let same = client.ask("/reload", &json!(null));
        assert!(same.get("catalogue_change").is_none(), "{same}");
        for (data, change) in [
            ("more", "1 movies added, 0 removed"),
            (
                "other",
                if is_refused {
                    "the same movie ids with other titles"
                } else {
                    "0 movies added, 1 removed"
                },
            ),
        ] {
            train_on(data);
            let (status, answer) = client.post("/reload", &json!(null));
            if is_refused {
                assert_eq!(status, 409);
                let error = format!("--keep-catalogue refuses another catalogue: {change}");
                assert_eq!(answer["error"], error);
            } else {
                assert_eq!((status, &answer["catalogue_change"]), (200, &json!(change)));
            }
        }
        let generation = client.generation();
        assert_eq!(generation, if is_refused { 2 } else { 4 });
    }
}
