"""Pairs of responses (PBSD): loss, gradient and optimum are the formula's, however a step is cut."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tabular import make_plan, random_logits
from support.training_groups import VOCAB, make_expectations, make_group, make_scores, scored
from support.training_run import write_model
from torch import Tensor

from student_trainer.batch import MicroBatch, deal, idle_batch, pack_step
from student_trainer.exchange import decode_micro_batches, encode_micro_batches
from student_trainer.learner import Learner
from student_trainer.ledger import Ledger
from student_trainer.metrics import step_record
from student_trainer.objective.batch import LossOutput, TokenBatch, ViewTensors
from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.loss import objective_loss
from student_trainer.objective.settings import ObjectiveError, ObjectiveSettings
from student_trainer.samples import write_samples
from student_trainer.sections import StudentSettings, TrainingSettings
from student_trainer.step_result import StepResult
from student_trainer.student import load_student
from student_trainer.verify import TrainingGroup, verify_group

BETA = 0.7
VIEW = {"weights": "teacher:big", "context": {"user": "{prompt} {solution}"}}
ROW: dict[str, Any] = {
    "preference": {"scale": BETA},
    "normalisation": "sequence_mean",
    "views": {"taught": VIEW},
}


def plan_of(**settings: Any) -> Plan:
    return make_plan(("big",), **{**ROW, **settings})


PLAN = plan_of()


# The formula of a step, from the groups as they were verified.


def dpo(pairs_of: list[tuple[list[Tensor], list[Tensor]]], beta: float = BETA) -> Tensor:
    """Mean over groups of the mean over pairs of −log σ(β·(h⁺ − h⁻)); a group is (all h⁺, all h⁻)."""
    losses = [
        torch.stack(
            [torch.log1p(torch.exp(-beta * (good - bad))) for good, bad in itertools.product(*group)]
        ).mean()
        for group in pairs_of
    ]
    return torch.stack(losses).mean()


class Features:
    """A student without a body: the hidden row of a position is a row of a table, by its own token."""

    def __init__(self) -> None:
        self.table = random_logits(VOCAB, 21, 6).requires_grad_()
        self.head = random_logits(VOCAB, 22, 6)

    def logprobs(self, ids: Tensor) -> Tensor:
        rows = (self.table[ids] @ self.head.T).log_softmax(-1)
        return rows.gather(1, ids[:, None])[:, 0]

    def loss(self, tokens: TokenBatch, plan: Plan = PLAN) -> LossOutput:
        return objective_loss(self.table[tokens.sampled_ids], self.head, None, tokens, plan, chunk_rows=5)

    def step(self, batches: list[MicroBatch], plan: Plan = PLAN) -> tuple[float, Tensor, dict[str, float]]:
        """Loss, gradient and sums of all micro-batches."""
        self.table.grad, total, sums = None, 0.0, dict[str, float]()
        for batch in batches:
            output = self.loss(batch.tokens, plan)
            output.loss.backward()
            total += float(output.loss.detach())
            sums = {name: sums.get(name, 0.0) + value for name, value in output.metrics.items()}
        assert self.table.grad is not None
        return total, self.table.grad.clone(), sums

    def written_out(self, groups: list[TrainingGroup], first: int | None = None) -> tuple[float, Tensor]:
        """The formula's loss and gradient; `first` tokens of a response only."""
        self.table.grad, pairs = None, []
        for group in groups:
            kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
            for rollout in group.rollouts:
                own = self.logprobs(torch.from_numpy(rollout.response_ids.astype(np.int64)))
                teacher = rollout.scores["taught"].sampled
                assert teacher is not None
                apart = (own - torch.from_numpy(teacher.astype(np.float64)))[:first].sum()
                kinds[0 if rollout.guided else 1].append(apart)
            pairs.append(kinds)
        loss = dpo(pairs)
        loss.backward()
        assert self.table.grad is not None
        return float(loss.detach()), self.table.grad.clone()


LENGTHS = [(2, 7, 3, 6), (5, 1, 4, 4), (3, 3, 8, 2), (6, 2, 2, 9), (1, 1, 5, 3)]
GUIDED = [(0, 1), (0,), (1, 3), (0, 1, 2), (2,)]


