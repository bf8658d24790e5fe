//! What is asked and answered, and what is refused.

use std::process::Command;

use candle_core::{DType, Device, Tensor};
use candle_hashed_embedding_bag::Checkpoint;
use serde_json::{json, Value};

use crate::support::*;

#[test]
fn it_recommends_what_the_recommender_does() {
    let server = Server::start(trained(), &[]);
    let client = server.client();
    let printed = Command::new(RECOMMENDER)
        .args(["recommend", "--user", "7", "--checkpoint"])
        .arg(trained())
        .output()
        .unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    let answer = client.ask("/recommend", &json!({"user": 7}));
    assert_eq!(answer["user"], 7);
    let movies = answer["movies"].as_array().unwrap();
    let rows: Vec<Vec<&str>> = printed
        .lines()
        .map(|line| line.split(['│', '┆']).map(str::trim).collect())
        .filter(|cells: &Vec<_>| cells.len() > 4 && cells[1].parse::<usize>().is_ok())
        .collect();
    assert_eq!((rows.len(), movies.len()), (10, 10), "{printed}");
    for (row, movie) in rows.iter().zip(movies) {
        let probability = movie["probability"].as_f64().unwrap();
        let said = [
            movie["title"].as_str().unwrap(),
            movie["genres"].as_str().unwrap(),
            &format!("{:.1} %", 100.0 * probability),
        ];
        assert_eq!(row[2..5], said);
    }

    // As many as asked for, and the score of each is what /score says.
    let answer = client.ask("/recommend", &json!({"user": 7, "k": 200}));
    let movies = answer["movies"].as_array().unwrap();
    assert_eq!(movies.len(), 200);
    let asked: Vec<_> = movies
        .iter()
        .map(|movie| (7, movie["movie"].as_i64().unwrap()))
        .collect();
    let listed: Vec<_> = movies
        .iter()
        .map(|movie| movie["probability"].as_f64().unwrap() as f32)
        .collect();
    assert!(listed.is_sorted_by(|a, b| a >= b));
    let scored = client.score(&asked);
    assert!(scored
        .iter()
        .zip(&listed)
        .all(|(a, b)| (a - b).abs() < 1e-6));

    // All of the movies but those that the user has rated.
    let all = client.ask("/recommend", &json!({"user": 7, "k": 1200}));
    let checkpoint = Checkpoint::open(trained()).unwrap();
    let ids = |name: &str| -> Vec<i64> {
        let tensor = checkpoint.tensor(name, &Device::Cpu).unwrap();
        tensor.to_dtype(DType::I64).unwrap().to_vec1().unwrap()
    };
    let (seen, bags, movie_ids) = (ids("seen.indices"), ids("seen.offsets"), ids("movie_ids"));
    let row = ids("user_ids").iter().position(|&id| id == 7).unwrap();
    let seen = &seen[bags[row] as usize..bags[row + 1] as usize];
    let mut expected: Vec<i64> = (0..)
        .zip(movie_ids)
        .filter(|(row, _)| !seen.contains(row))
        .map(|(_, id)| id)
        .collect();
    let movies = all["movies"].as_array().unwrap().iter();
    let mut listed: Vec<_> = movies
        .map(|movie| movie["movie"].as_i64().unwrap())
        .collect();
    listed.sort_unstable();
    expected.sort_unstable();
    assert!(!seen.is_empty());
    assert_eq!(listed, expected);
}

