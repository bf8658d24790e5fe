//! The integration tests, one module per behaviour: `cargo test --test suite padding::` runs the tests of padding.
//!
//! They are one binary, because each binary links candle anew. A binary of its own is only for a test that needs a process of
//! its own: `tests/hot_start.rs` measures the memory of the process, `tests/crash.rs` kills the process that saves. Tests that
//! need a certain number of threads start this binary again, see `same_on_any_number_of_threads`. What must see the inside of
//! the crate is in `tests/in_crate`, and compiled with its unit tests.
//!
//! Numbers to compare with, and the Python scripts that computed them, are in `tests/golden`.

#[path = "../common/mod.rs"]
mod common;

mod bounds;
mod checkpoint;
mod collection;
mod construction;
mod determinism;
mod features;
mod fit;
mod golden;
mod gradients;
mod hash;
mod import;
mod inputs;
mod jagged;
mod lookup;
mod low_bit;
mod optim;
mod padding;
mod pooling;
mod row_tensor;
mod semantic;
mod sparse;
mod threads;
mod to_table;
