"""A real Prometheus and its promtool: the machine's own, or the one that `make setup` unpacked."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import yaml

from support.training_run import wait_until
from support.watched_run import free_port

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy/prometheus"
UNPACKED = ROOT / ".venv/prometheus/usr/bin"


def binary(name: str) -> str:
    """Path of `prometheus` or `promtool`; skips the test where there is none."""
    found = shutil.which(name) or shutil.which(name, path=str(UNPACKED))
    if found is None:
        pytest.skip(f"{name} is neither on the PATH nor in .venv/prometheus; `make setup` says why")
    return found


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [binary("promtool"), *arguments], check=False, capture_output=True, text=True, timeout=60, cwd=CONFIG
    )


class Prometheus:
    """A server with the committed configuration; only where the targets are and their token is its own.

    Args:
        targets: HOST:PORT of each job of prometheus.yml that is to be scraped; a job that is not named has
            none.
    """

    def __init__(self, directory: Path, targets: Mapping[str, list[str]], token_file: Path) -> None:
        config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
        unknown = targets.keys() - {job["job_name"] for job in config["scrape_configs"]}
        assert not unknown, unknown
        for job in config["scrape_configs"]:
            del job["dns_sd_configs"]
            job["static_configs"] = [{"targets": targets.get(job["job_name"], [])}]
            if "authorization" in job:
                job["authorization"]["credentials_file"] = str(token_file)
        config["rule_files"] = [str(CONFIG / name) for name in config["rule_files"]]
        directory.mkdir()
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._directory = directory
        self.url = f"http://127.0.0.1:{free_port()}"

    def __enter__(self) -> Self:
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    binary("prometheus"),
                    f"--config.file={self._directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._directory / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._ready, 30.0, "Prometheus")
        except BaseException:
            self._end()
            print(self.log())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def log(self) -> str:
        return (self._directory / "log").read_text()

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Series of an instant query, each with `metric` and `value`; an error of Prometheus is raised."""
        result: list[dict[str, Any]] = self.ask("query", query=expr)["result"]
        return result

    def ask(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of the HTTP API."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def _end(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def _ready(self) -> bool:
        assert self._process.poll() is None, self.log()
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
