"""Settings of a view: whose log-probabilities, and what they see where the student saw its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    field_validator,
    model_validator,
)

MissingContext: TypeAlias = Literal["error", "same"]

SIBLINGS = frozenset({"success", "failure"})  # another response of the group
ROLLOUT_FIELDS = frozenset({"feedback", "response"}) | SIBLINGS  # known once the group is sampled
GROUP_FIELDS = frozenset({"prompt", "answer", "other_prompt"})


class StrictSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ContextTemplate(StrictSettings):
    """A privileged context: what stands where the student saw its prompt; fields in braces.

    Fields are {prompt}, {answer}, any field of the example, {success} and {failure} (a sibling's successful
    or failed response without its thinking, never the response itself), {feedback} (what the checker says
    about this very response), {response} (this very response) and {other_prompt} (another prompt of the
    same step). Write {{ and }} for braces.
    """

    user: str | None = Field(
        None, description="with a chat template the text of the last user message, otherwise the whole prompt"
    )
    system: str | None = Field(None, description="system message put before; needs a chat template")

    @field_validator("user", "system")
    @classmethod
    def _names_fields(cls, text: str | None) -> str | None:
        if text is not None:
            template_fields(text)
        return text

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.user is None and self.system is None:
            raise ValueError("got neither user nor system; give one of them, or both")
        return self

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields that must be there to fill it."""
        texts = [text for text in (self.user, self.system) if text is not None]
        return frozenset(name for text in texts for name in template_fields(text))

    @property
    def per_rollout(self) -> bool:
        """Whether the rollouts of a group get contexts of their own."""
        return bool(self.fields & ROLLOUT_FIELDS)


def template_fields(text: str) -> list[str]:
    """Names of the fields of a template's text, in order; raises ValueError for anything else in braces."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ and }}}} for braces that are no field") from None
    names = []
    for _, name, format_spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or format_spec or conversion:
            raise ValueError(
                f"got field {name!r}, allowed: a plain name such as {{answer}}; write {{{{ and }}}} for "
                "braces that are no field"
            )
        names.append(name)
    return names


def _context_kind(value: Any) -> str:
    if isinstance(value, ContextTemplate | Mapping):
        return ContextTemplate.__name__
    return "list" if isinstance(value, list | tuple) else "same"


ViewContext: TypeAlias = Annotated[
    Annotated[Literal["same"], Tag("same")]
    | Annotated[ContextTemplate, Tag(ContextTemplate.__name__)]
    | Annotated[tuple[ContextTemplate, ...], Tag("list")],
    Discriminator(_context_kind),
]


class ViewSettings(StrictSettings):
    """Whose log-probabilities: weights × context, and how they enter the target."""

    weights: str = Field(
        "teacher",
        description='"teacher:NAME", or "teacher" where the run has exactly one; the student\'s own weights '
        'before training ("initial"), as they are trained ("live") or their moving average ("ema"); '
        '"checkpoint:PATH"; "reference": the teacher of that name, else "initial"',
    )
    context: ViewContext = Field(
        "same",
        description='the student\'s own prompt ("same"), a template {user = "…", system = "…"}, or a list of '
        "templates of which the first is used whose fields are all there",
    )
    missing: MissingContext = Field(
        "error",
        description="where no template can be filled: refuse, or show the student's own prompt (same), which "
        "tokens.marked_only leaves out",
    )
    coefficient: FiniteFloat = Field(1.0, description="c_v of the target")
    clip: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        None,
        description="log_linear, any view but the first: its distance from the first view's "
        "log-probability enters within ± clip, in nats",
    )
    route: dict[str, str] = Field(
        default_factory=dict,
        description='TAG = "TEACHER": who scores an example, by its [data] tag_field; instead of weights',
    )
    weight_field: str | None = Field(
        None, description="field of the example with a factor of the coefficient"
    )

    @field_validator("context", mode="before")
    @classmethod
    def _same_or_templates(cls, context: Any) -> Any:
        if (isinstance(context, str) and context != "same") or context in ([], ()):
            raise ValueError(
                f'got {context!r}, allowed: "same", a template {{user = "…", system = "…"}}, or a list of '
                "templates"
            )
        return context

    @property
    def templates(self) -> tuple[ContextTemplate, ...]:
        """Templates of a privileged context in the order they are tried; empty for the student's own."""
        if self.context == "same":
            return ()
        return (self.context,) if isinstance(self.context, ContextTemplate) else self.context
