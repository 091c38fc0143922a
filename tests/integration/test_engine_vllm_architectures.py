"""The vLLM engine over many architectures, in bfloat16, and over two tensor-parallel processes."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.engine_requests import Reference, assert_scores, random_request, shuffled
from support.sequence_bank import BLOCK, Bank
from support.tiny_models import SERVABLE, Shape, random_ids, tiny_model
from support.vllm_engines import run_vllm
from tutelage_client import TutelageError
from tutelage_client.types import ScoreRequest, Sequence, Signal

pytest.importorskip("vllm", reason="vLLM is not installed")

TOLERANCE = 1e-4
EVERYTHING = Signal(sampled=True, top_k=5, candidates=True, entropy=True)
SLIDING = ["gemma2", "gemma3", "mistral", "gpt_oss"]
ARCHITECTURES = ["qwen3", "llama", *SLIDING, "gpt2", "granite", "cohere", "qwen3_moe"]
# Contexts of a block, of one token, of a block and one; responses of one token, of one block, longer.
SHAPE = [(64, [70, 70, 1, 33, 32]), (1, [1, 5, 100]), (33, [3, 3])]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, pytest.param("mixtral", marks=pytest.mark.long)])
async def test_every_signal_equals_plain_float32(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, shape=SERVABLE)
    model.save_pretrained(tmp_path / "model")
    request = random_request(0, shape=SHAPE, signal=EVERYTHING)
    async with run_vllm(tmp_path / "model") as engine:
        scores = [await engine.score(request), await engine.score(shuffled(request, 1))]
        assert engine.counters.rescored == 0
        assert (engine.identity.dtype, engine.identity.head_dtype) == ("float32", "float32")
    assert_scores(scores[0], request, Reference(model), TOLERANCE)
    assert_scores(scores[1], shuffled(request, 1), Reference(model), TOLERANCE)
    assert scores[0].usage.tokens_computed > scores[1].usage.tokens_computed
    # The cached part of every context that has a whole block before its last token: 5 · 32 + 2 · 32.
    assert scores[1].usage.tokens_reused == 5 * BLOCK + 2 * BLOCK


@pytest.mark.parametrize(("architecture", "window"), [("gemma3", BLOCK + 8), ("mistral", 3 * BLOCK)])
async def test_a_sliding_window_shares_prefixes_longer_than_itself(
    architecture: str, window: int, tmp_path: Path
) -> None:
    """gemma3 has two groups of KV-cache blocks, and the one with the window frees its blocks early."""
    shape = Shape(**{**vars(SERVABLE), "window": window})
    model = tiny_model(architecture, shape=shape)
    model.save_pretrained(tmp_path / "model")
    random = np.random.default_rng(0)
    context = random_ids(random, 6 * BLOCK + 1)
    groups = [tuple(Sequence(str(i), 0, random_ids(random, 20)) for i in range(4)) for _ in range(2)]
    requests = [ScoreRequest((context,), group, Signal(top_k=5, entropy=True)) for group in groups]
    async with run_vllm(tmp_path / "model") as engine:
        scores = [await engine.score(request) for request in requests]
        assert engine.counters.rescored == 0
        bank = Bank(model, seed=3, count=12)
        others = bank.requests(4, 10)
        mixed = await asyncio.gather(*(engine.score(request) for request in others))
        assert engine.counters.rescored == 0
    for request, score in zip(requests, scores, strict=True):
        assert_scores(score, request, Reference(model), TOLERANCE)
    for request, score in zip(others, mixed, strict=True):
        assert_scores(score, request, bank, TOLERANCE)
    assert scores[1].usage.tokens_reused == 4 * 6 * BLOCK


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
async def test_bfloat16_stays_near_float32_of_the_same_weights(architecture: str, tmp_path: Path) -> None:
    # 0.07 over 64 numbers spreads logits as far as 0.1 over the 32 of the transformers engine's test.
    model = tiny_model(architecture, spread=0.07, shape=SERVABLE).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    reference = Reference(model.float())
    request = random_request(0, shape=[(size, [int(n) for n in range(1, 80, 4)]) for size in (1, 40, 100)])
    async with run_vllm(tmp_path / "model", engine={"dtype": "bfloat16"}) as engine:
        score = await engine.score(request)
        assert (engine.identity.dtype, engine.identity.head_dtype) == ("bfloat16", "float32")
    errors = np.concatenate([
        np.abs(answer.sampled - reference.sampled(request, sequence))
        for answer, sequence in zip(score.sequences, request.sequences, strict=True)
    ])  # fmt: skip
    print(architecture, "mean", errors.mean(), "p99", np.quantile(errors, 0.99))
    assert errors.mean() <= 5e-3
    assert np.quantile(errors, 0.99) <= 5e-2


async def test_two_tensor_parallel_processes_score_like_one(tmp_path: Path) -> None:
    """61 words on two ranks: 32 and 29. New weights reach both; without one of them the engine ends."""
    models = [tiny_model("qwen3", seed, shape=SERVABLE) for seed in (0, 1)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
    async with run_vllm(tmp_path / "0", tensor_parallel_size=2) as engine:
        for seed, model in enumerate(models):
            if seed:
                await engine.load_weights(tmp_path / "1", 1)
            bank = Bank(model, count=12)
            requests = bank.requests(1, 24)
            scores = await asyncio.gather(*(engine.score(request) for request in requests))
            for request, score in zip(requests, scores, strict=True):
                assert score.identity.weights_version == seed
                assert_scores(score, request, bank, TOLERANCE)
        assert engine.counters.rescored == 0
        residue = await engine.residue()
        assert (residue.requests, residue.blocks) == (0, 0)
        os.kill(multiprocessing.active_children()[-1].pid or 0, signal.SIGKILL)
        with pytest.raises(TutelageError):
            await asyncio.wait_for(engine.score(requests[0]), 30)
        await asyncio.wait_for(engine.ended(), 30)


TRANSFORMERS_BACKEND = """
import asyncio, sys
from pathlib import Path
from support.engine_requests import Reference, assert_scores, random_request
from support.tiny_models import SERVABLE, tiny_model
from support.vllm_engines import run_vllm
from tutelage_client.types import Signal

async def main(directory):
    model = tiny_model("gpt_neox", shape=SERVABLE)
    model.save_pretrained(directory)
    request = random_request(0, shape={shape}, signal=Signal(top_k=5, candidates=True, entropy=True))
    reference = Reference(model)
    known = {{s.id: reference.logprobs(request, s) for s in request.sequences}}
    reference.logprobs = lambda request, sequence: known[sequence.id]
    async with run_vllm(directory) as engine:
        for _ in range(2):
            assert_scores(await engine.score(request), request, reference, {tolerance})
        assert engine.counters.rescored == 0
    print("as expected")

asyncio.run(main(Path(sys.argv[1])))
"""


def test_an_architecture_without_a_class_of_vllms_own_is_served_through_transformers(tmp_path: Path) -> None:
    """In a process of its own: vLLM changes the class of transformers, and the reference with it."""
    program = TRANSFORMERS_BACKEND.format(shape=SHAPE, tolerance=TOLERANCE)
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model")],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert "as expected" in ended.stdout, ended.stderr[-3000:]
