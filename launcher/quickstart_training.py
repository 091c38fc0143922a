"""Training one quickstart model from scratch on the addition task, by plain supervised learning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from launcher.quickstart_recipes import ModelRecipe
from student_trainer.tasks.addition import CHARACTERS, Addition, operands, solution
from student_trainer.tasks.characters import MODEL_ROWS, character_tokenizer

PROMPT_TOKENS = 8  # `347+585=`
IGNORED = -100  # label of positions that are not learned


class Batches(Protocol):
    """Where supervised examples come from."""

    def next(self) -> tuple[Tensor, Tensor]:
        """ids and labels, int64 [batch, T]; IGNORED where a position is not learned."""
        ...


def train(recipe: ModelRecipe, seed: int, report: Callable[[int, float], None]) -> Any:
    """A transformers model trained on one thread in float32; a function of recipe and seed.

    `report(step, loss)` is called after every step.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return fit(new_model(recipe), recipe, _Batches(recipe, seed), report)


def fit(model: Any, recipe: ModelRecipe, batches: Batches, report: Callable[[int, float], None]) -> Any:
    """Train `model` in place for the recipe's steps and return it; `report` as in `train`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, recipe))
    model.train()
    for step in range(recipe.steps):
        ids, labels = batches.next()
        # Position t predicts token t + 1: the last column is never an input.
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step + 1, float(loss.detach()))
    return model.eval()


def new_model(recipe: ModelRecipe) -> Any:
    """A Qwen3-shaped model of the recipe's sizes with random weights."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    tokenizer = character_tokenizer(CHARACTERS)
    config = Qwen3Config(
        vocab_size=MODEL_ROWS,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _cosine(step: int, recipe: ModelRecipe) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return warm * 0.5 * (1.0 + math.cos(math.pi * step / recipe.steps))


class _Batches:
    """Padded batches of prompt + answer + end; only the answer and its end are learned."""

    def __init__(self, recipe: ModelRecipe, seed: int) -> None:
        self.recipe = recipe
        self.random = np.random.default_rng(seed)
        self.tokenizer = character_tokenizer(CHARACTERS)
        self.training = np.flatnonzero(~Addition().held_out())
        self.fixed = [
            self._text(int(index))
            for index in self.random.choice(self.training, recipe.sloppy_examples, False)
        ]

    def next(self) -> tuple[Tensor, Tensor]:
        """ids and labels, int64 [batch, T]."""
        if self.fixed:
            chosen = self.random.integers(len(self.fixed), size=self.recipe.batch)
            texts = [self.fixed[i] for i in chosen]
        else:
            texts = [self._text(int(i)) for i in self.random.choice(self.training, self.recipe.batch)]
        encoded = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)
        labels[:, :PROMPT_TOKENS] = IGNORED
        return encoded["input_ids"], labels

    def _text(self, index: int) -> str:
        first, second = operands(index)
        forgotten = [bool(x) for x in self.random.random(2) < self.recipe.carry_forgotten]
        return f"{first}+{second}={solution(first, second, forgotten)}{self.tokenizer.eos_token}"
