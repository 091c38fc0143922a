"""Where responses are audited: the student's entropies along them, and the chunks at their peaks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.tiny_models import tiny_model
from tutelage_client.errors import TutelageError

from student_trainer.sampler import read_back as module
from student_trainer.sampler.anchors import peak_anchors
from student_trainer.sampler.read_back import read_back


def by_hand(entropy: list[float], selected: list[bool], chunks: int, size: int) -> list[int]:
    """The definition, position by position."""
    taken: list[int] = []
    for _ in range(chunks):
        best = None
        for t in range(len(entropy)):
            cells = set(range(t, t + size))
            inside = t + size <= len(entropy) and all(selected[c] for c in cells & set(range(len(entropy))))
            overlaps = any(cells & set(range(other, other + size)) for other in taken)
            if inside and not overlaps and (best is None or entropy[t] > entropy[best]):
                best = t
        if best is None:
            break
        taken.append(best)
    return sorted(taken)


def test_anchors_are_the_greedy_peaks() -> None:
    for seed in range(400):
        random = np.random.default_rng(seed)
        rows, chunks, size = (int(n) for n in random.integers(1, [40, 8, 9]))
        entropy = random.random(rows)
        if seed % 3 == 0:
            entropy = np.round(entropy * 3)  # many equals
        selected = random.random(rows) < (1.0 if seed % 2 else 0.9)
        found = peak_anchors(entropy, selected, chunks=chunks, chunk_tokens=size)
        assert found.dtype == np.int32
        assert found.tolist() == by_hand(entropy.tolist(), selected.tolist(), chunks, size)


def test_a_response_shorter_than_a_chunk_has_none() -> None:
    everywhere = np.ones(4, dtype=np.bool_)
    assert peak_anchors(np.ones(4), everywhere, chunks=3, chunk_tokens=5).shape == (0,)
    assert peak_anchors(np.ones(4), everywhere, chunks=3, chunk_tokens=4).tolist() == [0]


PROMPTS = [np.array(ids, dtype=np.int32) for ids in ([3, 4, 5], [3, 4, 5], [6, 7], [3, 4, 5])]
RESPONSES = [np.array(ids, dtype=np.int32) for ids in ([8, 9, 2, 1], [9], [4, 4, 4], [5, 6])]


def plain_logits(
    model: torch.nn.Module, prompt: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]
) -> torch.Tensor:
    whole = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))[None]
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
    return logits


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
@pytest.mark.parametrize("packed_tokens", [16_384, 8, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropies_and_candidates_are_those_of_plain_forwards(
    monkeypatch: pytest.MonkeyPatch, architecture: str, packed_tokens: int, temperature: float
) -> None:
    monkeypatch.setattr(module, "_PACKED_TOKENS", packed_tokens)
    monkeypatch.setattr(module, "_BLOCK_LOGITS", 100)
    model = tiny_model(architecture).eval()
    found = read_back(model, PROMPTS, RESPONSES, candidates=3, entropy_at=temperature)
    for prompt, ids, each in zip(PROMPTS, RESPONSES, found, strict=True):
        logits = plain_logits(model, prompt, ids)
        expected = torch.distributions.Categorical(logits=logits.double() / temperature).entropy()
        assert each.entropy is not None
        assert each.candidate_ids is not None
        np.testing.assert_allclose(each.entropy, expected.numpy(), atol=1e-5)
        np.testing.assert_array_equal(each.candidate_ids, logits.topk(3).indices.numpy())


def test_only_what_is_asked_for_is_answered() -> None:
    model = tiny_model("qwen3").eval()
    (entropy,) = read_back(model, PROMPTS[:1], RESPONSES[:1], entropy_at=1.0)
    assert entropy.candidate_ids is None
    (candidates,) = read_back(model, PROMPTS[:1], RESPONSES[:1], candidates=2)
    assert candidates.entropy is None
    assert read_back(model, [], [], entropy_at=1.0) == []


def test_a_student_that_has_diverged_is_not_ranked() -> None:
    model = tiny_model("qwen3").eval()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(TutelageError, match="not finite"):
        read_back(model, PROMPTS, RESPONSES, entropy_at=1.0)
