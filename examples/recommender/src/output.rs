//! Standard output, which its reader may close, and checks that files are writable, before hours of work instead of after.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{ensure, Context, Result};
use candle_hashed_embedding_bag::checkpoint;

/// The first failure of standard output.
static FAILURE: Mutex<Option<io::Error>> = Mutex::new(None);

/// Whether nothing is printed.
static IS_SILENT: AtomicBool = AtomicBool::new(false);

/// Has this process print nothing from now on, since another prints the same.
pub fn silence() {
    IS_SILENT.store(true, Ordering::Relaxed);
}

/// Whether this process prints nothing.
pub fn is_silent() -> bool {
    IS_SILENT.load(Ordering::Relaxed)
}

/// `println!` for programs that must not end if standard output is closed: see [`print()`].
#[macro_export]
macro_rules! say {
    ($($message:tt)*) => {
        $crate::output::print(format_args!($($message)*))
    };
}

/// Prints a line to standard output. A failure does not stop the program, so that training ends with a checkpoint even if the
/// reader has left, as in `recommender | head -1`; [`finish`] reports it.
pub fn print(line: fmt::Arguments) {
    if !is_silent() {
        remember(writeln!(io::stdout(), "{line}"));
    }
}

/// To be called when the work is done.
///
/// # Errors
/// The first failure of standard output, unless its reader has left, having seen enough.
pub fn finish() -> Result<()> {
    remember(io::stdout().flush());
    let failure = FAILURE
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    match failure {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("standard output")
        }
        _ => Ok(()),
    }
}

/// Whether an error says that the reader of an output has left, having seen enough.
pub fn is_closed(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<io::Error>();
    cause.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

fn remember(printed: io::Result<()>) {
    if let Err(error) = printed {
        let mut failure = FAILURE.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
    }
}

/// Whether a checkpoint can be saved at `path`.
///
/// # Errors
/// Why not.
pub fn ensure_replaceable(path: &Path) -> Result<()> {
    checkpoint::check_writable(path).with_context(|| format!("cannot write {}", path.display()))
}

/// Whether a file at `path` can be made, or written to if it is there.
///
/// # Errors
/// Why not.
pub fn ensure_writable(path: &Path) -> Result<()> {
    if !path.exists() {
        return ensure_replaceable(path);
    }
    let why = || format!("cannot write {}", path.display());
    // Opening a named pipe would wait for a reader.
    ensure!(path.is_file(), "{}: not a regular file", why());
    let opened = File::options().append(true).open(path);
    opened.with_context(why)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn places_that_cannot_be_written_are_named() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (file, none) = (folder.path().join("file"), folder.path().join("none/file"));
        ensure_replaceable(&file)?;
        ensure_writable(&file)?;
        assert!(!file.exists(), "trying leaves nothing behind");
        fs::write(&file, "kept")?;
        ensure_replaceable(&file)?;
        ensure_writable(&file)?;
        assert_eq!(fs::read_to_string(&file)?, "kept");
        for wrong in [folder.path(), &none, &file.join("below")] {
            for error in [ensure_replaceable(wrong), ensure_writable(wrong)] {
                let error = format!("{:#}", error.err().context("no error")?);
                assert!(
                    error.starts_with(&format!("cannot write {}: ", wrong.display())),
                    "{error}"
                );
            }
        }
        Ok(())
    }
}
