//! What the program prints.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{presets, Table};

use crate::data::{Catalog, Dataset, Part, Source};
use crate::evaluate::Metrics;
use crate::model::Dlrm;
use crate::recommend::Recommendation;

/// What is about to be trained, on what.
pub fn introduction(source: &Source, data: &Dataset, model: &Dlrm) {
    let source = match source {
        Source::Generated { seed } => {
            format!("generated from seed {seed}; --data DIR reads a MovieLens set instead")
        }
        Source::Files(dir) => format!("MovieLens, {}", dir.display()),
    };
    let liked = data.ratings.iter().filter(|rating| rating.liked).count();
    let rows: Vec<_> = data
        .catalog
        .tables()
        .into_iter()
        .map(|(name, n)| format!("{name} {}", grouped(n)))
        .collect();
    println!("Will this user like this movie? A DLRM with hashed embedding tables.\n");
    println!("  ratings      {source}");
    println!(
        "               {} by {} users of {} movies, {:.0} % liked",
        grouped(data.ratings.len()),
        grouped(data.catalog.users.ids.len()),
        grouped(data.catalog.movies.ids.len()),
        100.0 * liked as f64 / data.ratings.len() as f64
    );
    println!("  table rows   {}", rows.join(", "));
    println!("  parameters   {}\n", parameters(model));
}

/// A table of results, one line per fact.
pub struct Summary(Table);

impl Summary {
    pub fn new() -> Self {
        Self(table())
    }

    pub fn metrics(self, part: &str, metrics: Metrics) -> Self {
        self.fact(
            part,
            format!("AUC {:.4}   logloss {:.4}", metrics.auc, metrics.logloss),
        )
    }

    /// On generated ratings: what the true probabilities score on the test part. No model can expect to do better.
    pub fn best_reachable(self, data: &Dataset) -> Self {
        let Some(probabilities) = data.probabilities(Part::Test) else {
            return self;
        };
        let logits: Vec<f64> = probabilities.iter().map(|p| (p / (1.0 - p)).ln()).collect();
        let labels: Vec<bool> = data
            .part(Part::Test)
            .iter()
            .map(|rating| rating.liked)
            .collect();
        self.metrics("test, best reachable", Metrics::of(&logits, &labels))
    }

    pub fn parameters(self, model: &Dlrm) -> Self {
        self.fact("embedding parameters", parameters(model))
    }

    pub fn checkpoint(self, path: &Path) -> Result<Self> {
        let bytes = path
            .metadata()
            .with_context(|| path.display().to_string())?
            .len();
        Ok(self.fact(
            "checkpoint",
            format!("{} bytes, {}", grouped(bytes as usize), path.display()),
        ))
    }

    pub fn fact(mut self, name: &str, value: String) -> Self {
        self.0.add_row([name, &value]);
        self
    }

    pub fn print(self) {
        println!("\n{}", self.0);
    }
}

/// A user, and the movies recommended to them.
pub fn recommendations(
    catalog: &Catalog,
    user: u32,
    titles: &BTreeMap<i64, String>,
    movies: &[Recommendation],
) {
    let features = catalog.users.features.iter();
    let traits: Vec<_> = features
        .map(|f| format!("{} {}", f.name, catalog.users.describe(f.name, user)))
        .collect();
    let id = catalog.users.ids[user as usize];
    println!(
        "User {id} has rated {} movies. {}",
        catalog.seen.bag(user as usize).len(),
        traits.join(", ")
    );
    let mut table = table();
    table.set_header(["", "title", "genres", "will like it"]);
    for (rank, movie) in (1..).zip(movies) {
        let id = catalog.movies.ids[movie.movie as usize];
        table.add_row([
            format!("{rank}"),
            titles
                .get(&id)
                .cloned()
                .unwrap_or_else(|| format!("movie {id}")),
            catalog.movies.describe("genres", movie.movie),
            format!("{:.1} %", 100.0 * movie.probability),
        ]);
    }
    println!("\n{table}");
}

fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED.with_rounded_corners());
    table
}

fn parameters(model: &Dlrm) -> String {
    let (stored, uncompressed) = model.embedding_parameters();
    let ratio = uncompressed as f64 / stored as f64;
    format!(
        "{} instead of {}, 1/{ratio:.1}",
        grouped(stored),
        grouped(uncompressed)
    )
}

/// 1234567 as `1,234,567`.
fn grouped(n: usize) -> String {
    indicatif::HumanCount(n as u64).to_string()
}
