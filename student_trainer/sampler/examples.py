"""From a run file and a tokenizer to what is known of an example: prompt, contexts, tag and factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from student_trainer.config import RunConfig
from student_trainer.objective.plan import Plan
from student_trainer.sampler.contexts import ContextBuilder
from student_trainer.sampler.data import PromptSource, load_prompts
from student_trainer.sampler.labels import ExampleLabels
from student_trainer.sampler.prompts import PromptEncoder


@dataclass(frozen=True, slots=True)
class Examples:
    """The run's examples by group index, and everything that is read from them."""

    prompts: PromptSource
    encoder: PromptEncoder
    contexts: ContextBuilder
    labels: ExampleLabels


def load_examples(config: RunConfig, plan: Plan, tokenizer: Any) -> Examples:
    """The examples of a run, as its samplers see them; raises TutelageError for data that will not do."""
    encoder = PromptEncoder(tokenizer, config.data)
    prompts = load_prompts(
        config.data,
        seed=config.run.seed,
        prompt_tokens=lambda examples: [len(prompt.ids) for prompt in encoder.encode(examples)],
    )
    contexts = ContextBuilder(
        plan,
        prompts,
        encoder,
        seed=config.run.seed,
        prompts_per_step=config.training.prompts_per_step,
        guide=config.sampling.context,
    )
    return Examples(prompts, encoder, contexts, ExampleLabels(plan, prompts, config.data.tag_field))
