"""JSON that every reader takes: a figure that is not finite is null, where Python would write NaN."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: object, **options: Any) -> str:
    """`json.dumps` with null for NaN and infinities, however deep in mappings, lists and tuples."""
    return json.dumps(_finite(value), **options)


def _finite(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _finite(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value
