"""Line charts as inline SVG: drawn here, coloured by the page's style sheet, read out by its script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 34


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points (x, y), an optional standard error of each y, and a colour slot of the page."""

    label: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    tone: str  # "one", "two" or "three"
    errors: tuple[float, ...] | None = None
    smooth: int = 0  # width of the running mean drawn over the raw points; 0 draws the points themselves
    markers: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """A horizontal line to compare with, such as the teacher's accuracy."""

    label: str
    y: float
    tone: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled figure; `unit` is "percent" (y in [0, 1]), "nats" or "rate"."""

    key: str
    title: str
    caption: str
    unit: str
    series: tuple[Series, ...]
    references: tuple[Reference, ...] = ()
    x_label: str = "optimizer step"

    @property
    def drawable(self) -> bool:
        return any(series.xs for series in self.series)


@dataclass(frozen=True, slots=True)
class Frame:
    """The mapping from data to picture coordinates."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def running_mean(values: Sequence[float], width: int) -> tuple[float, ...]:
    """The mean over the last `width` finite values, at each position."""
    means = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - width) : end] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return tuple(means)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) covering [low, high]."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if raw <= power * factor * 1.0001)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def frame_of(chart: Chart) -> Frame:
    """Bounds with a little air; shares are always shown from 0 to 1, rates and losses include zero."""
    xs = [x for series in chart.series for x in series.xs]
    ys = [y for series in chart.series for y in series.ys if math.isfinite(y)] or [0.0]
    ys += [reference.y for reference in chart.references]
    x_low, x_high = min(xs), max(xs)
    if x_high == x_low:
        x_high = x_low + 1.0
    if chart.unit == "percent":
        return Frame(x_low, x_high, 0.0, 1.0)
    low, high = min(*ys, 0.0), max(*ys, 0.0)
    air = 0.06 * (high - low) or 1.0
    return Frame(x_low, x_high, low - air if low < 0 else 0.0, high + air)


def format_value(value: float, unit: str) -> str:
    """As short as it can be said: 95%, 0.032, 12.4k."""
    if unit == "percent":
        return f"{100 * value:.0f}%"
    if unit == "rate":
        for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.3g}{suffix}"
        return f"{value:.3g}"
    return f"{value:.3g}"


def svg(chart: Chart) -> str:
    """The chart as one <svg>; colours come from classes, so that it follows light and dark."""
    frame = frame_of(chart)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(chart.title, quote=True)}" data-chart="{escape(chart.key, quote=True)}">'
    ]
    parts += _axes(chart, frame)
    for reference in chart.references:
        y = frame.y(reference.y)
        parts.append(
            f'<line class="reference {reference.tone}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        )
    for series in chart.series:
        parts += _line(series, frame)
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append("</svg>")
    return "".join(parts)


def _axes(chart: Chart, frame: Frame) -> list[str]:
    parts = []
    for value in ticks(frame.y_low, frame.y_high, 5):
        y = frame.y(value)
        style = "zero" if abs(value) < 1e-12 else "grid"
        parts.append(f'<line class="{style}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        label = escape(format_value(value, chart.unit))
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>')
    for value in ticks(frame.x_low, frame.x_high, 6):
        x = frame.x(value)
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - 14}" text-anchor="middle">{value:g}</text>')
    return parts


def _line(series: Series, frame: Frame) -> list[str]:
    parts = []
    if series.errors is not None and series.xs:
        parts.append(_band(series, frame))
    if series.smooth:
        parts.append(f'<path class="raw {series.tone}" d="{_path(series.xs, series.ys, frame)}"/>')
        smoothed = running_mean(series.ys, series.smooth)
        parts.append(f'<path class="line {series.tone}" d="{_path(series.xs, smoothed, frame)}"/>')
    else:
        parts.append(f'<path class="line {series.tone}" d="{_path(series.xs, series.ys, frame)}"/>')
    if series.markers:
        parts += [
            f'<circle class="dot {series.tone}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="3.2"/>'
            for x, y in zip(series.xs, series.ys, strict=True)
            if math.isfinite(y)
        ]
    return parts


def _path(xs: Sequence[float], ys: Sequence[float], frame: Frame) -> str:
    """An SVG path; a value that is not finite breaks the line instead of being drawn as something."""
    commands, pen_down = [], False
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{frame.x(x)} {frame.y(y)}")
        pen_down = True
    return "".join(commands)


def _band(series: Series, frame: Frame) -> str:
    assert series.errors is not None
    points = [p for p in zip(series.xs, series.ys, series.errors, strict=True) if math.isfinite(p[1] + p[2])]
    upper = [f"{frame.x(x)} {frame.y(min(y + error, frame.y_high))}" for x, y, error in points]
    lower = [f"{frame.x(x)} {frame.y(max(y - error, frame.y_low))}" for x, y, error in reversed(points)]
    return f'<polygon class="band {series.tone}" points="{" ".join(upper + lower)}"/>'


def readout(chart: Chart) -> dict[str, Any]:
    """What the page's script needs to show values under the pointer."""
    frame = frame_of(chart)
    xs = sorted({x for series in chart.series for x in series.xs})
    return {
        "xs": xs,
        "at": [frame.x(x) for x in xs],
        "x": chart.x_label,
        "series": [
            {"label": series.label, "tone": series.tone, "values": _values(series, chart.unit)}
            for series in chart.series
        ],
    }


def _values(series: Series, unit: str) -> dict[str, str]:
    errors = series.errors or (math.nan,) * len(series.xs)
    shown = {}
    for x, y, error in zip(series.xs, series.ys, errors, strict=True):
        if unit == "percent":
            text = f"{100 * y:.1f}%" + (f" ± {100 * error:.1f}" if math.isfinite(error) else "")
        else:
            text = format_value(y, unit) if math.isfinite(y) else "no value"
        shown[f"{x:g}"] = text
    return shown
