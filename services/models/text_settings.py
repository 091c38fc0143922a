"""What the settings of a judge and of a writer have in common. Imports neither torch nor vLLM."""

from __future__ import annotations

from string import Formatter

from pydantic import BaseModel, ConfigDict, Field


class TextTeacherSettings(BaseModel):
    """Whose ids are sent, and what stands before the question."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenizer: str | None = Field(
        default=None,
        description="directory or hub id of the tokenizer whose ids callers send; default: the student's "
        "in a run file, else the model's own",
    )
    system: str | None = Field(
        default=None, description="system message, where the model's tokenizer has a chat template"
    )


def checked_template(text: str) -> str:
    """A template that can be filled; ValueError for one whose braces do not match."""
    try:
        list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"got a template that cannot be read: {error}; a brace is written twice") from error
    return text


def check_fields(key: str, text: str, needed: set[str], allowed: set[str]) -> None:
    """Raise ValueError unless a template names all that it needs, and nothing else than it may."""
    found = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    if not needed <= found <= allowed:
        raise ValueError(
            f"{key}: got the fields {sorted(found)}, must name {sorted(needed)}, may name {sorted(allowed)}"
        )
