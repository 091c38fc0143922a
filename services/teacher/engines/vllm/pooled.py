"""Scores from inside vLLM's step: the model serves as a pooling model (see pooler)."""

from __future__ import annotations

from collections.abc import Sequence as Members
from dataclasses import replace

import numpy as np
from tutelage_client.types import Limits, ScoreRequest, Sequence, SequenceScore, Signal

from services.models.vllm_adapter import EngineFacts, MakeModel, Purpose, as_array, pooling_params
from services.teacher.engines.vllm.models import scoring_model
from services.teacher.engines.vllm.packing import Columns, prompt_ids, row_signal, to_extra, unpack
from services.teacher.engines.vllm.questions import Answered, Question


class Pooled:
    """All signals in one pass; shared prefixes come from the cache."""

    name = "vllm"
    purpose: Purpose = "score"
    make_model: MakeModel | None = staticmethod(scoring_model)

    def limits(self, limits: Limits, facts: EngineFacts) -> Limits:
        """`limits`, narrowed to what this way of scoring can do for the model."""
        return replace(
            limits,
            max_sequence_tokens=min(limits.max_sequence_tokens, facts.max_model_len),
            max_top_k=min(limits.max_top_k, facts.vocab_size),
        )

    def questions(self, request: ScoreRequest, sequence: Sequence, *, read_cache: bool) -> list[Question]:
        """The vLLM request that scores a sequence."""
        context = request.contexts[sequence.context]
        extra = to_extra(context, sequence, row_signal(request.signal, sequence))
        return [Question(prompt_ids(context, sequence), pooling_params(extra, read_cache=read_cache))]

    def answer(self, answered: Members[Answered], sequence: Sequence, signal: Signal) -> SequenceScore | None:
        """The score in a finished output; None when rows are missing and have to be computed again."""
        packed = as_array(answered[0].output)
        if packed.shape[0] != len(sequence.response_ids) or np.isnan(packed[:, Columns.VALID]).any():
            return None
        return unpack(packed, sequence, signal)
