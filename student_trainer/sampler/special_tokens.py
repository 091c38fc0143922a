"""Filling templates with text that nobody has looked over: it must not speak the tokenizer's own language.

A response that spells out `<|im_end|>` letter by letter holds no special token. Read once more as part of a
prompt it would: the turn that shows the response would end there, and what follows would be instructions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from string import Formatter
from typing import Any


class SpecialTokens:
    """The special tokens of a Hugging Face tokenizer, as text."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.values()
        texts = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        # As tokenizers look for them: from the left, the longest first.
        ordered = sorted(texts - {""}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def fill(self, template: str, values: Mapping[str, str], unseen: Collection[str]) -> str:
        """A template with its fields; what fields in `unseen` add to a special token is left out.

        That goes for a token that one value spells, for one that two values or a value and the template
        spell together, and for one that comes about where another was taken out.
        """
        text, ours = "", bytearray()  # a byte for each character: whether it must be no part of a mark
        for literal, name, _, _ in Formatter().parse(template):
            value = "" if name is None else values[name]
            text += literal + value
            ours += bytes(len(literal)) + (b"\1" if name in unseen else b"\0") * len(value)
        start = 0
        while self._pattern and (found := self._pattern.search(text, start)):
            begin, start = found.span()
            if any(ours[begin:start]):
                kept = "".join(text[i] for i in range(begin, start) if not ours[i])
                text = text[:begin] + kept + text[start:]
                ours[begin:start] = bytes(len(kept))
                start = 0
        return text

    def without(self, text: str) -> str:
        """`text`, of which no part is a special token."""
        return self.fill("{text}", {"text": text}, {"text"})
