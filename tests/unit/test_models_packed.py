"""Packed, prefix-shared forwards against plain one-by-one forwards of the same weights."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import NOT_PACKABLE, PACKABLE, plain_logits, random_ids, tiny_config, tiny_model
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)
from tutelage_client.errors import TutelageError

from services.models.attention import PACKED_ATTENTION, NotPackableError, packed_mask, packing
from services.models.head import head_of
from services.models.layout import QUERY_STEP, build_layout
from services.models.packed import computes_packed, hidden_states, packed_positions
from services.models.selfcheck import check_head, not_packable

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """The same Mistral twice, window 4: plain, and packed."""
    plain = tiny_model("mistral")
    packed = copy.deepcopy(plain)
    assert not_packable(packed) is None
    return plain, packed


def packed_logits(model: Any, contexts: Any, sequences: Any) -> list[torch.Tensor]:
    layout = build_layout(contexts, sequences)
    logits = head_of(model).logits(hidden_states(model, layout)[layout.score_rows])
    return [logits[a:b] for a, b in zip(layout.offsets[:-1], layout.offsets[1:], strict=True)]


def ragged_batch(seed: int = 0) -> tuple[list[Any], list[tuple[int, Any]]]:
    """One-token contexts and responses, shared and lone contexts, one unused, order interleaved."""
    random = np.random.default_rng(seed)
    contexts = [random_ids(random, size) for size in (1, 7, 3, 12, 5)]
    shape = [(3, 9), (0, 1), (1, 1), (3, 1), (1, 6), (2, 4), (3, 2), (1, 11)]
    return contexts, [(context, random_ids(random, size)) for context, size in shape]


@pytest.mark.parametrize("architecture", PACKABLE)
@torch.no_grad()
def test_packed_logits_equal_plain_ones(architecture: str) -> None:
    plain = tiny_model(architecture)
    packed = copy.deepcopy(plain)
    assert not_packable(packed) is None
    contexts, sequences = ragged_batch()
    for got, (context, response) in zip(packed_logits(packed, contexts, sequences), sequences, strict=True):
        expected = plain_logits(plain, contexts[context], response)
        assert (got.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", NOT_PACKABLE)
@torch.no_grad()
def test_other_architectures_take_the_sequential_path_and_are_exact(architecture: str) -> None:
    model = tiny_model(architecture)
    assert not_packable(model) is not None
    contexts, sequences = ragged_batch()
    assert not computes_packed(model, build_layout(contexts, sequences))
    for got, (context, response) in zip(packed_logits(model, contexts, sequences), sequences, strict=True):
        expected = plain_logits(model, contexts[context], response)
        assert (got.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-4


def test_a_shared_context_is_computed_once_and_last_tokens_never() -> None:
    layout = build_layout([[1, 2, 3], [4]], [(0, [5, 6]), (0, [7]), (1, [8, 9, 10])])
    assert layout.input_ids.tolist() == [1, 2, 3, 5, 4, 8, 9]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert layout.response_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert layout.num_unshared == 4 + 3 + 3


def test_first_response_token_is_scored_by_last_context_row() -> None:
    layout = build_layout([[1, 2, 3], [4]], [(0, [5, 6]), (0, [7]), (1, [8, 9, 10])])
    assert layout.score_rows.tolist() == [2, 3, 2, 4, 5, 6]


@pytest.mark.parametrize(
    ("contexts", "sequences", "message"),
    [
        ([[]], [(0, [1])], r"contexts\[0\]"),
        ([[1]], [(0, [])], r"sequences\[0\] response"),
        ([[1]], [(1, [1])], r"sequences\[0\] context: got 1"),
        ([[1]], [], "sequences: got none"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(contexts: Any, sequences: Any, message: str) -> None:
    with pytest.raises(TutelageError, match=message):
        build_layout(contexts, sequences)


batches = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), max_size=4)), min_size=1, max_size=5
).filter(lambda shape: any(sizes for _, sizes in shape))


def check_alignment(pair: tuple[Any, Any], shape: list[tuple[int, list[int]]], seed: int) -> None:
    plain, packed = pair
    random = np.random.default_rng(seed)
    contexts = [random_ids(random, size) for size, _ in shape]
    sequences = [
        (index, random_ids(random, size)) for index, (_, sizes) in enumerate(shape) for size in sizes
    ]
    random.shuffle(sequences)  # type: ignore[arg-type]
    with torch.no_grad():
        parts = packed_logits(packed, contexts, sequences)
        for got, (context, response) in zip(parts, sequences, strict=True):
            expected = plain_logits(plain, contexts[context], response)
            index = torch.from_numpy(response.astype(np.int64))[:, None]
            error = got.log_softmax(-1).gather(1, index) - expected.log_softmax(-1).gather(1, index)
            assert error.abs().max() < 1e-4


@settings(max_examples=150, deadline=None)
@given(shape=batches, seed=st.integers(0, 2**32 - 1))
def test_alignment_of_any_batch(pair: tuple[Any, Any], shape: list[tuple[int, list[int]]], seed: int) -> None:
    check_alignment(pair, shape, seed)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(max_examples=10_000, deadline=None)
@given(shape=batches, seed=st.integers(0, 2**32 - 1))
def test_alignment_of_ten_thousand_batches(
    pair: tuple[Any, Any], shape: list[tuple[int, list[int]]], seed: int
) -> None:
    check_alignment(pair, shape, seed)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
@torch.no_grad()
def test_queries_cut_into_pieces_change_nothing(architecture: str) -> None:
    plain = tiny_model(architecture)
    packed = copy.deepcopy(plain)
    assert not_packable(packed) is None
    random = np.random.default_rng(0)
    contexts = [random_ids(random, 40), random_ids(random, QUERY_STEP + 30)]
    sequences = [
        (0, random_ids(random, QUERY_STEP + 90)),
        (0, random_ids(random, 7)),
        (1, random_ids(random, 9)),
    ]
    for got, (context, response) in zip(packed_logits(packed, contexts, sequences), sequences, strict=True):
        expected = plain_logits(plain, contexts[context], response)
        assert (got.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_plain_forwards(architecture: str, checkpointing: bool) -> None:
    plain = tiny_model(architecture)
    packed = copy.deepcopy(plain)
    assert not_packable(packed) is None
    if checkpointing:
        packed.train()
        packed.gradient_checkpointing_enable()
    contexts, sequences = ragged_batch()
    grown = torch.cat(packed_logits(packed, contexts, sequences)).log_softmax(-1)
    direction = torch.randn(grown.shape, generator=torch.Generator().manual_seed(0))
    (grown * direction).sum().backward()
    rows = [
        plain(input_ids=torch.tensor(np.concatenate([contexts[c], r]).astype(np.int64))[None]).logits[
            0, len(contexts[c]) - 1 : -1
        ]
        for c, r in sequences
    ]
    (torch.cat(rows).log_softmax(-1) * direction).sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None, name
        scale = theirs.grad.abs().max() + 1.0
        assert (ours.grad - theirs.grad).abs().max() / scale < 1e-4, name


@torch.no_grad()
def test_a_sequence_that_is_not_finite_leaves_its_neighbours_alone() -> None:
    model = tiny_model("qwen3")
    assert not_packable(model) is None
    contexts = [np.array([3, 4, 5]), np.array([6, 7])]
    sequences = [
        (0, np.array([8, 9, 10])),
        (0, np.array([60, 9])),
        (1, np.array([11, 12, 60, 13])),
        (0, np.array([9])),
    ]
    clean = packed_logits(model, contexts, sequences)
    model.get_input_embeddings().weight[60] = torch.nan
    broken = packed_logits(model, contexts, sequences)
    assert torch.equal(clean[0], broken[0])
    assert torch.equal(clean[3], broken[3])
    assert not torch.isfinite(broken[1][1]).any()
    assert not torch.isfinite(broken[2][3]).any()


def test_packing_that_leaks_is_found_at_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.models import attention

    honest = attention._attend_blocks

    def shifted(attend: Any, query: Any, key: Any, value: Any, packed: Any) -> Any:
        return honest(attend, query, key, value.roll(1, dims=2), packed)

    monkeypatch.setattr(attention, "_attend_blocks", shifted)
    model = tiny_model("llama")
    assert "differ" in str(not_packable(model))
    assert model.config._attn_implementation != PACKED_ATTENTION


def test_an_unknown_output_transform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("granite")
    assert not_packable(model) is None
    check_head(model)
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self: object())
    with pytest.raises(TutelageError, match="output transform"):
        check_head(model)


def test_masking_rules_are_recognised_by_what_they_do_at_any_length() -> None:
    layout = build_layout([[1]], [(0, [2])])
    window = sliding_window_causal_mask_function(4096)
    chunks = chunked_causal_mask_function(4096, torch.zeros(1, dtype=torch.int64))
    with packing(layout):
        assert packed_mask(mask_function=causal_mask_function).window is None
        assert packed_mask(mask_function=window, local_size=4096).window == 4096
        with pytest.raises(NotPackableError, match="not a sliding window"):
            packed_mask(mask_function=chunks, local_size=4096)
        with pytest.raises(NotPackableError, match="not causal"):
            packed_mask(mask_function=bidirectional_mask_function)
        with pytest.raises(NotPackableError, match="overlay"):
            packed_mask(mask_function=causal_mask_function, use_vmap=True)


def test_dynamic_rotary_scaling_packs_only_below_its_original_length() -> None:
    config = tiny_config("llama")
    assert packed_positions(config) == float("inf")
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert packed_positions(config) == 2048
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert packed_positions(config) == 64


@torch.no_grad()
def test_generation_with_a_cache_still_works_and_agrees(pair: tuple[Any, Any]) -> None:
    plain, packed = pair
    prompts = torch.tensor([[2, 2, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(plain.generate(prompts, **kwargs), packed.generate(prompts, **kwargs))


def with_adapters(model: Any, *targets: str) -> Any:
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted.eval()


@torch.no_grad()
def test_adapters_take_part_in_packed_forwards() -> None:
    plain = tiny_model("qwen3")
    packed = copy.deepcopy(plain)
    assert not_packable(packed) is None
    torch.manual_seed(1)
    adapted_plain = with_adapters(plain, "q_proj", "v_proj")
    torch.manual_seed(1)
    adapted = with_adapters(packed, "q_proj", "v_proj")
    contexts, sequences = ragged_batch()
    for got, (context, response) in zip(packed_logits(adapted, contexts, sequences), sequences, strict=True):
        expected = plain_logits(adapted_plain, contexts[context], response)
        assert (got.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-4


def test_an_adapter_on_the_head_is_refused() -> None:
    with pytest.raises(TutelageError, match="adapter on the output head"):
        head_of(with_adapters(tiny_model("qwen3"), "lm_head"))


def test_layouts_move_between_devices_whole(tmp_path: Path) -> None:
    layout = build_layout([[1, 2]], [(0, [3, 4]), (0, [5])])
    moved = layout.to("meta")
    assert moved.input_ids.device.type == moved.score_rows.device.type == "meta"
    assert moved.num_rows == layout.num_rows
    assert layout.to("cpu") is layout
