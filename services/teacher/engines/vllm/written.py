"""Agreement with a writer in a generating vLLM engine: each audited chunk is a request of N continuations."""

from __future__ import annotations

from collections.abc import Sequence as Members

from tutelage_client.types import ScoreRequest, Sequence, SequenceScore, Signal

from services.teacher.engines.vllm.generated import Generated
from services.teacher.engines.vllm.questions import Answered, Question
from services.teacher.writer import Writer


class Written(Generated[Writer]):
    """Sampled continuations of a writer; what stands before them is computed once."""

    name = "vllm-writer"

    def questions(
        self, request: ScoreRequest, sequence: Sequence, *, read_cache: bool
    ) -> list[Question] | SequenceScore:
        """The vLLM requests of a sequence's chunks, each for all its continuations."""
        del read_cache
        chunks = self.opened.chunks(request, sequence)
        if isinstance(chunks, SequenceScore):
            return chunks
        if not chunks:
            return self.opened.agreement(sequence, (), ())
        # vLLM seeds the j-th of n with seed + j.
        return [
            Question(
                chunk.prefix,
                self._sampling(
                    chunk.most,
                    n=request.signal.continuations,
                    seed=chunk.number,
                    temperature=self.opened.settings.temperature,
                ),
                replies=request.signal.continuations,
                about=chunk,
            )
            for chunk in chunks
        ]

    def answer(self, answered: Members[Answered], sequence: Sequence, signal: Signal) -> SequenceScore | None:
        """The agreement in finished outputs."""
        del signal
        chunks = [each.question.about for each in answered]
        written = [[self._reply(output)[0] for output in each.output.outputs] for each in answered]
        return self.opened.agreement(sequence, chunks, written)
