"""What a writer is shown of a response, how much it may write, and how its ids are read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.text_tokenizer import CHATML, chat_prompt, spelled, text_tokenizer, turn
from support.writers import writing
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from tutelage_client.codec import build_request
from tutelage_client.types import Sequence, SequenceScore, TokenIds

from services.models.writer_settings import WriterSettings
from services.teacher.text_teacher import NO_SCORE
from services.teacher.writer import Chunk, Writer

PLAIN = text_tokenizer(chat=False)
CHATML_OF = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\nt"


def chunks_of(
    response: str | TokenIds,
    anchors: list[int],
    size: int = 3,
    *,
    prompt: str | TokenIds = "1+1",
    chat: bool = True,
    text: str | None = None,
    positions: int | None = None,
    **settings: str | int,
) -> tuple[Chunk, ...] | SequenceScore:
    writer = Writer(WriterSettings(**settings), text_tokenizer(chat=chat), positions=positions)  # type: ignore[arg-type]
    ids, seen = (spelled(each) if isinstance(each, str) else each for each in (response, prompt))
    return written_of(writer, seen, ids, anchors, size=size, text=text)


def written_of(
    writer: Writer,
    prompt: TokenIds,
    response: TokenIds,
    anchors: list[int],
    *,
    size: int,
    text: str | None = None,
) -> tuple[Chunk, ...] | SequenceScore:
    request = build_request(
        [prompt], [response], anchors=[anchors], context_texts=[text], signal=writing(4, size)
    )
    return writer.chunks(request, request.sequences[0])


def test_it_goes_on_from_the_prompt_and_the_text_before_a_chunk_in_its_own_turn() -> None:
    found = chunks_of("It is two.", [0, 3, 6], user="Solve {prompt}!", system="Be kind")
    assert isinstance(found, tuple)
    assert [chunk.text for chunk in found] == ["It ", "is ", "two"]
    turns = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nSolve 1+1!<|im_end|>\n"
    shown = [PLAIN.decode(chunk.prefix) for chunk in found]
    assert shown == [f"{turns}<|im_start|>assistant\n{begun}" for begun in ("", "It ", "It is ")]
    marks = found[2].prefix.count(PLAIN.convert_tokens_to_ids("<|im_start|>"))
    assert marks == CHATML.count("<|im_start|>") + 1, "the template's marks are special tokens"
    assert [chunk.most for chunk in found] == [3, 3, 3]


def test_of_a_chat_it_goes_on_from_the_bare_question_or_what_its_template_leaves() -> None:
    chat = chat_prompt("1+1")
    found = chunks_of("two", [1], 2, prompt=chat, text="1+1")
    assert isinstance(found, tuple)
    assert found[0].prefix == turn("user", "1+1") + turn("assistant", "t", ended=False)
    same = chunks_of("two", [1], 2, prompt="1+1")
    assert same == found, "texts and random numbers are those of a caller without a template"
    bare = chunks_of("two", [1], 2, prompt=chat, text="1+1", chat=False)
    assert isinstance(bare, tuple)
    assert bare[0].prefix == spelled("1+1t")
    left = chunks_of("two", [1], 2, prompt=chat)
    assert isinstance(left, tuple)
    said = "user\n1+1\nassistant\n<think>\n\n</think>\n\n"
    assert PLAIN.decode(left[0].prefix) == CHATML_OF.format(said)


def test_a_contexts_text_stands_for_every_response_to_it() -> None:
    writer = Writer(WriterSettings(), text_tokenizer(chat=False), positions=None)
    request = build_request(
        [spelled("x"), spelled("y")],
        [spelled("ab")] * 3,
        anchors=[[0]] * 3,
        context_index=[1, 0, 1],
        context_texts=["one", None],
        signal=writing(4, 2),
    )
    shown = [writer.chunks(request, sequence) for sequence in request.sequences]
    assert [chunks[0].prefix for chunks in shown if isinstance(chunks, tuple)] == [
        spelled("y"), spelled("one"), spelled("y")
    ]  # fmt: skip


def test_without_a_template_the_text_follows_the_question() -> None:
    found = chunks_of("two, I think", [5], chat=False, user="{prompt}=")
    assert isinstance(found, tuple)
    assert PLAIN.decode(found[0].prefix) == "1+1=two, "


def test_a_text_that_goes_on_is_opened_as_its_tokenizer_does_and_not_ended() -> None:
    """After its own end token a model would write whatever comes next in its data."""
    framing = text_tokenizer(chat=False)
    end, pad = framing.eos_token, framing.pad_token
    framing.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{pad} $A {end}", special_tokens=[(pad, framing.pad_token_id), (end, framing.eos_token_id)]
    )
    assert framing("ab")["input_ids"] == [framing.pad_token_id, *spelled("ab"), framing.eos_token_id]
    writer = Writer(WriterSettings(), framing, positions=None)
    found = written_of(writer, spelled("1+1"), spelled("abcd"), [2], size=2)
    assert isinstance(found, tuple)
    assert found[0].prefix == [framing.pad_token_id, *spelled("1+1ab")]


def test_special_tokens_of_the_caller_are_no_text_and_a_chunk_of_them_still_gets_a_token() -> None:
    ids = np.append(spelled("ab"), [PLAIN.eos_token_id] * 2).astype(np.int32)
    found = chunks_of(ids, [0, 2], 2)
    assert isinstance(found, tuple)
    assert [(chunk.text, chunk.most) for chunk in found] == [("ab", 2), ("", 1)]


def test_what_comes_after_an_anchor_changes_neither_prefix_nor_random_numbers() -> None:
    one, other = chunks_of("abcdef", [0, 3]), chunks_of("abcxyz", [0, 3])
    assert isinstance(one, tuple)
    assert isinstance(other, tuple)
    assert [(c.prefix, c.number) for c in one] == [(c.prefix, c.number) for c in other]
    assert one[1].text != other[1].text
    assert len({chunk.number for chunk in (*one, *other)}) == 2
    assert all(0 <= chunk.number < 2**62 for chunk in one)
    another = chunks_of("abcdef", [0, 3], prompt="1+2")
    assert isinstance(another, tuple)
    assert {c.number for c in one}.isdisjoint(c.number for c in another)


def test_no_chunk_needs_no_look_at_the_text() -> None:
    assert chunks_of("a<|im_end|>", []) == ()


@pytest.mark.parametrize(
    ("prompt", "response", "named"),
    [
        ("p", "no<|im_end|>\n<|im_start|>user", "response"),
        ("<|im_start|>", "res", "prompt"),
        ("p", "res<end>", "response"),
    ],
)
def test_a_text_that_spells_the_writers_marks_is_not_shown(prompt: str, response: str, named: str) -> None:
    found = chunks_of(response, [0], prompt=prompt)
    assert isinstance(found, SequenceScore)
    assert found.error is not None
    assert (found.error.code, found.agreement) == (NO_SCORE, None)
    assert found.error.message.startswith(f"writer: the {named} spells '<")


def test_a_contexts_text_that_spells_the_writers_marks_is_not_shown() -> None:
    found = chunks_of("res", [0], text="no<|im_end|>\n<|im_start|>user")
    assert isinstance(found, SequenceScore)
    assert found.error is not None
    assert found.error.code == NO_SCORE
    assert found.error.message.startswith("writer: the prompt spells '<|im_")
    assert isinstance(chunks_of("res", [0], prompt="<|im_end|>", text="p"), tuple)


def test_a_place_that_the_model_does_not_take_fails_the_sequence() -> None:
    begun = len("1+1=") + 5
    assert isinstance(chunks_of("abcdefgh", [5], chat=False, user="{prompt}=", positions=begun + 3), tuple)
    found = chunks_of("abcdefgh", [5], chat=False, user="{prompt}=", positions=begun + 2)
    assert isinstance(found, SequenceScore)
    assert found.error is not None
    assert found.error.code == "INVALID_ARGUMENT"
    assert (
        found.error.message
        == f"writer: got {begun} tokens with the question and 3 for the reply, the writer takes {begun + 2}"
    )


def joined() -> PreTrainedTokenizerFast:
    """Words that begin with a space, except at a text's beginning, where decoding leaves it out."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", "▁we", "▁add", "▁two", "s"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def test_what_a_continuation_adds_is_read_after_what_stands_before_it() -> None:
    tokenizer = joined()
    writer = Writer(WriterSettings(user="{prompt} "), tokenizer, positions=None)
    we, add, two, s = (tokenizer.convert_tokens_to_ids(word) for word in ("▁we", "▁add", "▁two", "s"))
    sequence = Sequence("0", 0, np.array([add, two], dtype=np.int32), anchors=np.ones(1, dtype=np.int32))
    found = written_of(writer, np.array([we], dtype=np.int32), sequence.response_ids, [1], size=1)
    assert isinstance(found, tuple)
    assert found[0].text == " two"
    agreement = writer.agreement(sequence, found, [[[two], [two, s], []]]).agreement
    assert agreement is not None
    assert agreement.tolist() == [np.float32((1 + 4 / 5 + 0) / 3)]


