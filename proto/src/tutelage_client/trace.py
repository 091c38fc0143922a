"""The caller's place in a trace, as call metadata: W3C traceparent and tracestate."""

from __future__ import annotations

import re
import sys

from tutelage_client.connect import Metadata
from tutelage_client.errors import invalid, shown

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def trace_metadata(traceparent: str | None) -> Metadata:
    """What tells the teacher which trace a call belongs to; empty when it belongs to none.

    Without `traceparent` it is the current span of a caller that uses OpenTelemetry. A caller that does
    not pays nothing: this never imports it.

    Raises:
        TutelageError: INVALID_ARGUMENT, `traceparent` is not one.
    """
    if traceparent is not None:
        if not _TRACEPARENT.fullmatch(traceparent):
            allowed = "00-TRACE-SPAN-FLAGS in lower-case hexadecimal digits, 32, 16 and 2 of them"
            raise invalid(f"traceparent: got {shown(traceparent)}, must be {allowed}")
        return (("traceparent", traceparent),)
    opentelemetry = sys.modules.get("opentelemetry.trace")
    if opentelemetry is None:
        return ()
    found = opentelemetry.get_current_span().get_span_context()
    if not found.is_valid:
        return ()
    metadata = (("traceparent", f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"),)
    state = found.trace_state.to_header() if found.trace_state else ""
    return (*metadata, ("tracestate", state)) if state else metadata