def group_of(
    index: int, lengths: tuple[int, ...], guided: tuple[int, ...], invalid: tuple[int, ...] = ()
) -> TrainingGroup:
    """Random scores; `invalid` responses have a position that the teacher could not score."""
    group = make_group(index, PLAN, lengths=lengths)
    group.sampled_by = "student@context" if guided else "student"
    for place, rollout in enumerate(group.rollouts):
        rollout.guided = place in guided
    scores = make_scores(group, PLAN, "taught")
    random, sequences = np.random.default_rng([index, 7]), []
    for place, sequence in enumerate(scores.sequences):
        sampled = random.uniform(-5, -1, lengths[place]).astype(np.float32)
        valid = np.ones(lengths[place], dtype=np.bool_)
        valid[-1] = place not in invalid
        sequences.append(replace(sequence, sampled=sampled, valid=valid))
    scores = replace(scores, sequences=tuple(sequences))
    return verify_group(scored(group, {"taught": scores}), make_expectations(PLAN), {})


def groups_of() -> list[TrainingGroup]:
    return [group_of(i, *how) for i, how in enumerate(zip(LENGTHS, GUIDED, strict=True))]


def assert_same(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    """Loss and gradient; float32 weights of a step are what they differ by."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("max_tokens", [10_000, 60, 1])
def test_loss_and_gradient_are_the_formulas_however_the_step_is_cut(max_tokens: int) -> None:
    groups, student = groups_of(), Features()
    batches = pack_step(groups, PLAN, max_tokens)
    assert (len(batches) == 1) == (max_tokens == 10_000)
    wanted = student.written_out(groups)
    assert wanted[1].abs().max() > 1e-3
    assert_same(student.step(batches), wanted)


def test_a_group_is_never_cut_and_one_that_is_too_large_is_alone() -> None:
    groups = groups_of()
    for max_tokens in (1, 30, 44, 60):
        batches = pack_step(groups, PLAN, max_tokens)
        inside = [{member.group.index for member in batch.members} for batch in batches]
        assert sorted(itertools.chain(*inside)) == list(range(len(groups))), "no group is in two"
        for batch, found in zip(batches, inside, strict=True):
            assert batch.layout.num_rows <= max_tokens or len(found) == 1


def test_order_of_a_groups_responses_changes_nothing() -> None:
    groups, student = groups_of(), Features()
    turned = [
        replace(group, rollouts=group.rollouts[::-1], places=group.places[::-1]) for group in groups[::-1]
    ]
    assert_same(student.step(pack_step(turned, PLAN, 60)), student.step(pack_step(groups, PLAN, 60)))


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_train_what_one_process_trains(world: int) -> None:
    groups, student = groups_of(), Features()
    whole = student.step(pack_step(groups, PLAN, 60))
    batches = pack_step(groups, PLAN, 60, shares=world)
    shares = [
        decode_micro_batches(encode_micro_batches([batches[number] for number in numbers]))
        for numbers in deal(batches, world)
    ]
    assert sum(len(share) for share in shares) == len(batches)
    dealt = student.step([batch for share in shares for batch in share])
    assert_same(dealt, whole)
    assert dealt[2] == pytest.approx(whole[2])
    idle = student.loss(idle_batch(batches[0]).tokens)
    assert (float(idle.loss.detach()), idle.metrics["positions"], idle.metrics["pairs"]) == (0.0, 0.0, 0.0)


def test_what_is_not_wholly_scored_is_in_no_pair_and_a_group_of_one_kind_is_counted() -> None:
    """The mean is over the groups that have pairs, of the responses that are left."""
    good = groups_of()[:2]
    partial = group_of(2, (3, 3, 8, 2), (0, 1), invalid=(0, 3))
    lost = [group_of(3, (2, 4), (0,), invalid=(1,)), group_of(4, (2, 4), (0, 1)), group_of(5, (2, 4), ())]
    student = Features()
    for max_tokens in (10_000, 25):
        found = student.step(pack_step([*good, lost[0], partial, *lost[1:]], PLAN, max_tokens))
        left = replace(partial, rollouts=partial.rollouts[1:3], places=(1, 2))
        assert_same(found, student.written_out([*good, left]))
        assert (found[2]["groups_unpaired"], found[2]["pairs"]) == (3, 4 + 3 + 1)
    assert pack_step(lost, PLAN, 10_000) == []


def test_a_score_that_is_no_number_takes_its_response_out_of_the_pairs() -> None:
    """It counts as zero in the mean, as everything that is only found out in the loss."""
    groups, student = groups_of()[:2], Features()
    (batch,) = pack_step(groups, PLAN, 10_000)
    sampled = batch.tokens.views["taught"].sampled
    assert sampled is not None
    spoiled = sampled.clone()
    spoiled[1], spoiled[18 + 5] = torch.nan, -torch.inf
    tokens = replace(batch.tokens, views={"taught": ViewTensors(sampled=spoiled)})
    found = student.step([replace(batch, tokens=tokens)])
    left = [replace(group, rollouts=group.rollouts[1:]) for group in groups[:1]]
    rest = [replace(groups[1], rollouts=tuple(groups[1].rollouts[i] for i in (0, 2, 3)))]
    assert_same(found, student.written_out([*left, *rest]))
    assert (found[2]["dropped_teacher"], found[2]["pairs"]) == (2 + 1, 2 + 2)
    everything = replace(
        batch.tokens, views={"taught": ViewTensors(sampled=torch.full_like(sampled, torch.nan))}
    )
    nothing = student.loss(everything)
    assert (float(nothing.loss.detach()), nothing.metrics["groups_unpaired"]) == (0.0, 2.0)


def test_beginnings_of_responses_are_compared_where_only_they_are_trained_on() -> None:
    plan, groups, student = plan_of(tokens={"keep_first_n": 3}), groups_of(), Features()
    assert_same(student.step(pack_step(groups, plan, 60), plan), student.written_out(groups, first=3))


def test_the_student_is_compared_as_it_is_and_not_as_it_sampled_or_as_the_step_began() -> None:
    groups, student = groups_of(), Features()
    (batch,) = pack_step(groups, PLAN, 10_000)
    assert not PLAN.uses_old
    other = random_logits(1, 3, len(batch.tokens.sampled_ids))[0]
    changed = replace(batch.tokens, behaviour_logprobs=other * torch.nan, old_logprobs=other)
    assert_same(student.step([replace(batch, tokens=changed)]), student.written_out(groups))


def test_coefficient_scales_loss_and_gradient() -> None:
    groups, student = groups_of(), Features()
    loss, gradient, _ = student.step(pack_step(groups, PLAN, 60))
    plan = plan_of(distill_coefficient=2.5)
    assert_same(student.step(pack_step(groups, plan, 60), plan), (2.5 * loss, 2.5 * gradient))


def test_a_small_step_along_it_raises_margins_and_against_it_lowers_them() -> None:
    """A sign that is wrong anywhere is found here without a formula."""
    groups, student = groups_of(), Features()
    batches = pack_step(groups, PLAN, 10_000)
    margins = []
    for rate in (0.0, 1e-2, -1e-2):
        _, gradient, sums = student.step(batches)
        moved = Features()
        with torch.no_grad():
            moved.table -= rate * gradient
        after, _, found = moved.step(batches)
        margins.append((found["preference_margin"] / sums["pairs"], after))
    (_, at), (up, lower), (down, higher) = margins
    assert lower < at < higher
    assert down < margins[0][0] < up


def test_metrics_are_means_over_pairs() -> None:
    groups, student = [*groups_of(), group_of(5, (2, 4), ())], Features()
    batches = pack_step(groups, PLAN, 60)
    loss, _, sums = student.step(batches)
    margins = []
    for group in groups:
        apart: dict[bool, list[float]] = {True: [], False: []}
        for rollout in group.rollouts:
            own = student.logprobs(torch.from_numpy(rollout.response_ids.astype(np.int64))).detach().numpy()
            apart[rollout.guided].append(float((own - rollout.scores["taught"].sampled).sum()))
        margins += [BETA * (good - bad) for good, bad in itertools.product(apart[True], apart[False])]
    result = StepResult(loss, 1.0, 1e-3, sums, tuple(batches), (), None)
    record = step_record(groups, result, Ledger(settings={}), {"train": 1.0}, {})
    assert (record["pairs"], record["groups_unpaired"]) == (len(margins), 1) == (4 + 3 + 4 + 3 + 3, 1)
    assert record["preference_margin"] == pytest.approx(np.mean(margins), rel=1e-5)
    assert record["preference_accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert 0 < record["preference_accuracy"] < 1
    assert "kl" not in record, "a mean over guided responses too is no estimate of it"


def test_a_learner_comes_to_prefer_what_is_guided_and_records_which_is(tmp_path: Path) -> None:
    """Real steps of a real model, over and over the same groups, two updates each."""
    student = load_student(StudentSettings(model=str(write_model(tmp_path / "model", seed=1)), device="cpu"))
    settings = TrainingSettings(
        steps=8, learning_rate=3e-3, warmup_steps=1, updates_per_step=2, micro_batch_tokens=60
    )
    learner, groups, records = Learner(student, PLAN, settings), groups_of(), []
    for step in range(8):
        result = learner.step(groups, step, traces=True)
        records.append(step_record(groups, result, Ledger(settings={}, step=step), {"train": 1.0}, {}))
        write_samples(tmp_path, step, result, student.tokenizer, max_groups=9)
    assert {record["pairs"] for record in records} == {4 + 3 + 4 + 3 + 3}
    assert records[-1]["preference_margin"] > records[0]["preference_margin"] + 1
    assert records[-1]["preference_accuracy"] == 1.0 > records[0]["preference_accuracy"]
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    with gzip.open(tmp_path / "step-00000007.jsonl.gz", "rt") as file:
        written = [json.loads(line) for line in file]
    told = [rollout["guided"] for rollout in written]
    assert told == [place in guided for guided in GUIDED for place in range(4)]


# The optimum, over every pair of sequences of a table of prefixes.

WORDS = 3  # token 0 ends a sequence, and so does the second
PREFIXES = [(), (1,), (2,)]
SEQUENCES = [(0,), *((first, last) for first in (1, 2) for last in range(WORDS))]


def sequence_logprobs(table: Tensor) -> Tensor:
    """[sequences], of a table of conditional log-probabilities."""
    rows = [[PREFIXES.index(sequence[:t]) for t in range(len(sequence))] for sequence in SEQUENCES]
    return torch.stack(
        [table[row, list(sequence)].sum() for row, sequence in zip(rows, SEQUENCES, strict=True)]
    )


def conditionals(log_sequence: Tensor) -> Tensor:
    """The table [prefixes, words] whose sequences have these probabilities."""
    table = torch.full((len(PREFIXES), WORDS), -torch.inf, dtype=torch.float64)
    for row, prefix in enumerate(PREFIXES):
        for word in range(WORDS):
            going = [i for i, s in enumerate(SEQUENCES) if s[: len(prefix) + 1] == (*prefix, word)]
            table[row, word] = log_sequence[going].logsumexp(0)
    return table.log_softmax(-1)


def population(plan: Plan, table: Tensor, log_q: Tensor, log_mu: Tensor) -> Tensor:
    """E over y⁺ ~ q, y⁻ ~ μ: every pair of sequences is a group with its probability for weight."""
    pairs = list(itertools.product(range(len(SEQUENCES)), repeat=2))
    order = [number for pair in pairs for number in pair]
    lengths = torch.tensor([len(SEQUENCES[number]) for number in order])
    rows = torch.tensor([PREFIXES.index(SEQUENCES[n][:t]) for n in order for t in range(len(SEQUENCES[n]))])
    sampled = torch.tensor([token for number in order for token in SEQUENCES[number]])
    of_q, of_mu = sequence_logprobs(log_q), sequence_logprobs(log_mu)
    chance = torch.stack([(of_q[good] + of_mu[bad]).exp() for good, bad in pairs])
    batch = TokenBatch(
        sampled_ids=sampled,
        behaviour_logprobs=torch.zeros(len(rows)),
        mask=torch.ones(len(rows), dtype=torch.bool),
        weight=chance.repeat_interleave(2).repeat_interleave(lengths),
        views={"taught": ViewTensors(sampled=log_q[rows, sampled])},
        sequence_lengths=lengths,
        groups=torch.arange(len(pairs)).repeat_interleave(2),
        guided=torch.tensor([True, False]).repeat(len(pairs)),
    )
    return objective_loss(table[rows], torch.eye(WORDS, dtype=torch.float64), None, batch, plan).loss


def slope(plan: Plan, table: Tensor, log_q: Tensor, log_mu: Tensor) -> Tensor:
    leaf = table.clone().requires_grad_()
    population(plan, leaf, log_q, log_mu).backward()
    assert leaf.grad is not None
    return leaf.grad


LOG_Q, LOG_MU = (random_logits(len(PREFIXES), seed, WORDS).log_softmax(-1) for seed in (31, 32))


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_against_a_fixed_policy_it_rests_where_log_p_over_q_is_the_reward_over_beta(beta: float) -> None:
    """π* ∝ q · exp(r/β) with r = log q − log μ: what an optimal classifier of the pairs believes."""
    plan = plan_of(preference={"scale": beta})
    reward = sequence_logprobs(LOG_Q) - sequence_logprobs(LOG_MU)
    best = conditionals((sequence_logprobs(LOG_Q) + reward / beta).log_softmax(0))
    scale = slope(plan, LOG_MU, LOG_Q, LOG_MU).norm()
    assert scale > 1e-2
    assert slope(plan, best, LOG_Q, LOG_MU).norm() < 1e-9
    for elsewhere in (LOG_Q, conditionals((sequence_logprobs(LOG_Q) - reward / beta).log_softmax(0))):
        assert slope(plan, elsewhere, LOG_Q, LOG_MU).norm() > 1e-2 * scale


def test_descent_from_the_policy_that_sampled_arrives_there() -> None:
    reward = sequence_logprobs(LOG_Q) - sequence_logprobs(LOG_MU)
    leaf = LOG_MU.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [leaf], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = population(PLAN, leaf, LOG_Q, LOG_MU)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = sequence_logprobs(leaf.detach().log_softmax(-1)) - sequence_logprobs(LOG_Q)
    wanted = reward / BETA
    torch.testing.assert_close(found - found.mean(), wanted - wanted.mean(), rtol=1e-4, atol=1e-4)


def test_on_policy_it_rests_at_the_view_and_nowhere_beside_it() -> None:
    assert slope(PLAN, LOG_Q, LOG_Q, LOG_Q).norm() < 1e-12
    assert slope(PLAN, LOG_MU, LOG_Q, LOG_MU).norm() > 1e-2


# What it goes with.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "pathwise", "support": "teacher_topk"}, 'estimator: got .pathwise. with preference'),
        ({"mix": "add"}, "mix: got 'add' with preference"),
        ({"correction": {"kind": "importance"}}, "correction: got 'importance' with preference"),
        ({"normalisation": "token_mean"}, "normalisation: got 'token_mean' with preference"),
        ({"horizon": 2}, "horizon: got 2 with preference"),
        ({"weights": {"rollout_cap": 2.0}}, r"weights: got \['rollout_cap'\] with preference"),
        ({"hidden": {"layers": [1]}}, "hidden: got 'one' with preference"),
        ({"tokens": {"skip_first_n": 1}}, r"tokens.skip_first_n: is set with preference"),
        ({"tokens": {"skip_ids": [3]}}, r"tokens.skip_ids: is set with preference"),
        ({"tokens": {"evidence_above": 0.0}}, r"tokens.evidence_above: is set with preference"),
        ({"tokens": {"reward_above": 0.0}}, r"tokens.reward_above: is set with preference"),
        ({"tokens": {"marked_only": True}}, r"tokens.marked_only: is set with preference"),
        ({"divergence": "jsd"}, "divergence: set to 'jsd', but it only acts with"),
        ({"log_ratio": "student"}, "log_ratio: set to 'student', but it only acts with"),
        ({"advantage_clip": 2.0}, "advantage_clip: set to 2.0, but it only acts with"),
        ({"views": {"taught": {**VIEW, "coefficient": 0.5}}}, r"views: got coefficients \{taught: 0.5\}"),
        ({"views": {"taught": VIEW, "other": VIEW}}, r"views: got coefficients \{taught: 1.0, other: 1.0\}"),
        ({"views": {"taught": {"weights": "live"}}}, "views.taught.context: missing; with preference"),
        ({"views": {"taught": {**VIEW, "missing": "same"}}}, "views.taught.missing: got 'same'"),
        ({"views": {"taught": {**VIEW, "weight_field": "w"}}}, r"views"),
        ({"distill_coefficient": 0.0}, "nothing would be trained"),
    ],
)  # fmt: skip
def test_settings_that_would_compare_something_else_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ObjectiveError, match=message):
        plan_of(**settings)


def test_scale_is_above_zero() -> None:
    for scale in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="scale"):
            ObjectiveSettings.model_validate({**ROW, "preference": {"scale": scale}})


def test_guided_responses_need_no_correction_and_no_probability_of_the_sampler() -> None:
    plan = compile_plan(
        ObjectiveSettings.model_validate(ROW), student_temperature=1.0, teachers=["big"], guided=True,
        own_samples=True,
    )  # fmt: skip
    assert (plan.needs_behaviour, plan.uses_old, plan.behaviour_comparable) == (False, False, True)


@pytest.mark.parametrize("name", ["groups", "guided", "sequence_lengths"])
def test_batch_that_does_not_say_what_the_pairs_are_is_refused(name: str) -> None:
    (batch,) = pack_step(groups_of(), PLAN, 10_000)
    with pytest.raises(ValueError, match=f"batch.{name}: missing"):
        Features().loss(replace(batch.tokens, **{name: None}))


def test_batch_whose_weights_differ_within_a_group_is_refused() -> None:
    (batch,) = pack_step(groups_of(), PLAN, 10_000)
    weight = batch.tokens.weight.clone()
    weight[3] *= 2
    with pytest.raises(ValueError, match=r"batch\.weight: differs within a group"):
        Features().loss(replace(batch.tokens, weight=weight))
