"""From an example to the token ids of its prompt: chat template or plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tutelage_client.errors import invalid
from tutelage_client.types import Int32Array

from student_trainer.sampler.settings import DataSettings
from student_trainer.sampler.special_tokens import SpecialTokens
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
        self.special = SpecialTokens(tokenizer)
        self._tokenizer = tokenizer
        self._settings = settings
        self._has_template = getattr(tokenizer, "chat_template", None) is not None
        wanted = settings.chat_template == "always" or settings.system_prompt is not None
        if wanted and not self._has_template:
            raise invalid("data.chat_template: the student's tokenizer has no chat template")

    @property
    def chats(self) -> bool:
        """Whether there is a chat template to write a system message with."""
        return self._has_template

    def text(self, example: Example) -> str:
        """The prompt as the model sees it, special tokens written out."""
        if not self._uses_template(example):
            assert isinstance(example.prompt, str)
            return example.prompt
        rendered: str = self._tokenizer.apply_chat_template(
            self._messages(example),
            tokenize=False,
            add_generation_prompt=True,
            **self._settings.chat_template_arguments,
        )
        return rendered

    def bare(self, example: Example) -> str | None:
        """The prompt as it was asked, without a template, for a reader that has one of its own.

        All of a plain prompt. Of one user message its content, after that of a system message in a paragraph
        of its own; of any other chat a paragraph "role: content" for each message. What stands in the run
        file, data.system_prompt, is not part of it, nor is any of the student's special tokens. None where a
        message has no text.
        """
        if isinstance(example.prompt, str):
            return self.special.without(example.prompt)
        turns = [(message.get("role"), message.get("content")) for message in example.prompt]
        if not all(isinstance(content, str) for _, content in turns):
            return None
        alone = [role for role, _ in turns if role != "system"] == ["user"]
        paragraphs = (content if alone else f"{role}: {content}" for role, content in turns)
        return self.special.without("\n\n".join(map(str, paragraphs)))

    def reworded(self, example: Example, *, user: str | None, system: str | None) -> Example:
        """The example with another prompt.

        Args:
            user: takes the place of the last user message's text, of all of a plain prompt; None: as it is.
            system: goes before what the system message says, if there is one.

        Raises:
            TutelageError: INVALID_ARGUMENT where there is no user message, or no system message to write.
        """
        if not self._uses_template(example):
            if system is not None:
                raise invalid("system: needs a chat template, this prompt is plain text")
            return example if user is None else replace(example, prompt=user)
        messages = self._messages(example)
        if user is not None:
            place = last_user_message(messages)
            if place is None:
                raise invalid("user: the prompt has no user message that it could take the place of")
            messages[place]["content"] = user
        if system is not None:
            if messages[0].get("role") == "system":
                messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
            else:
                messages.insert(0, {"role": "system", "content": system})
        return replace(example, prompt=tuple(messages))

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

    def _messages(self, example: Example) -> list[dict[str, str]]:
        messages = (
            [{"role": "user", "content": example.prompt}]
            if isinstance(example.prompt, str)
            else [dict(message) for message in example.prompt]
        )
        if self._settings.system_prompt is not None and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": self._settings.system_prompt})
        return messages

    def _uses_template(self, example: Example) -> bool:
        if isinstance(example.prompt, str):
            return self._settings.chat_template != "never" and self._has_template
        if not self._has_template:
            raise invalid("data.prompt_field: chat messages need a tokenizer with a chat template")
        return True


def question(example: Example) -> str | None:
    """The prompt's own words: all of a plain one, the last user message of a chat; None without one."""
    if isinstance(example.prompt, str):
        return example.prompt
    place = last_user_message(example.prompt)
    return None if place is None else example.prompt[place]["content"]


def last_user_message(messages: Sequence[Mapping[str, str]]) -> int | None:
    """Where it is."""
    return max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=None)
