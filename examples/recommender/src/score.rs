//! A probability for each line of a file, which is read once and need not fit into memory.
//!
//! A model of clicks scores a log, as text or Parquet, in which labels may be missing; a model of ratings scores pairs. Lines are parsed
//! ahead, while those before are scored.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Device;

use crate::data::{pairs, unlabelled, Unlabelled};
use crate::evaluate::sigmoid;
use crate::profiles::Side;
use crate::saved::{ClickModel, Recommender, Saved};
use crate::step;

/// What was scored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scored {
    /// Lines with a probability.
    pub lines: u64,
    /// Lines that were malformed, for each of which an empty line was written.
    pub malformed: u64,
    /// Pairs of a user or a movie that is not in the catalogue: they have the probability that people in general like the movie.
    pub unknown: u64,
}

/// Writes the probability of each line of the file at `path` to `out`, by the model of a checkpoint.
///
/// # Errors
/// A checkpoint or a file that cannot be read, a malformed line unless they are skipped, or what `out` says.
pub fn score(
    checkpoint: &Path,
    device: &Device,
    path: &Path,
    skip_malformed: bool,
    out: &mut impl Write,
) -> Result<Scored> {
    match Saved::open(checkpoint, device)? {
        Saved::Clicks(model) => score_log(&model, path, skip_malformed, out),
        Saved::Ratings(model) => score_pairs(&model, path, out),
    }
}

fn score_log(
    clicks: &ClickModel,
    path: &Path,
    skip_malformed: bool,
    out: &mut impl Write,
) -> Result<Scored> {
    let mut scored = Scored::default();
    for block in unlabelled(path, clicks.rows_per_field, skip_malformed)? {
        let Unlabelled {
            batch,
            count,
            malformed,
        } = block?;
        let logits = match count {
            0 => Vec::new(),
            _ => step::logits(&clicks.model, &clicks.model.inputs(&batch)?)?,
        };
        let mut skipped = malformed.iter().peekable();
        for line in 0..=count {
            while skipped.next_if_eq(&&line).is_some() {
                writeln!(out).context(OUTPUT)?;
            }
            if let Some(&logit) = logits.get(line) {
                write(out, sigmoid(logit.into()))?;
            }
        }
        scored.lines += count as u64;
        scored.malformed += malformed.len() as u64;
    }
    Ok(scored)
}

fn score_pairs(recommender: &Recommender, path: &Path, out: &mut impl Write) -> Result<Scored> {
    let (model, catalog) = (&recommender.model, &recommender.catalog);
    let mut scored = Scored::default();
    for block in pairs::read(path)? {
        let rows: Vec<_> = block?
            .into_iter()
            .map(|(user, movie)| {
                let row = |side: Side, id: Option<i64>| side.of(catalog).row(id?);
                (row(Side::User, user), row(Side::Movie, movie))
            })
            .collect();
        let known: Vec<(u32, u32)> = rows.iter().filter_map(|&(u, m)| u.zip(m)).collect();
        let logits = match known.len() {
            0 => Vec::new(),
            _ => step::logits(model, &model.inputs(&catalog.batch(&known))?)?,
        };
        let mut logits = logits.into_iter();
        for (user, movie) in rows {
            let logit = user.and(movie).and_then(|_| logits.next());
            write(
                out,
                match logit {
                    Some(logit) => sigmoid(logit.into()),
                    None => {
                        scored.unknown += 1;
                        recommender.popularity()?.probability(movie)
                    }
                },
            )?;
            scored.lines += 1;
        }
    }
    Ok(scored)
}

const OUTPUT: &str = "cannot write the probabilities";

fn write(out: &mut impl Write, probability: f64) -> Result<()> {
    writeln!(out, "{}", probability as f32).context(OUTPUT)
}
