//! The lines of a MovieLens file, whichever layout it has, and errors that say where they are.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{anyhow, bail, ensure, Context, Error, Result};

/// What some editors put before UTF-8; the csv reader passes over it by itself.
pub const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

#[derive(Clone, Copy)]
pub enum Layout {
    Csv,
    Dat,
}

pub struct File {
    pub path: PathBuf,
    layout: Layout,
}

/// One line, cut into as many values as the file has columns.
pub struct Record<'a, const N: usize> {
    path: &'a Path,
    line: u64,
    columns: [&'static str; N],
    pub values: [&'a str; N],
}

impl Layout {
    pub fn of(dir: &Path) -> Result<Self> {
        for layout in [Self::Csv, Self::Dat] {
            if layout.file(dir, "ratings").path.exists() {
                return Ok(layout);
            }
        }
        bail!(
            "{} holds neither ratings.csv nor ratings.dat",
            dir.display()
        )
    }

    pub fn file(self, dir: &Path, name: &str) -> File {
        let extension = match self {
            Self::Csv => "csv",
            Self::Dat => "dat",
        };
        File {
            path: dir.join(name).with_extension(extension),
            layout: self,
        }
    }
}

impl File {
    /// Calls `visit` with every line of the file; `columns` are the names of its fields.
    pub fn each_record<const N: usize>(
        &self,
        columns: [&'static str; N],
        mut visit: impl FnMut(Record<N>) -> Result<()>,
    ) -> Result<()> {
        let mut visit = |line, values: Vec<&str>| {
            let values = values.try_into().map_err(|values: Vec<&str>| {
                anyhow!(
                    "{}:{line}: expected {N} fields, got {}",
                    self.path.display(),
                    values.len()
                )
            })?;
            visit(Record::<N> {
                path: &self.path,
                line,
                columns,
                values,
            })
        };
        match self.layout {
            Layout::Csv => {
                // `flexible`, because `visit` counts the fields of both layouts.
                let mut builder = csv::ReaderBuilder::new();
                let reader = builder.flexible(true).from_path(&self.path);
                let mut reader = reader.with_context(|| self.path.display().to_string())?;
                let header = reader
                    .headers()
                    .with_context(|| self.path.display().to_string())?;
                ensure!(
                    *header == columns[..],
                    "{}:1: expected the header {}",
                    self.path.display(),
                    columns.join(",")
                );
                for record in reader.records() {
                    let record = record.with_context(|| self.path.display().to_string())?;
                    let line = record.position().map_or(0, csv::Position::line);
                    visit(line, record.iter().collect())?;
                }
            }
            Layout::Dat => {
                let bytes =
                    fs::read(&self.path).with_context(|| self.path.display().to_string())?;
                let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
                // 1M is latin-1, whose bytes are the first 256 characters of Unicode, and 10M is UTF-8. Titles with latin-1
                // accents are not valid UTF-8.
                let latin_1 = |_| Cow::Owned(bytes.iter().copied().map(char::from).collect());
                let text = str::from_utf8(bytes).map_or_else(latin_1, Cow::Borrowed);
                // Blank lines are passed over, as in the other layout.
                let lines = (1..).zip(text.lines());
                for (line, text) in lines.filter(|(_, text)| !text.trim().is_empty()) {
                    visit(line, text.split("::").collect())?;
                }
            }
        }
        Ok(())
    }
}

impl<const N: usize> Record<'_, N> {
    pub fn parse<T: FromStr>(&self, column: usize) -> Result<T> {
        self.values[column]
            .parse()
            .map_err(|_| self.wrong(column, "is not a number"))
    }

    /// The error that says what is wrong with the value in `column`.
    pub fn wrong(&self, column: usize, complaint: &str) -> Error {
        let (path, line, name, value) = (
            self.path.display(),
            self.line,
            self.columns[column],
            self.values[column],
        );
        anyhow!("{path}:{line}: field {name}: `{value}` {complaint}")
    }
}
