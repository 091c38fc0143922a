"""Loading, exporting and fingerprinting model directories."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import save_tiny_model, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from tutelage_client.errors import TutelageError

from services.models.export import export_model
from services.models.fingerprint import directory_revision, tokenizer_fingerprint
from services.models.load import load_causal_lm, load_weights


def tokenizer(merges: list[tuple[str, str]], **special: Any) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "<eos>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "<eos>", **special})


MERGES = [("a", "b"), ("ab", "c")]


def test_tokenizer_fingerprint_survives_a_round_trip_to_disk(tmp_path: Path) -> None:
    original = tokenizer(MERGES)
    original.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(original)
    assert len(tokenizer_fingerprint(original)) == 64


def test_tokenizer_fingerprint_tells_merges_vocabulary_and_added_tokens_apart() -> None:
    base = tokenizer(MERGES)
    grown = tokenizer(MERGES)
    grown.add_tokens(["new"])
    special = tokenizer(MERGES)
    special.add_special_tokens({"additional_special_tokens": ["new"]})
    fingerprints = {tokenizer_fingerprint(t) for t in (base, tokenizer([("b", "c")]), grown, special)}
    assert len(fingerprints) == 4


def test_tokenizer_fingerprint_ignores_the_role_of_a_special_token() -> None:
    plain, chat = tokenizer(MERGES), tokenizer(MERGES, pad_token="<eos>", chat_template="{{ messages }}")
    assert tokenizer_fingerprint(plain) == tokenizer_fingerprint(chat)


def test_no_tokenizer_has_an_empty_fingerprint() -> None:
    assert tokenizer_fingerprint(None) == ""


def test_revision_follows_content_not_place_or_time(tmp_path: Path) -> None:
    first = save_tiny_model(tmp_path / "first")
    copy = Path(shutil.copytree(first, tmp_path / "copy", copy_function=shutil.copyfile))
    assert directory_revision(first) == directory_revision(copy)
    weights = load_file(copy / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[-1] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert directory_revision(first) != directory_revision(copy)


def test_revision_follows_the_configuration(tmp_path: Path) -> None:
    first = save_tiny_model(tmp_path / "first")
    before = directory_revision(first)
    config = json.loads((first / "config.json").read_text())
    config["rms_norm_eps"] = 1e-2
    (first / "config.json").write_text(json.dumps(config))
    assert directory_revision(first) != before


def test_an_export_loads_with_from_pretrained_bit_for_bit(tmp_path: Path) -> None:
    for architecture in ("qwen3", "gpt2", "mixtral"):
        model = tiny_model(architecture)
        directory = export_model(model, tokenizer(MERGES), tmp_path / architecture)
        loaded = AutoModelForCausalLM.from_pretrained(directory)
        for (name, theirs), ours in zip(
            loaded.state_dict().items(), model.state_dict().values(), strict=True
        ):
            assert torch.equal(theirs, ours), (architecture, name)
        assert load_causal_lm(directory, device="cpu").tokenizer.eos_token == "<eos>"


def test_an_export_of_a_packed_model_names_no_attention_of_ours(tmp_path: Path) -> None:
    loaded = load_causal_lm(save_tiny_model(tmp_path / "model"), device="cpu")
    export_model(loaded.model, None, tmp_path / "again")
    assert "tutelage" not in (tmp_path / "again" / "config.json").read_text()


def test_an_export_writes_the_snapshot_it_is_given(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    snapshot = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    export_model(model, None, tmp_path / "snapshot", state_dict=snapshot)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "snapshot")
    assert torch.equal(loaded.lm_head.weight, snapshot["lm_head.weight"])


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, directory: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export_model(tiny_model(), Broken(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    export_model(tiny_model(), None, tmp_path / "out")
    with pytest.raises(FileExistsError):
        export_model(tiny_model(seed=1), None, tmp_path / "out")


def test_a_checkpoint_with_a_missing_parameter_is_refused(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TutelageError, match="lacks 1 parameters") as refused:
        load_causal_lm(directory, device="cpu")
    assert refused.value.code == "FAILED_PRECONDITION"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float8"}, "dtype: got 'float8', allowed are auto, float32"),
        ({"device": "abacus"}, "device: got 'abacus'"),
        ({"revision": "main"}, "revision: got 'main' for the local directory"),
    ],
)
def test_arguments_that_cannot_be_met_are_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TutelageError, match=message):
        load_causal_lm(save_tiny_model(tmp_path / "model"), **{"device": "cpu", **arguments})


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TutelageError, match="model: could not load"):
        load_causal_lm(tmp_path, device="cpu")


def test_a_model_that_is_not_finite_is_refused_at_start(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(TutelageError, match="FAILED_PRECONDITION"):
        load_causal_lm(tmp_path, device="cpu")


def test_weights_are_replaced_in_place_and_change_the_revision(tmp_path: Path) -> None:
    for architecture in ("qwen3", "gpt2", "qwen3_moe"):  # plain, tied head, fused experts
        loaded = load_causal_lm(save_tiny_model(tmp_path / f"{architecture}-0", architecture), device="cpu")
        other = tiny_model(architecture, seed=1)
        other.save_pretrained(tmp_path / f"{architecture}-1")
        revision = load_weights(loaded.model, tmp_path / f"{architecture}-1")
        assert revision == directory_revision(tmp_path / f"{architecture}-1") != loaded.revision
        for ours, theirs in zip(loaded.model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
        assert loaded.packed


def test_weights_of_another_architecture_change_nothing(tmp_path: Path) -> None:
    loaded = load_causal_lm(save_tiny_model(tmp_path / "model"), device="cpu")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with pytest.raises(TutelageError, match="another architecture"):
        load_weights(loaded.model, save_tiny_model(tmp_path / "other", "mixtral"))
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_models_that_load_in_several_threads_leave_one_another_and_torch_alone(tmp_path: Path) -> None:
    """Transformers changes globals while it loads; a tied head would go missing, and tensors change type."""
    tied = save_tiny_model(tmp_path / "tied", "gpt2")
    expected = load_causal_lm(tied, device="cpu").model.state_dict()

    def load(dtype: str) -> None:
        model = load_causal_lm(tied, dtype=dtype, device="cpu").model
        for _ in range(4):
            load_weights(model, tied)
        state = model.state_dict()
        assert all(
            torch.equal(state[name].float(), t.to(state[name].dtype).float()) for name, t in expected.items()
        )

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(load, ["float32", "bfloat16"]))
    assert torch.get_default_dtype() == torch.float32
    load_causal_lm(tied, device="cpu")