#[test]
fn embeddings_are_those_of_the_layer() {
    let server = Server::start(trained(), &[]);
    let client = server.client();
    let checkpoint = Checkpoint::open(trained()).unwrap();
    for (table, indices, starts) in [
        ("movie", vec![5i64, 0, 1199, 5], vec![0i64, 1, 1, 3]),
        ("genres", vec![], vec![0, 0]),
        ("words", vec![3, 4, 5], vec![0]),
        ("user", vec![], vec![]),
    ] {
        let asked = json!({"table": table, "indices": indices, "offsets": starts});
        let answer = client.ask("/embed", &asked);
        let vectors: Vec<_> = answer["vectors"]
            .as_array()
            .unwrap()
            .iter()
            .map(floats)
            .collect();
        let layer = checkpoint
            .collections()
            .find_map(|(name, _)| {
                let collection =
                    checkpoint.hashed_embedding_bag_collection(name, DType::F32, &Device::Cpu);
                collection.unwrap().table(table).ok()
            })
            .unwrap();
        assert!(layer.config().include_last_offset);
        let offsets = [&starts[..], &[indices.len() as i64]].concat();
        let expected = layer
            .forward_with_offsets(
                &Tensor::new(indices, &Device::Cpu).unwrap(),
                &Tensor::new(offsets, &Device::Cpu).unwrap(),
            )
            .unwrap();
        assert_eq!(vectors, expected.to_vec2::<f32>().unwrap(), "{table}");
    }
}

