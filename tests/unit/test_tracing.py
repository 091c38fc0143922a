"""When tracing is on, what a process without it is spared, and how a caller's place in a trace is told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tutelage_client.errors import TutelageError
from tutelage_client.trace import trace_metadata

from services import tracing

ROOT = Path(__file__).parents[2]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("variables", "on"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4317"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_standard_variables_switch_tracing(variables: dict[str, str], on: bool) -> None:
    assert tracing.wanted(variables) is on


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp and none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "grpc"),
    ],
)
def test_what_there_is_no_exporter_for_is_refused_by_name(name: str, value: str, allowed: str) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317", name: value}
    with pytest.raises(TutelageError, match=f"{name}: got '{value}'") as refused:
        tracing.wanted(variables)
    assert allowed in refused.value.message


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


MISSING = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from services.teacher.process import main
from services.teacher.settings import TeacherSettings
main(TeacherSettings(engine="fake", service={"grpc_port": 0, "http_port": 0}))
"""


def test_a_missing_library_is_said_with_what_installs_it() -> None:
    ended = python(MISSING, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    assert ended.returncode == 2, ended.stderr
    assert "pip install 'tutelage[tracing]'" in ended.stderr
    assert "opentelemetry" in ended.stderr
    assert "Traceback" not in ended.stderr


OFF = """
import sys
from services import tracing
import services.teacher.process, services.teacher.puller
tracing.start("tutelage-teacher", "x")
with tracing.span("score") as one, tracing.span("engine") as other:
    one.set({"a": 1})
assert one is other
assert tracing.current() == ""
assert "services.tracing_sdk" not in sys.modules
assert not [name for name in sys.modules if name.startswith("opentelemetry.exporter")]
"""


def test_a_process_that_does_not_trace_loads_no_opentelemetry() -> None:
    """Not of ours: redis-py itself looks for it when it is imported."""
    ended = python(OFF)
    assert ended.returncode == 0, ended.stderr
    importing = [
        str(path.relative_to(ROOT))
        for package in ("services", "student_trainer", "launcher", "proto/src/tutelage_client")
        for path in (ROOT / package).rglob("*.py")
        if "opentelemetry" in "".join(re.findall(r"^ *(?:import|from) .*", path.read_text(), re.MULTILINE))
    ]
    assert importing == ["services/tracing_sdk.py"]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (PARENT, True),
        (f"01-{TRACE}-{SPAN}-00-more", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (PARENT.upper(), False),
        ("", False),
        (f"{PARENT}\n", False),
    ],
)
def test_a_traceparent_is_read_as_w3c_says(text: str, is_one: bool) -> None:
    assert (tracing.ids(text) is not None) is is_one


def test_a_caller_names_its_span() -> None:
    assert trace_metadata(PARENT) == (("traceparent", PARENT),)
    for wrong in ("", "00-1-2-01", PARENT.upper(), f"{PARENT}\r\nauthorization: x"):
        with pytest.raises(TutelageError, match="INVALID_ARGUMENT: traceparent: got"):
            trace_metadata(wrong)


CALLER = """
import sys
from tutelage_client.trace import trace_metadata
assert trace_metadata(None) == ()
assert "opentelemetry" not in sys.modules
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState
assert trace_metadata(None) == ()
context = SpanContext(0xabc, 0xdef, False, TraceFlags(1), TraceState([("vendor", "1")]))
with trace.use_span(NonRecordingSpan(context)):
    print(*trace_metadata(None))
"""


def test_a_caller_that_uses_opentelemetry_need_not_name_it() -> None:
    ended = python(CALLER)
    assert ended.returncode == 0, ended.stderr
    parent = f"00-{0xABC:032x}-{0xDEF:016x}-01"
    assert ended.stdout.strip() == f"('traceparent', '{parent}') ('tracestate', 'vendor=1')"
