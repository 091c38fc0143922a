"""The trainer's small HTTP port: /health, /status (JSON), /metrics (Prometheus)."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry, Gauge

from services import strict_json
from services.metrics_server import MetricsServer, metrics_page
from student_trainer.sections import MetricsSettings

# Figures that are several, and what tells them apart.
_LABELS = {"groups_dropped": "reason"}


class StatusServer:
    """Serves the newest figures.

    Args:
        run: the run's name, by which figures of several trainers are told apart.

    Raises:
        TutelageError: the port cannot be had, or the token file not be used.
    """

    def __init__(self, settings: MetricsSettings, run: str) -> None:
        self._registry = CollectorRegistry()
        info = Gauge(
            "tutelage_trainer_info", "Always 1: whose figures these are", ["run"], registry=self._registry
        )
        info.labels(run).set(1)
        self._gauges: dict[str, Gauge] = {}
        self._status: dict[str, Any] = {}
        self._server = MetricsServer(
            {
                "/status": lambda: ("application/json", strict_json.dumps(self._status).encode()),
                "/metrics": metrics_page(self._registry),
            },
            host=settings.host,
            port=settings.trainer_port,
            tokens=settings.tokens(),
        )

    @property
    def address(self) -> str:
        return self._server.address

    def update(self, figures: Mapping[str, Any]) -> None:
        """Replace the values of these names; numbers become gauges tutelage_trainer_NAME."""
        self._status = self._status | dict(figures)
        for name, value in figures.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._gauge(name).set(value)
            elif name in _LABELS:
                for label, one in value.items():
                    self._gauge(name).labels(label).set(one)

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, error, trace)

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            labels = [_LABELS[name]] if name in _LABELS else []
            self._gauges[name] = Gauge(
                f"tutelage_trainer_{name}", f"Newest {name} of the trainer.", labels, registry=self._registry
            )
        return self._gauges[name]
