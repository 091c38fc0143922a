"""Judgements from a generating vLLM engine: each sequence is a question, its reply is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tutelage_client.types import Int32Array, Limits, Sequence, SequenceScore, Signal

from services.models.vllm_adapter import EngineFacts, MakeModel, Purpose
from services.teacher.judge import Judge


class Judged:
    """Greedy replies of a judge; the part of a question that many share comes from the prefix cache.

    Args:
        open_judge: makes the judge, once vLLM has said how much its model takes.
    """

    name = "vllm-judge"
    purpose: Purpose = "generate"
    make_model: MakeModel | None = None

    def __init__(self, open_judge: Callable[[int], tuple[Judge, list[int]]]) -> None:
        self._open_judge = open_judge
        self._judge: Judge | None = None
        self._ends: list[int] = []

    @property
    def opened(self) -> Judge:
        """The judge, once `limits` has been asked."""
        assert self._judge is not None
        return self._judge

    def limits(self, limits: Limits, facts: EngineFacts) -> Limits:
        """`limits` of a judge; opens it."""
        self._judge, self._ends = self._open_judge(facts.max_model_len)
        return self._judge.limits(limits)

    def question(
        self, context: Int32Array, sequence: Sequence, signal: Signal, *, read_cache: bool
    ) -> tuple[list[int], Any] | SequenceScore:
        """The prompt and the parameters of the vLLM request that judges a sequence."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        del signal, read_cache
        ids = self.opened.prompt_ids(context, sequence)
        if isinstance(ids, SequenceScore):
            return ids
        return ids, SamplingParams(
            temperature=0.0,
            max_tokens=self.opened.settings.max_new_tokens,
            stop_token_ids=self._ends,
            ignore_eos=True,  # our end tokens alone decide
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def answer(self, output: Any, sequence: Sequence, signal: Signal) -> SequenceScore | None:
        """The judgement in a finished output."""
        del signal
        reply = output.outputs[0]
        ids = list(reply.token_ids)
        ended = reply.finish_reason == "stop"
        if ended and ids and ids[-1] in self._ends:
            ids.pop()
        return self.opened.judgement(sequence, ids, ended=ended)
