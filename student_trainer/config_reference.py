"""The configuration reference as Markdown, generated from the models of the run file."""

from __future__ import annotations

import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from student_trainer.config import RunConfig

_NAMES: dict[Any, str] = {
    str: "text",
    Path: "path",
    int: "integer",
    float: "number",
    bool: "true or false",
    list: "list",
    tuple: "list",
    dict: "table",
}


def reference_markdown() -> str:
    """Every section and key of a run file: type, default, meaning.

    Raises:
        ValueError: a key has no description.
    """
    sections = [
        "# The run file",
        "",
        "Every section and key, generated from the code: "
        "`python -m student_trainer.config_reference docs/configuration.md`. Unknown keys are refused. "
        "Relative paths start at the working directory; those of files in `[objective]` start at the run "
        "file. Whole run files are in [recipes](../recipes).",
        "",
    ]
    _add_sections(RunConfig, "", sections)
    return "\n".join(sections).rstrip() + "\n"


def _add_sections(model: type[BaseModel], header: str, out: list[str]) -> None:
    rows: list[str] = []
    nested: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        inner = _inner_models(field.annotation)
        if inner:
            placeholder = f"{name}.NAME" if _is_dict(field.annotation) else name
            nested += [(f"{header}.{placeholder}" if header else placeholder, m) for m in inner]
        if not inner or (header and not _is_dict(field.annotation)):
            rows.append(_row(header, name, field))
    if header:
        out += [f"## [{header}]{_variant(model)}", "", " ".join((model.__doc__ or "").split()), ""]
    if rows:
        out += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    for path, inner_model in nested:
        _add_sections(inner_model, path, out)


def _variant(model: type[BaseModel]) -> str:
    """What tells this form of a section from its others: its `kind`."""
    kind = model.model_fields.get("kind")
    return (
        ""
        if kind is None
        else f" with kind = {' or '.join(map(json.dumps, typing.get_args(kind.annotation)))}"
    )


def _row(header: str, name: str, field: FieldInfo) -> str:
    if not field.description:
        raise ValueError(f"[{header}] {name}: has no description")
    cells = (f"`{name}`", _type(field.annotation), _default(field), field.description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value is PydanticUndefined:
        return "–"
    if isinstance(value, BaseModel):
        return "–"
    if isinstance(value, Path):
        value = str(value)
    return f"`{json.dumps(value)}`"


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in arguments if a is not type(None)))
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return _NAMES[origin or annotation]


def _inner_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (list, tuple):
        return []
    return [model for argument in typing.get_args(annotation) for model in _inner_models(argument)]


def _is_dict(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference_markdown())
