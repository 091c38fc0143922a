"""Batched generation with a KV cache, for any causal language model of Hugging Face transformers.

Shapes: B rows alive, U distinct prompts, P padded prompt length, R response positions, V vocabulary,
K candidates. Logits exist for one position at a time, [B, V].
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tutelage_client.errors import invalid
from tutelage_client.types import Int32Array

from services.models.choose import Choice, choose
from services.models.load import load_weights
from services.models.uniforms import uniforms


@dataclass(frozen=True, slots=True)
class Row:
    """One response to sample. (group, sample) names its random numbers.

    Of a rollout, training groups count up from 0. Evaluation prompts count down from −1, so that they never
    share numbers with a training group.
    """

    prompt_ids: Int32Array  # [P], P ≥ 1
    group: int
    sample: int


@dataclass(frozen=True, slots=True)
class Response:
    """What was sampled for one row."""

    ids: Int32Array  # [R], with the end token when finished
    logprobs: npt.NDArray[np.float32]  # [R], under the sampling model at the sampling temperature
    candidate_ids: Int32Array | None  # [R, K], the sampling model's own most probable ids
    finished: bool  # False: cut at max_new_tokens


class GenerationInterruptedError(Exception):
    """Generation was told to stop; nothing of the call is kept."""


class TransformersGenerator:
    """Samples from a Hugging Face causal LM, `batch_size` rows at a time.

    Args:
        model: the model, as services.models.load makes it.
        end_ids: tokens that end a response.
        batch_size: rows generated at once.
        batch_tokens: positions of the cache, padding included, of rows generated at once; a longer row
            still gets its own batch. None: `batch_size` alone decides.
    """

    def __init__(
        self,
        model: Any,
        *,
        end_ids: Sequence[int],
        batch_size: int = 128,
        batch_tokens: int | None = None,
    ) -> None:
        if not end_ids:
            raise invalid("end_ids: got none; the tokenizer or the generation config must name an end token")
        accepted = inspect.signature(model.forward).parameters
        for needed in ("logits_to_keep", "past_key_values"):
            if needed not in accepted:
                raise invalid(f"model: {type(model).__name__} does not take {needed}, which sampling needs")
        self.model = model
        self._takes_positions = "position_ids" in accepted
        self._device = next(model.parameters()).device
        self._end_ids = torch.tensor(sorted(set(end_ids)), device=self._device)
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._interrupted = threading.Event()
        self._max_positions = getattr(model.config, "max_position_embeddings", None)

    def generate(
        self,
        rows: Sequence[Row],
        *,
        seed: int,
        temperature: float,
        max_new_tokens: int | Sequence[int],
        candidates: int = 0,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> list[Response]:
        """As Generator.generate; `max_new_tokens` may be one for each row.

        Once `unwanted`, asked after every token, says true: GenerationInterruptedError, of this call alone.
        """
        most = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        for row, count in zip(rows, most, strict=True):
            self._check_length(row, count)
        responses: dict[int, Response] = {}
        for indices in self._batches(rows, most):
            batch = [rows[i] for i in indices]
            counts = torch.tensor([most[i] for i in indices], device=self._device)
            longest = int(counts.max())
            draws = np.stack([uniforms(seed, row.group, row.sample, longest) for row in batch])
            with torch.inference_mode():
                numbers = torch.from_numpy(draws).to(self._device)
                steps = []
                for step in self._run(batch, numbers, counts, temperature, candidates):
                    steps.append(step)
                    if self._interrupted.is_set() or unwanted():
                        raise GenerationInterruptedError
            responses.update(zip(indices, _split(steps, len(batch)), strict=True))
        return [responses[i] for i in range(len(rows))]

    def interrupt(self) -> None:
        self._interrupted.set()

    def load_weights(self, directory: Path) -> None:
        load_weights(self.model, directory)

    def close(self) -> None:
        """Nothing to do: the model goes with its last reference."""

    def _batches(self, rows: Sequence[Row], most: Sequence[int]) -> Iterator[list[int]]:
        """Indices of rows by prompt length, so that there is little padding. Numbers do not depend on it."""
        batch: list[int] = []
        longest = 0
        for index in sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids)):
            width = max(longest, most[index]) + len(rows[index].prompt_ids)
            full = self._batch_tokens is not None and (len(batch) + 1) * width > self._batch_tokens
            if batch and (full or len(batch) == self._batch_size):
                yield batch
                batch, longest = [], 0
            batch.append(index)
            longest = max(longest, most[index])
        if batch:
            yield batch

    def _check_length(self, row: Row, max_new_tokens: int) -> None:
        prompt, limit = len(row.prompt_ids), self._max_positions
        if prompt < 1:
            raise invalid("prompt_ids: got no token, a prompt needs at least one")
        if limit is not None and prompt + max_new_tokens > limit:
            raise invalid(
                f"sampling.max_new_tokens: a prompt of {prompt} tokens and {max_new_tokens} new ones exceed "
                f"the model's {limit} positions; lower it, or set data.max_prompt_tokens"
            )

    def _run(
        self, batch: list[Row], draws: Tensor, counts: Tensor, temperature: float, candidates: int
    ) -> Iterator[_Step]:
        """Steps until every row ended or has its count [B] of tokens; `draws` is [B, largest count]."""
        state, logits = self._prefill(batch, draws.shape[1])
        alive = torch.arange(len(batch), device=self._device)
        for step in range(draws.shape[1]):
            choice = choose(logits, draws[alive, step], temperature=temperature, candidates=candidates)
            ended = torch.isin(choice.ids, self._end_ids)
            yield _Step(alive, choice, ended)
            if step + 1 == draws.shape[1]:
                break
            next_ids = choice.ids
            stopped = ended | (counts[alive] == step + 1)
            if bool(stopped.any()):
                kept = (~stopped).nonzero()[:, 0]
                if not len(kept):
                    break
                alive, next_ids = alive[kept], next_ids[kept]
                state.select(kept)
            logits = self._forward(next_ids[:, None], state.next_positions()[:, None], state)

    def _prefill(self, batch: list[Row], new_tokens: int) -> tuple[_State, Tensor]:
        """The cache after the prompts and the logits [B, V] of the first response token.

        Prompts are padded on the left, and each distinct one is computed once.
        """
        from transformers import DynamicCache

        number: dict[bytes, int] = {}
        source = [number.setdefault(row.prompt_ids.tobytes(), len(number)) for row in batch]
        prompts = [np.frombuffer(data, dtype=np.int32) for data in number]
        width = max(len(ids) for ids in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.ones(len(prompts), width + new_tokens, dtype=torch.long)
        for index, prompt in enumerate(prompts):
            ids[index, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[index, : width - len(prompt)] = 0
        state = _State(DynamicCache(config=self.model.config), mask.to(self._device))
        positions = (mask[:, :width].cumsum(dim=1) - 1).clamp_(min=0)
        logits = self._forward(ids.to(self._device), positions.to(self._device), state)
        if len(prompts) < len(batch):
            rows = torch.tensor(source, device=self._device)
            state.select(rows)
            logits = logits[rows]
        return state, logits

    def _forward(self, ids: Tensor, positions: Tensor, state: _State) -> Tensor:
        """Logits [B, V] after `ids` [B, columns], which are appended to the cache."""
        state.length += ids.shape[1]
        arguments = {"position_ids": positions} if self._takes_positions else {}
        output = self.model(
            input_ids=ids,
            attention_mask=state.mask[:, : state.length],
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
            **arguments,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


@dataclass(slots=True)
class _State:
    """The cache of the rows alive, and which of its columns are padding."""

    cache: Any
    mask: Tensor  # int64 [B, P + max_new_tokens], 0 at padding
    length: int = 0  # columns in the cache

    def select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def next_positions(self) -> Tensor:
        return self.mask[:, : self.length].sum(dim=1)


@dataclass(frozen=True, slots=True)
class _Step:
    rows: Tensor  # int64 [B], rows of the batch
    choice: Choice
    ended: Tensor  # bool [B]


def _split(steps: list[_Step], count: int) -> list[Response]:
    """Tokens step by step → responses row by row."""
    rows = torch.cat([step.rows for step in steps]).cpu()
    order = torch.argsort(rows, stable=True)
    lengths = torch.bincount(rows, minlength=count)
    bounds = lengths.cumsum(0)[:-1].tolist()

    def by_row(parts: list[Tensor]) -> list[npt.NDArray[Any]]:
        return np.split(torch.cat(parts).cpu()[order].numpy(), bounds)

    ids = by_row([step.choice.ids.int() for step in steps])
    logprobs = by_row([step.choice.logprobs for step in steps])
    ended = by_row([step.ended for step in steps])
    tops = [step.choice.candidate_ids for step in steps if step.choice.candidate_ids is not None]
    candidates = by_row(tops) if tops else [None] * count
    return [Response(ids[row], logprobs[row], candidates[row], bool(ended[row][-1])) for row in range(count)]
