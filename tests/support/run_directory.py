"""A run directory as the trainer leaves it, written line by line in the documented format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

STEPS = 40


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    """One metrics line of a training step."""
    line = {
        "step": step,
        "policy_version": step,
        "loss": 1.0 / step,
        "kl": 0.8 / step,
        "staleness_mean": 1.0,
        "tokens_sampled": 1000 * step,
        "tokens_scored": 1000 * step,
        "sampled_tokens_per_second": 5000.0,
        "scored_tokens_per_second": 9000.0,
        "trained_tokens_per_second": 14000.0,
    }
    return line | changes


def evaluation_line(version: int, greedy: float, sampled: float) -> dict[str, Any]:
    """One metrics line of an evaluation."""
    body = {"policy_version": version, "prompts": 500, "greedy": greedy, "sampled": sampled}
    return {"evaluation": body}


def rollout_line(**changes: Any) -> dict[str, Any]:
    """One rollout of four tokens: liked, disliked, agreed on, not scored."""
    line: dict[str, Any] = {
        "step": 10,
        "group": "run-7",
        "prompt_text": "1+2=",
        "token_ids": [4, 5, 6, 7],
        "token_texts": ["3", "9", "\n", "<eos>"],
        "student_logprobs": [-1.0, -0.5, -0.2, -0.1],
        "teacher_logprobs": [-0.25, -6.5, -0.21, None],
        "teacher_top": [[["3", -0.25], ["4", -2.0]], [["2", -0.01]], [["\n", -0.21]], []],
        "reward": 0.0,
    }
    return line | changes


def write_run(directory: Path, metrics: list[dict[str, Any]], rollouts: list[dict[str, Any]]) -> Path:
    """Write metrics.jsonl and samples/; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (directory / "samples").mkdir(exist_ok=True)
    with gzip.open(directory / "samples" / "step-00000010.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in rollouts)
    return directory


def full_run(directory: Path) -> Path:
    """A finished run with everything a report can show."""
    metrics = [evaluation_line(0, 0.26, 0.19)]
    for step in range(1, STEPS + 1):
        metrics.append(step_line(step))
        if step % 20 == 0:
            metrics.append(evaluation_line(step, 0.9 + step / 1000, 0.9))
    outcome = {
        "rows": [
            {"name": name, "greedy": a, "greedy_error": 0.01, "sampled": b, "sampled_error": 0.02, "kl": kl}
            for name, a, b, kl in (
                ("teacher", 1.0, 0.989, 0.0),
                ("student before", 0.26, 0.19, 0.91),
                ("student after", 0.94, 0.9, 0.024),
            )
        ],
        "totals": {"wall_seconds": 131.0, "tokens_sampled": 40000, "tokens_scored": 40000},
    }
    write_run(directory, metrics, [rollout_line()])
    (directory / "outcome.json").write_text(json.dumps(outcome))
    return directory
