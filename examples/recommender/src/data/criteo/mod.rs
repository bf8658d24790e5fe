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
//! Of a log as text nothing is kept but counts, so its size does not matter. [`prepare`](Clicks::prepare) writes what a model
//! reads of it to a file that needs no parsing.
//!
//! ```text
//! text, gzip ──> blocks of lines ──> workers ──┐
//! Parquet ──> blocks of rows ──────────────────┤
//! prepared file, mapped ───────────────────────┴──> windows, shuffled ──> queue of batches ──> training
//! ```

mod fields;
mod generated;
#[cfg(feature = "parquet")]
mod parquet;
mod prepared;
mod reader;
mod stream;

#[cfg(not(feature = "parquet"))]
mod parquet {
    use super::stream::{Format, Parsed, Position};

    pub fn read(_: &Format, _: Position, _: impl FnMut(Parsed) -> bool) -> anyhow::Result<()> {
        anyhow::bail!("it is Parquet: build with --features parquet")
    }
}

use std::fs;
use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::sync::Arc;
use std::thread;

use anyhow::{ensure, Context, Result};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::SeedableRng;
use twox_hash::XxHash64;

use self::prepared::Prepared;
use self::reader::{Click, CATEGORIES, NUMBERS};
use self::stream::{Format, Position};
use super::ratings::tenths;
use super::{Batch, Batches, Examples, Part, Record, Records, Rows, Schema};

pub use fields::{batch_of_fields, Value, WrongField};
pub use generated::write as write_generated;

/// The rows of each category's table, if nothing else is said.
const ROWS_PER_FIELD: u32 = 100_000;

/// The number of clicks that are shuffled among each other, to the next whole batch.
const WINDOW: usize = 1 << 16;

/// Batches that are ready before they are asked for.
const AHEAD: usize = 8;

/// A click log on disk.
pub struct Clicks {
    path: PathBuf,
    rows_per_field: u32,
    summary: Summary,
    source: Source,
}

/// What a pass over a click log finds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Summary {
    counts: Counts,
    /// See [`Clicks::fingerprint`].
    fingerprint: u64,
}

/// The numbers of a click log.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Lines that are examples, clicked or not.
    pub examples: u64,
    /// Of those, the clicked.
    pub clicked: u64,
    /// Lines that were skipped.
    pub malformed: u64,
}

/// What clicks are read from.
#[derive(Clone)]
enum Source {
    /// Text or Parquet, and for each of its blocks the clicks before it.
    Text(Format, Arc<[(u64, Position)]>),
    Prepared(Arc<Prepared>),
}

/// Clicks in their order, some at a time.
type Blocks = Box<dyn Iterator<Item = Result<Vec<Click>>>>;

impl Clicks {
    /// Opens a log as text, which is read once, so that its parts are known and a malformed line is found before the training, or
    /// one that [`prepare`](Self::prepare) wrote. `rows_per_field` is 100,000 if not given, or what was
    /// prepared.
    ///
    /// # Errors
    /// What the file system or gzip says, a pipe, a malformed line unless they are skipped, and no examples at all; a log that was
    /// prepared for another `rows_per_field`.
    pub fn open(path: &Path, rows_per_field: Option<u32>, skip_malformed: bool) -> Result<Self> {
        let name = || path.display().to_string();
        // A pipe would be empty, or hang, when it is read again.
        ensure!(
            fs::metadata(path).with_context(name)?.is_file(),
            "{}: a click log is read several times, so it must be a regular file",
            path.display()
        );
        if let Some(prepared) = Prepared::open(path).with_context(name)? {
            let rows = prepared.rows_per_field;
            let wanted = rows_per_field.unwrap_or(rows);
            ensure!(
                rows == wanted,
                "{}: was prepared for {rows} rows per field, not {wanted}",
                path.display()
            );
            return Ok(Self {
                path: path.to_owned(),
                rows_per_field: rows,
                summary: prepared.summary,
                source: Source::Prepared(Arc::new(prepared)),
            });
        }
        let format = Format {
            path: path.to_owned(),
            is_parquet: stream::is_parquet(path).with_context(name)?,
            rows_per_field: rows_per_field.unwrap_or(ROWS_PER_FIELD),
            skip_malformed,
            is_labelled: true,
        };
        let (mut counts, mut hasher) = (Counts::default(), XxHash64::with_seed(0));
        let mut blocks = Vec::new();
        for block in format.stream(Position::START) {
            let block = block?;
            blocks.push((counts.examples, block.position));
            counts.examples += block.clicks.len() as u64;
            counts.malformed += block.malformed.len() as u64;
            for click in &block.clicks {
                counts.clicked += u64::from(click.clicked);
                click.hash(&mut hasher);
            }
        }
        ensure!(
            counts.examples > 0,
            "{}: no clicks, {} malformed lines",
            path.display(),
            counts.malformed
        );
        Ok(Self {
            path: path.to_owned(),
            rows_per_field: format.rows_per_field,
            summary: Summary {
                counts,
                fingerprint: hasher.finish(),
            },
            source: Source::Text(format, blocks.into()),
        })
    }

