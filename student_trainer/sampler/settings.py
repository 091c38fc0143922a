"""The [data] and [sampling] sections of a run file.

Imports neither torch nor transformers: the command line reads run files too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.models.vllm_settings import TEMPERATURES, VllmSettings
from student_trainer.objective.view_settings import ROLLOUT_FIELDS, ContextTemplate

# Who sampled a group, beside the names of other models.
STUDENT = "student"
GUIDED = "student@context"  # some of its responses or all of them under [sampling] context


class DataSettings(BaseModel):
    """Where prompts come from, how they become token ids, and how answers are checked.

    Exactly one of `task`, `path` and `dataset` names the source. Without `answer_field` a
    file or a data set has no verifiable reward.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["addition"] | None = Field(default=None, description="a built-in task with its own checker")
    path: Path | None = Field(default=None, description="a .jsonl or .parquet file")
    dataset: str | None = Field(
        default=None, description="a Hugging Face data set: hub id or local directory"
    )
    subset: str | None = Field(default=None, description="configuration name of the Hugging Face data set")
    split: str = Field(default="train", description="split of the Hugging Face data set")
    prompt_field: str = Field(
        default="prompt", description="field that holds the prompt text, or a list of chat messages"
    )
    answer_field: str | None = Field(default=None, description="field that holds the expected answer")
    tag_field: str | None = Field(
        default=None,
        description="field that holds the example's tag, by which a view's route chooses a teacher",
    )
    checker: Literal["exact", "numeric", "boxed"] = Field(
        default="exact",
        description="how a response is compared with the answer: the whole text, the last number, "
        "or the content of the last \\boxed{}",
    )
    written_by: str | None = Field(
        default=None,
        description="model (name or revision) that wrote what the student was trained on before; a preset "
        "that replays responses warns when another one scores them",
    )
    chat_template: Literal["auto", "always", "never"] = Field(
        default="auto", description="wrap prompts in the tokenizer's chat template; auto: when it has one"
    )
    chat_template_arguments: dict[str, Any] = Field(
        default_factory=dict, description='extra arguments of the template, e.g. {"enable_thinking": false}'
    )
    system_prompt: str | None = Field(default=None, description="system message put before every prompt")
    max_prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="leave out longer prompts (files and data sets; counted once at start-up)",
    )
    holdout: float = Field(
        default=0.05,
        ge=0.0,
        lt=1.0,
        description="share of a file's or data set's prompts kept for evaluation",
    )
    shuffle: bool = Field(default=True, description="a new seeded order every epoch; otherwise file order")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("task", "path", "dataset") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"data: got {given or 'no source'}; give exactly one of task, path, dataset")
        if self.path is not None and self.path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"data.path: got {str(self.path)!r}, must end in .jsonl or .parquet")
        if self.system_prompt is not None and (self.chat_template == "never" or self.task is not None):
            raise ValueError("data.system_prompt: needs a chat template; the prompt is used as plain text")
        return self


