"""Which teacher scores a view: the name behind its weights, pure functions of the run file."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence

from student_trainer.objective.settings import ObjectiveError, ObjectiveSettings
from student_trainer.objective.view_settings import ViewSettings

SELF = ("initial", "live", "ema")  # the student's own weights, which the trainer publishes
CHECKPOINT = "checkpoint:"
REFERENCE = "reference"
ALLOWED = (
    '"teacher", "teacher:NAME", "reference", '
    + ", ".join(f'"{kind}"' for kind in SELF)
    + ', "checkpoint:PATH"'
)


def self_teacher(weights: str, run: str) -> str:
    """Name of the teacher that scores with the student's own weights, or with a checkpoint's.

    Args:
        weights: "initial", "live", "ema" or "checkpoint:PATH".
        run: the run's name.
    """
    if weights.startswith(CHECKPOINT):
        path = weights.removeprefix(CHECKPOINT)
        return f"checkpoint-{hashlib.blake2b(path.encode(), digest_size=4).hexdigest()}"
    return f"{run}.{weights}"


def implied_teachers(settings: ObjectiveSettings, run: str, teachers: Sequence[str]) -> dict[str, str]:
    """Teachers that need no section of the run file: name → weights, as `self_teacher` takes them.

    Args:
        settings: with its preset resolved.
        teachers: names of the [teachers.NAME] sections; a section of an implied name takes its place.
    """
    found = {}
    for view in settings.views.values():
        weights = _resolved(view.weights, teachers)
        if not view.route and weights.partition(":")[0] != "teacher":
            found[self_teacher(weights, run)] = weights
    return {name: weights for name, weights in sorted(found.items()) if name not in teachers}


def teacher_names(settings: ObjectiveSettings, run: str, teachers: Sequence[str]) -> dict[str, str]:
    """The teacher's name behind every view; "" where the tag decides or the run file did not say.

    Raises:
        ObjectiveError: weights that do not exist, or a teacher that the run file does not have.
    """
    views = settings.views or {"teacher": ViewSettings()}
    return {
        name: "" if view.route else _teacher_name(name, view.weights, run, teachers)
        for name, view in views.items()
    }


def routes(settings: ObjectiveSettings, teachers: Sequence[str]) -> dict[str, Mapping[str, str]]:
    """Tag → teacher, for every view whose teacher depends on the example's tag."""
    found: dict[str, Mapping[str, str]] = {}
    for name, view in settings.views.items():
        for tag, teacher in view.route.items():
            _check_known(f"objective.views.{name}.route.{tag}", teacher, teachers)
        if view.route:
            found[name] = dict(view.route)
    return found


def check_scorers(
    names: Mapping[str, str],
    routed: Mapping[str, Mapping[str, str]],
    teachers: Sequence[str],
    scorers: Sequence[str],
) -> None:
    """Whether nobody is asked for log-probabilities who judges or writes, and answers none.

    Args:
        names, routed: as `teacher_names` and `routes` give them.
        scorers: those of the run's teachers that neither judge nor write.

    Raises:
        ObjectiveError: a view falls to one of the others.
    """
    silent = [name for name in teachers if name not in scorers]
    for view, name in names.items():
        for asked in sorted(set(routed[view].values())) if view in routed else [name]:
            if asked in silent or (silent and not asked):
                raise ObjectiveError(
                    f"objective.views.{view}: asks {asked or ' or '.join(silent)} for log-probabilities, and "
                    "who judges or writes answers none; allowed: "
                    + (
                        ", ".join(scorers)
                        or 'a further teacher, or weights of the student\'s own ("initial")'
                    )
                )


def _teacher_name(view: str, weights: str, run: str, teachers: Sequence[str]) -> str:
    where = f"objective.views.{view}.weights"
    weights = _resolved(weights, teachers)
    if weights in SELF or (weights.startswith(CHECKPOINT) and len(weights) > len(CHECKPOINT)):
        return self_teacher(weights, run)
    kind, colon, name = weights.partition(":")
    if kind != "teacher" or (colon and not name):
        raise ObjectiveError(f"{where}: got {weights!r}, allowed: {ALLOWED}")
    if not name:
        if len(teachers) > 1:
            raise ObjectiveError(
                f'{where}: "teacher" is ambiguous, allowed: '
                + ", ".join(f'"teacher:{known}"' for known in teachers)
            )
        return teachers[0] if teachers else ""
    _check_known(where, name, teachers)
    return name


def _resolved(weights: str, teachers: Sequence[str]) -> str:
    """A reference is the teacher of that name, or else the student before training."""
    if weights == REFERENCE:
        return f"teacher:{REFERENCE}" if REFERENCE in teachers else "initial"
    return weights


def _check_known(where: str, name: str, teachers: Sequence[str]) -> None:
    if teachers and name not in teachers:
        nearest = difflib.get_close_matches(name, teachers, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ObjectiveError(f"{where}: got teacher {name!r}, allowed: {', '.join(teachers)}{hint}")
