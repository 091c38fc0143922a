"""From an example to the token ids of its prompt: chat template or plain text."""

from __future__ import annotations

from typing import Any

from tutelage_client.codec import as_ids
from tutelage_client.errors import invalid
from tutelage_client.types import Int32Array

from student_trainer.sampler.settings import DataSettings
from student_trainer.tasks import Example


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

    def ids(self, example: Example) -> Int32Array:
        """int32 [P], P ≥ 1. A chat template writes its own special tokens, so none is added to it."""
        special = not self._uses_template(example)
        ids = as_ids(self._tokenizer(self.text(example), add_special_tokens=special)["input_ids"], "prompt")
        if not ids.size:
            raise invalid(f"prompt {example.prompt!r}: has no token; a prompt needs at least one")
        return ids

    def _uses_template(self, example: Example) -> bool:
        if isinstance(example.prompt, str):
            return self._settings.chat_template != "never" and self._has_template
        if not self._has_template:
            raise invalid("data.prompt_field: chat messages need a tokenizer with a chat template")
        return True
