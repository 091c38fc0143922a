"""From an example to the token ids of its prompt: chat template or plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tutelage_client.errors import invalid
from tutelage_client.types import Int32Array

from student_trainer.sampler.settings import DataSettings
from student_trainer.tasks import Example


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model sees it."""

    text: str  # special tokens written out
    ids: Int32Array  # [P], P ≥ 1


class PromptEncoder:
    """Renders prompts with the student's tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any, settings: DataSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._has_template = getattr(tokenizer, "chat_template", None) is not None
        wanted = settings.chat_template == "always" or settings.system_prompt is not None
        if wanted and not self._has_template:
            raise invalid("data.chat_template: the student's tokenizer has no chat template")

    def text(self, example: Example) -> str:
        """The prompt as the model sees it, special tokens written out."""
        if not self._uses_template(example):
            assert isinstance(example.prompt, str)
            return example.prompt
        messages = (
            [{"role": "user", "content": example.prompt}]
            if isinstance(example.prompt, str)
            else [dict(message) for message in example.prompt]
        )
        if self._settings.system_prompt is not None and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": self._settings.system_prompt})
        rendered: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self._settings.chat_template_arguments
        )
        return rendered

    def encode(self, examples: Sequence[Example]) -> list[EncodedPrompt]:
        """Every example's prompt, in one call of the tokenizer for each kind.

        A chat template writes its own special tokens, so none is added to what it rendered.
        """
        texts = [self.text(example) for example in examples]
        templated = [self._uses_template(example) for example in examples]
        encoded: dict[int, EncodedPrompt] = {}
        for uses_template in set(templated):
            chosen = [i for i, uses in enumerate(templated) if uses == uses_template]
            batch = self._tokenizer([texts[i] for i in chosen], add_special_tokens=not uses_template)
            for i, ids in zip(chosen, batch["input_ids"], strict=True):
                if not ids:
                    raise invalid(f"prompt {examples[i].prompt!r}: has no token; a prompt needs at least one")
                encoded[i] = EncodedPrompt(texts[i], np.array(ids, dtype=np.int32))
        return [encoded[i] for i in range(len(examples))]

    def _uses_template(self, example: Example) -> bool:
        if isinstance(example.prompt, str):
            return self._settings.chat_template != "never" and self._has_template
        if not self._has_template:
            raise invalid("data.prompt_field: chat messages need a tokenizer with a chat template")
        return True
