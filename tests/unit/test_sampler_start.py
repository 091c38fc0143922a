"""A sampler that starts while a resumed trainer throws policy versions away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tutelage_client.errors import invalid

from student_trainer.policy_store import PolicyStore, PolicyVersion
from student_trainer.sampler import process


def publish(store: PolicyStore, version: int) -> None:
    store.publish(version, lambda directory: (directory / "weights").touch(), lineage=())


async def test_a_version_that_vanishes_while_it_is_loaded_is_replaced_by_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PolicyStore(tmp_path / "policy")
    for version in (1, 2):
        publish(store, version)

    def build(_config: Any, first: PolicyVersion) -> int:
        if first.version == 2:
            store.discard_above(1)
            raise invalid("model: could not load")
        return first.version

    monkeypatch.setattr(process, "build_sampler", build)
    config: Any = SimpleNamespace(run=SimpleNamespace(directory=tmp_path))
    assert await process._build(config, asyncio.Event()) == 1


async def test_a_version_that_is_there_and_cannot_be_loaded_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(PolicyStore(tmp_path / "policy"), 1)

    def build(_config: Any, _first: PolicyVersion) -> int:
        raise invalid("model: could not load")

    monkeypatch.setattr(process, "build_sampler", build)
    config: Any = SimpleNamespace(run=SimpleNamespace(directory=tmp_path))
    with pytest.raises(Exception, match="could not load"):
        await process._build(config, asyncio.Event())
