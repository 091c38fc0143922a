"""Steps of two ranks over NCCL, each with a GPU of its own, against one process on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.rank_jobs import STEPS, Job, run_alone, run_together, save_models

from student_trainer.sections import LoraSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

JOBS = [
    Job("full weights"),
    Job("tied head", model="tied"),
    Job("adapters", lora=LoraSettings(rank=3)),
    Job("a rank without rows", groups=1, lengths=(7,)),
    Job("diverged on the second rank", poisoned=1, groups=2),
]


def test_two_gpus_make_the_steps_of_one_process(tmp_path: Path) -> None:
    save_models(tmp_path / "models")
    together = run_together(JOBS, tmp_path / "models", tmp_path / "together", device="cuda")
    for job in JOBS:
        alone = run_alone(job, tmp_path / "models", tmp_path / "alone" / job.name)
        pairs = list(zip(together[job.name].figures(), alone.figures(), strict=True))
        assert len(pairs) == STEPS
        for got, expected in pairs:
            assert (got["refused"] is None) == (expected["refused"] is None), job.name
            for name in ("loss", "gradient_norm"):
                assert got[name] == pytest.approx(expected[name], rel=1e-3, nan_ok=True), (job.name, name)
        expected_weights, got_weights = alone.weights(), together[job.name].weights()
        assert got_weights.keys() == expected_weights.keys()
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(
                got_weights[name], tensor, rtol=0, atol=1e-3, msg=f"{job.name}: {name}"
            )
