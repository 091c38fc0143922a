"""A writer between token ids: where it goes on from, and how far its texts agree with a response's own.

An audited chunk is a piece of the response. The writer reads the prompt and the response's text before the
chunk, as the beginning of its own answer, and writes on; it never sees the chunk.
Shapes: R response positions, F audited chunks, N continuations of each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, replace

import numpy as np
from rapidfuzz.distance import Levenshtein
from tutelage_client.types import Int32Array, Limits, ScoreRequest, Sequence, SequenceScore

from services.models.writer_settings import WriterSettings
from services.teacher.text_teacher import NO_SCORE, TextTeacher

CUT = "\ufffd"  # what decoding makes of a part of a character
_WINDOW = 8  # tokens before a continuation that decide how its first one is spelled


@dataclass(frozen=True)
class Chunk:
    """An audited piece of a response.

    Attributes:
        prefix: what the writer goes on from, in its own ids.
        text: what the response says there.
        most: tokens that a continuation may have, at least 1.
        number: names the random numbers of its continuations, in [0, 2⁶²).
    """

    prefix: list[int]
    text: str
    most: int
    number: int


class Writer(TextTeacher[WriterSettings]):
    """The settings of a writer with the tokenizers they need; see TextTeacher."""

    kind = "writer"

    def limits(self, limits: Limits) -> Limits:
        """`limits` without anything but continuations."""
        return replace(super().limits(limits), max_continuations=self.settings.max_continuations)

    def chunks(self, request: ScoreRequest, sequence: Sequence) -> tuple[Chunk, ...] | SequenceScore:
        """What is audited of a sequence of the request, [F].

        An error where a text spells one of the writer's special tokens, where the model does not take it or
        has nothing to go on from, and where there are more chunks than the settings allow.
        """
        assert sequence.anchors is not None
        anchors, most_chunks = sequence.anchors.tolist(), self.settings.max_chunks
        if not anchors:
            return ()
        if len(anchors) > most_chunks:  # each costs as much as the text before it
            message = f"got {len(anchors)} chunks of a response, allowed are {most_chunks}"
            return self.failed(sequence, "INVALID_ARGUMENT", message)
        prompt, response = self.prompt(request, sequence), self.said(sequence.response_ids)
        if (refused := self.refusal(sequence, prompt, response)) is not None:
            return refused
        question = self.settings.question(prompt)
        found = []
        for anchor in anchors:
            begin, end = (
                characters_of(self.said, sequence.response_ids, response, count)
                for count in (anchor, anchor + request.signal.chunk_tokens)
            )
            prefix, text = self.asked(question, response[:begin]), response[begin:end]
            if not prefix:
                return self.failed(sequence, NO_SCORE, f"there is no text before position {anchor}")
            most = max(1, len(self._plain_ids(text)))
            if (failed := self.too_long(sequence, len(prefix), most)) is not None:
                return failed
            found.append(Chunk(prefix, text, most, _number(prefix, anchor)))
        return tuple(found)

    def agreement(
        self, sequence: Sequence, chunks: Ids[Chunk], continuations: Ids[Ids[Ids[int]]]
    ) -> SequenceScore:
        """Mean similarity of each chunk's continuations with its text.

        Args:
            continuations: [F][N] ids that the writer sampled, without the token that ended one.
        """
        means = [
            math.fsum(edit_similarity(self._written(chunk, ids), chunk.text) for ids in own) / len(own)
            for chunk, own in zip(chunks, continuations, strict=True)
        ]
        return SequenceScore(sequence.id, agreement=np.array(means, dtype=np.float32))

    def _written(self, chunk: Chunk, ids: Ids[int]) -> str:
        """The text that ids add to a chunk's prefix; a character that is cut at its end is left out.

        Some tokenizers spell the first token of a text without its space, so that a few go before.
        """
        before = chunk.prefix[-_WINDOW:]
        known, whole = (
            self._own.decode(part, skip_special_tokens=True) for part in (before, [*before, *ids])
        )
        text: str = whole[_agreeing(known, whole) :]
        return text.rstrip(CUT)


def characters_of(said: Callable[[Int32Array], str], ids: Int32Array, text: str, count: int) -> int:
    """How many characters of `text`, which is all that ids [R] say, their first `count` ids say.

    A character that is cut there belongs to what follows: the parts of a text are always the whole of it.
    """
    return _agreeing(said(ids[:count]), text)


def edit_similarity(text: str, other: str) -> float:
    """1 − Levenshtein distance in characters / length of the longer text; 1 of two empty ones."""
    return float(Levenshtein.normalized_similarity(text, other))


def _agreeing(begin: str, text: str) -> int:
    """Length of the common beginning."""
    if text.startswith(begin):
        return len(begin)
    return next((i for i, pair in enumerate(zip(begin, text, strict=False)) if pair[0] != pair[1]), len(text))


def _number(prefix: list[int], anchor: int) -> int:
    """From what is asked alone, so that a request that comes again is answered alike."""
    digest = hashlib.sha256(np.array([anchor, *prefix], dtype="<i8").tobytes()).digest()
    return int.from_bytes(digest[:8], "little") >> 2
