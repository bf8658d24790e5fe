//! What the program prints.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use comfy_table::{presets, Table};

use crate::baselines::Line;
use crate::data::{Catalog, Clicks, Data, Examples, Ratings, Source, Truth};
use crate::evaluate::Metrics;
use crate::model::Dlrm;
use crate::ranking::{Ranking, RARE};
use crate::ranks::Ranks;
use crate::recommend::Recommendation;
use crate::say;
use crate::sweep::{Measure, Point};

/// What is about to be trained, and on which data.
pub fn introduction(data: &Data, model: &Dlrm) {
    match data {
        Data::Ratings(ratings) => ratings_introduction(ratings),
        Data::Clicks(clicks) => clicks_introduction(clicks),
    }
    say!("  parameters   {}\n", parameters(model));
}

fn ratings_introduction(ratings: &Ratings) {
    let source = match &ratings.source {
        Source::Generated { seed } => {
            format!("generated from seed {seed}; --data DIR reads a MovieLens set instead")
        }
        Source::Files { dir, .. } => format!("MovieLens, {}", dir.display()),
        Source::Interactions(file) => format!("interactions, {}", file.display()),
    };
    let catalog = &ratings.catalog;
    let liked = ratings.rows.iter().filter(|rating| rating.liked).count();
    let rows: Vec<_> = catalog
        .schema()
        .tables
        .into_iter()
        .map(|(name, n)| format!("{name} {}", grouped(n)))
        .collect();
    say!("Will this user like this movie? A DLRM with hashed embedding tables.\n");
    say!("  ratings      {source}");
    say!(
        "               {} by {} users of {} movies, {:.0} % liked",
        grouped(ratings.rows.len()),
        grouped(catalog.users.ids.len()),
        grouped(catalog.movies.ids.len()),
        100.0 * liked as f64 / ratings.rows.len() as f64
    );
    say!("  table rows   {}", rows.join(", "));
    if !ratings.left_out.is_empty() {
        let names = ratings.left_out.join(", ");
        say!("  left out     {names}: no value occurs often enough to be learnt from");
    }
}

fn clicks_introduction(clicks: &Clicks) {
    let (counts, tables) = (clicks.counts(), clicks.schema().tables);
    say!("Will this be clicked? A DLRM with hashed embedding tables.\n");
    say!("  clicks       Criteo, {}", clicks.path().display());
    say!(
        "               {} examples, {:.0} % clicked, {} malformed lines skipped",
        grouped(counts.examples as usize),
        100.0 * counts.clicked as f64 / counts.examples as f64,
        grouped(counts.malformed as usize)
    );
    say!(
        "  table rows   {} for each of {} categories",
        grouped(tables[0].1),
        tables.len()
    );
}

/// A table of results, one line per fact.
pub struct Summary(Table);

impl Default for Summary {
    fn default() -> Self {
        Self(table())
    }
}

impl Summary {
    /// How good the scores of a part are.
    pub fn metrics(self, part: &str, metrics: Metrics) -> Self {
        let logloss = format!("logloss {:.4}", metrics.logloss);
        let value = match metrics.auc {
            Some(auc) => format!("AUC {auc:.4}   {logloss}"),
            None => format!("{logloss}   no AUC: all labels are equal"),
        };
        self.fact(part, value)
    }

    /// How good the top tens are, if there are any.
    pub fn ranking(self, ranking: Option<Ranking>) -> Self {
        let Some(ranking) = ranking else { return self };
        let value = format!(
            "NDCG@10 {:.4}   recall@10 {:.4}   {} of {} items   {:.1} % rare",
            ranking.ndcg,
            ranking.recall,
            grouped(ranking.coverage),
            grouped(ranking.items),
            100.0 * ranking.rare
        );
        self.fact("test, top tens", value)
    }

    /// The score of the true probabilities on the test part. No model can expect to do better.
    pub fn best_reachable(self, truth: Option<Truth>) -> Self {
        match truth {
            Some(truth) => self.metrics("test, best reachable", Metrics::of_truth(&truth)),
            None => self,
        }
    }

    /// How many values the embedding tables store, and would store without hashing.
    pub fn parameters(self, model: &Dlrm) -> Self {
        self.fact("embedding parameters", parameters(model))
    }

    /// The file that was written, and its size.
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

    /// Any other line.
    pub fn fact(mut self, name: &str, value: String) -> Self {
        self.0.add_row([name, &value]);
        self
    }

    /// Prints the table.
    pub fn print(self) {
        say!("\n{}", self.0);
    }
}

