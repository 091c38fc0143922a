"""What a judge and a writer have in common: callers' ids become text, and text the model's own ids.

Callers send ids of their own tokenizer. The model may have another, so a sequence goes through text; nothing
is aligned token by token, and nothing is a log-probability. A context may bring its text along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Ids
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import (
    Identity,
    Int32Array,
    Limits,
    ScoreRequest,
    Sequence,
    SequenceError,
    SequenceScore,
)

from services.models.fingerprint import tokenizer_fingerprint
from services.models.load import load_tokenizer
from services.models.text_settings import TextTeacherSettings

NO_SCORE = "OUT_OF_RANGE"  # code of a sequence of which such a teacher has nothing to say

S = TypeVar("S", bound=TextTeacherSettings)


class TextTeacher(Generic[S]):
    """Settings of a teacher of words with the tokenizers they need.

    Args:
        tokenizer: the model's own.
        positions: prompt and reply that the model takes, in its own tokens; None: no bound is known.
        ends: tokens that end a reply, see `end_tokens`.

    Raises:
        TutelageError: INVALID_ARGUMENT when a tokenizer is missing, or the settings do not fit it.
    """

    kind: ClassVar[str]  # "judge" or "writer": section of the settings, and beginning of every error

    def __init__(self, settings: S, tokenizer: Any, *, positions: int | None, ends: Ids[int] = ()) -> None:
        if tokenizer is None:
            raise invalid(f"model: a {self.kind} needs a tokenizer, its directory has none")
        theirs = tokenizer if settings.tokenizer is None else load_tokenizer(settings.tokenizer, None)
        if theirs is None:
            raise invalid(f"{self.kind}.tokenizer: got {settings.tokenizer!r}, which has none")
        self._chat = tokenizer.chat_template is not None
        if settings.system is not None and not self._chat:
            raise invalid(f"{self.kind}.system: got one, the {self.kind}'s tokenizer has no chat template")
        self.settings, self.ends = settings, ends
        self._own, self._theirs = tokenizer, theirs
        self._marks = _marks(tokenizer, ends)
        self._longest = max(map(len, tokenizer.get_vocab()))
        self._positions = positions
        self._fingerprint = tokenizer_fingerprint(theirs)
        self._vocabulary = (
            None if settings.tokenizer is None else _head_rows(self.kind, settings.tokenizer, theirs)
        )

    def identity(self, model: Identity) -> Identity:
        """Of the model with these settings: another question is another teacher, and ids are the callers'."""
        # Where the callers' tokenizer lies is no part of it: replicas may have it in different places.
        settings = self.settings.model_dump_json(exclude={"tokenizer"})
        asked = f"{model.revision}\0{self._fingerprint}\0{settings}"
        return replace(
            model,
            revision=hashlib.sha256(asked.encode()).hexdigest(),
            tokenizer_fingerprint=self._fingerprint,
            vocab_size=self._vocabulary or model.vocab_size,
            engine=f"{model.engine.removesuffix(f'-{self.kind}')}-{self.kind}",
        )

    def limits(self, limits: Limits) -> Limits:
        """`limits` without a log-probability of anything."""
        return Limits(
            max_sequences=limits.max_sequences,
            max_sequence_tokens=limits.max_sequence_tokens,
            max_request_tokens=limits.max_request_tokens,
            max_message_bytes=limits.max_message_bytes,
            max_top_k=0,
            max_candidates=0,
            entropy=False,
            temperature=False,
        )

    def said(self, ids: Int32Array) -> str:
        """Callers' ids as text, special tokens left out."""
        text: str = self._theirs.decode(ids.tolist(), skip_special_tokens=True)
        return text

    def prompt(self, request: ScoreRequest, sequence: Sequence) -> str:
        """What is shown for a sequence's context: its text, or what its ids say where it has none.

        What the ids of a chat say has words of its template in it: roles, and all that is no special token.
        """
        text = request.text_of(sequence)
        return self.said(request.contexts[sequence.context]) if text is None else text

    def refusal(self, sequence: Sequence, prompt: str, response: str) -> SequenceScore | None:
        """An error where a text is far too long, or would end its own turn and speak in the model's place."""
        # A context's text is bounded by the message's size alone: it is measured before it is tokenized.
        if self._positions is not None and len(prompt) > self._positions * self._longest:
            return self.failed(
                sequence,
                "INVALID_ARGUMENT",
                f"the prompt has {len(prompt)} characters, the {self.kind} takes {self._positions} tokens "
                f"of at most {self._longest}",
            )
        for what, text in (("prompt", prompt), ("response", response)):
            if (mark := self._mark_in(text)) is not None:
                return self.failed(
                    sequence, NO_SCORE, f"the {what} spells {mark!r}, with which it could end its own turn"
                )
        return None

    def too_long(self, sequence: Sequence, prompt: int, reply: int) -> SequenceScore | None:
        """An error where the model does not take a prompt and a reply of so many tokens."""
        if self._positions is None or prompt + reply <= self._positions:
            return None
        return self.failed(
            sequence,
            "INVALID_ARGUMENT",
            f"got {prompt} tokens with the question and {reply} for the reply, "
            f"the {self.kind} takes {self._positions}",
        )

    def asked(self, question: str, begun: str = "") -> list[int]:
        """The model's ids of a question, in its chat template, and of the reply as far as it has begun."""
        if not self._chat:
            return self._opened(question + begun)
        messages = [{"role": "user", "content": question}]
        if self.settings.system is not None:
            messages.insert(0, {"role": "system", "content": self.settings.system})
        text = self._own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._plain_ids(text + begun)

    def failed(self, sequence: Sequence, code: str, message: str) -> SequenceScore:
        return SequenceScore(sequence.id, SequenceError(code, f"{self.kind}: {message}"))

    def _opened(self, text: str) -> list[int]:
        """A text with what the tokenizer puts before it, and not the end token that some put after it."""
        ids: list[int] = self._own(text)["input_ids"]
        said = self._plain_ids(text)
        starts = range(len(ids) - len(said) + 1)
        start = next((at for at in starts if ids[at : at + len(said)] == said), None)
        return ids if start is None else ids[: start + len(said)]

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self._own(text, add_special_tokens=False)["input_ids"]
        return ids

    def _mark_in(self, text: str) -> str | None:
        """A special token of the model's that it would read in a text; None where there is none."""
        return next((self._marks[token] for token in self._plain_ids(text) if token in self._marks), None)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a reply, of the generation configuration and the tokenizer.

    Raises:
        TutelageError: INVALID_ARGUMENT when there is none: every reply would be cut.
    """
    named = getattr(model, "eos_token_id", None)
    found = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    if not found:
        raise invalid("model: what writes needs an end token, neither its tokenizer nor its files name one")
    return sorted(found)


def _marks(tokenizer: Any, ends: Ids[int]) -> dict[int, str]:
    """The special tokens by id, but for the one that says what is not known and nothing else."""
    added = {token: str(mark) for token, mark in tokenizer.added_tokens_decoder.items() if mark.special}
    known = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    marks = added | known
    roles = [token for role, token in tokenizer.special_tokens_map.items() if role != "unk_token"]
    others = {*ends, *tokenizer.convert_tokens_to_ids([*roles, *map(str, tokenizer.extra_special_tokens)])}
    return {
        token: mark for token, mark in marks.items() if token != tokenizer.unk_token_id or token in others
    }


def _head_rows(kind: str, source: str, tokenizer: Any) -> int:
    """Ids that callers may send: rows of their model's head where its files are, else of the tokenizer."""
    words = max(tokenizer.get_vocab().values()) + 1
    if not (Path(source) / "config.json").is_file():
        return int(words)
    from transformers import AutoConfig

    try:
        return max(int(AutoConfig.from_pretrained(source).get_text_config().vocab_size), int(words))
    except (OSError, ValueError) as error:
        raise TutelageError("INVALID_ARGUMENT", f"{kind}.tokenizer: {source}: {error}") from error
