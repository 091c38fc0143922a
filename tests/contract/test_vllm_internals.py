"""What services/models/vllm_adapter.py rests on inside vLLM: another version that changes it fails here."""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.sequence_bank import BLOCK
from support.tiny_models import SERVABLE, VOCAB, random_ids, save_tiny_model
from support.vllm_engines import SMALL
from tutelage_client import TutelageError
from tutelage_client.types import ScoreRequest, Sequence

from services.models import vllm_adapter
from services.models.vllm_adapter import ROWS_FROM, StepEngine, read_step
from services.models.vllm_settings import VllmSettings
from services.teacher.engines.vllm import plugin, pooler
from services.teacher.engines.vllm.models import scoring_model
from services.teacher.engines.vllm.pooled import Pooled

pytest.importorskip("vllm", reason="vLLM is not installed")

STEP = SMALL["max_num_batched_tokens"]


@pytest.fixture(scope="module")
def registry_before() -> dict[str, Any]:
    from vllm import ModelRegistry

    return dict(ModelRegistry.models)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, registry_before: dict[str, Any]) -> Iterator[StepEngine]:
    directory = save_tiny_model(tmp_path_factory.mktemp("vllm") / "model", shape=SERVABLE)
    started = open_engine(directory)
    yield started
    started.close()


def open_engine(directory: Path, **settings: Any) -> StepEngine:
    return StepEngine(
        str(directory), purpose="score", settings=VllmSettings(**SMALL | settings), make_model=scoring_model
    )


def ask(engine: StepEngine, context: int, response: int, seed: int = 0, name: str = "a") -> Any:
    """The PoolingRequestOutput of one random sequence."""
    random = np.random.default_rng(seed)
    sequence = Sequence("0", 0, random_ids(random, context + response)[context:])
    prompt = random_ids(np.random.default_rng(seed), context + response)[:context]
    asked = ScoreRequest((prompt,), (sequence,))
    question = Pooled().questions(asked, sequence, read_cache=True)[0]
    engine.add(name, question.prompt, question.params)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    (output,) = outputs
    return output


def test_the_engine_runs_inside_this_process(engine: StepEngine) -> None:
    assert not multiprocessing.active_children()
    assert engine._core.scheduler.requests == {}
    assert engine._runner.requests == {}
    pool = engine._core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    residue = engine.residue()
    assert (residue.requests, residue.worker_requests, residue.blocks) == (0, 0, 0)


def test_an_output_has_its_id_its_cached_tokens_and_one_array(engine: StepEngine) -> None:
    output = ask(engine, 5, 3, name="mine")
    assert (output.request_id, output.finished, output.num_cached_tokens) == ("mine", True, 0)
    assert vllm_adapter.as_array(output).shape == (3, 2)


def test_an_aborted_request_holds_nothing(engine: StepEngine) -> None:
    sequence = Sequence("0", 0, np.ones(100, dtype=np.int32))
    asked = ScoreRequest((np.ones(50, dtype=np.int32),), (sequence,))
    question = Pooled().questions(asked, sequence, read_cache=True)[0]
    engine.add("long", question.prompt, question.params)
    assert not [output for output in engine.step() if output.finished]
    assert engine._core.scheduler.requests
    engine.abort(["long", "never was"])
    residue = engine.residue()
    assert (residue.requests, residue.worker_requests, residue.blocks) == (0, 0, 0)


def test_the_registry_is_as_it_was_after_a_scoring_engine_started(
    engine: StepEngine, registry_before: dict[str, Any]
) -> None:
    from vllm import ModelRegistry

    assert dict(ModelRegistry.models) == registry_before
    assert type(engine._runner.get_model()).__module__ == scoring_model.__module__


def test_while_it_starts_every_architecture_scores() -> None:
    from vllm import ModelRegistry

    with vllm_adapter.scoring_models(scoring_model):
        entry = ModelRegistry.models["Qwen3ForCausalLM"]
        info, made = entry.inspect_model_cls(), entry.load_model_cls()
        assert info.is_pooling_model
        assert made.is_pooling_model
        assert made.__name__ == "Qwen3ForCausalLM"
        vllm_adapter.register_scoring_models(scoring_model)
        assert ModelRegistry.models["Qwen3ForCausalLM"] is entry, "wrapped once"


def attributes(function: Callable[..., Any], name: str) -> set[str]:
    """Attributes of the argument `name` that a function reads."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }


def test_the_prefix_lookup_reads_what_the_cap_shows_it() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    lookup = KVCacheManager.get_computed_blocks
    assert list(inspect.signature(lookup).parameters) == ["self", "request"]
    shown = {"num_tokens", "block_hashes", "skip_reading_prefix_cache", "kv_cache_report_mode", "request_id"}
    assert attributes(lookup, "request") <= shown


def test_a_cached_prefix_ends_before_the_first_scored_row(engine: StepEngine) -> None:
    for seed, context in enumerate((1, BLOCK, BLOCK + 1, 3 * BLOCK), start=10):
        assert ask(engine, context, 70, seed).num_cached_tokens == 0
        again = ask(engine, context, 70, seed)
        assert again.num_cached_tokens == (context - 1) // BLOCK * BLOCK
        assert not np.isnan(vllm_adapter.as_array(again)).any()


def test_a_repeated_request_would_lose_rows_without_the_cap(
    engine: StepEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, vLLM has found a better rule and the cap can go."""
    monkeypatch.delattr(engine._core.scheduler.kv_cache_manager, "get_computed_blocks")
    ask(engine, BLOCK, 70, 20)
    assert np.isnan(vllm_adapter.as_array(ask(engine, BLOCK, 70, 20))).any()


