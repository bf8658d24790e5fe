//! Models of clicks.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{json, Map, Value};

use crate::support::*;

struct Trained {
    log: PathBuf,
    checkpoint: PathBuf,
}

/// A model of a generated log, trained once for all tests.
fn trained_on_clicks() -> &'static Trained {
    static TRAINED: OnceLock<Trained> = OnceLock::new();
    TRAINED.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let trained = Trained {
            log: folder.join("clicks.tsv"),
            checkpoint: folder.join("clicks.safetensors"),
        };
        let (log, checkpoint) = (
            trained.log.to_str().unwrap(),
            trained.checkpoint.to_str().unwrap(),
        );
        recommender(&["generate", log, "--lines", "2000"]);
        let rows = ["--rows-per-field", "500", "--format", "criteo"];
        recommender(&[&["--data", log, "--checkpoint", checkpoint][..], &rows].concat());
        trained
    })
}

/// The fields of a line by name, empty ones left out.
fn fields(line: &str) -> Value {
    let names = (1..=13).map(|i| format!("I{i}"));
    let names = names.chain((1..=26).map(|i| format!("C{i}")));
    let fields = names.zip(line.split('\t').skip(1));
    let present = fields.filter(|(_, value)| !value.is_empty());
    Value::Object(
        present
            .map(|(name, value)| (name, json!(value)))
            .collect::<Map<_, _>>(),
    )
}

#[test]
fn rows_of_fields_are_scored_as_lines_are() {
    let Trained { log, checkpoint } = trained_on_clicks();
    let server = Server::start(checkpoint, &[]);
    let client = server.client();
    let text = fs::read_to_string(log).unwrap();
    let rows: Vec<_> = text.lines().take(100).map(fields).collect();
    let answer = client.ask("/predict", &json!({ "rows": rows }));
    let served = floats(&answer["probabilities"]);
    let scored = recommender(&[
        "score",
        log.to_str().unwrap(),
        "--checkpoint",
        checkpoint.to_str().unwrap(),
    ]);
    let scored: Vec<f32> = scored.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(scored.len(), 2000);
    assert_eq!(served.len(), 100);
    let same = served
        .iter()
        .zip(&scored)
        .all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(same, "{served:?} {scored:?}");
    let spread = scored
        .iter()
        .fold(0f32, |most, p| most.max((p - scored[0]).abs()));
    assert!(spread > 0.05, "scores differ");

    // Integers as numbers; null and nothing are missing.
    let one = json!({"rows": [{"I1": 5, "C1": "68fd1e64", "I2": null}, {"I1": "5", "C1": "68fd1e64", "C2": ""}]});
    let answer = client.ask("/predict", &one);
    assert_eq!(answer["probabilities"][0], answer["probabilities"][1]);
    assert_eq!(
        client.ask("/predict", &json!({"rows": []}))["probabilities"],
        json!([])
    );
}

#[test]
fn clicks_are_refused_by_field() {
    let server = Server::start(&trained_on_clicks().checkpoint, &["--batch-rows", "3"]);
    let client = server.client();
    for (body, field, said) in [
        (
            json!({"rows": [{}, {"I14": 1}]}),
            "rows[1].I14",
            "no such field, only I1 to I13 and C1 to C26",
        ),
        (
            json!({"rows": [{"label": 1}]}),
            "rows[0].label",
            "no such field",
        ),
        (
            json!({"rows": [{"I1": "1.5"}]}),
            "rows[0].I1",
            "is not a 64-bit integer",
        ),
        (
            json!({"rows": [{"I1": 1.5}]}),
            "rows[0].I1",
            "invalid type: floating point `1.5`",
        ),
        (
            json!({"rows": [{"C3": "xyz"}]}),
            "rows[0].C3",
            "is not hexadecimal",
        ),
        (
            json!({"rows": [{"C3": 12}]}),
            "rows[0].C3",
            "must be text of hexadecimal digits",
        ),
        (json!({"rows": [[]]}), "rows[0]", "expected an object"),
        (
            json!({"rows": [{}, {}, {}, {}]}),
            "rows",
            "must hold at most 3 values, got 4",
        ),
    ] {
        let (status, answer) = client.post("/predict", &body);
        assert_eq!(
            (status, &answer["field"]),
            (422, &json!(field)),
            "{body} {answer}"
        );
        assert!(answer["error"].as_str().unwrap().contains(said), "{answer}");
    }
    // What the other kind of model answers.
    let (status, answer) = client.post("/recommend", &json!({"user": 7}));
    assert_eq!(status, 404);
    assert_eq!(answer["error"], "the model is one of clicks: ask /predict");
    let (status, _) = client.post("/score", &json!({"pairs": []}));
    assert_eq!(status, 404);
    let embedded = client.ask(
        "/embed",
        &json!({"table": "C1", "indices": [0, 499], "offsets": [0]}),
    );
    assert_eq!(embedded["vectors"].as_array().unwrap().len(), 1);
    let health = client.json("/healthz");
    assert_eq!(
        (&health["kind"], health.get("movies")),
        (&json!("clicks"), None)
    );

    let ratings = Server::start(trained(), &[]);
    let (status, answer) = ratings.client().post("/predict", &json!({"rows": [{}]}));
    assert_eq!(status, 404);
    assert_eq!(
        answer["error"],
        "the model is one of ratings: ask /recommend and /score"
    );
}
