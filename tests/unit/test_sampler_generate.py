"""Generation: what is recorded is what the model says, whatever the batch looks like."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from tutelage_client.errors import TutelageError

from services.models.choose import choose
from services.models.generate import GenerationInterruptedError, Response, Row, TransformersGenerator
from services.models.uniforms import stream_seed, uniforms
from student_trainer.sampler.verify import check_generator, plain_logprobs

VOCABULARY = 37
END_IDS = [1, 8, 15]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE),
    # A window shorter than the sequences: the cache forgets while it is padded.
    "mistral": MistralConfig(**SHAPE, sliding_window=6),
    "gemma2": Gemma2Config(**SHAPE, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        sliding_window=6,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    # Absolute positions: a padded row must not start at its column.
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        eos_token_id=1,
        initializer_range=0.3,
    ),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}


def make_model(name: str = "qwen3") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()


def make_rows(count: int = 7, samples: int = 1) -> list[Row]:
    """Prompts of 1 to `count` tokens."""
    random = np.random.default_rng(3)
    prompts = [random.integers(2, VOCABULARY, size=1 + i, dtype=np.int32) for i in range(count)]
    return [Row(ids, group, sample) for group, ids in enumerate(prompts) for sample in range(samples)]


def generate(
    model: Any, rows: list[Row], batch_size: int = 64, batch_tokens: int | None = None, **options: Any
) -> list[Response]:
    generator = TransformersGenerator(
        model, end_ids=END_IDS, batch_size=batch_size, batch_tokens=batch_tokens
    )
    defaults: dict[str, Any] = {"seed": 5, "temperature": 1.0, "max_new_tokens": 12}
    return generator.generate(rows, **{**defaults, **options})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_recorded_logprobs_equal_a_plain_forward_per_row(name: str, temperature: float) -> None:
    model = make_model(name)
    rows = make_rows(samples=2)
    responses = generate(model, rows, temperature=temperature)
    assert {response.finished for response in responses} == {True, False}, "the test needs rows of both kinds"
    for row, response in zip(rows, responses, strict=True):
        expected = plain_logprobs(model, row.prompt_ids, response.ids, temperature)
        np.testing.assert_allclose(response.logprobs, expected, atol=2e-5)
        assert response.logprobs.dtype == np.float32


def test_a_response_ends_with_its_end_token_or_at_the_limit() -> None:
    for response in generate(make_model(), make_rows(samples=8)):
        assert not np.isin(response.ids[:-1], END_IDS).any()
        assert response.finished == (response.ids[-1] in END_IDS)
        assert response.finished or len(response.ids) == 12


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_tokens_do_not_depend_on_the_batch_split_or_the_order(batch_size: int) -> None:
    model, rows = make_model("gpt2"), make_rows(samples=3)
    expected = {(row.group, row.sample): r for row, r in zip(rows, generate(model, rows), strict=True)}
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    for row, response in zip(shuffled, generate(model, shuffled, batch_size), strict=True):
        same = expected[row.group, row.sample]
        np.testing.assert_array_equal(response.ids, same.ids)
        np.testing.assert_allclose(response.logprobs, same.logprobs, atol=1e-5)


def test_a_row_may_have_a_limit_of_its_own_and_is_else_the_same() -> None:
    model, rows = make_model(), make_rows(samples=2)
    limits = [1 + i % 5 for i in range(len(rows))]
    for row, limit, response in zip(rows, limits, generate(model, rows, max_new_tokens=limits), strict=True):
        (alone,) = generate(model, [row], max_new_tokens=limit)
        np.testing.assert_array_equal(response.ids, alone.ids)
        assert response.finished == alone.finished
        assert response.finished or len(response.ids) == limit
    with pytest.raises(TutelageError, match="a prompt of 7 tokens and 58 new ones exceed the model's 64"):
        generate(model, rows, max_new_tokens=[12] * (len(rows) - 1) + [58])


@pytest.mark.parametrize("batch_tokens", [1, 40, 100])
def test_a_batch_holds_no_more_of_the_cache_than_it_may(
    batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make_model(), make_rows(samples=3)
    limits = [12 - i % 7 for i in range(len(rows))]
    expected = generate(model, rows, max_new_tokens=limits)
    held = []
    run = TransformersGenerator._run

    def counted(self: Any, batch: list[Row], draws: Any, *rest: Any) -> Any:
        held.append((len(batch), max(len(row.prompt_ids) for row in batch) + draws.shape[1]))
        return run(self, batch, draws, *rest)

    monkeypatch.setattr(TransformersGenerator, "_run", counted)
    found = generate(model, rows, batch_tokens=batch_tokens, max_new_tokens=limits)
    assert sum(count for count, _ in held) == len(rows)
    assert all(count == 1 or count * width <= batch_tokens for count, width in held)
    assert batch_tokens == 1 or any(count > 1 for count, _ in held)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)


def test_samples_of_one_prompt_and_other_seeds_differ() -> None:
    model, prompt = make_model(), np.array([5, 6, 7], dtype=np.int32)
    rows = [Row(prompt, 0, sample) for sample in range(16)]
    first, other = generate(model, rows), generate(model, rows, seed=6)
    assert len({response.ids.tobytes() for response in first}) > 8
    assert [r.ids.tolist() for r in first] != [r.ids.tolist() for r in other]


def test_samples_follow_the_models_distribution() -> None:
    """Chi-square of the first two tokens over 20,000 samples against the model's own probabilities."""
    model, prompt = make_model(), np.array([9, 3], dtype=np.int32)
    count = 20_000
    responses = generate(
        model, [Row(prompt, group, 0) for group in range(count)], 5_000, max_new_tokens=2, temperature=1.3
    )
    with torch.inference_mode():
        first = torch.softmax(model(torch.tensor([[9, 3]])).logits[0, -1] / 1.3, -1).numpy()
        pairs = torch.tensor([[9, 3, token] for token in range(VOCABULARY)])
        second = torch.softmax(model(pairs).logits[:, -1] / 1.3, -1).numpy()
    expected = first[:, None] * second * count
    expected[END_IDS] = 0.0  # nothing follows an end token
    observed = np.zeros((VOCABULARY, VOCABULARY))
    for response in responses:
        if len(response.ids) == 2:
            observed[tuple(response.ids)] += 1
    cells = expected >= 5
    statistic = float((((observed - expected) ** 2)[cells] / expected[cells]).sum())
    freedom = int(cells.sum())
    # Mean `freedom`, standard deviation sqrt(2 freedom): six of them never happen by chance.
    assert abs(statistic - freedom) < 6 * np.sqrt(2 * freedom), (statistic, freedom)


