//! A run as a picture: one SVG file that needs nothing else.
//!
//! [`Panel`]s stand above each other over a common time axis, each with lines
//! and its own vertical axis; [`Band`]s colour the time that a state lasted,
//! through all panels. Readable at the [`WIDTH`] × [`HEIGHT`] it is drawn at.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Width of the picture in pixels.
pub const WIDTH: f64 = 1000.0;
/// Height of the picture in pixels.
pub const HEIGHT: f64 = 800.0;

const MARGIN_LEFT: f64 = 80.0;
const MARGIN_RIGHT: f64 = 160.0;
const MARGIN_TOP: f64 = 44.0;
const MARGIN_BOTTOM: f64 = 46.0;
const PANEL_GAP: f64 = 22.0;
const PLOT_WIDTH: f64 = WIDTH - MARGIN_LEFT - MARGIN_RIGHT;
/// About as many intervals as an axis gets.
const TICKS: f64 = 6.0;

/// Lines, told apart also without colour vision (Okabe and Ito).
const LINE_COLORS: [&str; 7] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];
/// Bands: pale, so that lines stand out.
const BAND_COLORS: [&str; 8] =
    ["#fde0dd", "#e0ecf4", "#e5f5e0", "#fff7bc", "#f2e6ff", "#d9f0f0", "#fee6ce", "#ececec"];

/// A picture of a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plot {
    /// Stands above it all.
    pub title: String,
    /// From top to bottom.
    pub panels: Vec<Panel>,
    /// What state the run was in, as coloured bands behind the panels.
    pub bands: Vec<Band>,
}

/// One vertical axis and its lines.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Panel {
    /// What the axis shows, with its unit: `"rate, Mbit/s"`.
    pub label: String,
    /// The lines.
    pub series: Vec<Series>,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// `(seconds, value)` in order of time. Values that are not finite break the line.
    pub points: Vec<(f64, f64)>,
}

/// A span of time in one state. Bands of one label have one colour.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Band {
    /// Beginning, in seconds.
    pub from_s: f64,
    /// End, in seconds.
    pub to_s: f64,
    /// The state.
    pub label: String,
}

impl Plot {
    /// The picture as the text of an SVG file.
    #[must_use]
    pub fn to_svg(&self) -> String {
        let mut svg = String::with_capacity(64 * 1024);
        let end_s = self.end_s();
        open_svg(&mut svg, &self.title);
        let bands = self.band_colors();
        let count = self.panels.len().max(1) as f64;
        let area = HEIGHT - MARGIN_TOP - MARGIN_BOTTOM - PANEL_GAP * (count - 1.0);
        let height = area / count;
        for (index, panel) in self.panels.iter().enumerate() {
            let top = MARGIN_TOP + index as f64 * (height + PANEL_GAP);
            let frame = Frame { top, height, end_s, max: panel.max() };
            self.draw_bands(&mut svg, &frame, &bands);
            frame.draw_axes(&mut svg, &panel.label, index + 1 == self.panels.len());
            panel.draw(&mut svg, &frame);
        }
        draw_band_legend(&mut svg, &bands);
        svg.push_str("</svg>\n");
        svg
    }

    /// The last moment of any line or band; 1 for an empty picture.
    fn end_s(&self) -> f64 {
        let lines = self.panels.iter().flat_map(|panel| &panel.series);
        let points = lines.flat_map(|series| &series.points).map(|(at_s, _)| *at_s);
        let bands = self.bands.iter().map(|band| band.to_s);
        let end_s = points.chain(bands).filter(|at_s| at_s.is_finite()).fold(0.0, f64::max);
        if end_s > 0.0 { end_s } else { 1.0 }
    }

    /// A colour for each label, in the order of the labels' first appearance.
    fn band_colors(&self) -> Vec<(&str, &'static str)> {
        let mut colors: Vec<(&str, &'static str)> = Vec::new();
        for band in &self.bands {
            if !colors.iter().any(|(label, _)| *label == band.label) {
                colors.push((&band.label, BAND_COLORS[colors.len() % BAND_COLORS.len()]));
            }
        }
        colors
    }

    fn draw_bands(&self, svg: &mut String, frame: &Frame, colors: &[(&str, &str)]) {
        for band in &self.bands {
            let (left, right) = (frame.x(band.from_s), frame.x(band.to_s));
            let color = colors.iter().find(|(label, _)| *label == band.label);
            let (_, color) = color.expect("every label has a colour");
            let Frame { top, height, .. } = frame;
            let width = right - left;
            put(
                svg,
                format_args!(
                    "<rect x=\"{left:.2}\" y=\"{top:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" \
                 fill=\"{color}\"><title>{}</title></rect>\n",
                    escape(&band.label)
                ),
            );
        }
    }
}

impl Panel {
    /// The largest value of any line; 1 when there is none above zero.
    fn max(&self) -> f64 {
        let values = self.series.iter().flat_map(|series| &series.points).map(|(_, value)| *value);
        let max = values.filter(|value| value.is_finite()).fold(0.0, f64::max);
        if max > 0.0 { max * 1.05 } else { 1.0 }
    }

