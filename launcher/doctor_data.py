"""What `tutelage doctor` sees of a run's data: whether it can be read, and what its first rows lack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage_client.errors import TutelageError

from launcher.doctor_checks import Finding
from launcher.model_facts import ModelFacts, NotHere, read_tokenizer

if TYPE_CHECKING:
    from student_trainer.config import RunConfig

FIRST = 64  # examples that are looked at


def check_data(config: RunConfig) -> Finding:
    """Where prompts come from; on this machine every prompt is read, as samplers do."""
    from student_trainer.sampler.data import load_prompts

    data = config.data
    if data.task is not None:
        return Finding("ok", "data", f"built-in task {data.task!r}")
    if not _is_here(config):
        return Finding("unknown", "data", f"{data.dataset}: a hub data set, not fetched to check it")
    if data.path is not None and not data.path.is_file():
        return Finding("fail", "data", f"{data.path}: there is no such file")
    try:
        prompts = load_prompts(data.model_copy(update={"max_prompt_tokens": None}), seed=config.run.seed)
        for group in range(min(FIRST, len(prompts.training))):
            prompts.example(group)
    except TutelageError as error:
        return Finding("fail", "data", error.message)
    count, held_out = len(prompts.training), len(prompts.evaluation)
    return Finding("ok", "data", f"{data.path or data.dataset}: {count:,} prompts, {held_out:,} are held out")


def check_prompts(config: RunConfig, student: ModelFacts | None) -> Iterator[Finding]:
    """Whether the student's tokenizer knows what the first prompts say, and its positions hold them."""
    from student_trainer.sampler.data import load_prompts
    from student_trainer.sampler.prompts import PromptEncoder

    if student is None or not _is_here(config):
        return
    data = config.data.model_copy(update={"max_prompt_tokens": None})
    try:
        tokenizer = read_tokenizer(config.student.model, config.student.revision, download=False)
        prompts = load_prompts(data, seed=config.run.seed)
        examples = [prompts.example(group) for group in range(min(FIRST, len(prompts.training)))]
    except (NotHere, TutelageError):
        return  # said elsewhere
    if tokenizer is None:
        return
    try:
        encoded = PromptEncoder(tokenizer, data).encode(examples)
    except TutelageError as error:
        yield Finding("fail", "prompts", error.message)
        return
    count = len(encoded)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unread := sum(unknown is not None and unknown in prompt.ids for prompt in encoded):
        message = f"{unread} of the first {count} prompts have text that the tokenizer does not know, "
        yield Finding("warn", "prompts", f"{message}{tokenizer.unk_token!r} to the student")
    longest, limit = max(len(prompt.ids) for prompt in encoded), config.data.max_prompt_tokens
    wanted = min(longest, limit or longest) + config.sampling.max_new_tokens
    if student.max_tokens is not None and wanted > student.max_tokens:
        yield Finding(
            "warn",
            "prompts",
            f"one of the first {count} has {longest:,} tokens, with [sampling] max_new_tokens {wanted:,}; "
            f"the student takes {student.max_tokens:,}. [data] max_prompt_tokens leaves longer prompts out",
        )


def _is_here(config: RunConfig) -> bool:
    return config.data.dataset is None or Path(config.data.dataset).is_dir()
