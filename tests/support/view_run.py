"""A run with several views over tagged text: tiny chat models, teachers as real processes, a real queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from tutelage_client.types import Int32Array

from services.queue import LeaseSettings, Queue, ScoredGroup
from student_trainer.config import RunConfig, load_run_config
from student_trainer.policy_store import PolicyStore
from student_trainer.sampler.build import build_sampler
from student_trainer.sampler.groups import SampledGroup
from support.text_tokenizer import ROWS, text_tokenizer
from support.training_run import HEARTBEAT

# The student, two experts, and the student as it was: its scores differ by what it sees alone.
SEEDS = {"student": 1, "maths": 2, "prose": 3, "self": 1}

RUN_FILE = """
[run]
name = "{name}"
directory = "{directory}"
seed = 5
deterministic = true
threads = 1

[queue]
url = "{url}"
heartbeat_seconds = {heartbeat}

[teachers.maths]
model = "{root}/maths"

[teachers.prose]
model = "{root}/prose"

[teachers.self]
model = "{root}/self"

[student]
model = "{root}/student"

[data]
path = "{root}/{rows}"
answer_field = "answer"
tag_field = "kind"
holdout = 0.0
shuffle = false

[sampling]
samples_per_prompt = 3
max_new_tokens = 6
groups_per_order = 4
batch_size = 12
{sampling}

[objective]
{objective}

[training]
prompts_per_step = 4
learning_rate = 1e-2
steps = 3
sample_every = 1
trackers = []
{training}
"""


def write_model(directory: Path, seed: int) -> None:
    """A random Qwen3 that reads ChatML, one character a token."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    text_tokenizer(chat=True).save_pretrained(directory)


@dataclass(frozen=True)
class ViewRuns:
    """Run files over the models and rows of one directory."""

    root: Path
    url: str

    def write_rows(
        self, name: str, answers: Mapping[int, str], *, count: int = 12, long: Collection[int] = ()
    ) -> None:
        """Rows of two kinds in turn; `answers` by row, others cannot be met; `long` ones have no room."""
        rows = [
            {
                "prompt": f"{i}?",
                "answer": answers.get(i, "never"),
                "solution": "x" * 300 if i in long else f"sol {i}",
                "kind": ("a", "p")[i % 2],
                "trust": 0.5 + i,
            }
            for i in range(count)
        ]
        (self.root / name).write_text("\n".join(json.dumps(row) for row in rows))

    def config(
        self, name: str, objective: str, *, rows: str = "rows.jsonl", sampling: str = "", training: str = ""
    ) -> RunConfig:
        file = self.root / f"{name}.toml"
        file.write_text(
            RUN_FILE.format(
                name=name,
                directory=self.root / name,
                url=self.url,
                heartbeat=HEARTBEAT,
                root=self.root,
                rows=rows,
                objective=objective,
                sampling=sampling,
                training=training,
            )
        )
        return load_run_config(file)

    def sample(self, config: RunConfig, indices: Sequence[int]) -> list[SampledGroup]:
        """Sampled here, with the student before training as policy version 0."""
        store = PolicyStore(config.run.directory / "policy")
        if store.get(0) is None:
            store.publish(0, lambda directory: write_model(directory, SEEDS["student"]), lineage=())
        first = store.get(0)
        assert first is not None
        _, sampler = build_sampler(config, first)
        return sampler.sample(indices, 0)

    def score(self, config: RunConfig, groups: Sequence[SampledGroup]) -> list[ScoredGroup]:
        """Through the queue and whatever teachers listen there, by index."""
        return asyncio.run(self._score(config, groups))

    async def _score(self, config: RunConfig, groups: Sequence[SampledGroup]) -> list[ScoredGroup]:
        lease = LeaseSettings(heartbeat=HEARTBEAT)
        async with Queue(self.url, config.queue.namespace, lease=lease) as queue, asyncio.timeout(60):
            for sampled in groups:
                await queue.submit_group(sampled.group, sampled.requests)
            reader, found = queue.scored(config.run.name), list[ScoredGroup]()
            while len(found) < len(groups):
                found += await reader.read(16, 200)
        return sorted(found, key=lambda scored: scored.group.index)


def reference_logprobs(model: Any, context: Int32Array, response: Int32Array) -> np.ndarray[Any, Any]:
    """float32 [R]: log p(response[t] | context, response[:t]) by a plain forward of transformers."""
    ids = torch.from_numpy(np.concatenate([context, response]).astype(np.int64))
    with torch.inference_mode():
        logprobs = model(ids[None]).logits[0].float().log_softmax(-1)
    found: np.ndarray[Any, Any] = (
        logprobs[len(context) - 1 : -1].gather(1, ids[len(context) :, None])[:, 0].numpy()
    )
    return found
