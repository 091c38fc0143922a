"""What /metrics shows: the service's own figures and, beside them, those of an engine that is a library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from services.api.metrics import Metrics


@pytest.fixture
def library() -> Iterator[Counter]:
    """Figures as vLLM registers them, and one of a library that is no engine."""
    tokens = Counter("vllm:prompt_tokens_of_test", "as vLLM names them", ["model_name"])
    other = Gauge("other_library_of_test", "not an engine's")
    yield tokens
    REGISTRY.unregister(tokens)
    REGISTRY.unregister(other)


def families(metrics: Metrics) -> dict[str, dict[str, float]]:
    parsed = list(text_string_to_metric_families(metrics.exposition().decode()))
    found = {family.name: {s.name: s.value for s in family.samples} for family in parsed}
    assert len(found) == len(parsed), "a family is there twice"
    return found


def test_figures_of_the_engine_stand_beside_the_services_own(library: Counter) -> None:
    metrics = Metrics()
    library.labels("m").inc(7)
    metrics.ready.set(1)
    found = families(metrics)
    assert found["vllm:prompt_tokens_of_test"]["vllm:prompt_tokens_of_test_total"] == 7
    assert found["tutelage_ready"] == {"tutelage_ready": 1}
    assert {name.split("_")[0].split(":")[0] for name in found} == {"vllm", "tutelage"}


def test_an_engine_that_starts_or_ends_later_is_seen_at_the_next_look() -> None:
    metrics = Metrics()
    assert "vllm:late_of_test" not in families(metrics)
    late = Gauge("vllm:late_of_test", "registered after the service began")
    late.set(3)
    assert families(metrics)["vllm:late_of_test"] == {"vllm:late_of_test": 3}
    REGISTRY.unregister(late)
    assert "vllm:late_of_test" not in families(metrics)
