"""Writers of a character's length: one that goes on in one way only, and one that says anything.

The first is the hand-made model of `judges`: its next character depends on the last one alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tutelage_client.types import Signal

from services.models.writer_settings import WriterSettings
from student_trainer.tasks.characters import MODEL_ROWS, character_tokenizer
from support.judges import JUDGED, save_judge

# After the question's "=" it writes abcabc…; d again and again; nothing after e.
GOES_ON = {"=": "a", "a": "b", "b": "c", "c": "a", "d": "d", "e": "<end>"}
# So cold that what comes next by 1 in the logits has all but e⁻⁵⁰ of the probability.
SETTINGS = WriterSettings(user="{prompt}=", temperature=0.02)


def save_writer(directory: Path) -> Path:
    """The writer that goes on in one way, of 256 positions."""
    return save_judge(directory, GOES_ON)


def save_random_writer(directory: Path, seed: int = 0) -> Path:
    """A model of two layers with random weights, whose next character depends on all before it."""
    tokenizer = character_tokenizer(JUDGED)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=MODEL_ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,  # vLLM's on a CPU
        max_position_embeddings=256,
        initializer_range=0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def writing(continuations: int, chunk_tokens: int) -> Signal:
    """What a writer is asked."""
    return Signal(sampled=False, continuations=continuations, chunk_tokens=chunk_tokens)


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's, as its recurrence says it."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def similarity(one: str, other: str) -> float:
    """1 − distance / longer length, and 1 of two empty texts."""
    longer = max(len(one), len(other))
    return 1.0 - edit_distance(one, other) / longer if longer else 1.0
