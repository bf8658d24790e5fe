//! The file of runs: what was trained, and what came of it.

use std::fmt;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::report::fraction;

/// All that decides a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    pub data: String,
    /// Of all embedding tables, before hashing.
    pub rows: usize,
    pub hash: String,
    pub compression: f64,
    pub seed: u64,
    pub embedding_dim: usize,
    pub epochs: usize,
    pub batch_size: usize,
    pub lr: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Of the embedding tables, four bytes each.
    pub parameters: usize,
    pub valid_auc: f64,
    pub test_auc: f64,
    pub test_logloss: f64,
    pub seconds: f64,
}

/// Runs, in memory and in their file.
pub struct Runs {
    known: Vec<(Setting, Outcome)>,
    file: csv::Writer<File>,
}

impl Runs {
    /// The runs in the file at `path`, which is made if it is not there.
    pub fn open(path: &Path) -> Result<Self> {
        let open = || {
            let mut options = File::options();
            let file = options.read(true).append(true).create(true).open(path)?;
            let is_new = file.metadata()?.len() == 0;
            let mut known = Vec::new();
            let mut reader = csv::Reader::from_reader(&file);
            let header = reader.headers()?.clone();
            for record in reader.records() {
                let record = record?;
                known.push((
                    record.deserialize(Some(&header))?,
                    record.deserialize(Some(&header))?,
                ));
            }
            let mut builder = csv::WriterBuilder::new();
            let file = builder.has_headers(is_new).from_writer(file);
            Ok::<_, anyhow::Error>(Self { known, file })
        };
        open().with_context(|| format!("runs in {}", path.display()))
    }

    pub fn find(&self, setting: &Setting) -> Option<Outcome> {
        let known = self.known.iter().find(|(known, _)| known == setting);
        known.map(|(_, outcome)| *outcome)
    }

    pub fn push(&mut self, setting: Setting, outcome: Outcome) -> Result<()> {
        self.file.serialize((&setting, outcome))?;
        self.file.flush()?;
        self.known.push((setting, outcome));
        Ok(())
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (hash, compression) = (&self.hash, fraction(self.compression));
        write!(f, "{hash}, compression {compression}, seed {}", self.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_again() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("runs.csv");
        let setting = |seed| Setting {
            data: "a, \"b\"".to_owned(),
            rows: 5000,
            hash: "mix:8".to_owned(),
            compression: 1.0 / 3.0,
            seed,
            embedding_dim: 16,
            epochs: 8,
            batch_size: 100,
            lr: 0.002,
        };
        let outcome = |auc| Outcome {
            parameters: 1000,
            valid_auc: auc,
            test_auc: auc,
            test_logloss: 0.5,
            seconds: 1.25,
        };
        Runs::open(&path)?.push(setting(1), outcome(0.7))?;
        Runs::open(&path)?.push(setting(2), outcome(0.8))?;
        let runs = Runs::open(&path)?;
        assert_eq!(runs.find(&setting(1)), Some(outcome(0.7)));
        assert_eq!(runs.find(&setting(2)), Some(outcome(0.8)));
        assert_eq!(runs.find(&setting(3)), None);
        assert_eq!(std::fs::read_to_string(&path)?.lines().count(), 3);

        std::fs::write(&path, "hash,seed\nmix,1\n")?;
        assert!(Runs::open(&path).is_err());
        Ok(())
    }
}
