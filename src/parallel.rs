//! Work divided among the threads of candle's own pool.
//!
//! A second pool would compete with it: after each of its operations, candle's threads keep looking for work for a while, and
//! occupy the processors that the other pool's threads are waiting for. But unless
//! `CANDLE_NUM_THREADS` or `RAYON_NUM_THREADS` says otherwise, candle's pool has a thread for each core of the machine, even in a
//! process that is restricted to fewer processors, by its affinity or by a container's quota. There its threads would wait for
//! each other's processors, so work is divided among rayon's, of which there are no more than the process may use.
//!
//! The pool serves one caller at a time. Each time, all of its threads wake up, and all must have run before the call returns. So
//! a call is divided only if that is worth waking them, and only while there are fewer callers than threads: with more, no
//! processor is idle, and callers would take those away that the pool waits for. Work given to the pool must not panic, which
//! would poison the pool for the whole process, and must not call candle, which would deadlock.

use candle_core::utils::barrier_pool;
use rayon::prelude::*;
use std::env;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::available_parallelism;

/// How many calls are running that are large enough to be divided.
static CALLERS: AtomicUsize = AtomicUsize::new(0);

/// The threads of one call.
pub(crate) struct Team {
    threads: usize,
    is_counted: bool,
}

impl Team {
    /// A team for work that is worth up to `shares` threads.
    pub fn new(shares: usize) -> Self {
        if shares <= 1 {
            return Self {
                threads: 1,
                is_counted: false,
            };
        }
        let all = num_threads();
        let others = CALLERS.fetch_add(1, Ordering::Relaxed);
        let is_divided = others + 1 < all && shares >= all / 4;
        Self {
            threads: if is_divided { shares.min(all) } else { 1 },
            is_counted: true,
        }
    }

    /// The number of threads, including the caller's.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Applies `work` to each item and returns the results in order. Threads take one item after the other, so that a thread that
    /// is late leaves items to the others.
    pub fn map<I: Send, R: Send>(
        &self,
        mut items: impl Iterator<Item = I>,
        work: impl Fn(I) -> R + Sync,
    ) -> Vec<R> {
        self.map_dyn(&mut items, &work)
    }

    /// [`map`](Self::map), compiled once per pair of item and result types instead of once per closure.
    fn map_dyn<I: Send, R: Send>(
        &self,
        items: &mut dyn Iterator<Item = I>,
        work: &(dyn Fn(I) -> R + Sync),
    ) -> Vec<R> {
        if self.threads == 1 {
            return items.map(work).collect();
        }
        // Each is locked by one thread, once.
        let tasks: Vec<_> = items.map(|item| Mutex::new((Some(item), None))).collect();
        in_pool(tasks.len(), &|i| {
            if let Ok(mut task) = tasks[i].lock() {
                task.1 = task.0.take().map(work);
            }
        });
        let results = tasks.into_iter().map(|task| match task.into_inner() {
            Ok((_, Some(result))) => result,
            _ => unreachable!("the pool does all tasks, or passes a panic on"),
        });
        results.collect()
    }

    /// Calls `work` with each item, in the way of [`map`](Self::map).
    pub fn for_each<I: Send>(&self, items: impl Iterator<Item = I>, work: impl Fn(I) + Sync) {
        self.map(items, work);
    }
}

/// Calls `work` with each of `0..n`, on all threads of the pool. Not generic, so that it is compiled once.
fn in_pool(n: usize, work: &(dyn Fn(usize) + Sync)) {
    if pool_threads() > num_threads() {
        // A thread of rayon's that waits takes up other work meanwhile, which may wait for a lock that the caller holds.
        if rayon::current_thread_index().is_some() {
            return (0..n).for_each(work);
        }
        (0..n).into_par_iter().with_max_len(1).for_each(work);
    } else {
        barrier_pool().execute_chunked(n, |range| range.for_each(work));
    }
}

/// The threads of candle's pool, including its caller.
fn pool_threads() -> usize {
    barrier_pool().n_workers() + 1
}

/// The threads of the pool that is used, including its caller: no more than this process had processors when it first asked,
/// unless the user chose a number.
fn num_threads() -> usize {
    static NUM_THREADS: OnceLock<usize> = OnceLock::new();
    *NUM_THREADS.get_or_init(|| {
        let is_chosen = ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"]
            .into_iter()
            .any(|name| env::var_os(name).is_some());
        match available_parallelism() {
            Ok(processors) if !is_chosen => pool_threads().min(processors.get()),
            _ => pool_threads(),
        }
    })
}

impl Drop for Team {
    fn drop(&mut self) {
        if self.is_counted {
            CALLERS.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_whatever_the_number_of_items() {
        for (shares, n) in [
            (0, 0),
            (9, 0),
            (1, 9),
            (9, 1),
            (2, 2),
            (99, 100),
            (7, 10_000),
        ] {
            let team = Team::new(shares);
            assert!((1..=shares.max(1)).contains(&team.threads()));
            let want: Vec<_> = (0..n).map(|i| i * i).collect();
            assert_eq!(team.map(0..n, |i| i * i), want);
        }
    }

    #[test]
    fn many_callers_each_get_what_is_theirs() {
        std::thread::scope(|scope| {
            for caller in 0..8 {
                scope.spawn(move || {
                    for round in 0..if cfg!(miri) { 2 } else { 100 } {
                        let mut values = [0; 1_000];
                        let team = Team::new(64);
                        team.for_each(values.chunks_mut(7).enumerate(), |(i, values)| {
                            values.fill(i + caller + round);
                        });
                        let is_theirs = |(i, &value)| value == i / 7 + caller + round;
                        assert!(values.iter().enumerate().all(is_theirs));
                    }
                });
            }
        });
    }
}
