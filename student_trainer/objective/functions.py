"""A user's own functions, named in the settings as "module:attribute" or "file.py:attribute".

Whoever compiles a plan only reads the source: the name must be there and take the arguments it will be
given. The trainer imports it, and only if it is still what was read. A relative file is relative to the
file that names it, a run file or a preset.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from student_trainer.objective.extension_settings import CustomSettings
from student_trainer.objective.settings import ObjectiveError

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "divergence": ("u",),
    "token_weight": ("tokens",),
    "advantage": ("advantage", "tokens"),
}


@dataclass(frozen=True, slots=True)
class FunctionSource:
    """Where a function is, and what its file held when the plan was compiled."""

    kind: str  # a key of ARGUMENTS
    path: str
    attribute: str
    sha256: str
    module: str | None = None  # imported by this name; None: by its path

    @property
    def name(self) -> str:
        """As errors and the ledger call it: the file may move with its run."""
        return f"{Path(self.path).name}:{self.attribute}"

    @property
    def identity(self) -> dict[str, str]:
        """What may not change between a run and its resumption."""
        return {"name": self.name, "sha256": self.sha256}

    def load(self) -> Any:
        """Import the file and return the attribute; raises ObjectiveError when the file has changed."""
        return _load(self)


def anchored(objective: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """An [objective] document whose relative files are relative to `directory`."""
    anchored = dict(objective)
    preset = objective.get("preset")
    if isinstance(preset, str) and preset.endswith(".toml"):
        anchored["preset"] = str(directory / preset)
    custom = objective.get("custom")
    if isinstance(custom, Mapping):
        anchored["custom"] = {key: _anchored(value, directory) for key, value in custom.items()}
    return anchored


def find_functions(custom: CustomSettings) -> dict[str, FunctionSource]:
    """By kind; raises ObjectiveError for one that is not there or takes other arguments."""
    named = {kind: getattr(custom, kind) for kind in ARGUMENTS}
    return {kind: _find(kind, reference) for kind, reference in named.items() if reference is not None}


def _anchored(value: Any, directory: Path) -> Any:
    file, separator, attribute = str(value).rpartition(":")
    is_file = isinstance(value, str) and separator and file.endswith(".py")
    return f"{directory / file}:{attribute}" if is_file else value


def _find(kind: str, reference: str) -> FunctionSource:
    where = f"objective.custom.{kind}"
    file, _, attribute = reference.rpartition(":")
    path = Path(file).absolute() if file.endswith(".py") else _module_file(where, file)
    try:
        text = path.read_bytes()
        tree = ast.parse(text)
    except OSError as error:
        raise ObjectiveError(f"{where}: cannot read {path}: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise ObjectiveError(f"{where}: {path} is not Python: {error}") from error
    _check_defined(where, kind, tree, attribute, path)
    module = None if file.endswith(".py") else file
    return FunctionSource(kind, str(path), attribute, hashlib.sha256(text).hexdigest(), module)


def _module_file(where: str, module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ObjectiveError(
            f"{where}: there is no Python module {module!r}; allowed: an installed module, or "
            "file.py:attribute"
        )
    return Path(spec.origin)


def _check_defined(where: str, kind: str, tree: ast.Module, attribute: str, path: Path) -> None:
    wanted = ", ".join(ARGUMENTS[kind])
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == attribute:
            arguments = statement.args
            given = len(arguments.posonlyargs) + len(arguments.args)
            optional = len(arguments.defaults)
            keywords = any(default is None for default in arguments.kw_defaults)
            most = given + 100 * (arguments.vararg is not None)
            if keywords or not given - optional <= len(ARGUMENTS[kind]) <= most:
                raise ObjectiveError(f"{where}: {attribute} in {path} must take ({wanted})")
            return
        if attribute in _assigned(statement):
            return
    names = [name for statement in tree.body for name in _names(statement)]
    raise ObjectiveError(
        f"{where}: {path} defines no {attribute!r} that takes ({wanted}); it has "
        f"{', '.join(names) or 'nothing'}"
    )


def _names(statement: ast.stmt) -> list[str]:
    return [statement.name] if isinstance(statement, ast.FunctionDef) else _assigned(statement)


def _assigned(statement: ast.stmt) -> list[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@lru_cache
def _load(source: FunctionSource) -> Any:
    where = f"objective.custom.{source.kind}"
    text = Path(source.path).read_bytes()
    if hashlib.sha256(text).hexdigest() != source.sha256:
        raise ObjectiveError(f"{where}: {source.path} has changed since the objective was compiled")
    try:
        module = importlib.import_module(source.module) if source.module else _import_file(source)
    except Exception as error:
        raise ObjectiveError(f"{where}: importing {source.path} failed: {error!r}") from error
    return getattr(module, source.attribute)


def _import_file(source: FunctionSource) -> ModuleType:
    name = f"tutelage_custom_{source.sha256[:16]}"
    spec = importlib.util.spec_from_file_location(name, source.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
