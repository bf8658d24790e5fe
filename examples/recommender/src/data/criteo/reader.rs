//! The lines of a click log, whatever is in them: a line fits the format, or it is an error that says where it does not.

use std::hash::{Hash, Hasher};
use std::io::Read;
use std::sync::LazyLock;

use anyhow::{anyhow, Context, Error, Result};
use csv::{ByteRecord, ReaderBuilder};
use twox_hash::XxHash64;

/// The number of integers.
pub const NUMBERS: usize = 13;

/// The names of the categories.
pub const CATEGORIES: [&str; 26] = [
    "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C10", "C11", "C12", "C13", "C14", "C15",
    "C16", "C17", "C18", "C19", "C20", "C21", "C22", "C23", "C24", "C25", "C26",
];

/// The number of fields.
pub const FIELDS: usize = 1 + NUMBERS + CATEGORIES.len();

const FIELDS_WITHOUT_LABEL: usize = FIELDS - 1;

/// How much of a wrong value an error shows.
const SHOWN: usize = 40;

/// A line, in numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Click {
    pub clicked: bool,
    pub numbers: [f32; NUMBERS],
    /// The row of each category in the table of its field.
    pub rows: [u32; CATEGORIES.len()],
}

/// Reads clicks from any source of bytes. Iteration ends after an error.
pub struct Reader<R> {
    lines: csv::Reader<R>,
    record: ByteRecord,
    name: String,
    lines_before: u64,
    rows_per_field: u32,
    skip_malformed: bool,
    is_labelled: bool,
    /// How many clicks have been read.
    read: usize,
    /// For each line that was skipped, how many clicks were read before it.
    skipped: Vec<usize>,
    ended: bool,
}

/// Why a line is no click.
#[derive(Debug)]
pub enum Malformed {
    FieldCount,
    Field(usize, &'static str),
}

impl<R: Read> Reader<R> {
    /// `name` is what errors call the file, of which `input` begins after `lines_before` lines.
    pub fn new(
        input: R,
        name: String,
        lines_before: u64,
        rows_per_field: u32,
        skip_malformed: bool,
    ) -> Self {
        let lines = ReaderBuilder::new()
            .delimiter(b'\t')
            .has_headers(false)
            .quoting(false)
            // `Click::parse` counts the fields.
            .flexible(true)
            .buffer_capacity(1 << 16)
            .from_reader(input);
        Self {
            lines,
            record: ByteRecord::new(),
            name,
            lines_before,
            rows_per_field,
            skip_malformed,
            is_labelled: true,
            read: 0,
            skipped: Vec::new(),
            ended: false,
        }
    }

    /// Reads lines whose label may be empty, or left out with its tab. Labels are not told.
    pub fn without_labels(self) -> Self {
        Self {
            is_labelled: false,
            ..self
        }
    }

    /// For each malformed line that was skipped, how many clicks come before it.
    pub fn into_skipped(self) -> Vec<usize> {
        self.skipped
    }

    fn read(&mut self) -> Result<Option<Click>> {
        loop {
            let read = self.lines.read_byte_record(&mut self.record);
            if !read.with_context(|| self.name.clone())? {
                return Ok(None);
            }
            match Click::parse(&self.record, self.rows_per_field, self.is_labelled) {
                Ok(click) => {
                    self.read += 1;
                    return Ok(Some(click));
                }
                Err(_) if self.skip_malformed => self.skipped.push(self.read),
                Err(malformed) => {
                    let line = self.record.position().map_or(0, csv::Position::line);
                    let line = self.lines_before + line;
                    return Err(malformed.error(&self.name, line, &self.record));
                }
            }
        }
    }
}

impl<R: Read> Iterator for Reader<R> {
    type Item = Result<Click>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let click = self.read().transpose();
        self.ended = !matches!(click, Some(Ok(_)));
        click
    }
}

impl Hash for Click {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.clicked, self.numbers.map(f32::to_bits), self.rows).hash(state);
    }
}

impl Click {
    fn parse(
        record: &ByteRecord,
        rows_per_field: u32,
        is_labelled: bool,
    ) -> Result<Self, Malformed> {
        // Without a label, what follows it comes one place earlier.
        let (label, shift) = match record.len() {
            FIELDS => (&record[0], 0),
            FIELDS_WITHOUT_LABEL if !is_labelled => (&b""[..], 1),
            _ => return Err(Malformed::FieldCount),
        };
        let field_at = |field: usize| &record[field - shift];
        let mut click = Self {
            clicked: match label {
                b"0" => false,
                b"1" => true,
                b"" if !is_labelled => false,
                _ => return Err(Malformed::Field(0, "is neither 0 nor 1")),
            },
            numbers: [0.0; NUMBERS],
            rows: [0; CATEGORIES.len()],
        };
        for (field, number) in (1..).zip(&mut click.numbers) {
            *number = log_of(field_at(field))
                .ok_or(Malformed::Field(field, "is not a 64-bit integer"))?;
        }
        for (field, row) in (1 + NUMBERS..).zip(&mut click.rows) {
            *row = category(field_at(field), rows_per_field)
                .ok_or(Malformed::Field(field, "is not hexadecimal"))?;
        }
        Ok(click)
    }
}

