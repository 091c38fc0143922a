"""Lines of the log: JSON when asked for, whoever writes them, with what the work was about."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from tutelage_client.errors import TutelageError

from services.logs import log_to_stderr

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

PROGRAM = f"""
import logging, warnings
early = logging.getLogger("early"); early.addHandler(logging.StreamHandler()); early.propagate = False
import structlog
from services.logs import about, log_to_stderr
log_to_stderr()
log = structlog.get_logger()
with about("00-{TRACE}-{SPAN}-01", group="run-1", job="5-0", view="teacher"):
    log.info("scored", positions=3, path=__import__("pathlib").Path("/x"))
    logging.getLogger("library").warning("%s of a library", "line")
log.info("two\\nlines", loss=float("nan"))
late = logging.getLogger("late"); late.addHandler(logging.StreamHandler()); late.propagate = False
late.error("late line"); early.error("early line")
warnings.warn("a warning")
try:
    token = "open-sesame"
    raise ValueError(len(token))
except ValueError:
    log.exception("failed"); late.exception("failed there")
"""


def lines(program: str, status: int = 0, **variables: str) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    return ended.stderr.splitlines()


def as_json(program: str, status: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(program, status, TUTELAGE_LOG_FORMAT="json")]


def test_every_line_is_one_json_object_whoever_wrote_it() -> None:
    found = as_json(PROGRAM)
    assert [list(line)[:3] for line in found] == [["ts", "level", "event"]] * len(found)
    events = [line["event"] for line in found]
    assert events[:3] == ["scored", "line of a library", "two\nlines"]
    assert events[3:5] == ["late line", "early line"]
    assert found[2]["loss"] is None, "JSON has no NaN"
    assert "a warning" in events[5]
    assert events[6:] == ["failed", "failed there"]
    assert [line["level"] for line in found] == [
        "info",
        "warning",
        "info",
        *["error"] * 2,
        "warning",
        *["error"] * 2,
    ]


def test_lines_say_what_work_they_are_about() -> None:
    scored, library, other, *_ = as_json(PROGRAM)
    ids = {"group": "run-1", "job": "5-0", "view": "teacher", "trace_id": TRACE, "span_id": SPAN}
    assert ids.items() <= scored.items()
    assert ids.items() <= library.items()
    assert scored["positions"] == 3
    assert not ids.keys() & other.keys()


def test_tracebacks_are_in_the_line_and_show_no_variable() -> None:
    *_, ours, theirs = as_json(PROGRAM)
    for line in (ours, theirs):
        assert line["exception"].startswith("Traceback")
        assert "ValueError: 11" in line["exception"]
        assert "open-sesame" not in json.dumps(line)


def test_a_crash_is_a_line_too() -> None:
    (line,) = as_json(
        "from services.logs import log_to_stderr\nlog_to_stderr()\nraise ValueError('x')", status=1
    )
    assert (line["level"], line["event"]) == ("critical", "crashed")
    assert line["exception"].endswith("ValueError: x")


def test_the_console_is_for_people() -> None:
    shown = "\n".join(lines(PROGRAM))
    assert "scored" in shown
    assert "group=run-1" in shown
    assert not shown.startswith("{")


def test_an_unknown_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_LOG_FORMAT", "xml")
    with pytest.raises(TutelageError, match="TUTELAGE_LOG_FORMAT: got 'xml', allowed are console and json"):
        log_to_stderr()


def test_a_command_that_refuses_says_so_in_json_too() -> None:
    program = "from launcher.cli import main; import sys; sys.argv[1:] = ['train', 'absent.toml']; main()"
    (line,) = as_json(program, status=2)
    assert (line["level"], line["event"]) == ("error", "refused")
    assert "absent.toml" in line["error"]
