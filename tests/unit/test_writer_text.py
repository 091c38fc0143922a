"""A response's text in parts: nothing is lost or said twice, wherever tokens cut it; how alike texts are."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.writers import similarity
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from tutelage_client.types import Int32Array

from services.teacher.writer import characters_of, edit_similarity

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30)
words = st.lists(
    st.sampled_from(["né", " 東京", "👩‍👩‍👧", " the", "  ", "\n", "ab", "𝔘", ".", " ,"]), max_size=12
).map("".join)


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE that joins bytes within characters of several, and not all of them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    inner.train_from_iterator(["né 東京 👩‍👩‍👧 the the then né 𝔘 東 京 👩"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.add_tokens([AddedToken("<mark>", special=True)])
    return tokenizer


@cache
def byte_of() -> dict[str, int]:
    """The byte that a character of a byte-level vocabulary stands for, by GPT-2's rule."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def spelled(ids: list[int]) -> bytes:
    """The bytes of ids; special tokens have none."""
    tokenizer = byte_level()
    kept = [i for i in ids if i not in tokenizer.all_special_ids and i not in tokenizer.added_tokens_decoder]
    return bytes(byte_of()[c] for token in tokenizer.convert_ids_to_tokens(kept) for c in token)


def said(ids: Int32Array) -> str:
    text: str = byte_level().decode(ids.tolist(), skip_special_tokens=True)
    return text


@settings(max_examples=300, deadline=None)
@given(texts | words, st.data())
def test_ids_say_the_characters_whose_every_byte_they_have(text: str, data: st.DataObject) -> None:
    tokenizer: Any = byte_level()
    ids: list[int] = []
    for character in text:  # cut in another way than the tokenizer would, as a model can sample them
        if data.draw(st.booleans()) or not ids:
            ids += tokenizer(character)["input_ids"]
        else:
            ids += [tokenizer.convert_tokens_to_ids(chr_of(byte)) for byte in character.encode()]
        if data.draw(st.integers(0, 9)) == 0:
            ids.append(tokenizer.convert_tokens_to_ids("<mark>"))
    ids = data.draw(st.sampled_from([ids, tokenizer(text)["input_ids"]]))
    array = np.array(ids, dtype=np.int32)
    whole = said(array)
    assert whole == text
    for count in range(len(ids) + 1):
        definition = spelled(ids[:count]).decode(errors="ignore")
        assert whole[: characters_of(said, array, whole, count)] == definition


def chr_of(byte: int) -> str:
    return next(character for character, value in byte_of().items() if value == byte)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=20))
def test_parts_of_any_ids_are_the_whole(ids: list[int]) -> None:
    """Of bytes that are no text, too, as a badly trained student samples them."""
    array = np.array(ids, dtype=np.int32)
    whole = said(array)
    places = [characters_of(said, array, whole, count) for count in range(len(ids) + 1)]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, len(whole))


@settings(max_examples=300, deadline=None)
@given(texts | words | st.text("ab", max_size=12), texts | words | st.text("ab", max_size=12))
def test_similarity_is_of_characters_by_the_longer_text(one: str, other: str) -> None:
    assert edit_similarity(one, other) == pytest.approx(similarity(one, other), abs=1e-12)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("", "", 1.0), ("", "ab", 0.0), ("ab", "ab", 1.0), ("kitten", "sitting", 4 / 7), ("né", "ne", 0.5)],
)
def test_some_similarities_by_hand(one: str, other: str, expected: float) -> None:
    assert edit_similarity(one, other) == edit_similarity(other, one) == pytest.approx(expected)
