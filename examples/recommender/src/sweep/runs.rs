//! The file of runs: what was trained, and with which result.
//!
//! A run is a line, written when it ends. A program that is killed while writing leaves an incomplete line, which is removed; an
//! editor may omit the newline of the last line, which is added.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{ensure, Context, Result};
use serde::{de, Deserialize, Deserializer, Serialize, Serializer};

use super::plan::Training;
use crate::report::{columns_of, fraction};
use crate::say;

/// Everything that determines a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// The path of the data set, for people.
    pub data: String,
    pub fingerprint: Fingerprint,
    /// Of all embedding tables, before hashing.
    pub rows: usize,
    pub hash: String,
    /// Columns of the large tables, if they have matrices.
    pub inner_dim: Option<usize>,
    /// Bits per value, to which the tables are rounded after the training: 32, 8 or 4.
    pub bits: u32,
    /// Parameters per value of the tables.
    pub compression: f64,
    pub seed: u64,
    pub embedding_dim: usize,
    pub epochs: usize,
    pub batch_size: usize,
    pub lr: f64,
}

/// A hash of the data set, in hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fingerprint(pub u64);

/// The result of a run. The last column is one that may lose digits unnoticed if a line is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Of the embedding tables.
    pub parameters: usize,
    /// Of the embedding tables, with all that a lookup reads.
    pub bytes: usize,
    /// Before the tables are rounded. Empty if all labels of the part are equal.
    pub valid_auc: Option<f64>,
    /// The test part before the tables are rounded.
    pub exact_auc: Option<f64>,
    pub exact_logloss: f64,
    pub test_auc: Option<f64>,
    pub test_logloss: f64,
    pub seconds: f64,
}

/// The first line of the file: the fields of a [`Setting`] and of its [`Outcome`].
const HEADER: &str =
    "data,fingerprint,rows,hash,inner_dim,bits,compression,seed,embedding_dim,epochs,batch_size,lr,\
    parameters,bytes,valid_auc,exact_auc,exact_logloss,test_auc,test_logloss,seconds";

/// Runs, in memory and in their file.
pub struct Runs {
    known: Vec<(Setting, Outcome)>,
    file: File,
}

impl Runs {
    /// The runs in the file at `path`, which is created if it does not exist.
    ///
    /// # Errors
    /// A file that cannot be read and written, other columns, or a line that is not a run.
    pub fn open(path: &Path) -> Result<Self> {
        Self::try_open(path).with_context(|| format!("runs in {}", path.display()))
    }

    fn try_open(path: &Path) -> Result<Self> {
        let mut options = File::options();
        let mut file = options.read(true).append(true).create(true).open(path)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let whole = text.rfind('\n').map_or(0, |last| last + 1);
        let mut known = parse(&text[..whole])?;
        match parse(&text) {
            // A new file, or one that was cut off within its first line.
            _ if whole == 0 && HEADER.starts_with(&text) => {
                file.set_len(0)?;
                file.write_all(format!("{HEADER}\n").as_bytes())?;
            }
            _ if whole == text.len() => {}
            Ok(runs) => {
                file.write_all(b"\n")?;
                known = runs;
            }
            Err(error) if whole == 0 => return Err(error),
            Err(_) => {
                let path = path.display();
                say!("the last line of {path} was cut off: its run is repeated");
                file.set_len(whole as u64)?;
            }
        }
        Ok(Self { known, file })
    }

    /// The result of a run with this setting, on the same data at any path.
    pub fn find(&self, setting: &Setting) -> Option<Outcome> {
        let is_same = |known: &Setting| {
            let data = known.data.clone();
            *known
                == Setting {
                    data,
                    ..setting.clone()
                }
        };
        let known = self.known.iter().find(|(known, _)| is_same(known));
        known.map(|(_, outcome)| *outcome)
    }

    /// Adds the runs of a training that the file does not hold yet.
    pub fn extend(&mut self, training: &Training, outcomes: Vec<Outcome>) -> Result<()> {
        ensure!(
            outcomes.len() == training.settings.len(),
            "{} runs instead of {}",
            outcomes.len(),
            training.settings.len()
        );
        for ((setting, _), outcome) in training.settings.iter().zip(outcomes) {
            if self.find(setting).is_none() {
                self.push(setting.clone(), outcome)?;
            }
        }
        Ok(())
    }

    pub fn push(&mut self, setting: Setting, outcome: Outcome) -> Result<()> {
        let line = line(|lines| lines.serialize((&setting, outcome)))?;
        // In one write, so that it is unlikely to be cut off if the program is killed.
        self.file.write_all(line.as_bytes())?;
        self.known.push((setting, outcome));
        Ok(())
    }
}

/// The runs in a whole file.
fn parse(text: &str) -> Result<Vec<(Setting, Outcome)>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers()?.clone();
    let columns = header.iter().collect::<Vec<_>>().join(",");
    ensure!(
        text.is_empty() || columns == HEADER,
        "expected the columns {HEADER}, got {columns}; name another folder with --out"
    );
    let run = |record: csv::StringRecord| {
        Ok((
            record.deserialize(Some(&header))?,
            record.deserialize(Some(&header))?,
        ))
    };
    reader.records().map(|record| run(record?)).collect()
}

/// What [`parse_outcome`] reads.
pub fn outcome_line(outcome: Outcome) -> Result<String> {
    Ok(line(|lines| lines.serialize(outcome))?
        .trim_end()
        .to_owned())
}

