"""A teacher replica of ours as a peer: the process that `tutelage teacher` is, asked through the client."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tutelage_client import TeacherClient, codec

from benchmarks.scoring.peers import OURS, VLLM_ARGUMENTS, Reply, Scores
from benchmarks.scoring.processes import ProcessGroup
from benchmarks.scoring.workloads import Batch

PROGRAM = (
    "import sys; from services.teacher.process import main; "
    "from services.teacher.settings import TeacherSettings; "
    "main(TeacherSettings.model_validate_json(sys.argv[1]))"
)


class Replica:
    """Our replica with the vLLM engine, or with the transformers engine under that name."""

    def __init__(self, name: str, model: Path, directory: Path, threads: int) -> None:
        self.name = name
        self._ready_file = directory / f"{name}.json"
        settings: dict[str, object] = {
            "engine": "vllm" if name == OURS else "transformers",
            "model": str(model),
            "dtype": "float32",
            "ready_file": str(self._ready_file),
            "service": {"grpc_port": 0, "http_port": 0},
        }
        if name == OURS:
            named = {key: value for key, value in VLLM_ARGUMENTS.items() if key != "block_size"}
            settings["vllm"] = {**named, "engine_args": {"block_size": VLLM_ARGUMENTS["block_size"]}}
        else:
            settings["threads"] = threads
        command = [sys.executable, "-c", PROGRAM, json.dumps(settings)]
        self.process = ProcessGroup(name, command, directory / f"{name}.log", threads)
        self._client: TeacherClient | None = None
        self._sizes: dict[tuple[int, ...], tuple[int, int]] = {}

    def connect(self) -> None:
        self.process.wait_until(self._ready_file.exists)
        self._client = TeacherClient(json.loads(self._ready_file.read_text(encoding="utf-8"))["grpc"])

    def ask(self, batch: Batch) -> Reply:
        assert self._client is not None
        began = time.perf_counter()
        score = self._client.score_request(batch.request()).raise_for_errors()
        seconds = time.perf_counter() - began
        shape = (*batch.contexts.shape, *batch.responses.shape, batch.top_k)
        if shape not in self._sizes:  # another batch of this shape differs by the digits of a few counters
            request = codec.request_to_proto(batch.request()).ByteSize()
            self._sizes[shape] = (request, codec.score_to_proto(score).ByteSize())
        request_bytes, answer_bytes = self._sizes[shape]
        return Reply(
            seconds,
            Scores(
                sampled=[part.sampled for part in score.sequences if part.sampled is not None],
                top_ids=[part.top_ids for part in score.sequences if part.top_ids is not None],
                top_logprobs=[part.top_logprobs for part in score.sequences if part.top_logprobs is not None],
            ),
            request_bytes=request_bytes,
            answer_bytes=answer_bytes,
            tokens_computed=score.usage.tokens_computed,
            tokens_reused=score.usage.tokens_reused,
        )

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self.process.end()
