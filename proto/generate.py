"""Generates the protobuf code that is checked in, with the one generator it is pinned to."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path

# Its output runs on the oldest grpcio and protobuf that the client allows; newer ones would not.
GENERATOR = ("grpcio-tools", "1.78.0")
HERE = Path(__file__).resolve().parent
MESSAGES = ("tutelage/v1/rollout.proto", "tutelage/v1/teacher.proto")
SERVICES = ("tutelage/v1/teacher.proto",)


def generate(out: Path) -> None:
    """Write the Python modules, and the stubs of their types, under `out`."""
    name, version = GENERATOR
    installed = importlib.metadata.version(name)
    if installed != version:
        raise SystemExit(f"{name}: got {installed}, the checked-in code is made by {version}")
    from grpc_tools import protoc

    runs = [
        [f"--python_out={out}", f"--pyi_out={out}", *MESSAGES],
        [f"--grpc_python_out={out}", *SERVICES],
    ]
    for arguments in runs:
        if protoc.main(["protoc", f"-I{HERE}", *arguments]) != 0:
            raise SystemExit("protoc failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "src", help="directory to write into")
    generate(parser.parse_args().out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
