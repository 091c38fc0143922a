"""What a person can fix becomes one line on stderr and an exit status, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from services.exit_status import EXIT_BAD_INPUT, exit_status

if TYPE_CHECKING:
    from pydantic import BaseModel

Settings = TypeVar("Settings", bound="BaseModel")

# Settings whose values are never repeated, and mistakes of the key, whose value may be meant for one of them.
SECRETS = frozenset({"tokens", "queue_url"})
VALUE_UNTOLD = ("extra_forbidden", "model_type", "model_attributes_type")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a person can fix into one line and exit status 2."""
    from pydantic import ValidationError
    from tutelage_client.errors import TutelageError

    from student_trainer.config_errors import RunFileError

    try:
        yield
    except RunFileError as error:
        _refuse(str(error))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        _refuse(str(error) if error.filename is None else f"{error.filename}: {error.strerror}")
    except TutelageError as error:
        _refuse(error.message, exit_status(error))
    except ValidationError as error:
        _refuse("; ".join(_sentence(problem) for problem in error.errors(include_url=False)))


def checked(settings: type[Settings], values: dict[str, Any]) -> Settings:
    """The settings of a command; what they do not know is answered with what they do."""
    from pydantic import ValidationError

    try:
        return settings.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        _refuse("; ".join(_sentence(problem, settings) for problem in problems))


def _sentence(problem: Any, settings: type[BaseModel] | None = None) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if settings is not None and problem["type"] == "extra_forbidden" and len(problem["loc"]) > 1:
        from student_trainer.config_errors import unknown_key

        return f"{place}: {unknown_key(settings, problem['loc'])}"
    message: str = problem["msg"].removeprefix("Value error, ")
    if not place or problem["type"] == "value_error":
        return message
    if problem["type"] in VALUE_UNTOLD or SECRETS.intersection(problem["loc"]):
        return f"{place}: {message}"
    return f"{place}: got {problem['input']!r}; {message}"


def _refuse(message: str, status: int = EXIT_BAD_INPUT) -> NoReturn:
    from services.logs import refused

    refused(message)
    raise typer.Exit(status)
