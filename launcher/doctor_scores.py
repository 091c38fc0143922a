"""What `tutelage doctor` sees of a run's score files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tutelage_client.errors import TutelageError

from launcher.doctor_checks import Finding
from launcher.model_facts import ModelFacts

if TYPE_CHECKING:
    from tutelage_client.types import Limits

    from student_trainer.config import RunConfig


def check_scores(config: RunConfig, student: ModelFacts | None) -> Iterator[Finding]:
    """Whether every score file is there and fits, and whether who scores is who wrote what came before."""
    from services.score_file import ScoreFile
    from student_trainer.cached_scores import check_cached_scores, score_files

    for name, path in score_files(config):
        try:
            file = ScoreFile(path)
        except TutelageError:
            continue  # among the problems below
        identity = file.header.identity
        yield Finding("ok", name, f"{path}: {len(file):,} responses, scored by {identity.model}")
    found = check_cached_scores(config, config.plan(), None if student is None else student.fingerprint)
    for problem in found.problems:
        yield Finding("fail", "score file", problem)
    for warning in found.warnings:
        yield Finding("warn", "score file", warning)
    if config.sampling.replayed is None:
        for name in config.plan().scoring_teachers:
            if (entry := config.teachers.get(name)) is not None and entry.scores is not None:
                yield Finding(
                    "warn",
                    f"teacher {name}",
                    f"answers only what is in its file, and [sampling] sampler = {config.sampling.sampler!r} "
                    f'writes new responses; "file:{entry.scores}" replays the file\'s',
                )


def cached_limits(config: RunConfig, name: str, limits: Limits) -> Limits:
    """What teacher `name` accepts: `limits`, narrowed to what its score file has."""
    from services.score_file import file_limits, read_header

    path = config.all_teachers()[name].scores
    try:
        return limits if path is None else file_limits(read_header(path), limits)
    except TutelageError:
        return limits  # check_scores says what is wrong with the file