class SamplingSettings(BaseModel):
    """How responses are sampled."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples_per_prompt: int = Field(
        default=1, ge=1, description="responses sampled per prompt (the group's size)"
    )
    temperature: float = Field(default=1.0, gt=0.0, le=10.0, description="sampling temperature")
    max_new_tokens: int = Field(default=512, ge=1, description="token limit of a response")
    batch_size: int = Field(
        default=128,
        ge=1,
        description="responses generated at once; vLLM on a GPU is faster with all of an order "
        "(groups_per_order times samples_per_prompt), of which it computes max_num_seqs at a time",
    )
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description='what computes while sampling: "vllm" is faster, and computes on what it was built for '
        "(CUDA_VISIBLE_DEVICES says which GPUs it sees)",
    )
    vllm: VllmSettings = Field(
        default_factory=VllmSettings,
        description="how vLLM samples; for each of two engines where another model samples",
    )
    sampler: str = Field(
        default="student",
        description='who samples: "student", "teacher:NAME" of this run file, a model path or hub id, or '
        '"file:PATH": nobody, the responses of that score file are replayed',
    )
    student_fraction: float | None = Field(
        default=None,
        ge=0.0,
        lt=1.0,
        description="share of groups that the student samples itself when another model samples (GKD's λ)",
    )
    context: ContextTemplate | None = Field(
        default=None,
        description="guided sampling: the student samples under this context, and is trained on its prompt",
    )
    guided_samples: int | None = Field(
        default=None,
        ge=1,
        description="with a context: of every group's responses the first so many are sampled under it, the "
        "others under the student's own prompt; default: all",
    )
    groups_per_order: int = Field(
        default=32, ge=1, description="groups that one rollout process takes at a time"
    )
    replicas: int = Field(default=1, ge=1, description="rollout processes that `tutelage up` starts")

    @model_validator(mode="after")
    def _fraction_needs_another_sampler(self) -> Self:
        if self.sampler == "student" and self.student_fraction is not None:
            raise ValueError(
                f'sampling.student_fraction: got {self.student_fraction} with sampler = "student"; '
                "name the other model in sampling.sampler, or leave student_fraction out"
            )
        return self

    @model_validator(mode="after")
    def _context_is_known_before(self) -> Self:
        if self.context is not None and self.student_share == 0.0:
            raise ValueError(
                f'sampling.context: is set with sampler = "{self.sampler}", and the student samples nothing; '
                "give student_fraction above 0, or leave the context out"
            )
        later = sorted(self.context.fields & ROLLOUT_FIELDS) if self.context is not None else []
        if later:
            raise ValueError(
                f"sampling.context: got field {later[0]!r}, which there is only once responses are sampled; "
                "allowed: prompt, answer, other_prompt and fields of the example"
            )
        return self

    @model_validator(mode="after")
    def _guides_some(self) -> Self:
        if self.guided_samples is None:
            return self
        if self.context is None:
            raise ValueError(
                f"sampling.guided_samples: got {self.guided_samples} without a context to sample under; give "
                "[sampling] context, or leave guided_samples out"
            )
        if self.guided_samples > self.samples_per_prompt:
            raise ValueError(
                f"sampling.guided_samples: got {self.guided_samples}, allowed: at most samples_per_prompt = "
                f"{self.samples_per_prompt}"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_engine(self) -> Self:
        if self.engine != "vllm":
            if self.vllm != VllmSettings():
                given = ", ".join(sorted(self.vllm.model_dump(exclude_defaults=True)))
                raise ValueError(f'sampling.vllm: got {given} with engine = "{self.engine}"')
            return self
        least, most = TEMPERATURES
        if not least <= self.temperature <= most:
            raise ValueError(
                f'sampling.temperature: got {self.temperature} with engine = "vllm", '
                f"which samples from {least} to {most}"
            )
        if self.vllm.implementation != "pooling":
            raise ValueError(
                f'sampling.vllm.implementation: got "{self.vllm.implementation}"; '
                "it says how a teacher scores, leave it out"
            )
        return self

    @model_validator(mode="after")
    def _replays_a_score_file(self) -> Self:
        if self.replayed is not None and self.replayed.suffix != ".parquet":
            raise ValueError(
                f'sampling.sampler: got {self.sampler!r}; a score file is replayed, "file:NAME.parquet"'
            )
        return self

    @property
    def replayed(self) -> Path | None:
        """The score file whose responses take the place of sampled ones."""
        kind, _, path = self.sampler.partition(":")
        return Path(path) if kind == "file" else None

    @property
    def guided(self) -> int:
        """Responses of a group that the student samples under [sampling] context; 0 without one."""
        if self.context is None:
            return 0
        return self.samples_per_prompt if self.guided_samples is None else self.guided_samples

    @property
    def student_share(self) -> float:
        """Probability that a group is sampled by the student."""
        return 1.0 if self.sampler == "student" else (self.student_fraction or 0.0)
