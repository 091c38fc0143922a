from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_FLOAT32: _ClassVar[Encoding]
    ENCODING_FLOAT16: _ClassVar[Encoding]
ENCODING_UNSPECIFIED: Encoding
ENCODING_FLOAT32: Encoding
ENCODING_FLOAT16: Encoding

class GetTeacherRequest(_message.Message):
    __slots__ = ("teacher",)
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    def __init__(self, teacher: _Optional[str] = ...) -> None: ...

class GetTeacherResponse(_message.Message):
    __slots__ = ("identity", "limits", "ready")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    identity: Identity
    limits: Limits
    ready: bool
    def __init__(self, identity: _Optional[_Union[Identity, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., ready: bool = ...) -> None: ...

class Identity(_message.Message):
    __slots__ = ("name", "model", "revision", "weights_version", "tokenizer_fingerprint", "vocab_size", "engine", "engine_version", "dtype", "head_dtype", "weights_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HEAD_DTYPE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
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
    weights_id: str
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., weights_version: _Optional[int] = ..., tokenizer_fingerprint: _Optional[str] = ..., vocab_size: _Optional[int] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., dtype: _Optional[str] = ..., head_dtype: _Optional[str] = ..., weights_id: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_sequences", "max_sequence_tokens", "max_request_tokens", "max_top_k", "max_candidates", "max_message_bytes", "entropy", "temperature", "judge", "hidden_layers", "hidden_size", "max_continuations")
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    JUDGE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTINUATIONS_FIELD_NUMBER: _ClassVar[int]
    max_sequences: int
    max_sequence_tokens: int
    max_request_tokens: int
    max_top_k: int
    max_candidates: int
    max_message_bytes: int
    entropy: bool
    temperature: bool
    judge: bool
    hidden_layers: int
    hidden_size: int
    max_continuations: int
    def __init__(self, max_sequences: _Optional[int] = ..., max_sequence_tokens: _Optional[int] = ..., max_request_tokens: _Optional[int] = ..., max_top_k: _Optional[int] = ..., max_candidates: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., entropy: bool = ..., temperature: bool = ..., judge: bool = ..., hidden_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., max_continuations: _Optional[int] = ...) -> None: ...

class Signal(_message.Message):
    __slots__ = ("sampled", "top_k", "candidates", "entropy", "temperature", "encoding", "judgement", "hidden_layers", "continuations", "chunk_tokens")
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    JUDGEMENT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_LAYERS_FIELD_NUMBER: _ClassVar[int]
    CONTINUATIONS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sampled: bool
    top_k: int
    candidates: bool
    entropy: bool
    temperature: float
    encoding: Encoding
    judgement: bool
    hidden_layers: _containers.RepeatedScalarFieldContainer[int]
    continuations: int
    chunk_tokens: int
    def __init__(self, sampled: bool = ..., top_k: _Optional[int] = ..., candidates: bool = ..., entropy: bool = ..., temperature: _Optional[float] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., judgement: bool = ..., hidden_layers: _Optional[_Iterable[int]] = ..., continuations: _Optional[int] = ..., chunk_tokens: _Optional[int] = ...) -> None: ...

class Pins(_message.Message):
    __slots__ = ("tokenizer_fingerprint", "revision", "weights_version", "min_weights_version")
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    MIN_WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    tokenizer_fingerprint: str
    revision: str
    weights_version: int
    min_weights_version: int
    def __init__(self, tokenizer_fingerprint: _Optional[str] = ..., revision: _Optional[str] = ..., weights_version: _Optional[int] = ..., min_weights_version: _Optional[int] = ...) -> None: ...

class Context(_message.Message):
    __slots__ = ("ids", "text")
    IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ids: bytes
    text: str
    def __init__(self, ids: _Optional[bytes] = ..., text: _Optional[str] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("id", "context", "response_ids", "candidate_ids", "num_candidates", "anchors")
    ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_IDS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    ANCHORS_FIELD_NUMBER: _ClassVar[int]
    id: str
    context: int
    response_ids: bytes
    candidate_ids: bytes
    num_candidates: int
    anchors: bytes
    def __init__(self, id: _Optional[str] = ..., context: _Optional[int] = ..., response_ids: _Optional[bytes] = ..., candidate_ids: _Optional[bytes] = ..., num_candidates: _Optional[int] = ..., anchors: _Optional[bytes] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "teacher", "pins", "contexts", "sequences", "signal")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    teacher: str
    pins: Pins
    contexts: _containers.RepeatedCompositeFieldContainer[Context]
    sequences: _containers.RepeatedCompositeFieldContainer[Sequence]
    signal: Signal
    def __init__(self, request_id: _Optional[str] = ..., teacher: _Optional[str] = ..., pins: _Optional[_Union[Pins, _Mapping]] = ..., contexts: _Optional[_Iterable[_Union[Context, _Mapping]]] = ..., sequences: _Optional[_Iterable[_Union[Sequence, _Mapping]]] = ..., signal: _Optional[_Union[Signal, _Mapping]] = ...) -> None: ...

class SequenceError(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class SequenceScore(_message.Message):
    __slots__ = ("id", "error", "num_positions", "top_k", "num_candidates", "encoding", "sampled", "top_ids", "top_logprobs", "candidate_logprobs", "entropy", "valid", "judgement", "verdict", "hidden", "num_layers", "hidden_size", "agreement", "num_chunks")
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NUM_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    VALID_FIELD_NUMBER: _ClassVar[int]
    JUDGEMENT_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    id: str
    error: SequenceError
    num_positions: int
    top_k: int
    num_candidates: int
    encoding: Encoding
    sampled: bytes
    top_ids: bytes
    top_logprobs: bytes
    candidate_logprobs: bytes
    entropy: bytes
    valid: bytes
    judgement: float
    verdict: str
    hidden: bytes
    num_layers: int
    hidden_size: int
    agreement: bytes
    num_chunks: int
    def __init__(self, id: _Optional[str] = ..., error: _Optional[_Union[SequenceError, _Mapping]] = ..., num_positions: _Optional[int] = ..., top_k: _Optional[int] = ..., num_candidates: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., sampled: _Optional[bytes] = ..., top_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ..., candidate_logprobs: _Optional[bytes] = ..., entropy: _Optional[bytes] = ..., valid: _Optional[bytes] = ..., judgement: _Optional[float] = ..., verdict: _Optional[str] = ..., hidden: _Optional[bytes] = ..., num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., agreement: _Optional[bytes] = ..., num_chunks: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("positions", "tokens_computed", "tokens_reused", "queue_ms", "compute_ms")
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_REUSED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    positions: int
    tokens_computed: int
    tokens_reused: int
    queue_ms: float
    compute_ms: float
    def __init__(self, positions: _Optional[int] = ..., tokens_computed: _Optional[int] = ..., tokens_reused: _Optional[int] = ..., queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("request_id", "identity", "sequences", "usage", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    identity: Identity
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceScore]
    usage: Usage
    error: SequenceError
    def __init__(self, request_id: _Optional[str] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ..., sequences: _Optional[_Iterable[_Union[SequenceScore, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., error: _Optional[_Union[SequenceError, _Mapping]] = ...) -> None: ...