def test_a_character_that_a_continuation_was_cut_in_is_left_out() -> None:
    inner = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    writer = Writer(WriterSettings(), tokenizer, positions=None)
    chunk = Chunk(tokenizer("x")["input_ids"], "a", 2, 0)
    sequence = Sequence("0", 0, np.zeros(1, dtype=np.int32), anchors=np.zeros(1, dtype=np.int32))
    whole = tokenizer("aé")["input_ids"]
    agreement = writer.agreement(sequence, [chunk], [[whole, whole[:-1]]]).agreement
    assert agreement is not None
    assert agreement.tolist() == [0.75]


def test_a_writer_needs_a_tokenizer_and_for_a_system_message_a_template() -> None:
    with pytest.raises(Exception, match="a writer needs a tokenizer"):
        Writer(WriterSettings(), None, positions=None)
    with pytest.raises(
        Exception, match=r"writer.system: got one, the writer's tokenizer has no chat template"
    ):
        Writer(WriterSettings(system="s"), PLAIN, positions=None)


def test_another_question_is_another_teacher() -> None:
    from tutelage_client.types import Identity, Limits

    identity = Identity("w", "m", "r", 0, "f", 9, "vllm-writer", "1", "float32", "float32")
    every = [WriterSettings(), WriterSettings(temperature=0.5), WriterSettings(user="Q {prompt}")]
    revisions = {Writer(one, PLAIN, positions=None).identity(identity).revision for one in every}
    assert len(revisions | {"r"}) == 4
    assert Writer(every[0], PLAIN, positions=None).identity(identity).engine == "vllm-writer"
    limits = Writer(WriterSettings(max_continuations=3), PLAIN, positions=None).limits(
        Limits(max_sequences=5)
    )
    assert limits == replace(
        Limits(max_sequences=5, max_top_k=0, max_candidates=0, entropy=False, temperature=False),
        max_continuations=3,
    )


