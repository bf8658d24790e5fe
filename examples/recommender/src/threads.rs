//! How many threads compute.
//!
//! candle sizes its pool by the physical cores of the machine, whatever part of it the process may use. Pinned to one core
//! (`taskset -c 0`) or with the quota of a container, its threads then wait for each other: an epoch takes four times as long.

use std::env;
use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::thread;

/// What candle and rayon read when they start their pools.
const VARIABLES: [&str; 2] = ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"];

static THREADS: OnceLock<NonZeroUsize> = OnceLock::new();

/// The cores that this process may use: on Linux, by its affinity and by the quota of its control group.
pub fn available() -> NonZeroUsize {
    thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Decides how many threads compute a batch and how many parse a log. Without a number, it is what the environment says, or else
/// [`available`]. To be called first of all, while there is one thread.
pub fn limit(threads: Option<NonZeroUsize>) {
    let count = THREADS.get_or_init(|| threads.unwrap_or_else(available));
    for variable in VARIABLES {
        if threads.is_some() || env::var_os(variable).is_none() {
            env::set_var(variable, count.to_string());
        }
    }
}

/// How many threads parse a log.
pub fn count() -> usize {
    THREADS.get().copied().unwrap_or_else(available).get()
}
