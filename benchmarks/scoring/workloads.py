"""What is scored: model shapes, workloads, and batches of token ids that nobody has seen before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tutelage_client import ScoreRequest, Signal, codec
from tutelage_client.types import Int32Array

SPECIAL_IDS = 3  # begin, end and pad of the random models; no batch contains them


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Qwen3 of these sizes with random weights, in float32."""

    name: str
    hidden: int
    layers: int
    heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    max_positions: int = 4096


@dataclass(frozen=True, slots=True)
class Workload:
    """`groups` prompts of `prompt` tokens, each with `samples` responses of `response` tokens."""

    name: str
    model: str
    groups: int
    samples: int
    prompt: int
    response: int
    top_k: int = 0

    @property
    def positions(self) -> int:
        """Scored positions of one batch: prompts do not count."""
        return self.groups * self.samples * self.response

    def batch(self, seed: int) -> Batch:
        """Random ids; another seed shares no prefix with any earlier batch."""
        vocabulary = MODELS[self.model].vocabulary
        random = np.random.default_rng([seed, vocabulary, self.positions])

        def ids(rows: int, length: int) -> Int32Array:
            return random.integers(SPECIAL_IDS, vocabulary, (rows, length)).astype(np.int32)

        return Batch(
            contexts=ids(self.groups, self.prompt),
            responses=ids(self.groups * self.samples, self.response),
            samples=self.samples,
            top_k=self.top_k,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One call of a trainer. Response i belongs to context i // samples."""

    contexts: Int32Array  # [groups, P]
    responses: Int32Array  # [groups * samples, R]
    samples: int
    top_k: int

    @property
    def prompt_length(self) -> int:
        return int(self.contexts.shape[1])

    @property
    def positions(self) -> int:
        return int(self.responses.size)

    @property
    def tokens(self) -> int:
        """Tokens that somebody who shares nothing computes."""
        return self.positions + self.prompt_length * len(self.responses)

    def token_ids(self) -> Int32Array:
        """Context and response of every sequence, [groups * samples, P + R]."""
        return np.concatenate([np.repeat(self.contexts, self.samples, axis=0), self.responses], axis=1)

    def request(self) -> ScoreRequest:
        """As the service takes it."""
        return codec.build_request(
            self.contexts,
            self.responses,
            context_index=[number // self.samples for number in range(len(self.responses))],
            signal=Signal(top_k=self.top_k),
        )


MODELS = {
    shape.name: shape
    for shape in (
        # So little to compute that what surrounds the model is what is measured.
        ModelShape("frontend", 32, 1, 1, 32, 64, vocabulary=512),
        # Enough to compute that saving some of it shows.
        ModelShape("compute", 384, 6, 6, 64, 1024, vocabulary=4096),
        # A vocabulary of today on a small body.
        ModelShape("vocabulary", 128, 2, 4, 32, 256, vocabulary=151_936),
    )
}

WORKLOADS = {
    workload.name: workload
    for workload in (
        *(
            Workload(f"frontend_k{k}", "frontend", groups=16, samples=1, prompt=16, response=240, top_k=k)
            for k in (0, 20, 64, 256)
        ),
        Workload("group8_p4r1", "compute", groups=1, samples=8, prompt=512, response=128),
        Workload("group8_p1r1", "compute", groups=1, samples=8, prompt=256, response=256),
        Workload("group8_p1r4", "compute", groups=1, samples=8, prompt=96, response=384),
        Workload("independent", "compute", groups=3, samples=1, prompt=32, response=1216),
        Workload("short", "compute", groups=96, samples=1, prompt=32, response=16),
        Workload("vocab152k_k64", "vocabulary", groups=8, samples=1, prompt=16, response=112, top_k=64),
    )
}
