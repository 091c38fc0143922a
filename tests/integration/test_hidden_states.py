"""Hidden states of a teacher: those that transformers itself computes, at the rows that are scored."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.engine_requests import Reference, assert_scores, random_request, run_engine
from support.teachers import RecordingScorer, http_client, serve
from support.tiny_models import SMALL, save_tiny_model, tiny_model
from tutelage_client import AsyncTeacherClient
from tutelage_client.errors import TutelageError
from tutelage_client.types import Score, ScoreRequest, Signal

LAYERS = (1, 2)
TOLERANCE = 2e-3  # of float16 unit vectors


@torch.no_grad()
def expected(model: Any, request: ScoreRequest, index: int) -> npt.NDArray[np.float32]:
    """[R, L, H]: directions, from one plain forward of the sequence."""
    sequence = request.sequences[index]
    context = request.contexts[sequence.context]
    ids = torch.from_numpy(np.concatenate([context, sequence.response_ids]).astype(np.int64))[None]
    output = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)
    states = {layer: output.hidden_states[layer][0] for layer in LAYERS}
    states[2] = output.last_hidden_state[0]  # after the final norm
    rows = torch.stack([states[layer] for layer in request.signal.hidden_layers], dim=1)
    unit: npt.NDArray[np.float32] = torch.nn.functional.normalize(
        rows[len(context) - 1 : -1].float(), dim=-1
    ).numpy()
    return unit


def check(model: Any, request: ScoreRequest, score: Score) -> None:
    for index, answer in enumerate(score.sequences):
        if not request.signal.hidden_layers:
            assert answer.hidden is None
            continue
        wanted = expected(model, request, index)
        assert answer.hidden is not None
        assert answer.hidden.dtype == np.float16
        assert answer.hidden.shape == wanted.shape
        np.testing.assert_allclose(answer.hidden, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2", "bloom"])  # the last does not pack
async def test_layers_are_those_of_a_plain_forward(architecture: str, tmp_path: Path) -> None:
    """Requests for one layer, for both and for none share a batch; scores beside them stay exact."""
    model = tiny_model(architecture)
    signals = [
        Signal(hidden_layers=(2,)),
        Signal(sampled=False, hidden_layers=LAYERS),
        Signal(top_k=3),
        Signal(entropy=True, hidden_layers=(1,)),
    ]
    requests = [random_request(seed, signal=signal) for seed, signal in enumerate(signals)]
    async with run_engine(save_tiny_model(tmp_path / "model", architecture)) as engine:
        assert (engine.limits.hidden_layers, engine.limits.hidden_size) == (2, SMALL.hidden)
        scores = await asyncio.gather(*(engine.score(request) for request in requests))
    for request, score in zip(requests, scores, strict=True):
        check(model, request, score)
        assert_scores(score, request, Reference(model), 1e-4)


async def test_they_travel_through_both_doors_and_wrong_layers_are_refused(tmp_path: Path) -> None:
    model, request = tiny_model(), random_request(5, sequences=4, signal=Signal(hidden_layers=LAYERS))
    async with (
        run_engine(save_tiny_model(tmp_path / "model")) as engine,
        serve(engine) as doors,
        AsyncTeacherClient(doors.grpc) as client,
        http_client(doors.http) as http,
    ):
        assert (await client.get_teacher()).limits.hidden_layers == 2
        check(model, request, await client.score_request(request))
        body = {
            "contexts": [{"ids": request.contexts[0].tolist()}],
            "sequences": [{"id": "0", "response_ids": request.sequences[0].response_ids.tolist()}],
            "signal": {"hidden_layers": [1, 2]},
        }
        reply = (await http.post("/v1/score", json=body, params={"arrays": "list"})).json()
        np.testing.assert_allclose(
            np.array(reply["sequences"][0]["hidden"]), expected(model, request, 0), atol=TOLERANCE
        )
        for layers in ((0,), (3,), (2, 1), (1, 1), (-1,)):
            with pytest.raises(TutelageError, match="allowed are layers from 1 to 2 in ascending order"):
                await client.score_request(replace(request, signal=Signal(hidden_layers=layers)))
    scorer = RecordingScorer()
    async with serve(scorer) as doors, AsyncTeacherClient(doors.grpc) as client:
        with pytest.raises(TutelageError, match="this teacher answers no hidden states"):
            await client.score_request(replace(request, signal=Signal(hidden_layers=(1,))))
    assert not scorer.reached
