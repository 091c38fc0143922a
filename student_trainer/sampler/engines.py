"""What computes while sampling: a Hugging Face model in this process, or vLLM; each proved at start-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from tutelage_client.types import Int32Array

from services.models.generate import TransformersGenerator
from services.models.load import LoadedModel, load_causal_lm, resolve_device
from student_trainer.sampler.generate import Generator
from student_trainer.sampler.policy import end_ids
from student_trainer.sampler.settings import SamplingSettings
from student_trainer.sampler.verify import check_generator

ROOM = 1.3  # of a model's size, for a short forward of it beside vLLM

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to sample from.

    Attributes:
        device: of the Hugging Face model; vLLM computes on what it was built for.
    """

    path: Path | str
    revision: str | None
    dtype: str
    device: str


def load_plain(sampling: SamplingSettings, source: ModelSource, *, stays: bool) -> LoadedModel:
    """The Hugging Face model that samples, or with vLLM the one that checks it.

    Args:
        stays: packed forwards will be asked of it, whoever samples.
    """
    on_device = stays or sampling.engine == "transformers"
    return load_causal_lm(
        source.path,
        dtype=source.dtype,
        # vLLM takes most of a GPU, and takes it when it starts.
        device=source.device if on_device else "cpu",
        revision=source.revision,
        attention="packed" if stays else "plain",
    )


def open_generator(
    sampling: SamplingSettings, source: ModelSource, plain: LoadedModel, *, candidates: int
) -> Generator:
    """What samples from `source` as [sampling] engine says."""
    ends = end_ids(plain, source.path)
    if sampling.engine == "transformers":
        return TransformersGenerator(plain.model, end_ids=ends, batch_size=sampling.batch_size)
    from student_trainer.sampler.vllm_generate import VllmGenerator

    return VllmGenerator(
        source.path,
        dtype=source.dtype,
        settings=sampling.vllm,
        end_ids=ends,
        candidates=candidates,
        revision=source.revision,
    )


def self_test(
    generator: Generator,
    sampling: SamplingSettings,
    source: ModelSource,
    plain: LoadedModel,
    prompts: Sequence[Int32Array],
    *,
    stays: bool,
) -> None:
    """Compare the generator with plain forwards; a model that vLLM is checked with is emptied afterwards.

    Raises:
        TutelageError: FAILED_PRECONDITION when recorded and plain log-probabilities disagree.
    """
    released = sampling.engine == "vllm" and not stays
    if released:
        _move_where_there_is_room(plain.model, source.device)
    difference = check_generator(
        generator,
        plain.model,
        prompts,
        temperature=sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
        quantized=sampling.vllm.quantization is not None,
    )
    log.info("self-test passed", model=str(source.path), largest_difference=difference)
    if released:
        plain.model.to("meta")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _move_where_there_is_room(model: Any, device: str) -> None:
    """To `device` if the engine left room beside it; else a few short forwards on the CPU will do."""
    target = resolve_device(device)
    if target.type == "cuda":
        size = sum(parameter.nbytes for parameter in model.parameters())
        free, _ = torch.cuda.mem_get_info(target)
        if free > ROOM * size:
            model.to(target)
