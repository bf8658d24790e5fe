//! The program `serve` as a process, asked by an HTTP client. Its model is one that the program `recommender` trains on
//! generated ratings.

use candle_core::{DType, Device, Tensor};
use candle_hashed_embedding_bag::{Checkpoint, HashedEmbeddingBagCollection};
use recommender::evaluate;
use recommender::saved::Recommender;
use safetensors::SafeTensors;
use serde_json::{json, Value};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};
use ureq::Agent;

/// Longest time that anything may take which is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

const SERVE: &str = env!("CARGO_BIN_EXE_serve");
const RECOMMENDER: &str = env!("CARGO_BIN_EXE_recommender");

/// The checkpoint of a model, trained once for all tests.
fn trained() -> &'static Path {
    static CHECKPOINT: OnceLock<PathBuf> = OnceLock::new();
    CHECKPOINT.get_or_init(|| {
        let checkpoint = Path::new(env!("CARGO_TARGET_TMPDIR")).join("serve.safetensors");
        train(&checkpoint, &[]);
        checkpoint
    })
}

/// Trains a model: too short for a good one, long enough for one whose scores differ.
fn train(checkpoint: &Path, flags: &[&str]) {
    let trained = Command::new(RECOMMENDER)
        .args(["--epochs", "1", "--batch-size", "20000", "--checkpoint"])
        .arg(checkpoint)
        .args(flags)
        .stdout(Stdio::null())
        .status();
    assert!(trained.unwrap().success());
}

/// A running server; killed when it goes out of scope.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(checkpoint: &Path, flags: &[&str]) -> Self {
        let server = Self::start_at("127.0.0.1:0", checkpoint, flags);
        assert!(
            server.address.starts_with("http://127.0.0.1:"),
            "{}",
            server.address
        );
        server
    }

    fn start_at(listen: &str, checkpoint: &Path, flags: &[&str]) -> Self {
        let mut process = command(listen, checkpoint, flags)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = process.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap();
        Self {
            address: address.to_owned(),
            process,
        }
    }

    fn client(&self) -> Client {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .proxy(None)
            .build();
        Client {
            agent: config.new_agent(),
            address: self.address.clone(),
        }
    }

    /// Waits for its end.
    fn ended(&mut self) -> ExitStatus {
        ended(&mut self.process)
    }

    #[cfg(unix)]
    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ended already, in some tests.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn command(listen: &str, checkpoint: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(SERVE);
    command
        .args(["--listen", listen, "--checkpoint"])
        .arg(checkpoint)
        .args(flags)
        .env("RUST_LOG", "off");
    command
}

fn ended(process: &mut Child) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = process.try_wait().unwrap() {
            return status;
        }
        assert!(start.elapsed() < PATIENCE, "the server does not end");
        thread::sleep(Duration::from_millis(5));
    }
}

/// One client, with connections of its own.
#[derive(Clone)]
struct Client {
    agent: Agent,
    address: String,
}

impl Client {
    fn get(&self, path: &str) -> String {
        let mut response = self
            .agent
            .get(format!("{}{path}", self.address))
            .call()
            .unwrap();
        assert_eq!(response.status(), 200, "{path}");
        response.body_mut().read_to_string().unwrap()
    }

    fn json(&self, path: &str) -> Value {
        serde_json::from_str(&self.get(path)).unwrap()
    }

    /// Status and answer, which is JSON whatever happens.
    fn send(&self, path: &str, body: impl Into<String>) -> (u16, Value) {
        let request = self
            .agent
            .post(format!("{}{path}", self.address))
            .header("content-type", "application/json");
        let mut response = request.send(body.into()).unwrap();
        assert_eq!(response.headers()["content-type"], "application/json");
        (
            response.status().as_u16(),
            response.body_mut().read_json().unwrap(),
        )
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.send(path, body.to_string())
    }

    /// The answer, where there is one.
    fn ask(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body);
        assert_eq!(status, 200, "{path} {answer}");
        answer
    }

    fn score(&self, pairs: &[(i64, i64)]) -> Vec<f32> {
        floats(&self.ask("/score", &score_body(pairs))["probabilities"])
    }

    /// The value of a sample in `/metrics`; of one that never was, zero.
    fn metric(&self, sample: &str) -> f64 {
        let text = self.get("/metrics");
        assert!(text.ends_with("# EOF\n"), "{text}");
        let mut lines = text.lines();
        lines
            .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '))
            .map_or(0.0, |value| value.parse().unwrap())
    }

    fn generation(&self) -> u64 {
        self.json("/healthz")["generation"].as_u64().unwrap()
    }
}

fn score_body(pairs: &[(i64, i64)]) -> Value {
    let pairs: Vec<_> = pairs
        .iter()
        .map(|(user, movie)| json!({"user": user, "movie": movie}))
        .collect();
    json!({ "pairs": pairs })
}

fn floats(values: &Value) -> Vec<f32> {
    let values = values.as_array().unwrap().iter();
    values.map(|value| value.as_f64().unwrap() as f32).collect()
}

