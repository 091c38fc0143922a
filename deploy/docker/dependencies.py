"""Prints what the distributions of this repository need, one requirement a line, for images to install alone.

python deploy/docker/dependencies.py [EXTRA]...

So a layer of libraries depends on the two pyproject.toml and constraints.txt, and not on any source file.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def dependencies(extras: list[str]) -> list[str]:
    """Requirements of service and client with these extras, without the two themselves."""
    service = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((ROOT / "proto/pyproject.toml").read_text())["project"]
    wanted = [*client["dependencies"], *service["dependencies"]]
    for extra in extras:
        wanted += service["optional-dependencies"][extra]
    return sorted({line for line in wanted if not line.startswith(client["name"])})


if __name__ == "__main__":
    sys.stdout.write("\n".join(dependencies(sys.argv[1:])) + "\n")
