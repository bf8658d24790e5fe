//! Requests are computed together, as far as there is room.

use std::thread;

use serde_json::{json, Value};

use crate::support::*;

#[test]
fn concurrent_requests_are_computed_together() {
    let server = Server::start(trained(), &["--batch-deadline-ms", "250"]);
    let client = server.client();
    let alone: Vec<_> = (0..8).map(|seed| client.score(&pairs(seed)[..8])).collect();
    let before = (
        client.metric("batch_requests_count"),
        client.metric("batch_rows_sum"),
    );
    assert_eq!(before, (8.0, 64.0));
    let vector = json!({"table": "movie", "indices": [1, 2, 3], "offsets": [0, 1]});
    let vectors = client.ask("/embed", &vector);
    thread::scope(|scope| {
        for (seed, alone) in (0..).zip(&alone) {
            let (client, vector, vectors) = (server.client(), &vector, &vectors);
            scope.spawn(move || {
                let together = client.score(&pairs(seed)[..8]);
                assert!(together
                    .iter()
                    .zip(alone)
                    .all(|(a, b)| (a - b).abs() < 1e-6));
                assert_eq!(client.ask("/embed", vector), *vectors);
            });
        }
    });
    // One batch of scores and one of embeddings, if the clients were all in time.
    let batches = client.metric("batch_requests_count") - before.0 - 1.0;
    assert!((2.0..8.0).contains(&batches), "{batches} batches");
    assert_eq!(client.metric("batch_requests_sum"), 8.0 + 1.0 + 16.0);
    assert_eq!(
        client.metric("batch_rows_sum"),
        64.0 + 3.0 + 8.0 * (8.0 + 3.0)
    );
}

#[test]
fn a_full_queue_answers_503() {
    let flags = [
        "--queue-rows",
        "64",
        "--batch-rows",
        "64",
        "--batch-deadline-ms",
        "1000",
    ];
    let server = Server::start(trained(), &flags);
    let client = server.client();
    thread::scope(|scope| {
        // It waits for others, and its sixty-three rows leave room for one.
        let first = server.client();
        let waiting = scope.spawn(move || first.score(&pairs(1)[..63]).len());
        while client.metric("queued_rows") == 0.0 {
            assert!(!waiting.is_finished());
        }
        let request = client.agent.post(format!("{}/score", client.address));
        let mut response = request.send_json(score_body(&pairs(2)[..2])).unwrap();
        let answer: Value = response.body_mut().read_json().unwrap();
        assert_eq!(
            (response.status().as_u16(), &answer["error"]),
            (503, &json!("the queue is full"))
        );
        assert_eq!(response.headers()["retry-after"], "1");
        assert_eq!(client.score(&pairs(2)[..1]).len(), 1);
        assert_eq!(waiting.join().unwrap(), 63);
    });
    assert_eq!(client.metric("queued_rows"), 0.0);
    assert_eq!(client.score(&pairs(2)).len(), 64);
}
