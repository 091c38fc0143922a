"""Sections of a run file, but for [data], [sampling] and [objective], which have files of their own.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from services.access import LOOPBACK, TokenCheck, TokenSettings, check_exposure
from services.models.judge_settings import JudgeSettings
from services.models.vllm_settings import MAX_BATCH_TOKENS, VllmSettings, check_engine, check_writer
from services.models.writer_settings import WriterSettings
from services.queue_address import FORM, is_queue_address
from student_trainer.config_errors import NAME_PATTERN

Tracker = Literal["tensorboard", "wandb", "trackio"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSettings(Section):
    """What the run is called, where it writes, and whether it must be repeatable."""

    name: str = Field(
        "run",
        pattern=NAME_PATTERN,
        description="name of the run: prefix of its groups and streams in the queue",
    )
    directory: Path = Field(
        Path("runs/run"),
        description="everything the run writes: checkpoints, policy versions, metrics, the trained student",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of sampling, data order and adapters")
    deterministic: bool = Field(
        False,
        description="bitwise repeatable on one machine: groups are trained in index order, sampled by "
        "exactly the policy version max(0, step - max_staleness), with one CPU thread",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of each process; default: torch's choice, and 1 in a deterministic run",
    )


class QueueSettings(Section):
    """The Valkey or Redis server between the processes."""

    url: str = Field(
        "embedded",
        description='redis://, rediss:// or unix:// address; "embedded": `tutelage up` starts its own',
    )
    namespace: str = Field("tutelage", pattern=NAME_PATTERN, description="prefix of every key")
    max_queued_tokens: int = Field(
        1_000_000, ge=1, description="samplers wait while a teacher has more unscored tokens than this"
    )
    heartbeat_seconds: float = Field(
        5.0, gt=0.0, le=300.0, description="how often a worker renews its leases; a lease lasts 1.5 of these"
    )

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if url != "embedded" and not is_queue_address(url):
            raise ValueError(f'must be "embedded" or {FORM}')
        return url


class TeacherEntry(Section):
    """One teacher: what it serves and how `tutelage up` starts it."""

    model: str | None = Field(None, description="local directory or hub id; only the fake engine has none")
    revision: str | None = Field(None, description="hub revision (a commit, a tag or a branch)")
    adapter: Path | None = Field(
        None,
        description="directory of a LoRA adapter (PEFT): model and adapter together are this teacher. With "
        "engine vllm, teachers that differ in their adapter alone share one engine",
    )
    scores: Path | None = Field(
        None,
        description="score file (`tutelage score`) that this teacher answers from, instead of a model: "
        "no GPU is needed, and no response is answered that is not in it",
    )
    judge: JudgeSettings | None = Field(
        None, description="[teachers.NAME.judge]: it judges responses in words, for [objective] judge"
    )
    writer: WriterSettings | None = Field(
        None,
        description="[teachers.NAME.writer]: it writes on from places in responses, for [objective.audit]",
    )
    engine: Literal["transformers", "vllm", "fake"] = Field(
        "transformers", description="what computes the scores"
    )
    cache: str | None = Field(
        None,
        description="directory, or redis:// address, that keeps this teacher's scores; what was scored "
        "before is answered from there",
    )
    replicas: int = Field(1, ge=1, description="processes that `tutelage up` starts; each holds the weights")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of weights and activations")
    device: str = Field("auto", description='"auto" (CUDA when there is one), "cpu", "cuda" or "cuda:N"')
    max_batch_tokens: int = Field(
        MAX_BATCH_TOKENS, ge=1, description="tokens of one packed forward pass; not of engine vllm"
    )
    vllm: VllmSettings = Field(
        default_factory=VllmSettings, description="how vLLM serves it, by vLLM's names"
    )
    address: str | None = Field(
        None,
        description="host:port of a replica that somebody else runs: `tutelage up` starts none, "
        "`tutelage doctor` asks this one; its work comes through the queue, by NAME",
    )

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.scores is not None:
            others = {"model", "revision", "adapter", "address", "engine", "cache", "judge", "writer"}
            for key in others & self.model_fields_set:
                raise ValueError(f"{key}: set beside scores; a file is all that such a teacher has")
        elif self.model is None and self.engine != "fake" and self.address is None:
            raise ValueError(
                "model: missing; give a local directory or a hub id (only scores = FILE and "
                'engine = "fake" have none)'
            )
        return self

    @model_validator(mode="after")
    def _fits_the_engine(self) -> Self:
        check_engine(self)
        if self.adapter is not None and self.engine == "fake":
            raise ValueError(f"adapter: got {str(self.adapter)!r}, the engine 'fake' has no model to change")
        if self.judge is not None and self.writer is not None:
            raise ValueError("writer: got one beside judge; a teacher is one of them")
        for kind, given in (("judge", self.judge), ("writer", self.writer)):
            if given is not None and (self.engine == "fake" or self.model is None):
                raise ValueError(f"{kind}: got one, but no model that could say anything")
        if self.writer is not None:
            check_writer(self.engine, self.writer)
        return self


class SelfTeacherSettings(Section):
    """How teachers are started that need no section: the student as it publishes itself, or a checkpoint."""

    engine: Literal["transformers", "vllm"] = Field("transformers", description="what computes the scores")
    replicas: int = Field(1, ge=1, description="processes that `tutelage up` starts for each such teacher")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of weights and activations; default: that of [student]"
    )
    device: str = Field("auto", description='"auto" (CUDA when there is one), "cpu", "cuda" or "cuda:N"')
    max_batch_tokens: int = Field(
        MAX_BATCH_TOKENS, ge=1, description="tokens of one packed forward pass; not of engine vllm"
    )
    vllm: VllmSettings = Field(
        default_factory=VllmSettings, description="how vLLM serves them, by vLLM's names"
    )
    in_process: bool = Field(
        False,
        description="the trainer's process scores for them, and no other is started; for small students",
    )

    @model_validator(mode="after")
    def _fits_the_engine(self) -> Self:
        check_engine(self)
        if self.in_process and self.engine == "vllm":
            raise ValueError('in_process: got true with engine = "vllm", which has a process of its own')
        return self


class LoraSettings(Section):
    """Low-rank adapters (PEFT) instead of training every weight."""

    rank: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0.0, description="scale; the update is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout before the adapters")
    target_modules: str | list[str] = Field(
        "all-linear", description='module names that get an adapter, or "all-linear"'
    )


class StudentSettings(Section):
    """The model that is trained."""

    model: str = Field(description="local directory or hub id of the student before training")
    revision: str | None = Field(None, description="hub revision (a commit, a tag or a branch)")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="dtype of the forward pass and of published policies; trained weights are always float32",
    )
    device: str = Field("auto", description='"auto" (CUDA when there is one), "cpu", "cuda" or "cuda:N"')
    lora: LoraSettings | None = Field(
        None, description="train adapters only; absent: every weight is trained"
    )


class TrainingSettings(Section):
    """Steps, optimizer (AdamW), pacing, checkpoints, evaluation and metrics."""

    steps: int = Field(ge=1, description="optimizer steps of the whole run")
    prompts_per_step: int = Field(128, ge=1, description="groups of one step")
    updates_per_step: int = Field(
        1,
        ge=1,
        description="optimizer updates of one step, each on an equal part of its groups; p_old is "
        "the student's as the step begins",
    )
    learning_rate: float = Field(1e-5, gt=0.0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="after warm-up: constant, or a linear or cosine decay to 10% of the peak"
    )
    warmup_steps: int = Field(5, ge=0, description="steps of linear warm-up")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's betas")
    epsilon: float = Field(1e-8, gt=0.0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW's weight decay, on matrices only")
    gradient_clip: float = Field(1.0, gt=0.0, description="largest global gradient norm")
    max_staleness: int = Field(
        1, ge=0, description="policy versions that a group may be behind the weights it trains"
    )
    micro_batch_tokens: int = Field(
        16_384,
        ge=1,
        description="packed tokens of one forward and backward pass, shared prompts counted once",
    )
    max_refused_steps: int = Field(
        3, ge=1, description="steps in a row whose gradient is not finite before the run stops"
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    max_unacknowledged_bytes: int = Field(
        2**30,
        ge=1,
        description="trained rollouts and scores that the queue holds until the next checkpoint; more of "
        "them bring it forward",
    )
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept on disk")
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations; 0: never")
    evaluation_prompts: int = Field(500, ge=1, description="held-out prompts of one evaluation")
    sample_every: int = Field(
        10, ge=0, description="steps between rollouts written for the report, from the first on; 0: never"
    )
    sample_groups: int = Field(4, ge=1, description="groups written each time")
    rank_timeout_seconds: float = Field(
        600.0,
        gt=0.0,
        description="how long a process of `torchrun` waits for another one before it gives up and ends",
    )
    trackers: tuple[Tracker, ...] = Field(
        ("tensorboard",),
        description='where metrics go besides the console and metrics.jsonl: "tensorboard", '
        '"wandb", "trackio"',
    )

    @model_validator(mode="after")
    def _a_group_for_every_update(self) -> Self:
        if self.updates_per_step > self.prompts_per_step:
            raise ValueError(
                f"updates_per_step: got {self.updates_per_step}, each needs a group of its own; allowed: at "
                f"most prompts_per_step = {self.prompts_per_step}"
            )
        return self

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"got {list(betas)}, each must be in [0, 1)")
        return betas


class MetricsSettings(Section):
    """The HTTP ports of trainer and samplers: /health, /metrics, and the trainer's /status."""

    host: str = Field(
        LOOPBACK, description="address that they listen on; beyond loopback a token is required"
    )
    token_file: Path | None = Field(
        None, description="bearer tokens, one per line, any of which is accepted; /health wants none"
    )
    trainer_port: int = Field(0, ge=0, le=65535, description="the trainer's port; 0: any free port")
    sampler_port: int | None = Field(
        None, ge=0, le=65535, description="a sampler's port; 0: any free port; absent: it listens nowhere"
    )

    @model_validator(mode="after")
    def _closed_by_default(self) -> Self:
        check_exposure([self.host], with_token=self.token_file is not None, remedy="metrics.token_file")
        return self

    def tokens(self) -> TokenCheck:
        """Raises TutelageError INVALID_ARGUMENT for a token file that cannot be used."""
        return TokenSettings(token_file=self.token_file).token_check()
