"""Between JSON bodies and the contract's messages.

The canonical form is protobuf's own JSON mapping: byte arrays as base64 of little-endian values.
For people, id arrays may also be lists of integers, and the answer's arrays may be asked for as
lists, in which a position without a score is null. NaN is never written.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import json_format
from tutelage.v1 import teacher_pb2 as pb
from tutelage_client import codec
from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import Limits, Score, SequenceScore

from services.api.validate import check_counts

# Fields of a sequence that may be a list of integers, by how JSON may spell them.
_ID_LISTS = {"response_ids": "response_ids", "responseIds": "response_ids", "anchors": "anchors"}


def parse_request(body: bytes, limits: Limits) -> pb.ScoreRequest:
    """A ScoreRequest from JSON; raises INVALID_ARGUMENT for whatever is not one, or has too many parts."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise invalid(f"body: got {len(body)} bytes that are not JSON ({_first_line(error)})") from error
    if not isinstance(document, dict):
        raise invalid(f"body: got a JSON {type(document).__name__}, must be an object")
    check_counts(_length(document, "sequences"), _length(document, "contexts"), limits)
    _pack_lists(document)
    try:
        return json_format.ParseDict(document, pb.ScoreRequest())
    except (json_format.ParseError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        # ArithmeticError: an infinite number where an enumeration stands.
        raise invalid(f"body: not a ScoreRequest ({_first_line(error)})") from error
    except SystemError as error:  # protobuf's C code, when a name has a lone surrogate
        raise invalid(f"body: not a ScoreRequest ({_first_line(error)})") from error


def score_document(score: Score, encoding: str, arrays: str) -> dict[str, Any]:
    """An answer as JSON values; `arrays` is "base64" or "list"."""
    if arrays == "base64":
        message = codec.score_to_proto(score, "float16" if encoding == "float16" else "float32")
        return json_format.MessageToDict(message, preserving_proto_field_name=True)
    return {
        "request_id": score.request_id,
        "identity": {name: getattr(score.identity, name) for name in score.identity.__slots__},
        "sequences": [_sequence_document(sequence) for sequence in score.sequences],
        "usage": {name: getattr(score.usage, name) for name in score.usage.__slots__},
    }


def _sequence_document(score: SequenceScore) -> dict[str, Any]:
    if score.error is not None:
        return {"id": score.id, "error": {"code": score.error.code, "message": score.error.message}}
    if score.judgement is not None:
        return {"id": score.id, "judgement": score.judgement, "verdict": score.verdict}
    if score.agreement is not None:
        return {"id": score.id, "agreement": score.agreement.tolist()}
    document: dict[str, Any] = {"id": score.id, "num_positions": score.num_positions}
    for name in ("sampled", "top_ids", "top_logprobs", "candidate_logprobs", "entropy", "valid", "hidden"):
        array: npt.NDArray[Any] | None = getattr(score, name)
        if array is not None:
            document[name] = _with_nulls(array)
    return document


def _with_nulls(array: npt.NDArray[Any]) -> list[Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        present = np.isfinite(array)
        array = array.astype(object)
        array[~present] = None
    values: list[Any] = array.tolist()
    return values


def _pack_lists(document: dict[str, Any]) -> None:
    """Replace lists of ids by base64 text, in place; everything else is left for protobuf to judge."""
    for index, context in _objects(document, "contexts"):
        if isinstance(context.get("ids"), list):
            context["ids"] = _base64(_ids(context["ids"], f"contexts[{index}].ids"))
    for index, sequence in _objects(document, "sequences"):
        for spelling, field in _ID_LISTS.items():
            if isinstance(sequence.get(spelling), list):
                sequence[spelling] = _base64(_ids(sequence[spelling], f"sequences[{index}].{field}"))
        for spelling in ("candidate_ids", "candidateIds"):
            if isinstance(sequence.get(spelling), list):
                _pack_candidates(sequence, spelling, f"sequences[{index}].candidate_ids")


def _pack_candidates(sequence: dict[str, Any], spelling: str, name: str) -> None:
    rows = sequence[spelling]
    if not all(isinstance(row, list) for row in rows) or len(set(map(len, rows))) != 1:
        raise invalid(f"{name}: got rows that are not lists of one length, must be [R, C]")
    sequence[spelling] = _base64(_ids([i for row in rows for i in row], name))
    sequence.pop("numCandidates", None)
    sequence["num_candidates"] = len(rows[0])


def _length(document: dict[str, Any], field: str) -> int:
    """How many there are; 0 where there is something else than a list, which is protobuf's to refuse."""
    values = document.get(field)
    return len(values) if isinstance(values, list) else 0


def _objects(document: dict[str, Any], field: str) -> list[tuple[int, dict[str, Any]]]:
    values = document.get(field)
    if not isinstance(values, list):
        return []
    return [(index, value) for index, value in enumerate(values) if isinstance(value, dict)]


def _ids(values: list[Any], name: str) -> bytes:
    if not set(map(type, values)) <= {int}:
        raise invalid(f"{name}: got something that is not an integer, token ids must be integers")
    try:
        return codec.pack_ids(values, name)
    except (OverflowError, TutelageError) as error:
        raise invalid(f"{name}: got ids outside int32") from error


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__
