"""What a score is a score of, as 32 bytes: equal exactly when the same engine is asked the same thing.

In the key: who scores (every field of the identity but its name, and the settings that change numbers
and are in no identity), the signal with temperature and encoding, the context, the response, the
candidates and the anchors. Not in it: the names of teacher, request and sequence, and pins, which change
no number.

Of the identity, `revision` is the hash of a local model's content or the commit of a hub's, so a path
with other weights in it is another teacher; `weights_version` and `weights_id` tell the publications of
a moving teacher apart; `engine_version`, `dtype` and `head_dtype` are how the numbers are rounded. New
fields of the identity or the signal are in the key by themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tutelage_client.types import Identity, Int32Array, ScoreRequest, Signal

FORMAT = "tutelage-score-key-1"
_NAMES = frozenset({"name"})  # fields of the identity that change no number


def teacher_digest(identity: Identity, variant: Mapping[str, Any]) -> bytes:
    """Who scores, as 32 bytes.

    Args:
        variant: settings that change numbers and are not in the identity (JSON values).
    """
    who = {field: getattr(identity, field) for field in Identity.__slots__ if field not in _NAMES}
    return _json(FORMAT, who, variant)


def sequence_keys(teacher: bytes, request: ScoreRequest) -> list[bytes]:
    """The key of every sequence, in request order.

    Every part is a digest of fixed size, so none can run into the next; the shape of the candidates
    follows from their number and the response's.

    Args:
        teacher: its `teacher_digest`.
    """
    asked = _json({field: _plain(getattr(request.signal, field)) for field in Signal.__slots__})
    contexts = [_ids(ids) for ids in request.contexts]
    reads_words = request.signal.judgement or request.signal.continuations
    keys = []
    for sequence in request.sequences:
        parts = teacher + asked + contexts[sequence.context] + _ids(sequence.response_ids)
        if request.signal.candidates and sequence.candidate_ids is not None:
            parts += _ids(sequence.candidate_ids)
        if request.signal.continuations and sequence.anchors is not None:
            parts += _ids(sequence.anchors)
        if reads_words and (text := request.text_of(sequence)) is not None:
            parts += hashlib.sha256(text.encode()).digest()
        keys.append(hashlib.sha256(parts).digest())
    return keys


def _plain(value: Any) -> Any:
    """1 and 1.0 are one temperature."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _ids(ids: Int32Array) -> bytes:
    return hashlib.sha256(ids.astype("<i4", copy=False).tobytes()).digest()


def _json(*values: Any) -> bytes:
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).digest()
