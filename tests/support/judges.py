"""A judge with hand-made weights: a causal LM whose next character depends on the last one alone.

It is a real Llama that transformers and vLLM load, whose attention and MLP add nothing and whose head is a
table. Asked "PROMPT=RESPONSE", it goes on from the response's last character.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from services.models.judge_settings import JudgeSettings
from student_trainer.tasks.characters import MODEL_ROWS, character_tokenizer
from support.training_run import run_replica

JUDGED = "0123456789abcdefg+=:-Sx"
# What follows a character, greedily: 7 after a, 0 after b, after c what is no number, after d d for ever.
FOLLOWS = {"a": "7", "b": "0", "c": "x", "d": "d", "7": "<end>", "0": "<end>", "x": "<end>"}
SETTINGS = JudgeSettings(user="{prompt}={response}", reply="{score}", largest=9, max_new_tokens=4)


def save_judge(directory: Path, follows: Mapping[str, str] = FOLLOWS, characters: str = JUDGED) -> Path:
    """A model of one layer with its tokenizer."""
    tokenizer = character_tokenizer(characters)
    ids = tokenizer.get_vocab()
    config = transformers.LlamaConfig(
        vocab_size=MODEL_ROWS,
        hidden_size=MODEL_ROWS,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=ids["<end>"],
        pad_token_id=ids["<pad>"],
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(MODEL_ROWS))
        for before, after in follows.items():
            model.lm_head.weight[ids[after], ids[before]] = 1.0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# By the last character of a response: 5 to 8 are good, all else is bad, of 0 and 9 it says nothing.
LIKES_LARGE = {**dict.fromkeys("1234+-=,:", "0"), **dict.fromkeys("5678", "9"), "0": "<end>", "9": "<end>"}


def run_judge(url: str, model: str, settings: str, log: str) -> None:
    """A judge called "referee" as a process that takes jobs from the queue."""
    run_replica(url, log, name="referee", model=model, judge=JudgeSettings.model_validate_json(settings))
