"""Client of the Tutelage teacher scoring API: token ids in, log-probabilities out, as numpy arrays.

from tutelage_client import TeacherClient

with TeacherClient("127.0.0.1:50051") as teacher:
    score = teacher.score(contexts=[[1, 2, 3]], responses=[[4, 5]], top_k=64)
    print(score.sequences[0].sampled)
"""

from tutelage_client.aio import AsyncTeacherClient
from tutelage_client.client import TeacherClient
from tutelage_client.connect import Tls
from tutelage_client.errors import TutelageError
from tutelage_client.retry import RetryPolicy
from tutelage_client.types import (
    PAD_ID,
    Identity,
    Limits,
    Pins,
    Score,
    ScoreRequest,
    Sequence,
    SequenceError,
    SequenceScore,
    Signal,
    StreamAnswer,
    Teacher,
    Usage,
)

__all__ = [
    "PAD_ID",
    "AsyncTeacherClient",
    "Identity",
    "Limits",
    "Pins",
    "RetryPolicy",
    "Score",
    "ScoreRequest",
    "Sequence",
    "SequenceError",
    "SequenceScore",
    "Signal",
    "StreamAnswer",
    "Teacher",
    "TeacherClient",
    "Tls",
    "TutelageError",
    "Usage",
]
