"""Text to token ids for `tutelage score`: plain text, and chat messages with the tokenizer's template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import Int32Array

Messages = Sequence[dict[str, Any]]


class Encoder:
    """One tokenizer, loaded when the first text comes."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._loaded: Any = None

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer, once it has been used; else empty."""
        if self._loaded is None:
            return ""
        from services.models.fingerprint import tokenizer_fingerprint

        return tokenizer_fingerprint(self._loaded)

    def ids(self, text: str) -> Int32Array:
        """The text as it stands: no special token is added."""
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def prompt(self, messages: Messages) -> str:
        """What a model sees before it answers."""
        text: str = self._render(messages, add_generation_prompt=True)
        return text

    def turn(self, messages: Messages) -> tuple[Int32Array, Int32Array]:
        """Context and response of a conversation whose last message is the answer.

        The response ends where a sampler would have stopped: with the end token, if the template writes
        one after the answer.
        """
        prompt, whole = self.prompt(messages[:-1]), self._render(messages, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise invalid(
                "the chat template writes another prompt when the answer is there; give the messages "
                "before it as `prompt` and the answer as `response`"
            )
        response = self.ids(whole[len(prompt) :])
        ends = np.flatnonzero(response == self._tokenizer.eos_token_id)
        return self.ids(prompt), response[: ends[0] + 1] if len(ends) else response

    @property
    def _tokenizer(self) -> Any:
        if self._loaded is None:
            if self._name is None:
                raise invalid(
                    "the file holds text; name its --tokenizer, or give context_ids and response_ids"
                )
            from transformers import AutoTokenizer

            try:
                self._loaded = AutoTokenizer.from_pretrained(self._name)
            except OSError as error:
                raise invalid(f"--tokenizer: {self._name} cannot be loaded: {error}") from error
        return self._loaded

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> Any:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise invalid(f"--tokenizer: {self._name} has no chat template, which messages need")
        return self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )


def check_fingerprint(encoder: Encoder, teachers: str) -> None:
    """Raise FAILED_PRECONDITION when texts were encoded with another tokenizer than the teacher's."""
    own = encoder.fingerprint
    if own and teachers and own != teachers:
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"--tokenizer: fingerprint {own[:12]}…, the teacher's is {teachers[:12]}…: "
            "ids would stand for other text",
        )
