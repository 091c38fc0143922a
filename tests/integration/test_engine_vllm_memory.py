"""Memory of a long response under a large vocabulary: chunks of logits, never all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

# In a process of its own, whose peak is nobody else's. The peak is reset when all is warm.
PROGRAM = """
import asyncio, json, sys
from pathlib import Path
import numpy as np
from support.tiny_models import Shape, save_tiny_model
from support.vllm_engines import run_vllm
from services.teacher.engines.scoring_head import ROWS
from tutelage_client.types import ScoreRequest, Sequence, Signal

VOCAB = 151_936
TOKENS = int(sys.argv[2])

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024

def request(tokens):
    ids = np.random.default_rng(tokens).integers(0, VOCAB, size=tokens + 4).astype(np.int32)
    return ScoreRequest((ids[:4],), (Sequence("0", 0, ids[4:]),), Signal(top_k=64, entropy=True))

async def main(directory):
    shape = Shape(heads=2, kv_heads=1, head_dim=32, intermediate=64, layers=1, vocab=VOCAB, positions=32_768)
    save_tiny_model(directory, shape=shape)
    options = {"max_model_len": 32_768, "max_num_batched_tokens": 8192, "kv_cache_memory_bytes": 64 << 20}
    async with run_vllm(directory, **options) as engine:
        await engine.score(request(300))
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        score = await engine.score(request(TOKENS))
        grown = status("VmHWM") - before
    (answer,) = score.sequences
    arrays = (answer.sampled, answer.top_ids, answer.top_logprobs, answer.entropy)
    print(json.dumps({
        "positions": int(answer.valid.sum()),
        "grown": grown,
        "chunk": ROWS * VOCAB * 4,
        "answer": sum(array.nbytes for array in arrays),
        "seconds": score.usage.compute_ms / 1e3,
    }))

asyncio.run(main(Path(sys.argv[1])))
"""


# What is freed goes back at once: live memory is measured, not the holes of the heap.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


def measure(directory: Path, tokens: int) -> dict[str, float]:
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory / "model"), str(tokens)],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "2", **RETURNED},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    megabytes = {name: f"{figures[name] / 1e6:.0f} MB" for name in ("grown", "chunk", "answer")}
    print(f"{tokens} tokens in {figures['seconds']:.0f} s", megabytes)
    return figures


def check(figures: dict[str, float], tokens: int) -> None:
    assert figures["positions"] == tokens
    assert figures["grown"] <= 2 * figures["chunk"] + figures["answer"]


def test_a_response_of_twelve_hundred_tokens_needs_two_chunks_of_logits(tmp_path: Path) -> None:
    """All its logits would be 730 MB, two chunks are 311 MB."""
    check(measure(tmp_path, 1_200), 1_200)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_response_of_thirty_thousand_tokens_needs_two_chunks_of_logits(tmp_path: Path) -> None:
    """All its logits would be 18 GB."""
    check(measure(tmp_path, 30_000), 30_000)