def test_greedy_takes_the_most_probable_token_and_records_it_at_temperature_one() -> None:
    model, rows = make_model(), make_rows()
    for row, response in zip(rows, generate(model, rows, temperature=0.0), strict=True):
        ids = torch.tensor([*row.prompt_ids, *response.ids])
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, len(row.prompt_ids) - 1 : -1]
        np.testing.assert_array_equal(logits.argmax(-1).numpy(), response.ids)
        np.testing.assert_allclose(
            response.logprobs, plain_logprobs(model, row.prompt_ids, response.ids), atol=2e-5
        )


def test_candidates_are_the_models_most_probable_ids_in_order() -> None:
    model, rows = make_model(), make_rows(samples=2)
    for row, response in zip(rows, generate(model, rows, candidates=5), strict=True):
        ids = torch.tensor([*row.prompt_ids, *response.ids])
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, len(row.prompt_ids) - 1 : -1]
        assert response.candidate_ids is not None
        assert response.candidate_ids.dtype == np.int32
        np.testing.assert_array_equal(logits.topk(5).indices.numpy(), response.candidate_ids)


def test_prompt_over_the_models_positions_is_refused() -> None:
    row = Row(np.full(60, 5, dtype=np.int32), 0, 0)
    with pytest.raises(TutelageError, match="60 tokens and 12 new ones exceed the model's 64"):
        generate(make_model(), [row])


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[4] = float("nan")
    with pytest.raises(TutelageError, match="not finite"):
        generate(model, make_rows())