/// Refusals name the field, and none of them is in the way of the next request.
#[test]
fn bad_input_is_refused_by_field() {
    let flags = ["--max-body-bytes", "8192", "--batch-rows", "100"];
    let server = Server::start(trained(), &flags);
    let client = server.client();
    // Path, body, status, field, what is said.
    let refusals = r#"
        /recommend | {"user": 7                  | 400 |      | EOF while parsing an object
        /recommend |                             | 400 |      | EOF while parsing
        /recommend | {"user": 7} x               | 400 |      | trailing characters
        /recommend | {"user": 1e999}             | 400 | user | number out of range
        /recommend | {"user": [7]}               | 422 | user | invalid type: sequence, expected an id: an integer or text
        /recommend | {"user": 7.5}               | 422 | user | invalid type: floating point `7.5`
        /recommend | {"user": 9223372036854775808} | 422 | user | invalid value
        /recommend | []                          | 422 |      | invalid type: sequence, expected an object
        /recommend | [1]                         | 422 |      | invalid type: sequence, expected an object
        /recommend | 1                           | 422 |      | invalid type: integer `1`, expected an object
        /recommend | {"user": 7, "features": {"shoe": 3}}    | 422 | features.shoe   | no such feature: a user has gender, age, occupation
        /recommend | {"user": 7, "features": {"gender": "X"}} | 422 | features.gender | no value `X`, only F, M
        /recommend | {"user": 7, "features": {"gender": {}}} | 422 | features.gender | a value must be text, an integer, or a list of them
        /recommend | {"user": 7, "genres": ["War", "Pop"]}   | 422 | genres[0]       | no genre War, only Action
        /recommend | {"user": 7, "items": [{"movie": 5, "features": {"genres": "Drama"}}]} | 422 | items[0].movie | the catalogue has movie 5 already
        /recommend | {"user": 7, "items": [{"movie": "x", "features": {}}]}                | 422 | items[0].features | must tell something of the movie
        /recommend | {"user": 7, "items": [{"movie": "x", "features": {"genres": "Pop"}}]} | 422 | items[0].features.genres | no value `Pop`
        /recommend | {"user": 7, "n": 3}         | 422 | n    | unknown field `n`
        /recommend | {"user": 7, "k": 0}         | 422 | k    | must lie in 1..=1200, got 0
        /recommend | {"user": 7, "k": -1}        | 422 | k    | invalid value: integer `-1`
        /recommend | {"user": 7, "k": 1201}      | 422 | k    | must lie in 1..=1200, got 1201
        /score | {"pairs": [{"user": 1, "movie": 1}, [1, 1]]}                     | 422 | pairs[1]       | invalid type: sequence, expected an object
        /score | [[]]                                                             | 422 |                | invalid type: sequence, expected an object
        /score | {"pairs": [{"user": 1, "movie": 1}, {"user": 1}]}                | 422 | pairs[1]       | missing field `movie`
        /score | {"pairs": [{"user": 1, "movie": 1}, {"user": 1, "movie": null}]} | 422 | pairs[1].movie | invalid type: null
        /score | {"pairs": [{"user": 1, "movie": 1, "user_features": {"genres": "Drama"}}]} | 422 | pairs[0].user_features.genres | no such feature: a user has
        /embed | {"table": "x", "indices": [], "offsets": []}                | 422 | table      | no table x, only 
        /embed | {"table": "movie", "indices": [0, 1200], "offsets": [0]}    | 422 | indices[1] | must lie in 0..=1199, got 1200
        /embed | {"table": "movie", "indices": [-1], "offsets": [0]}         | 422 | indices[0] | must lie in 0..=1199, got -1
        /embed | {"table": "movie", "indices": [1], "offsets": [1]}          | 422 | offsets[0] | must lie in 0..=0, got 1
        /embed | {"table": "movie", "indices": [1], "offsets": [0, 2]}       | 422 | offsets[1] | must lie in 0..=1, got 2
        /embed | {"table": "movie", "indices": [1, 2], "offsets": [0, 2, 1]} | 422 | offsets[2] | must lie in 2..=2, got 1
        /embed | {"table": "movie", "indices": [1], "offsets": []}           | 422 | offsets    | must start a bag for the 1 indices
        /embed | {"table": "movie", "indices": 1, "offsets": []}             | 422 | indices    | invalid type: integer `1`, expected a sequence
        /nowhere | {} | 404 | | no route /nowhere
        /healthz | {} | 405 | | /healthz does not take POST"#;
    for refusal in refusals.lines().filter(|line| !line.is_empty()) {
        let [path, body, status, field, said] = refusal
            .split('|')
            .map(str::trim)
            .collect::<Vec<_>>()
            .try_into()
            .unwrap();
        let (got, answer) = client.send(path, body);
        assert_eq!(got.to_string(), status, "{refusal}\n{answer}");
        let error = answer["error"].as_str().unwrap();
        assert!(error.contains(said), "{refusal}\n{answer}");
        let named = answer["field"].as_str().unwrap_or_default();
        assert_eq!(named, field, "{refusal}\n{answer}");
    }
    let (status, answer) = client.post("/score", &score_body(&[(1, 1); 101]));
    assert_eq!((status, &answer["field"]), (422, &json!("pairs")));
    assert_eq!(answer["error"], "must hold at most 100 values, got 101");
    let (status, answer) = client.send("/score", format!(r#"{{"pairs": [{}]}}"#, " ".repeat(8192)));
    assert_eq!(status, 413, "{answer}");
    let form = client.agent.post(format!("{}/score", client.address));
    let mut response = form
        .header("content-type", "text/plain")
        .send(r#"{"pairs": []}"#)
        .unwrap();
    let answer: Value = response.body_mut().read_json().unwrap();
    assert_eq!(response.status(), 415, "{answer}");

    assert!(client.score(&[]).is_empty());
    assert_eq!(client.score(&[(1, 1); 100]).len(), 100);
    // A byte order mark, as Windows puts it before UTF-8.
    let (status, answer) = client.send("/score", "\u{feff}{\"pairs\": []}");
    assert_eq!(status, 200, "{answer}");
    // More movies than --batch-rows.
    let answer = client.ask("/recommend", &json!({"user": 7, "k": 500}));
    assert_eq!(answer["movies"].as_array().unwrap().len(), 500);
    let refused = r#"http_requests_total{route="/embed",status="422"}"#;
    assert_eq!(client.metric(refused), 8.0);
}

#[test]
fn there_is_a_page() {
    let server = Server::start(trained(), &[]);
    let client = server.client();
    assert!(client.get("/").contains("<title>Recommendations</title>"));
    let health = client.json("/healthz");
    assert_eq!(health["status"], "ok");
    assert_eq!(
        health["users"],
        json!({"count": 2000, "first_id": 1, "last_id": 2000})
    );
    let tables = health["tables"].as_array().unwrap();
    assert!(tables.contains(&json!({"name": "movie", "num_embeddings": 1200, "embedding_dim": 16})));
}
