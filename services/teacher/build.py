"""Engines by name; what an engine needs is imported only when it is the one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage_client.types import Limits

from services.api.metrics import Metrics
from services.teacher.engine import Engine
from services.teacher.settings import TeacherSettings

# Settings that change what a score costs, or are in the identity; any other one is in the cache's keys.
_CHANGE_NO_NUMBER: dict[str, Any] = dict.fromkeys(
    (
        *("name", "model", "revision", "follow", "scores", "dtype", "head_dtype", "threads", "cache"),
        *("limits", "service", "queue_url", "namespace", "heartbeat_seconds", "queue_concurrency"),
        *("consumer", "ready_file", "grace_seconds", "max_batch_tokens"),
    ),
    True,
) | {
    "fake": {
        *("latency_seconds", "tokens_per_second", "load_seconds", "failure_rate", "disconnect_rate"),
        *("poison_token", "exit_after"),
    },
    "vllm": {"gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len"},
}


def build_cached(settings: TeacherSettings, metrics: Metrics) -> Engine:
    """The engine of `settings`, behind the cache that they name, if they name one."""
    engine = build_engine(settings)
    if settings.cache is None:
        return engine
    from services.teacher.cache.engine import CachedEngine
    from services.teacher.cache.store import build_store

    store = build_store(settings.cache, settings.namespace)
    variant = settings.model_dump(mode="json", exclude=_CHANGE_NO_NUMBER)
    return CachedEngine(engine, store, variant=variant, metrics=metrics)


def build_engine(settings: TeacherSettings) -> Engine:
    """The engine of `settings`, not started yet; one that follows a channel where they say so."""
    limits = settings.limits.limits(settings.service.max_message_bytes)
    if settings.follow is not None:
        from services.models.channel import Channel
        from services.teacher.following import FollowingEngine

        def build(directory: Path) -> Engine:
            return _engine(settings.model_copy(update={"model": str(directory)}), limits)

        return FollowingEngine(Channel(settings.follow), build, limits)
    return _engine(settings, limits)


def _engine(settings: TeacherSettings, limits: Limits) -> Engine:
    if settings.engine == "fake":
        from services.teacher.engines.fake import FakeEngine

        return FakeEngine(settings.fake, name=settings.name, limits=limits)
    if settings.scores is not None:
        from services.teacher.engines.file import FileEngine

        return FileEngine(settings.scores, name=settings.name, limits=limits)
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
            adapters=settings.adapters,
            judge=settings.judge,
            writer=settings.writer,
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
        adapter=settings.adapters.get(settings.name),
        judge=settings.judge,
        writer=settings.writer,
    )
