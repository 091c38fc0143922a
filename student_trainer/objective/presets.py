"""Published methods as rows of settings: TOML files beside this module, each with its source."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from student_trainer.config_errors import describe_errors
from student_trainer.objective.functions import anchored
from student_trainer.objective.settings import ObjectiveError, ObjectiveSettings


class Preset(BaseModel):
    """One published method, or a user's own.

    `read` says what was read: "code", "paper", "notes" (third-party notes quoting the paper) or
    "abstract"; a file of one's own need not say. `inferred` lists the settings the source does not fix.
    `requires` lists keys that only the user can know, such as "tokens.skip_ids"; without them the row would
    be another method.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str = ""
    source: str = ""
    read: Literal["code", "paper", "notes", "abstract", "own"] = "own"
    inferred: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    notes: str = ""
    objective: dict[str, Any]


class _Row(BaseModel):
    """A preset's settings where a run file has them, so that errors name them alike."""

    objective: ObjectiveSettings


def names() -> list[str]:
    """Names of the presets that ship with this version, sorted."""
    directory = resources.files("student_trainer.objective") / "presets"
    return sorted(entry.name[:-5] for entry in directory.iterdir() if entry.name.endswith(".toml"))


def load(name: str) -> Preset:
    """Read one preset, of this version or a file.toml.

    Raises:
        ObjectiveError: no preset has this name (names the nearest one), or the file is none.
    """
    if name.endswith(".toml"):
        return _read(Path(name))
    known = names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ObjectiveError(f"objective.preset: got {name!r}, allowed: {', '.join(known)}{hint}")
    path = resources.files("student_trainer.objective") / "presets" / f"{name}.toml"
    preset = Preset.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    ObjectiveSettings.model_validate(preset.objective)
    return preset


def _read(path: Path) -> Preset:
    """A user's preset; the files that it names are beside it."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        preset = Preset.model_validate({"name": path.stem, **document})
        _Row.model_validate({"objective": preset.objective})
    except OSError as error:
        raise ObjectiveError(f"objective.preset: cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        root = _Row if error.title == _Row.__name__ else Preset
        raise ObjectiveError(
            f"objective.preset: {path}: {'; '.join(describe_errors(root, error))}"
        ) from error
    except ValueError as error:  # of TOML, or of its text
        raise ObjectiveError(f"objective.preset: {path}: {error}") from error
    if "preset" in preset.objective:
        raise ObjectiveError(f"objective.preset: {path} names a preset; allowed: all of its keys in one file")
    return preset.model_copy(update={"objective": anchored(preset.objective, path.parent)})


def resolve(settings: ObjectiveSettings) -> ObjectiveSettings:
    """Lay the keys that were set over the named preset's row.

    Tables are laid over key by key: `tokens`, `weights`, `gate`, and the views that the preset has. To name
    any view that it does not have is to give all of them. A key of the preset that the overriding keys
    make meaningless (the preset's `tail` under an overriding `support = "full"`) is dropped; a
    meaningless key that was set by hand is left for `compile_plan` to refuse.

    Raises:
        ObjectiveError: a key that the preset requires was not set.
    """
    if settings.preset is None:
        return settings
    preset = load(settings.preset)
    chosen = settings.model_dump(exclude_unset=True)
    del chosen["preset"]
    for key in preset.requires:
        if not _is_set(chosen, key):
            raise ObjectiveError(f"objective.{key}: missing; preset {preset.name!r} needs it")
    row = ObjectiveSettings.model_validate(_laid_over(preset.objective, chosen))
    dropped = {field for field in idle_fields(row) if field not in chosen}
    kept = row.model_dump(exclude_unset=True, exclude=dropped)
    return ObjectiveSettings.model_validate(kept)


def _laid_over(row: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's keys with the user's in their place; both as they stand in TOML."""
    merged = {**row, **chosen}
    for table in ("tokens", "weights", "gate", "custom", "audit", "preference"):
        if isinstance(row.get(table), Mapping) and isinstance(chosen.get(table), Mapping):
            merged[table] = {**row[table], **chosen[table]}
    views, named = row.get("views", {}), chosen.get("views") or {}
    if set(named) <= set(views):
        merged["views"] = {name: _view(view, named.get(name, {})) for name, view in views.items()}
    return merged


def _view(view: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """A view's keys; `route` and `weights` both say who scores, so the user's takes the other's place."""
    other = {"route": "weights", "weights": "route"}
    replaced = {other[key] for key in other if key in chosen}
    return {key: value for key, value in view.items() if key not in replaced} | dict(chosen)


def _is_set(chosen: Mapping[str, Any], key: str) -> bool:
    *tables, last = key.split(".")
    for table in tables:
        chosen = chosen.get(table) or {}
    return last in chosen


def idle_fields(settings: ObjectiveSettings) -> dict[str, str]:
    """Fields that are set although the other settings give them nothing to do, and why."""
    idle: dict[str, str] = {}

    def only(field: str, applies: bool, reason: str) -> None:
        if not applies and field in settings.model_fields_set and getattr(settings, field) is not None:
            idle[field] = reason

    truncated = settings.support in ("teacher_topk", "student_topk", "union")
    weighed = any(view.weight_field is not None for view in settings.views.values())
    only("target", len(settings.views) > 1 or weighed, "several views or a weight_field")
    only("missing_view", len(settings.views) > 1, "several views")
    weights = {view.weights for view in settings.views.values()}
    only("ema_rate", "ema" in weights, 'a view with weights = "ema"')
    only("max_lag", bool(weights & {"live", "ema"}), 'a view with weights = "live" or "ema"')
    own_divergence = settings.custom.divergence is not None
    pairs = settings.preference is not None
    only("divergence", not own_divergence and not pairs, "no custom.divergence, and no preference")
    only("beta", settings.divergence == "jsd", 'divergence = "jsd"')
    only("alpha", settings.divergence == "alpha", 'divergence = "alpha"')
    only("k", truncated, "a top-k support")
    only("tail", truncated, "a top-k support")
    score_function = settings.estimator == "score_function"
    token_wise = score_function and not pairs
    only("log_ratio", token_wise, 'estimator = "score_function", and no preference')
    for field in ("discount", "advantage_clip"):
        only(
            field,
            token_wise or settings.horizon != 0,
            'estimator = "score_function" without preference, or "pathwise" with a horizon',
        )
    only(
        "score_weight",
        token_wise
        and (settings.divergence != "kl_student_teacher" or own_divergence)
        and settings.mix != "multiply",
        'estimator = "score_function", a divergence other than kl_student_teacher and no mix = "multiply"',
    )
    only("entry_clip", not score_function, 'estimator = "pathwise"')
    only("charge", not score_function and settings.horizon != 0, 'estimator = "pathwise" with a horizon')
    for field in ("ratio_clip", "ratio", "ratio_gate", "entropy_factor"):
        only(field, settings.mix == "multiply", 'mix = "multiply"')
    only("entropy_window", settings.entropy_factor is not None, "entropy_factor")
    rewarded = settings.mix != "replace" and settings.audit is None
    only("route_reward", settings.mix == "route" and rewarded, 'mix = "route" and no audit')
    for field in ("advantage_std", "judge"):
        only(field, rewarded, "a mix with the reward, and no audit")
    for field in ("reward_coefficient", "gate"):
        only(field, settings.mix != "replace", "a mix with the reward")
    return idle