    /// Writes what a model reads of the log to `out`, a safetensors file that [`open`](Self::open) maps.
    ///
    /// # Errors
    /// What the file system says, or a log that has changed.
    pub fn prepare(&self, out: &Path) -> Result<()> {
        let clicks = self.source.clicks(0..self.counts().examples, &self.path);
        prepared::write(out, self.rows_per_field, self.summary, clicks)
            .with_context(|| format!("cannot write {}", out.display()))
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

    /// How many clicks there are, and of which kinds.
    pub fn counts(&self) -> Counts {
        self.summary.counts
    }

    /// A hash of all clicks, as a model sees them.
    pub fn fingerprint(&self) -> u64 {
        self.summary.fingerprint
    }

    fn range(&self, part: Part) -> Range<u64> {
        range(self.counts().examples, part)
    }
}

impl Source {
    /// The clicks at these positions.
    fn clicks(&self, range: Range<u64>, path: &Path) -> Blocks {
        match self {
            Self::Prepared(prepared) => Box::new(prepared.clicks(range).map(Ok)),
            Self::Text(format, blocks) => {
                let after = blocks.partition_point(|&(before, _)| before <= range.start);
                let (before, from) = blocks[after.saturating_sub(1)];
                let (mut skip, mut left) = (range.start - before, range.end - range.start);
                let mut stream = format.stream(from);
                let changed = format!("{}: has changed since it was counted", path.display());
                Box::new(std::iter::from_fn(move || {
                    if left == 0 {
                        return None;
                    }
                    let Some(parsed) = stream.next() else {
                        left = 0;
                        return Some(Err(anyhow::anyhow!(changed.clone())));
                    };
                    Some(parsed.map(|parsed| {
                        let mut clicks = parsed.clicks;
                        let first = skip.min(clicks.len() as u64);
                        skip -= first;
                        clicks.drain(..first as usize);
                        clicks.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                        left -= clicks.len() as u64;
                        clicks
                    }))
                }))
            }
        }
    }

