//! Click logs in the format of Criteo's (<https://ailab.criteo.com/ressources/>), streamed from the file.
//!
//! | field | | read as |
//! |---|---|---|
//! | label | `1` if the advertisement was clicked, else `0` | the label |
//! | I1 to I13 | integers, mostly counts | `ln(1 + x)`; negative and missing ones as 0 |
//! | C1 to C26 | hexadecimal | a row of a table of its own, by a hash of the text; a missing one is a category too |
//!
//! Fields are separated by tabs and may be empty, but for the label. The file may be compressed by gzip.
//!
//! No dictionary of categories is built: their number is not known, need not be, and grows with every day of the log.
//! Nothing of the file is kept but the counts of a first pass, so its size does not matter.

mod generated;
mod gzip;
mod reader;

use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io::{BufReader, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use twox_hash::XxHash64;

use self::gzip::{is_gzip, Members};
use self::reader::{Click, Reader, CATEGORIES, NUMBERS};
use super::{Bags, Batch, Batches, Examples, Part, Schema};

pub use generated::write as write_generated;

/// The number of clicks that are shuffled among each other, to the next whole batch.
const WINDOW: usize = 1 << 16;

/// A click log on disk.
pub struct Clicks {
    path: PathBuf,
    rows_per_field: u32,
    skip_malformed: bool,
    counts: Counts,
    fingerprint: u64,
}

/// What a pass over a click log finds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    pub examples: u64,
    pub clicked: u64,
    /// Lines that were skipped.
    pub malformed: u64,
}

impl Clicks {
    /// Reads the file once, so that its parts are known and a malformed line is found before the training.
    ///
    /// # Errors
    /// What the file system or gzip says, a pipe, a malformed line unless they are skipped, and no examples at all.
    pub fn open(path: &Path, rows_per_field: u32, skip_malformed: bool) -> Result<Self> {
        let mut clicks = Self {
            path: path.to_owned(),
            rows_per_field,
            skip_malformed,
            counts: Counts::default(),
            fingerprint: 0,
        };
        let name = || path.display().to_string();
        // A pipe would be empty, or hang, when it is read again.
        ensure!(
            fs::metadata(path).with_context(name)?.is_file(),
            "{}: a click log is read several times, so it must be a regular file",
            path.display()
        );
        let (mut reader, mut counts) = (clicks.reader()?, Counts::default());
        let mut hasher = XxHash64::with_seed(0);
        for click in reader.by_ref() {
            let click = click?;
            counts.examples += 1;
            counts.clicked += u64::from(click.clicked);
            click.hash(&mut hasher);
        }
        clicks.fingerprint = hasher.finish();
        counts.malformed = reader.skipped();
        ensure!(
            counts.examples > 0,
            "{}: no clicks, {} malformed lines",
            path.display(),
            counts.malformed
        );
        clicks.counts = counts;
        Ok(clicks)
    }

    /// What a model of clicks reads.
    pub fn schema_of(rows_per_field: u32) -> Schema {
        Schema {
            numbers: NUMBERS,
            tables: CATEGORIES
                .map(|name| (name, rows_per_field as usize))
                .to_vec(),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the first pass found.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// A hash of all clicks, as a model sees them.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    fn reader(&self) -> Result<Reader<Box<dyn Read>>> {
        let name = self.path.display().to_string();
        let open = || {
            let mut file = BufReader::new(File::open(&self.path)?);
            Ok::<_, std::io::Error>(if is_gzip(&mut file)? {
                Box::new(Members::new(file)) as Box<dyn Read>
            } else {
                Box::new(file)
            })
        };
        let input = open().with_context(|| name.clone())?;
        Ok(Reader::new(
            input,
            name,
            self.rows_per_field,
            self.skip_malformed,
        ))
    }

    fn range(&self, part: Part) -> Range<u64> {
        range(self.counts.examples, part)
    }
}

impl Examples for Clicks {
    fn schema(&self) -> Schema {
        Self::schema_of(self.rows_per_field)
    }

    fn len(&self, part: Part) -> usize {
        let range = self.range(part);
        (range.end - range.start) as usize
    }

    /// Shuffling is by windows of 65,536 clicks.
    fn batches<'a>(
        &'a self,
        part: Part,
        batch_size: usize,
        mut shuffle: Option<&'a mut StdRng>,
    ) -> Result<Batches<'a>> {
        let mut clicks = self.reader()?.skip(self.range(part).start as usize);
        let window = WINDOW.checked_next_multiple_of(batch_size);
        let (mut left, window) = (self.len(part), window.unwrap_or(usize::MAX));
        let windows = std::iter::from_fn(move || {
            let wanted = left.min(window);
            left -= wanted;
            (wanted > 0).then(|| {
                let window = clicks.by_ref().take(wanted).collect::<Result<Vec<_>>>()?;
                ensure!(
                    window.len() == wanted,
                    "{}: has changed since it was counted",
                    self.path.display()
                );
                Ok(window)
            })
        });
        Ok(Box::new(windows.flat_map(move |window| {
            let batches = window.map(|mut window| {
                if let Some(rng) = &mut shuffle {
                    window.shuffle(rng);
                }
                window.chunks(batch_size).map(batch).collect::<Vec<_>>()
            });
            match batches {
                Ok(batches) => batches.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            }
        })))
    }
}

/// The positions of a part, 8 : 1 : 1 in file order: a log is in order of time, and a model is to predict the future.
fn range(examples: u64, part: Part) -> Range<u64> {
    let tenths = |n| (u128::from(examples) * n / 10) as u64;
    match part {
        Part::Train => 0..tenths(8),
        Part::Valid => tenths(8)..tenths(9),
        Part::Test => tenths(9)..examples,
    }
}

