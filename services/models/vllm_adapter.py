"""vLLM in this process: everything of ours that touches its internals is here and in vllm_lora.

What is used beyond its documented interface, and would have to be looked at for another minor
version: `LLMEngine` without its engine-core process, the model registry's entries,
`KVCacheManager.get_computed_blocks`, the zeroing of new blocks, `PoolingParams.extra_kwargs`,
`PoolingMetadata`, `LogitsProcessor(skip_gather=…)`, `OutputProcessor.parent_requests`, and
`finalize_layerwise_reload`.
tests/contract/test_vllm_internals.py holds each of them.

Nothing here imports vllm before it is needed: the environment that vLLM reads is set first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gc
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor, nn
from tutelage_client.errors import TutelageError, invalid

from services.models.adapters import Adapter
from services.models.vllm_lora import load_adapters, lora_arguments
from services.models.vllm_settings import VllmSettings

SUPPORTED = (0, 32)  # the minor version whose internals were read
SCORING_VARIABLE = "TUTELAGE_VLLM_SCORING"  # set while a scoring engine starts its worker processes
ROWS_FROM = "rows_from"  # key in extra_kwargs: the first prompt position whose hidden state is needed
CPU_KV_CACHE_BYTES = 1 << 30
MAX_LOGPROBS = 256  # largest K of the stock implementation; vLLM's own default is 20

Purpose = Literal["score", "prompt_logprobs", "generate"]
MakeModel = Callable[[type[nn.Module]], type[nn.Module]]

log = structlog.get_logger(__name__)

_OTHER_WAYS = {
    "score": "; implementation 'stock' or the engine 'transformers' may",
    "prompt_logprobs": "; the engine 'transformers' may",
    "generate": "; the engine 'transformers' may",
}

# In this process and stepped by one thread of ours: no socket between a request and its scores,
# and a killed replica leaves no orphan that holds a GPU. Workers are spawned because forking a
# process with gRPC threads can deadlock.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class EngineFacts:
    """What vLLM decided about the model."""

    version: str
    max_model_len: int
    vocab_size: int
    dtype: str
    head_dtype: str
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    device: str
    max_logprobs: int
    scores_given_ids: bool  # the runner knows prompt_logprob_token_ids


@dataclass(frozen=True)
class Residue:
    """What is still held for requests; all zero when nothing is under way."""

    requests: int
    worker_requests: int
    blocks: int


class StepEngine:
    """One vLLM engine that its owner steps; only one thread at a time may call it.

    Args:
        purpose: "score" serves the model with `make_model` over its class, as a pooling model;
            "prompt_logprobs" and "generate" serve it as vLLM does.
        head_dtype: type of the logits, "float32" or "model".
        make_model: from a model's class to the class that scores; needed to score.
        adapters: that requests may name; each is loaded now, and has to be applied whole.
        seeded: requests bring seeds of their own. On a CPU vLLM fails at one whose prompt it has cut (it
            takes a draw back, as only a GPU's generator can), so that no prompt is cut there.

    Raises:
        TutelageError: what the caller can mend, naming the setting.
    """

    def __init__(
        self,
        model: str,
        *,
        purpose: Purpose,
        settings: VllmSettings,
        dtype: str = "auto",
        revision: str | None = None,
        head_dtype: str = "float32",
        make_model: MakeModel | None = None,
        adapters: Sequence[Adapter] = (),
        seeded: bool = False,
    ) -> None:
        version = import_vllm()
        arguments = {
            "model": model,
            "revision": revision,
            "tokenizer_revision": revision,
            "dtype": _dtype_to_load(model, revision) if dtype == "auto" else dtype,
            **_purpose_arguments(purpose),
            **_platform_defaults(settings, seeded=seeded),
            **_given_arguments(settings, {"head_dtype": head_dtype}),
            **lora_arguments(adapters, settings.given(), on_cpu=_on_cpu()),
        }
        scoring = contextlib.nullcontext() if make_model is None else scoring_models(make_model)
        try:
            with scoring:
                self._engine = _start(arguments)
        except (ValueError, AssertionError, NotImplementedError) as error:
            if "free memory" in str(error).lower():  # of a replica that has just ended, perhaps: try again
                raise TutelageError("INTERNAL", f"vllm: could not start: {error}") from error
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise invalid(f"vllm: could not serve {model!r}: {reason}{_OTHER_WAYS[purpose]}") from error
        self._core: Any = self._engine.engine_core.engine_core
        if purpose == "score":
            _cap_prefix_hits(self._core.scheduler.kv_cache_manager)
            self._empty_new_blocks()
        self.facts = self._facts(version)
        self._adapters = self._load_adapters(adapters)
        # What start-up made is here to stay; walking through it would pause every request for long.
        gc.collect()
        gc.freeze()

    def add(self, request_id: str, prompt_ids: list[int], params: Any, adapter: str | None = None) -> None:
        """Queue a request; its outputs carry `request_id`, which no other request may have.

        Args:
            adapter: name of the adapter that the model has for this request; None is the base alone.
        """
        lora = None if adapter is None else self._adapters[adapter]
        prompt = {"type": "token", "prompt_token_ids": prompt_ids}
        self._engine.add_request(request_id, prompt, params, lora_request=lora)

    def step(self) -> list[Any]:
        """One forward pass; the RequestOutput or PoolingRequestOutput of requests that advanced."""
        outputs: list[Any] = self._engine.step()
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: also after the last request, to let the workers forget it."""
        return bool(self._core.scheduler.has_requests())

    def abort(self, request_ids: Sequence[str]) -> None:
        """Withdraw requests, wherever they are; those that have ended are ignored."""
        self._engine.abort_request(list(request_ids))
        withdrawn = set(request_ids)
        # Of a request for several continuations vLLM keeps what joins them, for ever.
        for key, parent in list(self._parents.items()):
            if parent.external_req_id in withdrawn:
                del self._parents[key]

    def load_weights(self, path: Path) -> None:
        """Replace the weights and forget every cached prefix; nothing may be under way.

        After an error the weights are a mixture; another call may succeed.
        """
        if self._engine.has_unfinished_requests():
            raise TutelageError(
                "INTERNAL", "vllm: weights can only be replaced while no request is under way"
            )
        self.settle()
        try:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        except Exception:
            self._engine.collective_rpc(_end_failed_reload)
            raise
        if not self._engine.reset_prefix_cache():
            raise TutelageError("INTERNAL", "vllm: the prefix cache could not be cleared after new weights")

    def settle(self) -> None:
        """Let the workers forget requests that ended."""
        while self.has_work and not self._engine.has_unfinished_requests():
            self.step()

    @property
    def _parents(self) -> dict[str, Any]:
        """What joins the outputs of requests for several continuations, by vLLM's own ids."""
        found: dict[str, Any] = self._engine.output_processor.parent_requests
        return found

    def residue(self) -> Residue:
        """What requests still hold, cached prefixes aside."""
        self.settle()
        pool = self._core.scheduler.kv_cache_manager.block_pool
        runner = self._runner
        return Residue(
            requests=self._engine.get_num_unfinished_requests()
            + len(self._core.scheduler.requests)
            + len(self._parents),
            worker_requests=len(runner.requests) if hasattr(runner, "requests") else 0,
            blocks=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),  # one block is vLLM's own null block
        )

    def close(self) -> None:
        """End the workers and release the memory."""
        gc.unfreeze()
        self._engine.engine_core.shutdown()
        _leave_distributed()

    def _load_adapters(self, adapters: Sequence[Adapter]) -> dict[str, Any]:
        try:
            return load_adapters(self._engine, adapters)
        except TutelageError:
            self.close()
            raise

    def _empty_new_blocks(self) -> None:
        """On a CPU, have every block of the KV cache zeroed before another sequence uses it.

        Attention there multiplies what lies behind a sequence's end in its last block by zero, and
        a NaN that an earlier sequence left would stay NaN. vLLM can do it, for models that always need it.
        """
        if self._engine.vllm_config.device_config.device_type != "cpu":
            return
        scheduler = self._core.scheduler
        scheduler.needs_kv_cache_zeroing = True
        for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
            manager._record_new_block_ids = True
        self._engine.collective_rpc(_zero_every_layer)

    @property
    def _runner(self) -> Any:
        """The model runner of rank 0, when it lives in this process."""
        worker = getattr(self._core.model_executor, "driver_worker", None)
        return getattr(getattr(worker, "worker", worker), "model_runner", None)

    def _facts(self, version: str) -> EngineFacts:
        config = self._engine.vllm_config
        model, scheduler = config.model_config, config.scheduler_config
        return EngineFacts(
            version=version,
            max_model_len=model.max_model_len,
            vocab_size=model.get_vocab_size(),
            dtype=_dtype_name(model.dtype),
            head_dtype=_dtype_name(model.head_dtype),
            block_size=config.cache_config.block_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            device=config.device_config.device_type,
            max_logprobs=model.max_logprobs,
            scores_given_ids=config.use_v2_model_runner,
        )


