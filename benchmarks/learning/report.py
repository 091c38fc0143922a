"""The page, the document and the pictures of the learning experiments; every word and number is computed."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import Arm, Measure, Sizes
from benchmarks.learning.verdicts import FEW_TOKENS_APART, Findings, Judged, Spread, spread
from benchmarks.results import LATEST, record

PAGE, DOCUMENT = "learning.md", "learning.json"
WORDS = {
    "appears": "Appeared here.",
    "does not appear": "Did not appear here.",
    "the opposite appears": "The opposite appeared here.",
    "not clear": "Not clear here: the seeds disagree, or differ by no more than chance.",
    "not measured": "Not measured.",
}
ALIKE_IN_SOME = "Not clear here: alike in some seeds, and not in others."


@dataclass(frozen=True, slots=True)
class Whole:
    """What the command was asked for and how much of it is done."""

    seeds: tuple[int, ...]
    sizes: Sizes
    arms: int  # arms times seeds that belong to it
    done: int
    seconds: float  # wall time, over however many calls
    cpu_seconds: float
    model_cpu_seconds: float  # of training the models, which are kept between calls
    models_untimed: int  # models of which nobody noted what they cost
    sources: Mapping[str, Sequence[str]]  # commit of the code → letters of the experiments that it made

    @property
    def complete(self) -> bool:
        return self.done == self.arms and len(self.sources) == 1


def page(findings: Sequence[Findings], whole: Whole) -> str:
    """The whole page as Markdown."""
    parts = ["# Learning experiments", _preamble(whole), _summary(findings)]
    parts += [_section(found) for found in findings]
    return "\n\n".join(parts) + "\n"


def _preamble(whole: Whole) -> str:
    steps, responses = whole.sizes.steps, whole.sizes.responses
    state = (
        f"All {whole.done} arms are done."
        if whole.done == whole.arms
        else f"**Not complete: {whole.done} of {whole.arms} arms are done.**"
    )
    if len(whole.sources) > 1:
        told = "; ".join(f"code {source} made {', '.join(names)}" for source, names in whole.sources.items())
        state += f" **Not one run: {told}.**"
    return (
        "Written by `python -m benchmarks.learning`, figures, words and verdicts alike. "
        f"{state} Every arm trains a model of 0.2M parameters for {steps} steps of {responses} responses; "
        f"{len(whole.seeds)} seeds, each with a start of its own, and teachers in common. Accuracy is exact "
        f"match on {whole.sizes.evaluation_prompts} held-out problems, greedy and sampled at T = 1; KL is "
        "KL(student ‖ teacher) in nats per token of the student's own responses, over the whole vocabulary; "
        "± is the standard deviation over seeds. An ordering *appears* when every seed has it and the mean "
        "difference is more than two standard errors, over seeds or over prompts, whichever is larger. "
        "These are models of a toy's size on two tasks: what appears here may not elsewhere, and the other "
        "way round.\n\n"
        f"Code {', '.join(whole.sources) or 'unknown'}; {platform.processor() or platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, one thread for each arm. The arms took "
        f"{whole.seconds / 60:.0f} minutes and {whole.cpu_seconds / 60:.0f} CPU minutes; their models, "
        f"which are kept between calls, {'more than ' if whole.models_untimed else ''}"
        f"{whole.model_cpu_seconds / 60:.0f} CPU minutes."
    )


def _summary(findings: Sequence[Findings]) -> str:
    lines = ["| reported | by | here |", "|---|---|---|"]
    for found in findings:
        for judged in found.judged():
            verdict = judged.verdict
            lines.append(
                f"| {found.experiment.name[0]}: {judged.claim.says} | {judged.claim.source} | {verdict} |"
            )
    return "\n".join(lines)


def _section(found: Findings) -> str:
    experiment = found.experiment
    parts = [f"## {experiment.name[0]}. {experiment.title}", experiment.question]
    parts += list(experiment.notes)
    parts += [_table(found), " ".join([_tokens(found), *_rates(found)])]
    parts.append("\n".join(f"- {sentence(judged)}" for judged in found.judged()))
    if any(found.seeds(arm.name) for arm in experiment.arms):
        parts.append(f"![{experiment.title}]({picture_name(found)})")
    return "\n\n".join(parts)


def _measures(found: Findings) -> list[tuple[str, Measure]]:
    """Columns: title and figure."""
    columns = []
    for answered in found.experiment.sets:
        prefix = "" if len(found.experiment.sets) == 1 else f"{answered.name}: "
        columns += [
            (f"{prefix}greedy", Measure("greedy", answered.name)),
            (f"{prefix}T = 1", Measure("sampled", answered.name)),
        ]
    columns.append(("tokens of a response", Measure("length", found.experiment.sets[0].name)))
    if found.experiment.judge:
        columns.append(("KL", Measure("kl")))
    return columns


def _table(found: Findings) -> str:
    columns = _measures(found)
    titles = ["arm", *(title for title, _ in columns), "tokens used", "trained", "CPU s", "seeds"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for start, arm in found.starts().items():
        cells = [
            _cell(measure, spread(list(found.at_start(arm.name, measure).values()))) for _, measure in columns
        ]
        lines.append(f"| *before: {start}* | {' | '.join(cells)} |  |  |  |  |")
    lines += [_row(found, arm, columns) for arm in found.experiment.arms]
    return "\n".join(lines)


def _row(found: Findings, arm: Arm, columns: Sequence[tuple[str, Measure]]) -> str:
    seeds = found.seeds(arm.name)
    if not seeds:
        return f"| {arm.name} |" + " – |" * len(columns) + " – | – | – | 0 |"
    results = [found.results[arm.name][seed] for seed in seeds]
    cells = [_cell(measure, spread(list(found.at_end(arm.name, measure).values()))) for _, measure in columns]
    means = [spread([float(r[name]) for r in results]).mean for name in ("tokens_used", "tokens_trained")]
    cpu = spread([result["cpu_seconds"] for result in results]).mean
    tail = f"{means[0]:,.0f} | {means[1]:,.0f} | {cpu:.0f} | {len(seeds)}"
    return f"| {arm.name} | {' | '.join(cells)} | {tail} |"


def _cell(measure: Measure, value: Spread) -> str:
    if measure.figure in ("greedy", "sampled"):
        return f"{100 * value.mean:.1f} ± {100 * value.deviation:.1f}"
    digits = 3 if measure.figure == "kl" else 1
    return f"{value.mean:.{digits}f} ± {value.deviation:.{digits}f}"


def _tokens(found: Findings) -> str:
    apart = found.tokens_apart()
    if apart <= FEW_TOKENS_APART:
        return f"Equal tokens: the arms used within {apart:.1%} of one another."
    return (
        f"**Not equal tokens: up to {apart:.0%} apart, as the arms write responses of different lengths; "
        "they had as many responses.**"
    )


def _rates(found: Findings) -> list[str]:
    """A sentence about learning rates, where the arms have several."""
    rates: dict[float, list[str]] = {}
    for arm in found.experiment.arms:
        if arm.trained:
            rates.setdefault(arm.learning_rate, []).append(f"“{arm.name}”")
    told = "; ".join(f"{rate:g} for {', '.join(names)}" for rate, names in rates.items())
    return [f"**Not one learning rate: {told}.**"] if len(rates) > 1 else []


def sentence(judged: Judged) -> str:
    """A claim and what was found, in words."""
    claim = judged.claim
    partly = claim.alike is not None and judged.verdict == "not clear"
    told = f"*{claim.says}* ({claim.source}). **{ALIKE_IN_SOME if partly else WORDS[judged.verdict]}**"
    if judged.more is None or judged.less is None or judged.difference is None:
        return told
    measure, other = claim.measure, claim.less_measure or claim.measure
    more, less = _cell(measure, judged.more), _cell(other, judged.less)
    where = measure.text if other == measure else f"{measure.text}, against {other.text}"
    seeds = len(judged.difference.values)
    above = sum(value > 0 for value in judged.difference.values)
    return (
        f"{told} {claim.more} {more}, {claim.less} {less} ({where}); difference "
        f"{_cell(measure, judged.difference)}, above zero in {above} of {seeds} seeds"
        + ("." if claim.alike is None else f"; alike means within {_margin(measure, claim.alike)}.")
    )


def _margin(measure: Measure, margin: float) -> str:
    return f"{100 * margin:.0f} points" if measure.figure in ("greedy", "sampled") else f"{margin:g}"


def document(findings: Sequence[Findings], whole: Whole) -> dict[str, Any]:
    """The same as JSON, with every seed's course."""
    return {
        "whole": {**asdict(whole), "complete": whole.complete},
        "experiments": {
            found.experiment.name: {
                "arms": {
                    name: {str(seed): results[seed] for seed in sorted(results)}
                    for name, results in found.results.items()
                },
                "tokens_apart": found.tokens_apart(),
                "claims": [asdict(judged) for judged in found.judged()],
            }
            for found in findings
        },
    }


