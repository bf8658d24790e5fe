//! Trainings side by side, each in a process of its own.
//!
//! candle has one pool of threads per process, which serves one caller at a time. So each training is this program again, with the
//! same arguments, told which training is its own. It prints its runs, and only the first process writes them.

use std::env;
use std::num::NonZeroUsize;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread;

use anyhow::{ensure, Context, Result};
use candle_core::Device;

use super::plan::Plan;
use super::run;
use super::runs::{self, Outcome};
use crate::data::Data;
use crate::say;

/// The start of a line of standard output that is a run.
const RUN: &str = "run: ";

/// The work of one process.
///
/// # Errors
/// Those of the training.
pub fn child(plan: &Plan, only: usize, data: &Data, device: &Device) -> Result<()> {
    let training = plan.trainings.get(only).context("no such training")?;
    for outcome in run(data, training, device)? {
        say!("{RUN}{}", runs::outcome_line(outcome)?);
    }
    Ok(())
}

/// Lets at most `jobs` processes work at the trainings with these numbers, and hands what each yields to `done`. After the first
/// error no more are started, and it is returned when the others have ended.
///
/// # Errors
/// The first of a process or of `done`.
pub fn run_side_by_side(
    jobs: usize,
    trainings: &[usize],
    mut done: impl FnMut(usize, Result<Vec<Outcome>>) -> Result<()>,
) -> Result<()> {
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = (cores / jobs).max(1);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, results) = channel();
    thread::scope(|scope| {
        for _ in 0..jobs.min(trainings.len()) {
            let (next, failed, sender) = (&next, &failed, sender.clone());
            scope.spawn(move || {
                while !failed.load(Ordering::Relaxed) {
                    let place = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&training) = trainings.get(place) else {
                        return;
                    };
                    if sender.send((training, process(training, threads))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut first = Ok(());
        for (i, (training, outcomes)) in results.into_iter().enumerate() {
            let finished = done(training, outcomes);
            if finished.is_err() {
                failed.store(true, Ordering::Relaxed);
            } else {
                say!("{} of {} trainings", i + 1, trainings.len());
            }
            first = first.and(finished);
        }
        first
    })
}

/// This program again, with the same arguments, for one training.
fn process(training: usize, threads: usize) -> Result<Vec<Outcome>> {
    let program = env::current_exe().context("this program is nowhere")?;
    let threads = threads.to_string();
    let output = Command::new(program)
        .args(env::args_os().skip(1))
        .args(["--only", &training.to_string()])
        .env("CANDLE_NUM_THREADS", &threads)
        .env("RAYON_NUM_THREADS", &threads)
        .stdin(Stdio::null())
        .output()
        .context("cannot start a process for a training")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "a training ended with {}: {}",
        output.status,
        said.trim()
    );
    let printed = String::from_utf8_lossy(&output.stdout);
    let lines = printed.lines().filter_map(|line| line.strip_prefix(RUN));
    lines.map(runs::parse_outcome).collect()
}
