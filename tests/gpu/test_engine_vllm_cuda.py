"""The vLLM engine on a GPU, against plain float32 forwards on the CPU."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine_requests import Reference, assert_scores, random_request, shuffled
from support.sequence_bank import Bank
from support.tiny_models import Shape, save_tiny_model, tiny_model
from support.vllm_engines import LONGEST, run_vllm
from tutelage_client.types import Score, ScoreRequest, Sequence, Signal

from services.models.vllm_adapter import Residue
from services.teacher.engines.scoring_head import ROWS
from services.teacher.engines.vllm.engine import VllmEngine

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]

TOLERANCE = 1e-4
SERVABLE = Shape(heads=2, kv_heads=1, head_dim=64, intermediate=128, moe_intermediate=64, window=40)
GPT2 = Shape(heads=2, kv_heads=1, head_dim=64, intermediate=128, layer_scaled_attention=False)
SPREAD = 0.2  # over 128 numbers: logits as far apart as those of the tests on a CPU
ARCHITECTURES = ["qwen3", "llama", "gemma2", "gemma3", "mistral", "gpt2", "granite", "qwen3_moe"]


def shape_of(architecture: str) -> Shape:
    return GPT2 if architecture == "gpt2" else SERVABLE


async def score_all(engine: VllmEngine, requests: list[ScoreRequest]) -> list[Score]:
    return list(await asyncio.gather(*(engine.score(request) for request in requests)))


async def check_mixed(engine: VllmEngine, bank: Bank, count: int = 40) -> None:
    """Cold, then warm and shuffled."""
    requests = bank.requests(1, count)
    for asked in (requests, [shuffled(request, 1) for request in reversed(requests)]):
        for request, score in zip(asked, await score_all(engine, asked), strict=True):
            assert_scores(score, request, bank, TOLERANCE)
    assert engine.counters.rescored == 0
    assert engine.counters.tokens_reused > 0


@pytest.mark.parametrize("eager", [True, False])
async def test_mixed_requests_equal_plain_float32(tmp_path: Path, eager: bool) -> None:
    """Prefill in pieces, prefix cache cold and warm; with vLLM's compiled model and without."""
    model = tiny_model(spread=SPREAD, shape=SERVABLE)
    model.save_pretrained(tmp_path / "model")
    bank = Bank(model)
    async with run_vllm(tmp_path / "model", enforce_eager=eager) as engine:
        print(engine._engine and engine._engine.facts)
        await check_mixed(engine, bank)
        assert await engine.residue() == Residue(requests=0, worker_requests=0, blocks=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_every_signal_equals_plain_float32(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, spread=SPREAD, shape=shape_of(architecture))
    model.save_pretrained(tmp_path / "model")
    async with run_vllm(tmp_path / "model", enforce_eager=True) as engine:
        await check_mixed(engine, Bank(model, count=12), count=16)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
async def test_bfloat16_stays_near_float32_of_the_same_weights(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, spread=0.05, shape=SERVABLE).to(torch.bfloat16)
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


async def test_new_weights_score_and_what_is_not_finite_stays_in_its_sequence(tmp_path: Path) -> None:
    models = [tiny_model(seed=seed, spread=SPREAD, shape=SERVABLE) for seed in range(2)]
    for seed, model in enumerate([*models, models[0]]):
        model.save_pretrained(tmp_path / str(seed))
    state = load_file(tmp_path / "2" / "model.safetensors")
    state["model.embed_tokens.weight"][60] = torch.nan
    save_file(state, tmp_path / "2" / "model.safetensors")
    banks = [Bank(model, count=12) for model in models]
    blocks = {"num_gpu_blocks_override": 160}
    async with run_vllm(tmp_path / "0", enforce_eager=True, engine_args=blocks) as engine:
        for number in (0, 1, 2, 0):
            await engine.load_weights(tmp_path / str(number), number)
            bank = banks[number % 2]
            requests = bank.requests(number, 24)
            for request, score in zip(requests, await score_all(engine, requests), strict=True):
                assert score.identity.weights_version == number
                if number < 2:
                    assert_scores(score, request, bank, TOLERANCE)
                    continue
                for answer, sequence in zip(score.sequences, request.sequences, strict=True):
                    read = np.concatenate([request.contexts[sequence.context], sequence.response_ids[:-1]])
                    assert answer.valid is not None
                    assert answer.valid.all() == (60 not in read)


async def test_the_stock_way_scores_given_ids(tmp_path: Path) -> None:
    """Candidates too, where the model runner knows prompt_logprob_token_ids."""
    model = tiny_model(spread=SPREAD, shape=SERVABLE)
    model.save_pretrained(tmp_path / "model")
    bank = Bank(model, count=12, longest=LONGEST - 1)
    async with run_vllm(tmp_path / "model", implementation="stock", enforce_eager=True) as engine:
        signals = [Signal(), Signal(top_k=5), Signal(sampled=False, top_k=1)]
        if engine.limits.max_candidates:
            signals += [Signal(candidates=True), Signal(candidates=True, top_k=3)]
        requests = bank.requests(1, 20, signals)
        for _ in range(2):
            for request, score in zip(requests, await score_all(engine, requests), strict=True):
                assert_scores(score, request, bank, TOLERANCE)
        print("candidates", engine.limits.max_candidates)


async def test_a_long_response_needs_two_chunks_of_logits(tmp_path: Path) -> None:
    """30,000 tokens under 151,936 words: all their logits would be 18 GB."""
    vocab, tokens = 151_936, 30_000
    shape = Shape(heads=2, kv_heads=1, head_dim=64, intermediate=128, layers=1, vocab=vocab, positions=32_768)
    save_tiny_model(tmp_path / "model", shape=shape)
    options = {
        "max_model_len": 32_768,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": True,
    }
    ids = np.random.default_rng(0).integers(0, vocab, size=tokens + 4).astype(np.int32)
    request = ScoreRequest((ids[:4],), (Sequence("0", 0, ids[4:]),), Signal(top_k=64, entropy=True))
    warm = ScoreRequest((ids[:4],), (Sequence("0", 0, ids[4:9000]),), request.signal)
    async with run_vllm(tmp_path / "model", **options) as engine:
        await engine.score(warm)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        (answer,) = (await engine.score(request)).sequences
        grown = torch.cuda.max_memory_allocated() - before
    assert answer.valid is not None
    assert answer.valid.all()
    print(f"grew by {grown / 1e6:.0f} MB")
    packed, step = tokens * (2 + 2 * 64 + 1) * 4, 8192 * shape.hidden * 4 * 16
    assert grown <= 2 * ROWS * vocab * 4 + 2 * packed + step
