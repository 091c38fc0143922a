"""Whether a model's name is a directory of this machine or an id of the hub."""

from __future__ import annotations

from pathlib import Path


def is_lost(path_or_id: str | Path) -> bool:
    """Whether it is spelled as a path at which there is no directory; an id of the hub is OWNER/NAME."""
    name = str(path_or_id)
    spelled_as_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return spelled_as_path and not Path(name).is_dir()
