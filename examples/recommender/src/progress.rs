//! How far an epoch is: a bar on a terminal, and a line now and then where the standard error is none, such as the log of a job.

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{HumanCount, ProgressBar, ProgressState, ProgressStyle};

use crate::output;

/// Of one epoch.
pub struct Progress {
    bar: ProgressBar,
    epoch: usize,
    examples: usize,
    begun: Instant,
    /// When the next line is due.
    next: Duration,
    every: Duration,
}

impl Progress {
    /// Of an epoch of so many examples; lines come at least `every` apart.
    ///
    /// # Errors
    /// None: the template is one.
    pub fn new(epoch: usize, examples: usize, every: Duration) -> Result<Self> {
        let template = "  {bar:32} {human_pos} of {human_len} rows   {rate} rows/s   loss {msg}";
        let style = ProgressStyle::with_template(template)?.with_key(
            "rate",
            |state: &ProgressState, out: &mut dyn Write| {
                let _ = write!(out, "{}", HumanCount(state.per_sec() as u64));
            },
        );
        let bar = match output::is_silent() {
            true => ProgressBar::hidden(),
            false => ProgressBar::new(examples as u64),
        };
        Ok(Self {
            bar: bar.with_style(style),
            epoch,
            examples,
            begun: Instant::now(),
            next: every,
            every,
        })
    }

    /// So many examples are done, with this mean loss.
    pub fn show(&mut self, done: usize, loss: f64) {
        self.bar.set_position(done as u64);
        self.bar.set_message(format!("{loss:.4}"));
        let elapsed = self.begun.elapsed();
        if self.bar.is_hidden() && !output::is_silent() && elapsed >= self.next {
            self.next = elapsed + self.every;
            let percent = 100.0 * done as f64 / self.examples.max(1) as f64;
            eprintln!(
                "epoch {}: {percent:.0} % in {} s, loss {loss:.4}",
                self.epoch,
                elapsed.as_secs()
            );
        }
    }

    /// The bar goes.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
