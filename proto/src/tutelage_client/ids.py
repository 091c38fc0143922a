"""Token ids as bytes: int32, little-endian, never as repeated numbers."""

from __future__ import annotations

import numpy as np

from tutelage_client import types as t
from tutelage_client.errors import invalid, shown


def pack_ids(ids: t.TokenIds, name: str = "ids") -> bytes:
    """Token ids of any integer type and shape as little-endian int32 bytes."""
    return _as_int32(ids, name).astype("<i4", copy=False).tobytes()


def as_ids(ids: t.TokenIds, name: str = "ids") -> t.Int32Array:
    """Token ids as a contiguous int32 array [N]; refuses floats, other shapes and values outside int32."""
    array = _as_int32(ids, name)
    if array.ndim != 1:
        raise invalid(f"{name}: got shape {list(array.shape)}, must be one list of token ids")
    return array


def _as_int32(ids: t.TokenIds, name: str) -> t.Int32Array:
    if isinstance(ids, np.ndarray) and ids.dtype == np.int32:
        return np.ascontiguousarray(ids) if ids.ndim else ids
    try:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    except (TypeError, ValueError) as error:
        raise invalid(f"{name}: got {shown(ids)}, must be token ids") from error
    if array.size == 0:
        return array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise invalid(f"{name}: got an array of {array.dtype}, token ids must be integers")
    if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
        raise invalid(f"{name}: got ids from {array.min()} to {array.max()}, which is outside int32")
    return array.astype(np.int32, order="C")


def unpack_ids(data: bytes, name: str, columns: int | None = None) -> t.Int32Array:
    """Little-endian int32 bytes as [N], or as [N, columns]."""
    width = 4 * (1 if columns is None else columns)
    if width <= 0 or len(data) % width:
        raise invalid(f"{name}: got {len(data)} bytes, must be a multiple of {width}")
    array = np.frombuffer(data, dtype="<i4")
    return array if columns is None else array.reshape(-1, columns)
