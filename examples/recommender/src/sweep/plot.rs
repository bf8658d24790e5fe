//! The picture: quality against the bytes of the embedding tables, a line per hash.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use anyhow::{anyhow, Result};
use plotters::prelude::*;

use super::{range, Measure, Point};

const SIZE: (u32, u32) = (800, 500);
const FONT: &str = "sans-serif";
/// Colours that can be told apart with any kind of colour vision (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

pub fn draw(path: &Path, points: &[Point], measure: Measure) -> Result<()> {
    try_draw(path, points, measure).map_err(|error| anyhow!("{error}"))
}

fn try_draw(path: &Path, points: &[Point], measure: Measure) -> Result<(), Box<dyn Error>> {
    let (low, high) = range(points.iter().flat_map(|p| p.scores.iter().copied()));
    let margin = 0.1 * (high - low) + 1e-4;
    let (smallest, largest) = range(points.iter().map(bytes));
    let mut ticks: Vec<f64> = points.iter().map(bytes).collect();
    ticks.sort_by(f64::total_cmp);
    ticks.dedup_by(|a, b| *a < 1.1 * *b);

    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (smallest / 1.3..largest * 1.3)
                .log_scale()
                .with_key_points(ticks),
            low - margin..high + margin,
        )?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.1))
        .label_style((FONT, 14))
        .x_desc("bytes of the embedding tables")
        .y_desc(measure.to_string())
        .x_label_formatter(&|bytes| indicatif::HumanCount(*bytes as u64).to_string())
        .y_label_formatter(&|score| format!("{score:.3}"))
        .draw()?;

    for plain in points.iter().filter(|point| !point.is_hashed()) {
        let line = [
            (smallest / 1.3, plain.mean()),
            (largest * 1.3, plain.mean()),
        ];
        chart
            .draw_series(DashedLineSeries::new(line, 6, 4, BLACK.into()))?
            .label("not hashed")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], BLACK));
        chart.draw_series(circles(plain, BLACK))?;
    }
    let mut by_hash: BTreeMap<&str, Vec<&Point>> = BTreeMap::new();
    for point in points.iter().filter(|point| point.is_hashed()) {
        by_hash.entry(&point.hash).or_default().push(point);
    }
    for ((hash, points), colour) in by_hash.into_iter().zip(COLOURS.into_iter().cycle()) {
        let line = points.iter().map(|point| (bytes(point), point.mean()));
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
            .label(hash)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
        for point in points {
            chart.draw_series(circles(point, colour))?;
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 14))
        .draw()?;
    Ok(root.present()?)
}

/// A circle per seed.
fn circles(point: &Point, colour: RGBColor) -> impl Iterator<Item = Circle<(f64, f64), i32>> {
    let at: Vec<_> = point.scores.iter().map(|&y| (bytes(point), y)).collect();
    at.into_iter()
        .map(move |at| Circle::new(at, 3, colour.mix(0.6).filled()))
}

fn bytes(point: &Point) -> f64 {
    4.0 * point.parameters as f64
}
