"""Whether a teacher takes the largest request that the sampler may make, by the service's own checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from tutelage_client.errors import TutelageError
from tutelage_client.types import ScoreRequest, Sequence

from launcher.doctor_checks import Finding

if TYPE_CHECKING:
    from tutelage_client.types import Limits, Signal

    from student_trainer.config import RunConfig


def check_requests(config: RunConfig, limits: dict[str, Limits]) -> Iterator[Finding]:
    """A group whose every response is of full length should not be refused by a teacher that scores it.

    Responses that are read from a file are as long as they are; nothing is said of them.
    """
    from services.api.validate import check_counts, check_sizes

    if config.sampling.replayed is not None:
        return
    plan, sampling = config.plan(), config.sampling
    group = f"{sampling.samples_per_prompt} responses of {sampling.max_new_tokens:,} tokens"
    for view, (_, signal) in plan.requests.items():
        request = largest_request(config, signal)
        for teacher in plan.teachers_of(view):
            allowed = limits.get(teacher)
            if allowed is None:
                continue
            try:
                check_counts(len(request.sequences), len(request.contexts), allowed)
                check_sizes(request, allowed)
            except TutelageError as error:
                yield Finding(
                    "warn",
                    f"teacher {teacher}",
                    f"would refuse a group of {group} (view {view}): {error.message}; ask for less, "
                    "or raise what it allows, if you start it yourself (--set limits.KEY=VALUE, "
                    "--set service.max_message_bytes=VALUE)",
                )


def largest_request(config: RunConfig, signal: Signal) -> ScoreRequest:
    """What `signal` asks about a group of full-length responses, chunks as late as they may be.

    The context is the prompt, of `data.max_prompt_tokens` or, where nothing bounds it, of one token: a
    context of a view's own may be longer.
    """
    plan, rows = config.plan(), config.sampling.max_new_tokens
    context = np.zeros(config.data.max_prompt_tokens or 1, dtype=np.int32)
    response = np.zeros(rows, dtype=np.int32)
    candidates, anchors = None, None
    if signal.candidates:
        candidates = np.zeros((rows, plan.student_candidates), dtype=np.int32)
    if plan.audit is not None and signal.continuations:
        chunk = plan.audit.chunk_tokens
        anchors = np.arange(rows - chunk, -1, -chunk, dtype=np.int32)[: plan.audit.chunks][::-1]
    sequences = [
        Sequence(str(index), 0, response, candidates, anchors)
        for index in range(config.sampling.samples_per_prompt)
    ]
    return ScoreRequest((context,), tuple(sequences), signal)
