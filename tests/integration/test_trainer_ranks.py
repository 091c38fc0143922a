"""A step on two ranks is the step of one process: weights, metrics, refusals, checkpoints, exports."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.rank_jobs import (
    DISTILL,
    STEPS,
    Job,
    Result,
    groups_of,
    make_learner,
    run_alone,
    run_together,
    save_models,
)
from transformers import AutoModelForCausalLM

from student_trainer.checkpoint import CheckpointStore, find_damage
from student_trainer.sections import LoraSettings

JOBS = [
    Job("full weights", ema=True),
    Job("tied head", model="tied", ema=True),
    Job("adapters", lora=LoraSettings(rank=3), ema=True),  # of an odd rank: shards of two rows and of one
    Job("adapters of rank one", lora=LoraSettings(rank=1)),  # the second rank holds no row of them
    Job("experts", model="moe", groups=2),
    Job("reward", objective={"preset": "grpo"}),
    Job("many uneven micro-batches", micro_batch_tokens=20, groups=3, lengths=(2, 9, 5)),
    Job("a rank without rows", groups=1, lengths=(7,)),
    Job(
        "several updates, a gate",
        objective={
            "mix": "add",
            "gate": {},
            "correction": {"kind": "ppo"},
            "weights": {"rollout_cap": 5.0},
        },
        updates=3,
        distill_open=True,
    ),
]
CONSISTENT = {"kind": "consistency", "context": {"user": "again: {prompt}"}, "missing": "same"}
JOBS.append(Job("a second context of some responses", objective={"auxiliary": CONSISTENT}, groups=3))
PAIRS = {
    "preference": {},
    "normalisation": "sequence_mean",
    "views": {"taught": {"weights": "teacher:big", "context": {"user": "{prompt} {solution}"}}},
}
JOBS.append(Job("pairs of responses", objective=PAIRS, groups=3, lengths=(2, 9, 5, 4), micro_batch_tokens=50))
JOBS.append(
    Job("pairs, several updates", objective=PAIRS, lengths=(2, 9, 5), micro_batch_tokens=30, updates=2)
)
AUDITED = {
    "audit": {"teacher": "writer", "chunks": 2, "chunk_tokens": 2, "continuations": 3},
    "mix": "route",
    "distill_coefficient": 0.5,
    **DISTILL,
}
JOBS.append(Job("audited chunks", objective=AUDITED, groups=3, lengths=(2, 9, 5, 1), micro_batch_tokens=20))
JOBS.append(
    Job(
        "audited chunks, several updates", objective=AUDITED, lengths=(2, 9), micro_batch_tokens=30, updates=2
    )
)
REFUSED = [
    *(Job(f"diverged on rank {i % 2}, group {i}", poisoned=i, groups=2) for i in (0, 1)),
    Job("infinite gradient on the second rank", infinite_rank=1, groups=2),
]
DROPOUT = Job("dropout", lora=LoraSettings(rank=4, dropout=0.3))
REPEATED = [
    Job("full weights, again"),
    DROPOUT,
    replace(DROPOUT, name="dropout, of twice as many steps", steps=2 * STEPS),
]
HALF = Job("bfloat16", dtype="bfloat16")
HALF_ADAPTERS = Job("bfloat16 adapters", dtype="bfloat16", lora=LoraSettings(rank=4))

Alone = Callable[[Job], Result]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    root, done = tmp_path_factory.mktemp("alone"), {}

    def run(job: Job) -> Result:
        if job.name not in done:
            done[job.name] = run_alone(job, models, root / job.name)
        return done[job.name]

    return run


@pytest.fixture(scope="module")
def together(models: Path, alone: Alone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    jobs = [*JOBS, *REFUSED, *REPEATED, HALF, HALF_ADAPTERS]
    resumed = [
        replace(job, name=f"{job.name}, resumed", checkpoint=alone(job).checkpoint())
        for job in (JOBS[0], JOBS[2])
    ]
    out = tmp_path_factory.mktemp("together")
    saved = out / "dropout" / "checkpoints" / f"step-{STEPS:08d}"
    resumed.append(replace(DROPOUT, name="dropout, resumed", checkpoint=saved, first=STEPS))
    return run_together([*jobs, *resumed], models, out)


def assert_same_figures(got: Result, expected: Result, rel: float = 1e-5) -> None:
    pairs = list(zip(got.figures(), expected.figures(), strict=True))
    assert len(pairs) == STEPS
    for one, other in pairs:
        assert one["refused"] == other["refused"]
        assert one["learning_rate"] == other["learning_rate"]
        for name in ("loss", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=rel, abs=rel, nan_ok=True), name
        assert one["sums"].keys() == other["sums"].keys()
        for name, total in other["sums"].items():
            assert one["sums"][name] == pytest.approx(total, rel=rel, abs=rel), name


def assert_same_weights(
    got: Result, expected: Result, atol: float = 1e-5, directory: str = "student"
) -> None:
    one, other = got.weights(directory), expected.weights(directory)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_two_ranks_make_the_steps_of_one_process(job: Job, together: dict[str, Result], alone: Alone) -> None:
    got, expected = together[job.name], alone(job)
    assert_same_figures(got, expected)
    assert_same_weights(got, expected)
    if job.lora is not None:
        assert_same_weights(got, expected, directory="adapter")
    if job.ema:
        assert_same_weights(got, expected, directory="ema")
        assert any(
            not torch.equal(tensor, got.weights()[name]) for name, tensor in got.weights("ema").items()
        )
    for step in range(STEPS):
        torch.testing.assert_close(got.traces(step), expected.traces(step), rtol=0, atol=1e-4)


def test_work_is_cut_so_that_every_rank_has_some(together: dict[str, Result], alone: Alone) -> None:
    assert {step["micro_batches"] for step in alone(JOBS[0]).figures()} == {1}
    assert {step["micro_batches"] for step in together[JOBS[0].name].figures()} == {2}
    assert {step["micro_batches"] for step in together["a rank without rows"].figures()} == {1}
    uneven = {step["micro_batches"] for step in together["many uneven micro-batches"].figures()}
    assert any(number % 2 for number in uneven)


def test_the_same_ranks_make_the_same_steps_bit_by_bit(together: dict[str, Result]) -> None:
    once, again = together["full weights"], together["full weights, again"]
    assert once.figures() == again.figures()
    assert all(torch.equal(tensor, again.weights()[name]) for name, tensor in once.weights().items())


def test_random_numbers_of_every_rank_go_on_where_the_checkpoint_left_them(
    together: dict[str, Result],
) -> None:
    whole = together["dropout, of twice as many steps"]
    assert whole.figures()[:STEPS] == together["dropout"].figures()
    resumed = together["dropout, resumed"]
    assert resumed.figures() == whole.figures()[STEPS:]
    assert all(torch.equal(tensor, resumed.weights()[name]) for name, tensor in whole.weights().items())


@pytest.mark.parametrize("job", REFUSED, ids=lambda job: job.name)
def test_all_ranks_refuse_a_step_that_one_cannot_take(
    job: Job, together: dict[str, Result], alone: Alone
) -> None:
    got, expected = together[job.name], alone(job)
    refused = [step["refused"] for step in got.figures()]
    assert [reason is None for reason in refused] == [True, False, True]
    assert refused[1][1] is True
    assert not math.isfinite(got.figures()[1]["gradient_norm"])
    assert_same_figures(got, expected)
    assert_same_weights(got, expected)  # that of the step after it too


@pytest.mark.parametrize("job", [HALF, HALF_ADAPTERS], ids=lambda job: job.name)
def test_bfloat16_differs_by_its_rounding_only(job: Job, together: dict[str, Result], alone: Alone) -> None:
    assert_same_figures(together[job.name], alone(job), rel=0.05)
    got, expected = together[job.name].weights(), alone(job).weights()
    for name, tensor in expected.items():
        assert got[name].dtype == torch.bfloat16, name
        torch.testing.assert_close(got[name], tensor, rtol=0.02, atol=5e-3)


@pytest.mark.parametrize("job", [JOBS[0], JOBS[1], JOBS[2], JOBS[3]], ids=lambda job: job.name)
def test_one_process_continues_from_what_two_ranks_saved(
    job: Job, together: dict[str, Result], alone: Alone, models: Path
) -> None:
    path = together[job.name].checkpoint()
    assert find_damage(path) is None
    assert {file.name for file in path.glob("shard-*")} == {
        f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)
    }
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}, "something was pickled"
    losses = []
    for saved in (path, alone(job).checkpoint()):
        learner = make_learner(job, models)
        found, _ = CheckpointStore(saved.parent).newest()
        assert found is not None
        learner.load(found)
        losses.append(learner.step(groups_of(job, STEPS), STEPS).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("job", [JOBS[0], JOBS[2]], ids=lambda job: job.name)
def test_two_ranks_continue_from_what_one_process_saved(
    job: Job, together: dict[str, Result], alone: Alone, models: Path, tmp_path: Path
) -> None:
    resumed = replace(job, name="resumed", checkpoint=alone(job).checkpoint())
    expected = run_alone(resumed, models, tmp_path / "resumed")
    got = together[f"{job.name}, resumed"]
    assert_same_figures(got, expected)
    assert_same_weights(got, expected)
    assert_same_weights(got, expected, directory="ema")


def test_exports_of_two_ranks_are_loaded_by_transformers(together: dict[str, Result]) -> None:
    for name in ("full weights", "tied head", "adapters"):
        directory = together[name].out / "student"
        model, info = AutoModelForCausalLM.from_pretrained(str(directory), output_loading_info=True)
        assert not info["missing_keys"], name
        assert not info["unexpected_keys"], name
        assert type(model).__name__ == "Qwen3ForCausalLM"
