"""The run file: one strict TOML document that describes a whole run.

Imports neither torch nor transformers: the command line and every process read it.
An unknown key is an error that names its section and the nearest key that exists.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ValidationError, model_validator

from student_trainer.config_errors import RunFileError, describe_errors
from student_trainer.objective.functions import anchored
from student_trainer.objective.settings import ObjectiveSettings
from student_trainer.sampler.settings import DataSettings, SamplingSettings
from student_trainer.sections import (
    MetricsSettings,
    QueueSettings,
    RunSettings,
    Section,
    SelfTeacherSettings,
    StudentSettings,
    TeacherEntry,
    TrainingSettings,
)

if TYPE_CHECKING:
    from student_trainer.objective.plan import Plan


class RunConfig(Section):
    """A whole run file."""

    run: RunSettings = RunSettings()
    queue: QueueSettings = QueueSettings()
    teachers: dict[str, TeacherEntry] = Field(
        default_factory=dict, description="[teachers.NAME], one section for each teacher"
    )
    self_teacher: SelfTeacherSettings = SelfTeacherSettings()
    student: StudentSettings
    data: DataSettings
    sampling: SamplingSettings = SamplingSettings()
    objective: ObjectiveSettings
    training: TrainingSettings
    metrics: MetricsSettings = MetricsSettings()

    @property
    def threads(self) -> int | None:
        """CPU threads that every process of the run sets; None leaves torch's choice."""
        return 1 if self.run.deterministic else self.run.threads

    def implied_teachers(self) -> dict[str, TeacherEntry]:
        """Teachers without a section, as if they had one; the model of own weights is that of [student]."""
        settings = self.self_teacher.model_dump(exclude={"in_process"}, exclude_unset=True)
        settings.setdefault("dtype", self.student.dtype)
        return {
            name: TeacherEntry(
                model=weights.partition(":")[2] or self.student.model,
                revision=None if ":" in weights else self.student.revision,
                **settings,
            )
            for name, weights in self.plan().implied_teachers.items()
        }

    def all_teachers(self) -> dict[str, TeacherEntry]:
        """Those with a section, then the implied ones."""
        return {**self.teachers, **self.implied_teachers()}

    def followed(self, teacher: str) -> Path | None:
        """Where an implied teacher's weights are published; None for one whose weights never change."""
        from student_trainer.channels import DIRECTORIES

        channel = DIRECTORIES.get(self.plan().implied_teachers.get(teacher, ""))
        return None if channel is None else self.run.directory / channel

    def plan(self) -> Plan:
        """The objective, compiled for this run; raises ObjectiveError."""
        from student_trainer.objective.compile import compile_plan

        return compile_plan(
            self.objective,
            student_temperature=self.sampling.temperature,
            teachers=sorted(self.teachers),
            run=self.run.name,
            guided=self.sampling.guided > 0,
            own_samples=self.sampling.guided < self.sampling.samples_per_prompt,
        )

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        from student_trainer.config_checks import check_sections

        check_sections(self)
        return self


def parse_run_config(document: dict[str, Any], source: str = "run file") -> RunConfig:
    """Check a parsed document; raises RunFileError that lists every problem found."""
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        raise RunFileError(source, describe_errors(RunConfig, error)) from error


def load_run_config(
    path: Path,
    *,
    sampling_engine: str | None = None,
    queue_url: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Read a run file. Relative paths in it are relative to the working directory, but for the files of
    [objective], which are relative to the run file.

    Args:
        sampling_engine: takes the place of [sampling] engine.
        queue_url: takes the place of [queue] url.
        metrics: keys of [metrics]; each that is not None takes the place of the file's.

    Raises:
        RunFileError: the file is missing, is not TOML, or says something that cannot be.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFileError(str(path), ["there is no such file"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunFileError(str(path), [f"not a TOML document: {error}"]) from error
    if isinstance(objective := document.get("objective"), dict):
        document["objective"] = anchored(objective, path.parent.absolute())
    if sampling_engine is not None:
        _choose_engine(document, sampling_engine)
    given = [("queue", "url", queue_url), *(("metrics", *pair) for pair in (metrics or {}).items())]
    for section, key, value in given:
        if value is not None and isinstance(table := document.setdefault(section, {}), dict):
            table[key] = value
    return parse_run_config(document, str(path))


def _choose_engine(document: dict[str, Any], engine: str) -> None:
    sampling = document.setdefault("sampling", {})
    if isinstance(sampling, dict):
        sampling["engine"] = engine
        if engine != "vllm":
            sampling.pop("vllm", None)
