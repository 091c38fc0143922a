"""Requests cut out of a fixed set of sequences, whose plain scores are computed once.

Many sequences begin like another one and go their own way at some place, often at the border of a
block of the KV cache. Any context and response that lie in one of them have known scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tutelage_client.types import PAD_ID, ScoreRequest, Sequence, Signal

from support.tiny_models import VOCAB, plain_logits, random_ids

BLOCK = 32
CANDIDATES = 4
SIGNALS = [
    Signal(),
    Signal(top_k=3),
    Signal(top_k=VOCAB, entropy=True),
    Signal(sampled=False, top_k=20, temperature=0.7),
    Signal(candidates=True),
    Signal(candidates=True, entropy=True, top_k=5, temperature=2.5),
    Signal(sampled=False, entropy=True),
    Signal(entropy=True, temperature=0.4),
]


class Bank:
    """`count` sequences of `longest` tokens under `model`, and requests over them.

    Usable as the reference of `assert_scores`, for its own requests. A sequence's id ends with
    the number of the bank's sequence that it was cut from.
    """

    def __init__(self, model: Any, *, seed: int = 0, count: int = 32, longest: int = 256) -> None:
        random = np.random.default_rng(seed)
        self._ids = [random_ids(random, longest)]
        for _ in range(count - 1):
            grown = random_ids(random, longest)
            if random.random() < 0.8:
                shared = int(random.integers(1, longest))
                if random.random() < 0.5:
                    shared = max(shared // BLOCK, 1) * BLOCK
                grown[:shared] = self._ids[random.integers(len(self._ids))][:shared]
            self._ids.append(grown)
        self._logits = [plain_logits(model, ids[:1], ids[1:]) for ids in self._ids]
        self.longest = longest

    def request(
        self, random: np.random.Generator, signal: Signal, *, sequences: int = 4, request_id: str = ""
    ) -> ScoreRequest:
        """Ragged sequences of 2 to `longest` tokens, under shared contexts, some of them equal."""
        contexts, members = [], []
        for _ in range(int(random.integers(1, 3))):
            source = int(random.integers(len(self._ids)))
            size = self._cut(random, 1, self.longest - 1)
            contexts.append(self._ids[source][:size])
            alike = [i for i, ids in enumerate(self._ids) if np.array_equal(ids[:size], contexts[-1])]
            for _ in range(int(random.integers(1, sequences + 1))):
                number = int(random.choice(alike))
                end = self._cut(random, size + 1, self.longest)
                response = self._ids[number][size:end]
                name = f"{len(members)}/{number}"
                members.append(
                    Sequence(name, len(contexts) - 1, response, self._candidates(random, response, signal))
                )
        return ScoreRequest(tuple(contexts), tuple(members), signal, request_id=request_id)

    def requests(self, seed: int, count: int, signals: Iterable[Signal] = SIGNALS) -> list[ScoreRequest]:
        random, signals = np.random.default_rng(seed), list(signals)
        return [
            self.request(random, signals[random.integers(len(signals))], request_id=str(number))
            for number in range(count)
        ]

    def logprobs(self, request: ScoreRequest, sequence: Sequence) -> npt.NDArray[np.float64]:
        """[R, V] at the request's temperature."""
        number, start = int(sequence.id.split("/")[1]), len(request.contexts[sequence.context])
        rows = self._logits[number][start - 1 : start - 1 + len(sequence.response_ids)]
        return torch.log_softmax(rows.double() / request.signal.temperature, dim=-1).numpy()

    def sampled(self, request: ScoreRequest, sequence: Sequence) -> npt.NDArray[np.float64]:
        """[R]."""
        rows = np.arange(len(sequence.response_ids))
        taken: npt.NDArray[np.float64] = self.logprobs(request, sequence)[rows, sequence.response_ids]
        return taken

    def _cut(self, random: np.random.Generator, low: int, high: int) -> int:
        """A place in low … high: at a block's border, next to one, at an end, or anywhere."""
        if random.random() < 0.2:
            return int(random.choice([low, high]))
        place = int(random.integers(low, high + 1))
        if random.random() < 0.5:
            place = place // BLOCK * BLOCK + int(random.integers(-1, 2))
        return min(max(place, low), high)

    def _candidates(
        self, random: np.random.Generator, response: npt.NDArray[np.int32], signal: Signal
    ) -> npt.NDArray[np.int32] | None:
        if not signal.candidates:
            return None
        ids = random.integers(0, VOCAB, size=(len(response), CANDIDATES)).astype(np.int32)
        ids[random.random(ids.shape) < 0.2] = PAD_ID
        return ids
