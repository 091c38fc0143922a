"""`tutelage bench`: every benchmark of the repository in turn, then one table of what they recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tutelage_client.errors import invalid

DIRECTORY = Path("benchmarks")
LATEST = DIRECTORY / "results" / "latest.jsonl"
NOT_BENCHMARKS = {"__init__", "results"}


def run_benchmarks(names: Sequence[str]) -> int:
    """Run the named ones (all when none is named); 1 when one of them failed.

    Raises:
        FileNotFoundError: the working directory is no clone of the repository.
        TutelageError: no benchmark has that name.
    """
    if not (DIRECTORY / "results.py").is_file():
        raise FileNotFoundError("there is no benchmarks/ here; run this in a clone of the repository")
    modules = {path.stem for path in DIRECTORY.glob("*.py")} - NOT_BENCHMARKS
    known = sorted(modules | {path.parent.name for path in DIRECTORY.glob("*/__main__.py")})
    for name in names:
        if name not in known:
            raise invalid(f"benchmark: got {name!r}, there are {', '.join(known)}")
    failed = []
    for name in names or known:
        print(f"{name} …", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode != 0:
            failed.append(name)
    _print_table()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _print_table() -> None:
    from rich.console import Console
    from rich.table import Table

    if not LATEST.is_file():
        return
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for title in ("figure", "value", "unit", "ours", "peer", "compared with"):
        table.add_column(
            title,
            justify="right" if title in ("value", "ours", "peer") else "left",
            no_wrap=title == "figure",
        )
    for line in LATEST.read_text(encoding="utf-8").splitlines():
        figure = json.loads(line)
        peer = "–" if figure["peer"] is None else f"{figure['peer']:,.4g}"
        value, ours = f"{figure['value']:.4g}", f"{figure['ours']:,.4g}"
        table.add_row(figure["name"], value, figure["unit"], ours, peer, figure["peer_name"] or "")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\n{LATEST}")
