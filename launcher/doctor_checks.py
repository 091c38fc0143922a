"""The checks behind `tutelage doctor`: each compares two things a run file names and says what it saw."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from tutelage_client.errors import TutelageError

from launcher.model_facts import ModelFacts
from launcher.replica_sets import replica_sets

if TYPE_CHECKING:
    from tutelage_client.types import Limits, Teacher

    from student_trainer.config import RunConfig

Level = Literal["ok", "warn", "fail", "unknown"]
BYTES = {"float32": 4, "bfloat16": 2}
VLLM_MISSING = "vLLM is not installed: on a CPU `make setup` does it, with a GPU pip install 'tutelage[vllm]'"
ACTIVATION_SHARE = 1.25  # room for activations and fragmentation on top of what is counted exactly


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's table."""

    level: Level
    subject: str
    message: str


def check_objective(
    config: RunConfig, limits: dict[str, Limits], student: ModelFacts | None = None
) -> Iterator[Finding]:
    """What the objective asks for, its warnings, and whether student and teachers can serve it."""
    from student_trainer.objective.compile import check_limits

    plan = config.plan()
    if plan.needs_teacher:
        asked = ", ".join(
            f"{view} asks {' or '.join(plan.teachers_of(view))} for {_signal_words(signal)}"
            for view, (_, signal) in plan.view_requests.items()
        )
        yield Finding("ok", "objective", f"{plan.divergence} on {plan.support}, {plan.estimator}; {asked}")
    else:
        alone = "a reward" if plan.audit is None else "an audit"
        yield Finding("ok", "objective", f"{alone} alone; no teacher is asked for log-probabilities")
    if plan.judge is not None:
        yield Finding("ok", "objective", f"the reward is what {plan.judge} judges")
    if (audit := plan.audit) is not None:
        yield Finding(
            "ok",
            "objective",
            f"{audit.teacher} writes {audit.continuations} continuations at each of up to {audit.chunks} "
            f"chunks of {audit.chunk_tokens} tokens of a response",
        )
    for warning in plan.warnings:
        yield Finding("warn", "objective", warning)
    if student is not None and plan.student_candidates > student.vocab_size:
        wanted, has = plan.student_candidates, student.vocab_size
        yield Finding("fail", "objective", f"objective.k: got {wanted}, the student has {has} tokens")
    busy = {*plan.scoring_teachers, config.sampling.sampler.removeprefix("teacher:")}
    for teacher, allowed in limits.items():
        problems = check_limits(plan, teacher, allowed)
        for problem in problems:
            yield Finding("fail", f"teacher {teacher}", problem)
        if teacher not in busy:
            yield Finding("warn", f"teacher {teacher}", "nothing asks it; is a view's name misspelt?")
        elif not problems:
            beside = {plan.judge: "judges", None if audit is None else audit.teacher: "writes"}
            words = beside.get(teacher, f"top_k up to {allowed.max_top_k}")
            yield Finding("ok", f"teacher {teacher}", f"serves the objective ({words})")
        longest = config.sampling.max_new_tokens
        if longest >= allowed.max_sequence_tokens:
            yield Finding(
                "fail",
                f"teacher {teacher}",
                f"scores sequences up to {allowed.max_sequence_tokens} tokens, "
                f"[sampling] max_new_tokens is {longest} before any prompt",
            )


def _signal_words(signal: object) -> str:
    parts = [name for name in ("sampled", "candidates", "entropy") if getattr(signal, name)]
    top_k: int = getattr(signal, "top_k", 0)
    if top_k:
        parts.append(f"top {top_k}")
    return " + ".join(parts)


def check_match(student: ModelFacts, teacher: str, facts: ModelFacts) -> Iterator[Finding]:
    """Tokenizer and vocabulary of a teacher whose files are here against the student's."""
    yield from compare_fingerprints(student, teacher, facts.fingerprint)
    yield from compare_vocabularies(student, teacher, facts.vocab_size)


def check_served(student: ModelFacts | None, name: str, served: Teacher) -> Iterator[Finding]:
    """A teacher that somebody else runs, as it describes itself."""
    subject = f"teacher {name}"
    identity = served.identity
    described = f"{identity.model} on {identity.engine} {identity.engine_version}, {identity.dtype}"
    if not served.ready:
        yield Finding("warn", subject, f"answers but accepts no requests now: {described}")
    else:
        yield Finding("ok", subject, f"ready: {described}")
    if student is not None:
        yield from compare_fingerprints(student, name, identity.tokenizer_fingerprint or None)
        yield from compare_vocabularies(student, name, identity.vocab_size)


