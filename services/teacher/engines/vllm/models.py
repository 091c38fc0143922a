"""Causal LMs of vLLM as pooling models: the same class, with the scoring pooler."""

from __future__ import annotations

from typing import Any

from torch import nn


def scoring_model(original: type[nn.Module]) -> type[nn.Module]:
    """`original`, whose instances also score; its head and its weights stay what they are."""
    from services.teacher.engines.vllm.pooler import ScoringPooler

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "", **arguments: Any) -> None:
        original.__init__(self, vllm_config=vllm_config, prefix=prefix, **arguments)
        self.pooler = ScoringPooler(self)

    members = {"__init__": __init__, "is_pooling_model": True, "__module__": __name__}
    return type(original.__name__, (original,), members)
