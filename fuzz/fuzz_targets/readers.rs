//! The recommender's readers on arbitrary files: errors, not panics.
//!
//! An input is a layout, `csv` or `dat`, and the files `movies`, `ratings` and `users` (which may be missing), each ended by
//! a zero byte.
#![no_main]
// Of the modules, only the readers are used.
#![allow(dead_code)]

use candle_hashed_embedding_bag_fuzz::folder;
use libfuzzer_sys::fuzz_target;

#[path = "../../examples/recommender/data/mod.rs"]
mod data;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.split(|&byte| byte == 0);
    let extension = if parts.next() == Some(b"dat") {
        "dat"
    } else {
        "csv"
    };
    let dir = folder().join(extension);
    std::fs::create_dir_all(&dir).expect("a folder for the input");
    for name in ["movies", "ratings", "users"] {
        let path = dir.join(name).with_extension(extension);
        match parts.next() {
            Some(content) => std::fs::write(path, content).expect("a file"),
            None => drop(std::fs::remove_file(path)),
        }
    }
    let source = data::Source::Files(dir);
    let _ = source.titles();
    if let Ok(data) = source.load() {
        let pairs: Vec<_> = data.ratings.iter().map(data::Rating::pair).collect();
        let bags = data.catalog.bags(&pairs);
        assert!(bags.iter().all(|bags| bags.len() == pairs.len()));
    }
});