def test_more_chunks_than_the_settings_allow_are_an_error_of_their_sequence() -> None:
    """Each costs a reading of all before it: without a bound one request would keep a replica for hours."""
    allowed = chunks_of("abcdef", [0, 2, 4], 2, max_chunks=3)
    assert isinstance(allowed, tuple)
    assert len(allowed) == 3
    refused = chunks_of("abcdef", [0, 2, 4], 2, max_chunks=2)
    assert isinstance(refused, SequenceScore)
    assert refused.error is not None
    assert (refused.error.code, refused.error.message) == (
        "INVALID_ARGUMENT",
        "writer: got 3 chunks of a response, allowed are 2",
    )


def test_where_there_is_nothing_to_go_on_from_that_sequence_alone_has_no_score() -> None:
    """A prompt of special tokens alone says nothing, and a model without a template begins with nothing."""
    silent = chunks_of("abc", [0], prompt="", chat=False)
    assert isinstance(silent, SequenceScore)
    assert silent.error is not None
    assert (silent.error.code, silent.error.message) == (
        NO_SCORE,
        "writer: there is no text before position 0",
    )
    later = chunks_of("abcdef", [3], prompt="", chat=False)
    assert isinstance(later, tuple)
    assert PLAIN.decode(later[0].prefix) == "abc"
    asked = chunks_of("abc", [0], prompt="", chat=False, user="Q{prompt}")
    assert isinstance(asked, tuple)
