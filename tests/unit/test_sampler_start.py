"""A sampler that loads policy versions while a resumed trainer throws them away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tutelage.v1.rollout_pb2 import SampleOrder
from tutelage_client.errors import invalid

from student_trainer.policy_store import PolicyStore, PolicyVersion
from student_trainer.sampler import process
from student_trainer.sampler.policy import StudentPolicy


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


def order(version: int, *, exact: bool) -> SampleOrder:
    return SampleOrder(id="order", policy_version=version, exact=exact)


def test_weights_that_were_loaded_half_way_are_loaded_again_before_they_sample(tmp_path: Path) -> None:
    """An exact order may ask again for the version that was there before the failure."""
    store = PolicyStore(tmp_path / "policy")
    for version in (1, 2):
        publish(store, version)
    loaded: list[str] = []

    def load(directory: Path) -> None:
        loaded.append(directory.name)
        if directory.name.endswith("2"):
            store.discard_above(1)
            raise RuntimeError("the second of two files is gone")

    first = store.get(1)
    assert first is not None
    policy = StudentPolicy(store, first, [load])
    assert policy.ready(order(1, exact=True))
    assert loaded == [], "they are there"
    assert not policy.ready(order(2, exact=True))
    assert policy.ready(order(1, exact=True))
    assert (loaded, policy.version) == (["v00000002", "v00000001"], 1)


def test_a_version_that_is_there_and_cannot_be_read_ends_the_order(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "policy")
    publish(store, 1)
    first = store.latest()
    assert first is not None
    publish(store, 2)

    def load(directory: Path) -> None:
        raise RuntimeError(f"{directory.name} is not readable")

    with pytest.raises(RuntimeError, match="v00000002 is not readable"):
        StudentPolicy(store, first, [load]).ready(order(2, exact=False))


def test_every_model_of_a_sampler_follows_the_store(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "policy")
    publish(store, 1)
    first = store.latest()
    assert first is not None
    publish(store, 2)
    loaded: list[tuple[str, str]] = []
    policy = StudentPolicy(
        store,
        first,
        [lambda path: loaded.append(("a", path.name)), lambda path: loaded.append(("b", path.name))],
    )
    assert policy.ready(order(0, exact=False))
    assert policy.ready(order(0, exact=False))
    assert loaded == [("a", "v00000002"), ("b", "v00000002")]
    assert policy.version == 2