fn logit(probability: f32) -> f64 {
    let probability = f64::from(probability);
    (probability / (1.0 - probability)).ln()
}

/// Sixty-four pairs; others for another `seed`.
fn pairs(seed: i64) -> Vec<(i64, i64)> {
    (0..64)
        .map(|i| {
            (
                1 + (seed * 131 + i * 37) % 2000,
                1 + (seed * 17 + i * 101) % 1200,
            )
        })
        .collect()
}

/// Puts the trained model, its last bias larger by `more`, in the place of the file, as training does it: by a rename.
fn replace(checkpoint: &Path, more: f32) {
    let mut bytes = std::fs::read(trained()).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let start = size_of::<u64>() + header + metadata.info("top.2.bias").unwrap().data_offsets.0;
    let bias = &mut bytes[start..start + size_of::<f32>()];
    let value = f32::from_le_bytes(bias.try_into().unwrap()) + more;
    bias.copy_from_slice(&value.to_le_bytes());
    let temporary = checkpoint.with_extension("new");
    std::fs::write(&temporary, bytes).unwrap();
    std::fs::rename(temporary, checkpoint).unwrap();
}

/// A copy of the checkpoint that a test may replace.
fn own_checkpoint() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("model.safetensors");
    replace(&checkpoint, 0.0);
    (folder, checkpoint)
}

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