/// `ln(1 + x)` of an integer, as DLRM has it: negative ones, which are rare, and missing ones count as 0.
fn log_of(integer: &[u8]) -> Option<f32> {
    let value = match integer {
        [] => 0,
        _ => str::from_utf8(integer).ok()?.parse::<i64>().ok()?,
    };
    Some(log(value))
}

/// `ln(1 + value)`, or 0 of a negative value.
pub fn log(value: i64) -> f32 {
    /// Most are small counts.
    static SMALL: LazyLock<[f32; 1024]> =
        LazyLock::new(|| std::array::from_fn(|x| (x as f64).ln_1p() as f32));
    let small = SMALL.get(value.max(0) as usize).copied();
    small.unwrap_or_else(|| (value as f64).ln_1p() as f32)
}

/// The row of a category of hexadecimal digits.
pub fn category(text: &[u8], rows: u32) -> Option<u32> {
    let is_hexadecimal = text.iter().all(u8::is_ascii_hexdigit);
    is_hexadecimal.then(|| row_of(text, rows))
}

/// The row of a category, uniform in `0..rows`. Saved models depend on it: it must not change.
fn row_of(category: &[u8], rows: u32) -> u32 {
    let hash = XxHash64::oneshot(0, category);
    ((u128::from(hash) * u128::from(rows)) >> 64) as u32
}

impl Malformed {
    /// What a field is called.
    pub fn name(field: usize) -> String {
        match field {
            0 => "label".to_owned(),
            1..=NUMBERS => format!("I{field}"),
            _ => CATEGORIES[field - 1 - NUMBERS].to_owned(),
        }
    }

