"""A writer on a model of transformers: continuations of many places are sampled at once, with a KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tutelage_client.types import SequenceScore

from services.models.generate import GenerationInterruptedError, Row, TransformersGenerator
from services.models.load import LoadedModel
from services.teacher.engines.batching import Unit
from services.teacher.engines.forward import GIVEN_UP, BatchScores, UnitScores
from services.teacher.text_teacher import end_tokens
from services.teacher.writer import Chunk, Writer

# Positions of the KV cache that are held at once: 8 GiB of a model with 32 layers of 8 heads in bfloat16.
CACHE_TOKENS = 65_536
# Rows whose next-token logits are held at once: 0.3 GB of a vocabulary of 152k in bfloat16.
MOST_ROWS = 1024


@dataclass(frozen=True)
class WriterScorer:
    """A loaded model that writes continuations."""

    loaded: LoadedModel
    teacher: Writer
    generator: TransformersGenerator

    @classmethod
    def of(cls, loaded: LoadedModel, teacher: Writer) -> WriterScorer:
        """INVALID_ARGUMENT for a model that has no end token, or cannot be sampled with a cache."""
        ends = end_tokens(loaded.model.generation_config, loaded.tokenizer)
        generator = TransformersGenerator(
            loaded.model, end_ids=ends, batch_size=MOST_ROWS, batch_tokens=CACHE_TOKENS
        )
        return cls(loaded, teacher, generator)

    @torch.inference_mode()
    def score(self, batch: list[Unit]) -> BatchScores:
        """An agreement, or an error, for every sequence of every unit.

        A unit is sampled by itself: a job that comes again is cut into the same ones. Of one that nobody
        waits for any more the rest is not written.
        """
        return BatchScores([self._unit(unit) for unit in batch])

    def _unit(self, unit: Unit) -> UnitScores:
        request = unit.job.request
        asked: dict[int, tuple[Chunk, ...]] = {}
        scores: dict[int, SequenceScore] = {}
        for index in unit.sequences:
            chunks = self.teacher.chunks(request, request.sequences[index])
            if isinstance(chunks, SequenceScore):
                scores[index] = chunks
            else:
                asked[index] = chunks
        every = [chunk for chunks in asked.values() for chunk in chunks]
        try:
            written = iter(self._continuations(every, unit))
        except GenerationInterruptedError:
            return GIVEN_UP
        computed = sum(len(chunk.prefix) for chunk in every)
        for index, chunks in asked.items():
            texts = [next(written) for _ in chunks]
            computed += sum(len(ids) for own in texts for ids in own)
            scores[index] = self.teacher.agreement(request.sequences[index], chunks, texts)
        return UnitScores(scores, computed, 0, positions=0, invalid_positions=0)

    def _continuations(self, chunks: list[Chunk], unit: Unit) -> list[list[list[int]]]:
        """[F][N] ids, without the token that ended one."""
        count = unit.job.request.signal.continuations
        rows = [
            Row(np.array(chunk.prefix, dtype=np.int32), chunk.number, sample)
            for chunk in chunks
            for sample in range(count)
        ]
        responses = self.generator.generate(
            rows,
            seed=0,  # the chunk's number is a hash of all that matters
            temperature=self.teacher.settings.temperature,
            max_new_tokens=[chunk.most for chunk in chunks for _ in range(count)],
            unwanted=unit.unwanted,
        )
        ids = [response.ids.tolist()[: -1 if response.finished else None] for response in responses]
        return [ids[start : start + count] for start in range(0, len(ids), count)]
