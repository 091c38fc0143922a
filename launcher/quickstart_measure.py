"""What a quickstart model can do: accuracy on held-out prompts, and its exact divergence from the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from services.models.generate import Row
from services.models.layout import build_layout
from services.models.load import LoadedModel, load_causal_lm
from services.models.packed import hidden_states
from student_trainer.config import RunConfig
from student_trainer.policy_store import PolicyVersion
from student_trainer.sampler.build import build_sampler
from student_trainer.sampler.evaluation import evaluate
from student_trainer.sampler.groups import GroupSampler


@dataclass(frozen=True, slots=True)
class Measured:
    """Shares in [0, 1] with standard errors; `kl` is KL(model ‖ teacher) in nats per token."""

    greedy: float
    greedy_error: float
    sampled: float
    sampled_error: float
    kl: float


def measure(config: RunConfig, model: Path, teacher: Path) -> Measured:
    """Answer the run's held-out prompts with the evaluation code of its samplers, then compare.

    The divergence is summed over the whole vocabulary at every position of the model's own
    samples at temperature 1; nothing is estimated but the mean over positions.
    """
    torch.set_num_threads(config.threads or 1)
    _, sampler = build_sampler(config, PolicyVersion(0, model, "measured"))
    prompts = config.training.evaluation_prompts
    answer = evaluate(sampler, prompts=prompts, policy_version=0)
    return Measured(
        greedy=answer["greedy"]["accuracy"],
        greedy_error=answer["greedy"]["standard_error"],
        sampled=answer["sampled"]["accuracy"],
        sampled_error=answer["sampled"]["standard_error"],
        kl=divergence(sampler, prompts, load_causal_lm(model), load_causal_lm(teacher)),
    )


@torch.inference_mode()
def divergence(sampler: GroupSampler, prompts: int, model: LoadedModel, teacher: LoadedModel) -> float:
    """Mean over response positions of Σ_v p(v) (log p(v) - log q(v)), p the model and q the teacher."""
    contexts = [prompt.ids for prompt in sampler.encoder.encode(sampler.prompts.held_out(prompts))]
    rows = [Row(context, -1 - index, 0) for index, context in enumerate(contexts)]
    responses = sampler.student.generate(
        rows, seed=sampler.seed, temperature=1.0, max_new_tokens=sampler.sampling.max_new_tokens
    )
    layout = build_layout(contexts, [(index, response.ids) for index, response in enumerate(responses)])
    log_p, log_q = (
        torch.log_softmax(
            loaded.head.logits(hidden_states(loaded.model, layout)[layout.score_rows]).double(), -1
        )
        for loaded in (model, teacher)
    )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
