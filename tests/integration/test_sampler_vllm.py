"""Sampling with a real vLLM: what is recorded is what the model says, and every new policy is followed.

One engine for the whole module, built as the rollout process builds it; another process with two
engines at the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.training_run import Processes
from transformers import AutoModelForCausalLM, Qwen3Config
from tutelage.v1.rollout_pb2 import Group, SampleOrder
from tutelage_client.codec import unpack_ids
from tutelage_client.errors import TutelageError

from services.models.generate import GenerationInterruptedError, Response, Row
from services.queue import LeaseSettings, Queue
from services.queue.embedded import EmbeddedServer
from student_trainer.config import RunConfig, load_run_config
from student_trainer.lineage import Stretch
from student_trainer.policy_store import PolicyStore, PolicyVersion
from student_trainer.sampler.anchors import peak_anchors
from student_trainer.sampler.build import build_sampler
from student_trainer.sampler.evaluation import evaluate
from student_trainer.sampler.groups import GroupSampler
from student_trainer.sampler.policy import StudentPolicy
from student_trainer.sampler.verify import plain_logprobs
from student_trainer.sampler.vllm_generate import VllmGenerator
from student_trainer.tasks.addition import CHARACTERS
from student_trainer.tasks.characters import MODEL_ROWS, character_tokenizer

pytest.importorskip("vllm", reason="vLLM is not installed")

END = 1
CANDIDATES = 4
BLOCK = 32  # tokens that vLLM shares or computes as one
SAMPLED = 6_000
PATIENCE = 90.0

RUN_FILE = """
[run]
name = "vllm"
directory = "{directory}"
seed = 11

[queue]
url = "{url}"
heartbeat_seconds = 1.0

[teachers.big]
model = "{directory}/teacher"

[student]
model = "unused"

[data]
task = "addition"

[sampling]
engine = "vllm"
samples_per_prompt = 2
max_new_tokens = 12
{sampling}

[sampling.vllm]
enforce_eager = true
kv_cache_memory_bytes = 33554432
max_num_seqs = 64

[objective]
divergence = "kl_student_teacher"
support = "student_topk"
k = 4
tail = "bucket"
estimator = "pathwise"
{objective}

[training]
steps = 1
evaluation_prompts = 9
"""


def make_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=MODEL_ROWS,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=160,
        eos_token_id=END,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write_model(directory: Path, seed: int) -> None:
    make_model(seed).save_pretrained(directory)
    character_tokenizer(CHARACTERS).save_pretrained(directory)


def publish(store: PolicyStore, version: int) -> PolicyVersion:
    """The weights of version v are those of make_model(v)."""
    return store.publish(version, lambda at: write_model(at, version), lineage=(Stretch("first", version),))


AUDIT = """
mix = "route"
[objective.audit]
teacher = "writer"
chunks = 2
chunk_tokens = 3
[teachers.writer]
address = "writer.example:50051"
"""


def write_run(directory: Path, url: str = "embedded", sampling: str = "", objective: str = "") -> Path:
    path = directory / "run.toml"
    path.write_text(RUN_FILE.format(directory=directory, url=url, sampling=sampling, objective=objective))
    return path


class Sampler:
    """What build_sampler gives for a run file with engine = "vllm"."""

    def __init__(self, directory: Path) -> None:
        self.config: RunConfig = load_run_config(write_run(directory))
        self.store = PolicyStore(directory / "policy")
        built = build_sampler(self.config, publish(self.store, 0))
        self.policy: StudentPolicy = built[0]
        self.groups: GroupSampler = built[1]
        assert isinstance(self.groups.student, VllmGenerator)
        self.generator = self.groups.student

    def follow(self, version: int) -> None:
        if self.store.get(version) is None:
            publish(self.store, version)
        assert self.policy.ready(SampleOrder(policy_version=version, exact=True))
        assert self.policy.version == version

    def generate(self, rows: list[Row], **options: Any) -> list[Response]:
        defaults: dict[str, Any] = {"seed": 5, "temperature": 1.0, "max_new_tokens": 12}
        return self.generator.generate(rows, **{**defaults, **options})

    def holds_nothing(self) -> bool:
        residue = self.generator.engine.residue()
        return (residue.requests, residue.worker_requests, residue.blocks) == (0, 0, 0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    sampler = Sampler(tmp_path_factory.mktemp("vllm"))
    yield sampler
    sampler.groups.close()


@pytest.fixture
def sampler(shared: Sampler) -> Iterator[Sampler]:
    """With the weights of version 0, whatever the test before did."""
    shared.follow(0)
    yield shared
    assert shared.holds_nothing()


def make_rows(samples: int = 3) -> list[Row]:
    """Prompts of one token, of a few, of exactly one block and of more than two."""
    random = np.random.default_rng(3)
    prompts = [random.integers(2, MODEL_ROWS, size=size, dtype=np.int32) for size in (1, 5, BLOCK, 70)]
    return [Row(ids, group, sample) for group, ids in enumerate(prompts) for sample in range(samples)]


def plain_logits(model: Any, row: Row, response: Response) -> torch.Tensor:
    """[R, V] of the response's positions."""
    ids = torch.tensor([*row.prompt_ids, *response.ids])
    with torch.inference_mode():
        logits: torch.Tensor = model(ids[None]).logits[0, len(row.prompt_ids) - 1 : -1]
    return logits


