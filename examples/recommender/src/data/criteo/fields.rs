//! Clicks whose fields come by name, as in a request: without a label, and those that are left out are missing.

use std::collections::HashMap;
use std::sync::LazyLock;

use super::reader::{category, log, Click, Malformed, CATEGORIES, NUMBERS};
use super::{batch, Batch};

/// The value of a field.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// As if the field were left out.
    Missing,
    /// Of the integers `I1` to `I13`.
    Integer(i64),
    /// Of any field, as a log spells it.
    Text(String),
}

/// Why a field is refused.
#[derive(Debug, PartialEq)]
pub struct WrongField {
    /// The position of its row.
    pub row: usize,
    /// Its name.
    pub field: String,
    /// What is wrong with it.
    pub complaint: String,
}

/// Rows of named fields as examples for a model with so many rows per field.
///
/// # Errors
/// A name or a value that a log does not have.
pub fn batch_of_fields<'a, R>(
    rows: impl IntoIterator<Item = R>,
    rows_per_field: u32,
) -> Result<Batch, WrongField>
where
    R: IntoIterator<Item = (&'a str, &'a Value)>,
{
    let empty = category(b"", rows_per_field).unwrap_or(0);
    let mut clicks = Vec::new();
    for (row, fields) in rows.into_iter().enumerate() {
        let mut click = Click {
            clicked: false,
            numbers: [log(0); NUMBERS],
            rows: [empty; CATEGORIES.len()],
        };
        for (name, value) in fields {
            let wrong = |complaint: &str| WrongField {
                row,
                field: name.to_owned(),
                complaint: complaint.to_owned(),
            };
            let Some(field) = position(name) else {
                return Err(wrong("no such field, only I1 to I13 and C1 to C26"));
            };
            if field <= NUMBERS {
                let integer = match value {
                    Value::Missing => Some(0),
                    Value::Integer(integer) => Some(*integer),
                    Value::Text(text) if text.is_empty() => Some(0),
                    Value::Text(text) => text.parse().ok(),
                };
                let integer = integer.ok_or_else(|| wrong("is not a 64-bit integer"))?;
                click.numbers[field - 1] = log(integer);
            } else {
                let row = match value {
                    Value::Missing => Some(empty),
                    Value::Text(text) => category(text.as_bytes(), rows_per_field),
                    Value::Integer(_) => return Err(wrong("must be text of hexadecimal digits")),
                };
                let row = row.ok_or_else(|| wrong("is not hexadecimal"))?;
                click.rows[field - 1 - NUMBERS] = row;
            }
        }
        clicks.push(click);
    }
    Ok(batch(&clicks).0)
}

/// The position of a field in a line, but for the label.
fn position(name: &str) -> Option<usize> {
    static POSITIONS: LazyLock<HashMap<String, usize>> = LazyLock::new(|| {
        let fields = 1..=NUMBERS + CATEGORIES.len();
        fields.map(|i| (Malformed::name(i), i)).collect()
    });
    POSITIONS.get(name).copied()
}

#[cfg(test)]
mod tests {
    use super::super::reader::Reader;
    use super::*;
    use anyhow::Result;

    #[test]
    fn they_mean_what_a_line_does() -> Result<()> {
        let line = format!("0\t5\t\t-3{}\t68fd1e64{}", "\t".repeat(10), "\t".repeat(25));
        let read = Reader::new(line.as_bytes(), "log".to_owned(), 0, 1000, false);
        let expected = batch(&read.collect::<Result<Vec<_>>>()?).0;
        let text = |text: &str| Value::Text(text.to_owned());
        for fields in [
            vec![
                ("I1", text("5")),
                ("I3", text("-3")),
                ("C1", text("68fd1e64")),
            ],
            vec![
                ("C1", text("68fd1e64")),
                ("I3", Value::Integer(-3)),
                ("I1", Value::Integer(5)),
            ],
            vec![
                ("I1", text("5")),
                ("I2", Value::Missing),
                ("I3", text("-3")),
                ("I4", text("")),
                ("C1", text("68fd1e64")),
                ("C2", Value::Missing),
                ("C3", text("")),
            ],
        ] {
            let row = fields.iter().map(|(name, value)| (*name, value));
            assert_eq!(batch_of_fields([row], 1000), Ok(expected.clone()));
        }
        Ok(())
    }

    #[test]
    fn wrong_fields_are_named() {
        for (name, value, complaint) in [
            ("I14", Value::Missing, "no such field"),
            ("label", Value::Integer(1), "no such field"),
            (
                "I1",
                Value::Text("1.5".to_owned()),
                "is not a 64-bit integer",
            ),
            ("C26", Value::Text("xyz".to_owned()), "is not hexadecimal"),
            ("C1", Value::Integer(5), "must be text"),
        ] {
            let good = vec![("I1", &Value::Missing)];
            let wrong = batch_of_fields([good, vec![(name, &value)]], 1000).unwrap_err();
            assert_eq!((wrong.row, wrong.field.as_str()), (1, name));
            assert!(wrong.complaint.starts_with(complaint), "{wrong:?}");
        }
    }
}