def import_vllm() -> str:
    """Import vLLM with the environment it needs; its version.

    Raises:
        TutelageError: FAILED_PRECONDITION when it is missing or of another minor version.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "tutelage" not in plugins.split(","):
        raise invalid(
            f"VLLM_PLUGINS: got {plugins!r}, must name tutelage too: vLLM's workers score through it"
        )
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise invalid("VLLM_ENABLE_V1_MULTIPROCESSING: must be 0, the engine runs inside this process")
    version = _installed_version()
    if tuple(int(part) for part in version.split(".")[:2]) != SUPPORTED:
        wanted = ".".join(map(str, SUPPORTED))
        raise TutelageError(
            "FAILED_PRECONDITION", f"vllm: version {version} is installed, this release works with {wanted}.x"
        )
    import vllm  # noqa: F401

    return version


def _installed_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    raise TutelageError(
        "FAILED_PRECONDITION", "vllm: not installed; pip install 'tutelage[vllm]', or choose another engine"
    )


def _purpose_arguments(purpose: Purpose) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "runner": "pooling" if purpose == "score" else "generate",
        "skip_tokenizer_init": True,  # ids come in and ids go out
        "enable_prefix_caching": True,
    }
    if purpose == "generate":
        arguments["logprobs_mode"] = "processed_logprobs"  # those of the distribution that is sampled
    if purpose == "prompt_logprobs":
        arguments["max_logprobs"] = MAX_LOGPROBS + 1  # candidates come with the response's own token
    return arguments


def _given_arguments(settings: VllmSettings, hf_overrides: dict[str, Any]) -> dict[str, Any]:
    given = settings.given()
    for name in given:
        _check_argument(name)
    return {**given, "hf_overrides": hf_overrides | given.get("hf_overrides", {})}


def _platform_defaults(settings: VllmSettings, *, seeded: bool) -> dict[str, Any]:
    """On a CPU: no compiler, a bounded cache instead of most of the memory, small blocks to share."""
    if not _on_cpu():
        return {}
    defaults: dict[str, Any] = {"block_size": 32, "enforce_eager": True}
    if settings.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        defaults["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    if seeded:
        defaults["enable_chunked_prefill"] = False
    return defaults


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _check_argument(name: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in dataclasses.fields(EngineArgs)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise invalid(f"vllm.engine_args: got {name!r}, which is no engine argument of vLLM{hint}")


def _dtype_to_load(model: str, revision: str | None) -> str:
    """As the model was saved; vLLM's own "auto" would load float32 weights as bfloat16."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise invalid(f"model: could not load {model!r}: {error}") from error
    saved = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return "auto" if saved is None else _dtype_name(saved)


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _start(arguments: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    set_num_threads = torch.set_num_threads
    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments))
    finally:
        torch.set_num_threads = set_num_threads  # vLLM disables it on a CPU, for everybody in the process


