"""The sizing command: from a run file to tokens per second to replicas."""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path

import pytest
from support.teachers import teacher_process

from benchmarks.scaling.sizing import Need, main, measured_rate, needs, print_need

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "qwen3-8b-to-0.6b.toml"


def recipe_need(response: int | None = None) -> Need:
    (need,) = needs(RECIPE, context=200, response=response)
    return need


def test_a_step_has_the_context_of_every_group_once_and_all_its_responses() -> None:
    need = recipe_need(response=600)
    assert (need.prompts, need.samples, need.views) == (64, 4, 1)
    assert need.step_tokens == 64 * (200 + 4 * 600) == 166_400
    assert recipe_need().response == 1024


@pytest.mark.parametrize(("rate", "replicas"), [(166_400 / 30 / 0.7, 1), (166_400 / 30, 2), (1000.0, 8)])
def test_replicas_are_busy_seven_tenths_of_the_time(rate: float, replicas: int) -> None:
    assert recipe_need(response=600).replicas(30.0, rate) == replicas


def test_what_is_printed_can_be_put_into_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    print_need(recipe_need(response=600), 30.0, 1000.0)
    told = capsys.readouterr().out
    assert "8 replicas" in told
    assert "waiting tokens 30,000 (30 s of work)" in told
    assert "tokens in flight 20,800" in told


def test_the_rate_of_a_running_replica_is_measured_with_the_signal_of_the_run(tmp_path: Path) -> None:
    rate = 20_000.0
    (candidates,) = needs(ROOT / "recipes" / "quickstart.toml", context=50, response=50)
    assert candidates.signal.candidates
    with teacher_process(tmp_path, fake={"tokens_per_second": rate}) as teacher:
        for need in (recipe_need(response=50), candidates):
            measured = asyncio.run(measured_rate(need, teacher.grpc, 2.0, None))
            assert measured == pytest.approx(rate, rel=0.2)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's commands name files as seen from there."""
    monkeypatch.chdir(ROOT)


def test_the_guide_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs" / "scaling.md").read_text()
    found = re.search(
        r"```sh\npython -m benchmarks.scaling.sizing (.*)\n```\n\n```\n(.*?)```", guide, re.DOTALL
    )
    assert found, "the guide has no sizing command with its output"
    assert main(shlex.split(found[1])) == 0
    assert capsys.readouterr().out == found[2]
