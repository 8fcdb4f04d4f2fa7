//! The report as a picture: maximum rates as bars, latencies as curves.

use std::path::Path;

use plotters::{
    coord::Shift,
    prelude::{
        BLACK, ChartBuilder, DrawingArea, IntoDrawingArea, IntoLogRange, LineSeries, PathElement,
        RGBColor, Rectangle, SVGBackend, Text, WHITE,
    },
    style::{Color, IntoFont},
};

use crate::{
    error::Result,
    launcher::Target,
    report::Report,
    row::{Row, RowKey},
};

/// Width and height in pixels.
const SIZE: (u32, u32) = (1_200, 640);
/// The width of the bar chart in pixels.
const BARS_WIDTH: u32 = 700;

/// The curves end at the latency that one call in this many exceeds.
const MAX_ONE_IN: f64 = 10_000.0;
const POINTS_PER_CURVE: u32 = 200;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws the rates of all closed loops, and the latencies of the first scenario that was
/// measured in an open loop.
pub fn draw(report: &Report, file: &Path) -> Result<()> {
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(BARS_WIDTH);
    draw_bars(report, &left)?;
    draw_curves(report, &right)?;
    area.present()?;
    Ok(())
}

fn color_of(target: Target) -> RGBColor {
    match target {
        Target::Service => RGBColor(31, 119, 180),
        Target::Previous => RGBColor(44, 160, 44),
        Target::Baseline => RGBColor(255, 127, 14),
        Target::Pgbench => RGBColor(127, 127, 127),
    }
}

/// Draws a bar for each row, up to its median rate, with a line from the minimum to the
/// maximum.
fn draw_bars(report: &Report, area: &Area<'_>) -> Result<()> {
    let bars: Vec<_> = report
        .rows
        .iter()
        .filter(|row| !row.key.is_open_loop())
        .filter_map(|row| Some((row.key, row.rates()?)))
        .collect();
    let max_rate = bars.iter().map(|(_, [.., max])| *max).fold(1.0, f64::max);
    let count = i32::try_from(bars.len().max(1))?;
    let mut chart = ChartBuilder::on(area)
        .caption("calls/s, closed loop: median, min to max", ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(30)
        // The labels are to the right of the bars.
        .build_cartesian_2d(0.0..max_rate * 1.7, f64::from(count)..0.0)?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().x_labels(6).draw()?;
    for (index, (key, [min, median, max])) in (0..).map(f64::from).zip(&bars) {
        let (top, middle, bottom) = (index + 0.15, index + 0.5, index + 0.85);
        let fill = color_of(key.target).mix(0.7).filled();
        let label = format!("  {key}: {median:.0}");
        chart.draw_series([Rectangle::new([(0.0, top), (*median, bottom)], fill)])?;
        chart.draw_series([PathElement::new([(*min, middle), (*max, middle)], BLACK)])?;
        chart.draw_series([Text::new(label, (*max, top), ("sans-serif", 12))])?;
    }
    Ok(())
}

/// Draws, for each target, the latency that one call in n exceeds.
fn draw_curves(report: &Report, area: &Area<'_>) -> Result<()> {
    let Some(first) = report.rows.iter().find(|row| row.key.is_open_loop()) else {
        return Ok(());
    };
    let rows = report.rows.iter();
    let rows = rows.filter(|row| RowKey { target: first.key.target, ..row.key } == first.key);
    let curves: Vec<_> = rows.map(|row| (row, curve_points(row))).collect();
    let latencies = curves.iter().flat_map(|(_, points)| points).map(|(_, latency)| *latency);
    let max_latency = latencies.fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("latency in ms, open loop at half that rate", ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d((1.0..MAX_ONE_IN).log_scale(), 0.0..max_latency * 1.1)?;
    chart.configure_mesh().x_desc("one call in … is slower").draw()?;
    for (index, (row, points)) in (0..).map(f64::from).zip(curves) {
        let color = color_of(row.key.target);
        chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
        let position = (1.5, max_latency * (1.05 - 0.05 * index));
        let style = ("sans-serif", 13).into_font().color(&color);
        chart.draw_series([Text::new(row.key.to_string(), position, style)])?;
    }
    Ok(())
}

/// Returns pairs of n and the latency in milliseconds that one call in n exceeds.
#[expect(clippy::cast_precision_loss, reason = "far less than 2^53 ns")]
fn curve_points(row: &Row) -> Vec<(f64, f64)> {
    let Some(stats) = &row.stats else {
        return Vec::new();
    };
    let point = |number| {
        let one_in = MAX_ONE_IN.powf(f64::from(number) / f64::from(POINTS_PER_CURVE));
        let latency = stats.latencies.value_at_quantile(1.0 - 1.0 / one_in);
        (one_in, latency as f64 / 1e6)
    };
    (0..=POINTS_PER_CURVE).map(point).collect()
}
