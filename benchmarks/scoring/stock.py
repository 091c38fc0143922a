"""vLLM's own OpenAI server as a peer: one POST with the whole batch, JSON, and arrays made of it."""

from __future__ import annotations

import socket
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.scoring.peers import MAX_TOP_K, STOCK, VLLM_ARGUMENTS, Array, Reply, Scores
from benchmarks.scoring.processes import ProcessGroup
from benchmarks.scoring.workloads import Batch

CALL_SECONDS = 300.0


class StockServer:
    """`vllm serve` with the arguments that every vLLM here has.

    It has no tokenizer, which spares it the text of every candidate.
    """

    name = STOCK

    def __init__(self, model: Path, directory: Path, threads: int) -> None:
        self._model = str(model)
        port = _free_port()
        options = [f"--{name.replace('_', '-')}={value}" for name, value in VLLM_ARGUMENTS.items()]
        options = [option.removesuffix("=True") for option in options]
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self._model),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--skip-tokenizer-init"),
            *("--max-logprobs", str(MAX_TOP_K), "--enable-prefix-caching", "--disable-uvicorn-access-log"),
            *options,
        ]
        self.process = ProcessGroup(self.name, command, directory / f"{self.name}.log", threads)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=CALL_SECONDS, trust_env=False)

    def connect(self) -> None:
        self.process.wait_until(self._healthy)

    def _healthy(self) -> bool:
        try:
            return self._http.get("/health", timeout=5.0).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def ask(self, batch: Batch) -> Reply:
        prompts = batch.token_ids().tolist()
        began = time.perf_counter()
        answer = self._http.post(
            "/v1/completions",
            json={
                "model": self._model,
                "prompt": prompts,
                "max_tokens": 1,
                "prompt_logprobs": batch.top_k,
            },
        )
        received = time.perf_counter()
        if answer.status_code != httpx.codes.OK:
            raise RuntimeError(f"{self.name} answered {answer.status_code}: {answer.text[:2000]}")
        scores = scores_from_answer(answer.json(), batch.prompt_length, batch.top_k)
        ended = time.perf_counter()
        return Reply(
            ended - began,
            scores,
            parse_seconds=ended - received,
            request_bytes=len(answer.request.content),
            answer_bytes=len(answer.content),
        )

    def close(self) -> None:
        self._http.close()
        self.process.end()


def scores_from_answer(answer: dict[str, Any], prompt_length: int, top_k: int) -> Scores:
    """The response positions of a `/v1/completions` answer as arrays."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    parts = [_sequence_scores(choice["prompt_logprobs"][prompt_length:], top_k) for choice in choices]
    sampled = [part[0] for part in parts]
    if top_k == 0:
        return Scores(sampled)
    return Scores(sampled, [part[1] for part in parts], [part[2] for part in parts])


def _sequence_scores(positions: list[dict[str, dict[str, Any]]], top_k: int) -> tuple[Array, Array, Array]:
    """One sequence: sampled [R], ids and log-probabilities [R, K].

    A position maps ids to entries with `rank` and `logprob`: first the sampled id, then the K most
    probable, less the sampled one when that is among them.
    """
    counts = np.fromiter(map(len, positions), np.int64, len(positions))
    total = int(counts.sum())
    ids = np.fromiter(map(int, chain.from_iterable(positions)), np.int32, total)
    entries = [entry for position in positions for entry in position.values()]
    logprobs = np.fromiter([entry["logprob"] for entry in entries], np.float32, total)
    first = np.cumsum(counts) - counts
    top_ids = np.full((len(positions), top_k), -1, np.int32)
    top_logprobs = np.full((len(positions), top_k), np.nan, np.float32)
    if top_k:
        ranks = np.fromiter([entry["rank"] for entry in entries], np.int64, total)
        rows = np.repeat(np.arange(len(positions)), counts)
        inside = ranks <= top_k
        top_ids[rows[inside], ranks[inside] - 1] = ids[inside]
        top_logprobs[rows[inside], ranks[inside] - 1] = logprobs[inside]
    return logprobs[first], top_ids, top_logprobs


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
