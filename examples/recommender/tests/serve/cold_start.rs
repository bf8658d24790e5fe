//! Users and movies that the catalogue does not have, and lists of some movies only.

use std::collections::HashSet;

use candle_core::Device;
use candle_hashed_embedding_bag::Checkpoint;
use serde_json::{json, Value};

use crate::support::*;

fn ids(answer: &Value) -> Vec<i64> {
    let movies = answer["movies"].as_array().unwrap().iter();
    movies.map(|m| m["movie"].as_i64().unwrap()).collect()
}

/// The one pair's probability and what it rests on.
fn score(client: &Client, pair: Value) -> (f32, String) {
    let answer = client.ask("/score", &json!({ "pairs": [pair] }));
    let basis = answer["basis"][0].as_str().unwrap().to_owned();
    (floats(&answer["probabilities"])[0], basis)
}

#[test]
fn nothing_known_is_answered_by_popularity() {
    let server = Server::start(trained(), &[]);
    let client = server.client();
    let checkpoint = Checkpoint::open(trained()).unwrap();
    let examples = checkpoint.tensor("movie.examples", &Device::Cpu).unwrap();
    let examples: Vec<Vec<u32>> = examples.to_vec2().unwrap();
    // Generated ids are rows, from 1.
    let likes = |id: &i64| examples[*id as usize - 1][1];

    let nobody = client.ask("/recommend", &json!({"k": 20}));
    assert_eq!(
        (&nobody["basis"], &nobody["user"]),
        (&json!("popularity"), &json!(null))
    );
    let listed = ids(&nobody);
    assert!(listed.is_sorted_by(|a, b| likes(a) >= likes(b)));
    let least = likes(listed.last().unwrap());
    let better = examples.iter().filter(|counts| counts[1] > least).count();
    assert!(better < 20);
    for movie in nobody["movies"].as_array().unwrap() {
        let [all, liked] = examples[movie["movie"].as_u64().unwrap() as usize - 1][..] else {
            panic!("two numbers")
        };
        assert_eq!(movie["ratings"], all);
        assert_eq!(movie["basis"], "popularity");
        let share = f64::from(liked) / f64::from(all);
        assert!(
            (movie["probability"].as_f64().unwrap() - share).abs() < 0.05,
            "{movie}"
        );
    }
    // Whoever it is, and whatever their id looks like.
    for user in [json!(9999), json!("9999"), json!("someone"), json!(-1)] {
        let answer = client.ask("/recommend", &json!({"user": user, "k": 20}));
        assert_eq!(answer["user"], user);
        assert_eq!(answer["movies"], nobody["movies"]);
    }
    let popular = nobody["movies"][0]["probability"].as_f64().unwrap() as f32;
    let scored = score(&client, json!({"user": 9999, "movie": listed[0]}));
    assert_eq!(scored, (popular, "popularity".to_owned()));
    // Of a movie that nobody knows, the share of all examples that are liked.
    let (unknown, basis) = score(&client, json!({"user": 7, "movie": "new"}));
    let sum = |i: usize| -> f64 { examples.iter().map(|counts| f64::from(counts[i])).sum() };
    assert_eq!(basis, "popularity");
    assert!((f64::from(unknown) - sum(1) / sum(0)).abs() < 1e-6);
}

#[test]
fn features_stand_for_the_unknown() {
    let server = Server::start(trained(), &[]);
    let client = server.client();
    let of = |features: Value| {
        client.ask(
            "/recommend",
            &json!({"user": "new", "features": features, "k": 30}),
        )
    };
    let one = of(json!({"gender": "F", "age": 25, "occupation": "student"}));
    let other = of(json!({"gender": "M", "age": "65", "occupation": ["farmer"]}));
    assert_eq!(one["basis"], "features");
    assert_ne!(ids(&one), ids(&other));
    // As /score has it.
    let movie = &one["movies"][0];
    let features = json!({"gender": "F", "age": 25, "occupation": "student"});
    let pair = json!({"user": "new", "movie": movie["movie"], "user_features": features});
    let (probability, basis) = score(&client, pair);
    assert_eq!(basis, "features");
    assert!((f64::from(probability) - movie["probability"].as_f64().unwrap()).abs() < 1e-6);

    // A movie that is not in the catalogue, with the features of one that is.
    let known = client.ask("/recommend", &json!({"user": 7, "k": 1}));
    let (title, genres) = (&known["movies"][0]["title"], &known["movies"][0]["genres"]);
    let genres: Vec<_> = genres.as_str().unwrap().split(", ").collect();
    let features = json!({"title": title, "genres": genres});
    let pair = json!({"user": 7, "movie": "new", "movie_features": features});
    let (by_features, basis) = score(&client, pair);
    assert_eq!(basis, "features");
    let item = json!({"movie": "new", "features": features});
    let asked = json!({"user": 7, "k": 1200, "items": [item]});
    let answer = client.ask("/recommend", &asked);
    let movies = answer["movies"].as_array().unwrap();
    let found: Vec<_> = movies.iter().filter(|m| m["movie"] == "new").collect();
    assert_eq!(found.len(), 1);
    assert_eq!(
        (&found[0]["basis"], &found[0]["title"]),
        (&json!("features"), title)
    );
    assert!((found[0]["probability"].as_f64().unwrap() - f64::from(by_features)).abs() < 1e-6);
    let probabilities = movies.iter().map(|m| m["probability"].as_f64().unwrap());
    assert!(
        probabilities.is_sorted_by(|a, b| a >= b),
        "it is in its place"
    );
}

