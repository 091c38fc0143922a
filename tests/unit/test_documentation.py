"""What the documents name exists: functions, files, links and the run-file reference."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from student_trainer.config_reference import reference_markdown

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def defined_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_named_function_exists(document: Path) -> None:
    missing = [
        f"{file}::{name}"
        for file, name in re.findall(r"`([\w/.]+\.py)::([\w.]+)`", document.read_text())
        if not (ROOT / file).is_file() or name not in defined_names(ROOT / file)
    ]
    assert not missing, missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_and_named_file_exists(document: Path) -> None:
    text = document.read_text()
    links = [document.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    files = [
        ROOT / file
        for file in re.findall(
            r"`((?:services|student_trainer|launcher|tests|benchmarks|proto)/[\w/.]+)", text
        )
    ]
    missing = [str(path) for path in links + files if not path.exists()]
    assert not missing, missing


def test_the_run_file_reference_is_the_one_the_code_generates() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference_markdown(), (
        "run: python -m student_trainer.config_reference docs/configuration.md"
    )
