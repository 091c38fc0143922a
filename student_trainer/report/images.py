"""The report's figures as PNG files, for READMEs, slides and issue comments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_trainer.report import figures, rollouts
from student_trainer.report.charts import Chart, Series, format_value, running_mean
from student_trainer.report.run_data import RolloutRecord, RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TONES = {"one": "#2f5fd0", "two": "#d9601a", "three": "#1f8a6d", "muted": "#928e86"}
INK, SOFT, RULE, PAPER = "#191816", "#5d5a54", "#e7e3db", "#ffffff"
UP, DOWN = (47 / 255, 95 / 255, 208 / 255), (224 / 255, 96 / 255, 20 / 255)


def write_images(run: RunData, directory: Path) -> list[Path]:
    """One PNG per chart, and rollouts.png when the run has samples; returns their paths."""
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in figures.charts(run):
        figure = Figure(figsize=(7.2, 4.0), dpi=160, facecolor=PAPER, layout="constrained")
        _draw(chart, figure.add_subplot())
        path = directory / f"{chart.key}.png"
        figure.savefig(path)
        written.append(path)
    chosen = rollouts.choose(run.rollouts)
    if chosen:
        written.append(_write_rollouts(chosen, directory / "rollouts.png"))
    return written


def _draw(chart: Chart, axes: Axes) -> None:
    for series in chart.series:
        _draw_series(series, axes)
    for reference in chart.references:
        axes.axhline(
            reference.y, color=TONES["muted"], linestyle=(0, (4, 4)), linewidth=1.2, label=reference.label
        )
    axes.set_title(chart.title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=12)
    axes.set_xlabel(chart.x_label, color=SOFT)
    axes.yaxis.set_major_formatter(lambda value, _: format_value(value, chart.unit))
    if chart.unit == "percent":
        axes.set_ylim(0, 1.02)
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _quiet(axes)
    if len(chart.series) + len(chart.references) > 1:
        axes.legend(frameon=False, labelcolor=SOFT, fontsize=9)


def _draw_series(series: Series, axes: Axes) -> None:
    color = TONES[series.tone]
    ys = list(series.ys)
    if series.smooth:
        axes.plot(series.xs, ys, color=color, linewidth=0.8, alpha=0.35)
        ys = list(running_mean(series.ys, series.smooth))
    marker = "o" if series.markers else None
    axes.plot(series.xs, ys, color=color, linewidth=2, marker=marker, markersize=4, label=series.label)
    if series.errors is not None:
        low = [max(y - error, 0.0) for y, error in zip(ys, series.errors, strict=True)]
        high = [y + error for y, error in zip(ys, series.errors, strict=True)]
        axes.fill_between(series.xs, low, high, color=color, alpha=0.15, linewidth=0)


def _quiet(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(colors=SOFT, length=0, labelsize=9)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)


def _write_rollouts(chosen: dict[int, list[RolloutRecord]], path: Path) -> Path:
    """Rows of coloured cells, one per token; long responses are cut at the right edge."""
    from matplotlib.figure import Figure

    rows = [rollout for group in chosen.values() for rollout in group[:3]]
    columns = 64
    figure = Figure(figsize=(10, 0.42 * len(rows) + 0.7), dpi=160, facecolor=PAPER)
    axes = figure.add_axes((0.01, 0.0, 0.98, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, columns)
    axes.set_ylim(len(rows) + 1.2, 0)
    axes.text(
        0,
        0.6,
        "Each token by log q − log p: orange the teacher pushes down, blue it likes",
        fontsize=10,
        color=INK,
    )
    for place, rollout in enumerate(rows):
        y = place + 1.5
        label = f"step {rollout.step}  {' '.join(rollout.prompt_text.split())[-22:]}"
        axes.text(0, y, label, fontsize=9, color=SOFT, va="center", family="monospace", parse_math=False)
        _draw_tokens(rollout, axes, y, 17.0, columns)
    figure.savefig(path)
    return path


def _draw_tokens(rollout: RolloutRecord, axes: Any, y: float, left: float, right: float) -> None:
    from matplotlib.patches import Rectangle

    x = left
    for text, ratio in zip(rollout.token_texts, rollout.log_ratios, strict=True):
        shown = rollouts.visible(text) or "∅"
        width = 0.82 * len(shown) + 0.25
        if x + width > right:
            axes.text(x, y, "…", fontsize=10, color=SOFT, va="center")
            return
        if math.isfinite(ratio) and rollouts.strength(ratio):
            color = (*(UP if ratio > 0 else DOWN), rollouts.strength(ratio))
            axes.add_patch(Rectangle((x, y - 0.38), width, 0.76, facecolor=color, linewidth=0))
        axes.text(
            x + width / 2,
            y,
            shown,
            fontsize=10,
            color=INK,
            va="center",
            ha="center",
            family="monospace",
            parse_math=False,
        )
        x += width