    fn error(&self, name: &str, line: u64, record: &ByteRecord) -> Error {
        match *self {
            Self::FieldCount => {
                anyhow!(
                    "{name}:{line}: expected {FIELDS} fields, got {}",
                    record.len()
                )
            }
            Self::Field(field, complaint) => {
                // From the end, as the label may be missing.
                let value = &record[record.len() + field - FIELDS];
                let shown = value[..value.len().min(SHOWN)].escape_ascii();
                let more = if value.len() > SHOWN { "…" } else { "" };
                let field = Self::name(field);
                anyhow!("{name}:{line}: field {field}: `{shown}{more}` {complaint}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::seq::IndexedRandom;
    use rand::{RngExt, SeedableRng};

    /// A line with `value` in `field`, the others being empty but for the label.
    fn line(field: usize, value: &str) -> String {
        let mut fields = [""; FIELDS];
        fields[0] = "0";
        fields[field] = value;
        fields.join("\t") + "\n"
    }

    fn read(input: &[u8]) -> Result<Vec<Click>> {
        Reader::new(input, "log".to_owned(), 0, 1000, false).collect()
    }

    fn error(input: &[u8]) -> String {
        format!("{:#}", read(input).expect_err("malformed"))
    }

    #[test]
    fn a_line_in_numbers() -> Result<()> {
        let text = "1\t5\t-3\t\t0\t1382\t4\t15\t2\t181\t1\t2\t\t2\t68fd1e64\t80E26C9B".to_owned()
            + &"\t".repeat(24);
        let [click] = &read(text.as_bytes())?[..] else {
            panic!("one line")
        };
        assert!(click.clicked);
        assert_eq!(click.numbers[..4], [6f32.ln(), 0.0, 0.0, 0.0]);
        assert_eq!(click.numbers[4], 1383f32.ln());
        // The first is floor(1000 * XXH64("68fd1e64") / 2^64); that of the empty text is published with XXH64.
        assert_eq!(click.rows[0], row_of(b"68fd1e64", 1000));
        assert_ne!(click.rows[0], click.rows[1]);
        let empty = (0xef46_db37_51d8_e999_u64 as f64 / 2f64.powi(64) * 1000.0) as u32;
        assert_eq!(click.rows[2..], [empty; 24]);
        Ok(())
    }

    #[test]
    fn rows_are_in_range_and_uniform() {
        let mut counts = [0; 10];
        (0..10_000).for_each(|i| counts[row_of(format!("{i:08x}").as_bytes(), 10) as usize] += 1);
        assert!(
            counts.iter().all(|count| (850..1150).contains(count)),
            "{counts:?}"
        );
        assert_eq!(row_of(b"68fd1e64", 1), 0);
    }

    #[test]
    fn malformed_lines_name_line_and_field() {
        let good = line(1, "7");
        for (bad, expected) in [
            (line(0, ""), "field label: `` is neither 0 nor 1"),
            (line(0, "2"), "field label: `2` is neither 0 nor 1"),
            (line(1, "1.5"), "field I1: `1.5` is not a 64-bit integer"),
            (
                line(13, "9223372036854775808"),
                "field I13: `9223372036854775808` is not a 64-bit integer",
            ),
            (line(14, "xyz"), "field C1: `xyz` is not hexadecimal"),
            (
                line(39, "\"é"),
                "field C26: `\\\"\\xc3\\xa9` is not hexadecimal",
            ),
            (
                line(39, &"g".repeat(1000)),
                &format!("field C26: `{}…` is not hexadecimal", "g".repeat(SHOWN)),
            ),
            ("0\t1\n".to_owned(), "expected 40 fields, got 2"),
            (line(39, "a\tb"), "expected 40 fields, got 41"),
        ] {
            let message = error(format!("{good}\n{good}{bad}").as_bytes());
            assert_eq!(message, format!("log:4: {expected}"));
        }
    }

    #[test]
    fn malformed_lines_are_skipped_and_counted() -> Result<()> {
        let text = [
            line(1, "7"),
            line(1, "x"),
            "\u{feff}\n".into(),
            line(1, "8"),
        ]
        .concat();
        let mut reader = Reader::new(text.as_bytes(), "log".to_owned(), 0, 1000, true);
        let clicks = reader.by_ref().collect::<Result<Vec<_>>>()?;
        assert_eq!((clicks.len(), reader.into_skipped()), (2, vec![1, 1]));
        Ok(())
    }

    #[test]
    fn labels_may_be_missing() -> Result<()> {
        let lines = ["1", "0", ""].map(|label| label.to_owned() + &line(14, "abc")[1..]);
        let without = lines[0][2..].to_owned();
        let text = lines.concat() + &without;
        let reader = Reader::new(text.as_bytes(), "log".to_owned(), 0, 1000, false);
        let clicks = reader.without_labels().collect::<Result<Vec<_>>>()?;
        assert_eq!(clicks.len(), 4);
        assert!(clicks.iter().all(|click| click.rows == clicks[0].rows));
        assert!(error(text.as_bytes()).starts_with("log:3: field label"));
        for (bad, said) in [
            ("x".to_owned() + &line(14, "abc")[1..], "field label: `x`"),
            (line(14, "xyz")[2..].to_owned(), "field C1: `xyz`"),
            (line(39, "xyz")[2..].to_owned(), "field C26: `xyz`"),
            ("1\t2\n".to_owned(), "expected 40 fields, got 2"),
        ] {
            let reader = Reader::new(bad.as_bytes(), "log".to_owned(), 0, 1000, false);
            let read = reader.without_labels().collect::<Result<Vec<_>>>();
            let message = format!("{:#}", read.expect_err("malformed"));
            assert!(message.starts_with(&format!("log:1: {said}")), "{message}");
        }
        Ok(())
    }

    #[test]
    fn a_byte_order_mark_and_blank_lines_are_passed_over() -> Result<()> {
        let text = line(1, "7");
        assert_eq!(
            read(format!("\u{feff}{text}\n\n").as_bytes())?,
            read(text.as_bytes())?
        );
        Ok(())
    }

    #[test]
    fn line_ends_of_either_kind() -> Result<()> {
        let unix = line(39, "abc") + line(39, "def").trim_end();
        assert_eq!(
            read(unix.as_bytes())?,
            read(unix.replace('\n', "\r\n").as_bytes())?
        );
        assert!(read(b"")?.is_empty());
        Ok(())
    }

    /// Bytes that are nearly click logs: none may panic, and skipping leaves nothing to complain of.
    #[test]
    fn any_bytes_are_clicks_or_errors() {
        let mut rng = StdRng::seed_from_u64(1);
        let pieces: [&[u8]; 12] = [
            b"\t",
            b"\n",
            b"\r",
            b"0",
            b"1",
            b"-9223372036854775808",
            b"+",
            b"abc",
            b"\"",
            b"\xff",
            b"\0",
            b"\xef\xbb\xbf",
        ];
        for _ in 0..2_000 {
            let mut bytes = line(1, "7").repeat(3).into_bytes();
            for _ in 0..rng.random_range(0..20) {
                let at = rng.random_range(0..=bytes.len());
                let end = (at + rng.random_range(0..3)).min(bytes.len());
                let piece = pieces.choose(&mut rng).expect("there are pieces");
                bytes.splice(at..end, piece.iter().copied());
            }
            let errors = Reader::new(&bytes[..], "log".to_owned(), 0, u32::MAX, false)
                .filter(Result::is_err)
                .count();
            assert!(errors <= 1);
            let mut reader = Reader::new(&bytes[..], "log".to_owned(), 0, u32::MAX, true);
            assert!(reader.by_ref().all(|click| click.is_ok()));
            assert_eq!(!reader.into_skipped().is_empty(), errors > 0);
        }
    }
}
