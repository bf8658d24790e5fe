//! Work on all cores.

use std::sync::Mutex;

use candle_core::utils::barrier_pool;
use candle_core::{Error, Result};

/// Applies `work` to all items on the threads of candle's pool and returns the results in order. The pool serves one caller at a
/// time: nothing in `work` may be divided among it again.
///
/// # Errors
/// The first error of `work`, in the order of the items.
pub fn in_pool<I: Sync, R: Send>(
    items: &[I],
    work: impl Fn(&I) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let results: Vec<_> = items.iter().map(|_| Mutex::new(None)).collect();
    barrier_pool().execute_chunked(items.len(), |range| {
        for i in range {
            if let Ok(mut result) = results[i].lock() {
                *result = Some(work(&items[i]));
            }
        }
    });
    let results = results.into_iter().map(|result| match result.into_inner() {
        Ok(Some(result)) => result,
        _ => Err(Error::msg("a thread of the pool panicked")),
    });
    results.collect()
}
