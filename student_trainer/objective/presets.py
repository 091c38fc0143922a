"""Published methods as rows of settings: TOML files beside this module, each with its source."""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from student_trainer.objective.settings import ObjectiveError, ObjectiveSettings


class Preset(BaseModel):
    """One published method.

    `read` says what was read: "code", "paper", "notes" (third-party notes quoting the paper) or
    "abstract". `inferred` lists the settings the source does not fix.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    source: str
    read: Literal["code", "paper", "notes", "abstract"]
    inferred: tuple[str, ...] = ()
    notes: str = ""
    objective: dict[str, Any]


def names() -> list[str]:
    """Names of the presets that ship with this version, sorted."""
    directory = resources.files("student_trainer.objective") / "presets"
    return sorted(entry.name[:-5] for entry in directory.iterdir() if entry.name.endswith(".toml"))


def load(name: str) -> Preset:
    """Read one preset.

    Raises:
        ObjectiveError: no preset has this name; names the nearest one.
    """
    known = names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ObjectiveError(f"objective.preset: got {name!r}, allowed: {', '.join(known)}{hint}")
    path = resources.files("student_trainer.objective") / "presets" / f"{name}.toml"
    preset = Preset.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    ObjectiveSettings.model_validate(preset.objective)
    return preset


def resolve(settings: ObjectiveSettings) -> ObjectiveSettings:
    """Lay the keys that were set over the named preset's row.

    A key of the preset that the overriding keys make meaningless (the preset's `tail` under an
    overriding `support = "full"`) is dropped; a meaningless key that was set by hand is left for
    `compile_plan` to refuse.
    """
    if settings.preset is None:
        return settings
    chosen = settings.model_dump(exclude_unset=True)
    del chosen["preset"]
    row = ObjectiveSettings.model_validate({**load(settings.preset).objective, **chosen})
    dropped = {field for field in idle_fields(row) if field not in chosen}
    kept = row.model_dump(exclude_unset=True, exclude=dropped)
    return ObjectiveSettings.model_validate(kept)


def idle_fields(settings: ObjectiveSettings) -> dict[str, str]:
    """Fields that are set although the other settings give them nothing to do, and why."""
    idle: dict[str, str] = {}

    def only(field: str, applies: bool, reason: str) -> None:
        if not applies and field in settings.model_fields_set and getattr(settings, field) is not None:
            idle[field] = reason

    truncated = settings.support in ("teacher_topk", "student_topk", "union")
    only("target", len(settings.views) > 1, "several views")
    only("missing_view", len(settings.views) > 1, "several views")
    only("beta", settings.divergence == "jsd", 'divergence = "jsd"')
    only("alpha", settings.divergence == "alpha", 'divergence = "alpha"')
    only("k", truncated, "a top-k support")
    only("tail", truncated, "a top-k support")
    score_function = settings.estimator == "score_function"
    for field in ("horizon", "discount", "advantage_clip", "log_ratio"):
        only(field, score_function, 'estimator = "score_function"')
    only(
        "score_weight",
        score_function and settings.divergence != "kl_student_teacher" and settings.mix != "multiply",
        'estimator = "score_function", a divergence other than kl_student_teacher and no mix = "multiply"',
    )
    only("entry_clip", not score_function, 'estimator = "pathwise"')
    for field in ("ratio_clip", "ratio", "ratio_gate", "entropy_factor"):
        only(field, settings.mix == "multiply", 'mix = "multiply"')
    only("entropy_window", settings.entropy_factor is not None, "entropy_factor")
    only("route_reward", settings.mix == "route", 'mix = "route"')
    for field in ("reward_coefficient", "advantage_std", "gate"):
        only(field, settings.mix != "replace", "a mix with the reward")
    return idle