def _end_failed_reload(worker: Any) -> None:
    """In a worker: take the model out of the middle of a reload, where another one could not begin."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    runner = worker.model_runner
    finalize_layerwise_reload(runner.get_model(), runner.model_config)


def _leave_distributed() -> None:
    """Give up the process groups, so that another engine can start in this process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


# Models: the registry's entries, wrapped.


@contextlib.contextmanager
def scoring_models(make_model: MakeModel) -> Iterator[None]:
    """While a scoring engine starts, every architecture of the registry is one that scores.

    Names stay as they are, because vLLM keys much of its behaviour to the architecture's name.
    Worker processes inherit the variable and do the same through our plugin.
    """
    from vllm import ModelRegistry

    originals = dict(ModelRegistry.models)
    os.environ[SCORING_VARIABLE] = "1"
    try:
        register_scoring_models(make_model)
        yield
    finally:
        del os.environ[SCORING_VARIABLE]
        ModelRegistry.models.clear()
        ModelRegistry.models.update(originals)


def register_scoring_models(make_model: MakeModel) -> None:
    """Let every architecture that vLLM knows resolve to `make_model` of its class, made on demand."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _BaseRegisteredModel, _ModelInfo

    @dataclass(frozen=True)
    class ScoringEntry(_BaseRegisteredModel):  # type: ignore[misc]
        original: Any

        def inspect_model_cls(self) -> Any:
            return _ModelInfo.from_model_cls(self.load_model_cls())

        def load_model_cls(self) -> type[nn.Module]:
            return make_model(self.original.load_model_cls())

    for architecture, original in list(ModelRegistry.models.items()):
        if type(original).__name__ != "ScoringEntry":
            ModelRegistry.models[architecture] = ScoringEntry(original)


# The prefix cache: a hit must not swallow rows that are to be scored.


def _cap_prefix_hits(manager: Any) -> None:
    """Bound the cached prefix of a request by its first scored row.

    vLLM may take all but the last prompt token from the cache, which has keys and values but no
    hidden states. The lookup itself is left to vLLM: it is shown a request that ends one token
    after the first scored row.
    """
    lookup = manager.get_computed_blocks

    def capped(request: Any) -> Any:
        extra = request.pooling_params.extra_kwargs if request.pooling_params is not None else None
        if extra is None or ROWS_FROM not in extra:
            return lookup(request)
        shortened = SimpleNamespace(
            num_tokens=extra[ROWS_FROM] + 1,
            block_hashes=request.block_hashes,
            skip_reading_prefix_cache=request.skip_reading_prefix_cache,
            kv_cache_report_mode=getattr(request, "kv_cache_report_mode", "incremental"),
        )
        return lookup(shortened)

    manager.get_computed_blocks = capped


# Inside the workers: the KV cache, what the pooler is given, and the head.


def _zero_every_layer(worker: Any) -> None:
    """Let the CPU's model runner zero blocks of all attention layers; its own method knows full attention."""
    runner = worker.model_runner

    def zero(block_ids: list[int]) -> None:
        chosen = torch.tensor(block_ids)
        caches = [cache for cache in runner.kv_caches if isinstance(cache, Tensor)]
        for cache in {cache.data_ptr(): cache for cache in caches}.values():
            cache.index_fill_(0, chosen, 0)

    runner._zero_block_ids = zero


