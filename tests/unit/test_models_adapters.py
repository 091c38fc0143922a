"""Directories of LoRA adapters: what is read from them, what is refused, and what merging one gives."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.adapters import CODE, MATH, Recipe, save_adapter
from support.engine_requests import Reference, assert_scores, random_request, run_engine
from support.tiny_models import SMALL, save_tiny_model
from tutelage_client.errors import TutelageError
from tutelage_client.types import Signal

from services.models.adapters import CONFIG, WEIGHTS, read_adapter
from services.models.fingerprint import directory_revision

EVERYTHING = Signal(sampled=True, top_k=5, candidates=True, entropy=True)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "code", CODE, shape=SMALL)[0]


def test_an_adapter_says_its_modules_and_its_largest_rank(adapter: Path) -> None:
    read = read_adapter("code", adapter)
    assert (read.name, read.rank, len(read.modules)) == ("code", 8, 2 * 7)
    assert "model.layers.1.mlp.down_proj" in read.modules
    assert read.targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_revision_follows_base_and_adapter(adapter: Path, tmp_path: Path) -> None:
    read = read_adapter("code", adapter)
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    assert read_adapter("another", copy).revision("base") == read.revision("base")
    assert read.revision("other base") != read.revision("base")
    tensors = load_file(copy / WEIGHTS)
    first = min(tensors)
    save_file({**tensors, first: tensors[first] * 2}, copy / WEIGHTS)
    assert read_adapter("code", copy).revision("base") != read.revision("base")


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        configuration = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(configuration | changes))

    return change


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, directory / WEIGHTS)

    return change


def cut(directory: Path) -> None:
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[: len(whole) // 2])


REFUSED = {
    "no configuration": (lambda d: (d / CONFIG).unlink(), f"which has no {CONFIG}"),
    "no JSON": (lambda d: (d / CONFIG).write_text("{"), "is not JSON"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), f"which has no {WEIGHTS}"),
    "half a file": (cut, "cannot be read"),
    "not LoRA": (configured(peft_type="IA3"), "got peft_type 'IA3'"),
    "DoRA": (configured(use_dora=True), "got use_dora = True"),
    "biases": (configured(bias="lora_only"), "got bias = 'lora_only'"),
    "whole modules": (configured(modules_to_save=["lm_head"]), "got modules_to_save = ['lm_head']"),
    "some tokens": (configured(trainable_token_indices=[1]), "got trainable_token_indices = [1]"),
    "head": (renamed("model.layers.0.mlp.up_proj", "lm_head"), "got a change of 'lm_head'"),
    "embedding": (
        renamed("layers.0.mlp.up_proj.lora_A.weight", "embed_tokens.lora_embedding_A"),
        "embed_tokens.lora_embedding_A'; served are",
    ),
    "half a pair": (renamed("layers.0.mlp.up_proj.lora_A", "layers.9.mlp.up_proj.lora_A"), "no whole pair"),
    "no prefix": (renamed("base_model.model.", ""), "served are the two matrices of linear layers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_plain_lora_of_linear_layers_is_refused(what: str, adapter: Path, tmp_path: Path) -> None:
    change, reason = REFUSED[what]
    directory = Path(shutil.copytree(adapter, tmp_path / "changed"))
    change(directory)
    with pytest.raises(TutelageError) as refusal:
        read_adapter("code", directory)
    assert refusal.value.code == "INVALID_ARGUMENT"
    assert refusal.value.message.startswith("adapters.code: ")
    assert reason in refusal.value.message


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        ("qwen3", MATH),
        (
            "llama",
            replace(CODE, options=(("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"up_proj": 5}))),
        ),
        ("gpt2", Recipe(seed=3, rank=4, targets=("c_attn", "c_proj"), options=(("fan_in_fan_out", True),))),
    ],
)
async def test_the_transformers_engine_serves_what_peft_merges(
    architecture: str, recipe: Recipe, tmp_path: Path
) -> None:
    base = save_tiny_model(tmp_path / "base", architecture)
    directory, merged = save_adapter(tmp_path / "adapter", recipe, architecture, SMALL)
    request = random_request(1, signal=EVERYTHING)
    async with run_engine(base, name="math", adapter=directory) as engine:
        score = await engine.score(request)
        with pytest.raises(
            TutelageError, match="FAILED_PRECONDITION: weights: got others for a model with an"
        ):
            await engine.load_weights(base, 1)
    assert_scores(score, request, Reference(merged), 1e-4)
    assert score.identity.model == f"{base}+{directory}"
    assert score.identity.revision == read_adapter("math", directory).revision(directory_revision(base))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (replace(SMALL, layers=3), "first differing tensor: base_model.model.model.layers.2"),
        (replace(SMALL, intermediate=32), "size mismatch"),
    ],
)
async def test_an_adapter_of_another_model_is_not_merged(shape: Any, reason: str, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    directory, _ = save_adapter(tmp_path / "adapter", CODE, shape=shape)
    with pytest.raises(TutelageError) as refusal:
        async with run_engine(base, name="math", adapter=directory):
            pass
    assert refusal.value.code == "FAILED_PRECONDITION"
    assert f"adapters.math: {directory} is for another model" in refusal.value.message
    assert reason in refusal.value.message