/// The outcome of a run as another process prints it.
pub fn parse_outcome(text: &str) -> Result<Outcome> {
    let mut builder = csv::ReaderBuilder::new();
    let mut reader = builder.has_headers(false).from_reader(text.as_bytes());
    let record = reader.records().next().context("no run")??;
    Ok(record.deserialize(None)?)
}

/// A line without the header.
fn line(write: impl FnOnce(&mut csv::Writer<Vec<u8>>) -> csv::Result<()>) -> Result<String> {
    let mut builder = csv::WriterBuilder::new();
    let mut lines = builder.has_headers(false).from_writer(Vec::new());
    write(&mut lines)?;
    let bytes = lines.into_inner().map_err(|error| error.into_error())?;
    Ok(String::from_utf8(bytes)?)
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:016x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Asked for as text: otherwise digits would be read as a number, and an e among them as its exponent.
        let text = String::deserialize(deserializer)?;
        let value = u64::from_str_radix(&text, 16);
        value.map(Self).map_err(de::Error::custom)
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let compression = fraction(self.compression);
        write!(
            f,
            "{}, {}, {} bits, compression {compression}, seed {}",
            self.hash,
            columns_of(self.inner_dim),
            self.bits,
            self.seed
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn setting(seed: u64) -> Setting {
        Setting {
            data: "a, \"b\"".to_owned(),
            fingerprint: Fingerprint(0x1234_5678),
            rows: 5000,
            hash: "mix:8".to_owned(),
            inner_dim: Some(8),
            bits: 4,
            compression: 1.0 / 3.0,
            seed,
            embedding_dim: 16,
            epochs: 8,
            batch_size: 100,
            lr: 0.002,
        }
    }

    fn outcome(auc: f64) -> Outcome {
        Outcome {
            parameters: 1000,
            bytes: 600,
            valid_auc: Some(auc),
            exact_auc: None,
            exact_logloss: 0.4,
            test_auc: None,
            test_logloss: 0.5,
            seconds: 1.25,
        }
    }

    #[test]
    fn outcomes_are_handed_over() -> Result<()> {
        for outcome in [
            outcome(0.1 + 0.2),
            Outcome {
                test_auc: Some(1.0 / 3.0),
                ..outcome(0.5)
            },
        ] {
            assert_eq!(parse_outcome(&outcome_line(outcome)?)?, outcome);
        }
        assert!(parse_outcome("1,2").is_err() && parse_outcome("").is_err());
        Ok(())
    }

    #[test]
    fn runs_are_found_again() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("runs.csv");
        Runs::open(&path)?.push(setting(1), outcome(0.7))?;
        Runs::open(&path)?.push(setting(2), outcome(0.8))?;
        let runs = Runs::open(&path)?;
        assert_eq!(runs.find(&setting(1)), Some(outcome(0.7)));
        assert_eq!(runs.find(&setting(2)), Some(outcome(0.8)));
        assert_eq!(runs.find(&setting(3)), None);
        assert_eq!(fs::read_to_string(&path)?.lines().count(), 3);
        Ok(())
    }

    #[test]
    fn a_run_belongs_to_its_data_and_not_to_the_path() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut runs = Runs::open(&dir.path().join("runs.csv"))?;
        // Not to be read as the number 12e5.
        let fingerprint = Fingerprint(0x12e5);
        runs.push(
            Setting {
                fingerprint,
                ..setting(1)
            },
            outcome(0.7),
        )?;
        let runs = Runs::open(&dir.path().join("runs.csv"))?;
        let moved = Setting {
            data: "elsewhere".to_owned(),
            fingerprint,
            ..setting(1)
        };
        assert_eq!(runs.find(&moved), Some(outcome(0.7)));
        assert_eq!(runs.find(&setting(1)), None);
        Ok(())
    }

    #[test]
    fn a_last_line_without_a_newline_is_completed_or_repeated() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("runs.csv");
        let mut runs = Runs::open(&path)?;
        runs.push(setting(1), outcome(0.7))?;
        runs.push(setting(2), outcome(0.8))?;
        let text = fs::read_to_string(&path)?;
        // Wherever the file is cut, the runs before are kept, and adding the others again restores it.
        for end in 0..text.len() {
            fs::write(&path, &text[..end])?;
            let mut runs = Runs::open(&path).with_context(|| format!("cut at {end}"))?;
            for (seed, auc) in [(1, 0.7), (2, 0.8)] {
                match runs.find(&setting(seed)) {
                    // Only the seconds, which are just informative, may have lost digits.
                    Some(found) => assert_eq!(
                        Outcome {
                            seconds: 1.25,
                            ..found
                        },
                        outcome(auc)
                    ),
                    None => runs.push(setting(seed), outcome(auc))?,
                }
            }
            let runs = Runs::open(&path)?;
            assert_eq!(runs.known.len(), 2, "cut at {end}");
            assert_eq!(fs::read_to_string(&path)?.lines().count(), 3);
        }
        Ok(())
    }

    #[test]
    fn files_that_are_no_runs_are_refused_and_stay() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("runs.csv");
        for (text, said) in [
            (
                "hash,seed\nmix,1\n",
                "expected the columns data,fingerprint",
            ),
            ("notes of mine", "got notes of mine"),
            (&format!("{HEADER}\n1,2\n"), "line: 2"),
        ] {
            fs::write(&path, text)?;
            let error = format!("{:#}", Runs::open(&path).err().context("no error")?);
            assert!(error.contains(said), "{error}");
            assert_eq!(fs::read_to_string(&path)?, text);
        }
        Ok(())
    }
}
