"""What a run file or a command line says about a writer: a model whose own words a response is compared with.

The idea is that of OmniOPD (Zhou et al., 2026, arXiv:2606.01476): where only a teacher's text is known, what
it writes at a place says how it would go on there. Imports neither torch nor vLLM.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from services.models.text_settings import TextTeacherSettings, check_fields, checked_template


class WriterSettings(TextTeacherSettings):
    """What a writer is asked to write, how it samples, and how its text is compared."""

    user: str = Field(default="{prompt}", description="what the writer is asked, with {prompt}")
    temperature: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="at which it samples; smaller: its continuations are more alike",
    )
    max_continuations: int = Field(
        default=16, ge=1, description="most continuations that a request may ask for at a place"
    )
    max_chunks: int = Field(default=64, ge=1, description="most places in a response that it writes on from")
    similarity: Literal["edit"] = Field(
        default="edit",
        description="of a continuation and the response's own text: 1 − edit distance in characters / "
        "length of the longer one",
    )

    @field_validator("user")
    @classmethod
    def _is_a_template(cls, text: str) -> str:
        return checked_template(text)

    @model_validator(mode="after")
    def _names_its_field(self) -> WriterSettings:
        check_fields("user", self.user, {"prompt"}, {"prompt"})
        return self

    def question(self, prompt: str) -> str:
        """The user's message about a prompt."""
        return self.user.format(prompt=prompt)
