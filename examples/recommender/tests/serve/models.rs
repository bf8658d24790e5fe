//! Models of all kinds: rounded, narrow, of interactions.

use std::collections::BTreeSet;

use candle_core::{Device, Tensor};
use candle_hashed_embedding_bag::HashedEmbeddingBagCollection;
use recommender::evaluate;
use recommender::saved::Recommender;
use serde_json::json;

use crate::support::*;

/// In 8 bits, and in 4 bits of narrow rows: what is served is what the checkpoint holds.
#[test]
fn rounded_and_narrow_models_are_served() {
    let folder = tempfile::tempdir().unwrap();
    for flags in [
        &["--bits", "8"][..],
        &["--bits", "4", "--inner-dim", "8"],
        &["--bits", "32", "--inner-dim", "4"],
    ] {
        let path = folder.path().join("model.safetensors");
        train(&path, flags);
        let opened = Recommender::open(&path, &Device::Cpu).unwrap();
        let (model, catalog) = (&opened.model, &opened.catalog);
        let is_rounded =
            |(_, collection): (_, &HashedEmbeddingBagCollection)| collection.low_bit().is_some();
        let rounded = model.embeddings().collections().all(is_rounded);
        assert_eq!(rounded, !flags.contains(&"32"), "{flags:?}");

        let server = Server::start(&path, &[]);
        let client = server.client();
        let asked = pairs(3);
        let row = |ids: &[i64], id| ids.binary_search(&id).unwrap() as u32;
        let rows: Vec<_> = asked
            .iter()
            .map(|&(user, movie)| {
                (
                    row(&catalog.users.ids, user),
                    row(&catalog.movies.ids, movie),
                )
            })
            .collect();
        let expected = evaluate::logits(model, catalog, &rows).unwrap();
        for (probability, logit) in client.score(&asked).into_iter().zip(expected) {
            let expected = evaluate::sigmoid(logit) as f32;
            assert!((probability - expected).abs() < 1e-6, "{flags:?}");
        }
        let best = client.ask("/recommend", &json!({"user": 7, "k": 1}));
        let best = &best["movies"][0];
        let (movie, probability) = (
            best["movie"].as_i64().unwrap(),
            best["probability"].as_f64(),
        );
        let scored = client.score(&[(7, movie)])[0];
        assert!(
            (f64::from(scored) - probability.unwrap()).abs() < 1e-6,
            "{flags:?}"
        );

        let tables = client.json("/healthz")["tables"]
            .as_array()
            .unwrap()
            .clone();
        assert!(
            tables.iter().all(|table| table["embedding_dim"] == 16),
            "{tables:?}"
        );
        for table in model.embeddings().tables().unwrap() {
            let (indices, offsets) = (vec![0i64, 1, 0], vec![0i64, 1]);
            let asked = json!({"table": table.name, "indices": indices, "offsets": offsets});
            let answer = client.ask("/embed", &asked);
            let vectors = answer["vectors"].as_array().unwrap().iter().map(floats);
            let indices = Tensor::new(indices, &Device::Cpu).unwrap();
            let offsets = Tensor::new(&[0i64, 1, 3], &Device::Cpu).unwrap();
            let expected = table.forward(&indices, &offsets).unwrap();
            assert_eq!(
                vectors.collect::<Vec<_>>(),
                expected.to_vec2::<f32>().unwrap()
            );
        }
    }
}

/// Items are the movies, without titles.
#[test]
fn a_model_of_interactions_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let (path, file) = (folder.path().join("model"), folder.path().join("pairs"));
    let line = |user: i64| {
        let items: BTreeSet<i64> = (0..9).map(|i| 1000 + 2 * ((user + i * i) % 40)).collect();
        let items = items.iter().map(|item| format!(" {item}"));
        format!("{user}{}\n", items.collect::<String>())
    };
    std::fs::write(&file, (1..60).map(line).collect::<String>()).unwrap();
    let data = file.to_str().unwrap();
    train(
        &path,
        &[
            "--data",
            data,
            "--format",
            "interactions",
            "--compression",
            "1/2",
        ],
    );
    let server = Server::start(&path, &[]);
    let client = server.client();
    let answer = client.ask("/recommend", &json!({"user": 7, "k": 40}));
    let own = line(7);
    let own: Vec<_> = own.split_whitespace().skip(1).collect();
    let movies = answer["movies"].as_array().unwrap();
    assert_eq!(movies.len(), 40 - own.len());
    for movie in movies {
        assert!(
            !own.contains(&&*movie["movie"].to_string()) && movie["title"].is_null(),
            "{movie}"
        );
    }
    // As of any catalogue, nothing is known of an item that is not in it.
    let answer = client.ask("/score", &score_body(&[(7, 1001)]));
    assert_eq!(answer["basis"][0], "popularity");
    assert_eq!(client.json("/healthz")["movies"]["count"], 40);
}
