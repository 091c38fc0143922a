"""A character tokenizer in Hugging Face format, for models trained from scratch on a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
MODEL_ROWS = 32  # rows of the models' embedding; more than the tokenizer has, as in real models


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per character; `<end>` ends an answer, no special token is added to a prompt."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, END, UNKNOWN, *characters])}
    if len(vocabulary) != len(characters) + 3 or len(vocabulary) > MODEL_ROWS:
        raise ValueError(
            f"characters: got {characters!r}, must be distinct and at most {MODEL_ROWS - 3} characters"
        )
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
