"""Random numbers that belong to a rollout and a step, whoever draws them and in which batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_WORD = 2**64 - 1


def uniforms(seed: int, group: int, sample: int, count: int) -> npt.NDArray[np.float64]:
    """float64 [count] in [0, 1): the numbers of steps 0 … count − 1 of one rollout.

    Philox 4x64 (Salmon et al. 2011) keyed by (seed, group), with the sample index in the highest
    word of its counter: streams never overlap, and step t's number does not depend on `count`.
    """
    return np.random.Generator(_stream(seed, group, sample)).random(count)


def stream_seed(seed: int, group: int, sample: int) -> int:
    """A seed in [0, 2⁶³) for a generator of somebody else's, one for each rollout."""
    return int(_stream(seed, group, sample).random_raw()) >> 1


def _stream(seed: int, group: int, sample: int) -> np.random.Philox:
    key = np.array([seed & _WORD, group & _WORD], dtype=np.uint64)
    counter = np.array([0, 0, 0, sample & _WORD], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)