def compare_fingerprints(student: ModelFacts, teacher: str, fingerprint: str | None) -> Iterator[Finding]:
    """Ids must mean the same text on both sides."""
    subject = f"tokenizer of {teacher}"
    if student.fingerprint is None or fingerprint is None:
        missing = student.name if student.fingerprint is None else teacher
        yield Finding("unknown", subject, f"not compared: {missing} has no tokenizer files")
    elif student.fingerprint == fingerprint:
        yield Finding("ok", subject, f"the same as the student's ({fingerprint[:12]}…)")
    else:
        yield Finding(
            "fail",
            subject,
            f"fingerprint {fingerprint[:12]}… differs from the student's {student.fingerprint[:12]}…; "
            "token ids would mean different text, and every score would be refused",
        )


def compare_vocabularies(student: ModelFacts, teacher: str, rows: int) -> Iterator[Finding]:
    """The teacher must be able to score every id the student can produce."""
    subject = f"vocabulary of {teacher}"
    if rows == student.vocab_size:
        yield Finding("ok", subject, f"{rows:,} rows, as the student's")
        return
    both = f"{rows:,} rows, the student has {student.vocab_size:,}"
    used = student.tokenizer_size
    if used is not None and used <= min(rows, student.vocab_size):
        yield Finding("ok", subject, f"{both}; the tokenizer uses {used:,}, the rest is padding")
    elif rows < student.vocab_size:
        yield Finding("fail", subject, f"{both}; the student can produce ids that this teacher cannot score")
    else:
        yield Finding("warn", subject, f"{both}; the teacher can name ids that the student does not have")


def check_adapters(config: RunConfig) -> Iterator[Finding]:
    """Adapters that are here, and which teachers one engine serves."""
    from services.models.adapters import read_adapter

    for name, entry in config.teachers.items():
        if entry.adapter is None or entry.address is not None:
            continue
        try:
            adapter = read_adapter(name, entry.adapter)
        except TutelageError as error:
            yield Finding("fail", f"teacher {name}", error.message)
        else:
            modules = ", ".join(sorted(adapter.targets))
            yield Finding("ok", f"teacher {name}", f"adapter of rank {adapter.rank} on {modules}")
    for replicas in replica_sets(config.teachers):
        if len(replicas.teachers) > 1:
            subject = f"teachers {', '.join(replicas.teachers)}"
            yield Finding("ok", subject, f"share each of {replicas.entry.replicas} vLLM engines")


def check_hidden(
    config: RunConfig, student: ModelFacts | None, teachers: dict[str, ModelFacts]
) -> Iterator[Finding]:
    """Hidden states that are compared have to be of one width, and of layers that both have."""
    plan = config.plan()
    if plan.hidden is None or student is None:
        return
    if plan.hidden.layers[-1] > student.layers:
        message = f"layer {plan.hidden.layers[-1]} is asked for, the student has {student.layers}"
        yield Finding("fail", "objective.hidden", message)
    for name in plan.scoring_teachers:
        facts = teachers.get(name)
        if facts is not None and facts.width != student.width:
            message = f"states of {name} have {facts.width} numbers, the student's {student.width}"
            yield Finding("fail", "objective.hidden", message)


def check_lengths(config: RunConfig, name: str, facts: ModelFacts) -> Iterator[Finding]:
    """A response of full length must fit into the model's positions."""
    wanted = config.sampling.max_new_tokens + (config.data.max_prompt_tokens or 0)
    if facts.max_tokens is not None and wanted >= facts.max_tokens:
        yield Finding(
            "fail",
            name,
            f"takes {facts.max_tokens:,} tokens; prompt and max_new_tokens may come to {wanted:,}",
        )
    entry = config.teachers.get(name.removeprefix("teacher "))
    if entry is None or entry.judge is None or facts.max_tokens is None:
        return
    if entry.judge.max_new_tokens >= facts.max_tokens:
        yield Finding(
            "fail",
            name,
            f"takes {facts.max_tokens:,} tokens; its reply alone may have judge.max_new_tokens = "
            f"{entry.judge.max_new_tokens:,}, before any question",
        )


