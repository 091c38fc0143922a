"""What a judge and a writer need of a vLLM engine that generates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tutelage_client.types import Limits

from services.models.vllm_adapter import EngineFacts, MakeModel, Purpose
from services.teacher.text_teacher import TextTeacher

T = TypeVar("T", bound=TextTeacher[Any])


class Generated(Generic[T]):
    """Replies of a teacher of words; the beginning that many prompts share comes from the prefix cache.

    Args:
        open_teacher: makes the teacher, once vLLM has said how much its model takes.
    """

    purpose: Purpose = "generate"
    make_model: MakeModel | None = None

    def __init__(self, open_teacher: Callable[[int], T]) -> None:
        self._open_teacher = open_teacher
        self._teacher: T | None = None

    @property
    def opened(self) -> T:
        """The teacher, once `limits` has been asked."""
        assert self._teacher is not None
        return self._teacher

    def limits(self, limits: Limits, facts: EngineFacts) -> Limits:
        """`limits` of the teacher; opens it."""
        self._teacher = self._open_teacher(facts.max_model_len)
        return self._teacher.limits(limits)

    def _sampling(self, max_tokens: int, **how: Any) -> Any:
        """The parameters of a reply of at most so many tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=max_tokens,
            stop_token_ids=list(self.opened.ends),
            ignore_eos=True,  # our end tokens alone decide
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **how,
        )

    def _reply(self, output: Any) -> tuple[list[int], bool]:
        """The ids of one completion without the token that ended it, and whether one did."""
        ids = list(output.token_ids)
        ended = output.finish_reason == "stop"
        if ended and ids and ids[-1] in self.opened.ends:
            ids.pop()
        return ids, ended
