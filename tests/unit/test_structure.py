"""The walls of the house: which package may import which, and what a bare client loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# package -> first-party packages it may import (its own package always may be).
ALLOWED = {
    "proto/src/tutelage_client": set(),
    "services/queue": {"services.strict_json"},
    "services/models": set(),
    "services/exporter": {
        "services.access",
        "services.exit_status",
        "services.logs",
        "services.metrics_server",
        "services.queue",
        "services.queue_address",
    },
    "services/teacher": {
        "services.access",
        "services.api",
        "services.score_file",
        "services.exit_status",
        "services.logs",
        "services.queue",
        "services.queue_address",
        "services.models",
        "services.tracing",
    },
    "services/api": {"services.access", "services.teacher.engine", "services.tracing"},
    "student_trainer": {
        "services.access",
        "services.logs",
        "services.metrics_server",
        "services.queue",
        "services.queue_address",
        "services.models",
        "services.score_file",
        "services.strict_json",
        "services.tracing",
    },
    "launcher": {"services", "student_trainer"},
}
FIRST_PARTY = ("services", "student_trainer", "launcher")


def imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    own = package.replace("proto/src/", "").replace("/", ".")
    allowed = ALLOWED[package] | {own}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (ROOT / package).rglob("*.py")
        for module in imported_modules(path)
        if module.split(".")[0] in FIRST_PARTY
        and not any(module == name or module.startswith(name + ".") for name in allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_client_loads_no_service_package() -> None:
    code = (
        "import sys, tutelage_client\n"
        "heavy = {'torch', 'fastapi', 'redis', 'pydantic', 'services', 'student_trainer'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for package in ("services", "student_trainer", "launcher", "proto/src/tutelage_client", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, silent


def test_one_module_configures_the_log_of_every_process() -> None:
    configuring = [
        str(path.relative_to(ROOT))
        for package in FIRST_PARTY
        for path in (ROOT / package).rglob("*.py")
        if "structlog.configure(" in path.read_text()
    ]
    assert configuring == ["services/logs.py"]
