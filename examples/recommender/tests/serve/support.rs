//! A server of a model that `recommender` trains, and clients of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use serde_json::{json, Value};
use ureq::Agent;

/// Longest time that anything may take which is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const SERVE: &str = env!("CARGO_BIN_EXE_serve");
pub const RECOMMENDER: &str = env!("CARGO_BIN_EXE_recommender");

/// The checkpoint of a model, trained once for all tests.
pub fn trained() -> &'static Path {
    static CHECKPOINT: OnceLock<PathBuf> = OnceLock::new();
    CHECKPOINT.get_or_init(|| {
        let checkpoint = Path::new(env!("CARGO_TARGET_TMPDIR")).join("serve.safetensors");
        train(&checkpoint, &[]);
        checkpoint
    })
}

/// Trains a model: too short for a good one, long enough for one whose scores differ.
pub fn train(checkpoint: &Path, flags: &[&str]) {
    let trained = Command::new(RECOMMENDER)
        .args(["--epochs", "1", "--batch-size", "20000", "--checkpoint"])
        .arg(checkpoint)
        .args(flags)
        .stdout(Stdio::null())
        .status();
    assert!(trained.unwrap().success());
}

/// A running server; killed when it goes out of scope.
pub struct Server {
    pub process: Child,
    pub address: String,
}

impl Server {
    pub fn start(checkpoint: &Path, flags: &[&str]) -> Self {
        let server = Self::start_at("127.0.0.1:0", checkpoint, flags);
        assert!(
            server.address.starts_with("http://127.0.0.1:"),
            "{}",
            server.address
        );
        server
    }

    pub fn start_at(listen: &str, checkpoint: &Path, flags: &[&str]) -> Self {
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

    pub fn client(&self) -> Client {
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
    pub fn ended(&mut self) -> ExitStatus {
        ended(&mut self.process)
    }

    #[cfg(unix)]
    pub fn signal(&self, signal: rustix::process::Signal) {
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

pub fn command(listen: &str, checkpoint: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(SERVE);
    command
        .args(["--listen", listen, "--checkpoint"])
        .arg(checkpoint)
        .args(flags)
        .env("RUST_LOG", "off");
    command
}

pub fn ended(process: &mut Child) -> ExitStatus {
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
pub struct Client {
    pub agent: Agent,
    pub address: String,
}

impl Client {
    pub fn get(&self, path: &str) -> String {
        let mut response = self
            .agent
            .get(format!("{}{path}", self.address))
            .call()
            .unwrap();
        assert_eq!(response.status(), 200, "{path}");
        response.body_mut().read_to_string().unwrap()
    }

    pub fn json(&self, path: &str) -> Value {
        serde_json::from_str(&self.get(path)).unwrap()
    }

    /// Status and answer, which is JSON whatever happens.
    pub fn send(&self, path: &str, body: impl Into<String>) -> (u16, Value) {
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

    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.send(path, body.to_string())
    }

    /// The answer, where there is one.
    pub fn ask(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body);
        assert_eq!(status, 200, "{path} {answer}");
        answer
    }

    pub fn score(&self, pairs: &[(i64, i64)]) -> Vec<f32> {
        floats(&self.ask("/score", &score_body(pairs))["probabilities"])
    }

    /// The value of a sample in `/metrics`; of one that never was, zero.
    pub fn metric(&self, sample: &str) -> f64 {
        let text = self.get("/metrics");
        assert!(text.ends_with("# EOF\n"), "{text}");
        let mut lines = text.lines();
        lines
            .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '))
            .map_or(0.0, |value| value.parse().unwrap())
    }

    pub fn generation(&self) -> u64 {
        self.json("/healthz")["generation"].as_u64().unwrap()
    }
}

pub fn score_body(pairs: &[(i64, i64)]) -> Value {
    let pairs: Vec<_> = pairs
        .iter()
        .map(|(user, movie)| json!({"user": user, "movie": movie}))
        .collect();
    json!({ "pairs": pairs })
}

pub fn floats(values: &Value) -> Vec<f32> {
    let values = values.as_array().unwrap().iter();
    values.map(|value| value.as_f64().unwrap() as f32).collect()
}

pub fn logit(probability: f32) -> f64 {
    let probability = f64::from(probability);
    (probability / (1.0 - probability)).ln()
}

/// Sixty-four pairs; others for another `seed`.
pub fn pairs(seed: i64) -> Vec<(i64, i64)> {
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
pub fn replace(checkpoint: &Path, more: f32) {
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
pub fn own_checkpoint() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("model.safetensors");
    replace(&checkpoint, 0.0);
    (folder, checkpoint)
}

/// A connection on which a test says what it likes.
pub struct Raw(BufReader<TcpStream>);

impl Raw {
    pub fn open(server: &Server) -> Self {
        let address = server.address.strip_prefix("http://").unwrap();
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    pub fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// The next answer: its status and its body.
    pub fn answer(&mut self) -> (u16, String) {
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
    pub fn is_ended(&mut self) -> bool {
        let mut rest = Vec::new();
        // A reset where something of ours was not read.
        self.0.read_to_end(&mut rest).unwrap_or_default() == 0
    }
}

/// The head of a request for scores, with a body of `length` bytes.
pub fn score_head(length: usize) -> String {
    format!("POST /score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n")
}

/// Runs `recommender` and returns what it prints.
#[track_caller]
pub fn recommender(arguments: &[&str]) -> String {
    let output = Command::new(RECOMMENDER).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