def check_budgets(config: RunConfig) -> Iterator[Finding]:
    """Token budgets that contradict each other."""
    sampling, training = config.sampling, config.training
    group = sampling.samples_per_prompt * sampling.max_new_tokens
    if group > config.queue.max_queued_tokens:
        yield Finding(
            "fail",
            "queue",
            f"one group may have {group:,} tokens, [queue] max_queued_tokens allows "
            f"{config.queue.max_queued_tokens:,}: it could never be submitted",
        )
    if sampling.max_new_tokens > training.micro_batch_tokens:
        yield Finding(
            "warn",
            "training",
            f"a full response has {sampling.max_new_tokens:,} tokens, more than micro_batch_tokens "
            f"{training.micro_batch_tokens:,}: it takes a pass of its own",
        )
    if config.plan().preference is not None and group > training.micro_batch_tokens:
        yield Finding(
            "warn",
            "training",
            f"one group may have {group:,} tokens, more than micro_batch_tokens "
            f"{training.micro_batch_tokens:,}: with objective.preference it is never cut, and takes a pass, "
            "and memory, of its own",
        )


def check_vllm(config: RunConfig) -> Iterator[Finding]:
    """vLLM must be here for the processes that compute with it here."""
    users = [
        f"teacher {name}"
        for name, entry in config.all_teachers().items()
        if entry.engine == "vllm" and entry.address is None
    ]
    if config.sampling.engine == "vllm":
        users.append("sampling")
    if users and find_spec("vllm") is None:
        yield Finding("fail", "vllm", f"{VLLM_MISSING} ({', '.join(users)})")
    elif users:
        yield Finding("ok", "vllm", f"installed, for {', '.join(users)}")
    wanted = config.sampling.max_new_tokens + (config.data.max_prompt_tokens or 0)
    for name, entry in config.all_teachers().items():
        longest = entry.vllm.max_model_len
        if longest is not None and wanted >= longest:
            yield Finding(
                "fail",
                f"teacher {name}",
                f"vllm.max_model_len is {longest:,}; prompt and max_new_tokens may come to {wanted:,}",
            )


@dataclass(frozen=True, slots=True)
class Demand:
    """Memory one process wants on one device ("cpu" or "cuda")."""

    process: str
    device: str
    bytes: int


def demands(config: RunConfig, student: ModelFacts | None, teachers: dict[str, ModelFacts]) -> list[Demand]:
    """Weights, gradients and optimizer states are counted exactly, activations by a rule of thumb."""
    found = []
    served = {replicas.name: replicas.entry for replicas in replica_sets(config.teachers)}
    for name, entry in {**served, **config.implied_teachers()}.items():
        if (facts := teachers.get(name)) is None:
            continue
        size = facts.parameters * BYTES[entry.dtype] * ACTIVATION_SHARE
        size += entry.vllm.kv_cache_memory_bytes or 0
        found += [
            Demand(f"{name}-{replica}", _device(entry.device), round(size))
            for replica in range(entry.replicas)
        ]
    if student is not None:
        entry_bytes = BYTES[config.student.dtype]
        device = _device(config.student.device)
        # AdamW in float32: weights, gradients and two moments; a lower dtype keeps a copy for the forward.
        trained = 16 + (entry_bytes if config.student.dtype != "float32" else 0)
        per_parameter = trained if config.student.lora is None else entry_bytes + 1
        found.append(Demand("trainer", device, round(student.parameters * per_parameter * ACTIVATION_SHARE)))
        sampler = round(student.parameters * entry_bytes * ACTIVATION_SHARE)
        found += [Demand(f"sampler-{index}", device, sampler) for index in range(config.sampling.replicas)]
    return found


def _device(setting: str) -> str:
    if setting != "auto":
        return setting.split(":", maxsplit=1)[0]
    return "cuda" if available("cuda") else "cpu"


def available(device: str) -> int:
    """Bytes of memory this machine has on a kind of device; 0 where there is none."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import torch

    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


def check_memory(wanted: list[Demand]) -> Iterator[Finding]:
    """The sum per kind of device against what this machine has."""
    for device in sorted({demand.device for demand in wanted}):
        here = [demand for demand in wanted if demand.device == device]
        total = sum(demand.bytes for demand in here)
        parts = ", ".join(f"{demand.process} {_gigabytes(demand.bytes)}" for demand in here)
        has = available(device)
        if has == 0:
            yield Finding(
                "unknown",
                f"memory ({device})",
                f"about {_gigabytes(total)} wanted ({parts}); no {device} here",
            )
        else:
            level: Level = "ok" if total <= 0.9 * has else "fail"
            yield Finding(
                level,
                f"memory ({device})",
                f"about {_gigabytes(total)} of {_gigabytes(has)} wanted ({parts})",
            )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
