"""The checked-in protobuf code is what the pinned generator makes of the .proto files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).resolve().parents[2] / "proto"


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(PROTO / "generate.py"), "--out", str(tmp_path)], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "tutelage" / "v1").iterdir()}
    kept = {path.name: path.read_text() for path in (PROTO / "src" / "tutelage" / "v1").glob("*_pb2*")}
    assert made.keys() == kept.keys()
    for name, text in made.items():
        assert text == kept[name], f"{name} is stale; run `make proto`"


def test_generated_code_is_not_newer_than_the_oldest_allowed_runtime() -> None:
    project = (PROTO / "pyproject.toml").read_text()
    allowed = dict(re.findall(r'"(grpcio|protobuf)>=([\d.]+)', project))
    messages = (PROTO / "src" / "tutelage" / "v1" / "teacher_pb2.py").read_text()
    services = (PROTO / "src" / "tutelage" / "v1" / "teacher_pb2_grpc.py").read_text()
    protobuf = re.search(r"Protobuf Python Version: ([\d.]+)", messages)
    grpcio = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", services)
    assert protobuf is not None
    assert grpcio is not None

    def version(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    assert version(protobuf[1]) <= version(allowed["protobuf"])
    assert version(grpcio[1])[:2] <= version(allowed["grpcio"])[:2]
