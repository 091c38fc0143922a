"""The client distribution by itself: three dependencies, a quick import, and a ten-line script."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.teachers import teacher_process

PROTO = Path(__file__).resolve().parents[2] / "proto"

SCRIPT = """\
import sys
from tutelage_client import TeacherClient
with TeacherClient(sys.argv[1]) as teacher:
    print(teacher.get_teacher().identity.model)
    score = teacher.score(contexts=[[1, 2, 3]], responses=[[4, 5], [6]], top_k=4)
    for sequence in score.raise_for_errors().sequences:
        print(sequence.id, sequence.sampled.shape, sequence.top_ids.shape, float(sequence.sampled.sum()) < 0)
"""

IMPORT = """\
import sys, time
began = time.process_time()  # what it costs, whatever else the machine is doing
import tutelage_client
print(time.process_time() - began)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def pip(python: Path, *arguments: str) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--python",
        str(python),
        *arguments,
    ]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=170
    ).stdout.splitlines()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the client, what it depends on, and nothing else of this repository."""
    directory = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory / "venv")], check=True)
    inside = directory / "venv" / "bin" / "python"
    pip(inside, "install", "--quiet", str(PROTO))
    return inside


def run(python: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        [str(python), "-I", *arguments], check=True, capture_output=True, text=True, cwd=python.parent
    )
    return done.stdout.splitlines()


def test_it_has_three_direct_dependencies_and_installs_no_framework(python: Path) -> None:
    show = pip(python, "show", "tutelage-client")
    requires = next(line for line in show if line.startswith("Requires:"))
    assert sorted(re.findall(r"[\w-]+", requires.partition(":")[2])) == ["grpcio", "numpy", "protobuf"]
    installed = {line.split()[0].lower() for line in pip(python, "list")[2:]}
    assert not installed & {"torch", "fastapi", "redis", "transformers", "pydantic"}


def test_it_imports_quickly_and_loads_nothing_heavy(python: Path) -> None:
    imports = [run(python, "-c", IMPORT) for _ in range(5)]
    assert min(float(seconds) for seconds, _ in imports) <= 0.200
    loaded = set(imports[0][1].split())
    assert {"numpy", "grpc", "google", "tutelage_client"} <= loaded
    assert not loaded & {"torch", "fastapi", "redis", "transformers", "pydantic", "structlog", "services"}


def test_a_ten_line_script_scores_against_a_running_teacher(python: Path, tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text(textwrap.dedent(SCRIPT))
    assert len(SCRIPT.splitlines()) <= 10
    with teacher_process(tmp_path / "teacher") as teacher:
        lines = run(python, str(script), teacher.grpc)
    assert lines == ["fake-1024", "0 (2,) (2, 4) True", "1 (1,) (1, 4) True"]
