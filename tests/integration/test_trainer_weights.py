"""Injected scores of weights that must not be trained on: each is refused, counted and replaced."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest
from support.training_groups import IDENTITY, RUN, make_group, make_scores
from tutelage.v1.rollout_pb2 import ViewRequest
from tutelage.v1.teacher_pb2 import Context
from tutelage_client.codec import score_to_proto, signal_to_proto
from tutelage_client.errors import TutelageError

from services.queue import Queue
from student_trainer.channels import channels_of
from student_trainer.collect import Collector
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.ledger import Ledger
from student_trainer.lineage import Lineage, Stretch, to_proto
from student_trainer.pacing import REPLACEMENTS_FROM, Pacer
from student_trainer.sampler.pins import TeacherPins
from student_trainer.verify import Expectations, TrainingGroup
from student_trainer.waiting import Watch

pytest_plugins = ["support.queue_server"]

STEP = 5
KNOWN = {3: "three", 4: "four", 5: "five"}
LINEAGE = (Stretch("first", 0), Stretch("second", 4))
SCORED_BY: dict[str, tuple[int, str]] = {
    "the newest": (5, "five"),
    "one behind": (4, "four"),
    "a version still to come": (6, "six"),
    "a version of a trainer that was killed": (5, "five of before"),
    "the number of one publication and the stamp of another": (5, "four"),
    "weights without a stamp": (5, ""),
    "a version from before this run": (0, ""),
    "weights two updates old": (3, "three"),
}
RIGHT = ["the newest", "one behind"]


def make_config(weights: str = "ema", *, deterministic: bool = False, **objective: object) -> RunConfig:
    return parse_run_config(
        {
            "run": {"name": RUN, "deterministic": deterministic},
            "student": {"model": "unused"},
            "data": {"task": "addition"},
            "objective": {"views": {"self": {"weights": weights}}, **objective},
            "training": {"steps": 12, "prompts_per_step": len(RIGHT), "max_staleness": 1},
        }
    )


@dataclass
class Trained:
    """A trainer at step 5 that knows three publications of its average, and a teacher that the test plays."""

    queue: Queue
    config: RunConfig
    lineage: Lineage = LINEAGE
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plan = self.config.plan()
        self.channels = channels_of(self.plan, RUN)
        (self.teacher,) = self.channels
        published = {channel: dict(KNOWN) for channel in ("ema", "live")} | {"initial": {0: "zero"}}
        self.ledger = Ledger(settings={}, step=STEP, lineage=self.lineage, publications=published)
        # Through its checkpoint: numbers stay numbers.
        self.ledger = Ledger.from_json(self.ledger.to_json())
        self.collector = Collector(
            config=self.config,
            reader=self.queue.scored(RUN),
            pacer=Pacer(self.queue, self.config, self.ledger),
            watch=Watch(self.queue, RUN, []),
            ledger=self.ledger,
            expected=Expectations(
                RUN, self.plan, 1.0, 32, IDENTITY.tokenizer_fingerprint, channels=self.channels
            ),
            stop=asyncio.Event(),
        )

    async def score(self, index: int, version: int, stamp: str, sampled_by: int = STEP) -> None:
        """A group whose only view was scored by these weights."""
        _, signal = self.plan.view_requests["self"]
        group = make_group(index, self.plan, version=sampled_by)
        group.lineage.extend(to_proto(self.lineage))
        request = ViewRequest(
            view="self",
            teacher=self.teacher,
            signal=signal_to_proto(signal),
            contexts=[Context(ids=group.prompt_ids)],
        )
        await self.queue.submit_group(group, [request])
        identity = replace(IDENTITY, name=self.teacher, weights_version=version, weights_id=stamp)
        scores = score_to_proto(make_scores(group, self.plan, "self", identity))
        async with self.queue.jobs(self.teacher, "t") as worker:
            (claim,) = await worker.claim(1, 5_000)
            assert await worker.commit(claim, scores.SerializeToString())

    async def collect(self) -> list[TrainingGroup]:
        async def show(status: str) -> None:
            self.said.append(status)

        groups = await asyncio.wait_for(self.collector.collect(show), 20)
        assert groups is not None
        return groups


async def test_wrong_unknown_and_old_weights_are_refused_counted_and_replaced(queue: Queue) -> None:
    trained = Trained(queue, make_config())
    names = sorted(SCORED_BY, key=lambda name: name in RIGHT)  # the wrong ones come first
    for index, name in enumerate(names):
        await trained.score(index, *SCORED_BY[name])
    groups = await trained.collect()
    assert sorted(names[group.index] for group in groups) == sorted(RIGHT)
    wrong = len(SCORED_BY) - len(RIGHT)
    assert trained.ledger.drop_counts == {"weights": wrong}
    assert trained.ledger.replacements == wrong
    ordered = 0
    async with queue.orders(RUN, "s") as worker:
        while claims := await worker.claim(8, 100):
            ordered += sum(claim.order.num_groups for claim in claims)
    assert ordered == wrong


async def test_what_was_on_its_way_at_a_resumption_does_not_end_the_run_but_what_is_ordered_since_does(
    queue: Queue,
) -> None:
    queue._max_queued_tokens = 10_000
    trained = Trained(queue, make_config())
    wrong = SCORED_BY["a version of a trainer that was killed"]
    for index in range(20):
        await trained.score(index, *wrong)
    for index in (20, 21):
        await trained.score(index, *SCORED_BY["the newest"])
    assert {group.index for group in await trained.collect()} == {20, 21}
    assert trained.ledger.drop_counts == {"weights": 20}
    for index in range(8):
        await trained.score(REPLACEMENTS_FROM + index, *wrong)
    with pytest.raises(TutelageError, match=r"8 groups in a row were refused, the last one \(weights\)"):
        await trained.collect()


@pytest.mark.parametrize("allowed", [0, 2])
async def test_the_lag_that_is_allowed_is_a_setting(queue: Queue, allowed: int) -> None:
    trained = Trained(queue, make_config(max_lag=allowed))
    for index, (version, stamp) in enumerate([*KNOWN.items(), (5, "five")]):
        await trained.score(index, version, stamp)
    groups = await trained.collect()
    assert [group.scored_by["self"].weights_version for group in groups] == (
        [5, 5] if not allowed else [3, 4]
    )


async def test_weights_that_grew_too_old_are_no_sign_that_something_is_wrong(queue: Queue) -> None:
    """With max_lag below max_staleness all groups that were ordered ahead are refused, step after step."""
    queue._max_queued_tokens = 10_000
    trained = Trained(queue, make_config(max_lag=0), lineage=LINEAGE[:1])  # never resumed
    for index in range(20):
        await trained.score(index, 4, "four", sampled_by=4)
    for index in (20, 21):
        await trained.score(index, 5, "five")
    assert {group.index for group in await trained.collect()} == {20, 21}
    assert trained.ledger.drop_counts == {"weights": 20}
    for index in range(30, 38):
        await trained.score(index, *SCORED_BY["a version of a trainer that was killed"])
    with pytest.raises(TutelageError, match="8 groups in a row were refused"):
        await trained.collect()


async def test_initial_weights_do_not_age_but_must_be_those_of_this_run(queue: Queue) -> None:
    trained = Trained(queue, make_config("initial"))
    for index, stamp in enumerate(["zero", "one", "zero"]):
        await trained.score(index, 0, stamp)
    assert {group.index for group in await trained.collect()} == {0, 2}
    assert trained.ledger.drop_counts == {"weights": 1}


async def test_a_deterministic_run_takes_the_weights_that_sampled_and_ends_with_any_others(
    queue: Queue,
) -> None:
    trained = Trained(queue, make_config("live", deterministic=True))
    first = len(RIGHT) * STEP
    for index in (first, first + 1):
        await trained.score(index, 4, "four", sampled_by=4)
    assert [group.index for group in await trained.collect()] == [first, first + 1]
    # Of the next step; what it may be scored by is known only once this one has been published.
    await trained.score(first + 2, 5, "five of before", sampled_by=5)
    trained.ledger.applied.add(first)
    trained.ledger.applied.add(first + 1)
    trained.ledger.step = STEP + 1
    with pytest.raises(TutelageError, match=r"group run-12 cannot be trained \(weights\): .* knows 'five'"):
        await trained.collect()


async def test_a_deterministic_run_does_not_take_newer_weights_than_those_that_sampled(queue: Queue) -> None:
    trained = Trained(queue, make_config("live", deterministic=True))
    await trained.score(len(RIGHT) * STEP, 5, "five", sampled_by=4)
    with pytest.raises(TutelageError, match=r"\(weights\): .* live version 5 .* needs exactly 4"):
        await trained.collect()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (make_config(), {"min_weights_version": 7}),
        (make_config(max_lag=3), {"min_weights_version": 5}),
        (make_config("live", max_lag=0), {"min_weights_version": 7}),
        (make_config(deterministic=True), {"weights_version": 7}),
        (make_config("initial", deterministic=True), {}),
    ],
)
def test_jobs_pin_the_weights_that_they_may_be_scored_with(
    config: RunConfig, expected: dict[str, int]
) -> None:
    plan = config.plan()
    (teacher,) = channels_of(plan, RUN)
    pins = TeacherPins(config, plan, "f" * 64).of(teacher, 7)
    found = {descriptor.name: value for descriptor, value in pins.ListFields()}
    assert found == {"tokenizer_fingerprint": "f" * 64, **expected}
