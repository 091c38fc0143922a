"""The proof that trainer and sampler mean the same positions: they must agree on the same weights."""

from __future__ import annotations

import math

import torch
from tutelage_client.errors import TutelageError

from student_trainer.step_result import StepResult

# Nats, mean over tokens. Rounding gives 1e-5 in float32 and some 1e-2 in bfloat16; an off-by-one about 10.
MAX_MEAN_DIFFERENCE = 0.5


def check_alignment(result: StepResult, version: int) -> float | None:
    """Compare log p(y) of sampler and trainer where both had policy version `version`.

    Args:
        result: of a step with traces, begun at weights `version`, of a plan whose
            `behaviour_comparable` holds: both sides at one temperature.

    Returns:
        The mean absolute difference in nats; None where nothing can be compared.

    Raises:
        TutelageError: INTERNAL when they disagree by more than rounding can explain.
    """
    differences: list[torch.Tensor] = []
    first = slice(result.unmoved)  # later updates of the step meet weights that have moved
    for micro_batch, traces in zip(result.micro_batches[first], result.per_token[first], strict=True):
        student = traces["student_logprob"].cpu()
        behaviour = micro_batch.tokens.behaviour_logprobs
        same = torch.cat(
            [
                torch.full(
                    (member.rollout.length,),
                    member.group.policy_version == version
                    and member.group.distance == 0
                    and member.group.sampled_as_trained(member.rollout),
                )
                for member in micro_batch.members
            ]
        )
        both = same & torch.isfinite(student) & torch.isfinite(behaviour)
        differences.append((student - behaviour)[both].abs())
    everything = torch.cat(differences)
    if not len(everything):
        return None
    mean = float(everything.mean())
    if not math.isfinite(mean) or mean > MAX_MEAN_DIFFERENCE:
        raise TutelageError(
            "INTERNAL",
            f"trainer and sampler disagree on the log-probabilities of policy version {version} by "
            f"{mean:.3g} nats per token (at most {MAX_MEAN_DIFFERENCE} are rounding): positions are "
            "misaligned, or the sampler had other weights",
        )
    return mean
