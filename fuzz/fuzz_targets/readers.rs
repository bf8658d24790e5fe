//! The recommender's readers on arbitrary files, which must give errors and not panics.
//!
//! An input is a format, a zero byte, and the data: `log` and a click log, possibly compressed; or `csv` or `dat` and MovieLens'
//! files `movies`, `ratings` and `users` (each may be missing), with a zero byte between them.
#![no_main]

use candle_hashed_embedding_bag_fuzz::folder;
use libfuzzer_sys::fuzz_target;
use recommender::data::{Clicks, Examples, Part, Source};

/// Reads every batch of every part.
fn read(examples: &dyn Examples) {
    let tables = examples.schema().tables;
    for part in [Part::Train, Part::Valid, Part::Test] {
        let mut read = 0;
        for batch in examples
            .batches(part, 3, None)
            .expect("the file was read before")
        {
            let (batch, labels) = batch.expect("the file was read before");
            read += labels.len();
            for (bags, (_, rows)) in batch.bags.iter().zip(&tables) {
                assert_eq!(bags.len(), labels.len());
                assert!(bags.indices().iter().all(|&row| (row as usize) < *rows));
            }
        }
        assert_eq!(read, examples.len(part));
    }
}

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |&byte| byte == 0);
    let (format, rest) = (parts.next(), parts.next().unwrap_or_default());
    if format == Some(b"log") {
        let path = folder().join("log");
        std::fs::write(&path, rest).expect("a file for the input");
        for skip_malformed in [false, true] {
            if let Ok(clicks) = Clicks::open(&path, 1000, skip_malformed) {
                read(&clicks);
            }
        }
        return;
    }
    let extension = if format == Some(b"dat") { "dat" } else { "csv" };
    let dir = folder().join(extension);
    std::fs::create_dir_all(&dir).expect("a folder for the input");
    let mut contents = rest.split(|&byte| byte == 0);
    for name in ["movies", "ratings", "users"] {
        let path = dir.join(name).with_extension(extension);
        match contents.next() {
            Some(content) => std::fs::write(path, content).expect("a file"),
            None => drop(std::fs::remove_file(path)),
        }
    }
    let source = Source::Files(dir);
    let _ = source.titles();
    if let Ok(ratings) = source.load() {
        read(&ratings);
    }
});
