"""A server of GetTeacher and nothing else, for tests of how a client finds and asks a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
from tutelage.v1 import teacher_pb2 as pb

Answer = Callable[[grpc.ServicerContext], pb.GetTeacherResponse]


@contextmanager
def get_teacher_server(
    answer: Answer, host: str = "127.0.0.1", port: int = 0, *, max_age_ms: int | None = None
) -> Iterator[int]:
    """Yields the port; 0 picks a free one. Its connections end at `max_age_ms`."""
    handler = grpc.unary_unary_rpc_method_handler(lambda _, context: answer(context).SerializeToString())
    options = [] if max_age_ms is None else [("grpc.max_connection_age_ms", max_age_ms)]
    running = grpc.server(futures.ThreadPoolExecutor(4), options=options)
    running.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("tutelage.v1.TeacherService", {"GetTeacher": handler}),)
    )
    bound = running.add_insecure_port(f"{host}:{port}")
    running.start()
    try:
        yield bound
    finally:
        running.stop(None).wait()


def named(name: str) -> pb.GetTeacherResponse:
    """A teacher of this name that is ready."""
    return pb.GetTeacherResponse(identity=pb.Identity(name=name), ready=True)
