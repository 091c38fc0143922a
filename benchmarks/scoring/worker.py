"""The peers without a server: a process that is handed batches and times itself.

`flat` is vLLM inside the trainer's process with its flat answer; `floor` is what nobody can be
faster than without sharing prompts: the model's forward, the head on the scored rows, log-sum-exp, gather.
"""

from __future__ import annotations

import os
import sys
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.scoring.peers import FLAT, MAX_TOP_K, VLLM_ARGUMENTS, Array, Reply, Scores
from benchmarks.scoring.workloads import Batch

if TYPE_CHECKING:
    import torch

# Logits of one piece of the floor's head, in floats: more are no faster, fewer read the weights too often.
HEAD_FLOATS = 1 << 24
# Tokens of one forward pass of the floor, all tried once per workload and the fastest kept.
FORWARD_TOKENS = (1, 1024, 4096, 16_384)


class Flat:
    """`vllm.LLM` with `flat_logprobs`: arrays of numbers instead of objects per token."""

    def __init__(self, model: str) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, SamplingParams

        self._sampling = SamplingParams
        self._llm = LLM(
            model=model,
            dtype="float32",
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            max_logprobs=MAX_TOP_K,
            **VLLM_ARGUMENTS,
        )

    def ask(self, batch: Batch) -> Reply:
        prompts = [{"prompt_token_ids": ids} for ids in batch.token_ids().tolist()]
        began = time.perf_counter()
        params = self._sampling(
            prompt_logprobs=batch.top_k, flat_logprobs=True, max_tokens=1, detokenize=False
        )
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        answered = time.perf_counter()
        parts = [_flat_scores(output.prompt_logprobs, batch) for output in outputs]
        sampled, top_ids, top_logprobs = (list(part) for part in zip(*parts, strict=True))
        ended = time.perf_counter()
        scores = Scores(sampled, top_ids, top_logprobs) if batch.top_k else Scores(sampled)
        return Reply(ended - began, scores, parse_seconds=ended - answered)


def _flat_scores(flat: Any, batch: Batch) -> tuple[Array, Array, Array]:
    """Every position has the sampled token and then the K most probable ones."""
    start = flat.start_indices[batch.prompt_length]
    logprobs = np.array(flat.logprobs[start:], np.float32).reshape(-1, batch.top_k + 1)
    ids = np.array(flat.token_ids[start:], np.int32).reshape(-1, batch.top_k + 1)
    return logprobs[:, 0], ids[:, 1:], logprobs[:, 1:]


class Floor:
    """The Hugging Face model's forward and the least that turns it into scores of the sampled tokens."""

    def __init__(self, model: str) -> None:
        import torch
        import transformers

        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self._fastest: dict[tuple[int, ...], int] = {}

    def ask(self, batch: Batch) -> Reply:
        shape = (*batch.contexts.shape, *batch.responses.shape)
        if shape not in self._fastest:
            costs = {tokens: self._cost(batch, tokens) for tokens in FORWARD_TOKENS}
            self._fastest[shape] = min(costs, key=lambda tokens: costs[tokens])
        seconds, sampled = self._score(batch, self._fastest[shape])
        return Reply(seconds, Scores(list(sampled)), tokens_computed=batch.tokens)

    def _cost(self, batch: Batch, forward_tokens: int) -> float:
        """Processor seconds: what else runs on the machine must not choose for us."""
        costs = []
        for _ in range(2):
            began = time.process_time()
            self._score(batch, forward_tokens)
            costs.append(time.process_time() - began)
        return min(costs)

    def _score(self, batch: Batch, forward_tokens: int) -> tuple[float, Array]:
        """Seconds, and log-probabilities of the responses [sequences, R]."""
        import torch

        token_ids = batch.token_ids().astype(np.int64)
        with torch.inference_mode():
            began = time.perf_counter()
            sequences = max(1, forward_tokens // token_ids.shape[1])
            parts = [
                self._forward(piece, batch.prompt_length)
                for piece in torch.split(torch.from_numpy(token_ids), sequences)
            ]
            sampled: Array = torch.cat(parts).numpy()
            return time.perf_counter() - began, sampled

    def _forward(self, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        """[B, P + R] → [B, R]."""
        import torch

        hidden = self._model.model(input_ids=ids, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
        weight = self._model.lm_head.weight
        rows = hidden.reshape(-1, hidden.shape[-1])
        targets = ids[:, prompt:].reshape(-1, 1)
        size = max(1, HEAD_FLOATS // weight.shape[0])
        scores = []
        for part, target in zip(torch.split(rows, size), torch.split(targets, size), strict=True):
            logits = part @ weight.t()
            scores.append(logits.gather(1, target).squeeze(1) - logits.logsumexp(1))
        return torch.cat(scores).view(len(ids), -1)


def main(kind: str, model: str, descriptor: int) -> None:
    """Answer batches until the other end closes."""
    with Connection(descriptor) as connection:
        worker: Flat | Floor = Flat(model) if kind == FLAT else Floor(model)
        connection.send("ready")
        while True:
            try:
                batch: Batch = connection.recv()
            except EOFError:
                return
            connection.send(worker.ask(batch))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
