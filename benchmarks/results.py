"""Where figures go: benchmarks/results/latest.jsonl, one JSON object per named figure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

LATEST = Path(__file__).parent / "results" / "latest.jsonl"


def record(
    name: str,
    value: float,
    *,
    unit: str,
    ours: float,
    peer: float | None = None,
    peer_name: str | None = None,
    runs: Sequence[object] = (),
    extra: Mapping[str, object] | None = None,
    path: Path = LATEST,
) -> None:
    """Write one figure, replacing an earlier one of the same name.

    Args:
        name: "area.figure", for example "loss.time_ratio".
        value: the figure itself; the ratio ours / peer where there is a peer.
        unit: of `value`.
        ours, peer: what the ratio was made of, both in the same unit.
        peer_name: what we were compared with.
        runs: the single measurements behind ours and peer.
        extra: what else a reader of the figure should know; no key in the line without it.
    """
    figure: dict[str, object] = {
        "name": name,
        "value": value,
        "unit": unit,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "runs": list(runs),
    }
    if extra is not None:
        figure["extra"] = dict(extra)
    earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in earlier if line.strip() and json.loads(line)["name"] != name]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join([*kept, json.dumps(figure)]) + "\n", encoding="utf-8")
    os.replace(temporary, path)
