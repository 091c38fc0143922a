"""One entry of the cache: a packed score with who scored it, under a check sum that knows its key.

Always packed as float32, whatever encoding the asker wants: an answer from the cache is then the array
that the engine gave, bit for bit, and everything after it goes the same way.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from google.protobuf.message import DecodeError
from tutelage.v1 import teacher_pb2 as pb
from tutelage_client import codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import Identity, Score, SequenceScore

MAGIC = b"tutscor1"
_CHECK_BYTES = 16


class CorruptEntryError(Exception):
    """These bytes are not the entry of this key."""


def pack(key: bytes, score: SequenceScore, identity: Identity) -> bytes:
    """The bytes to keep under `key`; the sequence's id is the asker's and not kept."""
    body = codec.score_to_bytes(Score((replace(score, id=""),), identity))
    return MAGIC + _check(key, body) + body


def unpack(key: bytes, data: bytes) -> tuple[SequenceScore, Identity]:
    """The score kept under `key` and who scored it.

    Raises:
        CorruptEntryError: `data` was cut, changed, or written under another key.
    """
    head = len(MAGIC) + _CHECK_BYTES
    body = data[head:]
    if data[: len(MAGIC)] != MAGIC or data[len(MAGIC) : head] != _check(key, body):
        raise CorruptEntryError(f"{len(data)} bytes are no entry of {key.hex()[:12]}…")
    try:
        score = codec.score_from_proto(pb.ScoreResponse.FromString(body))
    except (DecodeError, TutelageError) as error:  # written whole, by another version of this program
        raise CorruptEntryError(str(error)) from error
    if len(score.sequences) != 1 or score.sequences[0].error is not None:
        raise CorruptEntryError(f"holds {len(score.sequences)} answers, or an error")
    return score.sequences[0], score.identity


def _check(key: bytes, body: bytes) -> bytes:
    return hashlib.sha256(key + body).digest()[:_CHECK_BYTES]
