"""Where a response is audited: the chunks that begin where the student is least certain.

Shapes: R response positions, F chunks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tutelage_client.types import Int32Array


def peak_anchors(
    entropy: npt.NDArray[np.floating],
    selected: npt.NDArray[np.bool_],
    *,
    chunks: int,
    chunk_tokens: int,
) -> Int32Array:
    """First positions of at most `chunks` chunks, ascending, int32 [F].

    The highest position whose chunk lies within the response is taken first, then the highest one whose
    chunk overlaps none that was taken, and so on; of equals the earlier one.

    Args:
        entropy: [R], of the student's next-token distribution, finite.
        selected: bool [R]; a chunk with a position that is not selected is not taken.
    """
    rows = len(entropy)
    whole = np.concatenate([[0], np.cumsum(selected)])
    starts = np.arange(max(0, rows - chunk_tokens + 1))
    free = whole[starts + chunk_tokens] - whole[starts] == chunk_tokens
    taken: list[int] = []
    for start in np.argsort(-entropy[starts], kind="stable"):
        if len(taken) == chunks:
            break
        if free[start]:
            taken.append(int(start))
            free[max(0, start - chunk_tokens + 1) : start + chunk_tokens] = False
    return np.array(sorted(taken), dtype=np.int32)
