//! A log as Parquet, in the columns `label`, `I1` to `I13` and `C1` to `C26`, in any order and among others.
//!
//! | column | physical type | |
//! |---|---|---|
//! | `label` | BOOLEAN, INT32, INT64 | 0 or 1 |
//! | `I1` … | INT32, INT64, FLOAT, DOUBLE | whole numbers; NULL and NaN are missing ones |
//! | `C1` … | BYTE_ARRAY, INT32, INT64 | hexadecimal text, or the number that eight such digits spell; NULL is a missing one |
//!
//! A row means what the line of text with the same values means.

use std::fs::File;

use anyhow::{bail, ensure, Context, Result};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::reader::{Click, Malformed, CATEGORIES, FIELDS, NUMBERS};
use super::stream::{Format, Parsed, Position};

/// Rows that are read at once.
const BLOCK: usize = 1 << 13;

/// Hands the rows from a row group and a row of the file on to `send`, in blocks, until it returns false.
pub fn read(format: &Format, from: Position, mut send: impl FnMut(Parsed) -> bool) -> Result<()> {
    let file = SerializedFileReader::new(File::open(&format.path)?)?;
    let columns = columns(&file, format.is_labelled)?;
    let mut row = 0;
    for group in 0..file.num_row_groups() {
        let group_reader = file.get_row_group(group)?;
        let rows = u64::try_from(group_reader.metadata().num_rows())?;
        let (start, end) = (row, row + rows);
        row = end;
        if (group as u64) < from.offset {
            continue;
        }
        let mut readers = columns
            .iter()
            .map(|&column| Ok(Column::new(group_reader.get_column_reader(column)?)))
            .collect::<Result<Vec<_>>>()?;
        let mut line = start.max(from.line);
        for reader in &mut readers {
            reader.skip((line - start) as usize)?;
        }
        while line < end {
            let position = Position {
                offset: group as u64,
                line,
            };
            let count = BLOCK.min((end - line) as usize);
            let parsed = block(format, position, count, &mut readers)?;
            if !send(parsed) {
                return Ok(());
            }
            line += count as u64;
        }
    }
    Ok(())
}

/// Where the fields of a line are among the columns; without labels, where those after the label are.
fn columns(file: &SerializedFileReader<File>, is_labelled: bool) -> Result<Vec<usize>> {
    let schema = file.metadata().file_metadata().schema_descr();
    let place = |field: usize| {
        let name = Malformed::name(field);
        let found = schema
            .columns()
            .iter()
            .position(|column| column.path().string() == name);
        let found = found.with_context(|| format!("no column {name}"))?;
        let column = schema.column(found);
        ensure!(
            column.max_rep_level() == 0 && column.max_def_level() <= 1,
            "column {name} holds lists"
        );
        Ok(found)
    };
    (first_field(is_labelled)..FIELDS).map(place).collect()
}

/// The field of a line in the first column that is read.
fn first_field(is_labelled: bool) -> usize {
    usize::from(!is_labelled)
}

fn block(
    format: &Format,
    position: Position,
    count: usize,
    readers: &mut [Column],
) -> Result<Parsed> {
    let first = first_field(format.is_labelled);
    for (field, reader) in (first..).zip(readers.iter_mut()) {
        let name = || format!("column {}", Malformed::name(field));
        reader.read(count).with_context(name)?;
    }
    let (mut clicks, mut malformed) = (Vec::with_capacity(count), Vec::new());
    for row in 0..count {
        match click(readers, first, row, format.rows_per_field) {
            Ok(click) => clicks.push(click),
            Err(_) if format.skip_malformed => malformed.push(clicks.len()),
            Err(problem) => {
                let row = position.line + row as u64 + 1;
                let Malformed::Field(field, complaint) = problem else {
                    bail!("row {row}: {problem:?}")
                };
                bail!("row {row}: field {} {complaint}", Malformed::name(field))
            }
        }
    }
    Ok(Parsed {
        position,
        clicks,
        malformed,
    })
}

