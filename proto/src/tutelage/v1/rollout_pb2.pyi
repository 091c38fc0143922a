from tutelage.v1 import teacher_pb2 as _teacher_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Rollout(_message.Message):
    __slots__ = ("response_ids", "behaviour_logprobs", "candidate_ids", "num_candidates", "reward", "finished", "text", "privileged_views", "auxiliary_context_ids", "anchors", "guided")
    RESPONSE_IDS_FIELD_NUMBER: _ClassVar[int]
    BEHAVIOUR_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PRIVILEGED_VIEWS_FIELD_NUMBER: _ClassVar[int]
    AUXILIARY_CONTEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    ANCHORS_FIELD_NUMBER: _ClassVar[int]
    GUIDED_FIELD_NUMBER: _ClassVar[int]
    response_ids: bytes
    behaviour_logprobs: bytes
    candidate_ids: bytes
    num_candidates: int
    reward: float
    finished: bool
    text: str
    privileged_views: _containers.RepeatedScalarFieldContainer[str]
    auxiliary_context_ids: bytes
    anchors: bytes
    guided: bool
    def __init__(self, response_ids: _Optional[bytes] = ..., behaviour_logprobs: _Optional[bytes] = ..., candidate_ids: _Optional[bytes] = ..., num_candidates: _Optional[int] = ..., reward: _Optional[float] = ..., finished: bool = ..., text: _Optional[str] = ..., privileged_views: _Optional[_Iterable[str]] = ..., auxiliary_context_ids: _Optional[bytes] = ..., anchors: _Optional[bytes] = ..., guided: bool = ...) -> None: ...

class PolicyStretch(_message.Message):
    __slots__ = ("id", "start")
    ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    id: str
    start: int
    def __init__(self, id: _Optional[str] = ..., start: _Optional[int] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("id", "run", "index", "policy_version", "prompt_ids", "rollouts", "temperature", "prompt_text", "traceparent", "sampled_by", "lineage", "tag", "view_weights")
    class ViewWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TEXT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_BY_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    VIEW_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    run: str
    index: int
    policy_version: int
    prompt_ids: bytes
    rollouts: _containers.RepeatedCompositeFieldContainer[Rollout]
    temperature: float
    prompt_text: str
    traceparent: str
    sampled_by: str
    lineage: _containers.RepeatedCompositeFieldContainer[PolicyStretch]
    tag: str
    view_weights: _containers.ScalarMap[str, float]
    def __init__(self, id: _Optional[str] = ..., run: _Optional[str] = ..., index: _Optional[int] = ..., policy_version: _Optional[int] = ..., prompt_ids: _Optional[bytes] = ..., rollouts: _Optional[_Iterable[_Union[Rollout, _Mapping]]] = ..., temperature: _Optional[float] = ..., prompt_text: _Optional[str] = ..., traceparent: _Optional[str] = ..., sampled_by: _Optional[str] = ..., lineage: _Optional[_Iterable[_Union[PolicyStretch, _Mapping]]] = ..., tag: _Optional[str] = ..., view_weights: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ViewRequest(_message.Message):
    __slots__ = ("view", "teacher", "pins", "signal", "contexts")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    view: str
    teacher: str
    pins: _teacher_pb2.Pins
    signal: _teacher_pb2.Signal
    contexts: _containers.RepeatedCompositeFieldContainer[_teacher_pb2.Context]
    def __init__(self, view: _Optional[str] = ..., teacher: _Optional[str] = ..., pins: _Optional[_Union[_teacher_pb2.Pins, _Mapping]] = ..., signal: _Optional[_Union[_teacher_pb2.Signal, _Mapping]] = ..., contexts: _Optional[_Iterable[_Union[_teacher_pb2.Context, _Mapping]]] = ...) -> None: ...

class SampleOrder(_message.Message):
    __slots__ = ("id", "run", "first_group", "num_groups", "policy_version", "exact", "evaluation")
    ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    FIRST_GROUP_FIELD_NUMBER: _ClassVar[int]
    NUM_GROUPS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    id: str
    run: str
    first_group: int
    num_groups: int
    policy_version: int
    exact: bool
    evaluation: bool
    def __init__(self, id: _Optional[str] = ..., run: _Optional[str] = ..., first_group: _Optional[int] = ..., num_groups: _Optional[int] = ..., policy_version: _Optional[int] = ..., exact: bool = ..., evaluation: bool = ...) -> None: ...
