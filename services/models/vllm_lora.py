"""LoRA adapters in vLLM: how an engine is made for them, and the proof that each is applied whole.

Like vllm_adapter, this touches vLLM's internals; tests/contract/test_vllm_internals.py holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage_client.errors import TutelageError, invalid

from services.models.adapters import Adapter

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


def lora_arguments(adapters: Sequence[Adapter], given: dict[str, Any], *, on_cpu: bool) -> dict[str, Any]:
    """Engine arguments that give every adapter room, on the modules that they change and no others.

    On a CPU one slot more than there are adapters: tokens of the base have slot −1 there, which torch
    reads as the last one, so that a full house would score the base with its last adapter. The spare
    slot stays zero. On a GPU `max_loras` may be smaller than the number of adapters: then those that
    take part in a step are swapped in from the CPU's memory.

    Args:
        given: engine arguments that the settings say, of which `max_loras` is looked at.

    Raises:
        TutelageError: INVALID_ARGUMENT naming what is too large.
    """
    if not adapters:
        return {}
    for adapter in adapters:
        if adapter.rank > RANKS[-1]:
            raise invalid(f"adapters.{adapter.name}: got rank {adapter.rank}, allowed are 1 to {RANKS[-1]}")
        experts = [module for module in adapter.modules if ".experts." in module]
        if experts:
            raise invalid(
                f"adapters.{adapter.name}: got a change of {experts[0]!r}; adapters of experts are not "
                "served by vLLM here, the engine 'transformers' may"
            )
    slots = given.get("max_loras", len(adapters))
    if on_cpu and slots < len(adapters):
        raise invalid(
            f"max_loras: got {slots} for {len(adapters)} adapters; on a CPU every adapter needs a slot"
        )
    slots = min(slots, len(adapters)) + on_cpu
    return {
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": max(slots, len(adapters)),
        "max_lora_rank": next(rank for rank in RANKS if rank >= max(one.rank for one in adapters)),
        "lora_target_modules": sorted(set().union(*(adapter.targets for adapter in adapters))),
    }


def load_adapters(engine: Any, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Load every adapter into the LLMEngine; by name what its requests carry.

    vLLM's prefix cache keys a block to name and path of its request's adapter, so that nothing is
    shared between adapters or with the base.

    Raises:
        TutelageError: FAILED_PRECONDITION when an adapter does not fit, or not all of it would be applied.
    """
    from vllm.lora.request import LoRARequest

    requests = {}
    for number, adapter in enumerate(adapters, start=1):
        requests[adapter.name] = LoRARequest(adapter.name, number, str(adapter.directory.absolute()))
        try:
            engine.add_lora(requests[adapter.name])
        except Exception as error:
            raise _unfit(adapter, f"{type(error).__name__}: {error}") from error
        for problem in engine.collective_rpc(_first_problem, args=(number, len(adapter.modules))):
            if problem is not None:
                raise _unfit(adapter, problem)
    return requests


def _unfit(adapter: Adapter, reason: str) -> TutelageError:
    return TutelageError(
        "FAILED_PRECONDITION",
        f"adapters.{adapter.name}: vLLM cannot serve {adapter.directory} on this model: {reason}",
    )


def _first_problem(worker: Any, number: int, modules: int) -> str | None:
    """In a worker: what of adapter `number` is not applied, or not with the shape of its layer.

    vLLM itself leaves out what it finds no layer for, and copies a smaller matrix into a corner.
    """
    manager = worker.model_runner.lora_manager._adapter_manager
    applied = 0
    for name, weights in manager.get_adapter(number).loras.items():
        layer = manager.modules.get(name)
        if layer is None:
            return f"the model has no layer {name} that takes an adapter"
        pairs, slices = _pairs(weights), _slices(layer)
        if len(pairs) == 1:  # one matrix for all parts of a fused layer
            slices = [(sum(out for out, _ in slices), slices[0][1])]
        if len(pairs) != len(slices):
            return f"{name} has {len(slices)} parts, the adapter's has {len(pairs)}"
        for pair, (out_here, into_here) in zip(pairs, slices, strict=True):
            if pair is None:  # a part of a fused layer that the adapter leaves alone
                continue
            applied += 1
            into, out = pair[0].shape[1], pair[1].shape[0]
            if not (_fits(out, out_here, layer.tp_size) and _fits(into, into_here, layer.tp_size)):
                here = f"{into_here} to {out_here}" + (" on a rank" if layer.tp_size > 1 else "")
                return f"{name} is a layer of {here}, the adapter's is of {into} to {out}"
    return None if applied == modules else f"{applied} of its {modules} modules are applied"


def _pairs(weights: Any) -> list[tuple[Any, Any] | None]:
    """A [r, in] and B [out, r] of every part of a layer; None for a part without."""
    if not isinstance(weights.lora_a, list):
        return [(weights.lora_a, weights.lora_b)]
    return [None if a is None else (a, b) for a, b in zip(weights.lora_a, weights.lora_b, strict=True)]


def _slices(layer: Any) -> list[tuple[int, int]]:
    """Out and in of every part of a layer on this rank."""
    return [
        (b.shape[-2], a.shape[-1]) for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
    ]


def _fits(whole: int, here: int, ranks: int) -> bool:
    """Whether `here` may be this rank's part of `whole`."""
    return whole % here == 0 and whole // here <= ranks
