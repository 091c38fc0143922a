"""The words of the contract as numpy types.

Shapes: B sequences, R response positions of one sequence, K top ids, C candidate ids, F audited chunks.
Position t predicts response token t from context + response[:t]. Log-probabilities are
natural logarithms in nats; float32 arrays unless the encoding says float16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tutelage_client.errors import TutelageError

Int32Array: TypeAlias = npt.NDArray[np.int32]
Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = Float32Array | npt.NDArray[np.float16]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
TokenIds: TypeAlias = "Int32Array | Iterable[int]"
EncodingName: TypeAlias = Literal["float32", "float16"]

PAD_ID = -1


@dataclass(frozen=True, slots=True)
class Signal:
    """What is asked at every response position; all of it comes from one forward pass."""

    sampled: bool = True
    top_k: int = 0
    candidates: bool = False
    entropy: bool = False
    temperature: float = 1.0
    encoding: EncodingName = "float32"
    judgement: bool = False  # what a judge says of the response as a whole; asked alone
    hidden_layers: tuple[int, ...] = ()  # ascending; layer l is the output of the l-th decoder layer
    continuations: int = 0  # texts that a writer samples at every audited chunk; asked alone
    chunk_tokens: int = 0  # of the response, in an audited chunk; at least 1 with continuations, 0 without

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_layers", tuple(self.hidden_layers))


@dataclass(frozen=True, slots=True)
class Pins:
    """Conditions that must hold before anything is scored; None leaves one open."""

    tokenizer_fingerprint: str | None = None
    revision: str | None = None
    weights_version: int | None = None
    min_weights_version: int | None = None  # the least version that may answer


@dataclass(frozen=True, slots=True)
class Sequence:
    """One response to score under one of the request's contexts."""

    id: str
    context: int
    response_ids: Int32Array  # [R]
    candidate_ids: Int32Array | None = None  # [R, C], PAD_ID where there is none
    anchors: Int32Array | None = None  # [F], where each audited chunk begins, ascending


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A batch: contexts are sent once and shared by index."""

    contexts: tuple[Int32Array, ...]  # each [P], P >= 1
    sequences: tuple[Sequence, ...]
    signal: Signal = field(default_factory=Signal)
    teacher: str = ""
    pins: Pins = field(default_factory=Pins)
    request_id: str = ""
    context_texts: tuple[str | None, ...] = ()  # of each context, for teachers that read words; (): of none

    def text_of(self, sequence: Sequence) -> str | None:
        """The question before a sequence as a person asked it; None where only its ids are known."""
        return self.context_texts[sequence.context] if self.context_texts else None

    def only(self, sequences: Iterable[Sequence]) -> ScoreRequest:
        """This request for some of its sequences, less every context that then serves nobody."""
        kept = tuple(sequences)
        used = sorted({sequence.context for sequence in kept})
        moved = {old: new for new, old in enumerate(used)}
        return replace(
            self,
            contexts=tuple(self.contexts[old] for old in used),
            context_texts=tuple(self.context_texts[old] for old in used) if self.context_texts else (),
            sequences=tuple(replace(sequence, context=moved[sequence.context]) for sequence in kept),
        )


@dataclass(frozen=True, slots=True)
class SequenceError:
    """Why one sequence (or a whole request) was refused: a gRPC status name and a sentence."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class SequenceScore:
    """The answer for one sequence: `error`, arrays over its R positions, a `judgement` or an `agreement`.

    Where `valid` is False the engine had no finite score, every float there is NaN and the
    position must be masked.
    """

    id: str
    error: SequenceError | None = None
    sampled: FloatArray | None = None  # [R]
    top_ids: Int32Array | None = None  # [R, K], most probable first
    top_logprobs: FloatArray | None = None  # [R, K]
    candidate_logprobs: FloatArray | None = None  # [R, C], NaN at pads
    entropy: FloatArray | None = None  # [R]
    valid: BoolArray | None = None  # [R]
    judgement: float | None = None  # 0 (worst) to 1 (best), of the whole response: a reward
    verdict: str = ""  # the judge's words, which the judgement was read from
    hidden: npt.NDArray[np.float16] | None = None  # [R, L, H], unit vectors, of the asked layers
    agreement: Float32Array | None = None  # [F], 0 to 1, mean similarity of a writer's continuations

    @property
    def num_positions(self) -> int:
        return 0 if self.valid is None else int(self.valid.shape[0])


@dataclass(frozen=True, slots=True)
class Identity:
    """Exactly what produced a score."""

    name: str
    model: str
    revision: str
    weights_version: int
    tokenizer_fingerprint: str
    vocab_size: int
    engine: str
    engine_version: str
    dtype: str
    head_dtype: str
    weights_id: str = ""  # which publication of weights_version; empty for weights that never change


@dataclass(frozen=True, slots=True)
class Limits:
    """What a teacher accepts; published by GetTeacher and enforced before the engine."""

    max_sequences: int = 1024
    max_sequence_tokens: int = 32_768
    max_request_tokens: int = 1_048_576
    max_top_k: int = 256
    max_candidates: int = 256
    max_message_bytes: int = 256 * 1024 * 1024
    entropy: bool = True
    temperature: bool = True
    judge: bool = False  # answers Signal.judgement, and no log-probability of anything
    hidden_layers: int = 0  # layers whose hidden states are answered, from 1 on
    hidden_size: int = 0  # numbers of one hidden state
    max_continuations: int = 0  # of a writer, which answers no log-probability; 0: it writes nothing


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost."""

    positions: int = 0
    tokens_computed: int = 0
    tokens_reused: int = 0
    queue_ms: float = 0.0
    compute_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Score:
    """The answer to one ScoreRequest, sequences in request order."""

    sequences: tuple[SequenceScore, ...]
    identity: Identity
    usage: Usage = field(default_factory=Usage)
    request_id: str = ""

    def raise_for_errors(self) -> Score:
        """This score, or TutelageError for the first sequence that was not scored."""
        for sequence in self.sequences:
            if sequence.error is not None:
                raise TutelageError(sequence.error.code, sequence.error.message)
        return self


@dataclass(frozen=True, slots=True)
class StreamAnswer:
    """One answer of ScoreStream: a score, or the refusal of the whole request."""

    request_id: str
    score: Score | None
    error: SequenceError | None = None


@dataclass(frozen=True, slots=True)
class Teacher:
    """The answer to GetTeacher."""

    identity: Identity
    limits: Limits
    ready: bool