/// `first` is the field of the first column: 1 without labels.
fn click(
    columns: &[Column],
    first: usize,
    row: usize,
    rows_per_field: u32,
) -> Result<Click, Malformed> {
    let column = |field: usize| &columns[field - first];
    let mut click = Click {
        clicked: first == 0
            && match column(0).integer(row).flatten() {
                Some(0) => false,
                Some(1) => true,
                _ => return Err(Malformed::Field(0, "is neither 0 nor 1")),
            },
        numbers: [0.0; NUMBERS],
        rows: [0; CATEGORIES.len()],
    };
    for (field, number) in (1..).zip(&mut click.numbers) {
        let integer = column(field).integer(row);
        let integer = integer.ok_or(Malformed::Field(field, "is not a 64-bit integer"))?;
        *number = super::reader::log(integer.unwrap_or(0));
    }
    for (field, category) in (1 + NUMBERS..).zip(&mut click.rows) {
        *category = column(field)
            .with_text(row, |text| super::reader::category(text, rows_per_field))
            .flatten()
            .ok_or(Malformed::Field(field, "is not hexadecimal"))?;
    }
    Ok(click)
}

/// A column of a row group, and the values of its block.
struct Column {
    reader: ColumnReader,
    /// Of each row, whether it has a value (1) or NULL; empty if the column has no NULL.
    levels: Vec<i16>,
    values: Values,
}

/// One per row, NULL as any value.
enum Values {
    Bool(Vec<bool>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Text(Vec<ByteArray>),
    Other,
}

impl Column {
    fn new(reader: ColumnReader) -> Self {
        Self {
            reader,
            levels: Vec::new(),
            values: Values::Other,
        }
    }

    fn skip(&mut self, rows: usize) -> Result<()> {
        let skipped = match &mut self.reader {
            ColumnReader::BoolColumnReader(reader) => reader.skip_records(rows),
            ColumnReader::Int32ColumnReader(reader) => reader.skip_records(rows),
            ColumnReader::Int64ColumnReader(reader) => reader.skip_records(rows),
            ColumnReader::FloatColumnReader(reader) => reader.skip_records(rows),
            ColumnReader::DoubleColumnReader(reader) => reader.skip_records(rows),
            ColumnReader::ByteArrayColumnReader(reader) => reader.skip_records(rows),
            _ => bail!("it has a type that no field has"),
        }?;
        ensure!(skipped == rows, "it has too few rows");
        Ok(())
    }

    /// Reads the next `rows` values.
    fn read(&mut self, rows: usize) -> Result<()> {
        self.levels.clear();
        let levels = &mut self.levels;
        self.values = match &mut self.reader {
            ColumnReader::BoolColumnReader(reader) => Values::Bool(values(reader, rows, levels)?),
            ColumnReader::Int32ColumnReader(reader) => Values::I32(values(reader, rows, levels)?),
            ColumnReader::Int64ColumnReader(reader) => Values::I64(values(reader, rows, levels)?),
            ColumnReader::FloatColumnReader(reader) => Values::F32(values(reader, rows, levels)?),
            ColumnReader::DoubleColumnReader(reader) => Values::F64(values(reader, rows, levels)?),
            ColumnReader::ByteArrayColumnReader(reader) => {
                Values::Text(values(reader, rows, levels)?)
            }
            _ => bail!("it has a type that no field has"),
        };
        Ok(())
    }

    fn is_null(&self, row: usize) -> bool {
        self.levels.get(row) == Some(&0)
    }

    /// The whole number at `row`, `Some(None)` if it is missing, and `None` if it is something else.
    fn integer(&self, row: usize) -> Option<Option<i64>> {
        if self.is_null(row) {
            return Some(None);
        }
        let whole = |value: f64| {
            let is_whole = value.fract() == 0.0 && value.abs() < 2f64.powi(63);
            if value.is_nan() {
                Some(None)
            } else {
                is_whole.then_some(Some(value as i64))
            }
        };
        match &self.values {
            Values::Bool(values) => Some(Some(values[row].into())),
            Values::I32(values) => Some(Some(values[row].into())),
            Values::I64(values) => Some(Some(values[row])),
            Values::F32(values) => whole(values[row].into()),
            Values::F64(values) => whole(values[row]),
            Values::Text(_) | Values::Other => None,
        }
    }