def test_a_token_of_zero_probability_is_never_chosen() -> None:
    logits = torch.full((3, 6), float("-inf"))
    logits[:, [2, 4]] = 0.0
    draws = torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    choice = choose(logits, draws, temperature=1.0)
    assert choice.ids.tolist() == [2, 4, 4]
    torch.testing.assert_close(choice.logprobs, torch.full((3,), -np.log(2.0), dtype=torch.float32))


def test_tokens_far_below_float32_resolution_keep_their_share() -> None:
    """After a token of weight 1, slices of 1e-9 vanish in a float32 running sum."""
    logits = torch.full((1, 1000), float(np.log(1e-9)))
    logits[0, 0] = 0.0
    for token in (1, 500, 999):
        draw = (1.0 + 1e-9 * (token - 0.5)) / (1.0 + 1e-9 * 999)
        choice = choose(logits, torch.tensor([draw], dtype=torch.float64), temperature=1.0)
        assert choice.ids.tolist() == [token]


def test_large_vocabularies_in_blocks_give_the_same_choice() -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(70, 150_000) * 3, torch.rand(70, dtype=torch.float64)
    whole = choose(logits, draws, temperature=0.9, candidates=4)
    assert whole.candidate_ids is not None
    for row in (0, 27, 28, 69):
        one = choose(logits[row : row + 1], draws[row : row + 1], temperature=0.9, candidates=4)
        assert one.ids[0] == whole.ids[row]
    exact = torch.log_softmax(logits.double() / 0.9, -1).gather(1, whole.ids[:, None])[:, 0]
    torch.testing.assert_close(whole.logprobs.double(), exact, atol=2e-6, rtol=0)


def test_uniforms_belong_to_seed_group_sample_and_step() -> None:
    reference = uniforms(1, 2, 3, 8)
    np.testing.assert_array_equal(uniforms(1, 2, 3, 4), reference[:4])
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (1, -2, 3), (1, 2, -3)]:
        assert not np.isin(uniforms(*other, 8), reference).any()
        assert stream_seed(*other) != stream_seed(1, 2, 3) == stream_seed(1, 2, 3)
    assert all(0 <= stream_seed(0, group, 0) < 2**63 for group in range(-500, 500))
    many = np.concatenate([uniforms(0, group, 0, 4) for group in range(5_000)])
    assert abs(many.mean() - 0.5) < 0.01
    assert 0.0 <= many.min() <= many.max() < 1.0


def test_an_interrupt_ends_a_running_generation() -> None:
    generator = TransformersGenerator(make_model(), end_ids=[VOCABULARY], batch_size=1)
    options: dict[str, Any] = {"seed": 0, "temperature": 1.0, "max_new_tokens": 50}
    assert len(generator.generate(make_rows(3), **options)) == 3
    timer = threading.Timer(0.2, generator.interrupt)
    timer.start()
    started = time.monotonic()
    with pytest.raises(GenerationInterruptedError):
        generator.generate(make_rows(7, samples=10_000), **options)
    assert time.monotonic() - started < 30, "70,000 responses take minutes"
    timer.join()


class OffByOne(TransformersGenerator):
    """A generator with the classic mistake: position t's log-probability recorded for token t + 1."""

    def generate(self, *arguments: Any, **options: Any) -> list[Response]:
        responses = super().generate(*arguments, **options)
        return [Response(r.ids, np.roll(r.logprobs, 1), r.candidate_ids, r.finished) for r in responses]


def test_self_test_accepts_a_right_generator_and_refuses_an_off_by_one() -> None:
    model = make_model()
    prompts = [row.prompt_ids for row in make_rows(5)][2:]
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 12}
    assert check_generator(TransformersGenerator(model, end_ids=END_IDS), model, prompts, **options) < 1e-4
    with pytest.raises(TutelageError, match="self-test"):
        check_generator(OffByOne(model, end_ids=END_IDS), model, prompts, **options)
