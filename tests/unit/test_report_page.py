"""The report: everything the run left on disk, on one page that needs nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.run_directory import (
    STEPS,
    evaluation_line,
    full_run,
    rollout_line,
    step_line,
    write_run,
)

from student_trainer.report.charts import Chart, Series, running_mean, svg, ticks
from student_trainer.report.page import render, write_report
from student_trainer.report.rollouts import SATURATION, card, choose, strength
from student_trainer.report.run_data import RolloutRecord, read_run


class Tags(HTMLParser):
    """Every start tag with its attributes, and the page's own data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.data_text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][1].get("id") == "data" and not self.data_text:
            self.data_text = data

    @property
    def data(self) -> Any:
        return json.loads(self.data_text)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_run(tmp_path_factory.mktemp("report") / "quickstart")


@pytest.fixture(scope="module")
def page(run_directory: Path) -> str:
    return write_report(run_directory).read_text(encoding="utf-8")


def test_page_asks_nothing_of_the_network(page: str) -> None:
    loading = [
        (tag, value)
        for tag, attributes in Tags(page).tags
        for name, value in attributes.items()
        if name in ("src", "href", "data", "action", "srcset")
    ]
    assert loading == []
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", page)


def test_page_shows_the_table_with_standard_errors(page: str) -> None:
    text = re.sub(r"<[^>]+>", " ", page)
    for cell in ("teacher", "student before", "student after", "94.0%", "± 1.0", "± 2.0", "0.910", "0.024"):
        assert cell in text


def test_page_has_every_curve(page: str) -> None:
    charts = {attributes["data-chart"] for tag, attributes in Tags(page).tags if tag == "svg"}
    assert charts == {"accuracy", "kl", "loss", "throughput"}
    readout = Tags(page).data["charts"]
    assert readout["accuracy"]["series"][0]["values"] == {
        "0": "26.0% ± 2.0",
        "20": "92.0% ± 1.2",
        "40": "94.0% ± 1.1",
    }
    assert [line["label"] for line in readout["throughput"]["series"]] == ["sampled", "scored", "trained"]
    assert len(readout["kl"]["xs"]) == STEPS


def test_every_token_is_coloured_by_the_teachers_log_ratio(page: str) -> None:
    tokens = [attributes for tag, attributes in Tags(page).tags if tag == "span" and "data-i" in attributes]
    assert [token["class"] for token in tokens] == ["t up", "t down", "t", "t unscored"]
    assert tokens[0]["style"] == f"--a:{strength(0.75)}"
    assert tokens[1]["style"] == f"--a:{strength(SATURATION)}"


def test_hover_has_both_log_probabilities_and_the_alternatives(page: str) -> None:
    rollout = Tags(page).data["rollouts"]["10/0"]
    assert rollout["p"] == [-1.0, -0.5, -0.2, -0.1]
    assert rollout["q"] == [-0.25, -6.5, -0.21, None]
    assert rollout["top"][0] == [["3", -0.25], ["4", -2.0]]


def test_colour_grows_with_the_ratio_and_agreement_stays_plain() -> None:
    values = [strength(ratio) for ratio in (0.0, 0.04, 0.1, -1.0, 2.0, -4.0, 9.0)]
    assert values == sorted(values)
    assert values[1] == 0.0
    assert values[-1] == values[-2]


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    rollout = rollout_line(prompt_text=evil, token_texts=[evil] * 4, teacher_top=[[[evil, -0.1]]] * 4)
    page = render(read_run(write_run(tmp_path / "<em>run", [step_line(1)], [rollout])))
    parsed = Tags(page)
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "em")]
    assert parsed.data["rollouts"]["10/0"]["top"][0][0][0] == evil


def test_pngs_are_written(run_directory: Path, page: str) -> None:
    images = sorted((run_directory / "report").glob("*.png"))
    assert [image.stem for image in images] == ["accuracy", "kl", "loss", "rollouts", "throughput"]
    assert all(image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 5000 for image in images)


def test_a_prompt_with_dollar_signs_is_drawn_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step_line(1)], [rollout_line(prompt_text=r"is $\frac{1}{$ 5?")])
    assert (write_report(run).parent / "report" / "rollouts.png").stat().st_size > 5000


def test_a_torn_last_line_is_counted_and_the_rest_is_shown(tmp_path: Path) -> None:
    directory = write_run(tmp_path, [step_line(1), evaluation_line(0, 0.2, 0.1)], [])
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    run = read_run(directory)
    assert [record.step for record in run.steps] == [1]
    assert run.skipped_lines == 1
    assert "1 incomplete lines were skipped" in render(run)


def test_a_step_trained_again_after_a_crash_counts_once(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, [step_line(1, kl=5.0), step_line(2), step_line(1, kl=0.5)], []))
    assert [(record.step, record.values["kl"]) for record in run.steps] == [(1, 0.5), (2, 0.4)]


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path, [], [])).read_text()
    assert "has not finished a step yet" in page


def test_a_damaged_sample_file_is_counted_not_fatal(tmp_path: Path) -> None:
    directory = write_run(tmp_path, [step_line(1)], [rollout_line()])
    whole = (directory / "samples" / "step-00000010.jsonl.gz").read_bytes()
    (directory / "samples" / "step-00000020.jsonl.gz").write_bytes(whole[:-9])
    run = read_run(directory)
    assert (len(run.rollouts), run.skipped_lines) == (1, 1)


def test_a_value_that_is_not_finite_breaks_the_line_and_is_named(tmp_path: Path) -> None:
    series = Series("kl", (1.0, 2.0, 3.0, 4.0), (1.0, float("nan"), 2.0, 1.0), "one")
    drawn = svg(Chart("kl", "KL", "", "nats", (series,)))
    path = re.search(r'<path class="line one" d="([^"]+)"', drawn)
    assert path is not None
    assert (path[1].count("M"), path[1].count("L"), "nan" in drawn) == (2, 1, False)


def test_first_and_last_sampled_steps_are_always_shown() -> None:
    rollouts = [
        RolloutRecord(step, f"g{n}", "p", ("a",), (-1.0,), (-1.0,), (), None)
        for step in range(0, 100, 7)
        for n in range(9)
    ]
    chosen = choose(rollouts)
    assert (min(chosen), max(chosen)) == (0, 98)
    assert all(len(group) == 6 for group in chosen.values())


def test_a_long_response_is_cut_and_says_so() -> None:
    many = 450
    rollout = RolloutRecord(1, "g", "p", ("a",) * many, (-1.0,) * many, (-2.0,) * many, (), 1.0)
    drawn = card(rollout, "1/0")
    assert drawn.count("data-i=") == 400
    assert "50 more tokens" in drawn


def test_a_guided_response_is_called_one() -> None:
    rollout = RolloutRecord(1, "g", "p", ("a",), (-1.0,), (-2.0,), (), 1.0)
    assert "guided" not in card(rollout, "1/0")
    assert ">guided</span>" in card(replace(rollout, guided=True), "1/0")


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0, 5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.0, 23.0, 5) == [0.0, 5.0, 10.0, 15.0, 20.0]


def test_running_mean_uses_only_the_past() -> None:
    assert running_mean([1.0, 3.0, float("nan"), 5.0], 2) == (1.0, 2.0, 3.0, 5.0)