    /// Hands the clicks at these positions to `send` in batches, until it returns false.
    fn batches(
        &self,
        range: Range<u64>,
        path: &Path,
        batch_size: usize,
        mut shuffle: Option<StdRng>,
        mut send: impl FnMut(Result<(Batch, Vec<bool>)>) -> bool,
    ) {
        let size = WINDOW.checked_next_multiple_of(batch_size);
        let size = size.unwrap_or(usize::MAX);
        let mut clicks = self.clicks(range, path).peekable();
        let mut window: Vec<Click> = Vec::new();
        while let Some(block) = clicks.next() {
            match block {
                Ok(block) => window.extend(block),
                Err(error) => {
                    send(Err(error));
                    return;
                }
            }
            while window.len() >= size || (clicks.peek().is_none() && !window.is_empty()) {
                let rest = window.split_off(size.min(window.len()));
                if let Some(rng) = &mut shuffle {
                    window.shuffle(rng);
                }
                if !window
                    .chunks(batch_size)
                    .all(|clicks| send(Ok(batch(clicks))))
                {
                    return;
                }
                window = rest;
            }
        }
    }
}

impl Examples for Clicks {
    /// A record for each click.
    fn records(&self) -> Result<Records<'_>> {
        let batches = self.batches(Part::Train, WINDOW, None)?;
        let tables = self.schema().tables.len();
        Ok(Box::new(batches.flat_map(move |batch| {
            let records: Vec<Result<Record>> = match batch {
                Err(error) => vec![Err(error)],
                Ok((batch, _)) => match batch.rows {
                    Rows::OnePerTable(rows) => rows
                        .chunks(tables)
                        .map(|rows| Ok((0..).zip(rows.iter().copied()).collect()))
                        .collect(),
                    Rows::Bags(_) => Vec::new(),
                },
            };
            records
        })))
    }

    fn schema(&self) -> Schema {
        Self::schema_of(self.rows_per_field)
    }

    fn len(&self, part: Part) -> usize {
        let range = self.range(part);
        (range.end - range.start) as usize
    }

    /// Shuffling is by windows of 65,536 clicks. Batches are made on a thread of their own, ahead of their use.
    fn batches_at<'a>(
        &'a self,
        part: Part,
        positions: Range<usize>,
        batch_size: usize,
        shuffle: Option<&'a mut StdRng>,
    ) -> Result<Batches<'a>> {
        let (source, path, of_part) = (self.source.clone(), self.path.clone(), self.range(part));
        let at = |position: usize| of_part.end.min(of_part.start + position as u64);
        let range = at(positions.start)..at(positions.end);
        let mut left = (range.end - range.start) as usize;
        let shuffle = shuffle.map(StdRng::from_rng);
        let (sender, batches) = sync_channel(AHEAD);
        thread::spawn(move || {
            let send = |batch| sender.send(batch).is_ok();
            source.batches(range, &path, batch_size, shuffle, send);
        });
        let mut failed = false;
        Ok(Box::new(std::iter::from_fn(move || {
            if left == 0 || failed {
                return None;
            }
            let batch = batches
                .recv()
                .context("the thread that makes batches panicked");
            let batch = batch.flatten();
            match &batch {
                Ok((_, labels)) => left -= labels.len(),
                Err(_) => failed = true,
            }
            Some(batch)
        })))
    }
}

/// Some consecutive lines of a log, without labels.
pub struct Unlabelled {
    /// As a model sees them.
    pub batch: Batch,
    /// How many there are in the batch.
    pub count: usize,
    /// For each malformed line that was skipped, how many of those in the batch come before it.
    pub malformed: Vec<usize>,
}

/// Reads a log once, in which labels may be missing; it may be a pipe, if it is text.
///
/// # Errors
/// What the file system or gzip says, and a malformed line unless they are skipped.
pub fn unlabelled(
    path: &Path,
    rows_per_field: u32,
    skip_malformed: bool,
) -> Result<impl Iterator<Item = Result<Unlabelled>>> {
    let name = || path.display().to_string();
    // What cannot be read twice cannot be looked into.
    let is_file = fs::metadata(path).with_context(name)?.is_file();
    let format = Format {
        path: path.to_owned(),
        is_parquet: is_file && stream::is_parquet(path).with_context(name)?,
        rows_per_field,
        skip_malformed,
        is_labelled: false,
    };
    ensure!(
        !is_file || Prepared::open(path).with_context(name)?.is_none(),
        "{}: a prepared log has no lines",
        path.display()
    );
    let blocks = format.stream(Position::START);
    Ok(blocks.map(|block| {
        let block = block?;
        Ok(Unlabelled {
            count: block.clicks.len(),
            batch: batch(&block.clicks).0,
            malformed: block.malformed,
        })
    }))
}