#[test]
fn a_list_may_be_of_some_movies_only() {
    let server = Server::start(trained(), &[]);
    let client = server.client();
    let ask = |more: Value| {
        let mut asked = json!({"user": 7, "k": 10});
        asked
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        client.ask("/recommend", &asked)
    };
    let all = ids(&ask(json!({"k": 1200})));
    assert_eq!(
        ids(&ask(
            json!({"exclude": [all[0], all[2].to_string(), 9999, "x"]})
        )),
        {
            let rest = all.iter().filter(|id| **id != all[0] && **id != all[2]);
            rest.copied().take(10).collect::<Vec<_>>()
        }
    );
    let chosen = ask(json!({"candidates": [all[500], all[3], "new", 9999]}));
    assert_eq!(ids(&chosen), [all[3], all[500]]);
    assert_eq!(chosen["unknown"], json!(["new", 9999]));
    assert_eq!(ids(&ask(json!({"candidates": []}))), [0i64; 0]);

    let western = ask(json!({"genres": ["Western", "Musical"], "k": 1200}));
    let listed: HashSet<_> = ids(&western).into_iter().collect();
    let all = ask(json!({"k": 1200}));
    for movie in all["movies"].as_array().unwrap() {
        let genres = movie["genres"].as_str().unwrap();
        let wanted = genres.contains("Western") || genres.contains("Musical");
        assert_eq!(
            listed.contains(&movie["movie"].as_i64().unwrap()),
            wanted,
            "{movie}"
        );
    }
    // For nobody in particular as well.
    let asked = json!({"genres": ["Western"], "k": 5});
    let popular = client.ask("/recommend", &asked);
    let movies = popular["movies"].as_array().unwrap();
    assert_eq!(movies.len(), 5);
    assert!(movies
        .iter()
        .all(|m| m["genres"].as_str().unwrap().contains("Western")));
}

/// What speaks for a movie is what its logit loses without it.
#[test]
fn reasons_are_differences_of_logits() {
    let server = Server::start(trained(), &[]);
    let client = server.client();
    let answer = client.ask("/recommend", &json!({"user": 7, "k": 3, "explain": true}));
    for movie in answer["movies"].as_array().unwrap() {
        let why = movie["why"].as_array().unwrap();
        let names: HashSet<_> = why.iter().map(|r| r["feature"].as_str().unwrap()).collect();
        let expected = [
            "user",
            "gender",
            "age",
            "occupation",
            "movie",
            "genres",
            "words",
        ];
        assert_eq!((names, why.len()), (HashSet::from(expected), 7));
        let amounts: Vec<_> = why.iter().map(|r| r["logit"].as_f64().unwrap()).collect();
        assert!(amounts.is_sorted_by(|a, b| a >= b));
        for (feature, of) in [("genres", "movie_features"), ("age", "user_features")] {
            let reason = why.iter().find(|r| r["feature"] == feature).unwrap();
            let pair = json!({"user": 7, "movie": movie["movie"], of: {feature: []}});
            let (without, _) = score(&client, pair);
            let with = movie["probability"].as_f64().unwrap() as f32;
            let difference = logit(with) - logit(without);
            assert!(
                (difference - reason["logit"].as_f64().unwrap()).abs() < 1e-3,
                "{reason}"
            );
        }
        let genres = why.iter().find(|r| r["feature"] == "genres").unwrap();
        assert_eq!(genres["value"], movie["genres"]);
    }
    let plain = client.ask("/recommend", &json!({"user": 7, "k": 3}));
    assert!(plain["movies"][0].get("why").is_none());
}