fn batch(clicks: &[Click]) -> (Batch, Vec<bool>) {
    let rows = |field| clicks.iter().map(|click| click.rows[field]).collect();
    let batch = Batch {
        numbers: clicks.iter().flat_map(|click| click.numbers).collect(),
        bags: (0..CATEGORIES.len())
            .map(|field| Bags::of_one_each(rows(field)))
            .collect(),
    };
    (batch, clicks.iter().map(|click| click.clicked).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use std::fs;

    fn clicks(clicks: &Clicks, part: Part, shuffle: Option<&mut StdRng>) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for batch in clicks.batches(part, 300, shuffle)? {
            let (batch, labels) = batch?;
            assert!(labels.len() <= 300 && batch.numbers.len() == labels.len() * NUMBERS);
            all.extend(labels.iter().enumerate().map(|(i, label)| {
                let rows: Vec<_> = batch.bags.iter().map(|bags| bags.bag(i)).collect();
                let numbers = &batch.numbers[i * NUMBERS..][..NUMBERS];
                format!("{label} {numbers:?} {rows:?}")
            }));
        }
        Ok(all)
    }

    #[test]
    fn parts_follow_each_other_in_the_file() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("log");
        generated::write(&path, 1_234, 1)?;
        let log = Clicks::open(&path, 1000, false)?;
        let all: Vec<_> = log.reader()?.collect::<Result<_>>()?;
        let (whole, labels) = batch(&all);
        assert_eq!(
            labels.iter().filter(|l| **l).count() as u64,
            log.counts().clicked
        );

        let parts = [Part::Train, Part::Valid, Part::Test];
        assert_eq!(parts.map(|part| log.len(part)), [987, 123, 124]);
        let mut streamed = Vec::new();
        for part in parts {
            for batch in log.batches(part, 100, None)? {
                streamed.extend(batch?.0.numbers);
            }
        }
        assert_eq!(streamed, whole.numbers);

        let mut rng = StdRng::seed_from_u64(1);
        let (mut shuffled, mut in_order) = (
            clicks(&log, Part::Train, Some(&mut rng))?,
            clicks(&log, Part::Train, None)?,
        );
        assert_ne!(shuffled, in_order);
        shuffled.sort_unstable();
        in_order.sort_unstable();
        assert_eq!(shuffled, in_order);
        Ok(())
    }

    #[test]
    fn gzip_is_recognised() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (text, gzip) = (dir.path().join("log"), dir.path().join("log.gz"));
        generated::write(&text, 500, 1)?;
        generated::write(&gzip, 500, 1)?;
        let bytes = fs::read(&gzip)?;
        assert_ne!(bytes, fs::read(&text)?);
        let read = |path: &Path| clicks(&Clicks::open(path, 1000, false)?, Part::Train, None);
        assert_eq!(read(&gzip)?, read(&text)?);

        // Two members, one after the other, as `cat` makes them.
        fs::write(&gzip, [&bytes[..], &bytes[..]].concat())?;
        assert_eq!(Clicks::open(&gzip, 1000, false)?.counts().examples, 1000);

        // What is cut off is no malformed line to be skipped.
        fs::write(&gzip, &bytes[..bytes.len() / 2])?;
        let error = Clicks::open(&gzip, 1000, true).err().context("no error")?;
        assert!(error.to_string().ends_with("log.gz"), "{error:#}");
        Ok(())
    }

    #[test]
    fn the_fingerprint_is_that_of_the_clicks() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (log, other) = (dir.path().join("log"), dir.path().join("other.gz"));
        generated::write(&log, 50, 1)?;
        generated::write(&other, 50, 1)?;
        let of =
            |path: &Path| Ok::<_, anyhow::Error>(Clicks::open(path, 1000, false)?.fingerprint());
        let first = of(&log)?;
        assert_eq!(of(&other)?, first, "compression does not matter");
        generated::write(&log, 50, 2)?;
        assert_ne!(of(&log)?, first);
        Ok(())
    }

    #[test]
    fn what_cannot_be_read_twice_is_refused() -> Result<()> {
        let dir = tempfile::tempdir()?;
        for (path, said) in [
            (dir.path().to_owned(), "must be a regular file"),
            (dir.path().join("none"), "No such file"),
        ] {
            let error = format!(
                "{:#}",
                Clicks::open(&path, 1000, false).err().context("no error")?
            );
            assert!(
                error.starts_with(&path.display().to_string()) && error.contains(said),
                "{error}"
            );
        }
        Ok(())
    }

    #[test]
    fn batches_may_be_larger_than_the_file() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("log");
        generated::write(&path, 50, 1)?;
        let log = Clicks::open(&path, 1000, false)?;
        for batch_size in [WINDOW + 1, usize::MAX] {
            let mut batches = log.batches(Part::Train, batch_size, None)?;
            assert_eq!(batches.next().context("a batch")??.1.len(), 40);
            assert!(batches.next().is_none());
        }
        Ok(())
    }

    #[test]
    fn malformed_lines_are_refused_or_counted() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("log");
        generated::write(&path, 20, 1)?;
        let text = fs::read_to_string(&path)?;
        fs::write(&path, format!("{text}2{}", &text[1..]))?;
        let error = Clicks::open(&path, 1000, false).err().context("no error")?;
        let expected = format!("{}:21: field label: `2` is neither 0 nor 1", path.display());
        assert_eq!(error.to_string(), expected);

        let log = Clicks::open(&path, 1000, true)?;
        assert_eq!((log.counts().examples, log.counts().malformed), (39, 1));
        assert_eq!(log.len(Part::Test), clicks(&log, Part::Test, None)?.len());
        fs::write(&path, "")?;
        assert!(Clicks::open(&path, 1000, true).is_err());
        assert!(clicks(&log, Part::Test, None).is_err());
        Ok(())
    }
}