/// In 8 bits, and in 4 bits of narrow rows: what is served is what the checkpoint holds.
#[test]
fn rounded_and_narrow_models_are_served() {
    let folder = tempfile::tempdir().unwrap();
    for flags in [
        &["--bits", "8"][..],
        &["--bits", "4", "--inner-dim", "8"],
        &["--compression", "1", "--inner-dim", "4"],
    ] {
        let path = folder.path().join("model.safetensors");
        train(&path, flags);
        let opened = Recommender::open(&path, &Device::Cpu).unwrap();
        let (model, catalog) = (&opened.model, &opened.catalog);
        let is_rounded =
            |(_, collection): (_, &HashedEmbeddingBagCollection)| collection.low_bit().is_some();
        let rounded = model.embeddings().collections().all(is_rounded);
        assert_eq!(rounded, flags.contains(&"--bits"), "{flags:?}");

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
    let (status, _) = client.post("/score", &score_body(&[(7, 1001)]));
    assert_eq!(status, 422);
    assert_eq!(client.json("/healthz")["movies"]["count"], 40);
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
        /recommend | {"user": "7"}               | 422 | user | invalid type: string
        /recommend | {"user": 7.5}               | 422 | user | invalid type: floating point `7.5`
        /recommend | {"user": 9223372036854775808} | 422 | user | invalid value
        /recommend | []                          | 422 |      | invalid type: sequence, expected an object
        /recommend | [1]                         | 422 |      | invalid type: sequence, expected an object
        /recommend | 1                           | 422 |      | invalid type: integer `1`, expected an object
        /recommend | {}                          | 422 |      | missing field `user`
        /recommend | {"user": 7, "n": 3}         | 422 | n    | unknown field `n`
        /recommend | {"user": 2001}              | 422 | user | no user 2001: the model knows 2000 users, with ids from 1 to 2000
        /recommend | {"user": 7, "k": 0}         | 422 | k    | must lie in 1..=1200, got 0
        /recommend | {"user": 7, "k": -1}        | 422 | k    | invalid value: integer `-1`
        /recommend | {"user": 7, "k": 1201}      | 422 | k    | must lie in 1..=1200, got 1201
        /score | {"pairs": [{"user": 1, "movie": 1}, [1, 1]]}                     | 422 | pairs[1]       | invalid type: sequence, expected an object
        /score | [[]]                                                             | 422 |                | invalid type: sequence, expected an object
        /score | {"pairs": [{"user": 1, "movie": 1}, {"user": 1}]}                | 422 | pairs[1]       | missing field `movie`
        /score | {"pairs": [{"user": 1, "movie": 1}, {"user": 1, "movie": null}]} | 422 | pairs[1].movie | invalid type: null
        /score | {"pairs": [{"user": 1, "movie": 0}]}                             | 422 | pairs[0].movie | no movie 0: the model knows 1200 movies
        /score | {"pairs": [{"user": 1, "movie": 1}, {"user": -5, "movie": 1}]}   | 422 | pairs[1].user  | no user -5
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

#[cfg(unix)]
#[test]
fn sigterm_finishes_what_is_in_flight() {
    let mut server = Server::start(trained(), &["--batch-deadline-ms", "1000"]);
    let client = server.client();
    let waiting = thread::spawn({
        let client = server.client();
        move || client.score(&pairs(1)).len()
    });
    while client.metric("queued_rows") == 0.0 {
        assert!(!waiting.is_finished());
    }
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(waiting.join().unwrap(), 64);
    assert!(server.ended().success());
    assert!(client
        .agent
        .get(format!("{}/healthz", client.address))
        .call()
        .is_err());
}

/// A connection on which a test says what it likes.
struct Raw(BufReader<TcpStream>);

impl Raw {
    fn open(server: &Server) -> Self {
        let address = server.address.strip_prefix("http://").unwrap();
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// The next answer: its status and its body.
    fn answer(&mut self) -> (u16, String) {
        let (mut status, mut length) = (0, 0);
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            let line = line.trim().to_ascii_lowercase();
            if let Some(rest) = line.strip_prefix("http/1.1 ") {
                status = rest[..3].parse().unwrap();
            } else if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.parse().unwrap();
            } else if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
        (status, String::from_utf8(body).unwrap())
    }

    /// Whether the server ends the connection without another word.
    fn is_ended(&mut self) -> bool {
        let mut rest = Vec::new();
        // A reset where something of ours was not read.
        self.0.read_to_end(&mut rest).unwrap_or_default() == 0
    }
}

/// The head of a request for scores, with a body of `length` bytes.
fn score_head(length: usize) -> String {
    format!("POST /score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n")
}

#[test]
fn a_body_that_is_announced_too_long_is_not_waited_for() {
    let server = Server::start(trained(), &["--max-body-bytes", "8192"]);
    let mut raw = Raw::open(&server);
    let start = Instant::now();
    raw.send(&score_head(8193));
    let (status, body) = raw.answer();
    assert_eq!(status, 413, "{body}");
    assert!(body.contains("longer than 8192 bytes"), "{body}");
    assert!(raw.is_ended());
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn half_a_request_keeps_no_connection() {
    let flags = ["--read-timeout-seconds", "1", "--max-connections", "3"];
    let server = Server::start(trained(), &flags);
    let (mut head, mut body) = (Raw::open(&server), Raw::open(&server));
    head.send("POST /score HTTP/1.1\r\nhost:");
    body.send(&format!("{}{{", score_head(10)));
    // With both there is room for one more, and then for none; all of them are answered in the end.
    let clients: Vec<_> = (0..4)
        .map(|seed| {
            let client = server.client();
            thread::spawn(move || client.score(&pairs(seed)).len())
        })
        .collect();
    for client in clients {
        assert_eq!(client.join().unwrap(), 64);
    }
    let (status, said) = body.answer();
    assert_eq!(status, 408, "{said}");
    assert!(said.contains("did not arrive within 1 s"), "{said}");
    assert!(body.is_ended() && head.is_ended());
}

/// Neither does a time limit hit a client that asks again, nor one whose answer takes longer.
#[test]
fn connections_are_used_again() {
    let flags = ["--read-timeout-seconds", "1", "--batch-deadline-ms", "1500"];
    let server = Server::start(trained(), &flags);
    let mut raw = Raw::open(&server);
    let asked = score_body(&pairs(1)).to_string();
    for _ in 0..2 {
        raw.send(&score_head(asked.len()));
        thread::sleep(Duration::from_millis(600));
        raw.send(&asked);
        let (status, body) = raw.answer();
        assert_eq!(status, 200, "{body}");
        thread::sleep(Duration::from_millis(600));
    }
    assert!(raw.is_ended(), "an idle connection ends");
}

#[test]
fn it_listens_on_a_name() {
    let server = Server::start_at("localhost:0", trained(), &[]);
    assert_eq!(server.client().json("/healthz")["status"], "ok");
}

/// Nobody need read what it says, on either output.
#[test]
fn closed_outputs_do_not_end_it() {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut process = command(&format!("127.0.0.1:{port}"), trained(), &[])
        .env("RUST_LOG", "debug")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop((process.stdout.take(), process.stderr.take()));
    let server = Server {
        process,
        address: format!("http://127.0.0.1:{port}"),
    };
    let (client, start) = (server.client(), Instant::now());
    while client
        .agent
        .get(format!("{}/healthz", server.address))
        .call()
        .is_err()
    {
        assert!(start.elapsed() < PATIENCE, "it does not answer");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(client.score(&pairs(1)).len(), 64);
}

/// A client that never ends its request does not keep the server alive.
#[cfg(unix)]
#[test]
fn sigterm_does_not_wait_for_ever() {
    let mut server = Server::start(trained(), &["--drain-seconds", "0"]);
    let mut raw = Raw::open(&server);
    raw.send(&format!("{}{{", score_head(10)));
    // Answered on another connection: the server has seen the first one.
    server.client().get("/healthz");
    server.signal(rustix::process::Signal::TERM);
    assert!(!server.ended().success());
}

#[test]
fn it_does_not_start_on_what_it_cannot_serve() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("model.safetensors");
    for (checkpoint, flags, said) in [
        (
            missing.as_path(),
            &["--max-body-bytes", "1"][..],
            "cannot open the checkpoint",
        ),
        (trained(), &["--data", "ml"], "leave out --data"),
        (
            trained(),
            &["--batch-rows", "10", "--queue-rows", "9"],
            "--batch-rows must lie in 1..=9",
        ),
    ] {
        let mut process = command("127.0.0.1:0", checkpoint, flags)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(ended(&mut process).code(), Some(1));
        let mut stderr = String::new();
        process.stderr.unwrap().read_to_string(&mut stderr).unwrap();
        assert!(stderr.contains(said), "{stderr}");
    }
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
