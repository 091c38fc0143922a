"""The benchmark of the chunked loss: its variants compute the same thing, its figures are kept by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.loss import check_agreement, measure
from benchmarks.results import record


def test_variants_agree_and_disagreement_is_refused() -> None:
    runs = {variant: [measure(variant, 32, 16, 500)] for variant in ("plain", "chunked")}
    check_agreement(runs)
    runs["plain"][0]["hidden_gradient"] *= 1.01
    with pytest.raises(SystemExit, match="disagree on hidden_gradient"):
        check_agreement(runs)


def test_a_figure_replaces_the_earlier_one_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "results" / "latest.jsonl"
    for name, value in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        record(name, value, unit="ratio", ours=value, peer=1.0, peer_name="x", runs=[value], path=path)
    figures = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(figure["name"], figure["value"]) for figure in figures] == [("b", 2.0), ("a", 3.0)]
    assert set(figures[0]) == {"name", "value", "unit", "ours", "peer", "peer_name", "runs"}
