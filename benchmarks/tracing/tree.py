"""A trace as a tree in plain text: each span below its parent, with when it began and how long it took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.tracing.collector import Span

# What is worth a reader's while of each span; the rest is for the backend.
_SHOWN = (
    "tutelage.group",
    "tutelage.order",
    "tutelage.view",
    "tutelage.delivery",
    "tutelage.outcome",
    "tutelage.drop_reason",
    "tutelage.step",
    "tutelage.policy_version",
    "tutelage.staleness",
    "tutelage.sequences",
    "tutelage.positions",
    "tutelage.tokens_computed",
    "tutelage.tokens_reused",
    "tutelage.weights_version",
    "http.response.status_code",
    "rpc.response.status_code",
)


def render(spans: Sequence[Span]) -> str:
    """The spans of one trace as lines: began after the root, took, name, process, attributes."""
    ids = {span.id for span in spans}
    children: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.began):
        children.setdefault(span.parent if span.parent in ids else "", []).append(span)
    first = min(span.began for span in spans)
    rows = [
        (f"{(span.began - first) / 1e6:9.1f}", f"{(span.ended - span.began) / 1e6:9.1f}", place, span)
        for place, span in _walk(children, "", "")
    ]
    wide = max(len(place + span.name) for _, _, place, span in rows)
    lines = [f"trace {spans[0].trace}", f"{'began ms':>9} {'took ms':>9}"]
    lines += [
        f"{began} {took}  {place + span.name:{wide}}  {_process(span):18} {_details(span)}".rstrip()
        for began, took, place, span in rows
    ]
    return "\n".join(lines)


def _walk(children: dict[str, list[Span]], parent: str, place: str) -> Iterator[tuple[str, Span]]:
    below = children.get(parent, [])
    for number, span in enumerate(below):
        last = number == len(below) - 1
        yield (place + ("└─ " if last else "├─ ") if parent else ""), span
        deeper = place + ("   " if last else "│  ") if parent else ""
        yield from _walk(children, span.id, deeper)


def _process(span: Span) -> str:
    return f"{span.service.removeprefix('tutelage-')} {span.instance}"


def _details(span: Span) -> str:
    told = [f"{n.rpartition('.')[2]}={span.attributes[n]}" for n in _SHOWN if n in span.attributes]
    told += [f"[{event}]" for event in span.events]
    told += [f"→ trace {link[:8]}…" for link in span.links]
    return " ".join([*told, f"ERROR {span.error}"] if span.error else told)
