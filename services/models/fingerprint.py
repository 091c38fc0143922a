"""SHA-256 identities: of a tokenizer's vocabulary, and of a model directory's content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tutelage_client.errors import invalid

_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides which text an id stands for: vocabulary, merges, added tokens.

    Which added token plays end-of-text, and the chat template, are left out: base and chat models
    of one family differ there and still agree on every id. Empty string for None (no tokenizer).
    """
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    merges = [
        merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []
    ]
    added = [
        [int(token_id), str(token.content), bool(token.special)]
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
    ]
    content = {
        "vocabulary": sorted((int(token_id), token) for token, token_id in tokenizer.get_vocab().items()),
        "merges": merges,
        "added": added,
    }
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def directory_revision(directory: Path) -> str:
    """Hash of a local model directory: config.json and the full content of every weight file.

    File names count, times do not, so a copy has the same revision and changed weights another.
    """
    config = directory / "config.json"
    if not config.is_file():
        raise invalid(f"model: got {str(directory)!r}, which has no config.json")
    files = sorted({path for pattern in _WEIGHT_PATTERNS for path in directory.glob(pattern)})
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(_digest, [config, *files]))
    return _combine(zip([config.name, *(path.name for path in files)], digests, strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _combine(entries: Iterable[tuple[str, str]]) -> str:
    whole = hashlib.sha256()
    for name, digest in entries:
        whole.update(f"{name}\0{digest}\n".encode())
    return whole.hexdigest()
