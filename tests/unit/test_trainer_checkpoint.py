"""Checkpoints, policy versions and the ledger on disk."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tutelage.v1.rollout_pb2 import SampleOrder

from student_trainer.checkpoint import Checkpoint, CheckpointStore, find_damage, load_tensors
from student_trainer.durable import remove_directory
from student_trainer.index_set import IndexSet
from student_trainer.ledger import Ledger, TeacherPin
from student_trainer.lineage import continued, updates_between
from student_trainer.policy_store import PolicyStore, PolicyVersion
from student_trainer.sampler.policy import find_version


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.full((5, 3), value),
        "model.half": torch.full((4,), value, dtype=torch.bfloat16),
        "optimizer.weight.step": torch.tensor(value),
        "random.cpu": torch.get_rng_state(),
    }


def saved(directory: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(directory)
    for step in steps:
        store.save(tensors(float(step)), Ledger(settings={}, step=step))
    return store


def test_tensors_come_back_in_place_and_bitwise(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    parameter = torch.nn.Parameter(torch.randn(7, 2))
    before = parameter.detach().clone()
    store.save({"model.p": parameter.detach()}, Ledger(settings={}, step=1))
    with torch.no_grad():
        parameter.zero_()
    found, damaged = store.newest()
    assert found is not None
    assert not damaged
    load_tensors(found, {"model.p": parameter.detach()})
    assert torch.equal(parameter, before)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    names = {path.name for path in (tmp_path / "step-00000001").iterdir()}
    assert {name.rsplit(".", 1)[-1] for name in names} == {"json", "safetensors"}


def test_ledger_comes_back_whole(tmp_path: Path) -> None:
    ledger = Ledger(settings={"run.seed": 3}, step=4, replacements=2, tokens_sampled=17, seconds=1.5)
    for index in (0, 1, 2, 5):
        ledger.applied.add(index)
    ledger.drop(3, "stale")
    ledger.pins["teacher"] = TeacherPin("m", "r", 0, "f")
    ledger.pending_evaluations.append(4)
    CheckpointStore(tmp_path).save(tensors(0.0), ledger)
    found, _ = CheckpointStore(tmp_path).newest()
    assert found is not None
    assert found.ledger.to_json() == ledger.to_json()
    assert found.ledger.pins == ledger.pins
    assert found.ledger.knows(3)
    assert found.ledger.knows(5)
    assert not found.ledger.knows(4)


def damage_truncate(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])


def damage_flip(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def damage_missing(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def damage_ledger(path: Path) -> None:
    (path / "ledger.json").write_text("{}")


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def damage_half_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_flip, damage_missing, damage_ledger, damage_manifest, damage_half_manifest],
)
def test_damaged_checkpoint_is_passed_over_and_reported(tmp_path: Path, damage: object) -> None:
    store = saved(tmp_path, 10, 20)
    assert callable(damage)
    damage(tmp_path / "step-00000020")
    found, damaged = store.newest()
    assert found is not None
    assert found.ledger.step == 10
    assert [skipped.path.name for skipped in damaged] == ["step-00000020"]
    assert damaged[0].reason


def test_leftovers_of_a_killed_save_are_swept(tmp_path: Path) -> None:
    store = saved(tmp_path, 10)
    (tmp_path / ".step-00000020.abc.tmp").mkdir()
    (tmp_path / ".step-00000005.abc.trash").mkdir()
    found, damaged = store.newest()
    assert found is not None
    assert not damaged
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    store = saved(tmp_path, 10)
    with pytest.raises(TypeError):
        store.save(tensors(1.0), Ledger(settings={"unserialisable": object()}, step=20))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    found = Checkpoint(tmp_path / "step-00000001", Ledger(settings={}))
    wanted = tensors(0.0) | {"model.weight": torch.zeros(5, 4), "model.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"2 tensors differ .*model.extra.*model.weight: \(5, 3\) saved"):
        load_tensors(found, wanted)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, 3, 4)
    store.prune(2)
    assert store.steps() == [3, 4]
    assert find_damage(tmp_path / "step-00000004") is None


# Policy versions.


def write_weights(value: str) -> object:
    def write(directory: Path) -> None:
        for part in range(20):
            (directory / f"part-{part}").write_text(value)

    return write


def publish(store: PolicyStore, version: int, value: str) -> PolicyVersion:
    write = write_weights(value)
    assert callable(write)
    return store.publish(version, write)


def test_reader_sees_whole_versions_only(tmp_path: Path) -> None:
    """A reader that polls while versions appear, are replaced and deleted never sees a mixture."""
    store = PolicyStore(tmp_path / "policy")
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            latest = store.latest()
            if latest is None:
                continue
            try:
                parts = {(latest.path / f"part-{part}").read_text() for part in range(20)}
            except FileNotFoundError:
                continue  # deleted while it was read: the reader asks again
            if store.get(latest.version) == latest:
                assert len(parts) == 1, parts
                seen.add(latest.version)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for version in range(60):
            publish(store, version, f"first {version}")
            publish(store, version, f"second {version}")
            store.prune(version - 1)
    finally:
        stop.set()
        reader.join()
    assert len(seen) > 5


def test_failed_publication_is_invisible(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "policy")
    publish(store, 0, "a")

    def fail(directory: Path) -> None:
        (directory / "part-0").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.publish(1, fail)
    assert store.versions() == [0]
    assert [path.name for path in store.directory.iterdir()] == ["v00000000"]


def test_pruning_keeps_the_newest_and_the_pinned(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "policy")
    for version in range(6):
        publish(store, version, "x")
    store.prune(oldest=99, pinned=[2])
    assert store.versions() == [2, 5]


def test_versions_after_a_resumed_checkpoint_are_discarded(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "policy")
    for version in range(4):
        publish(store, version, "x")
    (store.directory / ".v00000004.abc.tmp").mkdir()
    store.discard_above(1)
    assert sorted(path.name for path in store.directory.iterdir()) == ["v00000000", "v00000001"]
    latest = store.latest()
    assert latest is not None
    assert latest.version == 1


def test_version_that_is_discarded_is_never_taken_for_one_that_is_gone_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler that looks between two deletions waits for the version instead of giving up its order."""
    store = PolicyStore(tmp_path / "policy")
    for version in range(4):
        publish(store, version, "x")
    looks = []

    def remove_and_look(path: Path) -> None:
        remove_directory(path)
        looks.append(find_version(store, SampleOrder(id="o", policy_version=2, exact=True)))

    monkeypatch.setattr("student_trainer.policy_store.remove_directory", remove_and_look)
    store.discard_above(1)
    assert [None if look is None else look.version for look in looks] == [2, None]


