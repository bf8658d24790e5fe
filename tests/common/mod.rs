//! What the integration tests share.
//!
//! | file | holds |
//! |---|---|
//! | `oracle.rs` | lookups computed from the formulas with candle's own operations, and the comparison with the crate |
//! | `devices.rs` | running one test body on the CPU, on CUDA, and with several numbers of threads |
//! | `assertions.rs` | comparing tensors, and reading error messages |
//! | `data.rs` | test data that every dtype represents exactly, and the hashes to test |
//! | `strategies.rs` | random hashes, tables and lookups for proptest |
#![allow(dead_code, unused_imports)] // each test binary uses a part

mod assertions;
mod data;
mod devices;
mod oracle;
pub mod strategies;

pub use assertions::*;
pub use data::*;
pub use devices::*;
pub use oracle::*;
