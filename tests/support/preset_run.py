"""Presets trained in one process: a real queue, teacher replicas, sampler and trainer as tasks of one loop.

Everything a run does is done, but for its processes: the same engines take the same jobs from a Valkey
server, and what the sampler submits and what the trainer steps on is written down on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config
from tutelage.v1.rollout_pb2 import Group, ViewRequest

from services.api.core import ScoringCore
from services.api.metrics import Metrics
from services.queue import Queue
from services.queue.embedded import EmbeddedServer
from services.teacher.build import build_engine
from services.teacher.following import FollowingEngine
from services.teacher.puller import Puller
from services.teacher.settings import TeacherSettings
from student_trainer import train
from student_trainer.channels import channel_directory
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.learner import Learner
from student_trainer.objective.plan import Plan
from student_trainer.objective.presets import load
from student_trainer.ranks import join
from student_trainer.sampler import process as sampler
from student_trainer.step_result import StepResult
from student_trainer.verify import TrainingGroup
from support.text_tokenizer import ROWS, text_tokenizer

HEARTBEAT = 0.5
STEPS, PROMPTS, SAMPLES, K = 2, 3, 4, 8
LETTERS, DIGITS = "abcd", "01"


@dataclass
class Stage:
    """A queue, models and data for runs one after the other; use as a context manager."""

    directory: Path
    models: dict[str, Path] = field(default_factory=dict)
    _references: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._open = contextlib.ExitStack()
        self.server = self._open.enter_context(EmbeddedServer(self.directory / "queue"))
        self.loop = self._open.enter_context(asyncio.Runner())
        self._open.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        self._open.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        for seed, name in enumerate(("student", "big", "small")):
            self.models[name] = write_model(self.directory / name, seed, taught=name == "student")
        self.examples = [example(index) for index in range(64)]
        self.data = self.directory / "examples.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in self.examples))
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def config(self, name: str, objective: Mapping[str, Any], **sections: Mapping[str, Any]) -> RunConfig:
        """The run file of a preset; its support is cut down to K ids."""
        document: dict[str, Any] = {
            "run": {"name": name, "directory": str(self.directory / "runs" / name), "deterministic": True},
            "queue": {"url": self.server.url, "namespace": name, "heartbeat_seconds": HEARTBEAT},
            "student": {"model": str(self.models["student"])},
            "data": {"path": str(self.data), "answer_field": "answer", "checker": "numeric", "holdout": 0.0},
            "sampling": {
                "samples_per_prompt": SAMPLES, "max_new_tokens": 8, "groups_per_order": PROMPTS,
                **sections.get("sampling", {}),
            },
            "objective": {"preset": name, **objective},
            "teachers": {
                teacher: {"model": str(self.models[model])}
                for teacher, model in teachers_of(name).items()
            } | {
                writer: {"model": str(self.models["big"]), "writer": {"temperature": 0.5}}
                for writer in writers_of(objective)
            },
            "training": {
                "steps": STEPS, "prompts_per_step": PROMPTS, "learning_rate": 1e-2, "warmup_steps": 0,
                "max_staleness": 0, "sample_every": 0, "trackers": [],
            },
        }  # fmt: skip
        if load(name).objective.get("k") is not None:
            document["objective"]["k"] = K
        return parse_run_config(document, name)

    def reference(self, model: str) -> Any:
        """The model as transformers runs it, as it began."""
        if model not in self._references:
            loaded = AutoModelForCausalLM.from_pretrained(self.models[model], dtype=torch.float32)
            self._references[model] = loaded.eval()
        return self._references[model]

    def run(self, config: RunConfig) -> Course:
        """Train to the end."""
        return self.loop.run(self._run(config))

    async def _run(self, config: RunConfig) -> Course:
        plan, course = config.plan(), Course(config, config.plan())
        with course.written_down():
            async with contextlib.AsyncExitStack() as stack:
                for teacher in plan.scoring_teachers:
                    await stack.enter_async_context(background(serve(self._teacher(config, plan, teacher))))
                await stack.enter_async_context(background(sampler._serve(config, "sampler-0")))
                with join("cpu", 60.0) as ranks:
                    train._configure_torch(config)
                    assert await asyncio.wait_for(train._train(config, plan, ranks), 120)
        return course

    def _teacher(self, config: RunConfig, plan: Plan, name: str) -> TeacherSettings:
        channel = plan.implied_teachers.get(name)
        source: dict[str, Any] = (
            {"model": config.teachers[name].model}
            if channel is None
            else {"follow": channel_directory(config.run.directory, channel)}
        )
        return TeacherSettings(
            name=name,
            dtype="float32",
            device="cpu",
            deterministic=True,
            queue_url=config.queue.url,
            namespace=config.queue.namespace,
            heartbeat_seconds=HEARTBEAT,
            writer=config.teachers[name].writer if name in config.teachers else None,
            **source,
        )


@dataclass
class Course:
    """What a run did: the groups with what was asked about them, and the steps."""

    config: RunConfig
    plan: Plan
    submitted: dict[int, tuple[Group, tuple[ViewRequest, ...]]] = field(default_factory=dict)
    steps: list[tuple[list[TrainingGroup], StepResult]] = field(default_factory=list)

    @contextlib.contextmanager
    def written_down(self) -> Any:
        """Look on: the calls are made as they are."""
        submit, step = Queue.submit_group, Learner.step

        async def submit_group(queue: Queue, group: Group, requests: Sequence[ViewRequest], **kw: Any) -> Any:
            self.submitted[group.index] = (group, tuple(requests))
            return await submit(queue, group, requests, **kw)

        def one_step(learner: Learner, groups: list[TrainingGroup], number: int, **kw: Any) -> StepResult:
            result = step(learner, groups, number, **kw)
            self.steps.append((list(groups), result))
            return result

        with patch.object(Queue, "submit_group", submit_group), patch.object(Learner, "step", one_step):
            yield

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.config.run.directory / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "step" in record]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.config.run.directory / "student" / "model.safetensors")


def teachers_of(name: str) -> dict[str, str]:
    """The [teachers.NAME] sections that a preset wants, and which model they have."""
    wanted = [view.get("weights", "teacher") for view in load(name).objective.get("views", {}).values()]
    names = ["big" if weights == "teacher" else weights.partition(":")[2] for weights in wanted]
    found = [teacher for teacher, weights in zip(names, wanted, strict=True) if weights.startswith("teacher")]
    return {teacher: "big" if place == 0 else "small" for place, teacher in enumerate(found)}


def writers_of(objective: Mapping[str, Any]) -> list[str]:
    """Teachers that write, of an objective as it stands in a run file."""
    return [objective["audit"]["teacher"]] if "audit" in objective else []


def example(index: int) -> dict[str, Any]:
    """A prompt with every field that a preset's context may name."""
    share = round(0.2 + 0.6 * (index % 5) / 4, 2)
    return {
        "prompt": f"q{index % 7}",
        "answer": DIGITS[index % 2],
        "solution": f"abca{DIGITS[index % 2]}",
        "demonstration": f"dcba{DIGITS[index % 2]}",
        "context": f"say {LETTERS[index % 4]}",
        "hint": f"{LETTERS[index % 4]} first",
        "rubric": "- ends in a digit",
        "english": f"question {index % 7}",
        "path": f"{DIGITS[index % 2]}, hence q{index % 7}",
        "debate": "first: yes. second: no.",
        "weight_first": share,
        "weight_second": round(1 - share, 2),
    }


