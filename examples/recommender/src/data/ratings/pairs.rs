//! Pairs of a user and a movie to be scored, as text: one per line, by their published ids.
//!
//! The ids are the first two fields of a line, whatever follows; fields are separated by tabs, commas, spaces or `::`. A first line whose
//! first field is no id is a header. So `ratings.csv` and `ratings.dat` of MovieLens are lists of pairs, too.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::mpsc::{sync_channel, Receiver};
use std::thread;

use anyhow::{anyhow, Context, Result};

use crate::data::gzip::{is_gzip, Members};

/// Pairs that are read at once.
const BLOCK: usize = 8192;

/// Blocks that are ready before they are asked for.
const AHEAD: usize = 4;

/// What an id is no number of: it is in no catalogue.
pub type Id = Option<i64>;

/// Reads the pairs on a thread of its own, some at a time. The file may be a pipe, and may be compressed by gzip.
///
/// # Errors
/// What the file system says, and a line with fewer than two fields.
pub fn read(path: &Path) -> Result<impl Iterator<Item = Result<Vec<(Id, Id)>>>> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let (sender, blocks) = sync_channel(AHEAD);
    let path = path.to_owned();
    thread::spawn(move || {
        // Whoever no longer reads needs no error.
        let send = |block| sender.send(block).is_ok();
        if let Err(error) = read_all(&path, file, |block| send(Ok(block))) {
            send(Err(error));
        }
    });
    Ok(Blocks(blocks))
}

struct Blocks(Receiver<Result<Vec<(Id, Id)>>>);

impl Iterator for Blocks {
    type Item = Result<Vec<(Id, Id)>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.recv().ok()
    }
}

fn read_all(path: &Path, file: File, mut send: impl FnMut(Vec<(Id, Id)>) -> bool) -> Result<()> {
    let name = || path.display().to_string();
    let mut file = BufReader::with_capacity(1 << 16, file);
    let mut text: Box<dyn BufRead> = if is_gzip(&mut file).with_context(name)? {
        Box::new(BufReader::with_capacity(1 << 16, Members::new(file)))
    } else {
        Box::new(file)
    };
    let (mut line, mut number) = (Vec::new(), 0u64);
    let mut block = Vec::with_capacity(BLOCK);
    loop {
        line.clear();
        if text.read_until(b'\n', &mut line).with_context(name)? == 0 {
            break;
        }
        number += 1;
        let mut fields = fields(&line);
        let Some(user) = fields.next() else { continue };
        let movie = fields.next();
        let movie = movie.ok_or_else(|| {
            anyhow!(
                "{}:{number}: expected at least 2 fields, got 1",
                path.display()
            )
        })?;
        let (user, movie) = (id(user), id(movie));
        if number == 1 && user.is_none() && movie.is_none() {
            continue;
        }
        block.push((user, movie));
        if block.len() == BLOCK && !send(std::mem::replace(&mut block, Vec::with_capacity(BLOCK))) {
            return Ok(());
        }
    }
    if !block.is_empty() {
        send(block);
    }
    Ok(())
}

fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
    let fields = line.split(|byte| matches!(byte, b'\t' | b',' | b' ' | b':' | b'\r' | b'\n'));
    fields.filter(|field| !field.is_empty())
}

fn id(field: &[u8]) -> Id {
    str::from_utf8(field).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn pairs(text: &str) -> Result<Vec<(Id, Id)>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("pairs");
        fs::write(&path, text)?;
        Ok(read(&path)?.collect::<Result<Vec<_>>>()?.concat())
    }

    #[test]
    fn the_first_two_fields_are_a_pair() -> Result<()> {
        let expected = [(Some(1), Some(-20)), (Some(3), Some(4))];
        for text in [
            "1\t-20\n3\t4",
            "\u{feff}userId,movieId,rating,timestamp\r\n1,-20,4.0,9\r\n\r\n3,4,5.0,9\r\n",
            "1::-20::5::978300760\n3::4::3::978302109\n",
            "user movie\n1 -20\n3 4\n",
        ] {
            assert_eq!(pairs(text)?, expected, "{text}");
        }
        assert_eq!(
            pairs("1 2\nnew 5\n")?,
            [(Some(1), Some(2)), (None, Some(5))]
        );
        assert_eq!(pairs("")?, []);
        let many = "7 8\n".repeat(2 * BLOCK + 1);
        assert_eq!(pairs(&many)?.len(), 2 * BLOCK + 1);
        let error = pairs("1 2\n3\n").unwrap_err().to_string();
        assert!(
            error.ends_with("pairs:2: expected at least 2 fields, got 1"),
            "{error}"
        );
        Ok(())
    }
}
