//! Work divided among the threads of candle's own pool.
//!
//! A second pool would compete with it: candle's threads go on looking for work for a while after each of its operations, and
//! would keep the processors that the other pool's threads wait for.
//!
//! The pool works for one caller at a time, all of its threads wake for that, and all must have run before it ends. So a call
//! is divided only where it is worth waking them, and where there are fewer callers than threads: more would leave no processor
//! idle, and take those away that the pool waits for. What is given to the pool must not panic, which would poison it for the
//! whole process, nor call candle, which would wait for itself.

use candle_core::utils::barrier_pool;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

/// How many calls are at work that might be divided.
static CALLERS: AtomicUsize = AtomicUsize::new(0);

/// The threads of one call.
pub(crate) struct Team {
    threads: usize,
    is_counted: bool,
}

impl Team {
    /// For work of up to `shares` shares, each of which is worth a thread.
    pub fn new(shares: usize) -> Self {
        if shares <= 1 {
            return Self {
                threads: 1,
                is_counted: false,
            };
        }
        let all = barrier_pool().n_workers() + 1;
        let others = CALLERS.fetch_add(1, Ordering::Relaxed);
        let is_divided = others + 1 < all && shares >= all / 4;
        Self {
            threads: if is_divided { shares.min(all) } else { 1 },
            is_counted: true,
        }
    }

    /// How many threads there are, the caller's among them.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// What `work` makes of each item, in order. Threads take items as they come, so that one which is late leaves its share
    /// to others.
    pub fn map<I: Send, R: Send>(
        &self,
        mut items: impl Iterator<Item = I>,
        work: impl Fn(I) -> R + Sync,
    ) -> Vec<R> {
        self.map_dyn(&mut items, &work)
    }

    /// [`map`](Self::map), compiled for what goes in and comes out and not for every closure.
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

    /// Does `work` for each item, as [`map`](Self::map) does.
    pub fn for_each<I: Send>(&self, items: impl Iterator<Item = I>, work: impl Fn(I) + Sync) {
        self.map(items, work);
    }
}

/// Calls `work` with `0..n`, on all threads of the pool. Not generic, so that it is compiled once.
fn in_pool(n: usize, work: &(dyn Fn(usize) + Sync)) {
    barrier_pool().execute_chunked(n, |range| range.for_each(work));
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