@dataclass(frozen=True)
class StepRow:
    """One request of a forward pass: `scheduled` prompt positions from `begin` on were computed."""

    begin: int
    scheduled: int
    finished: bool
    extra: dict[str, Any]
    state: list[Any]  # ours to fill; vLLM empties it when the request ends


def read_step(metadata: Any) -> list[StepRow] | None:
    """The requests of a pooling step in the order of their hidden states; None for a profiling run."""
    if any(params.extra_kwargs is None for params in metadata.pooling_params):
        return None
    cursor = metadata.get_pooling_cursor()
    scheduled = cursor.num_scheduled_tokens_cpu.tolist()
    lengths = cursor.seq_lens_cpu.tolist()
    return [
        StepRow(length - count, count, finished, params.extra_kwargs, state.hidden_states_cache)
        for length, count, finished, params, state in zip(
            lengths,
            scheduled,
            cursor.finished_mask,
            metadata.pooling_params,
            metadata.pooling_states,
            strict=True,
        )
    ]


def pooling_params(extra: dict[str, Any], *, read_cache: bool) -> Any:
    """Parameters that carry `extra` to the pooler."""
    from vllm import PoolingParams

    return PoolingParams(
        task="token_classify",
        skip_reading_prefix_cache=not read_cache,
        use_activation=False,
        extra_kwargs=extra,
    )


