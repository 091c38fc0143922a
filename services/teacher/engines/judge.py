"""A judge on a model of transformers: the most probable reply about every sequence."""

from __future__ import annotations

from collections.abc import Sequence as Members

from tutelage_client.types import ScoreRequest, Sequence, SequenceScore

from services.teacher.engines.words import Question, Reply, TextScorer
from services.teacher.judge import Judge


class JudgeScorer(TextScorer[Judge]):
    """A loaded model that says judgements. It is greedy as vLLM is: what its files say of sampling is not."""

    temperature = 0.0

    def questions(self, request: ScoreRequest, sequence: Sequence) -> list[Question] | SequenceScore:
        """The one question about a sequence."""
        ids = self.teacher.prompt_ids(request, sequence)
        if isinstance(ids, SequenceScore):
            return ids
        return [Question(ids, most=self.teacher.settings.max_new_tokens)]

    def answer(
        self, sequence: Sequence, questions: Members[Question], replies: Members[Members[Reply]]
    ) -> SequenceScore:
        """The judgement in the reply."""
        del questions
        ids, ended = replies[0][0]
        return self.teacher.judgement(sequence, ids, ended=ended)
