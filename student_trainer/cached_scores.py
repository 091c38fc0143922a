"""Whether the score files of a run fit it, and whether who scores is who wrote what came before.

Lightning OPD (Wu, Han, Cai, 2026, arXiv 2604.13010): offline distillation from responses of a student that
was fine-tuned on a teacher's data has the optimum of the live one only if that very teacher scores them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tutelage_client.errors import TutelageError

from services.score_file import ScoreFile, ScoreHeader, check_signal, read_header
from student_trainer.config import RunConfig
from student_trainer.objective.plan import Plan

CONSISTENT_PRESETS = ("lightning",)  # their papers want one teacher before and now


@dataclass(frozen=True, slots=True)
class CachedScores:
    """What is wrong with a run's score files, as sentences: what would fail, and what one should know."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def raise_for_problems(self) -> None:
        """Raises FAILED_PRECONDITION with all of them."""
        if self.problems:
            raise TutelageError("FAILED_PRECONDITION", "; ".join(self.problems))


def check_cached_scores(config: RunConfig, plan: Plan, fingerprint: str | None) -> CachedScores:
    """Look at the headers of every score file that the run names.

    Args:
        fingerprint: of the student's tokenizer; None when it is not known, and then not compared.
    """
    headers: dict[str, ScoreHeader] = {}
    problems: list[str] = []
    for name, path in score_files(config):
        try:
            headers[name] = read_header(path)
        except TutelageError as error:
            problems.append(f"{name}: {error.message}")
    for name, path in score_files(config):
        if name in headers:
            problems += _misfits(name, path, headers[name], plan, fingerprint)
    if config.sampling.replayed is not None and "sampling.sampler" in headers:
        problems += _unfit_rollouts(config.sampling.replayed, plan)
    return CachedScores(tuple(problems), tuple(_inconsistencies(config, plan, headers)))


def score_files(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Every score file by where the run file names it."""
    for name, entry in config.teachers.items():
        if entry.scores is not None:
            yield f"teachers.{name}.scores", entry.scores
    if config.sampling.replayed is not None:
        yield "sampling.sampler", config.sampling.replayed


def _misfits(
    name: str, path: Path, header: ScoreHeader, plan: Plan, fingerprint: str | None
) -> Iterator[str]:
    theirs = header.identity.tokenizer_fingerprint
    if fingerprint is not None and theirs != fingerprint:
        yield (
            f"{name}: {path} was written with tokenizer {theirs[:12] or 'none'}, the student has "
            f"{fingerprint[:12]}; token ids of one mean other text to the other"
        )
    if name == "sampling.sampler":
        return
    teacher = name.split(".", 1)[1].rsplit(".", 1)[0]
    for view, (_, signal) in plan.view_requests.items():
        if teacher not in plan.teachers_of(view):
            continue
        try:
            check_signal(path, header, signal)
        except TutelageError as error:
            yield f"{name}: view {view!r} asks for what it has not: {error.message}"


def _unfit_rollouts(path: Path, plan: Plan) -> Iterator[str]:
    """What the first response tells of all; each is looked at once more when it is replayed."""
    file = ScoreFile(path)
    if not len(file):
        yield f"sampling.sampler: {path} holds no response"
        return
    first = file.row(0)
    if first.behaviour_logprobs is None:
        yield f"sampling.sampler: {path} has no behaviour_logprobs, which training on its responses needs"
    if first.sampling_temperature not in (None, plan.sampling_temperature):
        yield (
            f"sampling.sampler: the responses of {path} were sampled at temperature "
            f"{first.sampling_temperature}, [sampling] temperature is {plan.sampling_temperature}"
        )


def _inconsistencies(config: RunConfig, plan: Plan, headers: dict[str, ScoreHeader]) -> Iterator[str]:
    """The condition of Lightning OPD, for runs that replay responses and for its preset."""
    if plan.preset not in CONSISTENT_PRESETS and config.sampling.replayed is None:
        return
    yield from _unsaid(config, headers)
    for teacher in plan.scoring_teachers:
        entry = config.teachers.get(teacher)
        header = headers.get(f"teachers.{teacher}.scores")
        said = {header.written_by if header else "", config.data.written_by or ""} - {""}
        scoring = _names(entry.model, entry.revision) if entry else set()
        if header is not None:
            scoring = _names(header.identity.model, header.identity.revision)
        if not said:
            yield (
                "[data] written_by: it is not known which model wrote what the student was trained on "
                f"before; unless teacher {teacher!r} did, fixed responses lead it somewhere else"
            )
        elif not scoring:
            yield f"teacher {teacher!r}: its model is not known here; it should be {', '.join(sorted(said))}"
        for writer in sorted(said):
            if scoring and not _names(writer, None) & scoring:
                yield (
                    f"teacher {teacher!r} is {min(scoring, key=len)}, but {writer} wrote what the student "
                    "was trained on before; fixed responses then lead it somewhere else"
                )


def _unsaid(config: RunConfig, headers: dict[str, ScoreHeader]) -> Iterator[str]:
    """A behaviour's log-probabilities at another temperature would be trained on as if they were at this."""
    path = config.sampling.replayed
    if path is None or "sampling.sampler" not in headers:
        return
    file = ScoreFile(path)
    if len(file) and file.row(0).sampling_temperature is None:
        yield (
            f"sampling.sampler: {path} does not say at which temperature its responses were sampled; its "
            f"behaviour_logprobs are taken for those of [sampling] temperature, {config.sampling.temperature}"
        )


def _names(model: str | None, revision: str | None) -> set[str]:
    """What one model may be called: a directory by its place."""
    names = {name for name in (model, revision) if name}
    return names | {str(Path(name).resolve()) for name in names if Path(name).is_dir()}