def write(findings: Sequence[Findings], whole: Whole, directory: Path = LATEST.parent) -> list[Path]:
    """Write page, document, pictures and the figures of latest.jsonl; returns the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (
        (PAGE, page(findings, whole)),
        (DOCUMENT, json.dumps(document(findings, whole), indent=1) + "\n"),
    ):
        path = directory / name
        temporary = path.with_name(f".{name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        written.append(path)
    written += list(_pictures(findings, directory))
    counts = summary(findings, whole)
    record(
        "learning.orderings", counts["appears"], unit=f"of {counts['claims']} orderings",
        ours=counts["appears"], extra=counts, path=directory / LATEST.name,
    )  # fmt: skip
    return written


def summary(findings: Sequence[Findings], whole: Whole) -> dict[str, Any]:
    """The line of JSON that the command ends with."""
    verdicts = Counter(judged.verdict for found in findings for judged in found.judged())
    return {
        "claims": verdicts.total(),
        **{verdict: verdicts[verdict] for verdict in WORDS},  # type: ignore[index]
        "arms": whole.done,
        "complete": whole.complete,
        "minutes": round(whole.seconds / 60, 1),
        "sources": dict(whole.sources),
        "written": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def picture_name(found: Findings) -> str:
    return f"learning-{found.experiment.name}.png"


def _pictures(findings: Sequence[Findings], directory: Path) -> Iterator[Path]:
    for found in findings:
        if any(found.seeds(arm.name) for arm in found.experiment.arms):
            yield draw(found, directory / picture_name(found))


def draw(found: Findings, path: Path) -> Path:
    """Accuracy at T = 1 over the steps, a panel for each set: mean over seeds, from lowest to highest."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sets = found.experiment.sets
    figure, panels = plt.subplots(
        1, len(sets), figsize=(3.6 * len(sets) + 2.6, 3.4), squeeze=False, sharey=True, layout="constrained"
    )
    for panel, answered in zip(panels[0], sets, strict=True):
        for number, arm in enumerate(found.experiment.arms):
            if arm.trained and found.seeds(arm.name):
                _line(panel, found.results[arm.name], answered.name, arm.name, f"C{number}")
        panel.set_title(f"{answered.name}, T = 1", fontsize=10)
        panel.set_xlabel("step")
        panel.set_ylim(0, 1.02)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("accuracy")
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _line(panel: Any, results: Mapping[int, dict[str, Any]], name: str, label: str, colour: str) -> None:
    looks = [result["looks"] for result in results.values()]
    steps = [look["step"] for look in looks[0]]
    values = [[look["sets"][name]["sampled"] for look in course] for course in looks]
    columns = list(zip(*values, strict=True))
    panel.fill_between(
        steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, lw=0
    )
    panel.plot(steps, [sum(c) / len(c) for c in columns], color=colour, lw=1.4, label=label)
