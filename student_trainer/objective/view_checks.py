"""Which views make a target on this support, and whether their coefficients may differ or be rescaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from student_trainer.objective.settings import Divergence, ObjectiveError, ObjectiveSettings


def check_views(
    row: ObjectiveSettings, divergence: Divergence | Literal["custom"], views: Mapping[str, float]
) -> None:
    """Whether the views make a target, on this support and for this estimator."""
    _check_view_clips(row)
    _check_contexts(row)
    _check_coefficients(row, views)
    if row.ratio == "first_over_second":
        _check_two_views(row, views)
        return
    if list(views.values()) == [1.0] and not any(view.weight_field for view in row.views.values()):
        return
    got = ", ".join(f"{view}: {coefficient}" for view, coefficient in views.items())
    target = row.target or "log_linear"
    if target == "log_linear":
        _check_log_linear(row, divergence, got)
    elif min(views.values()) <= 0:
        raise ObjectiveError(
            f"objective.views: got coefficients {{{got}}} with target = {target!r}, allowed: above 0"
        )
    elif target == "mixture" and abs(sum(views.values()) - 1) > 1e-6:
        raise ObjectiveError(
            f'objective.views: got coefficients {{{got}}} with target = "mixture", allowed: a sum of 1'
        )
    if target != "losses" and len(views) > 1 and row.support in ("teacher_topk", "union"):
        raise ObjectiveError(
            f"objective.support: got {row.support!r} with target = {target!r}, which needs all views to "
            'answer at the same ids; allowed: "sampled", "student_topk", "full", or target = "losses"'
        )
    if target == "losses" and row.mix == "multiply":
        raise ObjectiveError(
            'objective.target: got "losses" with mix = "multiply", which has one factor; allowed: "mixture"'
        )


def _check_view_clips(row: ObjectiveSettings) -> None:
    for place, (name, view) in enumerate(row.views.items()):
        log_linear = (row.target or "log_linear") == "log_linear"
        if view.clip is not None and (place == 0 or not log_linear or row.support == "full"):
            raise ObjectiveError(
                f"objective.views.{name}.clip: set to {view.clip}, but it only acts on views after the "
                'first, with target = "log_linear" and a support other than full'
            )


def _check_coefficients(row: ObjectiveSettings, views: Mapping[str, float]) -> None:
    """Whether coefficients may differ from example to example, or be rescaled."""
    for name, view in row.views.items():
        if view.weight_field is not None and row.support == "full":
            raise ObjectiveError(
                f'objective.views.{name}.weight_field: set with support = "full", whose views have one '
                "coefficient for all rows; allowed: a support that is asked for over the wire"
            )
    if row.missing_view != "renormalise":
        return
    if row.support == "full":
        raise ObjectiveError(
            'objective.missing_view: got "renormalise" with support = "full", whose caller brings every '
            'view; allowed: "drop"'
        )
    clipped = any(view.clip is not None for view in row.views.values())
    if (row.target or "log_linear") == "log_linear" and (clipped or min(views.values()) <= 0):
        raise ObjectiveError(
            'objective.missing_view: got "renormalise" with target = "log_linear" and a clip or a '
            'coefficient that is not above 0, where what is left is another target; allowed: "drop"'
        )


def _check_two_views(row: ObjectiveSettings, views: Mapping[str, float]) -> None:
    if list(views.values()) != [1.0, 1.0] or row.target is not None:
        got = ", ".join(f"{view}: {coefficient}" for view, coefficient in views.items())
        raise ObjectiveError(
            f'objective.ratio: got "first_over_second" with views {{{got}}}; allowed: two views, each with '
            "coefficient 1, and no target"
        )
    if row.missing_view == "renormalise":
        raise ObjectiveError(
            'objective.missing_view: got "renormalise" with ratio = "first_over_second", which takes both '
            'views; allowed: "drop"'
        )
    for name, view in row.views.items():
        for key in ("clip", "weight_field"):
            if getattr(view, key) is not None:
                raise ObjectiveError(
                    f'objective.views.{name}.{key}: set with ratio = "first_over_second", which takes both '
                    "views as they are"
                )


def _check_contexts(row: ObjectiveSettings) -> None:
    for name, view in row.views.items():
        where = f"objective.views.{name}"
        if "missing" in view.model_fields_set and not view.templates:
            raise ObjectiveError(f"{where}.missing: set to {view.missing!r}, but it only acts with a context")
        if view.route and "weights" in view.model_fields_set:
            raise ObjectiveError(f"{where}.weights: got {view.weights!r} with route; allowed: one of the two")
        if row.support == "full" and view.route:
            raise ObjectiveError(
                f'{where}.route: set with support = "full", whose caller brings the teacher; allowed: a '
                "support that is asked for over the wire"
            )


def _check_log_linear(row: ObjectiveSettings, divergence: Divergence | Literal["custom"], got: str) -> None:
    """Σ c_v log q_v stays unnormalised only where its constant cancels."""
    if row.support == "sampled":
        if divergence == "kl_student_teacher" and row.horizon == 0 and row.mix != "multiply":
            return
        raise ObjectiveError(
            f'objective.views: got {{{got}}} with target = "log_linear"; over sampled tokens it cannot be '
            'normalised, and its constant only cancels with divergence = "kl_student_teacher", horizon = 0 '
            "and a mix other than multiply. Otherwise allowed: one view with coefficient 1, target = "
            '"mixture" or "losses", or estimator = "pathwise"'
        )
    if row.tail in ("raw", "stop_gradient", "stop_gradient_mean"):
        raise ObjectiveError(
            f'objective.tail: got {row.tail!r} with views {{{got}}} and target = "log_linear", which must be '
            'normalised; allowed: "renormalise", "bucket", or support = "full"'
        )
