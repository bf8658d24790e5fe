//! Files compressed by gzip, or not.

use std::io::{BufRead, Read, Result};

use flate2::bufread::GzDecoder;

/// The first bytes of a gzip file. No text begins like this.
const MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Whether `file` is to be read through [`Members`].
pub fn is_gzip(file: &mut impl BufRead) -> Result<bool> {
    Ok(file.fill_buf()?.starts_with(&MAGIC))
}

/// What `zcat` reads of a gzip file: its members one after the other, without the zeros that tapes and block devices put
/// behind them.
pub struct Members<R> {
    /// None at the end of the file.
    member: Option<GzDecoder<R>>,
}

impl<R: BufRead> Members<R> {
    pub fn new(file: R) -> Self {
        Self {
            member: Some(GzDecoder::new(file)),
        }
    }
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        while let Some(member) = &mut self.member {
            let read = member.read(buf)?;
            if read > 0 || buf.is_empty() {
                return Ok(read);
            }
            let rest = self.member.take().map(GzDecoder::into_inner);
            self.member = rest.map(next_member).transpose()?.flatten();
        }
        Ok(0)
    }
}

/// What follows zeros, if anything does.
fn next_member<R: BufRead>(mut file: R) -> Result<Option<GzDecoder<R>>> {
    loop {
        let bytes = file.fill_buf()?;
        let zeros = bytes.iter().take_while(|&&byte| byte == 0).count();
        match bytes.len() {
            0 => return Ok(None),
            len if len == zeros => file.consume(zeros),
            _ => {
                file.consume(zeros);
                return Ok(Some(GzDecoder::new(file)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{write::GzEncoder, Compression};
    use std::io::{BufReader, Write};

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    /// With buffers of a few bytes, so that every piece is cut somewhere.
    fn read(bytes: &[u8]) -> Result<String> {
        let mut text = String::new();
        Members::new(BufReader::with_capacity(3, bytes)).read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn members_and_padding() -> Result<()> {
        let (one, two, zeros) = (gzip("one"), gzip("two"), vec![0; 1000]);
        for (file, text) in [
            (one.clone(), "one"),
            ([&one[..], &two].concat(), "onetwo"),
            ([&one[..], &zeros].concat(), "one"),
            ([&one[..], &zeros, &two, &zeros].concat(), "onetwo"),
            ([&gzip("")[..], &one].concat(), "one"),
        ] {
            assert_eq!(read(&file)?, text);
        }
        Ok(())
    }

    #[test]
    fn what_is_cut_off_or_no_gzip_is_an_error() {
        let one = gzip("one");
        for end in 0..one.len() {
            assert!(read(&one[..end]).is_err(), "{end}");
        }
        assert!(read(&[&one[..], b"more"].concat()).is_err());
        assert!(read(&[&one[..], &one[..5]].concat()).is_err());
    }
}
