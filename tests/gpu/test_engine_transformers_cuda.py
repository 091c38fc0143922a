"""The transformers engine on a GPU, against plain float32 forwards on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.engine_requests import Reference, assert_scores, random_request, run_engine
from support.tiny_models import save_tiny_model, tiny_model
from tutelage_client.types import Signal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]
EVERYTHING = Signal(sampled=True, top_k=5, candidates=True, entropy=True, temperature=0.7)
ARCHITECTURES = [
    "qwen3",
    "llama",
    "gemma2",
    "gemma3",
    "mistral",
    "gpt2",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "lfm2",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_float32_scores_equal_the_cpus(architecture: str, tmp_path: Path) -> None:
    request = random_request(0, sequences=30, signal=EVERYTHING)
    async with run_engine(
        save_tiny_model(tmp_path / "model", architecture), device="cuda", dtype="float32"
    ) as engine:
        score = await engine.score(request)
    assert_scores(score, request, Reference(tiny_model(architecture)), tolerance=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "mistral", "qwen3_moe"])
async def test_bfloat16_stays_near_float32_of_the_same_weights(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, spread=0.1).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    reference = Reference(model.float())
    request = random_request(0, sequences=60)
    async with run_engine(tmp_path / "model", device="cuda", dtype="bfloat16") as engine:
        score = await engine.score(request)
    errors = np.concatenate([
        np.abs(answer.sampled - reference.sampled(request, sequence))
        for answer, sequence in zip(score.sequences, request.sequences, strict=True)
    ])  # fmt: skip
    assert errors.mean() <= 5e-3
    assert np.quantile(errors, 0.99) <= 5e-2


async def test_deterministic_scores_repeat_bit_for_bit(tmp_path: Path) -> None:
    request = random_request(1, sequences=40, signal=EVERYTHING)
    directory = save_tiny_model(tmp_path / "model")
    async with run_engine(directory, device="cuda", deterministic=True) as engine:
        first, second = await engine.score(request), await engine.score(request)
    for ours, theirs in zip(first.sequences, second.sequences, strict=True):
        assert ours.sampled is not None
        assert theirs.sampled is not None
        assert ours.sampled.tobytes() == theirs.sampled.tobytes()