/// A model and its baselines. `part` is the name of what they were tried on.
pub fn comparison(part: &str, lines: &[Line]) {
    let has_lists = lines.iter().any(|line| line.ranking.is_some());
    let mut table = table();
    let mut header = vec![part, "AUC", "logloss"];
    if has_lists {
        header.extend([
            "NDCG@10",
            "recall@10",
            "items in top tens",
            "rare items there",
        ]);
    }
    table.set_header(header);
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
    for line in lines {
        let mut cells = vec![line.name.to_owned(), number(line.auc), number(line.logloss)];
        if has_lists {
            cells.extend(match &line.ranking {
                Some(ranking) => [
                    format!("{:.4}", ranking.ndcg),
                    format!("{:.4}", ranking.recall),
                    format!(
                        "{} of {}",
                        grouped(ranking.coverage),
                        grouped(ranking.items)
                    ),
                    format!("{:.1} %", 100.0 * ranking.rare),
                ],
                None => [const { String::new() }; 4],
            });
        }
        table.add_row(cells);
    }
    say!("\n{table}");
    if lines.iter().all(|line| line.auc.is_none()) {
        say!("no AUC: all labels are equal");
    }
    let users = lines.iter().find_map(|line| Some(line.ranking?.users));
    if let Some(users) = users {
        say!(
            "top tens of {} users who liked items of this part; rare items have fewer than {RARE} training examples",
            grouped(users)
        );
    }
}

/// What averaging gradients has taken, if there are several ranks, whose replicas were compared.
pub fn all_reduce(summary: Summary, ranks: &Ranks) -> Summary {
    let Some(times) = ranks.all_reduce_times() else {
        return summary;
    };
    let ms = |time: Duration| format!("{:.3} ms", 1e3 * time.as_secs_f64());
    let equal = format!("{}, with the same bits in all parameters", ranks.count());
    summary.fact("ranks", equal).fact(
        "all-reduce",
        format!(
            "{} bytes a step in {}, fastest {}, {:.1} GB/s bus bandwidth",
            grouped(times.bytes),
            ms(times.mean()),
            ms(times.fastest),
            times.bus_bandwidth(ranks.count()) / 1e9
        ),
    )
}

/// A user, if the catalogue has them, and the movies recommended to them.
pub fn recommendations(
    catalog: &Catalog,
    user: Option<u32>,
    titles: &BTreeMap<i64, String>,
    movies: &[Recommendation],
) {
    if let Some(user) = user {
        let features = catalog.users.features.iter();
        let traits: Vec<_> = features
            .map(|f| format!("{} {}", f.name, catalog.users.describe(f.name, user)))
            .collect();
        let id = catalog.users.ids[user as usize];
        say!(
            "User {id} has rated {} movies. {}",
            catalog.seen.bag(user as usize).len(),
            traits.join(", ")
        );
    }
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
    say!("\n{table}");
}

/// Quality, by `measure`, against bytes: the points in their order, and what the best of each size has over f32 without matrices.
pub fn sweep(points: &[Point], measure: Measure) {
    let mut table = table();
    table.set_header([
        "size",
        "hash",
        "inner columns",
        "bits",
        "bytes",
        "parameters",
        &format!("{measure}, mean"),
        "lowest, highest",
        "lost by rounding",
    ]);
    for point in points {
        let (lowest, highest) = point.range();
        table.add_row([
            fraction(point.size),
            point.hash.clone(),
            point
                .inner_dim
                .map_or(String::new(), |columns| columns.to_string()),
            point.bits.to_string(),
            grouped(point.bytes),
            grouped(point.parameters),
            format!("{:.4}", point.mean()),
            format!("{lowest:.4}, {highest:.4}"),
            match point.bits {
                32 => String::new(),
                _ => format!("{:.4}", point.loss),
            },
        ]);
    }
    say!("\n{table}");
    if measure == Measure::Logloss {
        say!("All labels of the test part are equal, so there is no AUC; less logloss is better.");
    }
    for of_size in points.chunk_by(|a, b| a.size == b.size) {
        let is_plainest = |point: &&Point| point.bits == 32 && point.inner_dim.is_none();
        let Some(plainest) = of_size.iter().find(is_plainest) else {
            continue;
        };
        let best = &of_size[0];
        let difference = best.mean() - plainest.mean();
        if measure.is_better(difference) {
            say!(
                "best at {}: {}, {}, {} bits, {difference:+.4} over {} in f32 without matrices",
                fraction(best.size),
                best.hash,
                columns_of(best.inner_dim),
                best.bits,
                plainest.hash
            );
        }
    }
}

/// What the columns of large tables are, in words.
pub fn columns_of(inner_dim: Option<usize>) -> String {
    match inner_dim {
        None => "no matrices".to_owned(),
        Some(columns) => format!("{columns} inner columns"),
    }
}

/// `1/16` for 0.0625.
pub fn fraction(compression: f64) -> String {
    let denominator = (1.0 / compression).round();
    if compression < 1.0 && 1.0 / denominator == compression {
        format!("1/{denominator}")
    } else {
        format!("{compression}")
    }
}

/// How fast a training was.
pub fn rate(examples_per_second: f64) -> String {
    format!(
        "{} examples a second",
        grouped(examples_per_second as usize)
    )
}

fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED.with_rounded_corners());
    table
}

fn parameters(model: &Dlrm) -> String {
    let (stored, uncompressed) = model.embeddings().parameters();
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