/// The positions of a part, in file order: a log is in order of time, and a model is to predict the future.
fn range(examples: u64, part: Part) -> Range<u64> {
    tenths(examples, part)
}

fn batch(clicks: &[Click]) -> (Batch, Vec<bool>) {
    let mut numbers = Vec::with_capacity(clicks.len() * NUMBERS);
    let mut rows = Vec::with_capacity(clicks.len() * CATEGORIES.len());
    for click in clicks {
        numbers.extend(click.numbers);
        rows.extend(click.rows);
    }
    let rows = Rows::OnePerTable(rows);
    let batch = Batch { numbers, rows };
    (batch, clicks.iter().map(|click| click.clicked).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn clicks(clicks: &Clicks, part: Part, shuffle: Option<&mut StdRng>) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for batch in clicks.batches(part, 300, shuffle)? {
            let (batch, labels) = batch?;
            assert!(labels.len() <= 300 && batch.numbers.len() == labels.len() * NUMBERS);
            all.extend(labels.iter().enumerate().map(|(i, label)| {
                let Rows::OnePerTable(rows) = &batch.rows else {
                    panic!("a click has a row of each table")
                };
                let rows = &rows[i * CATEGORIES.len()..][..CATEGORIES.len()];
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
        let log = Clicks::open(&path, Some(1000), false)?;
        let all = log.source.clicks(0..log.counts().examples, &path);
        let (whole, labels) = batch(&all.collect::<Result<Vec<_>>>()?.concat());
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
        let read = |path: &Path| clicks(&Clicks::open(path, Some(1000), false)?, Part::Train, None);
        assert_eq!(read(&gzip)?, read(&text)?);

        // Two members, one after the other, as `cat` makes them.
        fs::write(&gzip, [&bytes[..], &bytes[..]].concat())?;
        assert_eq!(
            Clicks::open(&gzip, Some(1000), false)?.counts().examples,
            1000
        );

        // What is cut off is no malformed line to be skipped.
        fs::write(&gzip, &bytes[..bytes.len() / 2])?;
        let error = Clicks::open(&gzip, Some(1000), true)
            .err()
            .context("no error")?;
        assert!(error.to_string().ends_with("log.gz"), "{error:#}");
        Ok(())
    }

    #[test]
    fn the_fingerprint_is_that_of_the_clicks() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (log, other) = (dir.path().join("log"), dir.path().join("other.gz"));
        generated::write(&log, 50, 1)?;
        generated::write(&other, 50, 1)?;
        let of = |path: &Path| {
            Ok::<_, anyhow::Error>(Clicks::open(path, Some(1000), false)?.fingerprint())
        };
        let first = of(&log)?;
        assert_eq!(of(&other)?, first, "compression does not matter");
        generated::write(&log, 50, 2)?;
        assert_ne!(of(&log)?, first);
        Ok(())
    }

    #[test]
    fn a_prepared_log_is_the_log() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (text, file) = (dir.path().join("log"), dir.path().join("log.safetensors"));
        generated::write(&text, 20_000, 1)?;
        let log = Clicks::open(&text, Some(1000), false)?;
        log.prepare(&file)?;
        let prepared = Clicks::open(&file, None, false)?;
        assert_eq!(prepared.counts(), log.counts());
        assert_eq!(prepared.fingerprint(), log.fingerprint());
        assert_eq!(prepared.schema(), log.schema());
        for part in [Part::Train, Part::Valid, Part::Test] {
            assert_eq!(clicks(&prepared, part, None)?, clicks(&log, part, None)?);
        }
        let shuffled = |log: &Clicks| {
            let mut rng = StdRng::seed_from_u64(1);
            clicks(log, Part::Train, Some(&mut rng))?;
            clicks(log, Part::Train, Some(&mut rng))
        };
        assert_eq!(shuffled(&prepared)?, shuffled(&log)?);
        // A prepared log can be prepared again, though there is no need.
        let again = dir.path().join("again.safetensors");
        prepared.prepare(&again)?;
        assert_eq!(fs::read(&again)?, fs::read(&file)?);

        let error = Clicks::open(&file, Some(999), false)
            .err()
            .context("no error")?;
        let error = error.to_string();
        assert!(
            error.contains("for 1000 rows per field, not 999"),
            "{error}"
        );
        Ok(())
    }

    #[test]
    fn damaged_prepared_logs_are_refused() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (text, file) = (dir.path().join("log"), dir.path().join("log.safetensors"));
        generated::write(&text, 100, 1)?;
        Clicks::open(&text, Some(1000), false)?.prepare(&file)?;
        let bytes = fs::read(&file)?;
        for end in [9, 20, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&file, &bytes[..end])?;
            let error = Clicks::open(&file, None, false).err().context("no error")?;
            let error = format!("{error:#}");
            assert!(error.starts_with(&file.display().to_string()), "{error}");
        }
        let other = HashMap::from([(
            "numbers",
            candle_core::Tensor::new(&[1f32], &candle_core::Device::Cpu)?,
        )]);
        candle_core::safetensors::save(&other, &file)?;
        let error = format!(
            "{:#}",
            Clicks::open(&file, None, false).err().context("no error")?
        );
        assert!(error.ends_with("not of a prepared log"), "{error}");
        Ok(())
    }

    #[test]
    fn the_place_of_a_malformed_line_does_not_depend_on_its_block() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (path, gzip) = (dir.path().join("log"), dir.path().join("log.gz"));
        // Several blocks of text.
        generated::write(&path, 9_000, 1)?;
        let mut text = fs::read(&path)?;
        let wrong = b"\xef\xbb\xbfnot a click\n";
        text.extend(wrong);
        text.extend(fs::read(&path)?);
        for _ in 0..3 {
            // Whether or not a block begins with it.
            text.splice(0..0, *b"\n");
            fs::write(&path, &text)?;
            let lines = text
                .split(|&byte| byte == b'\n')
                .take_while(|line| !wrong.starts_with(line) || line.is_empty());
            let expected = format!(
                "{}:{}: expected 40 fields, got 1",
                path.display(),
                lines.count() + 1
            );
            let error = Clicks::open(&path, Some(1000), false)
                .err()
                .context("no error")?;
            assert_eq!(error.to_string(), expected);
        }
        let log = Clicks::open(&path, Some(1000), true)?;
        assert_eq!((log.counts().examples, log.counts().malformed), (18_000, 1));
        let mut encoder =
            flate2::write::GzEncoder::new(fs::File::create(&gzip)?, flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, &text)?;
        encoder.finish()?;
        let other = Clicks::open(&gzip, Some(1000), true)?;
        for part in [Part::Train, Part::Valid, Part::Test] {
            let expected = clicks(&log, part, None)?;
            assert_eq!(expected.len(), log.len(part));
            assert_eq!(clicks(&other, part, None)?, expected);
        }
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
                Clicks::open(&path, Some(1000), false)
                    .err()
                    .context("no error")?
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
        let log = Clicks::open(&path, Some(1000), false)?;
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
        let error = Clicks::open(&path, Some(1000), false)
            .err()
            .context("no error")?;
        let expected = format!("{}:21: field label: `2` is neither 0 nor 1", path.display());
        assert_eq!(error.to_string(), expected);

        let log = Clicks::open(&path, Some(1000), true)?;
        assert_eq!((log.counts().examples, log.counts().malformed), (39, 1));
        assert_eq!(log.len(Part::Test), clicks(&log, Part::Test, None)?.len());
        fs::write(&path, "")?;
        assert!(Clicks::open(&path, Some(1000), true).is_err());
        assert!(clicks(&log, Part::Test, None).is_err());
        Ok(())
    }
}