def assert_recorded(model: Any, rows: list[Row], responses: list[Response], temperature: float = 1.0) -> None:
    for row, response in zip(rows, responses, strict=True):
        expected = plain_logprobs(model, row.prompt_ids, response.ids, temperature)
        np.testing.assert_allclose(response.logprobs, expected, atol=1e-4, rtol=0)
        assert (response.logprobs.dtype, response.ids.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_those_of_the_distribution_that_was_sampled(
    sampler: Sampler, temperature: float
) -> None:
    rows = make_rows()
    responses = sampler.generate(rows, temperature=temperature)
    assert {response.finished for response in responses} == {True, False}, "the test needs rows of both kinds"
    assert_recorded(make_model(0), rows, responses, temperature)


def test_greedy_takes_the_most_probable_token_and_records_it_at_temperature_one(sampler: Sampler) -> None:
    model, rows = make_model(0), make_rows(samples=1)
    responses = sampler.generate(rows, temperature=0.0)
    for row, response in zip(rows, responses, strict=True):
        np.testing.assert_array_equal(plain_logits(model, row, response).argmax(-1).numpy(), response.ids)
    assert_recorded(model, rows, responses)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_candidates_are_the_models_most_probable_ids_in_order(sampler: Sampler, temperature: float) -> None:
    model, rows = make_model(0), make_rows()
    responses = sampler.generate(rows, candidates=CANDIDATES, temperature=temperature)
    for row, response in zip(rows, responses, strict=True):
        assert response.candidate_ids is not None
        assert response.candidate_ids.dtype == np.int32
        top = plain_logits(model, row, response).topk(CANDIDATES).indices
        np.testing.assert_array_equal(response.candidate_ids, top.numpy())
    assert sampler.generate(rows[:1])[0].candidate_ids is None


def test_prompts_that_are_more_than_a_step_computes_wait_for_the_next(sampler: Sampler) -> None:
    random = np.random.default_rng(4)
    most = sampler.generator.engine.facts.max_num_batched_tokens
    rows = [
        Row(random.integers(2, MODEL_ROWS, size=145, dtype=np.int32), group, 0)
        for group in range(most // 145 + 2)
    ]
    responses = sampler.generate(rows)
    assert_recorded(make_model(0), rows, responses)


def test_a_row_is_the_same_in_another_batch_and_samples_differ(sampler: Sampler) -> None:
    rows = make_rows(samples=8)
    together = sampler.generate(rows)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = sampler.generate([rows[i] for i in order])
    alone = [sampler.generate([row])[0] for row in rows[::5]]
    pairs = [
        *zip((together[i] for i in order), shuffled, strict=True),
        *zip(together[::5], alone, strict=True),
    ]
    # Beside other rows logits round differently: a tie of two tokens may fall the other way.
    assert sum(a.ids.tolist() == b.ids.tolist() for a, b in pairs) >= len(pairs) - 1
    assert len({response.ids.tobytes() for response in together[8:16]}) >= 6, "samples of one prompt"
    assert [r.ids.tolist() for r in sampler.generate(rows, seed=6)] != [r.ids.tolist() for r in together]


def test_samples_follow_the_models_distribution(sampler: Sampler) -> None:
    """Chi-square of the first two tokens against the model's own probabilities."""
    model, prompt = make_model(0), np.array([9, 3], dtype=np.int32)
    rows = [Row(prompt, group, 0) for group in range(SAMPLED)]
    responses = sampler.generate(rows, max_new_tokens=2, temperature=1.3)
    with torch.inference_mode():
        first = torch.softmax(model(torch.tensor([[9, 3]])).logits[0, -1] / 1.3, -1).numpy()
        pairs = torch.tensor([[9, 3, token] for token in range(MODEL_ROWS)])
        second = torch.softmax(model(pairs).logits[:, -1] / 1.3, -1).numpy()
    expected = first[:, None] * second * SAMPLED
    expected[END] = 0.0  # nothing follows the end token
    observed = np.zeros((MODEL_ROWS, MODEL_ROWS))
    for response in responses:
        if len(response.ids) == 2:
            observed[tuple(response.ids)] += 1
    cells = expected >= 5
    statistic = float((((observed - expected) ** 2)[cells] / expected[cells]).sum())
    freedom = int(cells.sum())
    assert freedom > 50
    # Mean `freedom`, standard deviation sqrt(2 freedom): six of them never happen by chance.
    assert abs(statistic - freedom) < 6 * np.sqrt(2 * freedom), (statistic, freedom)


def test_a_response_ends_with_its_end_token_or_at_the_limit(sampler: Sampler) -> None:
    responses = sampler.generate(make_rows(samples=12))
    for response in responses:
        assert not np.isin(response.ids[:-1], [END]).any()
        assert response.finished == (response.ids[-1] == END)
        assert response.finished or len(response.ids) == 12
    assert any(response.finished and len(response.ids) < 12 for response in responses)
    assert any(not response.finished for response in responses)


def test_only_our_end_tokens_end_a_response(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that vLLM finds in the model's files: what ends a response is the run's choice."""
    monkeypatch.setattr(sampler.generator, "_end_ids", [8, 15])
    responses = sampler.generate(make_rows(samples=12))
    assert any(END in response.ids[:-1] for response in responses)
    for response in responses:
        assert not np.isin(response.ids[:-1], [8, 15]).any()
        assert response.finished == (response.ids[-1] in (8, 15))


def test_prompts_that_do_not_fit_are_refused(sampler: Sampler) -> None:
    row = Row(np.full(150, 5, dtype=np.int32), 0, 0)
    with pytest.raises(TutelageError, match="150 tokens and 12 new ones exceed the 160 positions"):
        sampler.generate([row])
    with pytest.raises(TutelageError, match="at least one"):
        sampler.generate([Row(np.empty(0, dtype=np.int32), 0, 0)])
    assert len(sampler.generate([row], max_new_tokens=10)) == 1


@pytest.mark.parametrize("failure", [GenerationInterruptedError, RuntimeError])
def test_what_ends_a_call_leaves_no_request_behind(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    engine, taken = sampler.generator.engine, []
    step = engine.step

    def stepping() -> list[Any]:
        taken.append(step())
        if len(taken) == 3:
            if failure is RuntimeError:
                raise RuntimeError("the engine failed")
            sampler.generator.interrupt()
        return taken[-1]

    rows = make_rows(samples=50)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "step", stepping)
        with pytest.raises(failure):
            sampler.generate(rows)
    assert len(taken) == 3, "it ends between two steps"
    assert sampler.holds_nothing()
    sampler.generator._interrupted.clear()
    assert len(sampler.generate(rows)) == len(rows)


def test_new_weights_are_sampled_from_and_no_prefix_of_the_old_is_used(sampler: Sampler) -> None:
    rows = make_rows()
    before = sampler.generate(rows)
    assert_recorded(make_model(0), rows, before)
    sampler.follow(1)
    assert_recorded(make_model(1), rows, sampler.generate(rows))
    sampler.follow(0)
    for old, again in zip(before, sampler.generate(rows), strict=True):
        np.testing.assert_array_equal(old.ids, again.ids)
        np.testing.assert_allclose(old.logprobs, again.logprobs, atol=1e-6)


def test_weights_of_another_architecture_are_refused_before_anything_changes(
    sampler: Sampler, tmp_path: Path
) -> None:
    """vLLM itself would keep the old values of what is missing, with a warning."""
    model = make_model(1)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(tmp_path / "lacking", state_dict=state)
    rows = make_rows(samples=1)
    with pytest.raises(TutelageError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        sampler.generator.load_weights(tmp_path / "lacking")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TutelageError, match="no safetensors file"):
        sampler.generator.load_weights(tmp_path / "empty")
    assert_recorded(make_model(0), rows, sampler.generate(rows))


def test_a_version_that_vanishes_half_read_is_looked_for_again(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    whole = Qwen3ForCausalLM.load_weights
    publish(sampler.store, 7)

    def half(model: Any, weights: Any) -> None:
        tensors = list(weights)
        whole(model, iter(tensors[: len(tensors) // 2]))
        sampler.store.discard_above(6)
        raise RuntimeError("the second half is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Qwen3ForCausalLM, "load_weights", half)
        assert not sampler.policy.ready(SampleOrder(policy_version=7, exact=True))
    assert sampler.policy.ready(SampleOrder(policy_version=0, exact=True)), "version 0, held before"
    rows = make_rows()
    assert_recorded(make_model(0), rows, sampler.generate(rows))


def test_groups_carry_the_policy_they_were_sampled_with(sampler: Sampler) -> None:
    for version in (1, 0):
        sampler.follow(version)
        sampled = sampler.groups.sample(range(3), sampler.policy.version, sampler.policy.lineage)
        model = make_model(version)
        for group in (one.group for one in sampled):
            assert (group.policy_version, group.sampled_by) == (version, "student")
            assert [(stretch.id, stretch.start) for stretch in group.lineage] == [("first", version)]
            assert_group(model, model, group)


def test_evaluation_answers_held_out_prompts_greedily_and_sampled(sampler: Sampler) -> None:
    result = evaluate(sampler.groups, prompts=9, policy_version=0)
    assert (result["version"], result["prompts"]) == (0, 9)
    assert all(1 <= result[kind]["mean_tokens"] <= 12 for kind in ("greedy", "sampled"))
    assert evaluate(sampler.groups, prompts=9, policy_version=0) == result


def test_the_model_of_the_self_test_is_emptied(shared: Sampler) -> None:
    assert shared.groups._student_model is None


def test_self_test_finds_log_probabilities_at_another_temperature(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM records them by default: those before the temperature."""
    from student_trainer.sampler.verify import check_generator

    options: dict[str, Any] = {"temperature": 0.7, "max_new_tokens": 12}
    prompts = [row.prompt_ids for row in make_rows(samples=1)]
    assert check_generator(sampler.generator, make_model(0), prompts, **options) < 1e-4
    runner = sampler.generator.engine._runner
    monkeypatch.setattr(runner.sampler, "logprobs_mode", "raw_logprobs")
    monkeypatch.setattr(runner.sampler.topk_topp_sampler, "logprobs_mode", "raw_logprobs")
    with pytest.raises(TutelageError, match="self-test"):
        check_generator(sampler.generator, make_model(0), prompts, **options)


def assert_group(model: Any, student: Any, group: Group) -> None:
    """Log-probabilities are those of `model`, candidates those of `student`."""
    prompt = unpack_ids(group.prompt_ids, "prompt")
    assert len(group.rollouts) == 2
    for rollout in group.rollouts:
        ids = unpack_ids(rollout.response_ids, "response")
        logprobs = np.frombuffer(rollout.behaviour_logprobs, dtype="<f4")
        np.testing.assert_allclose(logprobs, plain_logprobs(model, prompt, ids), atol=1e-4, rtol=0)
        response = Response(ids, logprobs, None, True)
        top = plain_logits(student, Row(prompt, 0, 0), response).topk(CANDIDATES).indices
        candidates = unpack_ids(rollout.candidate_ids, "candidates", CANDIDATES)
        np.testing.assert_array_equal(candidates, top.numpy())


def assert_anchors(student: Any, group: Group) -> None:
    """At the peaks of the student's entropy after its own prompt, whoever sampled."""
    prompt = unpack_ids(group.prompt_ids, "prompt")
    for rollout in group.rollouts:
        ids = unpack_ids(rollout.response_ids, "response")
        logits = plain_logits(student, Row(prompt, 0, 0), Response(ids, np.zeros(len(ids)), None, True))
        entropy = torch.distributions.Categorical(logits=logits.double()).entropy().numpy()
        expected = peak_anchors(entropy, np.ones(len(ids), dtype=np.bool_), chunks=2, chunk_tokens=3)
        np.testing.assert_array_equal(unpack_ids(rollout.anchors, "anchors"), expected)


async def test_a_rollout_process_samples_student_and_teacher_with_two_engines(tmp_path: Path) -> None:
    """The student says its part of all responses by a model beside the engines, which moves as they do."""
    write_model(tmp_path / "teacher", seed=50)
    store = PolicyStore(tmp_path / "policy")
    publish(store, 0)
    with EmbeddedServer(tmp_path) as server, Processes() as processes:
        path = write_run(tmp_path, server.url, 'sampler = "teacher:big"\nstudent_fraction = 0.5', AUDIT)
        async with Queue(
            server.url, "tutelage", max_queued_tokens=100_000, lease=LeaseSettings(heartbeat=1.0)
        ) as queue:
            started = SimpleNamespace(file=path, logs=tmp_path)
            process = processes.sampler(started, "sampler")  # type: ignore[arg-type]
            for version in (0, 1):
                if version:
                    publish(store, version)
                order = SampleOrder(
                    id=f"order-{version}",
                    run="vllm",
                    first_group=8 * version,
                    num_groups=8,
                    policy_version=version,
                    exact=True,
                )
                assert await queue.place_order(order)
                groups = await take_groups(queue, process, tmp_path / "sampler.log", 8)
                assert {group.sampled_by for group in groups} == {"student", "teacher:big"}
                student = make_model(version)
                for group in groups:
                    assert group.policy_version == version
                    by_student = group.sampled_by == "student"
                    assert_group(student if by_student else make_model(50), student, group)
                    assert_anchors(student, group)
            process.terminate()
            await asyncio.to_thread(process.join, 30)
            assert process.exitcode == 0, tail(tmp_path / "sampler.log")


def tail(log: Path) -> str:
    return log.read_text()[-3000:]


async def take_groups(queue: Queue, process: Any, log: Path, count: int) -> list[Group]:
    """What the sampler put into the queue, taken like a teacher."""
    groups: dict[str, Group] = {}
    end = time.monotonic() + PATIENCE
    async with queue.jobs("big", "teacher") as worker:
        while len(groups) < count:
            assert process.is_alive(), tail(log)
            assert time.monotonic() < end, f"only {sorted(groups)} arrived"
            for claim in await worker.claim(4, 100):
                loaded = await worker.load(claim)
                assert loaded is not None
                groups[claim.group] = Group.FromString(loaded[0].SerializeToString())
                await worker.commit(claim, b"")
    return list(groups.values())
