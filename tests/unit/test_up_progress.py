"""What a person sees during a run: a live view on a terminal, sparse plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from launcher.progress import (
    ChildView,
    LiveView,
    PlainView,
    Snapshot,
    clock,
    make_view,
    plain_line,
    sparkline,
)

RUNNING = (ChildView("trainer", "running", 0), ChildView("big-1", "restarting", 2))
SNAPSHOT = Snapshot(
    run="demo",
    steps=100,
    status="training",
    step=42,
    loss=0.22,
    kl=0.213,
    staleness=1.0,
    greedy=0.772,
    sampled=0.704,
    queued_tokens=1740,
    scored_per_second=5210.4,
    children=RUNNING,
)


def rendered(snapshot: Snapshot) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    console.print(LiveView(console).render(snapshot))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize(
    "figure", ["42/100", "77.2%", "70.4%", "0.213", "0.22", "1,740", "5,210", "trainer", "big-1"]
)
def test_both_views_show_every_figure(figure: str) -> None:
    assert figure in rendered(SNAPSHOT)
    assert figure in plain_line(SNAPSHOT).replace("/s", "") or figure == "trainer"


def test_a_process_in_trouble_is_named_with_its_restarts() -> None:
    assert "big-1 restarting, restarted 2×" in rendered(SNAPSHOT)
    assert "big-1 restarting" in plain_line(SNAPSHOT)


def test_what_the_trainer_waits_for_is_shown() -> None:
    waiting = Snapshot(run="demo", steps=9, step=3, status="waiting for scores: no sampler")
    assert "waiting for scores: no sampler" in plain_line(waiting)
    assert "waiting for scores: no sampler" in rendered(waiting)


def test_nothing_known_is_not_shown_as_zero() -> None:
    empty = rendered(Snapshot(run="demo", steps=9))
    assert "0.0%" not in empty
    assert "–" in empty


def test_plain_lines_come_with_news_only(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainView(every=0.0) as view:
        for _ in range(3):
            view.show(SNAPSHOT)
    assert capsys.readouterr().out.count("step 42/100") == 1


def test_the_last_line_is_printed_even_when_it_came_too_soon(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainView(every=1000.0) as view:
        view.show(Snapshot(run="demo", steps=9, step=1))
        view.show(Snapshot(run="demo", steps=9, step=2))
        view.show(Snapshot(run="demo", steps=9, step=3))
    out = capsys.readouterr().out
    assert ("step 1/9" in out, "step 2/9" in out, "step 3/9" in out) == (True, False, True)


def test_problems_are_marked_and_details_indented(capsys: pytest.CaptureFixture[str]) -> None:
    PlainView().say("trainer died", ["last words"], problem=True)
    assert capsys.readouterr().out == "! trainer died\n    last words\n"


def test_text_of_a_child_is_not_read_as_markup() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    LiveView(console).say("died [/bold]", ["[red]"], problem=True)
    assert "died [/bold]" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_gets_the_live_view() -> None:
    assert isinstance(make_view(Console(force_terminal=True)), LiveView)
    assert isinstance(make_view(Console(force_terminal=False)), PlainView)


def test_sparkline_scales_from_zero_and_fits() -> None:
    assert sparkline([4.0, 2.0, 0.0, -1.0]) == "█▅▁▁"
    assert len(sparkline([1.0] * 100)) == 16
    assert sparkline([float("nan")]) == ""


def test_clock() -> None:
    assert [clock(seconds) for seconds in (5, 65, 7384)] == ["0:05", "1:05", "2:03:04"]
