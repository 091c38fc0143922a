"""Engines by name; what an engine needs is imported only when it is the one."""

from __future__ import annotations

from services.teacher.engine import Engine
from services.teacher.settings import TeacherSettings


def build_engine(settings: TeacherSettings) -> Engine:
    """The engine of `settings`, not started yet."""
    limits = settings.limits.limits(settings.service.max_message_bytes)
    if settings.engine == "fake":
        from services.teacher.engines.fake import FakeEngine

        return FakeEngine(settings.fake, name=settings.name, limits=limits)
    assert settings.model is not None  # TeacherSettings has checked it
    if settings.engine == "vllm":
        from services.teacher.engines.vllm.engine import VllmEngine

        return VllmEngine(
            settings.model,
            name=settings.name,
            dtype=settings.dtype,
            revision=settings.revision,
            head_dtype=settings.head_dtype,
            settings=settings.vllm,
            limits=limits,
        )
    from services.teacher.engines.transformers import TransformersEngine

    return TransformersEngine(
        settings.model,
        name=settings.name,
        dtype=settings.dtype,
        device=settings.device,
        revision=settings.revision,
        head_dtype=settings.head_dtype,
        max_batch_tokens=settings.max_batch_tokens,
        deterministic=settings.deterministic,
        threads=settings.threads,
        limits=limits,
    )
