"""Fixed rollouts: the responses of a score file in place of sampled ones.

Group i stands for the same example as ever, and its responses are those of its prompt in the file: the
first samples_per_prompt in the first epoch, the next ones in the second, and around again. A group is a
function of its index, the file and the data, whoever asks for it and when.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import Int32Array

from services.models.generate import GenerationInterruptedError, Response, Row
from services.score_file import ScoredResponse, ScoreFile
from student_trainer.sampler.data import PromptSource
from student_trainer.sampler.prompts import PromptEncoder
from student_trainer.sampler.settings import SamplingSettings
from student_trainer.tasks import Task

_ENCODED_AT_ONCE = 1024


class Replay:
    """A generator that samples nothing; its rows' groups count up from 0 (see `Row`).

    Args:
        path: a score file with the behaviour's log-probabilities.
        end_ids: tokens that end a response, for rows that do not say whether theirs is finished.

    Raises:
        TutelageError: the file does not fit the run; says what is wrong.
    """

    def __init__(
        self, path: Path, sampling: SamplingSettings, *, fingerprint: str, end_ids: Sequence[int]
    ) -> None:
        self._file = ScoreFile(path)
        self._sampling = sampling
        self._end_ids = frozenset(end_ids)
        self._interrupted = threading.Event()
        self._epoch = 0  # groups of one; `restrict` says how many
        theirs = self._file.header.identity.tokenizer_fingerprint
        if theirs != fingerprint:
            raise TutelageError(
                "FAILED_PRECONDITION",
                f"sampling.sampler: {path} was written with tokenizer {theirs[:12] or 'none'}, the student "
                f"has {fingerprint[:12]}; its responses would be other tokens",
            )
        self._rows = self._index()

    def restrict(self, prompts: PromptSource, encoder: PromptEncoder) -> None:
        """Train on the examples whose prompts the file answers, and on no other."""
        named = self._file.examples()
        if named and all(number is not None for number in named):
            kept = np.unique(np.array(named, dtype=np.int64))
        else:
            kept = self._answered(prompts.task, encoder, prompts.training)
        prompts.restrict(kept)
        self._epoch = len(prompts.training)

    def generate(
        self, rows: Sequence[Row], *, seed: int, temperature: float, max_new_tokens: int, candidates: int = 0
    ) -> list[Response]:
        """The file's responses; numbers of the sampler are not used.

        Raises:
            TutelageError: NOT_FOUND for a prompt that the file does not answer.
        """
        if self._interrupted.is_set():
            raise GenerationInterruptedError
        return [self._response(row) for row in rows]

    def interrupt(self) -> None:
        self._interrupted.set()

    def load_weights(self, directory: Path) -> None:
        raise TutelageError("FAILED_PRECONDITION", f"{self._file.path} is a file; it has no weights")

    def close(self) -> None:
        """Nothing is held but memory."""

    def _index(self) -> dict[bytes, list[int]]:
        """Rows by context, in the file's order."""
        found: dict[bytes, list[int]] = {}
        limit, size = self._sampling.max_new_tokens, self._sampling.samples_per_prompt
        for number, (context_ids, response_ids) in enumerate(self._file.ids()):
            if not 1 <= len(response_ids) <= limit:
                raise invalid(
                    f"sampling.sampler: row {number} of {self._file.path} has {len(response_ids)} tokens, "
                    f"allowed are 1 to max_new_tokens, {limit}"
                )
            found.setdefault(_digest(context_ids), []).append(number)
        if not found:
            raise invalid(f"sampling.sampler: {self._file.path} holds no response")
        fewest = min(found.values(), key=len)
        if len(fewest) < size:
            raise invalid(
                f"sampling.samples_per_prompt: got {size}; {self._file.path} has {len(fewest)} responses to "
                f"the prompt of its row {fewest[0]}"
            )
        return found

    def _answered(
        self, task: Task, encoder: PromptEncoder, indices: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        answered: list[bool] = []
        for start in range(0, len(indices), _ENCODED_AT_ONCE):
            some = [task.example(int(index)) for index in indices[start : start + _ENCODED_AT_ONCE]]
            answered += [_digest(prompt.ids) in self._rows for prompt in encoder.encode(some)]
        return indices[np.array(answered, dtype=np.bool_)]

    def _response(self, row: Row) -> Response:
        numbers = self._rows.get(_digest(row.prompt_ids))
        if numbers is None:
            raise TutelageError(
                "NOT_FOUND",
                f"sampling.sampler: {self._file.path} answers {len(self._rows):,} prompts, and not that of "
                f"group {row.group}, {row.prompt_ids[:8].tolist()}…; was it written from the same data and "
                "with the same chat template?",
            )
        place = row.group // self._epoch * self._sampling.samples_per_prompt + row.sample
        return self._checked(self._file.row(numbers[place % len(numbers)]))

    def _checked(self, found: ScoredResponse) -> Response:
        where = f"sampling.sampler: response {found.id!r} of {self._file.path}"
        logprobs, sampled_at = found.behaviour_logprobs, found.sampling_temperature
        if logprobs is None:
            raise invalid(f"{where} has no behaviour_logprobs, which training on it needs")
        if sampled_at is not None and sampled_at != self._sampling.temperature:
            raise invalid(
                f"{where} was sampled at temperature {sampled_at}, [sampling] temperature is "
                f"{self._sampling.temperature}"
            )
        finished = found.finished
        if finished is None:
            finished = int(found.response_ids[-1]) in self._end_ids
        return Response(found.response_ids, logprobs, None, finished)


def _digest(ids: Int32Array) -> bytes:
    return hashlib.sha256(ids.astype("<i4", copy=False).tobytes()).digest()[:16]
