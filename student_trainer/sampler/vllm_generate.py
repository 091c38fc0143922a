"""Generation by vLLM in this process: rows leave the batch as they end, a shared prompt is computed once.

Shapes: R response positions, K candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tutelage_client.errors import TutelageError, invalid

from services.models.generate import GenerationInterruptedError, Response, Row
from services.models.uniforms import stream_seed
from services.models.vllm_adapter import StepEngine
from services.models.vllm_settings import VllmSettings
from services.models.weights import check_same_model, describe


class VllmGenerator:
    """Samples from a causal LM that vLLM serves.

    A row's random numbers depend on (seed, group, sample, step) only. Its logits may round
    differently beside other rows, so that now and then one of two nearly equal tokens changes places
    with the other.

    Args:
        model: local directory or hub id.
        end_ids: tokens that end a response; those that vLLM finds in the model's files do not count.
        candidates: the most that `generate` will be asked for.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        dtype: str,
        settings: VllmSettings,
        end_ids: Sequence[int],
        candidates: int = 0,
        revision: str | None = None,
    ) -> None:
        if not end_ids:
            raise invalid("end_ids: got none; the tokenizer or the generation config must name an end token")
        self._end_ids = sorted(set(end_ids))
        self._description = describe(Path(model)) if Path(model).is_dir() else None
        self._interrupted = threading.Event()
        # As a model's own forward does: logits in its type. What is recorded is what was sampled from.
        self.engine = StepEngine(
            str(model),
            purpose="generate",
            settings=_allow_logprobs(settings, candidates),
            dtype=dtype,
            revision=revision,
            head_dtype="model",
            seeded=True,
        )

    def generate(
        self, rows: Sequence[Row], *, seed: int, temperature: float, max_new_tokens: int, candidates: int = 0
    ) -> list[Response]:
        for row in rows:
            self._check_length(row, max_new_tokens)
        responses: dict[str, Response] = {}
        waiting: set[str] = set()
        try:
            for i, row in enumerate(rows):
                own = None if temperature == 0.0 else stream_seed(seed, row.group, row.sample)
                params = self._params(own, temperature, max_new_tokens, candidates)
                self.engine.add(str(i), row.prompt_ids.tolist(), params)
                waiting.add(str(i))
            while waiting:
                if self._interrupted.is_set():
                    raise GenerationInterruptedError
                for output in self.engine.step():
                    responses[output.request_id] = _response(output.outputs[0], candidates)
                    waiting.remove(output.request_id)
        finally:
            if waiting:
                self.engine.abort(sorted(waiting))
        return [responses[str(i)] for i in range(len(rows))]

    def interrupt(self) -> None:
        self._interrupted.set()

    def load_weights(self, directory: Path) -> None:
        """Sample from this export of the same architecture from now on.

        Raises:
            TutelageError: FAILED_PRECONDITION for other tensors than the model was started with;
                vLLM would keep the old values of a missing one.
        """
        if self._description is not None:
            check_same_model(self._description, directory)
        self.engine.load_weights(directory)

    def close(self) -> None:
        self.engine.close()

    def _check_length(self, row: Row, max_new_tokens: int) -> None:
        prompt, limit = len(row.prompt_ids), self.engine.facts.max_model_len
        if prompt < 1:
            raise invalid("prompt_ids: got no token, a prompt needs at least one")
        if prompt + max_new_tokens > limit:
            raise invalid(
                f"sampling.max_new_tokens: a prompt of {prompt} tokens and {max_new_tokens} new ones exceed "
                f"the {limit} positions that vLLM serves; lower it, set data.max_prompt_tokens, or raise "
                "sampling.vllm.max_model_len if the model has more"
            )

    def _params(self, seed: int | None, temperature: float, max_new_tokens: int, candidates: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_new_tokens,
            stop_token_ids=self._end_ids,
            ignore_eos=True,  # our end tokens alone decide
            logprobs=candidates,  # besides the sampled token's own
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )


def _allow_logprobs(settings: VllmSettings, candidates: int) -> VllmSettings:
    allowed = settings.engine_args.get("max_logprobs", 0)
    arguments = {**settings.engine_args, "max_logprobs": max(allowed, candidates)}
    return settings.model_copy(update={"engine_args": arguments})


def _response(output: Any, candidates: int) -> Response:
    """From a finished CompletionOutput. Per position: the sampled token, then the most probable ones."""
    ids = np.array(output.token_ids, dtype=np.int32)
    shape = (len(ids), candidates + 1)
    logprobs = np.array(output.logprobs.logprobs, dtype=np.float32).reshape(shape)[:, 0].copy()
    if not np.isfinite(logprobs).all():
        raise TutelageError("INTERNAL", "the sampling model's logits are not finite (NaN or +inf)")
    top = None
    if candidates:
        top = np.array(output.logprobs.token_ids, dtype=np.int32).reshape(shape)[:, 1:].copy()
    return Response(ids, logprobs, top, output.finish_reason == "stop")
