"""vLLM's entry point to us: `vllm.general_plugins` loads it in every vLLM process.

It changes nothing unless a scoring engine is starting this process as one of its workers.
"""

from __future__ import annotations

import os


def register() -> None:
    """Let a worker of a scoring engine find the classes that score."""
    from services.models.vllm_adapter import SCORING_VARIABLE, register_scoring_models
    from services.teacher.engines.vllm.models import scoring_model

    if os.environ.get(SCORING_VARIABLE) == "1":
        register_scoring_models(scoring_model)
