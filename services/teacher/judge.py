"""A judge between token ids: what it is shown of a sequence, and the judgement in its reply."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import replace

from tutelage_client.types import Limits, ScoreRequest, Sequence, SequenceScore

from services.models.judge_settings import JudgeSettings
from services.teacher.text_teacher import NO_SCORE, TextTeacher


class Judge(TextTeacher[JudgeSettings]):
    """The settings of a judge with the tokenizers they need; see TextTeacher."""

    kind = "judge"

    def limits(self, limits: Limits) -> Limits:
        """`limits` without anything but judgements."""
        return replace(super().limits(limits), judge=True)

    def prompt_ids(self, request: ScoreRequest, sequence: Sequence) -> list[int] | SequenceScore:
        """What the judge is given about a sequence of the request, in its own ids.

        An error where it does not fit, or would end the question's turn by itself and answer in the judge's.
        """
        prompt, response = self.prompt(request, sequence), self.said(sequence.response_ids)
        if (refused := self.refusal(sequence, prompt, response)) is not None:
            return refused
        ids = self.asked(self.settings.question(prompt, response))
        if not ids:
            return self.failed(sequence, NO_SCORE, "there is no text to judge")
        return self.too_long(sequence, len(ids), self.settings.max_new_tokens) or ids

    def judgement(self, sequence: Sequence, reply: Ids[int], *, ended: bool) -> SequenceScore:
        """The score in a reply's ids (without the token that ended it); an error where there is none."""
        text = self._own.decode(list(reply), skip_special_tokens=True)
        try:
            if not ended:
                raise ValueError(f"the judge's reply was cut after {self.settings.max_new_tokens} tokens")
            return SequenceScore(sequence.id, judgement=self.settings.read(text), verdict=text)
        except ValueError as error:
            return self.failed(sequence, NO_SCORE, str(error))
