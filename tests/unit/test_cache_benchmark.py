"""The cache's benchmark at a small size: every figure is recorded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from benchmarks import cache


def test_every_figure_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(
        cache, "record", lambda name, value, **rest: recorded.update({name: {"value": value, **rest}})
    )
    for name, size in {"VOCAB": 512, "CONTEXT": 8, "POSITIONS": 128}.items():
        monkeypatch.setattr(cache, name, size)
    asyncio.run(cache.compare(rounds=2))
    stores, kinds = ("directory", "valkey"), ("sampled", "top_64")
    assert set(recorded) == {f"cache.{store}_{kind}" for store in stores for kind in kinds}
    for figure in recorded.values():
        assert figure["value"] == figure["ours"] / figure["peer"]
        assert len(figure["runs"]) == 2
        assert min(figure["ours"], figure["peer"]) > 0
