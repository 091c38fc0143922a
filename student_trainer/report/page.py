"""Assembles the report: one HTML page that needs nothing but itself, and PNGs of its figures."""

from __future__ import annotations

import json
import math
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from student_trainer.report import figures, rock_tokens, rollouts
from student_trainer.report.charts import Chart, readout, svg
from student_trainer.report.run_data import METRICS, OutcomeRow, RolloutRecord, RunData, read_run

PAGE = "report.html"
IMAGES = "report"


def write_report(run_directory: Path) -> Path:
    """Write RUN_DIR/report.html and RUN_DIR/report/*.png; returns the page's path.

    Raises:
        FileNotFoundError: `run_directory` is no run directory.
    """
    from student_trainer.report.images import write_images

    run = read_run(run_directory)
    page = run_directory / PAGE
    temporary = page.with_suffix(".part")
    temporary.write_text(render(run), encoding="utf-8")
    temporary.replace(page)
    write_images(run, run_directory / IMAGES)
    return page


def render(run: RunData) -> str:
    """The whole page as text."""
    drawn = figures.charts(run)
    chosen = rollouts.choose(run.rollouts)
    data = {
        "charts": {chart.key: readout(chart) for chart in drawn},
        "rollouts": {
            f"{step}/{place}": rollouts.readout(rollout)
            for step, group in chosen.items()
            for place, rollout in enumerate(group)
        },
    }
    return Template(_asset("page.html")).substitute(
        title=escape(run.directory.resolve().name),
        lede=escape(_lede(run)),
        css=_asset("page.css"),
        js=_asset("page.js"),
        figures=_headline(run),
        table=_table(run),
        charts=_charts(drawn),
        rocks=rock_tokens.section(run.rollouts),
        rollouts=_rollouts(chosen),
        footer=escape(_footer(run)),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _asset(name: str) -> str:
    return resources.files("student_trainer.report").joinpath("template", name).read_text(encoding="utf-8")


def _lede(run: RunData) -> str:
    steps = len(run.steps)
    if not steps and not run.evaluations:
        return "This run has not finished a step yet."
    return (
        f"On-policy distillation over {steps} optimizer step{'' if steps == 1 else 's'}: the student wrote "
        "its own answers, the teacher scored every token of them, and the student learned from those scores."
    )


def _headline(run: RunData) -> str:
    """The handful of numbers a reader wants first; the same as in the table below them."""
    rows = {row.name: row for row in table_rows(run)}
    before, after = rows.get("student before"), rows.get("student after")
    boxes = []
    if before is not None and after is not None:
        boxes += [
            _share_box("accuracy, greedy", before.greedy, after.greedy, after.greedy_error),
            _share_box("accuracy, sampled at T = 1", before.sampled, after.sampled, after.sampled_error),
            _divergence_box(run, before.kl, after.kl),
        ]
    totals = run.outcome.totals if run.outcome else {}
    if "wall_seconds" in totals:
        tokens = f"{totals['tokens_sampled']:,.0f} tokens sampled and scored"
        boxes.append(_box("wall time", _duration(totals["wall_seconds"]), tokens))
    shown = "".join(boxes)
    return f'<section class="figures">{shown}</section>' if shown else ""


def _share_box(name: str, before: float | None, after: float | None, error: float | None) -> str:
    if before is None or after is None or error is None:
        return ""
    return _box(name, f"{100 * after:.1f}%", f"± {100 * error:.1f} standard error", f"{100 * before:.0f}%")


def _divergence_box(run: RunData, before: float | None, after: float | None) -> str:
    """The measured divergence, or that of the first and last training batches."""
    if before is not None and after is not None:
        return _box("KL to the teacher", f"{after:.3f}", "nats per token, whole vocabulary", f"{before:.2f}")
    kls = [record.values["kl"] for record in run.steps if math.isfinite(record.values.get("kl", math.nan))]
    if len(kls) < 2:
        return ""
    width = min(5, len(kls) // 2)
    first, last = sum(kls[:width]) / width, sum(kls[-width:]) / width
    return _box("KL to the teacher", f"{last:.3f}", f"nats per token, {width}-step means", f"{first:.2f}")


def _box(name: str, value: str, more: str, before: str | None = None) -> str:
    earlier = f'<span class="from">{escape(before)} → </span>' if before is not None else ""
    return (
        f'<div class="figure"><div class="name">{escape(name)}</div>'
        f'<div class="value">{earlier}{escape(value)}</div><div class="more">{escape(more)}</div></div>'
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def table_rows(run: RunData) -> tuple[OutcomeRow, ...]:
    """Teacher, before, after: as measured at the end of a quickstart, else from the run's evaluations."""
    if run.outcome is not None:
        return run.outcome.rows
    if not run.evaluations:
        return ()
    named = [("student before", run.evaluations[0])]
    if len(run.evaluations) > 1:
        named.append(("student after", run.evaluations[-1]))
    return tuple(
        OutcomeRow(name, record.greedy, record.greedy_error, record.sampled, record.sampled_error, None)
        for name, record in named
    )


def _table(run: RunData) -> str:
    rows = table_rows(run)
    if not rows:
        return ""
    body = "".join(_table_row(row) for row in rows)
    return (
        '<h2>Before and after</h2><p class="note">Exact match on held-out prompts, ± one standard error. '
        "KL(student ‖ teacher) in nats per token of the student's own samples.</p>"
        '<div class="table"><table><thead><tr><th></th><th>greedy</th><th>sampled, T = 1</th>'
        f"<th>KL to the teacher</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def _table_row(row: OutcomeRow) -> str:
    marked = ' class="after"' if row.name == "student after" else ""
    divergence = "–" if row.kl is None else f"{row.kl:.3f}"
    return (
        f"<tr{marked}><td>{escape(row.name)}</td><td>{_share(row.greedy, row.greedy_error, '')}</td>"
        f"<td>{_share(row.sampled, row.sampled_error, 'sampled')}</td><td>{divergence}</td></tr>"
    )


def _share(value: float | None, error: float | None, kind: str) -> str:
    if value is None:
        return "–"
    spread = f' <span class="pm">± {100 * error:.1f}</span>' if error is not None else ""
    bar = f'<span class="bar {kind}"><i style="width:{100 * value:.1f}%"></i></span>'
    return f"{bar}{100 * value:.1f}%{spread}"


def _charts(drawn: tuple[Chart, ...]) -> str:
    if not drawn:
        return ""
    panels = []
    for chart in drawn:
        keys = [
            f'<span><i class="tone {series.tone}"></i>{escape(series.label)}</span>'
            for series in chart.series
        ]
        keys += [
            f'<span><i class="dashed"></i>{escape(reference.label)}</span>' for reference in chart.references
        ]
        legend = (
            f'<div class="legend">{"".join(keys)}</div>'
            if len(keys) > 1
            else '<div class="legend">&nbsp;</div>'
        )
        panels.append(
            f'<div class="panel"><h3>{escape(chart.title)}</h3>'
            f'<p class="caption">{escape(chart.caption)}</p>{legend}{svg(chart)}</div>'
        )
    return f'<h2>How it went</h2><div class="charts">{"".join(panels)}</div>'


def _rollouts(chosen: dict[int, list[RolloutRecord]]) -> str:
    if not chosen:
        return ""
    sections = []
    for step, group in chosen.items():
        long = any(len(rollout.token_texts) > 60 for rollout in group)
        cards = "".join(rollouts.card(rollout, f"{step}/{place}") for place, rollout in enumerate(group))
        sections.append(
            f'<section class="step"><h3>Step <b>{step}</b></h3>'
            f'<div class="rollouts{" long" if long else ""}">{cards}</div></section>'
        )
    return (
        "<h2>What the teacher thought of every token</h2>"
        '<p class="note">Responses the student wrote while training. Each token is coloured by the teacher’s '
        "log-ratio log q − log p: orange tokens the teacher finds less likely than the student does and "
        "pushes down, blue ones it would have said more readily. Point at a token for the "
        "numbers; the figure at the "
        f"right of each card is the mean over the response.</p>{_scale()}{''.join(sections)}"
    )


def _scale() -> str:
    stops = (-4.0, -2.0, -1.0, -0.3, 0.0, 0.3, 1.0, 2.0, 4.0)
    ramp = "".join(
        f'<span class="swatch {"up" if stop > 0 else "down"}" style="--a:{rollouts.strength(stop)}"></span>'
        for stop in stops
    )
    return (
        f'<div class="scale"><span>−{rollouts.SATURATION:g} nats, teacher disagrees</span>'
        f'<span class="ramp">{ramp}</span><span>teacher more certain, +{rollouts.SATURATION:g}</span></div>'
    )


def _footer(run: RunData) -> str:
    parts = [f"Made by tutelage report from {run.directory.name}/{METRICS}."]
    if run.skipped_lines:
        parts.append(
            f"{run.skipped_lines} incomplete lines were skipped, as an interrupted process leaves them."
        )
    return " ".join(parts)