def write_model(directory: Path, seed: int, *, taught: bool) -> Path:
    """A small Qwen3 with a tokenizer of printable characters.

    The taught one answers with four letters and a digit, so that some answers are right and some wrong.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = text_tokenizer(chat=False)
    if taught:
        _teach(model, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _teach(model: Any, tokenizer: Any) -> None:
    draw = torch.Generator().manual_seed(5)
    letters, digits = (torch.tensor(tokenizer.convert_tokens_to_ids(list(x))) for x in (LETTERS, DIGITS))
    prompts = torch.tensor([tokenizer.encode(f"q{number}") for number in range(7)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    end = torch.ones(32, 1, dtype=torch.int64)
    for _ in range(60):
        asked = prompts[torch.randint(7, (32,), generator=draw)]
        said = letters[torch.randint(4, (32, 4), generator=draw)]
        ids = torch.cat([asked, said, digits[torch.randint(2, (32, 1), generator=draw)], end], dim=1)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < prompts.shape[1], -100)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@contextlib.asynccontextmanager
async def background(work: Any) -> Any:
    """A task that ends with the block; what it fails with is raised."""
    task = asyncio.create_task(work)
    try:
        yield task
        if task.done():
            await task
    finally:
        while not task.done():  # Python 3.11 loses a cancellation now and then
            task.cancel()
            await asyncio.wait({task}, timeout=0.5)


async def serve(settings: TeacherSettings) -> None:
    """A replica without its ports: the engine, the core, and a worker on the teacher's stream."""
    assert settings.queue_url is not None
    engine = build_engine(settings)
    await engine.start()
    core = ScoringCore(
        engine,
        max_queued_tokens=settings.service.max_queued_tokens,
        max_message_bytes=settings.service.max_message_bytes,
        metrics=Metrics(),
    )
    core.open()
    try:
        async with Queue(settings.queue_url, settings.namespace) as queue:
            await Puller(
                core,
                queue,
                teacher=settings.name,
                consumer=f"{settings.name}-0",
                concurrency=4,
                following=engine if isinstance(engine, FollowingEngine) else None,
            ).run()
    finally:
        await engine.close()
