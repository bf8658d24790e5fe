//! The picture: quality against the bytes of the embedding tables, a line per hash, columns and bits.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use anyhow::{anyhow, Result};
use plotters::prelude::*;

use super::{range, Measure, Point};
use crate::report::columns_of;

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

    let uncompressed = points.iter().max_by_key(|point| point.bytes);
    if let Some(point) = uncompressed {
        let line = [
            (smallest / 1.3, point.mean()),
            (largest * 1.3, point.mean()),
        ];
        chart
            .draw_series(DashedLineSeries::new(line, 6, 4, BLACK.into()))?
            .label("plain, f32")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], BLACK));
    }
    // A colour for each hash and number of columns, and a shape for the bits.
    let mut by_colour: BTreeMap<_, BTreeMap<u32, Vec<&Point>>> = BTreeMap::new();
    for point in points {
        let colour = (point.hash.as_str(), point.inner_dim);
        let of_colour = by_colour.entry(colour).or_default();
        of_colour.entry(point.bits).or_default().push(point);
    }
    let colours = COLOURS.into_iter().cycle();
    for (((hash, columns), by_bits), colour) in by_colour.into_iter().zip(colours) {
        for (bits, mut points) in by_bits {
            points.sort_by_key(|point| point.bytes);
            let line = points.iter().map(|point| (bytes(point), point.mean()));
            let line = LineSeries::new(line, colour.stroke_width(1));
            let series = chart.draw_series(line)?;
            series.label(format!("{hash}, {}, {bits} bits", columns_of(columns)));
            let seeds = points.iter().flat_map(|&point| {
                let scores = point.scores.iter();
                scores.map(move |&score| (bytes(point), score))
            });
            let style = colour.mix(0.7).filled();
            match bits {
                32 => {
                    series.legend(move |(x, y)| Circle::new((x + 10, y), 3, style));
                    chart.draw_series(seeds.map(|at| Circle::new(at, 3, style)))?;
                }
                8 => {
                    series.legend(move |(x, y)| TriangleMarker::new((x + 10, y), 5, style));
                    chart.draw_series(seeds.map(|at| TriangleMarker::new(at, 5, style)))?;
                }
                _ => {
                    series.legend(move |(x, y)| Cross::new((x + 10, y), 3, style));
                    chart.draw_series(seeds.map(|at| Cross::new(at, 3, style)))?;
                }
            }
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

fn bytes(point: &Point) -> f64 {
    point.bytes as f64
}
