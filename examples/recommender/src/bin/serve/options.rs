//! The command line.

use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use anyhow::{ensure, Result};
use clap::{Parser, ValueEnum};

use crate::batcher::Limits;
use crate::input::BodyLimits;
use recommender::options::Common;
use recommender::threads;

/// Serves a trained recommender over HTTP.
///
/// The checkpoint is read again, and the model replaced, at SIGHUP or POST /reload. SIGTERM finishes what is in flight.
/// The log goes to standard error; RUST_LOG=debug shows every request. Options may come from the environment.
#[derive(Parser)]
#[command(name = "serve", version)]
pub struct Options {
    #[command(flatten)]
    pub model: Common,
    /// Address or name, and port, to listen on; port 0 takes a free one. The first line of standard output says which.
    #[arg(
        long,
        default_value = "127.0.0.1:8080",
        value_name = "HOST:PORT",
        env = "SERVE_LISTEN"
    )]
    pub listen: String,
    /// Most rows computed at once, and most in one request. A row is a pair to score, or an index or a bag to embed.
    #[arg(
        long,
        default_value_t = 4096,
        value_name = "ROWS",
        env = "SERVE_BATCH_ROWS"
    )]
    batch_rows: u32,
    /// Longest time that a request waits for others to be computed with it. Those that come while a batch is computed
    /// are the next batch whatever this is.
    #[arg(
        long,
        default_value_t = 0,
        value_name = "MS",
        env = "SERVE_BATCH_DEADLINE_MS"
    )]
    batch_deadline_ms: u64,
    /// Most rows that wait or are being computed; requests beyond are answered 503.
    #[arg(
        long,
        default_value_t = 65536,
        value_name = "ROWS",
        env = "SERVE_QUEUE_ROWS"
    )]
    queue_rows: u32,
    /// Largest body of a request; others are answered 413.
    #[arg(long, default_value_t = 1 << 20, value_name = "BYTES", env = "SERVE_MAX_BODY_BYTES")]
    max_body_bytes: usize,
    /// Longest time that a client may take for the head of a request, counted from the end of the one before, and again for
    /// its body. So much later an idle connection ends too.
    #[arg(
        long,
        default_value = "30",
        value_name = "SECONDS",
        env = "SERVE_READ_TIMEOUT_SECONDS"
    )]
    read_timeout_seconds: NonZeroU32,
    /// Most connections at a time; others wait to be accepted. Each takes a file descriptor.
    #[arg(
        long,
        default_value = "1000",
        value_name = "COUNT",
        env = "SERVE_MAX_CONNECTIONS"
    )]
    pub max_connections: NonZeroU32,
    /// Longest time that SIGTERM waits for requests in flight.
    #[arg(
        long,
        default_value_t = 30,
        value_name = "SECONDS",
        env = "SERVE_DRAIN_SECONDS"
    )]
    drain_seconds: u64,
    /// How long after SIGTERM requests are still accepted, while /readyz says that they are not wanted: for a balancer to notice.
    #[arg(
        long,
        default_value_t = 0,
        value_name = "SECONDS",
        env = "SERVE_DRAIN_DELAY_SECONDS"
    )]
    drain_delay_seconds: u64,
    /// Batches computed at a time on a CPU, each on one core [default: the cores that affinity and the quota of a container allow].
    #[arg(long, value_name = "COUNT", env = "SERVE_THREADS")]
    threads: Option<NonZeroUsize>,
    /// Refuse to reload a model whose movies are not those of the model in service.
    #[arg(long, env = "SERVE_KEEP_CATALOGUE")]
    pub keep_catalogue: bool,
    #[arg(long, value_enum, default_value_t = LogFormat::Text, env = "SERVE_LOG_FORMAT")]
    pub log_format: LogFormat,
    /// Open the checkpoint, print what /healthz would say of it, and end.
    #[arg(long)]
    pub inspect: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// An object per line.
    Json,
}

impl Options {
    pub fn limits(&self) -> Result<Limits> {
        ensure!(
            1 <= self.batch_rows && self.batch_rows <= self.queue_rows,
            "--batch-rows must lie in 1..={}, which is --queue-rows, got {}",
            self.queue_rows,
            self.batch_rows
        );
        Ok(Limits {
            batch_rows: self.batch_rows as usize,
            deadline: Duration::from_millis(self.batch_deadline_ms),
            queue_rows: self.queue_rows as usize,
            batches: if self.model.is_on_cpu() {
                self.threads()
            } else {
                1
            },
        })
    }

    pub fn body_limits(&self) -> BodyLimits {
        BodyLimits {
            max_bytes: self.max_body_bytes,
            timeout: self.read_timeout(),
        }
    }

    pub fn read_timeout(&self) -> Duration {
        Duration::from_secs(self.read_timeout_seconds.get().into())
    }

    pub fn threads(&self) -> usize {
        self.threads.unwrap_or_else(threads::available).get()
    }

    pub fn drain_delay(&self) -> Duration {
        Duration::from_secs(self.drain_delay_seconds)
    }

    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}
