"""Settings of what stands beside the six choices: further losses, and functions of the user's."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, FiniteFloat, PositiveInt, field_validator

from student_trainer.config_errors import FUNCTION_PATTERN
from student_trainer.objective.view_settings import (
    ContextTemplate,
    MissingContext,
    StrictSettings,
    ViewContext,
)

FunctionName: TypeAlias = Annotated[str, Field(pattern=FUNCTION_PATTERN)]


class AuxiliarySettings(StrictSettings):
    """A loss beside the objective: the student is to say under a privileged context what it says without."""

    kind: Literal["consistency"] = Field(
        description="+ coefficient · KL(p without the context, held fixed ‖ p under it), over the vocabulary"
    )
    context: ViewContext = Field(description="a template, or a list of them, as for a view")
    coefficient: Annotated[FiniteFloat, Field(gt=0)] = Field(1.0, description="factor of the loss")
    missing: MissingContext = Field(
        "error", description="where no template can be filled: refuse, or leave that response out (same)"
    )

    @field_validator("context")
    @classmethod
    def _is_another(cls, context: Any) -> Any:
        if context in ("same", ()):
            raise ValueError(f"got {context!r}; give a template, or a list of templates")
        return context

    @property
    def templates(self) -> tuple[ContextTemplate, ...]:
        """The templates, in the order they are tried."""
        found = self.context
        return found if isinstance(found, tuple) else (found,) if isinstance(found, ContextTemplate) else ()


class HiddenSettings(StrictSettings):
    """A loss beside the objective (OPRD): the student's hidden states towards the teacher's, as wide."""

    layers: tuple[PositiveInt, ...] = Field(
        min_length=1, description="layers of student and teacher, in ascending order; 1 is the first"
    )
    coefficient: Annotated[FiniteFloat, Field(gt=0)] = Field(1.0, description="factor of the loss")
    positions: PositiveInt = Field(2000, description="positions of a response that enter, from its end")

    @field_validator("layers")
    @classmethod
    def _ascend(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if sorted(set(layers)) != list(layers):
            raise ValueError(f"got {list(layers)}, must be in ascending order, each once")
        return layers


class AuditSettings(StrictSettings):
    """With mix = "route": chunks of a response where the student is least certain, weighed by a writer.

    A token of an audited chunk has the loss −π̂ · log p(y), π̂ = (N·k̄ + α·π̄)/(N + α) held fixed: k̄ is the
    agreement of the writer's N continuations with the chunk, π̄ the geometric mean of the chunk's p(y) as the
    step starts (OmniOPD). Every other token is distilled.
    """

    teacher: str = Field(description="name of the writer, [teachers.NAME.writer]")
    chunks: PositiveInt = Field(10, description="chunks of a response, at most; they do not overlap")
    chunk_tokens: PositiveInt = Field(
        50, description="tokens of a chunk; the responses that are shorter have none"
    )
    continuations: PositiveInt = Field(10, description="N, texts that the writer samples at every chunk")
    prior: Annotated[FiniteFloat, Field(gt=0)] = Field(
        1.0, description="α, continuations that the student's own confidence counts for"
    )


class PreferenceSettings(StrictSettings):
    """In place of a divergence (PBSD): of a group, guided responses are preferred to the student's own.

    The mean over pairs of −log σ(scale · [(log p − log q)(guided) − (log p − log q)(own)]), sums over whole
    responses, p the student as it is, q the only view.
    """

    scale: Annotated[FiniteFloat, Field(gt=0)] = Field(
        0.1, description="β: how far p may move from q for a pair that is told apart"
    )


class CustomSettings(StrictSettings):
    """Functions of your own: "module:attribute", or "file.py:attribute" relative to the file that says so."""

    divergence: FunctionName | None = Field(
        None, description="in place of `divergence`: f of u = q/p, element by element, or an FDivergence"
    )
    token_weight: FunctionName | None = Field(
        None, description="tokens → factor of every position's loss; tokens are the detached TokenValues"
    )
    advantage: FunctionName | None = Field(
        None,
        description="score_function: (advantage, tokens) → the distillation advantage that is used instead",
    )
    teacher_entropy: bool = Field(False, description="have the teacher's entropy among the tokens' values")
