"""A tokenizer of printable characters with ChatML, small enough for a model made in a test."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN, START, STOP = "<pad>", "<end>", "<unk>", "<|im_start|>", "<|im_end|>"
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
ROWS = 112  # of a model's embedding; more than the tokenizer has
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# A student that thinks, told not to: its template begins the answer with an empty thought.
THOUGHTLESS = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")


def text_tokenizer(*, chat: bool, special_thinking: bool = False) -> PreTrainedTokenizerFast:
    """One token per character and per mark; <think> and </think> are tokens, special where asked for."""
    vocabulary = {token: i for i, token in enumerate([PAD, END, UNKNOWN, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([START, STOP], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special_thinking)
    assert len(tokenizer) <= ROWS
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def spelled(text: str) -> list[int]:
    """One token for each character, as a student can sample them: no mark among them."""
    found: list[int] = text_tokenizer(chat=False).convert_tokens_to_ids(list(text))
    return found


def turn(role: str, text: str, *, ended: bool = True) -> list[int]:
    """A turn of ChatML."""
    start, stop = text_tokenizer(chat=False).convert_tokens_to_ids([START, STOP])
    return [start, *spelled(f"{role}\n{text}"), *([stop, *spelled("\n")] if ended else [])]


def chat_prompt(question: str) -> list[int]:
    """A question in the template of a student that is told not to think."""
    tokenizer = text_tokenizer(chat=True)
    tokenizer.chat_template = THOUGHTLESS
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
