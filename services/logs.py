"""How every process writes its log: lines on stderr, tracebacks without the values of variables.

TUTELAGE_LOG_FORMAT=json makes each line one JSON object: ts, level, event and the line's own fields.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import structlog
from structlog.typing import EventDict, Processor
from tutelage_client.errors import invalid, shown

from services import strict_json, tracing

FORMAT_VARIABLE = "TUTELAGE_LOG_FORMAT"
_FORMATS = ("console", "json")


def log_to_stderr(least: int = logging.NOTSET) -> None:
    """Set up the log of this process; lines below the level `least` are left out.

    Stdout is for a command's own answer. Tracebacks are Python's plain ones: structlog would use rich
    where it is installed, and rich prints the local variables of every frame, tokens and URLs included.

    Raises:
        TutelageError: INVALID_ARGUMENT, TUTELAGE_LOG_FORMAT names no format.
    """
    wanted = os.environ.get(FORMAT_VARIABLE, "").strip().lower() or "console"
    if wanted not in _FORMATS:
        raise invalid(f"{FORMAT_VARIABLE}: got {shown(wanted)}, allowed are {' and '.join(_FORMATS)}")
    rendered = _json() if wanted == "json" else _console()
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_trace,
        structlog.processors.add_log_level,
        structlog.processors.StackInfoRenderer(),
        structlog.dev.set_exc_info,
    ]
    structlog.configure(
        processors=[*before, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    if wanted == "json":
        _adopt_libraries(before, rendered, least)
        sys.excepthook = _log_crash


def refused(message: str) -> None:
    """The one line of a command that cannot do what it was asked, before or after the log was set up."""
    if os.environ.get(FORMAT_VARIABLE, "").strip().lower() == "json":
        structlog.wrap_logger(
            structlog.PrintLogger(sys.stderr), processors=[structlog.processors.add_log_level, *_json()]
        ).error("refused", error=message)
    else:
        sys.stderr.write(f"tutelage: {message}\n")


def about(traceparent: str = "", **fields: object) -> AbstractContextManager[Any]:
    """Every line that is logged inside says what work it is about.

    Args:
        traceparent: of that work; becomes trace_id and span_id.
    """
    if found := tracing.ids(traceparent):
        fields |= {"trace_id": found[0], "span_id": found[1]}
    return structlog.contextvars.bound_contextvars(**fields)


def _add_trace(_logger: object, _method: str, line: EventDict) -> EventDict:
    """The span around the line, where this process traces."""
    if found := tracing.ids(tracing.current()):
        line["trace_id"], line["span_id"] = found[:2]
    return line


def _console() -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        ),
    ]


def _json() -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.format_exc_info,
        _in_order,
        structlog.processors.JSONRenderer(strict_json.dumps, default=str, ensure_ascii=False),
    ]


def _log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    structlog.get_logger(__name__).critical("crashed", exc_info=(kind, error, trace))


def _in_order(_logger: object, _method: str, line: EventDict) -> EventDict:
    """What every line has first, for a person who reads over them."""
    first = {name: line.pop(name) for name in ("ts", "level", "event") if name in line}
    return {**first, **line}


def _adopt_libraries(before: list[Processor], rendered: list[Processor], least: int) -> None:
    """Make the lines of libraries, which use Python's own logging, JSON as well."""
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_logger_name, *before],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    handler.setLevel(least)
    logging.getLogger().handlers = [handler]
    logging.captureWarnings(True)
    # Libraries that come later (vLLM, transformers) would bring handlers of their own.
    logging.setLoggerClass(_WithoutHandlers)
    for logger in logging.getLogger().manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and any(map(_prints, logger.handlers)):
            logger.handlers = [kept for kept in logger.handlers if not _prints(kept)]
            logger.propagate = True


class _WithoutHandlers(logging.Logger):
    """A logger whose lines are printed by the root's handler and by no other."""

    def addHandler(self, hdlr: logging.Handler) -> None:
        """Take only handlers that print nothing."""
        if not _prints(hdlr):
            super().addHandler(hdlr)

    @property
    def propagate(self) -> bool:
        """Always: what is not passed on would be printed by nobody."""
        return True

    @propagate.setter
    def propagate(self, value: bool) -> None: ...


def _prints(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
