"""Engine arguments in vLLM's own spelling: from a command line to settings, and back for a child process.

`--kv-cache-dtype fp8 --no-enable-prefix-caching --compilation-config.mode 0` is
{"kv_cache_dtype": "fp8", "enable_prefix_caching": False, "compilation_config": {"mode": 0}}.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.models.vllm_settings import VllmSettings


def parse_engine_arguments(words: list[str]) -> dict[str, Any]:
    """`--NAME VALUE`, `--NAME=VALUE`, `--NAME`, `--no-NAME`; a value is JSON where it is JSON, else text.

    Raises:
        ValueError: a word that is neither an option nor its value.
    """
    arguments: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, text = word.partition("=")
        if not option.startswith("--") or option == "--":
            raise ValueError(
                f"got {word!r}; engine arguments of vLLM are spelled --NAME VALUE with their long names, "
                "a list as JSON: --NAME '[1, 2]'"
            )
        path = option.removeprefix("--").replace("-", "_").split(".")
        if equals:
            value = _value(text)
        elif rest and not rest[0].startswith("--"):
            value = _value(rest.pop(0))
        else:
            value = not path[0].startswith("no_")
            path[0] = path[0].removeprefix("no_")
        _put(arguments, path, value, option)
    return arguments


def spell_settings(settings: VllmSettings) -> list[str]:
    """The words that make `tutelage teacher` have these settings."""
    words = []
    for name, value in settings.model_dump(exclude={"engine_args"}, exclude_defaults=True).items():
        option = _option(name)
        words += [option] if value is True else [option, str(value)]
    return words + [f"{_option(name)}={json.dumps(value)}" for name, value in settings.engine_args.items()]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _put(arguments: dict[str, Any], path: list[str], value: Any, option: str) -> None:
    *sections, last = path
    for section in sections:
        arguments = arguments.setdefault(section, {})
        if not isinstance(arguments, dict):
            raise ValueError(f"got {option}, but {section} was given a value of its own")
    if last in arguments:
        raise ValueError(f"got {option} twice")
    arguments[last] = value
