//! Click logs with a planted structure, for tests and for trying the program without a download.
//!
//! ```text
//! logit = base + activity + sum of effect(C1 … C26) + sum of taste(C1 … C13) . sum of style(C14 … C26)
//! ```
//!
//! `activity` belongs to the line and shows, with noise, in its integers. Categories are drawn by Zipf's law from fields
//! of very different sizes, and what a category does to the logit follows from its text. As in Criteo's logs, values are
//! missing, some integers are negative, and a quarter of the lines are clicks.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use flate2::{write::GzEncoder, Compression};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, StandardNormal, Zipf};
use twox_hash::XxHash64;

use super::range;
use super::reader::{CATEGORIES, NUMBERS};
use crate::data::{Part, Truth};

/// How many categories each field has.
const SIZES: [u32; CATEGORIES.len()] = [
    1_000, 500, 100_000, 20_000, 300, 20, 10_000, 600, 3, 50_000, 5_000, 80_000, 3_000, 25, 10_000,
    60_000, 10, 4_000, 2_000, 4, 70_000, 15, 16, 30_000, 80, 40_000,
];

/// The exponent of Zipf's law.
const SKEW: f64 = 1.2;
const FACTORS: usize = 4;
const BASE: f64 = -2.0;
const ACTIVITY: f64 = 0.5;
const EFFECT: f64 = 0.25;
const TASTE: f64 = 0.12;
const MISSING: f64 = 0.05;
const NEGATIVE: f64 = 0.01;

/// An endless log.
struct Generator {
    seed: u64,
    rng: StdRng,
    fields: Vec<Zipf<f64>>,
}

struct Line {
    text: String,
    clicked: bool,
    probability: f64,
}

/// What a category does to the logit.
struct Effect {
    alone: f64,
    factors: [f64; FACTORS],
}

/// Writes a click log of `lines` lines to `path`, compressed if its name ends in `.gz`. Returns the truth of its test part.
pub fn write(path: &Path, lines: u64, seed: u64) -> Result<Truth> {
    let generate = || {
        let mut file = BufWriter::new(File::create(path)?);
        let truth = if path.extension().is_some_and(|extension| extension == "gz") {
            let mut encoder = GzEncoder::new(&mut file, Compression::default());
            let truth = write_lines(&mut encoder, lines, seed)?;
            encoder.finish()?;
            truth
        } else {
            write_lines(&mut file, lines, seed)?
        };
        file.flush()?;
        Ok(truth)
    };
    let written: Result<Truth> = generate();
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn write_lines(out: &mut impl Write, lines: u64, seed: u64) -> Result<Truth> {
    let mut generator = Generator::new(seed)?;
    let (test, mut truth) = (range(lines, Part::Test), Truth::default());
    for line in 0..lines {
        let Line {
            text,
            clicked,
            probability,
        } = generator.line();
        writeln!(out, "{text}")?;
        if test.contains(&line) {
            truth.labels.push(clicked);
            truth.probabilities.push(probability);
        }
    }
    Ok(truth)
}

impl Generator {
    fn new(seed: u64) -> Result<Self> {
        let fields = SIZES.map(|size| Zipf::new(f64::from(size), SKEW));
        Ok(Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            fields: fields.into_iter().collect::<Result<_, _>>()?,
        })
    }

    fn line(&mut self) -> Line {
        let activity: f64 = self.rng.sample(StandardNormal);
        let mut text = String::new();
        for _ in 0..NUMBERS {
            let noise: f64 = self.rng.sample(StandardNormal);
            text.push('\t');
            if self.rng.random_bool(NEGATIVE) {
                text += "-1";
            } else if !self.rng.random_bool(MISSING) {
                text += &format!("{}", (1.5 + activity + noise).exp() as u64);
            }
        }

        let mut logit = BASE + ACTIVITY * activity;
        let mut sides = [[0.0; FACTORS]; 2];
        for (field, sizes) in self.fields.iter().enumerate() {
            text.push('\t');
            if self.rng.random_bool(MISSING) {
                continue;
            }
            let rank = sizes.sample(&mut self.rng) as u64;
            let category = hash(self.seed, field, rank) as u32;
            text += &format!("{category:08x}");
            let effect = Effect::of(hash(self.seed, field, u64::from(category)));
            logit += effect.alone;
            let side = &mut sides[usize::from(field >= CATEGORIES.len() / 2)];
            side.iter_mut()
                .zip(effect.factors)
                .for_each(|(sum, factor)| *sum += factor);
        }
        logit += sides[0]
            .iter()
            .zip(sides[1])
            .map(|(a, b)| a * b)
            .sum::<f64>();
        let probability = 1.0 / (1.0 + (-logit).exp());
        let clicked = self.rng.random_bool(probability);
        text.insert(0, if clicked { '1' } else { '0' });
        Line {
            text,
            clicked,
            probability,
        }
    }
}

impl Effect {
    fn of(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut normal = |scale: f64| scale * rng.sample::<f64, _>(StandardNormal);
        Self {
            alone: normal(EFFECT),
            factors: std::array::from_fn(|_| normal(TASTE)),
        }
    }
}

fn hash(seed: u64, field: usize, value: u64) -> u64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(field as u64).to_le_bytes());
    bytes[8..].copy_from_slice(&value.to_le_bytes());
    XxHash64::oneshot(seed, &bytes)
}
