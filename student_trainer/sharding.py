"""A student spread over the ranks of a run with FSDP2: each weight, gradient and moment lives on one.

Each block of the model is gathered for its own forward and backward pass. Embedding, last norm and
head belong to the root, and the root is the whole pass from tokens to loss: so the head is whole
when the loss, which makes its gradients in the forward pass, reads it, and that gradient leaves the
root's backward pass summed over the ranks like every other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tutelage_client.errors import TutelageError, invalid

from services.models.packed import is_packed, packed_positions, unwrap
from student_trainer.objective.compile import Plan
from student_trainer.ranks import Ranks


def shard(root: nn.Module, model: Any, dtype: torch.dtype, ranks: Ranks) -> None:
    """Spread `root`, which calls `model`, over the ranks: parameters become DTensors. ALONE: nothing.

    Trained weights stay as they are. Blocks compute with a copy in `dtype`; the root's weights are
    gathered as they are, because the head multiplies in float32. Gradients are *summed* in float32:
    the weights of the loss carry the normaliser of the whole step.

    Raises:
        TutelageError: FAILED_PRECONDITION for a model whose forward passes the ranks cannot make in step.
    """
    if ranks.alone:
        return
    assert ranks.device is not None
    inner = unwrap(model)
    if not is_packed(inner):
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"student.model: {type(inner).__name__} has no packed attention, so its number of forward passes "
            "differs from rank to rank; train it with one process",
        )
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise TutelageError(
            "FAILED_PRECONDITION", f"torch {torch.__version__} is too old for several ranks; 2.13 is not"
        )
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    computed = None if dtype == torch.float32 else dtype
    for block in _blocks(inner):
        policy = MixedPrecisionPolicy(computed, torch.float32, cast_forward_inputs=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            # An expert that no token of one rank chose still has a gradient on the others.
            module.set_reduce_scatter_unused_params(True)


def check_objective(plan: Plan, world: int) -> None:
    """Refuse an objective whose step would depend on how micro-batches are dealt to `world` ranks."""
    if world > 1 and plan.tokens.top_fraction is not None:
        raise invalid(
            f"objective.tokens.top_fraction: got {plan.tokens.top_fraction} with {world} ranks; it chooses "
            "among the positions of a micro-batch, and those depend on the number of ranks: leave it out, or "
            "train with one process"
        )


def check_positions(model: Any, max_position: int) -> None:
    """Refuse a micro-batch that would not be one forward pass (see `packed_positions`)."""
    limit = packed_positions(unwrap(model).config)
    if max_position >= limit:
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"a sequence reaches position {max_position}; several ranks train this model's sequences up to "
            f"position {limit:.0f} only, where its rotary scaling does not depend on the batch",
        )


def _blocks(model: Any) -> list[nn.Module]:
    """The outermost modules that the architecture says must stay in one piece: its layers."""
    names = set(model._no_split_modules or ())
    found: list[nn.Module] = []
    taken: set[nn.Module] = set()
    for module in model.modules():
        if type(module).__name__ in names and module not in taken:
            found.append(module)
            taken.update(module.modules())
    return found
