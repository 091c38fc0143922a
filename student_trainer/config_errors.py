"""Errors of a run file as sentences: section, key, what was got and what is allowed."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

# What a pattern of the settings allows, in words.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
FUNCTION_PATTERN = r"^.+:[A-Za-z_]\w*$"
PATTERNS = {
    NAME_PATTERN: "letters, digits, '.', '_' and '-', of which a letter or digit comes first",
    FUNCTION_PATTERN: '"module:attribute" or "file.py:attribute"',
}

# What pydantic calls a value that is no table where one belongs.
_NO_TABLE = ("model_type", "model_attributes_type", "dict_type")


class RunFileError(ValueError):
    """A run file that cannot be used; `problems` has one sentence for each reason."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__(f"{source}: " + ("\n  " if len(problems) > 1 else "") + "\n  ".join(problems))


def describe_errors(root: type[BaseModel], error: ValidationError) -> list[str]:
    """One sentence for each error pydantic found, in the words of the run file."""
    return [_describe(root, problem) for problem in error.errors(include_url=False)]


def _describe(root: type[BaseModel], problem: Any) -> str:
    location: tuple[int | str, ...] = problem["loc"]
    kind = problem["type"]
    if kind == "extra_forbidden":
        return _unknown_key(root, location)
    place = _place(root, location)
    if kind == "missing":
        return f"{place}: missing; it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return _said_by_a_check(root, location, message)
    if kind in _NO_TABLE:
        return _no_table(root, location, problem["input"])
    if kind.startswith("union_tag"):
        return _unknown_kind(place, problem["ctx"], _models_at(root, location))
    pattern = problem["ctx"]["pattern"] if kind == "string_pattern_mismatch" else None
    said = f"allowed: {PATTERNS[pattern]}" if pattern in PATTERNS else message[:1].lower() + message[1:]
    return f"{place}: got {problem['input']!r}; {said}"


def _said_by_a_check(root: type[BaseModel], location: tuple[int | str, ...], message: str) -> str:
    """The message of a validator; one of a section begins with the section or with a key of it."""
    place = _place(root, location)
    if not location:
        return message
    said, colon, rest = message.partition(":")
    section = place.strip("[]")
    key = said.removeprefix(f"{section}.")
    if said == section:
        return f"{place}{colon}{rest}"
    if any(key in model.model_fields for model in _models_at(root, location)):
        return f"{place} {key}{colon}{rest}"
    return f"{place}: {message}"


def _no_table(root: type[BaseModel], location: tuple[int | str, ...], value: object) -> str:
    """A value where a section belongs; that of [queue] may be an address with a password."""
    keys = sorted({name for model in _models_at(root, location) for name in model.model_fields})
    secret = location[:1] == ("queue",)
    got = "got what is not shown, it may hold a password" if secret else f"got {value!r}"
    return f"{_place(root, location)}: {got}; allowed: a table" + (f" of {', '.join(keys)}" if keys else "")


def _unknown_kind(place: str, context: dict[str, Any], models: list[type[BaseModel]]) -> str:
    """A table of several kinds that names none of them, or another one."""
    key = context["discriminator"].strip("'")
    kinds = [kind for model in models for kind in typing.get_args(model.model_fields[key].annotation)]
    got = f"got {context['tag']!r}" if "tag" in context else "missing"
    return f"{place} {key}: {got}; allowed: {', '.join(map(repr, kinds))}"


def _unknown_key(root: type[BaseModel], location: tuple[int | str, ...]) -> str:
    section = _section_name(root, location[:-1])
    return f"{section + ' ' if section else ''}{unknown_key(root, location)}"


def unknown_key(root: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """What is said of a key that is not there: the nearest one, and all."""
    *parents, key = location
    known = sorted({name for model in _models_at(root, parents) for name in model.model_fields})
    nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
    what = "key" if parents else "section"
    hint = f"; the nearest {what} is {nearest[0]!r} (all: {', '.join(known)})" if nearest else ""
    return f"unknown {what} {str(key)!r}{hint}"


def _place(root: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """`[section] key` of a location; the last part is a section when it names a table."""
    if not location or _models_at(root, location):
        return _section_name(root, location) or "run file"
    parents = list(location)
    while parents and not _models_at(root, parents):
        parents.pop()
    rest = ".".join(str(part) for part in location[len(parents) :])
    section = _section_name(root, parents)
    return f"{section} {rest}" if section else rest


def _section_name(root: type[BaseModel], parts: Iterable[int | str]) -> str:
    """TOML header of a location, without the tags pydantic adds for members of a union."""
    names: list[str] = []
    walked: list[int | str] = []
    for part in parts:
        before = _annotations_at(root, walked)
        walked.append(part)
        if any(_is_model(a) and str(part) in a.model_fields for a in before) or any(
            typing.get_origin(a) is dict for a in before
        ):
            names.append(str(part))
    return f"[{'.'.join(names)}]" if names else ""


def _models_at(root: type[BaseModel], parts: Iterable[int | str]) -> list[type[BaseModel]]:
    return [annotation for annotation in _annotations_at(root, parts) if _is_model(annotation)]


def _annotations_at(root: type[BaseModel], parts: Iterable[int | str]) -> list[Any]:
    """Types a value at this location may have; a union contributes each of its members."""
    current: list[Any] = [root]
    for part in parts:
        following: list[Any] = []
        for annotation in current:
            if _is_model(annotation) and str(part) in annotation.model_fields:
                following += _members(annotation.model_fields[str(part)].annotation)
            elif typing.get_origin(annotation) is dict:
                following += _members(typing.get_args(annotation)[1])
            elif typing.get_origin(annotation) in (list, tuple) and part == "list":
                following.append(annotation)  # the tag of this member of a union
            elif typing.get_origin(annotation) in (list, tuple):
                following += [member for arg in typing.get_args(annotation) for member in _members(arg)]
            elif _is_model(annotation) and _is_tag(annotation, part):
                following.append(annotation)
        current = following
    return current


def _is_tag(model: type[BaseModel], part: int | str) -> bool:
    """Whether pydantic put `part` into the location to tell this member of a union from the others."""
    literals = (typing.get_args(f.annotation) for f in model.model_fields.values())
    return model.__name__ == str(part) or any(part in values for values in literals)


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for arg in typing.get_args(annotation) for member in _members(arg)]
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
