"""Judgements from a generating vLLM engine: each sequence is a question, its reply is read."""

from __future__ import annotations

from collections.abc import Sequence as Members

from tutelage_client.types import ScoreRequest, Sequence, SequenceScore, Signal

from services.teacher.engines.vllm.generated import Generated
from services.teacher.engines.vllm.questions import Answered, Question
from services.teacher.judge import Judge


class Judged(Generated[Judge]):
    """Greedy replies of a judge."""

    name = "vllm-judge"

    def questions(
        self, request: ScoreRequest, sequence: Sequence, *, read_cache: bool
    ) -> list[Question] | SequenceScore:
        """The vLLM request that judges a sequence."""
        del read_cache
        ids = self.opened.prompt_ids(request, sequence)
        if isinstance(ids, SequenceScore):
            return ids
        return [Question(ids, self._sampling(self.opened.settings.max_new_tokens, temperature=0.0))]

    def answer(self, answered: Members[Answered], sequence: Sequence, signal: Signal) -> SequenceScore | None:
        """The judgement in a finished output."""
        del signal
        ids, ended = self._reply(answered[0].output.outputs[0])
        return self.opened.judgement(sequence, ids, ended=ended)
