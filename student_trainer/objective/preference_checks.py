"""What an objective of pairs goes with: whole responses, their log-probabilities as they are, one context."""

from __future__ import annotations

from collections.abc import Mapping

from student_trainer.objective.extension_settings import CustomSettings
from student_trainer.objective.settings import (
    NoCorrection,
    ObjectiveError,
    ObjectiveSettings,
    TokenSettings,
    WeightSettings,
)

_PREFIX = "keep_first_n"  # a response's beginning has a probability of its own; other choices have none


def check_preference(row: ObjectiveSettings, views: Mapping[str, float]) -> None:
    """Raise ObjectiveError for the first setting under which a pair's margin would not be what it is."""
    if row.preference is None:
        return
    refused: dict[str, tuple[bool, object, str]] = {
        "estimator": (row.estimator != "score_function", row.estimator, '"score_function"'),
        "support": (row.support != "sampled", row.support, '"sampled"'),
        "mix": (row.mix != "replace", row.mix, '"replace"'),
        "correction": (not isinstance(row.correction, NoCorrection), row.correction.kind, '"none"'),
        "normalisation": (row.normalisation != "sequence_mean", row.normalisation, '"sequence_mean"'),
        "horizon": (row.horizon != 0, row.horizon, "0"),
        "weights": (row.weights != WeightSettings(), _changed(row.weights, WeightSettings()), "none of them"),
        "custom": (row.custom != CustomSettings(), _changed(row.custom, CustomSettings()), "none of them"),
        "auxiliary": (row.auxiliary is not None, "one", "none"),
        "hidden": (row.hidden is not None, "one", "none"),
    }
    for name, (chosen, got, allowed) in refused.items():
        if chosen:
            raise ObjectiveError(
                f"objective.{name}: got {got!r} with preference, which compares whole responses; allowed: "
                f"{allowed}"
            )
    chosen_tokens = [name for name in _changed(row.tokens, TokenSettings()) if name != _PREFIX]
    if chosen_tokens:
        raise ObjectiveError(
            f"objective.tokens.{chosen_tokens[0]}: is set with preference, and what is left of a response "
            f"has no probability that could be compared; allowed: {_PREFIX}"
        )
    _check_view(row, views)


def _check_view(row: ObjectiveSettings, views: Mapping[str, float]) -> None:
    if list(views.values()) != [1.0]:
        got = ", ".join(f"{view}: {coefficient}" for view, coefficient in views.items())
        raise ObjectiveError(
            f"objective.views: got coefficients {{{got}}} with preference; allowed: one view, that of 1"
        )
    (name,) = views
    view = row.views.get(name)
    if view is None or not view.templates:
        raise ObjectiveError(
            f"objective.views.{name}.context: missing; with preference it is the context of the preferred "
            "responses, the text of [sampling] context"
        )
    if view.weight_field is not None or view.missing != "error":
        key = "missing" if view.weight_field is None else "weight_field"
        raise ObjectiveError(
            f"objective.views.{name}.{key}: got {getattr(view, key)!r} with preference, which takes the view "
            "as it is, for every response; leave it out"
        )


def _changed(settings: TokenSettings | WeightSettings | CustomSettings, default: object) -> list[str]:
    return [name for name in type(settings).model_fields if getattr(settings, name) != getattr(default, name)]
