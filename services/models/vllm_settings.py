"""What a run file or a command line says about vLLM; imports no vLLM.

Names are vLLM's own. What is not named here goes through `engine_args`.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

from services.models.writer_settings import WriterSettings

# Engine arguments that the teacher or the student names itself, above its vLLM settings.
NAMED_ELSEWHERE = ("model", "revision", "dtype")
# What makes a vLLM engine score, or would run a model's own code.
OURS = (
    "runner", "convert", "task", "skip_tokenizer_init", "logprobs_mode", "trust_remote_code",
    "enable_lora", "max_lora_rank", "max_cpu_loras", "lora_target_modules", "default_mm_loras",
)  # fmt: skip
# Engine arguments that change scores although model and type stay the same.
_CHANGE_NUMBERS = ("quantization", "kv_cache_dtype", "hf_overrides", "load_format", "lora_dtype")
# What vLLM samples at; below the least it would silently take that, above the largest it refuses.
TEMPERATURES = (0.01, 2.0)
MAX_BATCH_TOKENS = 16_384  # the other engines' default, which vLLM has no use for


class VllmSettings(BaseModel):
    """The vLLM engine; keys have vLLM's names and, where nothing else is said, vLLM's defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that share one copy of the weights")
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0.0, le=1.0, description="share of a GPU's memory that vLLM takes (vLLM: 0.92)"
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="longest sequence in tokens; default: what the model was made for"
    )
    quantization: str | None = Field(
        default=None, description="how weights are quantized; default: as the model's files say"
    )
    max_num_batched_tokens: int | None = Field(
        default=None, ge=1, description="tokens of one step; longer sequences are computed in pieces"
    )
    max_num_seqs: int | None = Field(default=None, ge=1, description="sequences of one step")
    enforce_eager: bool = Field(default=False, description="no compilation and no CUDA graphs")
    kv_cache_memory_bytes: int | None = Field(
        default=None, ge=1, description="size of the KV cache; default: by gpu_memory_utilization"
    )
    implementation: Literal["pooling", "stock"] = Field(
        default="pooling",
        description="how a teacher scores: inside the model's step, or through vLLM's prompt_logprobs, for "
        "models that the first cannot serve",
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description='any other engine argument of vLLM by its Python name, e.g. {"block_size": 32}',
    )

    @field_validator("engine_args")
    @classmethod
    def _has_no_second_name(cls, engine_args: dict[str, Any]) -> dict[str, Any]:
        for name in engine_args:
            if name in cls.model_fields:
                raise ValueError(f"got {name!r}, which is a key beside engine_args: give it there")
            if name in NAMED_ELSEWHERE:
                raise ValueError(f"got {name!r}, which is named outside the vLLM settings: give it there")
            if name in OURS:
                raise ValueError(f"got {name!r}, which is not for a run to choose: leave it out")
        if engine_args.get("load_format") == "dummy":
            raise ValueError("got load_format 'dummy', which are random weights: leave it out")
        return engine_args

    def given(self) -> dict[str, Any]:
        """What was said, by vLLM's names: the keys that are set and `engine_args` among them."""
        named = self.model_dump(exclude={"implementation", "engine_args"}, exclude_defaults=True)
        return named | self.engine_args

    def changes_to_numbers(self) -> list[str]:
        """The given arguments that an identity has to show, as name=value."""
        return [f"{name}={value}" for name, value in sorted(self.given().items()) if name in _CHANGE_NUMBERS]


class Teacher(Protocol):
    """What a teacher says about its engine, on the command line or in a run file."""

    @property
    def engine(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def max_batch_tokens(self) -> int: ...
    @property
    def vllm(self) -> VllmSettings: ...


def check_engine(teacher: Teacher) -> None:
    """Raise ValueError for a setting that the teacher's engine would not look at."""
    if teacher.engine != "vllm":
        if teacher.vllm != VllmSettings():
            given = ", ".join(sorted(teacher.vllm.model_dump(exclude_defaults=True)))
            raise ValueError(f"vllm: got {given}, but the engine is {teacher.engine!r}")
    elif teacher.device != "auto":
        raise ValueError(
            f"device: got {teacher.device!r}; vLLM computes on what it was built for, and "
            "CUDA_VISIBLE_DEVICES says which of its GPUs it sees"
        )
    elif teacher.max_batch_tokens != MAX_BATCH_TOKENS:
        raise ValueError(
            f"max_batch_tokens: got {teacher.max_batch_tokens}; with engine 'vllm' its name is "
            "max_num_batched_tokens, among the vLLM settings"
        )


def check_writer(engine: str, writer: WriterSettings) -> None:
    """Raise ValueError for a temperature that the writer's engine does not sample at."""
    least, most = TEMPERATURES
    if engine == "vllm" and not least <= writer.temperature <= most:
        raise ValueError(
            f"writer.temperature: got {writer.temperature} with engine 'vllm', which samples from {least} "
            f"to {most}"
        )
