//! Checkpoints.
//!
//! | file | of what |
//! |---|---|
//! | `round_trip.rs` | what is saved is what is opened |
//! | `format.rs` | the description of the layers, byte for byte |
//! | `saving.rs` | replacing a file, and what is not saved |
//! | `resume.rs` | training on, and refusing another layer |
//! | `opening.rs` | what opening refuses, and what it tells of a file without reading it |
//!
//! A save that is killed, or for which there is no room, is in tests/crash.rs.

mod format;
mod opening;
mod resume;
mod round_trip;
mod saving;

use std::path::PathBuf;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}