class SlicedHead:
    """The model's own head, stopped before it gathers the vocabulary from the tensor-parallel ranks.

    Scaling, capping and the head's type stay the model's. Shapes: N rows, H hidden, S the words of this rank.
    """

    def __init__(self, model: nn.Module) -> None:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        if len(processors) != 1 or processors[0].logits_as_input or not hasattr(model, "compute_logits"):
            raise ValueError(f"{type(model).__name__} has no single language-model head that vLLM computes")
        self._compute: Callable[[Tensor], Tensor] = model.compute_logits  # type: ignore[assignment]
        self._lm_head: Any = None
        self.vocab_size = int(processors[0].org_vocab_size)  # of all ranks
        self._first: Tensor | None = None  # the head's own answer to the first call
        self._checked = False
        processors[0].register_forward_pre_hook(self._stop_before_gathering, with_kwargs=True)
        processors[0].register_forward_hook(self._keep_first)

    def _stop_before_gathering(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._lm_head = args[0]
        return args, {**kwargs, "skip_gather": True}

    def _keep_first(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        if not self._checked:
            self._first = output.clone()

    def _check(self, logits: Tensor) -> None:
        """Some models change logits of certain ids afterwards, which on a slice would be other ids."""
        edited = self._first is None or not torch.equal(logits, self._first)
        self._checked, self._first = True, None
        if edited and self._lm_head.tp_size > 1:
            raise ValueError(
                "tensor_parallel_size: this model changes its logits after the head, which cannot be done on "
                "slices of the vocabulary; use 1, or implementation 'stock'"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, S] from [N, H], without the padding of the vocabulary."""
        logits = self._compute(hidden)
        if not self._checked:
            self._check(logits)
        indices = self._lm_head.shard_indices
        return logits[:, : indices.org_vocab_end_index - indices.org_vocab_start_index]

    @property
    def shard(self) -> TensorParallelShard | None:
        """Where this rank's words begin and how ranks reduce; None when all words are here."""
        if self._lm_head.tp_size == 1:
            return None
        return TensorParallelShard(int(self._lm_head.shard_indices.org_vocab_start_index))


@dataclass(frozen=True)
class TensorParallelShard:
    """A vocabulary split over vLLM's tensor-parallel ranks: scoring_head.VocabShard."""

    start: int

    def reduce_max(self, x: Tensor) -> Tensor:
        return self._reduce(x, "MAX")

    def reduce_sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, "SUM")

    def gather_last(self, x: Tensor) -> Tensor:
        from vllm.distributed import get_tp_group

        gathered: Tensor = get_tp_group().all_gather(x.contiguous(), dim=-1)
        return gathered

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        import torch.distributed
        from vllm.distributed import get_tp_group

        x = x.contiguous()
        operation = getattr(torch.distributed.ReduceOp, how)
        torch.distributed.all_reduce(x, op=operation, group=get_tp_group().device_group)
        return x


def as_array(output: Any) -> npt.NDArray[np.float32]:
    """The pooler's answer to one request, from its PoolingRequestOutput.

    A copy: on a CPU the original is a part of what the whole step computed, and would keep all of it alive.
    """
    array: npt.NDArray[np.float32] = output.outputs.data.numpy().copy()
    return array
