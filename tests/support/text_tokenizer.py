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