    fn draw(&self, svg: &mut String, frame: &Frame) {
        let x = WIDTH - MARGIN_RIGHT + 12.0;
        for (index, series) in self.series.iter().enumerate() {
            let color = LINE_COLORS[index % LINE_COLORS.len()];
            for path in series.paths(frame) {
                put(
                    svg,
                    format_args!(
                        "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"1.4\" \
                     points=\"{path}\"/>\n"
                    ),
                );
            }
            let y = frame.top + 12.0 + index as f64 * 17.0;
            put(
                svg,
                format_args!(
                    "<line x1=\"{x}\" y1=\"{y:.2}\" x2=\"{:.2}\" y2=\"{y:.2}\" stroke=\"{color}\" \
                 stroke-width=\"3\"/><text x=\"{:.2}\" y=\"{:.2}\">{}</text>\n",
                    x + 18.0,
                    x + 24.0,
                    y + 4.0,
                    escape(&series.name)
                ),
            );
        }
    }
}

impl Series {
    /// The line's unbroken parts. Of the points within one pixel's width only
    /// the first, the extremes and the last are drawn: no peak is lost.
    fn paths(&self, frame: &Frame) -> Vec<String> {
        let broken = |point: &(f64, f64)| !(point.0.is_finite() && point.1.is_finite());
        let parts = self.points.split(broken).filter(|part| !part.is_empty());
        parts
            .map(|part| {
                let mut columns: BTreeMap<i64, [(f64, f64); 4]> = BTreeMap::new();
                for &point in part {
                    let column = frame.x(point.0) as i64;
                    let [_, low, high, last] = columns.entry(column).or_insert([point; 4]);
                    *last = point;
                    if point.1 < low.1 {
                        *low = point;
                    }
                    if point.1 > high.1 {
                        *high = point;
                    }
                }
                let mut path = String::new();
                for column in columns.values_mut() {
                    column.sort_by(|a, b| a.0.total_cmp(&b.0));
                    let mut drawn = None;
                    for &point in column.iter() {
                        if drawn != Some(point) {
                            let (x, y) = (frame.x(point.0), frame.y(point.1));
                            put(&mut path, format_args!("{x:.2},{y:.2} "));
                        }
                        drawn = Some(point);
                    }
                }
                path
            })
            .collect()
    }
}

/// Where a panel stands and what its axes span.
struct Frame {
    top: f64,
    height: f64,
    end_s: f64,
    max: f64,
}

impl Frame {
    fn x(&self, at_s: f64) -> f64 {
        MARGIN_LEFT + (at_s / self.end_s).clamp(0.0, 1.0) * PLOT_WIDTH
    }

    fn y(&self, value: f64) -> f64 {
        self.top + self.height * (1.0 - (value / self.max).clamp(0.0, 1.0))
    }

