"""Scores through vLLM's own prompt_logprobs: for models that cannot serve as pooling models.

Slower in every way (one Python object per number, no prefix reuse, full float32 logits of a
chunk) and poorer: temperature 1 only, no entropy, and candidates only where the model runner
knows prompt_logprob_token_ids.
"""

from __future__ import annotations

from collections.abc import Sequence as Members
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tutelage_client.types import PAD_ID, Int32Array, Limits, ScoreRequest, Sequence, SequenceScore, Signal

from services.models.vllm_adapter import EngineFacts, MakeModel, Purpose
from services.teacher.engines.vllm.questions import Answered, Question


class Stock:
    """What any vLLM server can say about a prompt."""

    name = "vllm-stock"
    purpose: Purpose = "prompt_logprobs"
    make_model: MakeModel | None = None

    def __init__(self) -> None:
        self._given_ids = False

    def limits(self, limits: Limits, facts: EngineFacts) -> Limits:
        """`limits`, narrowed to what this way of scoring can do for the model."""
        self._given_ids = facts.scores_given_ids
        most = facts.vocab_size if facts.max_logprobs < 0 else facts.max_logprobs  # negative: no limit
        return replace(
            limits,
            max_sequence_tokens=min(limits.max_sequence_tokens, facts.max_model_len - 1),
            max_top_k=min(limits.max_top_k, most, facts.vocab_size),
            max_candidates=min(limits.max_candidates, most - 1) if self._given_ids else 0,
            entropy=False,
            temperature=False,
        )

    def questions(self, request: ScoreRequest, sequence: Sequence, *, read_cache: bool) -> list[Question]:
        """The vLLM request that scores a sequence."""
        from vllm import SamplingParams

        del read_cache  # vLLM itself leaves the cache aside when prompt_logprobs are asked for
        context, signal = request.contexts[sequence.context], request.signal
        arguments: dict[str, Any] = {"prompt_logprobs": signal.top_k, "flat_logprobs": True}
        if self._given_ids:
            arguments = {
                "prompt_logprob_token_ids": _given_ids(sequence, signal),
                "prompt_logprob_start": len(context) - 1,
                "skip_reading_prefix_cache": True,
            }
            if signal.top_k:
                arguments |= {"prompt_logprobs": signal.top_k, "flat_logprobs": True}
        ids: list[int] = np.concatenate([context, sequence.response_ids]).tolist()
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **arguments)
        return [Question(ids, params)]

    def answer(self, answered: Members[Answered], sequence: Sequence, signal: Signal) -> SequenceScore | None:
        """The score in a finished output; None when rows are missing and have to be computed again."""
        output, rows = answered[0].output, len(sequence.response_ids)
        sampled, candidates, top_ids, top_logprobs = None, None, None, None
        if self._given_ids:
            given = output.prompt_token_id_logprobs
            if given is None or given.shape[0] != rows:
                return None
            sampled = given[:, 0]
            if signal.candidates and sequence.candidate_ids is not None:
                candidates = np.where(sequence.candidate_ids == PAD_ID, np.nan, given[:, 1:])
        if signal.top_k or not self._given_ids:
            wanted = rows * (signal.top_k + 1)
            if output.prompt_logprobs is None or len(output.prompt_logprobs.logprobs) < wanted:
                return None
            ids, logprobs = _flat(output.prompt_logprobs, rows, signal.top_k)
            sampled = logprobs[:, 0] if sampled is None else sampled
            top_ids, top_logprobs = ids[:, 1:], logprobs[:, 1:]
        assert sampled is not None
        return SequenceScore(
            id=sequence.id,
            sampled=sampled if signal.sampled else None,
            top_ids=top_ids if signal.top_k else None,
            top_logprobs=top_logprobs if signal.top_k else None,
            candidate_logprobs=candidates,
            valid=np.isfinite(sampled),
        )


def _given_ids(sequence: Sequence, signal: Signal) -> Int32Array:
    """[R, 1 + C]: the response token, then the candidates."""
    columns = [sequence.response_ids[:, None]]
    if signal.candidates and sequence.candidate_ids is not None:
        columns.append(sequence.candidate_ids)
    return np.concatenate(columns, axis=1)


def _flat(flat: Any, rows: int, top_k: int) -> tuple[Int32Array, npt.NDArray[np.float32]]:
    """Ids and log-probabilities [R, 1 + K] of the prompt's last rows: the token itself, then the top K."""
    wanted = rows * (top_k + 1)
    ids = np.array(flat.token_ids[-wanted:], dtype=np.int32).reshape(rows, top_k + 1)
    return ids, np.array(flat.logprobs[-wanted:], dtype=np.float32).reshape(rows, top_k + 1)