def test_extra_arguments_cross_process_borders_whole() -> None:
    from vllm import PoolingParams

    extra = {ROWS_FROM: 3, "response": b"\x00\xff" * 8, "signal": (0, 2, True, 0.5)}
    params = vllm_adapter.pooling_params(extra, read_cache=False)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=PoolingParams)
    assert again.extra_kwargs == {**extra, "signal": [0, 2, True, 0.5]}
    assert again.skip_reading_prefix_cache
    assert params.clone().extra_kwargs == extra


def test_a_step_says_which_positions_of_which_request_it_computed(
    engine: StepEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def recording(metadata: Any) -> Any:
        step = read_step(metadata)
        seen.append([(row.begin, row.scheduled, row.finished, len(row.state)) for row in step or []])
        return step

    monkeypatch.setattr(pooler, "read_step", recording)
    ask(engine, 1, 100, 30)
    # One prompt of 100 tokens in steps of 40; what the pooler put into the state is there in the next step.
    assert seen == [[(0, STEP, False, 0)], [(STEP, STEP, False, 1)], [(2 * STEP, 20, True, 2)]]


def test_a_profiling_run_has_no_extra_arguments() -> None:
    from vllm import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

    params = PoolingParams(task="token_classify")
    metadata = PoolingMetadata(torch.tensor([4]), None, None, [params], [PoolingStates()])
    assert read_step(metadata) is None


def test_the_head_can_stop_before_it_gathers_the_vocabulary(engine: StepEngine) -> None:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    parameters = inspect.signature(LogitsProcessor.forward).parameters
    assert list(parameters)[1] == "lm_head"
    assert "skip_gather" in parameters, "a sharded vocabulary would be gathered on every rank"
    head = engine._runner.get_model().pooler._head
    logits = head.logits(torch.zeros(2, SERVABLE.hidden))
    assert logits.shape == (2, VOCAB)
    assert head.shard is None
    assert head._lm_head.shard_indices.org_vocab_start_index == 0
    assert head._lm_head.shard_indices.org_vocab_end_index == VOCAB


def test_blocks_are_zeroed_before_their_next_owner_reads_them(engine: StepEngine) -> None:
    caches = [cache for cache in engine._runner.kv_caches if isinstance(cache, torch.Tensor)]
    assert caches
    for cache in caches:
        cache.fill_(torch.nan)
    assert engine._engine.reset_prefix_cache()
    assert not np.isnan(vllm_adapter.as_array(ask(engine, 5, 3, 40))).any()
    for cache in caches:
        cache.zero_()


def test_weights_are_replaced_through_the_workers(engine: StepEngine) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    assert list(inspect.signature(finalize_layerwise_reload).parameters) == ["args", "kwargs"]
    assert "weights_path" in inspect.signature(engine._runner.reload_weights).parameters
    assert engine._engine.reset_prefix_cache() is True


def test_another_minor_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_adapter, "_installed_version", lambda: "0.33.1")
    with pytest.raises(TutelageError, match=r"FAILED_PRECONDITION.*0\.33\.1 is installed.*0\.32\.x"):
        vllm_adapter.import_vllm()
    monkeypatch.setattr(vllm_adapter, "_installed_version", lambda: "0.32.9+cpu")
    assert vllm_adapter.import_vllm() == "0.32.9+cpu"


def test_a_missing_vllm_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    with pytest.raises(TutelageError, match="FAILED_PRECONDITION: vllm: not installed"):
        vllm_adapter.import_vllm()


def test_an_engine_core_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(TutelageError, match="VLLM_ENABLE_V1_MULTIPROCESSING"):
        vllm_adapter.import_vllm()


def test_a_list_of_plugins_without_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    with pytest.raises(TutelageError, match="VLLM_PLUGINS: got 'lora_filesystem_resolver'"):
        vllm_adapter.import_vllm()


def test_an_unknown_engine_argument_names_the_nearest(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model", shape=SERVABLE)
    with pytest.raises(TutelageError, match=r"'block_sise'.*did you mean block_size\?"):
        open_engine(directory, engine_args={"block_sise": 32})


@pytest.mark.parametrize(("value", "scores"), [(None, False), ("0", False), ("1", True)])
def test_the_plugin_acts_only_in_workers_of_a_scoring_engine(
    monkeypatch: pytest.MonkeyPatch, value: str | None, scores: bool
) -> None:
    from vllm import ModelRegistry

    before = dict(ModelRegistry.models)
    monkeypatch.delenv(vllm_adapter.SCORING_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(vllm_adapter.SCORING_VARIABLE, value)
    try:
        plugin.register()
        assert (ModelRegistry.models["Qwen3ForCausalLM"] != before["Qwen3ForCausalLM"]) == scores
    finally:
        ModelRegistry.models.clear()
        ModelRegistry.models.update(before)


def test_the_plugin_is_installed_and_light() -> None:
    """vLLM loads it in every process, ours or not."""
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="vllm.general_plugins", name="tutelage")
    assert entry.value == "services.teacher.engines.vllm.plugin:register"
    program = "import sys; import services.teacher.engines.vllm.plugin; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
