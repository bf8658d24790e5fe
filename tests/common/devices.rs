//! What a test runs on: the CPU, a CUDA device where there is one, and several numbers of threads.

use candle_core::{Device, Result};
use std::hash::{DefaultHasher, Hasher};
use std::process::Command;

/// Runs a test body on the CPU and, where there is one, on the first CUDA device.
pub fn on_each_device(body: impl Fn(&Device) -> Result<()>) -> Result<()> {
    body(&Device::Cpu)?;
    match cuda() {
        Some(device) => body(&device),
        None => Ok(()),
    }
}

/// The first CUDA device. Without one, prints that the CUDA half of the test is skipped.
pub fn cuda() -> Option<Device> {
    if !cfg!(feature = "cuda") {
        eprintln!("CUDA half skipped: built without the feature cuda");
        return None;
    }
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(e) => {
            eprintln!("CUDA half skipped: no CUDA device ({e})");
            None
        }
    }
}

/// Asserts that whatever `body` reports is the same, bit for bit, with 1, 2 and 5 threads.
///
/// candle fixes the number of its threads once per process, so the test that calls this is started again in a process for each
/// number. `test` is its name as `cargo test` prints it, such as `threads::lookups`; under a wrong name nothing would run, and
/// that fails.
pub fn same_on_any_number_of_threads(
    test: &str,
    body: impl FnOnce(&mut dyn FnMut(&[f64])) -> Result<()>,
) -> Result<()> {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    /// Set in the processes started here; also marks the line in which they print what they found.
    const AGAIN: &str = "CANDLE_HASHED_EMBEDDING_BAG_AGAIN";
    if std::env::var_os(AGAIN).is_some() {
        let threads = candle_core::utils::barrier_pool().n_workers() + 1;
        let wanted = std::env::var(THREADS).map_err(candle_core::Error::wrap)?;
        assert_eq!(threads.to_string(), wanted);
        let mut bits = DefaultHasher::new();
        body(&mut |values| {
            for value in values {
                bits.write_u64(value.to_bits());
            }
        })?;
        println!("\n{AGAIN} {:016x}", bits.finish());
        return Ok(());
    }
    let reported_with = |threads: usize| -> Result<String> {
        let output = Command::new(std::env::current_exe()?)
            .args([test, "--exact", "--nocapture"])
            .env(THREADS, threads.to_string())
            .env(AGAIN, "")
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let bits = text.lines().find_map(|line| line.strip_prefix(AGAIN));
        match bits {
            Some(bits) if output.status.success() => Ok(bits.to_string()),
            _ => panic!("{test} with {threads} threads: {output:?}"),
        }
    };
    let want = reported_with(1)?;
    for threads in [2, 5] {
        assert_eq!(reported_with(threads)?, want, "{threads} threads");
    }
    Ok(())
}
