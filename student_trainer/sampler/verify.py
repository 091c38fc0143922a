"""Start-up self-test: what sampling records must be what a plain forward pass says.

An error of one position in the cache, the padding or the position ids moves log-probabilities by
about 10 nats on a trained model, while training on them looks healthy for a long time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tutelage_client.errors import TutelageError
from tutelage_client.types import Int32Array

from services.models.generate import Row
from student_trainer.sampler.generate import Generator

# Largest accepted difference in nats. Below float32 the cached and the plain pass round differently.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}
MEAN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
# A quantized sampler is another model, whose own log-probabilities are right; mistakes of position show.
QUANTIZED_TOLERANCE, QUANTIZED_MEAN_TOLERANCE = 4.0, 0.5
TEST_TOKENS = 8
TEST_GROUP = -(2**62)  # random numbers that no training or evaluation prompt uses


def plain_logprobs(
    model: Any, prompt_ids: Int32Array, response_ids: Int32Array, temperature: float = 1.0
) -> npt.NDArray[np.float32]:
    """float32 [R]: log-probability of each response token, from one unpadded forward without a cache."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.concatenate([prompt_ids, response_ids]).astype(np.int64)).to(device)
    with torch.inference_mode():
        # The output at position t predicts token t + 1, so R + 1 outputs cover the response.
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=len(response_ids) + 1).logits
        logprobs = torch.log_softmax(logits[0, :-1].float() / temperature, dim=-1)
        chosen = logprobs.gather(1, ids[len(prompt_ids) :, None])[:, 0]
    result: npt.NDArray[np.float32] = chosen.cpu().numpy()
    return result


def check_generator(
    generator: Generator,
    model: Any,
    prompts: Sequence[Int32Array],
    *,
    temperature: float,
    max_new_tokens: int,
    quantized: bool = False,
) -> float:
    """Sample a few short responses to prompts of unequal length and score them again.

    Returns:
        The largest difference, in nats.

    Raises:
        TutelageError: FAILED_PRECONDITION when recorded and plain log-probabilities disagree.
    """
    # Cut prompts force padding even where a task's prompts all have one length.
    ragged = [ids[: max(1, len(ids) - 2 * i)] for i, ids in enumerate(prompts)]
    rows = [Row(ids, TEST_GROUP, i) for i, ids in enumerate(ragged)]
    tokens = min(TEST_TOKENS, max_new_tokens)
    responses = generator.generate(rows, seed=0, temperature=temperature, max_new_tokens=tokens)
    differences = np.concatenate(
        [
            np.abs(response.logprobs - plain_logprobs(model, row.prompt_ids, response.ids, temperature))
            for row, response in zip(rows, responses, strict=True)
        ]
    )
    dtype = next(model.parameters()).dtype
    largest, mean = float(differences.max()), float(differences.mean())
    allowed, allowed_mean = TOLERANCE[dtype], MEAN_TOLERANCE[dtype]
    if quantized:
        allowed, allowed_mean = QUANTIZED_TOLERANCE, QUANTIZED_MEAN_TOLERANCE
    if not (largest <= allowed and mean <= allowed_mean):
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"sampler self-test: log-probabilities recorded while sampling from {type(model).__name__} "
            f"differ from a plain forward by up to {largest:.2g} nats (mean {mean:.2g}); allowed in {dtype} "
            f"are {allowed} (mean {allowed_mean}). This model cannot be sampled with a cache here",
        )
    return largest