    fn draw_axes(&self, svg: &mut String, label: &str, with_time: bool) {
        let Self { top, height, .. } = self;
        let bottom = top + height;
        let right = WIDTH - MARGIN_RIGHT;
        for (value, text) in ticks(self.max) {
            let y = self.y(value);
            put(
                svg,
                format_args!(
                    "<line class=\"grid\" x1=\"{MARGIN_LEFT}\" y1=\"{y:.2}\" x2=\"{right}\" \
                 y2=\"{y:.2}\"/><text class=\"end\" x=\"{:.2}\" y=\"{:.2}\">{text}</text>\n",
                    MARGIN_LEFT - 6.0,
                    y + 4.0
                ),
            );
        }
        for (at_s, text) in ticks(self.end_s) {
            let x = self.x(at_s);
            put(
                svg,
                format_args!(
                    "<line class=\"grid\" x1=\"{x:.2}\" y1=\"{top:.2}\" x2=\"{x:.2}\" \
                 y2=\"{bottom:.2}\"/>\n"
                ),
            );
            if with_time {
                put(
                    svg,
                    format_args!(
                        "<text class=\"mid\" x=\"{x:.2}\" y=\"{:.2}\">{text}</text>\n",
                        bottom + 16.0
                    ),
                );
            }
        }
        put(
            svg,
            format_args!(
                "<rect class=\"frame\" x=\"{MARGIN_LEFT}\" y=\"{top:.2}\" width=\"{PLOT_WIDTH}\" \
             height=\"{height:.2}\"/>\n"
            ),
        );
        let middle = top + height / 2.0;
        put(
            svg,
            format_args!(
                "<text class=\"mid\" x=\"18\" y=\"{middle:.2}\" \
             transform=\"rotate(-90 18 {middle:.2})\">{}</text>\n",
                escape(label)
            ),
        );
        if with_time {
            put(
                svg,
                format_args!(
                    "<text class=\"mid\" x=\"{:.2}\" y=\"{:.2}\">virtual time, s</text>\n",
                    MARGIN_LEFT + PLOT_WIDTH / 2.0,
                    bottom + 34.0
                ),
            );
        }
    }
}

fn open_svg(svg: &mut String, title: &str) {
    put(
        svg,
        format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <style>.grid{{stroke:#bbb;stroke-width:.5}}.frame{{fill:none;stroke:#444}}\
         .end{{text-anchor:end}}.mid{{text-anchor:middle}}</style>\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
         <text x=\"{MARGIN_LEFT}\" y=\"26\" font-size=\"16\" font-weight=\"bold\">{}</text>\n",
            escape(title)
        ),
    );
}

/// The bands' colours, at the foot of the right margin.
fn draw_band_legend(svg: &mut String, bands: &[(&str, &str)]) {
    let x = WIDTH - MARGIN_RIGHT + 12.0;
    for (index, (label, color)) in bands.iter().enumerate() {
        let y = HEIGHT - MARGIN_BOTTOM - (bands.len() - index) as f64 * 17.0;
        put(
            svg,
            format_args!(
                "<rect x=\"{x}\" y=\"{y:.2}\" width=\"18\" height=\"12\" fill=\"{color}\" \
             stroke=\"#999\"/><text x=\"{:.2}\" y=\"{:.2}\">{}</text>\n",
                x + 24.0,
                y + 10.0,
                escape(label)
            ),
        );
    }
}

/// Round values from 0 to `max` with their texts: steps of 1, 2 or 5 times a power of ten.
fn ticks(max: f64) -> Vec<(f64, String)> {
    let rough = max / TICKS;
    let power = 10f64.powf(rough.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0];
    let factor = factors.into_iter().find(|factor| factor * power >= rough).unwrap_or(10.0);
    let step = factor * power;
    let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
    let count = (max / step + 1e-9).floor() as u32;
    (0..=count)
        .map(|index| {
            let value = f64::from(index) * step;
            (value, format!("{value:.decimals$}"))
        })
        .collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn put(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("a String takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(points: &[(f64, f64)]) -> Series {
        Series { name: "good<put".to_owned(), points: points.to_vec() }
    }

    fn picture() -> Plot {
        let band = |from_s, to_s, label: &str| Band { from_s, to_s, label: label.to_owned() };
        Plot {
            title: "a & b".to_owned(),
            panels: vec![
                Panel {
                    label: "rate, Mbit/s".to_owned(),
                    series: vec![line(&[(0.0, 1.0), (5.0, 8.0), (10.0, 4.0)])],
                },
                Panel { label: "RTT, ms".to_owned(), series: vec![line(&[(0.0, 64.0)])] },
            ],
            bands: vec![
                band(0.0, 2.0, "Startup"),
                band(2.0, 3.0, "Drain"),
                band(3.0, 5.0, "Startup"),
            ],
        }
    }

    #[test]
    fn it_is_balanced_escaped_and_complete() {
        let svg = picture().to_svg();
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("a &amp; b") && svg.contains("good&lt;put"));
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        assert_eq!(svg.matches("<title>").count(), svg.matches("</title>").count());
        assert_eq!(svg.matches("<polyline").count(), 2);
        // Three bands behind each of two panels, two labels in the legend.
        assert_eq!(svg.matches("<title>Startup</title>").count(), 4);
        assert_eq!(svg.matches(">Startup</text>").count(), 1);
        assert_eq!(svg.matches("virtual time, s").count(), 1);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn points_land_where_the_axes_say() {
        let frame = Frame { top: 100.0, height: 200.0, end_s: 10.0, max: 8.0 };
        assert!((frame.x(0.0) - MARGIN_LEFT).abs() < 1e-9);
        assert!((frame.x(10.0) - (WIDTH - MARGIN_RIGHT)).abs() < 1e-9);
        assert!((frame.y(0.0) - 300.0).abs() < 1e-9);
        assert!((frame.y(4.0) - 200.0).abs() < 1e-9);
    }

    #[test]
    fn an_empty_or_broken_picture_is_still_one() {
        assert!(Plot::default().to_svg().ends_with("</svg>\n"));
        let mut plot = picture();
        plot.panels[0].series[0].points = vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0)];
        let svg = plot.to_svg();
        assert_eq!(svg.matches("<polyline").count(), 3);
        assert!(!svg.contains("NaN"));
    }

    #[test]
    fn many_points_are_thinned_but_no_peak_is_lost() {
        let mut points: Vec<_> = (0..1_000_000).map(|n| (f64::from(n) * 1e-3, 1.0)).collect();
        points[777_777].1 = 50.0;
        let panel = Panel { label: "queue".to_owned(), series: vec![line(&points)] };
        let frame = Frame { top: 0.0, height: 100.0, end_s: 1000.0, max: panel.max() };
        let path = &panel.series[0].paths(&frame)[0];
        assert!(path.len() < 100_000, "{}", path.len());
        assert!(path.contains(&format!("{:.2} ", frame.y(50.0))));
    }

    #[test]
    fn ticks_are_round_and_stay_inside() {
        let texts = |max| ticks(max).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        assert_eq!(texts(10.0), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(texts(0.3), ["0.00", "0.05", "0.10", "0.15", "0.20", "0.25", "0.30"]);
        assert_eq!(texts(1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert!(ticks(4.2e9).iter().all(|(value, _)| *value <= 4.2e9));
    }
}
