"""A writer on a model of transformers: continuations of many places are sampled at once."""

from __future__ import annotations

from collections.abc import Sequence as Members

from tutelage_client.types import ScoreRequest, Sequence, SequenceScore

from services.teacher.engines.words import Question, Reply, TextScorer
from services.teacher.writer import Writer


class WriterScorer(TextScorer[Writer]):
    """A loaded model that writes continuations."""

    @property
    def temperature(self) -> float:
        return self.teacher.settings.temperature

    def questions(self, request: ScoreRequest, sequence: Sequence) -> list[Question] | SequenceScore:
        """One for each audited chunk [F]."""
        chunks = self.teacher.chunks(request, sequence)
        if isinstance(chunks, SequenceScore):
            return chunks
        count = request.signal.continuations
        return [Question(chunk.prefix, chunk.most, chunk.number, count, about=chunk) for chunk in chunks]

    def answer(
        self, sequence: Sequence, questions: Members[Question], replies: Members[Members[Reply]]
    ) -> SequenceScore:
        """The agreement of the continuations [F][N]."""
        chunks = [question.about for question in questions]
        return self.teacher.agreement(sequence, chunks, [[ids for ids, _ in own] for own in replies])
