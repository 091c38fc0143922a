"""Peak memory of the chunked loss: a fraction of full logits, and independent of the number of tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROBE = """
import json
import torch
from benchmarks.loss import PeakMemory, _problem, chunked_step, plain_step
from student_trainer.objective.compile import compile_plan
from student_trainer.objective.loss import Head, TokenBatch, objective_loss
from student_trainer.objective.settings import ObjectiveSettings

def chunked(problem):
    chunked_step(problem, chunk_rows=32)

def charged(problem):
    # A survey before the pass: the divergences of later tokens.
    rows = len(problem["hidden"])
    settings = ObjectiveSettings(estimator="pathwise", support="full", horizon=2)
    batch = TokenBatch(
        sampled_ids=torch.zeros(rows, dtype=torch.int64),
        behaviour_logprobs=torch.zeros(rows),
        mask=torch.ones(rows, dtype=torch.bool),
        weight=torch.full((rows,), 1 / rows),
        sequence_lengths=torch.tensor([rows]),
    )
    objective_loss(
        problem["hidden"], problem["weight"], None, batch, compile_plan(settings, student_temperature=1.0),
        teacher_hidden=problem["teacher_hidden"], teacher_head=Head(problem["teacher_weight"]), chunk_rows=32,
    ).loss.backward()

torch.set_num_threads(1)
peaks = {}
for name, step, tokens in (
    ("warm", chunked, 8), ("warm", plain_step, 8), ("warm", charged, 8),
    ("chunked", chunked, 256), ("chunked, longer", chunked, 1024), ("plain", plain_step, 256),
    ("charged", charged, 1024),
):
    problem = _problem(tokens, 32, 20_000)
    with PeakMemory(every_seconds=0.0005) as memory:
        step(problem)
    peaks[name] = memory.extra
print(json.dumps(peaks))
"""


def test_peak_memory_is_small_and_does_not_grow_with_tokens() -> None:
    root = Path(__file__).resolve().parents[2]
    # Large blocks go back to the system at once, so that the resident size shows what is alive.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=env, stdout=subprocess.PIPE, check=True, text=True, timeout=120
    )
    peaks = json.loads(done.stdout)
    logits = 256 * 20_000 * 4
    assert peaks["plain"] > 3 * logits
    assert peaks["chunked"] < peaks["plain"] / 5
    assert peaks["chunked, longer"] < 1.3 * peaks["chunked"]
    assert peaks["charged"] < 1.3 * peaks["chunked"]