    /// Calls `f` with the text at `row`, which is empty if it is missing; `None` if it is something else.
    fn with_text<T>(&self, row: usize, f: impl FnOnce(&[u8]) -> T) -> Option<T> {
        if self.is_null(row) {
            return Some(f(b""));
        }
        // As an unsigned number: the first digit may be any.
        let digits = |value: u32| format!("{value:08x}");
        match &self.values {
            Values::Text(values) => Some(f(values[row].data())),
            Values::I32(values) => Some(f(digits(values[row] as u32).as_bytes())),
            Values::I64(values) => {
                let value = u32::try_from(values[row]).ok()?;
                Some(f(digits(value).as_bytes()))
            }
            _ => None,
        }
    }
}

/// The next `rows` values, one per row. If the column may have NULL, `levels` says where they are.
fn values<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    rows: usize,
    levels: &mut Vec<i16>,
) -> Result<Vec<T::T>>
where
    T::T: Clone + Default,
{
    let mut values = Vec::with_capacity(rows);
    let (mut read, mut present) = (0, 0);
    while read < rows {
        let (records, count, _) =
            reader.read_records(rows - read, Some(&mut *levels), None, &mut values)?;
        ensure!(records > 0, "it has too few rows");
        (read, present) = (read + records, present + count);
    }
    if present < rows {
        let mut present = values.into_iter();
        values = levels
            .iter()
            .map(|&level| if level > 0 { present.next() } else { None })
            .map(Option::unwrap_or_default)
            .collect();
    }
    ensure!(
        values.len() == rows,
        "it has {} values for {rows} rows",
        values.len()
    );
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::super::{generated, Clicks};
    use super::*;
    use crate::data::{Examples, Part};
    use parquet::data_type::{BoolType, ByteArrayType, DoubleType, Int32Type, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
    use parquet::schema::parser::parse_message_type;
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    type Group<'a> = SerializedRowGroupWriter<'a, File>;

    /// Writes the next column: a value or NULL per row.
    fn put<T: DataType>(group: &mut Group, values: &[Option<T::T>]) -> Result<()>
    where
        T::T: Clone,
    {
        let levels: Vec<i16> = values.iter().map(|v| v.is_some().into()).collect();
        let present: Vec<T::T> = values.iter().flatten().cloned().collect();
        let mut column = group.next_column()?.context("another column")?;
        column
            .typed::<T>()
            .write_batch(&present, Some(&levels), None)?;
        Ok(column.close()?)
    }

    /// Writes lines of text as Parquet, columns of several types among them, and one that is no field.
    fn write(path: &Path, text: &str, rows_per_group: usize) -> Result<()> {
        let types = |field: usize| match field {
            0 => "boolean",
            1 => "double",
            2 => "int32",
            3..=NUMBERS => "int64",
            14 => "int64",
            15 => "int32",
            _ => "binary",
        };
        let fields = (0..FIELDS).map(|f| format!("optional {} {};", types(f), Malformed::name(f)));
        let fields: String = fields.collect();
        let schema = format!("message clicks {{ optional int64 other; {fields} }}");
        let schema = Arc::new(parse_message_type(&schema)?);
        let properties = WriterProperties::builder()
            .set_compression(parquet::basic::Compression::SNAPPY)
            .build();
        let mut file = SerializedFileWriter::new(File::create(path)?, schema, properties.into())?;
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split('\t').collect())
            .collect();
        for lines in lines.chunks(rows_per_group) {
            let mut group = file.next_row_group()?;
            put::<Int64Type>(&mut group, &vec![Some(7); lines.len()])?;
            for field in 0..FIELDS {
                let column = || {
                    lines
                        .iter()
                        .map(|line| Some(line[field]).filter(|v| !v.is_empty()))
                };
                let decimal = || column().map(|v| v.map(|v| v.parse::<i64>()).transpose());
                let hexadecimal =
                    || column().map(|v| v.map(|v| i64::from_str_radix(v, 16)).transpose());
                match (types(field), field) {
                    ("boolean", _) => {
                        let values: Vec<_> = column().map(|v| v.map(|v| v == "1")).collect();
                        put::<BoolType>(&mut group, &values)?;
                    }
                    ("double", _) => {
                        // As a table with missing numbers is often kept.
                        let values: Result<Vec<_>, _> = decimal().collect();
                        let float = |v: Option<i64>| Some(v.map_or(f64::NAN, |v| v as f64));
                        let values: Vec<_> = values?.into_iter().map(float).collect();
                        put::<DoubleType>(&mut group, &values)?;
                    }
                    ("int32", ..=NUMBERS) => {
                        let values: Result<Vec<_>, _> = decimal().collect();
                        let values: Vec<_> =
                            values?.into_iter().map(|v| v.map(|v| v as i32)).collect();
                        put::<Int32Type>(&mut group, &values)?;
                    }
                    ("int64", ..=NUMBERS) => {
                        put::<Int64Type>(&mut group, &decimal().collect::<Result<Vec<_>, _>>()?)?;
                    }
                    ("int32", _) => {
                        let values: Result<Vec<_>, _> = hexadecimal().collect();
                        let values: Vec<_> =
                            values?.into_iter().map(|v| v.map(|v| v as i32)).collect();
                        put::<Int32Type>(&mut group, &values)?;
                    }
                    ("int64", _) => {
                        put::<Int64Type>(
                            &mut group,
                            &hexadecimal().collect::<Result<Vec<_>, _>>()?,
                        )?;
                    }
                    _ => {
                        let values: Vec<_> = column().map(|v| v.map(ByteArray::from)).collect();
                        put::<ByteArrayType>(&mut group, &values)?;
                    }
                }
            }
            group.close()?;
        }
        file.close()?;
        Ok(())
    }

    #[test]
    fn rows_are_what_the_lines_of_text_are() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (text, file) = (dir.path().join("log"), dir.path().join("log.parquet"));
        generated::write(&text, 20_000, 1)?;
        let log = Clicks::open(&text, Some(1000), false)?;
        write(&file, &fs::read_to_string(&text)?, 9_000)?;
        let rows = Clicks::open(&file, Some(1000), false)?;
        assert_eq!(rows.fingerprint(), log.fingerprint());
        assert_eq!(rows.counts(), log.counts());
        for part in [Part::Train, Part::Valid, Part::Test] {
            let read =
                |clicks: &Clicks| clicks.batches(part, 777, None)?.collect::<Result<Vec<_>>>();
            assert_eq!(read(&rows)?, read(&log)?);
        }
        Ok(())
    }

    #[test]
    fn what_is_no_click_is_named() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("log.parquet");
        let good = format!("1{}\n", "\t".repeat(FIELDS - 1));
        let no_label = "\t".repeat(FIELDS - 1) + "\n";
        let no_category = format!("0{}xyz\n", "\t".repeat(FIELDS - 1));
        for (bad, complaint) in [
            (no_label, "row 3: field label is neither 0 nor 1"),
            (no_category, "row 3: field C26 is not hexadecimal"),
        ] {
            write(&file, &format!("{good}{good}{bad}{good}"), 2)?;
            let error = Clicks::open(&file, None, false).err().context("no error")?;
            assert_eq!(
                format!("{error:#}"),
                format!("{}: {complaint}", file.display())
            );
            let counts = Clicks::open(&file, None, true)?.counts();
            assert_eq!((counts.examples, counts.malformed), (3, 1));
        }
        let bytes = fs::read(&file)?;
        fs::write(&file, &bytes[..bytes.len() / 2])?;
        assert!(Clicks::open(&file, None, true).is_err());
        Ok(())
    }
}
