"""What an example says about its views beside their contexts: its tag, which routes it, and its factors."""

from __future__ import annotations

import math
from typing import Any

from tutelage_client.errors import TutelageError, invalid

from student_trainer.objective.plan import Plan
from student_trainer.sampler.data import PromptSource
from student_trainer.tasks import Example


class ExampleLabels:
    """Reads the fields that [data] tag_field and a view's `weight_field` name.

    Every method raises TutelageError INVALID_ARGUMENT, naming field, row and what is allowed, where an
    example does not say what the plan needs.
    """

    def __init__(self, plan: Plan, prompts: PromptSource, tag_field: str | None) -> None:
        self._plan = plan
        self._prompts = prompts
        self._tag_field = tag_field

    def tag(self, index: int, example: Example) -> str:
        """The example's tag; "" where it has none and none is needed."""
        if self._tag_field is None:
            return ""
        value = example.fields.get(self._tag_field)
        if value is None and self._plan.routes:
            raise self._lacks("data.tag_field", self._tag_field, index, example)
        return "" if value is None else str(value)

    def teacher(self, view: str, index: int, tag: str) -> str:
        """Who scores the view for an example of this tag."""
        teacher = self._plan.teacher_of(view, tag)
        if teacher is None:
            place, allowed = self._prompts.place(index), ", ".join(sorted(self._plan.routes[view]))
            raise invalid(
                f"objective.views.{view}.route: {place} has {self._tag_field} = {tag!r}, allowed: {allowed}"
            )
        return teacher

    def weights(self, index: int, example: Example) -> dict[str, float]:
        """Factor of each view's coefficient, of the views that have a `weight_field`."""
        return {
            view: self._weight(f"objective.views.{view}.weight_field", field, index, example)
            for view, field in self._plan.weight_fields.items()
        }

    def _weight(self, setting: str, field: str, index: int, example: Example) -> float:
        value: Any = example.fields.get(field)
        if value is None:
            raise self._lacks(setting, field, index, example)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
            return float(value)
        place = self._prompts.place(index)
        raise invalid(f"{setting}: {place} has {field} = {value!r}, allowed: a finite number of at least 0")

    def _lacks(self, setting: str, field: str, index: int, example: Example) -> TutelageError:
        place, fields = self._prompts.place(index), sorted(example.fields)
        return invalid(f"{setting}: {place} has no field {field!r}; its fields are {fields}")
