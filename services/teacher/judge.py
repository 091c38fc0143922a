"""A judge between token ids: what it is shown of a sequence, and the judgement in its reply.

Callers send ids of their own tokenizer. The judge has another model and perhaps another tokenizer, so a
sequence goes through text; nothing is aligned token by token, and nothing is a log-probability.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Ids
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import Identity, Int32Array, Limits, Sequence, SequenceError, SequenceScore

from services.models.fingerprint import tokenizer_fingerprint
from services.models.judge_settings import JudgeSettings
from services.models.load import load_tokenizer

NO_SCORE = "OUT_OF_RANGE"  # code of a sequence whose judge said no score that can be read


class Judge:
    """The settings of a judge with the tokenizers they need.

    Args:
        tokenizer: the judge's own.
        positions: context and reply that its model takes, in its own tokens; None: no bound is known.

    Raises:
        TutelageError: INVALID_ARGUMENT when a tokenizer is missing, or the settings do not fit it.
    """

    def __init__(self, settings: JudgeSettings, tokenizer: Any, *, positions: int | None) -> None:
        if tokenizer is None:
            raise invalid("model: a judge needs a tokenizer, its directory has none")
        theirs = tokenizer if settings.tokenizer is None else load_tokenizer(settings.tokenizer, None)
        if theirs is None:
            raise invalid(f"judge.tokenizer: got {settings.tokenizer!r}, which has none")
        self._chat = tokenizer.chat_template is not None
        if settings.system is not None and not self._chat:
            raise invalid("judge.system: got one, the judge's tokenizer has no chat template")
        self.settings = settings
        self._own, self._theirs = tokenizer, theirs
        self._marks = _marks(tokenizer)
        self._positions = positions
        self._fingerprint = tokenizer_fingerprint(theirs)
        self._vocabulary = None if settings.tokenizer is None else _head_rows(settings.tokenizer, theirs)

    def identity(self, model: Identity) -> Identity:
        """Of the model with these settings: another question is another judge, and ids are the callers'."""
        asked = f"{model.revision}\0{self.settings.model_dump_json()}"
        return replace(
            model,
            revision=hashlib.sha256(asked.encode()).hexdigest(),
            tokenizer_fingerprint=self._fingerprint,
            vocab_size=self._vocabulary or model.vocab_size,
            engine=f"{model.engine.removesuffix('-judge')}-judge",
        )

    def limits(self, limits: Limits) -> Limits:
        """`limits` without anything but judgements."""
        return Limits(
            max_sequences=limits.max_sequences,
            max_sequence_tokens=limits.max_sequence_tokens,
            max_request_tokens=limits.max_request_tokens,
            max_message_bytes=limits.max_message_bytes,
            max_top_k=0,
            max_candidates=0,
            entropy=False,
            temperature=False,
            judge=True,
        )

    def prompt_ids(self, context: Int32Array, sequence: Sequence) -> list[int] | SequenceScore:
        """What the judge is given, in its own ids.

        An error where it does not fit, or would end the question's turn by itself and answer in the judge's.
        """
        prompt, response = (
            self._theirs.decode(ids.tolist(), skip_special_tokens=True)
            for ids in (context, sequence.response_ids)
        )
        for what, text in (("prompt", prompt), ("response", response)):
            if (mark := self._mark_in(text)) is not None:
                return _failed(
                    sequence, NO_SCORE, f"the {what} spells {mark!r}, with which it could end its own turn"
                )
        ids = self._ids(self.settings.question(prompt, response))
        longest = self.settings.max_new_tokens
        if self._positions is not None and len(ids) + longest > self._positions:
            return _failed(
                sequence,
                "INVALID_ARGUMENT",
                f"got {len(ids)} tokens with the question and {longest} for the reply, "
                f"the judge takes {self._positions}",
            )
        return ids

    def judgement(self, sequence: Sequence, reply: Ids[int], *, ended: bool) -> SequenceScore:
        """The score in a reply's ids (without the token that ended it); an error where there is none."""
        text = self._own.decode(list(reply), skip_special_tokens=True)
        try:
            if not ended:
                raise ValueError(f"the judge's reply was cut after {self.settings.max_new_tokens} tokens")
            return SequenceScore(sequence.id, judgement=self.settings.read(text), verdict=text)
        except ValueError as error:
            return _failed(sequence, NO_SCORE, str(error))

    def _mark_in(self, text: str) -> str | None:
        """A special token of the judge's that it would read in a text; None where there is none."""
        found = self._own(text, add_special_tokens=False)["input_ids"]
        return next((self._marks[token] for token in found if token in self._marks), None)

    def _ids(self, question: str) -> list[int]:
        if not self._chat:
            plain: list[int] = self._own(question)["input_ids"]
            return plain
        messages = [{"role": "user", "content": question}]
        if self.settings.system is not None:
            messages.insert(0, {"role": "system", "content": self.settings.system})
        text = self._own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._own(text, add_special_tokens=False)["input_ids"]
        return ids


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a reply, of the generation configuration and the tokenizer.

    Raises:
        TutelageError: INVALID_ARGUMENT when there is none: every reply would be cut.
    """
    named = getattr(model, "eos_token_id", None)
    found = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    if not found:
        raise invalid("model: a judge needs an end token, neither its tokenizer nor its files name one")
    return sorted(found)


def _marks(tokenizer: Any) -> dict[int, str]:
    """The special tokens by id, but for the one of what is not known."""
    added = {token: str(mark) for token, mark in tokenizer.added_tokens_decoder.items() if mark.special}
    known = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {token: mark for token, mark in (added | known).items() if token != tokenizer.unk_token_id}


def _failed(sequence: Sequence, code: str, message: str) -> SequenceScore:
    return SequenceScore(sequence.id, SequenceError(code, f"judge: {message}"))


def _head_rows(source: str, tokenizer: Any) -> int:
    """Ids that callers may send: rows of their model's head where its files are, else of the tokenizer."""
    words = max(tokenizer.get_vocab().values()) + 1
    if not (Path(source) / "config.json").is_file():
        return int(words)
    from transformers import AutoConfig

    try:
        return max(int(AutoConfig.from_pretrained(source).get_text_config().vocab_size), int(words))
    except (OSError, ValueError) as error:
        raise TutelageError("INVALID_ARGUMENT", f"judge.tokenizer: {source}: {error}") from error
