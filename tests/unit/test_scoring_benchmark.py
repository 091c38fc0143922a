"""The scoring benchmark: what stock vLLM answers becomes the arrays that ours is compared with."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scoring.measure import measure
from benchmarks.scoring.peers import OURS, Reply, Scores
from benchmarks.scoring.processes import ROOT
from benchmarks.scoring.stock import scores_from_answer
from benchmarks.scoring.workloads import WORKLOADS, Batch


def entry(logprob: float, rank: int) -> dict[str, float | int | None]:
    return {"logprob": logprob, "rank": rank, "decoded_token": None}


def test_a_stock_answer_becomes_arrays_of_the_response_positions() -> None:
    sampled_outside = {"9": entry(-5.0, 4), "7": entry(-0.5, 1), "3": entry(-1.5, 2)}
    sampled_inside = {"3": entry(-1.25, 2), "8": entry(-0.25, 1)}
    prompt = [None, {"1": entry(-1.0, 1)}]
    choices = [
        {"index": 1, "prompt_logprobs": [*prompt, sampled_inside, sampled_outside]},
        {"index": 0, "prompt_logprobs": [*prompt, sampled_outside, sampled_inside]},
    ]
    scores = scores_from_answer({"choices": choices}, prompt_length=2, top_k=2)
    np.testing.assert_array_equal(scores.sampled, [[-5.0, -1.25], [-1.25, -5.0]])
    np.testing.assert_array_equal(scores.top_ids, [[[7, 3], [8, 3]], [[8, 3], [7, 3]]])
    np.testing.assert_array_equal(scores.top_logprobs[0], [[-0.5, -1.5], [-0.25, -1.25]])
    assert not scores_from_answer({"choices": choices}, prompt_length=2, top_k=0).top_ids


def test_batches_share_prompts_within_groups_and_nothing_with_earlier_batches() -> None:
    workload = WORKLOADS["group8_p4r1"]
    ids, later = workload.batch(0).token_ids(), workload.batch(1).token_ids()
    assert (ids[:, : workload.prompt] == ids[0, : workload.prompt]).all()
    assert len(np.unique(ids[:, workload.prompt :], axis=0)) == workload.samples
    assert (ids[0, :32] != later[0, :32]).any()
    request = workload.batch(0).request()
    rebuilt = [np.concatenate([request.contexts[s.context], s.response_ids]) for s in request.sequences]
    np.testing.assert_array_equal(rebuilt, ids)


class Resting:
    """The process group of a peer that costs nothing."""

    def reset_peak(self) -> None: ...
    def resident_bytes(self) -> int:
        return 0

    peak_bytes = resident_bytes

    def cpu_seconds(self) -> float:
        return 0.0


class Constant:
    """A peer that gives every token the same log-probability in `seconds`."""

    process = Resting()

    def __init__(self, name: str, logprob: float, seconds: float) -> None:
        self.name, self._logprob, self._seconds = name, logprob, seconds

    def connect(self) -> None: ...
    def ask(self, batch: Batch) -> Reply:
        sampled = np.full(batch.responses.shape, self._logprob, np.float32)
        return Reply(self._seconds, Scores(list(sampled)))

    def close(self) -> None: ...


def test_rates_are_medians_of_rounds_and_peers_that_disagree_are_refused() -> None:
    workload, announced = WORKLOADS["short"], []
    peers = [Constant(OURS, -1.0, 0.5), Constant("slow", -1.0, 2.0)]
    measured = measure(workload, peers, 3, itertools.count(), announced.append)  # type: ignore[arg-type]
    rates = {name: contestant.rate for name, contestant in measured.contestants.items()}
    assert rates == {OURS: workload.positions / 0.5, "slow": workload.positions / 2.0}
    peers[1] = Constant("wrong", -1.01, 2.0)
    with pytest.raises(RuntimeError, match=r"short: wrong differs from us by 0\.01 nats"):
        measure(workload, peers, 3, itertools.count(), announced.append)  # type: ignore[arg-type]


def test_a_peer_and_what_it_started_end_with_a_killed_benchmark(tmp_path: Path) -> None:
    found = tmp_path / "pids"
    peer = f"sleep 100 & echo $$ $! > {found}.part; mv {found}.part {found}; wait"
    program = (
        "import sys, time; from pathlib import Path\n"
        "from benchmarks.scoring.processes import ProcessGroup\n"
        f"ProcessGroup('peer', ['sh', '-c', {peer!r}], Path(sys.argv[1]), 1)\n"
        "time.sleep(100)\n"
    )
    benchmark = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "log")], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not found.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    benchmark.send_signal(signal.SIGKILL)
    benchmark.wait()
    pids = [int(pid) for pid in found.read_text().split()]
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")
