"""Settings of one teacher replica: what it serves, where, and which queue it works for."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from tutelage_client.types import Limits

from services.api.settings import ServiceSettings
from services.models.judge_settings import JudgeSettings
from services.models.vllm_settings import MAX_BATCH_TOKENS, VllmSettings, check_engine, check_writer
from services.models.writer_settings import WriterSettings
from services.queue_address import QueueAddress
from services.teacher.cache.settings import CacheSettings
from services.teacher.engines.fake import FakeSettings

EngineName = Literal["transformers", "vllm", "fake", "file"]
TeacherName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$")]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

MAX_ADAPTERS = 256


class LimitSettings(BaseModel):
    """What the replica accepts in one request; an engine narrows it to what its model can do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_sequences: int = Field(default=1024, ge=1, description="sequences in a request")
    max_sequence_tokens: int = Field(default=131_072, ge=2, description="context + response of a sequence")
    max_request_tokens: int = Field(
        default=1_048_576,
        ge=2,
        description="tokens in a request, shared contexts counted once; with a judge or a writer all that it "
        "reads, and may write at a chunk",
    )
    max_top_k: int = Field(default=256, ge=0, description="largest K of signal.top_k")
    max_candidates: int = Field(default=256, ge=0, description="largest C of candidate_ids [R, C]")

    def limits(self, max_message_bytes: int) -> Limits:
        """As the contract's Limits."""
        return Limits(**self.model_dump(), max_message_bytes=max_message_bytes)


class TeacherSettings(BaseModel):
    """One replica of one teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: TeacherName = Field(default="teacher", description="name that callers ask for")
    engine: EngineName = Field(default="transformers", description="what computes the scores")
    model: str | None = Field(default=None, description="directory or hub id; not needed by the fake engine")
    revision: str | None = Field(default=None, description="revision of a model on the hub")
    adapters: dict[TeacherName, Path] = Field(
        default_factory=dict,
        max_length=MAX_ADAPTERS,
        description="directories of LoRA adapters (PEFT) by the names of the teachers that they make of the "
        "model; the replica's own name is the model alone, unless an adapter has it",
    )
    judge: JudgeSettings | None = Field(
        default=None,
        description="the model says in words how good a response is, and answers no log-probability",
    )
    writer: WriterSettings | None = Field(
        default=None,
        description="the model writes on from places in a response, what it writes is compared with the "
        "response's own text, and it answers no log-probability",
    )
    follow: Path | None = Field(
        default=None,
        description="directory in which a trainer publishes weights: the newest are served, not a model",
    )
    scores: Path | None = Field(
        default=None, description="engine file: the score file that it answers from, and no model"
    )
    dtype: DtypeName = Field(
        default="auto", description="weights and activations; auto: as the model was saved"
    )
    head_dtype: Literal["float32", "model"] = Field(
        default="float32", description="type in which logits are computed; model: as the weights"
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:1, …; auto: a GPU when there is one")
    max_batch_tokens: int = Field(
        default=MAX_BATCH_TOKENS, ge=1, description="tokens of one forward pass; not of engine vllm"
    )
    deterministic: bool = Field(
        default=False, description="each request in its own forward pass, one torch thread"
    )
    threads: int | None = Field(default=None, ge=1, description="torch threads on the CPU")
    fake: FakeSettings = Field(default_factory=FakeSettings, description="the fake engine's behaviour")
    vllm: VllmSettings = Field(default_factory=VllmSettings, description="the vLLM engine's arguments")
    cache: CacheSettings | None = Field(default=None, description="keeps scores in front of the engine")
    limits: LimitSettings = Field(default_factory=LimitSettings)
    service: ServiceSettings = Field(default_factory=ServiceSettings)
    queue_url: QueueAddress | None = Field(
        default=None, description="redis://… of the queue to take jobs from"
    )
    namespace: str = Field(default="tutelage", description="prefix of every key in the queue")
    heartbeat_seconds: float = Field(default=5.0, gt=0, description="how often a job's lease is renewed")
    queue_concurrency: int = Field(default=8, ge=1, description="jobs held from the queue at once")
    consumer: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}",
        description="this replica's name in the queue, unique among the replicas of a teacher",
    )
    ready_file: Path | None = Field(
        default=None, description="written, as JSON, with the chosen addresses once the model is loaded"
    )
    grace_seconds: float = Field(default=30.0, gt=0, description="time to finish accepted work after SIGTERM")

    @model_validator(mode="after")
    def _needs_a_model(self) -> TeacherSettings:
        if self.follow is not None:
            for key in ("model", "revision", "adapters", "cache"):
                if value := getattr(self, key, None):
                    raise ValueError(f"{key}: got {value!r} with follow, whose weights change; leave one out")
        elif self.engine not in ("fake", "file") and not self.model:
            raise ValueError(f"model: got none, engine {self.engine!r} needs a directory or a hub id")
        return self

    @model_validator(mode="after")
    def _a_file_is_all_it_has(self) -> TeacherSettings:
        if (self.engine == "file") != (self.scores is not None):
            got = "none" if self.scores is None else repr(str(self.scores))
            raise ValueError(
                f"scores: got {got}, engine {self.engine!r}; engine 'file' and a file belong together"
            )
        for key in ("model", "revision", "adapters", "follow", "cache") if self.engine == "file" else ():
            if value := getattr(self, key):
                raise ValueError(
                    f"{key}: got {value!r} with engine 'file', which answers from its file alone"
                )
        return self

    @model_validator(mode="after")
    def _fits_the_engine(self) -> TeacherSettings:
        check_engine(self)
        if self.engine == "vllm" and self.deterministic:
            raise ValueError(
                "deterministic: got true; what vLLM computes depends on what it computes beside it, "
                "engine 'transformers' can score each request alone"
            )
        if self.engine == "vllm" and self.threads is not None:
            raise ValueError("threads: with engine 'vllm' the environment says it, as OMP_NUM_THREADS")
        return self

    @model_validator(mode="after")
    def _who_writes_has_a_model_of_its_own(self) -> TeacherSettings:
        if self.judge is not None and self.writer is not None:
            raise ValueError("writer: got one beside judge; a teacher is one of them")
        for kind, given in (("judge", self.judge), ("writer", self.writer)):
            if given is None:
                continue
            if self.engine not in ("transformers", "vllm"):
                raise ValueError(f"{kind}: got one, the engine {self.engine!r} generates nothing")
            for key in ("follow", "cache"):
                if value := getattr(self, key, None):
                    raise ValueError(f"{key}: got {value!r} with {kind}, which goes without")
            if self.vllm.implementation == "stock":
                raise ValueError(
                    f"vllm.implementation: got 'stock', which is a way to score; a {kind} generates"
                )
        if self.writer is not None:
            check_writer(self.engine, self.writer)
        return self

    @model_validator(mode="after")
    def _adapters_fit_the_engine(self) -> TeacherSettings:
        if self.adapters and self.engine == "fake":
            raise ValueError("adapters: got some, the engine 'fake' has no model that they could change")
        if self.engine == "transformers" and self.adapters and set(self.adapters) != {self.name}:
            raise ValueError(
                f"adapters: got {', '.join(sorted(self.adapters))}; the engine 'transformers' merges one "
                f"into the model, called as the replica is, {self.name!r}; the engine 'vllm' serves several"
            )
        return self
