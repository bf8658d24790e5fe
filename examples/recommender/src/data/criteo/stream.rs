//! A log of text in blocks of whole lines, parsed by all cores in the order of the file. Parquet comes in blocks of rows.
//!
//! ```text
//!               ┌──> worker ──┐
//! file ──> lines├──> worker ──┤ in the order of the file ──> clicks
//!               └──> worker ──┘
//! ```
//!
//! The queues are bounded, so that at most a few blocks per worker are in memory. A stream that is dropped ends its threads.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

use super::parquet;
use super::reader::{Click, Reader};
use crate::data::gzip::{is_gzip, Members};
use crate::threads;

/// The bytes of a block, to the end of the line.
const BLOCK: usize = 1 << 20;

/// How text becomes clicks.
#[derive(Clone, Debug)]
pub struct Format {
    pub path: PathBuf,
    pub is_parquet: bool,
    pub rows_per_field: u32,
    pub skip_malformed: bool,
    /// Whether each line must have a label.
    pub is_labelled: bool,
}

/// Where a block is, in the file as it is after decompression.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Position {
    /// In bytes; of Parquet, in row groups.
    pub offset: u64,
    /// Lines, or rows, before the block.
    pub line: u64,
}

/// The clicks of a block.
pub struct Parsed {
    pub position: Position,
    pub clicks: Vec<Click>,
    /// For each line that was skipped, how many clicks of the block come before it.
    pub malformed: Vec<usize>,
}

/// Blocks in the order of the file. It ends after an error.
pub struct Stream {
    /// A receiver of each block, so that the order is that of the file whichever worker is done first.
    blocks: Receiver<Receiver<Result<Parsed>>>,
    ended: bool,
}

/// A block of text, and the sender of what is in it.
struct Job {
    text: Vec<u8>,
    position: Position,
    reply: SyncSender<Result<Parsed>>,
}

impl Format {
    /// The clicks of the file, from the block at `from` on.
    pub fn stream(&self, from: Position) -> Stream {
        if self.is_parquet {
            return self.parquet(from);
        }
        let workers = threads::count();
        let (blocks, ordered) = sync_channel(2 * workers);
        let (jobs, queue) = sync_channel(workers);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..workers {
            let (format, queue) = (self.clone(), queue.clone());
            thread::spawn(move || format.work(&queue));
        }
        let format = self.clone();
        thread::spawn(move || {
            if let Err(error) = format.split(from, &blocks, &jobs) {
                let (reply, failed) = sync_channel(1);
                // Whoever no longer reads needs no error.
                let _ = reply.send(Err(error));
                let _ = blocks.send(failed);
            }
        });
        Stream {
            blocks: ordered,
            ended: false,
        }
    }

    /// [`stream`](Self::stream) of Parquet, which one thread decodes.
    fn parquet(&self, from: Position) -> Stream {
        let (blocks, ordered) = sync_channel(4);
        let send = move |parsed: Result<Parsed>| {
            let (reply, block) = sync_channel(1);
            let _ = reply.send(parsed);
            blocks.send(block).is_ok()
        };
        let format = self.clone();
        thread::spawn(move || {
            let read = parquet::read(&format, from, |parsed| send(Ok(parsed)));
            if let Err(error) = read.with_context(|| format.path.display().to_string()) {
                send(Err(error));
            }
        });
        Stream {
            blocks: ordered,
            ended: false,
        }
    }

    /// Reads the file and hands its blocks to the workers, until the stream is dropped.
    fn split(
        &self,
        from: Position,
        blocks: &SyncSender<Receiver<Result<Parsed>>>,
        jobs: &SyncSender<Job>,
    ) -> Result<()> {
        let name = || self.path.display().to_string();
        let mut lines = Lines::open(&self.path, from).with_context(name)?;
        while let Some((text, position)) = lines.next_block().with_context(name)? {
            let (reply, parsed) = sync_channel(1);
            let job = Job {
                text,
                position,
                reply,
            };
            if blocks.send(parsed).is_err() || jobs.send(job).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn work(&self, queue: &Mutex<Receiver<Job>>) {
        loop {
            let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(Job {
                text,
                position,
                reply,
            }) = job
            else {
                return;
            };
            let _ = reply.send(self.parse(&text, position));
        }
    }

    fn parse(&self, text: &[u8], position: Position) -> Result<Parsed> {
        // Within the file, three bytes that look like a byte order mark are none. The end of the line before hides them from the
        // reader of the block, and is a line to it.
        let end_of_line: &[u8] = if position.offset > 0 { b"\n" } else { b"" };
        let mut reader = Reader::new(
            end_of_line.chain(text),
            self.path.display().to_string(),
            position.line - end_of_line.len() as u64,
            self.rows_per_field,
            self.skip_malformed,
        );
        if !self.is_labelled {
            reader = reader.without_labels();
        }
        let clicks = reader.by_ref().collect::<Result<_>>()?;
        Ok(Parsed {
            position,
            clicks,
            malformed: reader.into_skipped(),
        })
    }
}

/// Whether the file begins as Parquet does.
pub fn is_parquet(path: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    File::open(path)?.take(4).read_to_end(&mut start)?;
    Ok(start == b"PAR1")
}

impl Position {
    pub const START: Self = Self { offset: 0, line: 0 };
}

impl Iterator for Stream {
    type Item = Result<Parsed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let parsed = self.blocks.recv().ok()?;
        let parsed = parsed
            .recv()
            .context("a thread that reads the log panicked");
        let parsed = parsed.flatten();
        self.ended = parsed.is_err();
        Some(parsed)
    }
}

/// Cuts a file into blocks of whole lines. Wherever it starts, it cuts in the same places.
struct Lines {
    input: Box<dyn BufRead>,
    position: Position,
}

impl Lines {
    fn open(path: &Path, from: Position) -> io::Result<Self> {
        let mut file = BufReader::with_capacity(1 << 16, File::open(path)?);
        let input: Box<dyn BufRead> = if is_gzip(&mut file)? {
            let mut text = BufReader::with_capacity(1 << 16, Members::new(file));
            io::copy(&mut text.by_ref().take(from.offset), &mut io::sink())?;
            Box::new(text)
        } else {
            // A pipe cannot seek, and need not.
            if from.offset > 0 {
                file.seek(SeekFrom::Start(from.offset))?;
            }
            Box::new(file)
        };
        Ok(Self {
            input,
            position: from,
        })
    }

    /// The next block and where it starts; `None` at the end of the file.
    fn next_block(&mut self) -> io::Result<Option<(Vec<u8>, Position)>> {
        let mut text = Vec::with_capacity(BLOCK + (1 << 12));
        self.input
            .by_ref()
            .take(BLOCK as u64)
            .read_to_end(&mut text)?;
        if text.is_empty() {
            return Ok(None);
        }
        self.input.read_until(b'\n', &mut text)?;
        let start = self.position;
        self.position = Position {
            offset: start.offset + text.len() as u64,
            line: start.line + memchr::memchr_iter(b'\n', &text).count() as u64,
        };
        Ok(Some((text, start)))
    }
}
