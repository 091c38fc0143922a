"""What a run file or a command line says about a judge: a model that says in words how good a response is.

The score is verbal, a whole number that the judge writes, as in On-policy Verbal Distillation (Xiong et al.,
2026, arXiv:2601.21968): 0 to 9 there. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import re
from string import Formatter

from pydantic import Field, field_validator, model_validator

from services.models.text_settings import TextTeacherSettings, check_fields, checked_template

USER = """Question:
{prompt}

Response:
{response}

How good is the response? Say briefly what is right and what is wrong with it. End with the line
Score: N
where N is a whole number from 0 (worst) to {largest} (best)."""


class JudgeSettings(TextTeacherSettings):
    """How a judge is asked, and how its reply is read."""

    user: str = Field(
        default=USER,
        description="what the judge is asked, with {prompt} and {response}, and {largest} where it is of use",
    )
    reply: str = Field(
        default="Score: {score}",
        description="what the last line of its reply has to be; anything else is an error, and no score",
    )
    largest: int = Field(default=9, ge=1, description="the best score; 0 is the worst")
    max_new_tokens: int = Field(
        default=512, ge=1, description="longest reply; one that is cut is an error, and no score"
    )

    @field_validator("user", "reply")
    @classmethod
    def _is_a_template(cls, text: str) -> str:
        return checked_template(text)

    @model_validator(mode="after")
    def _names_its_fields(self) -> JudgeSettings:
        check_fields("user", self.user, {"response"}, {"prompt", "response", "largest"})
        check_fields("reply", self.reply, {"score"}, {"score"})
        spelled = [part[1:] for part in Formatter().parse(self.reply) if part[1] is not None]
        if spelled != [("score", "", None)] or self.reply.count("{score}") != 1:
            raise ValueError(f"reply: got {self.reply!r}, must have {{score}} once and as it is")
        return self

    def question(self, prompt: str, response: str) -> str:
        """The user's message about a response."""
        return self.user.format(prompt=prompt, response=response, largest=self.largest)

    def read(self, reply: str) -> float:
        """The judgement in a whole reply, from 0 to 1.

        Raises:
            ValueError: its last line is not `reply` with a whole number from 0 to `largest`.
        """
        lines = [line.strip() for line in reply.splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        before, _, after = self.reply.partition("{score}")
        pattern = f"{re.escape(before.format())}([0-9]+){re.escape(after.format())}"
        found = re.fullmatch(pattern, last)
        if found is None or not int(found[1]) <= self.largest:
            wanted = self.reply.format(score=f"0 … {self.largest}")
            raise ValueError(f"the judge's last line is {last[:80]!r}, must be {wanted!r}")
        return int(found[1]) / self.largest
