"""Groups, requests and answers for queue tests, and a real server per test session."""

from __future__ import annotations

import numpy as np
from tutelage.v1.rollout_pb2 import Group, Rollout, ViewRequest
from tutelage.v1.teacher_pb2 import Context, ScoreResponse

PROMPT_TOKENS, RESPONSE_TOKENS, ROLLOUTS = 4, 6, 2
VIEW_TOKENS = PROMPT_TOKENS + ROLLOUTS * RESPONSE_TOKENS


def ids(count: int, start: int = 1) -> bytes:
    return np.arange(start, start + count, dtype="<i4").tobytes()


def make_group(run: str, index: int) -> Group:
    return Group(
        id=f"{run}-{index}",
        run=run,
        index=index,
        prompt_ids=ids(PROMPT_TOKENS),
        rollouts=[Rollout(response_ids=ids(RESPONSE_TOKENS, 10 * i + 1)) for i in range(ROLLOUTS)],
        temperature=1.0,
        traceparent=f"00-{index:032x}-0000000000000001-01",
    )


def make_request(teacher: str, view: str = "teacher") -> ViewRequest:
    return ViewRequest(view=view, teacher=teacher, contexts=[Context(ids=ids(PROMPT_TOKENS))])


def make_scores(tag: str) -> bytes:
    """An answer that can be told apart from every other one."""
    return ScoreResponse(request_id=tag).SerializeToString()