def test_republished_version_has_another_stamp(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "policy")
    first = publish(store, 0, "a")
    second = publish(store, 0, "b")
    assert first.stamp != second.stamp
    assert store.get(0) == second
    assert json.loads((second.path / "policy.json").read_text())["version"] == 0


def test_store_without_a_version_is_empty(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "absent")
    assert store.versions() == []
    assert store.latest() is None


# Lineages.


def test_updates_are_counted_through_the_last_common_weights() -> None:
    killed = continued((), 0)
    resumed = continued(killed, 50)
    again = continued(resumed, 60)
    other = continued(killed, 50)  # died before it saved anything
    assert updates_between(resumed, 79, killed, 78) == 29 + 28
    assert updates_between(resumed, 52, killed, 50) == 2
    assert updates_between(resumed, 52, killed, 48) == 4
    assert updates_between(resumed, 50, killed, 53) == 3
    assert updates_between(resumed, 79, resumed, 78) == 1
    assert updates_between(again, 62, resumed, 60) == 2
    assert updates_between(again, 62, resumed, 61) == 2 + 1
    assert updates_between(again, 62, killed, 61) == 12 + 11
    assert updates_between(again, 62, other, 61) == 12 + 11
    assert updates_between(again, 62, continued((), 0), 61) == 62 + 61


def test_each_resumption_begins_a_stretch_that_checkpoints_and_policies_carry(tmp_path: Path) -> None:
    lineage = continued(continued((), 0), 50)
    CheckpointStore(tmp_path / "checkpoints").save(
        tensors(0.0), Ledger(settings={}, step=60, lineage=lineage)
    )
    found, _ = CheckpointStore(tmp_path / "checkpoints").newest()
    assert found is not None
    assert found.ledger.lineage == lineage
    store = PolicyStore(tmp_path / "policy")
    published = store.publish(60, lambda directory: None, lineage=lineage)
    assert published.lineage == lineage
    assert store.get(60) == published


# Index sets.


@given(st.lists(st.integers(0, 60), unique=True))
@settings(max_examples=200)
def test_index_set_agrees_with_a_set(indices: list[int]) -> None:
    compact = IndexSet()
    for index in indices:
        assert index not in compact
        compact.add(index)
    assert [i for i in range(62) if i in compact] == sorted(indices)
    assert len(compact) == len(indices)
    again = IndexSet(compact.intervals())
    assert again.intervals() == compact.intervals()
    assert all(start < end for start, end in compact.intervals())
    ends = [end for _, end in compact.intervals()]
    assert all(end < start for end, (start, _) in zip(ends, compact.intervals()[1:], strict=False))


def test_index_cannot_be_added_twice() -> None:
    indices = IndexSet([[0, 3]])
    with pytest.raises(ValueError, match="already"):
        indices.add(2)


@pytest.mark.parametrize("intervals", [[[3, 3]], [[0, 2], [2, 4]], [[4, 5], [0, 1]]])
def test_intervals_that_are_not_sorted_and_disjoint_are_refused(intervals: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="interval"):
        IndexSet(intervals)
