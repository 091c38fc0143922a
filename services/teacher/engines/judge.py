"""A judge on a model of transformers: every sequence of a batch is asked about at once, greedily."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from tutelage_client.types import SequenceScore

from services.models.load import LoadedModel
from services.teacher.engines.batching import Unit
from services.teacher.engines.forward import GIVEN_UP, BatchScores, UnitScores
from services.teacher.judge import Judge
from services.teacher.text_teacher import end_tokens


@dataclass(frozen=True)
class JudgeScorer:
    """A loaded model that says judgements."""

    loaded: LoadedModel
    teacher: Judge

    @torch.inference_mode()
    def score(self, batch: list[Unit]) -> BatchScores:
        """A judgement, or an error, for every sequence of every unit.

        Of a unit that nobody waits for any more the rest is not written.
        """
        return BatchScores([self._unit(unit) for unit in batch])

    def _unit(self, unit: Unit) -> UnitScores:
        request = unit.job.request
        sequences = {index: request.sequences[index] for index in unit.sequences}
        asked: dict[int, list[int]] = {}
        scores: dict[int, SequenceScore] = {}
        for index, sequence in sequences.items():
            ids = self.teacher.prompt_ids(request, sequence)
            if isinstance(ids, SequenceScore):
                scores[index] = ids
            else:
                asked[index] = ids
        computed = 0
        ends = end_tokens(self.loaded.model.generation_config, self.loaded.tokenizer)
        replies = self._replies(asked, ends, unit)
        if unit.unwanted():
            return GIVEN_UP
        for index, reply in replies.items():
            place = next((place for place, token in enumerate(reply) if token in ends), None)
            computed += len(asked[index]) + (len(reply) if place is None else place + 1)
            scores[index] = self.teacher.judgement(sequences[index], reply[:place], ended=place is not None)
        return UnitScores(scores, computed, 0, positions=0, invalid_positions=0)

    def _replies(self, asked: dict[int, list[int]], ends: list[int], unit: Unit) -> dict[int, list[int]]:
        """The most probable reply to each prompt, up to the end token and what pads it."""
        if not asked:
            return {}
        model = self.loaded.model
        longest = max(map(len, asked.values()))
        ids = torch.full((len(asked), longest), ends[0])
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(asked.values()):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.teacher.settings.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )

        def stop(written: torch.Tensor, _: object, **__: object) -> torch.Tensor:
            return torch.full((len(written),), unit.unwanted(), device=written.device)

        replies = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=greedy,
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        return dict(zip(asked, replies[:, longest:].tolist(), strict=True))
