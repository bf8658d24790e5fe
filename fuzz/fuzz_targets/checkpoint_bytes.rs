//! Arbitrary bytes, opened as a checkpoint.
#![no_main]

use candle_hashed_embedding_bag_fuzz::open_checkpoint;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| open_checkpoint(bytes));
