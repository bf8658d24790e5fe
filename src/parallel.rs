//! Work divided among the threads of candle's own pool.
//!
//! A second pool would compete with it: candle's threads go on looking for work for a while after each of its operations, and
//! would keep the processors that the other pool's threads wait for. `CANDLE_NUM_THREADS` says how many threads there are.
//!
//! The pool works for one caller at a time, and the others wait. So a caller does all of its work itself when there are as
//! many callers as threads: no processor would be idle, and the threads of a pool would take them from other callers.

use candle_core::utils::barrier_pool;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

/// How many threads there are, the caller's among them, where up to `most` are of use.
pub(crate) fn num_threads(most: usize) -> usize {
    match most {
        // The first to ask starts them.
        0 | 1 => 1,
        most => most.min(barrier_pool().n_workers() + 1),
    }
}

/// How many calls are at work, or wait for the pool.
static CALLERS: AtomicUsize = AtomicUsize::new(0);

/// One of them, for as long as it lives.
struct Caller {
    /// Which of them it was when it came, from 1 on.
    number: usize,
}

impl Caller {
    fn new() -> Self {
        let before = CALLERS.fetch_add(1, Ordering::Relaxed);
        Self { number: before + 1 }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        CALLERS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What `work` makes of each item, in order. Threads take items as they come, so that one which is late leaves its share to
/// others; one item wakes nobody.
pub(crate) fn map<I: Send, R: Send>(
    items: impl Iterator<Item = I>,
    work: impl Fn(I) -> R + Sync,
) -> Vec<R> {
    enum Task<I, R> {
        Open(I),
        Taken,
        Done(R),
    }
    let caller = Caller::new();
    let tasks: Vec<_> = items.map(|item| Mutex::new(Task::Open(item))).collect();
    if tasks.len() > 1 && caller.number < num_threads(usize::MAX) {
        barrier_pool().execute_chunked(tasks.len(), |range| {
            for task in &tasks[range] {
                // Each task is locked by one thread, once.
                let Ok(mut task) = task.lock() else { continue };
                if let Task::Open(item) = std::mem::replace(&mut *task, Task::Taken) {
                    *task = Task::Done(work(item));
                }
            }
        });
    }
    let results = tasks.into_iter().map(|task| match task.into_inner() {
        Ok(Task::Done(result)) => result,
        Ok(Task::Open(item)) => work(item),
        Ok(Task::Taken) | Err(_) => unreachable!("the pool passes a panic on"),
    });
    results.collect()
}

/// Does `work` for each item, as [`map`] does.
pub(crate) fn for_each<I: Send>(items: impl Iterator<Item = I>, work: impl Fn(I) + Sync) {
    map(items, work);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_whatever_the_number_of_items() {
        for n in [0, 1, 2, 3, 100, 10_000] {
            let want: Vec<_> = (0..n).map(|i| i * i).collect();
            assert_eq!(map(0..n, |i| i * i), want);
        }
        let mut values = [0; 1_000];
        for_each(values.chunks_mut(7).enumerate(), |(i, values)| {
            values.fill(i);
        });
        assert!(values.iter().enumerate().all(|(i, &value)| value == i / 7));
    }
}
