//! What is shown: the highest rates as bars, and latencies as curves.

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
    Result,
    report::{Report, Row, Who},
};

/// Of the picture, and of the part of it that the bars take, in pixels.
const SIZE: (u32, u32) = (1_200, 640);
const BARS: u32 = 700;

/// A curve ends where one call in so many is slower.
const LAST: f64 = 10_000.0;
/// Points of a curve.
const POINTS: u32 = 200;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws the report's rates, and the latencies of its first scenario at half of its highest
/// rate.
pub fn draw(report: &Report, file: &Path) -> Result<()> {
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(BARS);
    bars(report, &left)?;
    curves(report, &right)?;
    area.present()?;
    Ok(())
}

fn color_of(row: &Row) -> RGBColor {
    match row.who {
        Who::Service => RGBColor(31, 119, 180),
        Who::Floor => RGBColor(255, 127, 14),
        Who::Pgbench => RGBColor(127, 127, 127),
    }
}

/// A bar for each row, as long as its median, and a line from the least to the most.
fn bars(report: &Report, area: &Area<'_>) -> Result<()> {
    let bars: Vec<_> = report
        .rows
        .iter()
        .filter(|row| !row.is_open())
        .filter_map(|row| Some((row, row.rates()?)))
        .collect();
    let most = bars.iter().map(|(_, [.., most])| *most).fold(1.0, f64::max);
    let count = i32::try_from(bars.len().max(1))?;
    let mut chart = ChartBuilder::on(area)
        .caption("calls a second, closed loop: median, least to most", ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(30)
        // Names stand right of the bars.
        .build_cartesian_2d(0.0..most * 1.7, f64::from(count)..0.0)?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().x_labels(6).draw()?;
    for (at, (row, [least, median, most])) in (0..).zip(&bars) {
        let (top, middle, bottom) =
            (f64::from(at) + 0.15, f64::from(at) + 0.5, f64::from(at) + 0.85);
        let bar = Rectangle::new([(0.0, top), (*median, bottom)], color_of(row).mix(0.7).filled());
        let spread = PathElement::new([(*least, middle), (*most, middle)], BLACK);
        let name = format!("  {}: {median:.0}", row.name());
        let name = Text::new(name, (*most, top), ("sans-serif", 12));
        chart.draw_series([bar])?;
        chart.draw_series([spread])?;
        chart.draw_series([name])?;
    }
    Ok(())
}

/// How slow the slowest 1 in n calls are at the least.
fn curves(report: &Report, area: &Area<'_>) -> Result<()> {
    let Some(first) = report.rows.iter().find(|row| row.is_open()) else {
        return Ok(());
    };
    let shown = report.rows.iter().filter(|row| row.is_like(first));
    let curves: Vec<_> = shown.map(|row| (row, curve(row))).collect();
    let slowest = curves.iter().flat_map(|(_, points)| points).map(|(_, latency)| *latency);
    let slowest = slowest.fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("open loop at half of that: ms", ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d((1.0..LAST).log_scale(), 0.0..slowest * 1.1)?;
    chart.configure_mesh().x_desc("one call in … is slower").draw()?;
    for (at, (row, points)) in (0..).zip(curves) {
        let color = color_of(row);
        chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
        let place = (1.5, slowest * (1.05 - 0.05 * f64::from(at)));
        let name = Text::new(row.name(), place, ("sans-serif", 13).into_font().color(&color));
        chart.draw_series([name])?;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "far less than 2^53")]
fn curve(row: &Row) -> Vec<(f64, f64)> {
    let Some(tally) = &row.tally else {
        return Vec::new();
    };
    let point = |point| {
        let one_in = LAST.powf(f64::from(point) / f64::from(POINTS));
        let latency = tally.latencies.value_at_quantile(1.0 - 1.0 / one_in);
        (one_in, latency as f64 / 1e6)
    };
    (0..=POINTS).map(point).collect()
}
